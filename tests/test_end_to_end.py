"""From text to text, as a user does it: train.py, then sample.py, on a text that repeats itself."""

import contextlib
import io
import json
import sys

import pytest
from conftest import sample

import train

LINE = "To be, or not to be:\n"
SIZES = (
    "--data text.txt --out_dir run --device cpu --context 32 --batch_size 16 --latent_size 16 "
    "--hidden_size 64 --n_layers 2 --n_heads 2 --autoencoder_steps 400 --steps 400 --lr 0.006"
).split()


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """A whole run of train.py: the folder that it leaves, and its output."""
    folder = tmp_path_factory.mktemp("repeating")
    (folder / "text.txt").write_text(LINE * 600)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train.py", *SIZES])
        train.main()
    return folder / "run", printed.getvalue()


@pytest.fixture
def output(repeating, monkeypatch, capsys):
    def call(main, *arguments):
        monkeypatch.chdir(repeating[0].parent)
        monkeypatch.setattr(sys, "argv", ["script.py", "--out_dir", "run", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return call


def test_a_run_learns_the_text_and_leaves_what_it_promises(repeating):
    out_dir, stdout = repeating
    assert {"autoencoder.pt", "calm.pt"} <= {path.name for path in out_dir.iterdir()}
    assert (out_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    text = (out_dir / "sample.txt").read_text(encoding="utf-8")
    assert LINE * 10 in text.split("temperature 0.5")[1] and text in stdout
    assert "temperature 1.0" in text and "BrierLM" in stdout.splitlines()[-1]
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    assert rows[0]["stage"] == "autoencoder" and rows[-1]["step"] == 400 and rows[-1]["loss"] > 0
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
    assert calm["tokens"] == 400 * 16 * 32
    # 631 tokens are for the test: 19 sequences of 8 chunks, of which the first is not predicted.
    assert summary["protocol"] == {"context": 32, "positions": 19 * 7, "split": "test"}
    assert data["source"] == "text.txt" and len(data["sha256"]) == 64
    assert data["characters"] == 12_613 and data["tokens"] == 12_601


@pytest.mark.parametrize("method", ["batch", "exact"])
def test_it_is_written_on(repeating, output, method, tmp_path):
    (tmp_path / "prompt.txt").write_text(LINE + "To be, or")  # it ends inside a chunk
    arguments = ["--prompt", f"FILE:{tmp_path / 'prompt.txt'}", "--n_tokens", 54, "--n_samples", 2]
    text = output(sample.main, *arguments, "--temperature", 0.5, "--method", method)
    assert text == (LINE * 4 + "\n\n") * 2


def test_the_baseline_learns_it_beside_calm(repeating, output):
    out_dir = repeating[0]
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    assert "BrierLM" in output(train.main, *SIZES, "--stage", "baseline", "--steps", 120)
    after = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    assert before.items() <= after.items()  # what the run left is as it was
    assert after.keys() >= {"baseline.pt", "baseline_curves.png", "baseline_sample.txt"}
    assert json.loads(after["baseline_summary.json"])["baseline"]["brier_lm"] > 90
    arguments = ["--model", "baseline", "--prompt", LINE, "--n_tokens", 42, "--temperature"]
    assert output(sample.main, *arguments, 0.1) == LINE * 3 + "\n\n"
    assert output(sample.main, *arguments, 3) != LINE * 3 + "\n\n"  # it may be made flatter, too
