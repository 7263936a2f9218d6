"""
More than a thousand bad inputs, made by seeded random numbers. Whatever a file, a folder, a flag or an address holds, a command
either works or ends with status 2 and one sentence: never a traceback, never a half-written file, never a hang.
"""

import http.server
import json
import os
import random
import shutil
import sys
import threading
import time
from dataclasses import asdict

import pytest
import torch
from conftest import tiny_calm

import classroom.texts as texts
import sample
import train
from autoencoder import Autoencoder
from calm import CALM

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden", "k4")


def survives(function, *arguments):
    """Does what the scripts do with any function; returns whether it worked. Every exception but an exit with status 2 is a traceback."""
    try:
        sample.run(lambda: function(*arguments))
        return True
    except SystemExit as ended:
        assert ended.code == 2
        return False


@pytest.fixture(autouse=True)
def one_sentence(tmp_path, monkeypatch, capfd, recwarn):
    """Each test works in a folder of its own; in the end no refusal may have been longer than a line of 500 characters."""
    monkeypatch.chdir(tmp_path)
    yield
    for line in capfd.readouterr().err.splitlines():
        assert "Traceback" not in line and len(line) < 500, line


def damaged(data, dice):
    """Bytes with one of the accidents of files: cut off, a few bytes changed, a piece lost, doubled, or zero."""
    data, kind = bytearray(data), dice.randrange(5)
    a, b = sorted(dice.choices(range(len(data) + 1), k=2))
    if kind == 0:
        del data[a:]
    elif kind == 1:
        for _ in range(dice.randint(1, 20)):
            data[dice.randrange(len(data))] = dice.randrange(256)
    elif kind == 2:
        del data[a:b]
    elif kind == 3:
        data[a:a] = data[a:b]
    else:
        data[a:b] = bytes(b - a)
    return bytes(data)


def some_text(dice):
    """Bytes that somebody might give as a text."""
    n = dice.choice([0, 1, 10, 1000, 5000])
    kinds = [
        lambda: dice.randbytes(n),
        lambda: bytes(n),
        lambda: dice.choice([b"a", b" ", b"\n", b"\r\n", b"\xff", "é".encode(), "\u2028".encode(), "😀".encode()]) * n,
        lambda: b"one huge line " * (10 * n),
        lambda: sample.END_OF_TEXT.encode() * (n // 10),
        lambda: bytes(dice.choice(b"ab \n<|endoftext|>\xc3\xa9\xe2\x80") for _ in range(n)),
        lambda: "".join(chr(dice.randrange(0x20, 0x2FFF)) for _ in range(n)).encode(),
        lambda: b"text\0" * (n // 5),
    ]
    return dice.choice(kinds)()


def test_texts():
    dice, worked = random.Random(0), 0
    for i in range(300):
        name = dice.choice(["a.txt", "a.gz", "a.xz", "a"])
        with open(name, "wb") as f:
            f.write(some_text(dice))
        arguments = f"train.py --data {name} --out_dir run --vocab_size {dice.choice([256, 300])} --context 16 --device cpu".split()
        worked += survives(prepare, arguments)
        assert not [left for left in os.listdir("run") if left.endswith(".part")]
    assert 20 < worked < 200  # neither all nor none


def prepare(arguments):
    """What train.py does before it trains: the text to tokens in files, and a batch of them."""
    sys.argv = arguments
    settings, _ = train.parse_settings()
    os.makedirs(settings.out_dir, exist_ok=True)
    tokens, *_ = train.prepare_data(settings)
    assert train.random_windows(tokens, 2, 16).shape == (2, 16)


def test_folders():
    dice = random.Random(1)
    for i in range(20):
        os.mkdir(f"{i}")
        for name in "abc"[: dice.randrange(4)]:
            with open(f"{i}/{name}", "wb") as f:
                f.write(some_text(dice))
        if dice.random() < 0.3:
            os.mkdir(f"{i}/folder")
        survives(prepare, f"train.py --data {i} --out_dir run --context 16 --device cpu".split())
    assert not survives(prepare, "train.py --data 0/nothing --device cpu".split())


def test_rank_files():
    dice, ranks = random.Random(2), sample.ranks_to_text({bytes([b]): b for b in range(256)} | {b"ab": 256}).encode()
    for i in range(150):
        with open("ranks", "wb") as f:
            f.write(damaged(ranks, dice))
        survives(lambda: sample.load_tokenizer("ranks").encode_ordinary("a text"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("checkpoint"), tiny_calm(vocab_size=257)
    encoding = sample.make_encoding({bytes([b]): b for b in range(256)})
    configs = {"autoencoder_config": asdict(model.autoencoder.config), "calm_config": asdict(model.config)}
    train.save_checkpoint(folder, "calm", model, encoding, summary={}, **configs)
    return (folder / "calm.pt").read_bytes()


def write(temperature=0.5):
    model, encoding, _ = sample.load_model(".", "calm")
    sample.write_text(model, encoding, "To", 4, temperature, pool=5)


def test_damaged_checkpoints(checkpoint):
    dice = random.Random(3)
    for i in range(150):
        with open("calm.pt", "wb") as f:
            f.write(damaged(checkpoint, dice))
        survives(write)


STRANGE = [None, -1, 0, 1, 2, 3, 7, 10**6, 10**12, -0.5, 0.5, float("nan"), float("inf"), "", "text", [], [1], {}, {"a": 1}, True]


def strange(tree, dice):
    """The tree (dicts, in the end other values) with one of its values replaced by something strange, or lost."""
    name = dice.choice(list(tree))
    if isinstance(tree[name], dict) and tree[name] and dice.random() < 0.8:
        return tree | {name: strange(tree[name], dice)}
    if dice.random() < 0.2:
        return {other: value for other, value in tree.items() if other != name}
    if isinstance(tree[name], torch.Tensor) and dice.random() < 0.7:
        return tree | {name: dice.choice([tree[name] * float("nan"), tree[name][:1], tree[name].int(), tree[name].bfloat16()])}
    return tree | {name: dice.choice(STRANGE)}


def test_checkpoints_of_strange_content(checkpoint):
    dice = random.Random(4)
    with open("calm.pt", "wb") as f:
        f.write(checkpoint)
    whole = torch.load("calm.pt", weights_only=True)
    for i in range(70):
        torch.save(strange(whole, dice), "calm.pt")
        survives(write)


def test_released_folders():
    dice = random.Random(5)
    for kind, load in (("autoencoder", Autoencoder.from_pretrained), ("calm", CALM.from_pretrained)):
        shutil.copytree(os.path.join(GOLDEN, kind), kind)
        with open(f"{kind}/config.json", "rb") as f:
            config = f.read()
        for i in range(60):
            with open(f"{kind}/config.json", "wb") as f:
                f.write(json.dumps(strange(json.loads(config), dice)).encode() if i % 2 else damaged(config, dice))
            survives(load, kind)
        with open(f"{kind}/config.json", "wb") as f:
            f.write(config)
        (weights,) = [name for name in os.listdir(kind) if name != "config.json"]
        with open(f"{kind}/{weights}", "rb") as f:
            data = f.read()
        for i in range(40):
            with open(f"{kind}/{weights}", "wb") as f:
                f.write(damaged(data, dice))
            survives(load, kind)


def test_runs_to_resume(monkeypatch):
    """resume.pt, log.jsonl and summary.json as they should not be: damaged, or of strange content."""
    dice = random.Random(6)
    with open("text.txt", "w") as f:
        f.write("to be or not to be " * 200)
    sizes = "--data text.txt --device cpu --context 16 --batch_size 2 --hidden_size 16 --n_layers 1 --n_heads 1 --autoencoder_hidden_size 16"
    monkeypatch.setattr(sys, "argv", ["train.py", *sizes.split(), *"--out_dir run --autoencoder_steps 2 --steps 2 --autoencoder_batch_size 4".split()])
    monkeypatch.setattr(train, "REPORTS", 1)
    train.main()
    for name in ("log.jsonl", "summary.json"):
        with open(f"run/{name}", "rb") as f:
            data = f.read()
        for i in range(20):
            with open(f"run/{name}", "wb") as f:
                f.write(damaged(data, dice))
            survives(train.read_log if name == "log.jsonl" else texts.read_json, "run" if name == "log.jsonl" else "run/summary.json")
        with open(f"run/{name}", "wb") as f:
            f.write(data)
    settings, run = train.parse_settings()
    model = Autoencoder(train.model_configs(settings, 257)["autoencoder"])
    run |= {"data": {}, "step": 0, "stage": "autoencoder", "seconds": 0.0}
    train.save_run(run, model, torch.optim.AdamW(model.parameters()))
    with open("run/resume.pt", "rb") as f:
        data = f.read()
    whole = torch.load("run/resume.pt", weights_only=True)
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--out_dir", "run"])
    for i in range(150):
        if i % 2:
            torch.save(strange(whole, dice), "run/resume.pt")
        else:
            with open("run/resume.pt", "wb") as f:
                f.write(damaged(data, dice))
        survives(resume, model)


def resume(model):
    _, run = train.parse_settings()
    train.resume_stage(run, "autoencoder", model, torch.optim.AdamW(model.parameters()))


def test_flags(monkeypatch):
    dice, values = random.Random(7), ["0", "1", "-1", "3", "64", "1e9", "nan", "inf", "", "text", "é", "99999999999999999999", "0.5", "cuda:7", "cpu:abc"]
    names = [*train.SETTINGS, "seed", "device", "recipe", "preset", "stage", "dtype", "tokenizer", "out_dir"]
    for i in range(150):
        flags = [word for name in dice.sample(names, 2) for word in (f"--{name}", dice.choice(values))]
        monkeypatch.setattr(sys, "argv", ["train.py", "--data", "missing", *flags])
        survives(lambda: train.model_configs(train.parse_settings()[0], 257))
    for i in range(50):
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--{dice.choice(['temperature', 'n_tokens', 'pool', 'seed', 'device'])}", dice.choice(values)])
        assert not survives(sample.main)  # there is no model here


@pytest.fixture
def address(monkeypatch):
    """A server on this machine that behaves as badly as the last part of the address says; 0.3 seconds are taken for a hang."""
    monkeypatch.setattr(texts, "URL_SECONDS", 0.3)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path[1:]
            if kind == "garbage":
                self.wfile.write(b"\xff\0 this is no HTTP\r\n\r\n")
            elif kind == "closed":
                self.connection.close()
            elif kind == "stalls-at-once":
                time.sleep(1)
            else:
                self.send_response(404 if kind == "missing" else 500 if kind == "broken" else 200)
                self.send_header("Content-Length", "-3" if kind == "negative" else "1000")
                self.end_headers()
                self.wfile.write(b"some of the text")
                if kind == "stalls":
                    self.wfile.flush()
                    time.sleep(1)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", ["garbage", "closed", "stalls-at-once", "stalls", "missing", "broken", "truncated"])
def test_addresses(address, kind):
    started = time.time()
    assert not survives(lambda: list(texts.read_documents(f"{address}/{kind}")))
    assert os.listdir("data") == [] and time.time() - started < 20


@pytest.mark.parametrize("url", ["http://", "http://[", "http://nowhere.invalid/x", "https://127.0.0.1:1/x", "http://\udcff/x", "http://127.0.0.1:99999/"])
def test_addresses_that_are_none(url):
    assert not survives(lambda: list(texts.read_documents(url)))
