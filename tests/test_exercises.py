"""The exercises: what `check` says of nothing, of the reference, and of the wrong answers that students give."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "classroom"))

import exercises  # noqa: E402

# (exercise, the mistake, the reference's code, the student's instead, a part of the message)
WRONG = [
    (1, "floored after the sum", "per_dimension.clamp_min(floor).sum(-1)", "per_dimension.sum(-1).clamp_min(floor)", "should be 5.5, yours is 4.505"),
    (1, "the half forgotten", "0.5 * (mean.square()", "(mean.square()", "should be 4.505, yours is 9.01"),
    (1, "the standard deviation taken for the variance", "torch.exp(2 * log_std)", "torch.exp(log_std)", "should be 2.195, yours is 0"),
    (1, "not summed", ".clamp_min(floor).sum(-1)", ".clamp_min(floor)", "shape ()"),
    (2, "damaged in evaluation too", "        if self.training:\n            latent = F.d", "        if True:\n            latent = F.d", "evaluation mode"),
    (2, "damaged targets", "tokens.flatten())\n", "inputs.flatten())\n", "the targets whole"),
    (2, "the loss of a token, not of a chunk", "c.chunk_size * F.cross_entropy", "F.cross_entropy", "the loss of 50 chunks"),
    (2, "the mean decoded, not a draw", " + log_std.exp() * torch.randn_like(mean)", "", "the noise of z"),
    (2, "no gradient through the draw", "mean + log_std.exp() * torch.randn_like(mean)", "torch.normal(mean, log_std.exp())", "reaches the encoder"),
    (2, "what stays is not scaled up", "F.dropout(mean + log_std.exp() * torch.randn_like(mean), c.dropout)",
     "(mean + log_std.exp() * torch.randn_like(mean)) * (torch.rand_like(mean) >= c.dropout)", "the mean size"),
    (2, "whole chunks dropped", "torch.rand(tokens.shape, device=tokens.device)", "torch.rand((*tokens.shape[:-1], 1))", "all of whose four tokens"),
    (2, "a latent without dropout", "F.dropout(mean + log_std.exp() * torch.randn_like(mean), c.dropout)",
     "mean + log_std.exp() * torch.randn_like(mean)", "all latents 0"),
    (3, "a sample compared with itself", "diversity(samples, alpha) -", "diversity(samples, alpha) * (len(samples) - 1) / len(samples) -", "-0.6667, yours is -1.556"),
    (3, "the loss, not the score", "return diversity(samples, alpha) - 2", "return -diversity(samples, alpha) + 2", "should be -0.6667, yours is 0.6667"),
    (3, "the two forgotten", "- 2 * distances", "- distances", "should be -0.6667, yours is 1"),
    (3, "summed over targets", "distances.mean((-1, -2))", "distances.sum((-1, -2))", "should be -0.6667"),
    (4, "the conditioning not normalised", "self.hidden_norm(self.hidden_in(hidden))", "self.hidden_in(hidden)", "head(hidden (2, 8), noise (4, 2, 5))"),
    (4, "the last SiLU forgotten", "F.silu(self.final_in(self.final_norm(x)))", "self.final_in(self.final_norm(x))", "head(hidden (2, 8), noise (4, 2, 5))"),
    (4, "only the last block", "x = block(x, c)", "last = block(x, c)", "head(hidden (2, 8), noise (4, 2, 5))"),
    (5, "collisions forgotten", " - prefix_matches(first, second)", "", "should be 1, 1, 1, 1, yours is 2, 2, 2, 2"),
    (5, "any token, not the prefix", "prefix_matches(first, target)", "(first == target)[..., :4].float()", "should be 1, 1, 0, 0, yours is 1, 1, 0, 1"),
    (5, "against the target only once", "prefix_matches(first, target) + prefix_matches(second, target)", "2 * prefix_matches(first, target)", "should be"),
    (6, "the product of negative scores", "max(float(b), 0.0) for b in brier", "float(b) for b in brier", "should be 0, yours is"),
    (6, "the arithmetic mean", "100 * math.prod(factors) ** (1 / len(factors))", "100 * sum(factors) / len(factors)", "should be 14.14, yours is 18.75"),
    (7, "draws read twice", "x, *others = itertools.islice(draws, n)",
     "pair = [*(others if 'others' in locals() else itertools.islice(draws, n - 1)), next(draws)]\n        x, *others = pair", "should be 4, yours is 2"),
    (7, "one of the tokens is enough", "other == x for", "other[0] == x[0] for", "should be 1, 2, yours is 1, 3"),
    (7, "the fraction ignored", " and (a == 0 or bernoulli_factory(draws, x, a, generator))", "", "at T = 0.4"),
    (7, "an answer when the draws run out", "raise InputError(f\"no chunk was accepted in {max_draws:,} draws at temperature {temperature:g}: take a higher \"\n"
     "                                     \"temperature, or the batch method.\")  # fmt: skip", "yield row", "InputError is raised"),
    (8, "a for a/i", "< a / i", "< a", "so P(x)^a = 0.707"),
    (8, "one of the tokens is enough", "next(draws) == x", "next(draws)[0] == x[0]", "the draws left"),
    (8, "counted from 0", "itertools.count(1)", "itertools.count(2)", "so P(x)^a = 0.707"),
    (8, "one trial only", "    for i in itertools.count(1):", "    for i in (1,):", "so P(x)^a = 0.707"),
    (9, "any draw of the pool", "log_weight[counts] + noise", "np.log(counts) + noise", "should be 0.75"),
    (9, "each value alike", "log_weight[counts] + noise", "noise", "should be 0.75"),
]  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A student's copy with every answer in it."""
    folder = tmp_path_factory.mktemp("class") / "copy"
    exercises.new(folder, harder=True)
    for number in range(1, 10):
        exercises.solution(folder, number)
    return folder


@pytest.mark.parametrize("number, right, wrong, message", [(n, *rest) for n, _, *rest in WRONG], ids=[f"{n} {what}" for n, what, *_ in WRONG])
def test_a_wrong_answer_is_called_wrong(copy, number, right, wrong, message):
    exercise = exercises.EXERCISES[number - 1]
    path = copy / exercise.file
    source = path.read_text(encoding="utf-8")
    answer = exercises.extract(source, exercise)
    assert right in answer, "the reference has changed: change the wrong answer too"
    path.write_text(exercises.replace(source, exercise, answer.replace(right, wrong)), encoding="utf-8")
    try:
        assert message in exercises.what_is_wrong(copy, exercise)
    finally:
        path.write_text(source, encoding="utf-8")


def test_solutions_bring_the_reference_back(copy):
    for name in exercises.SOURCES:
        assert (copy / name).read_text() == (ROOT / name).read_text()


def test_a_file_that_is_not_python_spoils_only_its_own_exercises(copy, capsys):
    path = copy / "calm.py"
    source = path.read_text(encoding="utf-8")
    path.write_text(source + "\ndef unfinished(:\n", encoding="utf-8")
    assert not exercises.check(copy, [3, 6])
    path.write_text(source.replace("def brier_lm(", "def brier_em("), encoding="utf-8")
    assert not exercises.check(copy, [6])
    path.write_text(source, encoding="utf-8")
    first, sixth, gone = capsys.readouterr().out.splitlines()
    assert first.endswith("right") and "calm.py is not Python: see its line" in sixth and "has no brier_lm any more" in gone


def test_an_error_of_the_students_is_told_with_its_line(copy):
    exercise = exercises.EXERCISES[5]
    path = copy / exercise.file
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace("factors = [max", "factors = [maximum"), encoding="utf-8")
    said = exercises.what_is_wrong(copy, exercise)
    path.write_text(source, encoding="utf-8")
    assert "NameError" in said and "in calm.py at: factors = [maximum" in said


def script(folder, *arguments):
    command = [sys.executable, "classroom/exercises.py", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_the_way_of_a_student(tmp_path):
    folder = tmp_path / "mine"
    assert script(ROOT, "new", folder).returncode == 0
    started = script(folder, "check")
    assert started.returncode == 1 and started.stdout.count("not started\n") == 8 and started.stdout.count("\n") == 8
    script(folder, "solution", 6)
    done = script(folder, "check", 6)
    assert done.returncode == 0 and done.stdout.count("right\n") == 1, done.stdout
    other = script(folder, "check", 5)
    assert other.returncode == 1 and "not started" in other.stdout


def test_mistakes_of_use_are_one_sentence(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "homework.txt").write_text("mine")
    for arguments, word in ((["new", tmp_path / "full"], "not empty"), (["check"], "make a copy first"), (["solution", 12], "no exercise 12")):
        done = script(ROOT, *arguments)
        assert done.returncode == 1 and word in done.stderr and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "full" / "homework.txt").read_text() == "mine"
