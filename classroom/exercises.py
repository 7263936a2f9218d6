"""
Exercises: eight functions of the method, to be filled in, and the answer to "is it right?".

    python classroom/exercises.py new FOLDER     a copy of the whole project in which the bodies of the eight are missing
    python classroom/exercises.py check          in that folder: what is not started, wrong (and how), or right
    python classroom/exercises.py solution N     in that folder: the reference's answer to exercise N, so that one can go on

A copy keeps signatures and docstrings, which say what is asked. `check` first tries a worked example, small enough to do by
hand, then the project's own tests of that function. Each exercise is judged by itself: while it is checked, the others are
the reference's. `new FOLDER --harder` also removes a ninth function.
"""

import argparse
import ast
import multiprocessing
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("autoencoder.py", "energy_head.py", "calm.py", "sample.py", "train.py")
REFERENCE = ".reference"  # in a copy: the files as they were
SECONDS = 60  # a worked example that takes longer will never end


@dataclass
class Exercise:
    number: int
    file: str
    function: str  # or Class.method
    hint: str
    tests: str  # a file in tests/, and the -k expression that selects this function's tests there

    def find(self, source):
        """The function's node in the syntax tree of a source text. Raises SystemExit if it is gone."""
        body = ast.parse(source).body
        for name in self.function.split("."):
            found = [node for node in body if getattr(node, "name", None) == name]
            if not found:
                raise SystemExit(f"{self.file} has no {self.function} any more: exercises.py solution {self.number} puts it back.")
            body = found[-1].body
        return found[-1]


EXERCISES = [
    Exercise(1, "autoencoder.py", "kl_divergence", "the formula for one dimension, then the floor, then the sum",
             "test_autoencoder.py::kl or prior"),
    Exercise(2, "autoencoder.py", "Autoencoder.forward", "damage the input (training only), encode, draw z, damage it, decode; compare with the whole tokens",
             "test_autoencoder.py::damage or rate or decodes_a_draw"),
    Exercise(3, "energy_head.py", "energy_score", "diversity() is given; the other term is 2 E |x - y|^alpha over all N·M pairs",
             "test_energy_head.py::energy_score or largest or coincide or (gradients and not loss)"),
    Exercise(4, "energy_head.py", "EnergyHead.forward", "embed and normalise the noise (x) and the hidden state (c), then the blocks, then the last two maps",
             "test_energy_head.py::plain_head or origin or samples_differ or generator"),
    Exercise(5, "calm.py", "brier_score", "prefix_matches() is given: which two of the three must agree, and with which sign?",
             "test_calm.py::single_cases or two_sample"),
    Exercise(6, "calm.py", "brier_lm", "floor first, multiply then", "test_calm.py::brier_lm"),
    Exercise(7, "sample.py", "temperature_sample_exact", "attempts of n draws, each draw read once; bernoulli_factory() decides where 1/T is no whole number",
             "test_sample.py::(exact_sampler_against and (-1- or -0.5- or -0.3333333333333333-)) or blocks or too_many"),
    Exercise(8, "sample.py", "bernoulli_factory", "for i = 1, 2, ...: draw; accept, or give up with probability a/i",
             "test_sample.py::exact_sampler_against and (-0.9- or -0.75- or -0.4- or -0.23-) and (two or impossible)"),
    Exercise(9, "sample.py", "temperature_sample_batch", "distinct_draws() and log_weights() are given: choose one value in each pool by its weight",
             "test_sample.py::batch or overflow"),
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Taking functions out of files, and putting them in


def segment(source, node):
    """The first and the last line of a function, counted from 0, the last excluded."""
    return node.lineno - 1, node.end_lineno


def replace(source, exercise, text):
    """A source text with the exercise's function made `text`, lines with their indentation."""
    lines, (begin, end) = source.splitlines(keepends=True), segment(source, exercise.find(source))
    return "".join(lines[:begin]) + text + "".join(lines[end:])


def extract(source, exercise):
    begin, end = segment(source, exercise.find(source))
    return "".join(source.splitlines(keepends=True)[begin:end])


def hole(source, exercise):
    """The function's text with its signature and docstring alone, and an error where the body was."""
    node = exercise.find(source)
    lines = source.splitlines(keepends=True)
    indent = " " * node.body[0].col_offset
    error = f'{indent}raise NotImplementedError("exercise {exercise.number}: {exercise.hint}")\n'
    return "".join(lines[node.lineno - 1 : node.body[0].end_lineno]) + error


def is_started(source, exercise):
    last = exercise.find(source).body[-1]
    return not (isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last) and len(exercise.find(source).body) <= 2)


def new(folder, harder=False):
    """A student's copy of the project this file belongs to. Exits with a sentence if the folder is in use."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder} exists and is not empty: name a new folder.")
    keep = shutil.ignore_patterns("__pycache__", ".*_cache", "out", "data", ".venv", ".git", REFERENCE)
    shutil.copytree(ROOT, folder, ignore=keep, dirs_exist_ok=True)
    (folder / REFERENCE).mkdir()
    for name in SOURCES:
        source = (ROOT / name).read_text(encoding="utf-8")
        (folder / REFERENCE / name).write_text(source, encoding="utf-8")
        for exercise in EXERCISES:
            if exercise.file == name and (harder or exercise.number < 9):
                source = replace(source, exercise, hole(source, exercise))
        (folder / name).write_text(source, encoding="utf-8")
    print(f"{folder} is ready. In it: python classroom/exercises.py check")


def solution(folder, number):
    """Puts the reference's function for exercise `number` into the folder's file."""
    exercise = EXERCISES[number - 1]
    path = folder / exercise.file
    answer = extract((folder / REFERENCE / exercise.file).read_text(encoding="utf-8"), exercise)
    path.write_text(replace(path.read_text(encoding="utf-8"), exercise, answer), encoding="utf-8")
    print(f"exercise {number}: {exercise.function} in {exercise.file} is the reference's now.")


# ----------------------------------------------------------------------------------------------------------------------
# Worked examples: each yields (what is called, what it gave), or (…, …, the error allowed to chance). They run on the reference
# and on the student's files, and what they give must be the same.


def example_1():
    import torch
    from autoencoder import kl_divergence

    mean, zeros = torch.tensor([3.0, 0.0, 0.1]), torch.zeros(3)
    yield "kl_divergence(mean [3, 0, 0.1], log_std [0, 0, 0])", kl_divergence(mean, zeros)
    yield "kl_divergence(mean [0], log_std [1])", kl_divergence(torch.zeros(1), torch.ones(1))
    yield "kl_divergence(mean [3, 0, 0.1], log_std [0, 0, 0], floor=0.5), where the three shares are 4.5, 0 and 0.005,", kl_divergence(
        mean, zeros, floor=0.5
    )
    yield "kl_divergence of means and log_stds (2, 3)", kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3))


def example_2():
    import torch
    from autoencoder import Autoencoder, AutoencoderConfig

    torch.manual_seed(0)
    model, tokens = Autoencoder(AutoencoderConfig(11, 4, 6, 16, 32)).eval(), torch.randint(1, 11, (50, 4))
    torch.nn.init.normal_(model.from_latent.bias)  # with all biases 0, a latent of 0 would be decoded to logits of 0
    yield "the loss of 50 chunks in evaluation mode, where nothing is damaged,", model(tokens)[0]
    yield "the difference of two such losses of the same chunks", model(tokens)[0] - model(tokens)[0]
    model.train()
    model.config.dropout = 1.0
    yield "the loss in training mode with dropout 1 (all inputs 0, all latents 0, but the targets whole)", model(tokens)[0]
    model.config.dropout = 0.0
    yield "whether two losses in training mode differ without dropout, by the noise of z (1: yes),", model(tokens)[0] != model(tokens)[0]
    model.config.dropout, seen = 0.5, []
    for module in (model.embedding, model.from_latent):
        module.register_forward_pre_hook(lambda _, args: seen.append((args[0] == 0).float().mean()))
    model(torch.ones(5000, 4, dtype=torch.long))
    yield "the share of input tokens that became 0 with dropout 0.5", seen[0], 0.02
    yield "the share of latent coordinates that became 0 with dropout 0.5", seen[1], 0.02


def example_3():
    import torch
    from energy_head import energy_score

    x, y = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([[1.0], [3.0]])
    call = "energy_score(samples 0, 2, 4; targets 1, 3), where two different samples lie 8/3 apart on average, a sample and a target 5/3,"
    yield call, energy_score(x, y)
    yield "the same with alpha = 0.5, the root of each distance,", energy_score(x, y, 0.5)
    yield "energy_score of samples (4, 2, 3, 5) and targets (7, 2, 3, 5)", energy_score(torch.zeros(4, 2, 3, 5), torch.zeros(7, 2, 3, 5))
    same = torch.ones(3, 2, requires_grad=True)
    energy_score(same, same[:1].detach()).backward()
    yield "the gradient where all samples equal the target", same.grad


def example_4():
    import torch
    from energy_head import EnergyHead

    torch.manual_seed(0)
    head = EnergyHead(hidden_size=8, latent_size=3, noise_size=5, n_blocks=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    hidden, noise = torch.randn(2, 8), torch.rand(4, 2, 5) - 0.5
    yield "head(hidden (2, 8), noise (4, 2, 5)), with random weights and seed 0,", head(hidden, noise)


def example_5():
    import torch
    from calm import brier_score

    x, y, z = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 4], [7, 2, 3, 4]])
    call = "brier_score(first {}, second {}, target {}), for n = 1, 2, 3, 4,"
    yield call.format("1 2 3 4", "1 2 3 4", "1 2 3 4"), brier_score(x, x, x)
    yield call.format("1 2 9 4", "7 2 3 4", "1 2 3 4"), brier_score(y, z, x)
    yield call.format("1 2 3 4", "1 2 3 4", "7 2 3 4"), brier_score(x, x, z)
    eight = torch.zeros(5, 8, dtype=torch.long)
    yield "brier_score of chunks (5, 8)", brier_score(eight, eight, eight)


def example_6():
    from calm import brier_lm

    yield "brier_lm([0.4, 0.2, 0.1, 0.05])", brier_lm([0.4, 0.2, 0.1, 0.05])
    yield "brier_lm([-0.1, -0.1, -0.1, -0.02]), each factor floored at 0 by itself,", brier_lm([-0.1, -0.1, -0.1, -0.02])


def scripted(values):
    """draw(m) for the samplers: the next m of the values, each a chunk of one token."""
    import torch

    place = iter(values)
    return lambda m: torch.tensor([[next(place, 0)] for _ in range(m)])


def example_7():
    from autoencoder import InputError
    from sample import temperature_sample_exact

    call = "temperature_sample_exact at T = 1/2 of the draws 1, 2, 2, 3, 4, 4, which are the pairs (1, 2), (2, 3), (4, 4),"
    for block in (1, 2, 5, 6):
        chunk, used = temperature_sample_exact(scripted([1, 2, 2, 3, 4, 4]), 0.5, block=block, with_draws=True)
        yield f"{call} in blocks of {block},", chunk
        yield f"the number of draws it read, in blocks of {block},", used
    yield "temperature_sample_exact at T = 1 of the draws 5, 6, …", temperature_sample_exact(scripted([5, 6]), 1.0)
    try:
        temperature_sample_exact(scripted(range(1, 1000)), 0.5, max_draws=500)
        raised = False
    except InputError:
        raised = True
    yield "whether InputError is raised after max_draws=500 draws, no two of them equal (1: yes),", raised


def example_8():
    import torch
    from sample import bernoulli_factory

    torch.manual_seed(0)
    for p, a in ((0.5, 0.5), (0.2, 0.75)):
        draws = iter((torch.rand(400_000) < p).long().unsqueeze(-1).tolist())
        share = sum(bool(bernoulli_factory(draws, [1], a)) for _ in range(20_000)) / 20_000
        yield f"the share of 20 000 trials that accept x, where P(x) = {p} and a = {a}, so P(x)^a = {p**a:.3f},", share, 0.02


def example_9():
    import torch
    from sample import temperature_sample_batch

    torch.manual_seed(0)
    pools = torch.tensor([0, 0, 0, 1, 1]).view(1, 5, 1).expand(20_000, -1, -1)
    for temperature in (0.5, 1.0):
        share = (temperature_sample_batch(pools, temperature) == 0).float().mean()
        yield f"the share of pools 0 0 0 1 1 from which 0 is chosen at T = {temperature}", share, 0.02
    alone = temperature_sample_batch(torch.tensor([[[1], [2], [2], [3]], [[1], [4], [5], [4]]]), 1 / 3)
    yield "the choice at T = 1/3 from pools 1 2 2 3 and 1 4 5 4, where nothing was drawn three times,", alone


def run_example(number, folder, answer):
    """
    In a process of its own: puts into the queue `answer` what the worked example gives with the files in `folder`, as a list
    of (call, shape, numbers, error), and a sentence on what stopped it, or None.
    """
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))
    for name in SOURCES:
        sys.modules.pop(name.removesuffix(".py"), None)
    cases, stopped = [], None
    try:
        for call, found, *error in globals()[f"example_{number}"]():
            found = torch.as_tensor(found).detach().double()
            cases.append((call, tuple(found.shape), found.flatten().tolist(), *(error or [1e-5])))
    except BaseException as error:  # whatever a student's code does
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == Path(folder)]
        where = f", in line {places[-1].lineno} of {Path(places[-1].filename).name}: {places[-1].line}" if places else ""
        stopped = f"it stops with {type(error).__name__}: {error}{where}"
    answer.put((cases, stopped))


def example(number, folder):
    """What `run_example` puts into its queue, or a sentence if it never does."""
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    answer = context.Queue()
    process = context.Process(target=run_example, args=(number, folder, answer))
    process.start()
    try:
        return answer.get(timeout=SECONDS)
    except queue.Empty:
        return [], f"the worked example was still running after {SECONDS} seconds: is there a loop that never ends?"
    finally:
        process.kill()
        process.join()


def first_misfit(expected, found, stopped):
    """None if the student's cases are the reference's, else a sentence about the first that is not."""
    for (call, shape, numbers, error), (_, their_shape, theirs, _) in zip(expected, found):
        if shape != their_shape:
            return f"{call} should have shape {shape}, yours has {their_shape}"
        for right, wrong in zip(numbers, theirs):
            if not abs(right - wrong) <= error + 1e-4 * abs(right):  # NaN is wrong too
                return f"{call} should be {right:.4g}, yours is {wrong:.4g}" + f" (up to {error}, for chance)" * (error > 1e-3)
    return stopped


# ----------------------------------------------------------------------------------------------------------------------
# Checking


def what_is_wrong(folder, exercise):
    """None if the exercise is right, else a sentence. The other exercises are the reference's while this one is tried."""
    with tempfile.TemporaryDirectory() as trial:
        trial = Path(trial) / "trial"
        shutil.copytree(folder, trial, ignore=shutil.ignore_patterns("__pycache__", ".venv", "out", "data", REFERENCE))
        for other in EXERCISES:
            if other.number != exercise.number:
                reference = extract((folder / REFERENCE / other.file).read_text(encoding="utf-8"), other)
                path = trial / other.file
                path.write_text(replace(path.read_text(encoding="utf-8"), other, reference), encoding="utf-8")
        wrong = first_misfit(example(exercise.number, folder / REFERENCE)[0], *example(exercise.number, trial))
        return wrong or failing_test(trial, exercise)


def failing_test(trial, exercise):
    """None if the project's tests of the exercise pass in the folder `trial`, else what the first failing one says."""
    file, selection = exercise.tests.split("::")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"tests/{file}", "-k", selection]
    try:
        done = subprocess.run(command, cwd=trial, capture_output=True, text=True, timeout=5 * SECONDS)
    except subprocess.TimeoutExpired:
        return f"its tests were still running after {5 * SECONDS} seconds."
    if done.returncode == 0:
        return None
    name = re.search(r"^(?:FAILED|ERROR) \S+::(\w+)", done.stdout, re.MULTILINE)
    reason = re.search(r"^E +(.+)$", done.stdout, re.MULTILINE)
    said = name[1].removeprefix("test_").replace("_", " ") if name else "the tests"
    return f"the worked example is right, but not the test “{said}”: {reason[1] if reason else 'it does not run'}"


def check(folder, numbers):
    """Prints a line for each exercise; returns True if all are right."""
    verdicts = []
    for exercise in EXERCISES:
        try:
            source = (folder / exercise.file).read_text(encoding="utf-8")
            started = is_started(source, exercise)
            untouched = extract(source, exercise) == extract((folder / REFERENCE / exercise.file).read_text(encoding="utf-8"), exercise)
        except SyntaxError as error:
            started, untouched = error, False
        if exercise.number not in (numbers or range(1, 9 + (not untouched))):
            continue
        if isinstance(started, SyntaxError):
            verdict = f"wrong: {exercise.file} is not Python, see its line {started.lineno}."
        elif not started:
            verdict = "not started"
        else:
            wrong = what_is_wrong(folder, exercise)
            verdict = f"wrong: {wrong}" if wrong else "right"
        print(f"{exercise.number}  {exercise.file:15} {exercise.function:25} {verdict}", flush=True)
        verdicts.append(verdict)
    return all(verdict == "right" for verdict in verdicts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("new", help="make a student's copy")
    maker.add_argument("folder")
    maker.add_argument("--harder", action="store_true", help="remove the ninth function, the batch approximation, too")
    checker = commands.add_parser("check", help="in a copy: what is not started, wrong or right; exit status 0 if all is right")
    checker.add_argument("numbers", type=int, nargs="*", metavar="N", help="only these exercises")
    solver = commands.add_parser("solution", help="in a copy: put the reference's answer in")
    solver.add_argument("numbers", type=int, nargs="+", metavar="N")
    args = parser.parse_args()
    if args.command == "new":
        return new(args.folder, args.harder)
    if wrong := [number for number in args.numbers if not 1 <= number <= len(EXERCISES)]:
        raise SystemExit(f"there is no exercise {wrong[0]}: they are numbered 1 to {len(EXERCISES)}.")
    if not (ROOT / REFERENCE).exists():
        raise SystemExit("this is the project itself, with every answer in it: make a copy first, exercises.py new FOLDER.")
    if args.command == "solution":
        for number in args.numbers:
            solution(ROOT, number)
    elif not check(ROOT, args.numbers):
        sys.exit(1)


if __name__ == "__main__":
    main()
