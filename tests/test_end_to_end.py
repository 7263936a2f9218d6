"""From text to text, as a user does it: train.py, then sample.py, on a text that repeats itself."""

import json

import pytest
from conftest import run_in, sample

import train

LINE = "To be!\n"
SIZES = (
    "--out_dir run --device cpu --context 32 --batch_size 8 --latent_size 16 --hidden_size 32 "
    "--n_layers 1 --n_heads 2 --autoencoder_steps 100 --lr 0.01"
).split()


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """A whole run of train.py: the folder in which it ran, and its output."""
    folder = tmp_path_factory.mktemp("repeating")
    (folder / "text.txt").write_text(LINE * 1800)
    return folder, run_in(folder, train.main, *SIZES, "--data", "text.txt", "--steps", 150)


def test_a_run_learns_the_text_and_leaves_what_it_promises(repeating):
    out_dir, stdout = repeating[0] / "run", repeating[1]
    assert {"autoencoder.pt", "calm.pt"} <= {path.name for path in out_dir.iterdir()}
    assert (out_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (out_dir / "sample.txt").read_text(encoding="utf-8")
    assert LINE * 30 in text.split("temperature 0.5")[1] and text in stdout
    assert "temperature 1.0" in text and "BrierLM" in stdout.splitlines()[-1]
    assert "with noise " in stdout and "draws" in stdout and "writes" in stdout
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    assert rows[0]["stage"] == "autoencoder" and rows[-1]["step"] == 150 and rows[-1]["loss"] > 0
    assert rows[-1]["brier_lm"] > 98, "the running score is of validation text"

    summary = json.loads((out_dir / "summary.json").read_text())
    assert summary.keys() >= {"config", "seed", "device", "torch"}
    assert summary["autoencoder"].keys() >= {"accuracy_noise_0.3", "parameters", "seconds"}
    # Of 608 tokens in the test sequences one is the end of the text, which was never learnt.
    assert summary["autoencoder"]["accuracy"] > 1 - 1.5 / 608
    calm, data = summary["calm"], summary["data"]
    assert calm["brier"] == pytest.approx([1.0] * 4, abs=0.02) and calm["brier_lm"] > 98
    assert calm.keys() >= {"brier_lm_se", "confidence", "parameters", "seconds"}
    assert calm["val_loss"] == pytest.approx(2 * calm["fidelity"] - calm["diversity"], rel=1e-4)
    assert calm["tokens"] == 150 * 8 * 32
    # 631 tokens are for the test: 19 sequences of 8 chunks, of which the first is not predicted.
    assert summary["protocol"] == {"context": 32, "positions": 19 * 7, "split": "test"}
    assert data["source"] == "text.txt" and len(data["sha256"]) == 64
    assert data["characters"] == 12_613 and data["tokens"] == 12_601


@pytest.mark.parametrize("method", ["batch", "exact"])
def test_it_is_written_on(repeating, method):
    folder = repeating[0]
    (folder / "prompt.txt").write_text(LINE + "To")  # it ends inside a chunk
    arguments = ["--prompt", "FILE:prompt.txt", "--n_tokens", 54, "--n_samples", 2]
    arguments += ["--temperature", 0.5, "--method", method, "--out_dir", "run"]
    assert run_in(folder, sample.main, *arguments) == (LINE * 9 + "\n\n") * 2


def test_the_baseline_learns_from_one_part_and_is_tested_on_another(repeating):
    """Validation repeats what is learnt, the test is of other letters."""
    folder, out_dir = repeating[0], repeating[0] / "baseline"
    (folder / "parts.txt").write_text(LINE * 1900 + "wxyz" * 175)
    words = ["--data", "parts.txt", "--stage", "baseline", "--steps", 60, "--out_dir", "baseline"]
    assert "BrierLM" in run_in(folder, train.main, *SIZES, *words)
    names = {path.name for path in out_dir.iterdir()}
    assert names == {"baseline.pt", "log.jsonl", "summary.json", "sample.txt", "curves.png"}
    row = json.loads((out_dir / "log.jsonl").read_text())
    summary = json.loads((out_dir / "summary.json").read_text())
    assert row["brier_lm"] > 90 and row["test"]["brier_lm"] < 10
    assert summary["baseline"]["brier_lm"] == row["test"]["brier_lm"]
    arguments = ["--out_dir", "baseline", "--prompt", LINE, "--n_tokens", 42]
    written = [run_in(folder, sample.main, *arguments, "--temperature", T) for T in (0.1, 3)]
    assert written[0] == LINE * 7 + "\n\n"
    assert written[1] != written[0]  # it may be made flatter, too
