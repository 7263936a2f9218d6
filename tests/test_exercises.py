"""The exercises: what is said of nothing, of the reference's answers, and of wrong ones."""
# ruff: noqa: F821 (the wrong answers use the names of the file into which they are put)

import inspect
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "classroom"))
import exercises  # noqa: E402


class Wrong:
    """Each takes the place of the function of the exercise whose number is in its name."""

    def answer_1_floored_after_the_sum(mean, log_std, floor=0.0):
        return (0.5 * (mean**2 + torch.exp(2 * log_std) - 1 - 2 * log_std)).sum(-1).clamp_min(floor)

    def answer_1_std_taken_for_variance(mean, log_std, floor=0.0):
        return (0.5 * (mean**2 + torch.exp(log_std) - 1 - log_std)).clamp_min(floor).sum(-1)

    def answer_2_the_kl_alone(self, tokens):
        kl = kl_divergence(*self.encode(tokens)).mean()
        return kl, {"reconstruction": kl, "kl": kl, "accuracy": kl}

    def answer_2_nothing_damaged(self, tokens):
        logits = self.decode(self.encode(tokens)[0])
        right = (logits.argmax(-1) == tokens).float().mean()
        entropy = 4 * F.cross_entropy(logits.flatten(0, -2), tokens.flatten())
        kl = kl_divergence(*self.encode(tokens), self.config.kl_floor).mean()
        return entropy + 1e-3 * kl, {"reconstruction": entropy, "kl": kl, "accuracy": right}

    def answer_3_each_sample_paired_with_itself(samples, targets, alpha):
        x, y = samples.movedim(0, -2), targets.movedim(0, -2)
        return tuple((torch.cdist(x, to) ** alpha).mean((-1, -2)) for to in (y, x))

    def answer_3_only_one_target(samples, targets, alpha):
        x, y = samples.movedim(0, -2), targets.movedim(0, -2)
        return torch.cdist(x, y[..., :1, :]).mean((-1, -2)) ** alpha, torch.pdist(x).mean() ** alpha

    def answer_4_only_the_last_block(self, hidden, noise):
        x = self.noise_norm(self.noise_in(noise))
        c = self.hidden_norm(self.hidden_in(hidden)).expand_as(x)
        return self.final(self.final_norm(self.blocks[-1](x, c) if self.blocks else x))

    def answer_4_without_the_blocks(self, hidden, noise):
        return self.final(self.final_norm(self.noise_norm(self.noise_in(noise))))

    def answer_5_equal_samples_cost_nothing(first, second, target):
        return prefix_matches(first, target) + prefix_matches(second, target)

    def answer_5_each_token_by_itself(first, second, target):
        a, b, c = first == target, second == target, first == second
        return (a.float() + b.float() - c.float())[..., :4]

    def answer_6_floored_after_the_product(brier):
        return 100 * max(math.prod(float(b) for b in brier), 0.0) ** (1 / 4)

    def answer_6_the_arithmetic_mean(brier):
        return 100 * sum(max(float(b), 0.0) for b in brier) / 4

    def answer_7_draws_read_twice(draw, temperature):
        draws = draw(256)
        return draws[1:][(draws[1:] == draws[:-1]).all(-1)][0]

    def answer_7_the_fraction_ignored(draw, temperature):
        attempts = draw(252).unflatten(0, (-1, int(1 / temperature)))
        return attempts[(attempts == attempts[:, :1]).flatten(1).all(-1)][0, 0]

    def answer_8_a_in_place_of_a_over_i(draws, x, a, generator=None):
        while not torch.equal(next(draws), x):
            if torch.rand(()) < a:
                return False
        return True

    def answer_8_one_trial_only(draws, x, a, generator=None):
        return torch.equal(next(draws), x) or bool(torch.rand(()) >= a)


def verdict(exercise, trial, monkeypatch, wrong=None):
    """What the worked example says of the reference, or of it with a wrong answer in it."""
    for name in exercises.FILES:
        source = exercises.read(ROOT, name)
        if wrong and name == exercise.file:
            before, right, after = exercises.split(source, exercise)
            text = textwrap.dedent(inspect.getsource(getattr(Wrong, wrong)))
            text = text.replace(wrong, exercise.function.split(".")[-1])
            source = before + textwrap.indent(text, right[: right.index("def")]) + after
        (trial / name).write_text(source, encoding="utf-8")
    for name in ("autoencoder", "energy_head", "calm", "sample"):  # other tests need theirs
        monkeypatch.setitem(sys.modules, name, sys.modules[name])
    monkeypatch.syspath_prepend(trial)
    return exercises.worked_example(trial, exercise)


@pytest.mark.parametrize("exercise", exercises.EXERCISES, ids=lambda exercise: exercise.function)
def test_the_references_answer_is_right_and_has_tests(exercise, tmp_path, monkeypatch):
    assert verdict(exercise, tmp_path, monkeypatch) == ""
    tests = re.findall(r"def (test_\w+)", exercises.read(ROOT, "tests", f"test_{exercise.file}"))
    for word in exercise.tests.split(" or "):
        assert any(word in test for test in tests), f"no test is selected by {word}"


@pytest.mark.parametrize("wrong", [name for name in vars(Wrong) if "answer" in name])
def test_a_wrong_answer_is_called_wrong(wrong, tmp_path, monkeypatch):
    exercise = exercises.EXERCISES[int(wrong.split("_")[1]) - 1]
    assert "yours is" in verdict(exercise, tmp_path, monkeypatch, wrong)


def test_the_way_of_a_student(tmp_path):
    folder, check = tmp_path / "mine", "classroom/exercises.py check 5 6".split()
    exercises.new(folder)
    exercises.solution(folder, exercises.EXERCISES[5])
    done = subprocess.run([sys.executable, *check], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and "not started\n" in done.stdout
    assert done.stdout.endswith("right\n"), done


def test_mistakes_of_use_are_one_sentence(command):
    assert "not empty" in command(exercises.main, "new", ROOT)
    assert "make a copy first" in command(exercises.main, "check")
