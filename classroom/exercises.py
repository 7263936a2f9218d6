"""
Exercises: eight functions of the method, to be filled in, and the answer to "is it right?".

    python classroom/exercises.py new FOLDER     a copy of the five files, what they need, and their tests; the bodies of the eight are missing
    python classroom/exercises.py check          in that folder: what is not started, wrong (and how), or right
    python classroom/exercises.py solution N     in that folder: the reference's answer to exercise N, so that one can go on

A copy keeps signatures and docstrings, which say what is asked. `check` first tries a worked example, then the project's own
tests of that function. Each exercise is judged by itself: while it is checked, everything else is the reference's. `new FOLDER
--harder` also removes a ninth function.
"""

import argparse
import ast
import contextlib
import functools
import importlib.util
import multiprocessing
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("autoencoder.py", "energy_head.py", "calm.py", "sample.py", "train.py")
HELPERS = tuple(f"classroom/{name}.py" for name in ("recipes", "curves", "released", "small_runs", "texts"))  # the sources need them
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
        """The function's node in the syntax tree of a source text. Raises LookupError, or SyntaxError, with a sentence."""
        try:
            body = ast.parse(source).body
        except SyntaxError as error:
            raise SyntaxError(f"{self.file} is not Python: see its line {error.lineno}.") from None
        for name in self.function.split("."):
            found = [node for node in body if getattr(node, "name", None) == name]
            if not found:
                raise LookupError(f"{self.file} has no {self.function} any more: copy its first lines from {REFERENCE}/{self.file}.")
            body = found[-1].body
        return found[-1]


EXERCISES = [
    Exercise(1, "autoencoder.py", "kl_divergence", "for one dimension 1/2 (mean^2 + std^2 - 1 - log std^2); then the floor, then the sum",
             "test_autoencoder.py::kl or prior"),
    Exercise(2, "autoencoder.py", "Autoencoder.forward", "damage the input (training only), encode, draw z so that gradients pass, "
             "F.dropout (training only), decode; compare with the whole tokens", "test_autoencoder.py::damage or rate or decodes_a_draw"),
    Exercise(3, "energy_head.py", "energy_score", "diversity() is given; the other term is 2 E |x - y|^alpha over all N·M pairs, as a "
             "difference and a norm, or by distance_power()", "test_energy_head.py::energy_score or largest"),
    Exercise(4, "energy_head.py", "EnergyHead.forward", "x = LayerNorm(Linear(noise)), c = LayerNorm(Linear(hidden)); x <- block(x, c) for "
             "each block; then LayerNorm, Linear, SiLU, Linear", "test_energy_head.py::plain_head or origin or samples_differ or generator"),
    Exercise(5, "calm.py", "brier_score", "prefix_matches() is given: which two of the three must agree, and with which sign?",
             "test_calm.py::single_cases or two_sample"),
    Exercise(6, "calm.py", "brier_lm", "floor first, multiply then", "test_calm.py::brier_lm"),
    Exercise(7, "sample.py", "temperature_sample_exact", "attempts of n draws, all of them read, each draw once; inverse_temperature() is "
             "given, and bernoulli_factory() decides where 1/T is no whole number", "test_sample.py::two-1- or two-0.5- or impossible-0.5- "
             "or nearly and 0.3333333333333333- or two-0.4- or blocks or too_many"),
    Exercise(8, "sample.py", "bernoulli_factory", "the docstring of temperature_sample_exact has the rule: at the i-th draw, if it is not x, give up with probability a/i",
             "test_sample.py::two-0.9- or impossible-0.75- or two-0.4- or impossible-0.23-"),
    Exercise(9, "sample.py", "temperature_sample_batch", "distinct_draws() and log_weights() are given: choose one value in each pool by its weight",
             "test_sample.py::batch or overflow"),
]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Taking functions out of files, and putting them in


def segment(source, exercise):
    """The first and the last line of the exercise's function, decorators included, counted from 0, the last excluded."""
    node = exercise.find(source)
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1, node.end_lineno


def replace(source, exercise, text):
    """A source text with the exercise's function made `text`, lines with their indentation."""
    lines, (begin, end) = source.splitlines(keepends=True), segment(source, exercise)
    return "".join(lines[:begin]) + text + "".join(lines[end:])


def extract(source, exercise):
    begin, end = segment(source, exercise)
    return "".join(source.splitlines(keepends=True)[begin:end])


def hole(source, exercise):
    """The function's text with its signature and docstring alone, and an error where the body was."""
    node = exercise.find(source)
    indent = " " * node.body[0].col_offset
    error = f'{indent}raise NotImplementedError("exercise {exercise.number}: {exercise.hint}")\n'
    return "".join(source.splitlines(keepends=True)[segment(source, exercise)[0] : node.body[0].end_lineno]) + error


def is_started(source, exercise):
    return any(not isinstance(statement, (ast.Raise, ast.Expr)) for statement in exercise.find(source).body)


def read(path):
    return path.read_text(encoding="utf-8")


def new(folder, harder=False):
    """A student's copy of the project this file belongs to. Exits with a sentence where there cannot be one."""
    folder = Path(folder)
    if (ROOT / REFERENCE).exists():
        raise SystemExit("this is a student's copy already: use new in the project itself.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"{folder} exists and is not empty: name a new folder.")
    (folder / REFERENCE / "classroom").mkdir(parents=True)
    (folder / "classroom").mkdir()
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__", "test_exercises.py", "test_readme.py"))
    for name in ("README.md", "LICENSE", "requirements.txt", "classroom/exercises.py"):
        shutil.copy(ROOT / name, folder / name)
    for name in HELPERS:
        shutil.copy(ROOT / name, folder / name)
        shutil.copy(ROOT / name, folder / REFERENCE / name)
    for name in SOURCES:
        source = read(ROOT / name)
        (folder / REFERENCE / name).write_text(source, encoding="utf-8")
        for exercise in EXERCISES:
            if exercise.file == name and (harder or exercise.number < 9):
                source = replace(source, exercise, hole(source, exercise))
        (folder / name).write_text(source, encoding="utf-8")
    (folder / REFERENCE / "exercises.txt").write_text("9" if harder else "8")
    print(f"{folder} is ready. In it: python classroom/exercises.py check")


def solution(folder, number):
    """Puts the reference's function for exercise `number` into the folder's file; what stood there is kept beside the reference."""
    exercise = EXERCISES[number - 1]
    path, kept = folder / exercise.file, folder / REFERENCE / f"attempt_{number}.py"
    answer = extract(read(folder / REFERENCE / exercise.file), exercise)
    kept.write_text(extract(read(path), exercise), encoding="utf-8")
    path.write_text(replace(read(path), exercise, answer), encoding="utf-8")
    print(f"exercise {number}: {exercise.function} in {exercise.file} is the reference's now. What stood there is in {kept}.")


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
    yield "the loss of the same chunks as tokens (5, 10, 4)", model(tokens.view(5, 10, 4))[0]
    for name in ("reconstruction", "kl", "accuracy"):
        yield f"the metric {name} of the same chunks", model(tokens)[1][name]
    yield "the difference of two such losses of the same chunks", model(tokens)[0] - model(tokens)[0]
    model.train()
    model.config.dropout = 1.0
    yield "the loss in training mode with dropout 1 (all inputs 0, all latents 0, but the targets whole)", model(tokens)[0]
    model.config.dropout = 0.0
    yield "whether two losses in training mode differ without dropout, by the noise of z (1: yes),", model(tokens)[0] != model(tokens)[0]
    model.config.kl_weight = 0.0
    model.zero_grad()
    model(tokens)[0].backward()
    yield "whether the reconstruction's gradient reaches the encoder through z (1: yes),", model.squeeze.weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.to_posterior.weight[6:], model.to_posterior.bias[6:] = 0.0, -30.0  # a posterior of no width: z is its mean
    model.config.dropout, seen = 0.5, []
    for module in (model.embedding, model.from_latent):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(torch.ones(5000, 4, dtype=torch.long))
    yield "the share of input tokens that became 0 with dropout 0.5", (seen[0] == 0).float().mean(), 0.02
    yield "the share of chunks all of whose four tokens became 0", (seen[0] == 0).all(-1).float().mean(), 0.02
    yield "the share of latent coordinates that became 0 with dropout 0.5", (seen[1] == 0).float().mean(), 0.02
    yield "the mean size of those that did not (F.dropout divides them by 1 - p)", seen[1][seen[1] != 0].abs().mean(), 0.05


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


def scripted(*chunks):
    """draw(m) for the samplers: the next m of these chunks."""
    import torch

    place = iter(chunks)
    return lambda m: torch.tensor([next(place, [0] * len(chunks[0])) for _ in range(m)])


def example_7():
    import sample
    from autoencoder import InputError
    from sample import temperature_sample_exact

    call = "temperature_sample_exact at T = 1/2 of the draws 1, 2, 2, 3, 4, 4, which are the pairs (1, 2), (2, 3), (4, 4),"
    for block in (1, 2, 5, 6):
        chunk, used = temperature_sample_exact(scripted([1], [2], [2], [3], [4], [4]), 0.5, block=block, with_draws=True)
        yield f"{call} in blocks of {block},", chunk
        yield f"the number of draws it read, in blocks of {block},", used
    chunk, used = temperature_sample_exact(scripted([1, 3], [1, 2], [1, 2], [1, 2]), 0.5, with_draws=True)
    yield "temperature_sample_exact at T = 1/2 of the chunks (1 3), (1 2), (1 2), (1 2)", chunk
    draws = ([1], [2], [2], [2], [5], [5], [5], [5], [5])
    chunk, used = temperature_sample_exact(scripted(*draws), 1 / 3, with_draws=True)
    yield "temperature_sample_exact at T = 1/3 of the draws 1, 2, 2, 2, 5, 5, 5, 5, 5, which are three attempts,", chunk
    yield "the number of draws it read there", used
    yield "temperature_sample_exact at T = 1 of the draws 5, 6, …", temperature_sample_exact(scripted([5], [6]), 1.0)
    says = iter((False, True))
    sample.bernoulli_factory = lambda draws, *_, **__: (next(draws), next(says))[1]  # reads one draw; says no, then yes
    chunk, used = temperature_sample_exact(scripted([1], [1], [9], [2], [2], [9]), 0.4, with_draws=True)
    yield "at T = 0.4, 1/T = 2 + 1/2, of the draws 1, 1, (read by a factory that says no), 2, 2, (read by one that says yes),", chunk
    try:
        temperature_sample_exact(scripted(*([i] for i in range(1, 1000))), 0.5, max_draws=500)
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
    draws = iter(([1, 3], [1, 2], [0, 0]))
    bernoulli_factory(draws, [1, 2], 1e-9)
    yield "the draws left of (1 3), (1 2), (0 0) when the second was x = (1 2)", len(list(draws))


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
    cases, stopped = [], None
    try:
        import torch

        torch.set_num_threads(1)
        sys.path.insert(0, str(folder))
        for name in SOURCES:
            sys.modules.pop(name.removesuffix(".py"), None)
        for call, found, *error in globals()[f"example_{number}"]():
            if found is None:
                raise TypeError("it returns None: is a return missing?")
            found = torch.as_tensor(found).detach().double()
            cases.append((call, tuple(found.shape), found.flatten().tolist(), *(error or [1e-5])))
    except BaseException as error:  # whatever a student's code does
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == Path(folder)]
        where = f", in {Path(places[-1].filename).name} at: {places[-1].line}" if places else ""
        stopped = f"in case {len(cases) + 1} of example_{number} (classroom/exercises.py) it stops with {type(error).__name__}: {error}{where}"
    answer.put((cases, stopped))


@functools.lru_cache(maxsize=None)
def reference_example(number, folder):
    cases, stopped = example(number, folder)
    if stopped:
        raise SystemExit(f"the reference itself does not run here: {stopped}")
    return cases


def example(number, folder):
    """What `run_example` puts into its queue, or a sentence if it never does."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    answer = context.Queue()
    process = context.Process(target=run_example, args=(number, folder, answer))
    process.start()
    started = time.time()
    try:
        while time.time() - started < SECONDS:
            with contextlib.suppress(queue.Empty):
                alive = process.is_alive()
                return answer.get(timeout=0.5)
            if not alive:
                return [], f"Python itself ended, with status {process.exitcode}"
        return [], f"the worked example was still running after {SECONDS} seconds: is there a loop that never ends?"
    finally:
        process.kill()
        process.join()


def first_misfit(expected, found, stopped):
    """None if the student's cases are the reference's, else a sentence about the first that is not."""
    for (call, shape, numbers, error), (_, their_shape, theirs, _) in zip(expected, found):
        if shape != their_shape:
            return f"{call} should have shape {shape}, yours has {their_shape}"
        if not all(abs(right - wrong) <= error + 1e-4 * abs(right) for right, wrong in zip(numbers, theirs)):  # NaN is wrong too
            right, wrong = (", ".join(f"{number:.4g}" for number in part[:8]) for part in (numbers, theirs))
            if right == wrong:
                right, wrong = f"{numbers}"[1:-1], f"{theirs}"[1:-1]
            return f"{call} should be {right}, yours is {wrong}" + f" (up to {error}, for chance)" * (error > 1e-3)
    return stopped


# ----------------------------------------------------------------------------------------------------------------------
# Checking


def what_is_wrong(folder, exercise):
    """None if the exercise is right, else a sentence. Everything but its file, and its file's other exercises, is the reference's."""
    with tempfile.TemporaryDirectory() as trial:
        trial = Path(trial) / "trial"
        shutil.copytree(folder / REFERENCE, trial)
        shutil.copytree(folder / "tests", trial / "tests", ignore=shutil.ignore_patterns("__pycache__", "golden"))
        source = read(folder / exercise.file)
        for other in EXERCISES:
            if other.file == exercise.file and other.number != exercise.number:
                source = replace(source, other, extract(read(folder / REFERENCE / other.file), other))
        (trial / exercise.file).write_text(source, encoding="utf-8")
        wrong = first_misfit(reference_example(exercise.number, folder / REFERENCE), *example(exercise.number, trial))
        return wrong or failing_test(trial, exercise)


def failing_test(trial, exercise):
    """None if the project's tests of the exercise pass in the folder `trial`, else what the first failing one says."""
    file, selection = exercise.tests.split("::")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "--color=no", "-p", "no:cacheprovider", f"tests/{file}", "-k", selection]
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTEST_ADDOPTS": ""}
    try:
        done = subprocess.run(command, cwd=trial, capture_output=True, encoding="utf-8", env=environment, timeout=5 * SECONDS)
    except subprocess.TimeoutExpired:
        return f"its tests were still running after {5 * SECONDS} seconds."
    if done.returncode == 0:
        return None
    name = re.search(r"^(?:FAILED|ERROR) \S+?::(\w+(?:\[.*?\])?)", done.stdout, re.MULTILINE)
    reason = re.search(r"^E +(.+)$", done.stdout, re.MULTILINE)
    said = name[1].removeprefix("test_").replace("_", " ") if name else "the tests"
    return f"the worked example is right, but not the test “{said}”: {reason[1] if reason else 'it does not run'}"


def check(folder, numbers):
    """Prints a line for each exercise; returns True if all are right."""
    verdicts = []
    for exercise in EXERCISES[: int(read(folder / REFERENCE / "exercises.txt"))]:
        if numbers and exercise.number not in numbers:
            continue
        try:
            if is_started(read(folder / exercise.file), exercise):
                wrong = what_is_wrong(folder, exercise)
                verdict = f"wrong: {wrong}" if wrong else "right"
            else:
                verdict = "not started"
        except (SyntaxError, LookupError) as error:
            verdict = f"wrong: {error.args[0]}"
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
    if missing := [name for name in ("torch", "pytest") if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"this Python has no {missing[0]}: use that of the environment in which the project was installed.")
    if args.command == "solution":
        for number in args.numbers:
            try:
                solution(ROOT, number)
            except (SyntaxError, LookupError) as error:
                raise SystemExit(error.args[0]) from None
    elif not check(ROOT, args.numbers):
        sys.exit(1)


if __name__ == "__main__":
    main()
