"""Eight functions of the method to write yourself, and the answer to "is it right?".

    python classroom/exercises.py new FOLDER    a copy of the five files without the eight bodies
    python classroom/exercises.py check [N …]   there: not started, wrong (and how), or right
    python classroom/exercises.py solution N    there: put the reference's answer in, and go on

Signatures and docstrings stay: they say what is asked. `check` first tries a worked example, then
the project's own tests of the function. Each exercise is judged by itself: while it is checked, the
other seven are the reference's.
"""

import argparse
import ast
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the project, or a student's copy of it
REFERENCE = ".reference"  # in a copy: the five files as they were
sys.path.insert(0, str(ROOT / REFERENCE if (ROOT / REFERENCE).exists() else ROOT))

import torch  # noqa: E402
from torch import tensor  # noqa: E402

import sample  # noqa: E402
from autoencoder import AutoencoderConfig  # noqa: E402

FILES = ("autoencoder.py", "energy_head.py", "calm.py", "sample.py", "train.py")
SECONDS = 60  # a worked example that takes longer will never end


# -------------------- The exercises
#
# tests: what pytest -k selects. examples: a call a line, and a remark. The student's function must
# give what the reference's gives, up to `tolerance`: more where chance has a part in it.
Exercise = namedtuple("Exercise", "number file function hint tests tolerance examples")
EXERCISES = [
    Exercise(1, "autoencoder.py", "kl_divergence",
        "1/2 (mean^2 + std^2 - 1 - log std^2) for each dimension; then the floor, then the sum",
        "kl or floored", 1e-4, """
kl_divergence(tensor([3.0, 0.0, 0.2]), torch.zeros(3))  # std 1, shares mean^2 / 2: 4.5, 0, 0.02
kl_divergence(torch.zeros(1), torch.ones(1))  # std is e: (e^2 - 1 - 2) / 2
kl_divergence(tensor([3.0, 0.0, 0.2]), torch.zeros(3), floor=0.5)  # floored: 4.5, 0.5, 0.5"""),
    Exercise(2, "autoencoder.py", "Autoencoder.forward",
        "in training lose tokens, encode, draw z = mean + std · noise and F.dropout it, decode; "
        "in evaluation z is the mean and nothing is lost; the loss compares with all tokens",
        "evaluation or damage or dropped or draw", 0.03, """
losses(Autoencoder, training=False)  # loss, reconstruction, kl, accuracy: no damage, z is the mean
losses(Autoencoder, training=True, dropout=1.0)  # inputs are 0, z is 0, but the targets are whole
losses(Autoencoder, training=True, dropout=0.0)  # z is a draw from the posterior
losses(Autoencoder, training=True, kl_floor=1e4)  # last number: gradients pass through z"""),
    Exercise(3, "energy_head.py", "fidelity_and_diversity",
        "subtract the targets' mean from all points, for the digits' sake; .movedim(0, -2) puts "
        "the points where torch.cdist looks for them; .clamp_min(1e-12) as slopes are steep near "
        "0, then ** alpha; fidelity is the mean of all N·M; diversity that of the N (N - 1) between "
        "two different samples: leave the diagonal out",
        "score or largest or gradient", 1e-4, """
fidelity_and_diversity(tensor([[0.0], [2.0], [4.0]]), tensor([[1.0], [3.0]]), 1.0)  # 5/3, 8/3
fidelity_and_diversity(tensor([[0.0], [4.0]]), tensor([[0.0]]), 0.5)  # roots of 0 and 4, and of 4
fidelity_and_diversity(torch.arange(12.0).view(4, 3, 1), torch.zeros(2, 3, 1), 1.0)  # 5 apart"""),
    Exercise(4, "energy_head.py", "EnergyHead.forward",
        "x = noise_norm(noise_in(noise)), c = the same of hidden, expanded to x; "
        "x = block(x, c) for each block; final(final_norm(x))",
        "the_head", 1e-4, """
random_head(EnergyHead, n_blocks=0)  # random weights, no block between first and last maps
random_head(EnergyHead, n_blocks=2)  # random weights, two blocks"""),
    Exercise(5, "calm.py", "brier_score",
        "each sample's hits estimate P(y), so the sum of both is 2 P(y); sum P(x)^2 is how often "
        "the two are equal. prefix_matches() compares, for all n at once",
        "two_sample", 1e-4, """
brier_score(*tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 9]]))  # n <= 4: 2 hits - 1
brier_score(tensor([1, 2, 3, 4]), tensor([1, 2, 3, 4]), tensor([7, 2, 3, 4]))  # no prefix hits, - 1
brier_score(tensor([1, 2, 9, 4]), tensor([7, 2, 3, 4]), tensor([1, 2, 3, 4]))  # 1 hit for n = 1, 2
brier_score(tensor([1, 2]), tensor([1, 2]), tensor([1, 9]))  # C = 2: only n = 1, 2
brier_score(*torch.zeros(3, 5, 8, dtype=torch.long))  # five chunks of 8: n = 1 … 4 for each"""),
    Exercise(6, "calm.py", "brier_lm", "floor each factor at 0 first, multiply then",
        "brier_lm", 1e-4, """
brier_lm([0.4, 0.2, 0.1, 0.05])  # 100 · 0.0004^(1/4)
brier_lm(tensor([-0.1, -0.1, -0.1, -0.02]))  # each factor is 0"""),
    Exercise(7, "sample.py", "temperature_sample_exact",
        "n, a = inverse_temperature(…); draws = one_by_one(…), made once. Again "
        "and again: n new draws; if all are equal, and for a > 0 bernoulli_factory(draws, x, a, "
        "generator) is True, return one of them",
        "exact_sampler or factory_with", 0.03, """
temperature_sample_exact(script([1], [2], [2], [3], [4], [4]), 1 / 2)  # attempts 1 2, 2 3, 4 4
temperature_sample_exact(script([1], [2], [1], [3], [3], [3]), 1 / 3)  # attempts 1 2 1, 3 3 3
temperature_sample_exact(script([1, 3], [1, 2], [3, 2], *[[1, 2]] * 3), 1 / 2)  # all tokens equal
temperature_sample_exact(script([5], [6]), 1)  # the first draw
share_of_ones(temperature_sample_exact, 0.8, 0.8)  # 0.8^1.25 / (0.8^1.25 + 0.2^1.25)
share_of_ones(temperature_sample_exact, 0.7, 4 / 9)  # 0.7^2.25 / (0.7^2.25 + 0.3^2.25)
repeats(temperature_sample_exact)  # all chance comes from draw and generator"""),
    Exercise(8, "sample.py", "bernoulli_factory",
        "for i = 1, 2, …: the next draw; True if it is x; else False with probability a/i",
        "exact_sampler or factory_accepts", 0.03, """
share_of_yes(bernoulli_factory, 0.2, 0.5)  # P(x) = 0.2, a = 0.5: the root of 0.2
share_of_yes(bernoulli_factory, 0.5, 0.75)  # P(x) = 0.5, a = 0.75: 0.5^0.75
bernoulli_factory(iter(tensor([[1, 3], [1, 2]])), tensor([1, 2]), 0.999999)  # 1 3 is not 1 2"""),
]  # fmt: skip


# -------------------- What the worked examples call


def losses(Autoencoder, training, **settings):
    """loss, reconstruction, kl, accuracy (in evaluation), and 1 if the loss moves the encoder."""
    sizes = {"latent_size": 6, "hidden_size": 16, "intermediate_size": 32}
    model = Autoencoder(AutoencoderConfig(vocab_size=11, **sizes, **settings)).train(training)
    torch.nn.init.normal_(model.from_latent.bias)  # or all tokens are as probable at z = 0
    loss, metrics = model(torch.randint(1, 11, (2000, 4)))
    loss.backward()
    moved = (model.squeeze.weight.grad != 0).any().float()
    accuracy = 0
    if not training:
        accuracy = metrics["accuracy"]
    return loss, metrics["reconstruction"], metrics["kl"], accuracy, moved


def random_head(EnergyHead, n_blocks):
    head = EnergyHead(hidden_size=8, latent_size=3, noise_size=5, n_blocks=n_blocks)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head(torch.randn(2, 8), torch.rand(4, 2, 5) - 0.5)


def script(*chunks):
    """draw(m) for a sampler: these chunks, and then others of which no two are equal."""
    place = itertools.chain(chunks, ([i] * len(chunks[0]) for i in itertools.count(100)))
    return lambda m: tensor([next(place) for _ in range(m)])


def share_of_ones(temperature_sample_exact, p, temperature):
    draw = lambda m: (torch.rand(m, 1) < p).long()
    return sum(temperature_sample_exact(draw, temperature) for _ in range(4000)) / 4000


def repeats(temperature_sample_exact):
    """Does it give the same with the same generator?"""
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        draw = lambda m: torch.randint(9, (m, 1), generator=generator)
        some = [temperature_sample_exact(draw, 2 / 3, generator=generator) for _ in range(50)]
        results.append(torch.stack(some))
    return tensor(float(torch.equal(*results)))


def share_of_yes(bernoulli_factory, p, a):
    draws = ((torch.rand(1) < p).long() for _ in itertools.count())
    says = [bool(bernoulli_factory(draws, tensor([1]), a)) for _ in range(10_000)]
    return sum(says) / 10_000


# -------------------- Taking functions out of files, and putting them in


def find(source, exercise):
    """The exercise's function in the syntax tree of a file's text."""
    try:
        node = ast.parse(source)
    except SyntaxError as error:
        raise sample.UserError(f"{exercise.file} is not Python: see its line {error.lineno}") from None
    for name in exercise.function.split("."):
        found = [child for child in node.body if getattr(child, "name", None) == name]
        if not found:
            raise sample.UserError(f"{exercise.file} has no {exercise.function} any more")
        node = found[-1]
    return node


def split(source, exercise):
    """The file's text before the exercise's function, the function, and the text after it."""
    node, lines = find(source, exercise), source.splitlines(keepends=True)
    begin, end = node.lineno - 1, node.end_lineno
    return "".join(lines[:begin]), "".join(lines[begin:end]), "".join(lines[end:])


def read(*path):
    return Path(*path).read_text(encoding="utf-8")


def without_body(source, exercise):
    """The file's text with an error in the place of the function's body."""
    docstring = find(source, exercise).body[0]
    before = source.splitlines(keepends=True)[: docstring.end_lineno]
    hint = textwrap.wrap(f"exercise {exercise.number}: {exercise.hint}", 80, drop_whitespace=False)
    error = ["raise NotImplementedError(", *[f'    "{part}"' for part in hint], ")\n"]
    error = textwrap.indent("\n".join(error), " " * docstring.col_offset)
    return "".join(before) + error + split(source, exercise)[2]


def new(folder):
    """A student's copy of the project."""
    copied, empty = (ROOT / REFERENCE).exists(), not folder.exists() or not any(folder.iterdir())
    sample.check(not copied, "this is a copy already: use new in the project itself")
    sample.check(empty, f"{folder} is not empty: name another")
    ignored = shutil.ignore_patterns("__pycache__", "test_exercises.py", "test_readme.py")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=ignored)
    (folder / "classroom").mkdir()
    (folder / REFERENCE).mkdir()
    for name in ("README.md", "LICENSE", "requirements.txt", "classroom/exercises.py"):
        shutil.copy(ROOT / name, folder / name)
    for name in FILES:
        shutil.copy(ROOT / name, folder / REFERENCE / name)
        source = read(ROOT, name)
        for exercise in EXERCISES:
            if exercise.file == name:
                source = without_body(source, exercise)
        (folder / name).write_text(source, encoding="utf-8")
    print(f"{folder} is ready. In it: python classroom/exercises.py check")


def solution(folder, exercise):
    """Puts in the reference's function. What stood there is kept beside the reference."""
    before, attempt, after = split(read(folder, exercise.file), exercise)
    _, answer, _ = split(read(folder, REFERENCE, exercise.file), exercise)
    kept = folder / REFERENCE / f"attempt_{exercise.number}.py"
    kept.write_text(attempt, encoding="utf-8")
    (folder / exercise.file).write_text(before + answer + after, encoding="utf-8")
    print(f"{exercise.function} is the reference's now. What stood there is in {kept}")


# -------------------- Checking


def set_up(trial, folder, exercise):
    """Makes `trial` the reference with the student's answer to this one exercise."""
    for name in FILES:
        shutil.copy(folder / REFERENCE / name, trial / name)
    source = read(folder, exercise.file)
    for other in EXERCISES:
        if other.file == exercise.file and other is not exercise:
            before, _, after = split(source, other)
            source = before + split(read(trial, other.file), other)[1] + after
    (trial / exercise.file).write_text(source, encoding="utf-8")


def evaluate(call, module):
    """The tensors that a call gives among the names of a module and of this file."""
    torch.manual_seed(0)
    result = eval(call, {**globals(), **vars(module)})
    if result is None:
        raise ValueError("it returns None: is a return missing?")
    results = result if isinstance(result, tuple) else (result,)
    return [torch.as_tensor(part).detach().double() for part in results]


def worked_example(trial, exercise):
    """What is wrong with the answer in `trial`, or an empty string."""
    name, remark = exercise.file.removesuffix(".py"), ""
    reference, call = importlib.import_module(name), f"import {name}"
    try:
        # The five files of the trial take the place of the reference's.
        for file in FILES:
            sys.modules.pop(file.removesuffix(".py"), None)
        sys.path.insert(0, str(trial))
        yours = importlib.import_module(name)
        for line in exercise.examples.split("\n")[1:]:
            call, remark = line.split("  # ")
            right, found = evaluate(call, reference), evaluate(call, yours)
            shapes = [[str(tuple(part.shape)) for part in parts] for parts in (right, found)]
            if shapes[0] != shapes[1]:
                shapes = f"{' and '.join(shapes[0])}, not {' and '.join(shapes[1])}"
                return f"{call}\n   should have shape {shapes}\n   ({remark})"
            right, found = [torch.cat([x.flatten() for x in parts]) for parts in (right, found)]
            if not torch.allclose(found, right, 1e-4, exercise.tolerance):
                right, found = [", ".join(f"{x:.5g}" for x in part) for part in (right, found)]
                return f"{call}\n   should be {right}\n   yours is  {found}\n   ({remark})"
    except Exception as error:  # whatever a student's code does
        places = traceback.extract_tb(error.__traceback__)
        place = [p for p in places if p.filename.startswith(str(trial))][-1:] or places[-1:]
        where = f"{Path(place[0].filename).name}, at: {place[0].line}"
        return f"{call}  # {remark}\n   stops with {type(error).__name__}: {error}\n   {where}"
    return ""


def run(trial, *command):
    environment = os.environ | {"PYTHONUTF8": "1", "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"}
    options = {"cwd": trial, "env": environment, "capture_output": True, "encoding": "utf-8"}
    return subprocess.run([sys.executable, *command], timeout=SECONDS, **options)


def what_is_wrong(folder, exercise):
    """The first thing that is wrong with the student's answer, or an empty string."""
    body = find(read(folder, exercise.file), exercise).body
    if len(body) <= 2 and isinstance(body[-1], ast.Raise):
        return "not started"
    with tempfile.TemporaryDirectory() as trial:
        trial, number = Path(trial), str(exercise.number)
        set_up(trial, folder, exercise)
        try:
            run(trial, __file__, "example", number, str(trial))
            if not (trial / "wrong.txt").exists():
                return "wrong: Python itself ends in the middle of it"
            if wrong := read(trial, "wrong.txt"):
                return f"wrong\n   {wrong}"
            shutil.copytree(folder / "tests", trial / "tests")
            options = ["-x", "-q", "--tb=short", "--color=no", "-k", exercise.tests]
            done = run(trial, "-m", "pytest", f"tests/test_{exercise.file}", *options)
        except subprocess.TimeoutExpired:
            return f"wrong: still running after {SECONDS} seconds: does a loop never end?"
    if done.returncode == 0:
        return ""
    said = re.findall(r"^(?:E  |FAILED|ERROR).*", done.stdout, re.MULTILINE) or [done.stdout]
    return f"wrong: the example is right, but a test is not\n   {said[0]}\n   {said[-1]}"


def check(folder, exercises):
    """Prints what is wrong with each exercise, or "right". Are they all?"""
    all_right = True
    for exercise in exercises:
        print(f"{exercise.number}  {exercise.file:15} {exercise.function:25} ", end="", flush=True)
        try:
            wrong = what_is_wrong(folder, exercise)
        except ValueError as error:
            wrong = f"wrong: {error}"
        print(wrong or "right")
        all_right = all_right and not wrong
    return all_right


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = ("new", "check", "solution", "example")
    parser.add_argument("command", choices=commands, metavar="new | check | solution")
    parser.add_argument("arguments", nargs="*", metavar="FOLDER or N")
    args = parser.parse_args()
    if args.command == "new":
        sample.check(len(args.arguments) == 1, "name one folder: new FOLDER")
        return new(Path(args.arguments[0]))
    if args.command == "example":  # what `check` runs in a process of its own
        sample.check(len(args.arguments) == 2, "example is for check alone: use check N")
        number, trial = args.arguments
        wrong = worked_example(Path(trial), EXERCISES[int(number) - 1])
        return Path(trial, "wrong.txt").write_text(wrong, encoding="utf-8")
    copied = (ROOT / REFERENCE).exists()
    sample.check(copied, "every answer is here: make a copy first, with new FOLDER")
    for number in args.arguments:
        known = re.fullmatch("[1-8]", number)
        sample.check(known, f"there is no exercise {number}, only 1 to 8")
    chosen = [EXERCISES[int(number) - 1] for number in args.arguments]
    if args.command == "check":
        sys.exit(0 if check(ROOT, chosen or EXERCISES) else 1)
    for exercise in chosen:
        solution(ROOT, exercise)


if __name__ == "__main__":
    sample.run(main)
