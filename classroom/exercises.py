"""Ten functions to write yourself. `python classroom/exercises.py` and one of these:

    new FOLDER     a copy of the project without the ten bodies: go there for the others
    check [N …]    not started, wrong (and how), or right
    hint N         the next of three hints; they stand in exercises.txt, as the examples do
    solution N     puts the reference's function in, and keeps yours in a file beside it
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the project, or a student's copy of it
REFERENCE = ROOT / ".reference"  # in a copy: the project as it was
SECONDS = 90  # a check that takes longer will never end
PYTEST = "-m pytest tests/test_examples.txt -xq --doctest-report=none --tb=short --color=no"

Exercise = namedtuple("Exercise", "number file function test_file tests hints examples")
EXERCISES = []
for text in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n\n")[1:]:
    heading, *hints = text[: text.index("\n>>> ")].split("\n")
    examples = text[text.index(">>> ") :].strip() + "\n"
    EXERCISES.append(Exercise(len(EXERCISES) + 1, *heading.split(" ", 3), hints, examples))


def find(path, function):
    """The text of a file, and in it that of a function, from `def` on."""
    source = path.read_text(encoding="utf-8")
    try:
        node = ast.parse(source, path.name)
        for name in function.split("."):
            node = {getattr(child, "name", ""): child for child in node.body}[name]
    except (SyntaxError, KeyError) as error:
        raise ValueError(f"{function} cannot be found in {path.name}: {error}") from None
    return source, ast.get_source_segment(source, node)


def new(folder):
    """A student's copy of the project, and in it the project as it was."""
    if REFERENCE.exists() or ROOT in (folder, *folder.parents):
        raise ValueError("use new in the project itself, and name a folder outside it")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name another folder")
    left_out = shutil.ignore_patterns("__pycache__", "test_exercises.py", "test_readme.py")
    for copy in (folder, folder / REFERENCE.name):
        for part in ("tests", "classroom"):
            shutil.copytree(ROOT / part, copy / part, ignore=left_out)
        for file in filter(Path.is_file, ROOT.iterdir()):
            shutil.copy(file, copy)
    for exercise in EXERCISES:
        source, function = find(folder / exercise.file, exercise.function)
        signature, docstring, _ = function.split('"""', 2)
        indent = signature.rpartition("\n")[2]
        end = f'\n\n{exercise.examples}"""\nraise NotImplementedError("exercise {exercise.number}")'
        stub = f'{signature}"""{docstring.rstrip()}{textwrap.indent(end, indent)}'
        (folder / exercise.file).write_text(source.replace(function, stub), encoding="utf-8")
    print(f"{folder} is ready. Go there, and type: python classroom/exercises.py check")


def set_up(trial, exercise, source):
    """Makes `trial` the reference with this one file, and the other exercises in it solved."""
    shutil.copytree(REFERENCE, trial, dirs_exist_ok=True)
    # The reference's functions come at the end, so that no line of the student's moves.
    for other in EXERCISES:
        if other.file == exercise.file and other != exercise:
            _, function = find(REFERENCE / other.file, other.function)
            source += f"\n\n{function}\n\n{other.function} = {other.function.split('.')[-1]}\n"
    (trial / exercise.file).write_text(source, encoding="utf-8")
    (trial / "tests/test_examples.txt").write_text(exercise.examples, encoding="utf-8")


def verdict(exercise):
    """Is the student's function not started, right, or wrong, and how? A short text."""
    source, function = find(ROOT / exercise.file, exercise.function)
    if re.search(rf'^ *raise NotImplementedError\("exercise {exercise.number}"', function, re.M):
        return "not started"
    command = [sys.executable, *PYTEST.split(), "-o", f"faulthandler_timeout={SECONDS / 2}"]
    command += [f"tests/{exercise.test_file}", "-k", f"test_examples or {exercise.tests}"]
    environment = os.environ | {"PYTHONUTF8": "1", "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "capture_output": True, "encoding": "utf-8"}
    with tempfile.TemporaryDirectory() as trial:
        trial = Path(trial).resolve()
        set_up(trial, exercise, source)
        try:
            done = subprocess.run(command, cwd=trial, timeout=SECONDS, **options)
        except subprocess.TimeoutExpired as error:
            # pytest's faulthandler tells where it was: last comes what called all the others.
            name = Path(exercise.file).name
            lines = re.findall(rf'{name}", line (\d+)', str(error.stderr)) or "?"
            return f"wrong: not ready after {SECONDS} s, at line {lines[-1]}. Is a loop endless?"
    if done.returncode == 0:
        return "right"
    return f"wrong\n{in_plain_words(done.stdout + done.stderr).replace(str(trial), str(ROOT))}"


def in_plain_words(said):
    """pytest's first failure: the call, expected, got. Or a test's own words, or a traceback."""
    failure = re.search(r"^_+ (.*?) _+\n(.*?)\n[=!]{9}", said, re.DOTALL | re.MULTILINE)
    if failure is None:
        return f"Python stops before the examples.\n{said[-600:]}"
    # Frames inside torch and tensors' insides do not help.
    title, text = failure.groups()
    text = re.sub(r"\n.*-packages.*(\n    .*)*|\nE .*<built-in.*", "", text)
    if "test_examples" not in title:
        return f"A test does not pass: {title.removeprefix('test_').replace('_', ' ')}\n{text}"
    # The last example is the call. A traceback begins with lines of doctest.
    text = re.sub(r'UNEXPECTED(.*\n)*?  File "<doctest.*(\n    .*)*', "Got an error:", text)
    return "Call:\n    " + text[text.rindex(">>> ") + 4 :].rpartition("\n")[0]


def check(*exercises):
    """Prints the verdicts, and ends with status 0 if all are right."""
    status = 0
    for exercise in exercises or EXERCISES:
        print(f"{exercise.number:2}  {exercise.file} {exercise.function}: ", end="", flush=True)
        try:
            said = verdict(exercise)
        except ValueError as error:
            said = f"wrong: {error}"
        print(said.strip().replace("\n", "\n    "))
        status = status or int(said != "right")
    sys.exit(status)


def hint(exercise):
    """The hints so far and one more. A file has an exercise's number for each of its hints."""
    record = ROOT / "hints_given.txt"
    with record.open("a", encoding="utf-8") as file:
        file.write(f"{exercise.number}\n")
    n = record.read_text(encoding="utf-8").split().count(str(exercise.number))
    print(f"{min(n, 3)} of 3 hints:", *exercise.hints[:n], sep="\n")


def solution(exercise):
    """Puts the reference's function into the student's file."""
    path = ROOT / exercise.file
    source, mine = find(path, exercise.function)
    kept = path.with_name(f"my_answer_{exercise.number}.txt")
    with kept.open("a", encoding="utf-8") as file:
        file.write(f"{mine}\n\n")
    _, reference = find(REFERENCE / exercise.file, exercise.function)
    # The new file takes the old one's place when it is whole: half of one would be a loss.
    path.with_suffix(".new").write_text(source.replace(mine, reference), encoding="utf-8")
    path.with_suffix(".new").replace(path)
    print(f"{exercise.function} is the reference's now. Yours is in {kept}")


def main():
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack letters
    commands = {"check": check, "hint": hint, "solution": solution}
    command, *words = sys.argv[1:] or [""]
    number = " ([1-9]|10)"
    try:
        if command == "new" and len(words) == 1:
            return new(Path(words[0]).resolve())
        if not re.fullmatch(f"check({number})*|(hint|solution){number}", " ".join(sys.argv[1:])):
            raise ValueError("type new FOLDER, check [N …], hint N or solution N, N from 1 to 10")
        if not REFERENCE.exists():
            raise ValueError("all answers are here: make a copy with new FOLDER, and go there")
        commands[command](*[EXERCISES[int(word) - 1] for word in words])
    except (ValueError, OSError) as error:
        print(f"exercises.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
