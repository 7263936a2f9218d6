import gzip
import hashlib
import http.server
import json
import lzma
import math
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter

import pytest
import regex
import torch

import sample
import train
from autoencoder import InputError
from classroom import texts

# Text


def test_a_play_becomes_a_page():
    markdown = (
        "# Hamlet\n\n## ACT I\n\n_Enter GHOST_\n\n\n\n**HORATIO**  \nPeace, _break_ thee off;  \n\\--Look\\! \\[Aside]\n\n"
        "**First Clown**  \n*Sings* O—ho\n"
    )
    assert texts.play_to_text(markdown) == (
        "Hamlet\n\nACT I\n\nEnter GHOST\n\nHORATIO:\nPeace, break thee off;\n--Look! [Aside]\n\nFirst Clown:\nSings O--ho\n"
    )


def test_files_folders_and_compressed_files(tmp_path):
    (tmp_path / "a.txt").write_text("first\n<|endoftext|>\nsecond\n\n")
    with gzip.open(tmp_path / "b.txt.gz", "wb") as f:
        f.write(b"third")
    with lzma.open(tmp_path / "c.xz", "wb") as f:
        f.write(b"fourth")
    (tmp_path / ".hidden").write_text("not this")
    assert list(texts.read_documents(str(tmp_path))) == ["first\n", "second\n", "third\n", "fourth\n"]
    assert list(texts.read_documents(str(tmp_path / "b.txt.gz"))) == ["third\n"]


def test_bytes_that_are_no_utf8_are_replaced_and_said(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and more")
    with pytest.warns(UserWarning, match="a.txt is not all UTF-8"):
        assert list(texts.read_documents(str(tmp_path))) == ["caf\ufffd and more\n"]


def test_a_mark_between_two_blocks_of_a_file_separates_too(tmp_path):
    """A file is read in blocks of 16 MiB; here the mark lies across the end of the first."""
    text = "a" * (2**24 - 5) + sample.END_OF_TEXT + "b"
    (tmp_path / "a.txt").write_text(text)
    assert [(document[0], len(document)) for document in texts.read_documents(str(tmp_path / "a.txt"))] == [("a", 2**24 - 4), ("b", 2)]


@pytest.mark.parametrize("content", [b"", b"\n \n", b"a\0b", None])
def test_text_that_is_none(content, tmp_path):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="a.txt"):
        train.split_source(str(path))


def test_a_damaged_archive_is_refused(tmp_path):
    for name, data in (("a.gz", gzip.compress(b"text" * 1000)[:20]), ("b.xz", b"no xz"), ("c.gz", b"no gz")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            list(texts.read_documents(str(tmp_path / name)))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine: /text is a text, /half breaks off, all else is not found. Returns its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/text", "/half") else 404)
            self.send_header("Content-Length", "9")
            self.end_headers()
            self.wfile.write(b"the text\n" if self.path == "/text" else b"the")

        def log_message(self, *_):
            pass

    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_url_is_fetched_once_and_whole(server):
    assert list(texts.read_documents(f"{server}/text")) == ["the text\n"]
    (kept,) = os.listdir("data")
    assert texts.download(f"{server}/text") == os.path.join("data", kept)
    for path in ("half", "missing"):
        with pytest.raises(InputError, match=path):
            list(texts.read_documents(f"{server}/{path}"))
    assert os.listdir("data") == [kept]  # nothing half-written stays


def test_whole_documents_are_held_out(tmp_path):
    documents = [f"{i} " + "x" * 98 + "\n" for i in range(40)] + ["y" * 2000 + "\n"]
    (tmp_path / "a.txt").write_text(sample.END_OF_TEXT.join(documents))
    training, held_out, data = train.split_source(str(tmp_path / "a.txt"))
    assert Counter(training()) + Counter(held_out()) == Counter(documents)
    assert 0.05 <= sum(map(len, held_out())) / sum(map(len, documents)) < 0.1
    assert list(training()) == list(training())
    whole = sample.END_OF_TEXT.join(documents)
    assert data["characters"] == len(whole) and data["sha256"] == hashlib.sha256(whole.encode()).hexdigest()


def test_the_end_of_a_single_document_is_held_out(tmp_path):
    text = "".join(map(str, range(1000))) + "\n"
    (tmp_path / "a.txt").write_text(text)
    (rest,), (held_out,) = (list(part()) for part in train.split_source(str(tmp_path / "a.txt"))[:2])
    assert rest + held_out == text and len(held_out) == math.ceil(0.05 * len(text))


def test_small_documents_beside_a_large_one_do_not_stand_for_the_whole():
    assert train.where_to_cut([100, 100_000]) in ([0, 95_095], [100, 94_995])
    assert train.where_to_cut([1000] * 40) != [1000] * 40


# Tokenizer


def naive_bpe(text, vocab_size):
    """Byte-pair encoding as the definition reads: count every pair anew after every merge. Ties: the larger count, then order."""
    words = Counter(tuple(bytes([b]) for b in piece.encode()) for piece in regex.findall(sample.PIECES, text))
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        merged = Counter()
        for word, count in words.items():
            merged[tuple(texts.merge(list(word), best))] += count
        words = merged
    return ranks


def test_bpe_is_the_naive_algorithm():
    text = "She sells sea shells by the sea shore, 1 2 12 112 aaaaa aaa aa, that she sells. " * 3 + "Sea; shell! the the there"
    assert texts.train_bpe([text], 285) == naive_bpe(text, 285)


def test_merging_goes_from_the_left():
    assert texts.merge([b"a", b"a", b"a", b"b"], (b"a", b"a")) == [b"aa", b"a", b"b"]


def test_tiktoken_applies_the_merges_that_were_trained():
    encoding = sample.make_encoding(texts.train_bpe(["low lower lowest slow " * 10], 262))
    assert encoding.decode_single_token_bytes(encoding.encode_ordinary("slow")[-1]).endswith(b"low")
    assert len(encoding.encode_ordinary("low low low")) == 3


def test_bpe_ends_when_no_pair_occurs_twice():
    assert len(texts.train_bpe(["abcdefg"], 1000)) == 256


def test_documents_are_separated_by_one_end_of_text_token():
    encoding = sample.make_encoding(texts.train_bpe(["ab"], 256))
    assert [tokens.tolist() for tokens in train.encode_documents(encoding, ["ab", "c"])] == [[97, 98, 256, 99, 256]]
    apart = train.encode_documents(encoding, ["ab", "c", "d"], at_once=2)
    assert [tokens.tolist() for tokens in apart] == [[97, 98, 256, 99, 256], [100, 256]]


def test_windows_begin_anywhere_and_stay_inside():
    windows = train.random_windows(torch.arange(20, dtype=torch.int32), 5000, 8)
    assert torch.equal(windows, windows[:, :1] + torch.arange(8))
    assert windows[:, 0].unique().tolist() == list(range(13))


# Optimisation


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [train.learning_rate(step, 1000, 2.0) for step in range(1, 1001)]
    assert rates[0] == pytest.approx(2.0 / 50) and rates[49] == 2.0 == max(rates)
    assert rates[50:] == sorted(rates[50:], reverse=True) and rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[524] == pytest.approx(1.0, abs=1e-2)  # half-way down the cosine


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    train.write_atomically(str(path), "old")

    def broken(temporary):
        with open(temporary, "w") as f:
            f.write("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.write_atomically(str(path), broken)
    assert os.listdir(tmp_path) == ["file.txt"] and path.read_text() == "old"


# Bad input


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--data", "missing.txt"], "missing.txt"),
        (["--data", "empty.txt"], "empty.txt"),
        (["--data", "short.txt"], "too short"),
        (["--chunk_size", 3], "multiple of chunk_size 3"),
        (["--chunk_size", 256], "two chunks"),
        (["--hidden_size", 130], "hidden_size"),
        (["--vocab_size", 100], "256"),
        (["--steps", 0], "--steps"),
        (["--lr", "nan"], "--lr"),
        (["--device", "abacus"], "abacus"),
        (["--tokenizer", "nothing", "--data", "long.txt"], "nothing"),
        (["--stage", "calm"], "autoencoder.pt"),
        (["--chunk_size", 1, "--context", 4], "at least 5"),
        (["--out_dir", "short.txt"], "short.txt"),
    ],
)
def test_bad_input_is_one_sentence(command, tmp_path, monkeypatch, arguments, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short a text to train on")
    (tmp_path / "long.txt").write_text("long enough " * 1000)
    assert word in command(train.main, *arguments)
    assert not list(tmp_path.glob("out/quick/*"))


def test_a_second_run_of_a_stage_replaces_its_log_and_keeps_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("To be, or not to be:\n" * 200)
    sizes = "--data text.txt --device cpu --context 16 --batch_size 2 --hidden_size 16 --n_layers 1 --n_heads 1 --autoencoder_hidden_size 16"
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 20)
    for more in ("--autoencoder_steps 12 --steps 12", "--stage calm --steps 24"):
        monkeypatch.setattr(sys, "argv", ["train.py", *sizes.split(), *more.split()])
        train.main()
    steps = {stage: [row["step"] for row in train.read_log("out/quick") if row["stage"] == stage] for stage in ("autoencoder", "calm")}
    assert steps == {"autoencoder": list(range(1, 13)), "calm": list(range(2, 25, 2))}


# End to end


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """A run of both stages on a text that repeats itself, as a user would start it; its output, and the folder it leaves."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("To be, or not to be:\n" * 1500)
    script = os.path.join(os.path.dirname(train.__file__), "train.py")
    arguments = (
        "--data text.txt --out_dir run --device cpu --context 64 --batch_size 8 --latent_size 16 --hidden_size 64 --n_layers 2 "
        "--n_heads 2 --autoencoder_hidden_size 64 --autoencoder_batch_size 64 --autoencoder_steps 200 --steps 400"
    )
    done = subprocess.run([sys.executable, script, *arguments.split()], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "run"


def test_a_repeating_text_is_learnt_perfectly(repeating, monkeypatch, capsys):
    summary = json.loads((repeating[1] / "summary.json").read_text())
    assert summary["autoencoder"]["accuracy"] > 0.999  # all but the one end-of-text token
    assert summary["calm"]["brier"] == pytest.approx([1.0] * 4, abs=0.01) and summary["calm"]["brier_lm"] > 99

    def sample_text(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", "--out_dir", str(repeating[1]), *arguments])
        sample.main()
        out, err = capsys.readouterr()
        assert err == "200.0 draws per chunk, at most 200\n"
        return out

    line = "To be, or not to be:\n"
    assert line * 10 in sample_text("--prompt", line * 2, "--temperature", "0.5")
    # 21 characters a line and K = 4: this prompt ends inside a chunk.
    assert sample_text("--prompt", line + "To be, or", "--n_tokens", "30").startswith(line * 2)


def test_a_run_leaves_what_it_promises(repeating):
    stdout, out_dir = repeating
    expected = {"autoencoder.pt", "calm.pt", "log.jsonl", "curves.png", "sample.txt", "summary.json", "train.bin", "validation.bin"}
    assert {path.name for path in out_dir.iterdir()} == expected
    assert (out_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out_dir / "summary.json").read_text())
    assert {"accuracy", "accuracy_noise_0.3", "parameters", "seconds"} <= summary["autoencoder"].keys()
    keys = {"brier", "brier_lm", "brier_lm_se", "val_loss", "fidelity", "diversity", "parameters", "seconds", "tokens"}
    assert keys <= summary["calm"].keys()
    assert summary["protocol"] == {"context": 64, "positions": 24 * 15, "split": "validation"}
    assert summary["data"]["characters"] == 21 * 1500 and summary["data"]["source"] == "text.txt"
    assert {"data", "config", "seed", "device", "torch"} <= summary.keys()
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows] == sorted(row["stage"] for row in rows) and rows[-1]["step"] == 400
    assert summary["calm"]["val_loss"] == pytest.approx(2 * summary["calm"]["fidelity"] - summary["calm"]["diversity"])
    assert "BrierLM" in stdout and (out_dir / "sample.txt").read_text().strip() in stdout


def test_the_baseline_learns_it_too_in_the_same_folder(repeating, tmp_path, monkeypatch, capsys):
    """A stage of its own: beside a trained CALM, whose files and figures it leaves as they are. Sampled at any temperature."""
    shutil.copytree(repeating[1], tmp_path / "run")
    shutil.copy(repeating[1].parent / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    sizes = "--data text.txt --out_dir run --device cpu --context 64 --batch_size 8 --hidden_size 32 --n_layers 2 --n_heads 2 --steps 200"
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage", "baseline", *sizes.split()])
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 20)
    train.main()
    before, after = (json.loads((folder / "summary.json").read_text()) for folder in (repeating[1], tmp_path / "run"))
    part = after.pop("baseline")
    assert after == before and part["config"]["hidden_size"] == 32 and part["protocol"]["context"] == 64
    assert part["brier_lm"] > 98 and 0 <= part["bits_per_byte"] == pytest.approx(part["val_loss"] / math.log(2), rel=0.01)
    assert part["training_flops"] > 0 and part["tokens"] == 200 * 8 * 64
    stages = [row["stage"] for row in train.read_log("run")]
    assert stages.count("calm") == len([row for row in train.read_log(repeating[1]) if row["stage"] == "calm"]) and "baseline" in stages
    assert (tmp_path / "run" / "baseline_curves.png").exists() and (tmp_path / "run" / "baseline_sample.txt").exists()
    capsys.readouterr()
    for temperature in (0.1, 1.5):
        arguments = ["--out_dir", "run", "--model", "baseline", "--prompt", "To be, or", "--n_tokens", "33", "--temperature", temperature]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        sample.main()
        out = capsys.readouterr()
        assert out.out.startswith("To be, or not to be:\nTo be" if temperature < 1 else "To be, or") and out.err == ""


def test_a_temperature_that_a_model_cannot_have_is_refused(repeating, command):
    assert "at most 1" in command(sample.main, "--out_dir", repeating[1], "--temperature", 1.5)
    assert "baseline.pt" in command(sample.main, "--out_dir", repeating[1], "--temperature", 1.5, "--model", "baseline")
    assert "above 0" in command(sample.main, "--out_dir", repeating[1], "--temperature", 0, "--model", "baseline")


def test_the_checkpoint_computes_what_was_scored(repeating):
    model, encoding, _ = sample.load_model(str(repeating[1]), "calm")
    assert not model.training and encoding.decode(encoding.encode_ordinary("To be")) == "To be"
    text = torch.tensor(encoding.encode_ordinary("To be, or not to be:\n" * 40))
    from calm import evaluate_brier

    assert evaluate_brier(model, text, 64)["brier_lm"] > 99


def test_a_prompt_longer_than_the_context_keeps_its_end_and_says_so(repeating):
    script = os.path.join(os.path.dirname(sample.__file__), "sample.py")
    command = [sys.executable, script, "--out_dir", repeating[1], "--prompt", "To be, or not to be:\n" * 5, "--n_tokens", "42"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout == "To be, or not to be:\n" * 7 + "\n"
    assert "105 tokens" in done.stderr.splitlines()[0] and len(done.stderr.splitlines()) == 2
