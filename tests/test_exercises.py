"""The exercises: their data, what is said of answers, and what the commands promise."""

import doctest
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "classroom"))
import exercises  # noqa: E402

# A project so small that a check is quick: two functions, the second of which needs the first.
SMALL = 'def double(x):\n    """2 x."""\n    return 2 * x\n\n\nclass Box:\n    def half(self, x):\n'
SMALL += '        """Half of x."""\n        return double(x) / 4\n'
TESTS = "import small\n\ndef test_double_of_text():\n    assert small.double('a') == 'aa'\n"
STUBS = ['raise NotImplementedError("exercise 1")', 'raise NotImplementedError("exercise 2")']
EXAMPLES = ">>> from small import *\n>>> Box().half(double(4))\n4.0\n"
DOUBLE = exercises.Exercise(1, "small.py", "double", "test_small.py", "double", "abc", EXAMPLES)
HALF = DOUBLE._replace(number=2, function="Box.half")


@pytest.fixture
def small(tmp_path, monkeypatch, capsys):
    """A function: what check says of (exercise, its body), in a student's copy of SMALL."""
    file, reference = tmp_path / "Übungen 1/small.py", tmp_path / "Übungen 1/.reference"
    (reference / "tests").mkdir(parents=True)
    (reference / "small.py").write_text(SMALL, "utf-8")
    (reference / "tests/test_small.py").write_text(TESTS, "utf-8")
    stubs = SMALL.replace("return 2 * x", STUBS[0]).replace("return double(x) / 4", STUBS[1])
    monkeypatch.setattr(exercises, "ROOT", file.parent)
    monkeypatch.setattr(exercises, "REFERENCE", reference)
    monkeypatch.setattr(exercises, "EXERCISES", [DOUBLE, HALF])

    def said_of(exercise, body):
        file.write_text(stubs.replace(STUBS[exercise.number - 1], body), "utf-8")
        with pytest.raises(SystemExit) as ended:
            exercises.check(exercise)
        return capsys.readouterr().out.replace(str(file), "FILE") + f"status {ended.value.code}"

    return said_of


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=lambda exercise: exercise.function)
def test_the_examples_are_true_of_the_reference(exercise):
    examples = doctest.DocTestParser().get_doctest(exercise.examples, {}, "examples", "", 0)
    assert doctest.DocTestRunner().run(examples) == (0, len(examples.examples))
    assert len(examples.examples) >= 3 and len(exercise.hints) == 3
    tests = (ROOT / "tests" / exercise.test_file).read_text("utf-8")
    for word in exercise.tests.split(" or "):
        assert re.search(rf"def test_\w*{word}", tests), f"no test is selected by {word}"


def test_a_new_folder_lacks_only_the_bodies_and_works_by_itself(tmp_path, monkeypatch):
    exercises.new(tmp_path)
    monkeypatch.setattr(exercises, "ROOT", tmp_path)
    monkeypatch.setattr(exercises, "REFERENCE", tmp_path / ".reference")
    assert [exercises.verdict(e) for e in exercises.EXERCISES] == ["not started"] * 10
    for e in exercises.EXERCISES:
        _, stub = exercises.find(tmp_path / e.file, e.function)
        _, function = exercises.find(ROOT / e.file, e.function)
        assert stub.startswith(function[: function.rindex('"""')].rstrip()) and ">>>" in stub
        exercises.solution(e)
        assert exercises.find(tmp_path / e.file, e.function)[1] == function
    assert exercises.verdict(exercises.EXERCISES[5]) == "right"


@pytest.mark.parametrize("exercise, body, said", [
    (DOUBLE, STUBS[0], ["double: not started", "status 1"]),
    (DOUBLE, "return x + x", ["double: right", "status 0"]),  # the other one is not started
    (HALF, "return double(double(x)) / 8", ["half: right"]),
    (DOUBLE, "return x", ["wrong", "Call:\n        Box().half", "Expected:", "4.0", "Got:", "1.0"]),
    (DOUBLE, "import numpy\n    numpy.max(1, x)", ["an error:", '"FILE", line 4', "AxisError"]),
    (DOUBLE, "return int(x) * 2", ["A test does not pass: double of text", "small.py:3", "'a'"]),
    (HALF, "return (", ["half: wrong: Box.half cannot be found in small.py", "line 9"]),
])  # fmt: skip
def test_what_is_said_is_short_and_names_the_students_own_lines(exercise, body, said, small):
    text = small(exercise, body)
    assert len(text.splitlines()) < 12 and "-packages" not in text
    for words in said:
        text = text[text.index(words) :]


def test_a_loop_without_an_end_is_ended_and_its_line_is_named(small, monkeypatch):
    monkeypatch.setattr(exercises, "SECONDS", 6)
    said = small(DOUBLE, "import time\n    time.sleep(20)")  # as good as a loop
    assert "not ready after 6 s, at line 4" in said


def test_hints_come_in_steps_and_a_solution_keeps_all_versions(small, capsys):
    for n in (1, 2, 3, 3):
        exercises.hint(DOUBLE)
        assert capsys.readouterr().out.split()[-n:] == ["a", "b", "c"][:n]
    for version in ("return 'first'", "return 'second'"):
        small(DOUBLE, version)
        exercises.solution(DOUBLE)
        assert "return 2 * x" in (exercises.ROOT / "small.py").read_text("utf-8")
        assert version in (exercises.ROOT / "my_answer_1.txt").read_text("utf-8")
    assert "first" in (exercises.ROOT / "my_answer_1.txt").read_text("utf-8")


def test_mistakes_of_use_are_one_sentence(command, tmp_path):
    assert "go there" in command(exercises.main, "check")
    for words in ([], ["hint"], ["check", "11"], ["solution", "1", "2"], ["new"], ["find", "3"]):
        assert "type new FOLDER" in command(exercises.main, *words)
    (tmp_path / "file").touch()
    assert "is not empty" in command(exercises.main, "new", tmp_path)
    assert "outside" in command(exercises.main, "new", ROOT / "tests/mine")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
