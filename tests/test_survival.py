"""
What a run survives: SIGKILL at any moment, Ctrl-C, damaged checkpoints, a full disk, a loss that is no longer finite; and that
several processes do what one does. `python tests/test_survival.py 20` kills one run twenty times.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import tiny_calm

import sample
import train
from calm import TransformerConfig, TransformerLM
from classroom.recipes import build_calm

SCRIPT = os.path.join(os.path.dirname(os.path.abspath(train.__file__)), "train.py")
SIZES = (
    "--data text.txt --device cpu --context 32 --batch_size 4 --latent_size 8 --hidden_size 16 --n_layers 1 --n_heads 1 "
    "--autoencoder_hidden_size 16 --autoencoder_batch_size 32 --save_every 0.2"
).split()
STEPS = ["--autoencoder_steps", "24", "--steps", "48"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with a text, to which the test has moved."""
    write_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_text(folder):
    words = random.Random(0).choices("to be or not to be that is the question".split(), k=4000)
    (folder / "text.txt").write_text(" ".join(words))


def start(folder, *arguments):
    return subprocess.Popen([sys.executable, "-u", SCRIPT, *map(str, arguments)], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def train_here(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


def outcome(out_dir):
    """All that a run ends with, but for the time it took: its log, its scores, its sample and its weights."""
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in train.read_log(out_dir)]
    summary = json.loads((out_dir / "summary.json").read_text())
    for part in ("autoencoder", "calm"):
        summary[part].pop("seconds")
    summary["config"].pop("out_dir")
    weights = {name: tensor.tolist() for name, tensor in sample.load_checkpoint(out_dir, "calm")[0]["weights"].items()}
    return rows, summary, (out_dir / "sample.txt").read_text(), weights


def kill(run, folder):
    """SIGKILL. Whatever has been renamed into place must be whole."""
    run.kill()
    run.communicate()
    for path in folder.glob("*.pt"):
        torch.load(path, weights_only=True)  # raises if it is damaged


def kill_and_resume(folder, kills, longest, seed):
    """
    Kills a run in `folder` at `kills` random moments, each up to `longest` lines of output after it was begun or resumed;
    returns how often there was a checkpoint to go on from.
    """
    moments, resumed = random.Random(seed), 0
    for _ in range(kills):
        resuming = any(folder.glob("resume*.pt"))
        run = start(folder.parent, *(["--resume"] if resuming else [*SIZES, *STEPS]), "--out_dir", folder)
        resumed += resuming
        for _ in range(moments.randint(1, longest)):
            run.stdout.readline()
        time.sleep(moments.uniform(0, 0.3))
        kill(run, folder)
        if (folder / "summary.json").exists():
            break  # it was faster
    return resumed


# What stops a run


def ends(run):
    """The exit status of a run, and the one line that it leaves on stderr."""
    _, errors = run.communicate(timeout=100)
    (line,) = errors.strip().splitlines()
    return run.returncode, line


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a run that SIGINT stopped in the language model's training; what it said; and one that was not stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    write_text(folder)
    undisturbed, run = (start(folder, *SIZES, *STEPS, "--out_dir", name) for name in ("undisturbed", "run"))
    while not run.stdout.readline().startswith("calm      8"):
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    undisturbed.communicate()
    return folder, ends(run)


@pytest.fixture
def copy(stopped, tmp_path, monkeypatch):
    shutil.copytree(stopped[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def test_a_run_that_is_killed_and_resumed_ends_as_if_it_had_not_been(copy, monkeypatch):
    """Once at a random moment (the script: twenty times), and once more after the last step, while it is scored."""
    kill_and_resume(copy / "killed", kills=1, longest=9, seed=0)
    run = start(copy, "--resume", "--out_dir", "killed")
    while train.load_run(copy / "killed")["step"] < 48:
        assert run.poll() is None
        time.sleep(0.05)
    kill(run, copy / "killed")
    train_here(monkeypatch, "--resume", "--out_dir", "killed")
    assert outcome(copy / "killed") == outcome(copy / "undisturbed")
    assert {path.name for path in (copy / "killed").iterdir()} == {path.name for path in (copy / "undisturbed").iterdir()}


def test_control_c_saves_and_says_how_to_go_on(stopped):
    status, line = stopped[1]
    assert status == 130 and "python train.py --resume --out_dir run" in line


def test_a_changed_flag_is_refused_by_its_name(copy, command):
    before = {path.name: path.read_bytes() for path in (copy / "run").iterdir()}
    assert "--lr was 0.003" in command(train.main, "--resume", "--out_dir", "run", "--lr", 1e-3)
    assert "--seed was 0" in command(train.main, "--resume", "--out_dir", "run", "--seed", 1)
    (copy / "text.txt").write_text("another text " * 1000)
    assert "text.txt" in command(train.main, "--resume", "--out_dir", "run")
    after = {path.name: path.read_bytes() for path in (copy / "run").iterdir()}
    assert {name for name in after if after[name] != before.get(name)} <= {"train.bin", "validation.bin"}


def test_a_truncated_checkpoint_falls_back_on_the_one_before(copy, capsys):
    path = copy / "run" / "resume.pt"
    newest, before = (torch.load(copy / "run" / name, weights_only=True)["step"] for name in ("resume.pt", "resume.old.pt"))
    assert train.load_run("run")["step"] == newest
    path.write_bytes(path.read_bytes()[:1000])
    assert train.load_run("run")["step"] == before
    assert "resume.pt is damaged" in capsys.readouterr().err


def test_nothing_to_resume_is_said(copy, command, capsys):
    for name in ("resume.pt", "resume.old.pt"):
        (copy / "run" / name).unlink()
    assert "no checkpoint" in command(train.main, "--resume", "--out_dir", "run")
    assert "no checkpoint" in command(train.main, "--resume", "--out_dir", "nowhere")


def test_a_loss_that_is_no_longer_finite_stops_with_its_step_and_spares_what_was_saved(copy, command):
    assert "unfinished run" in command(train.main, *SIZES, *STEPS, "--out_dir", "run", "--stage", "calm", "--lr", 1e9)
    (copy / "run" / "resume.pt").unlink()
    assert "unfinished run" in command(train.main, *SIZES, *STEPS, "--out_dir", "run", "--stage", "calm", "--lr", 1e9)
    (copy / "run" / "resume.old.pt").unlink()
    message = command(train.main, *SIZES, *STEPS, "--out_dir", "run", "--stage", "calm", "--lr", 1e9)
    assert "no longer finite at step" in message
    run = train.load_run("run")  # raises if there is none
    assert run["stage"] == "calm" and all(tensor.isfinite().all() for tensor in run["weights"].values())


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(folder, limit=100_000):
    """A limit on the size of a file stands for the full disk: 100 kB are enough for the tokens, too little for a checkpoint."""
    import resource

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, SCRIPT, *SIZES, *STEPS, "--out_dir", "run", "--hidden_size", "32"]
    run = subprocess.Popen(command, text=True, preexec_fn=full, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    status, line = ends(run)
    assert status == 2 and "could not be written" in line, line
    assert not list((folder / "run").glob("*.part"))
    for path in (folder / "run").glob("*.pt"):
        torch.load(path, weights_only=True)


# Several processes


def gradients():
    """
    The gradients (no longer than 1, as clipped) of one step of `optimise` on this process's share of a batch of 8 sequences,
    for two models whose losses need no random numbers: a discrete Transformer, and, in four parts, a CALM with choices.
    """
    choices = build_calm("choices", tiny_calm().config, tiny_calm().autoencoder, torch.arange(200).view(50, 4) % 13)
    torch.manual_seed(0)
    baseline = TransformerLM(TransformerConfig(13, 16, 32, n_layers=2, n_heads=2, context=32))
    share = torch.randint(13, (8, 32), generator=torch.Generator().manual_seed(1)).chunk(train.WORLD)[train.RANK]
    for model, parts in ((baseline, 1), (choices, 4)):
        train.optimise(model, lambda: share, 1, 1e-3, lambda *_: None, parts=parts)
        yield torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def in_two_processes(folder, command):
    """Runs a command (rank -> its words) in two processes that are told of each other as torchrun does; returns their outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        runs.append(subprocess.Popen([sys.executable, *command(rank)], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE))
    outputs = [run.communicate(timeout=100)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    return outputs


def test_two_processes_have_the_gradient_of_one(folder):
    code = "import sys, torch, test_survival as t; torch.distributed.init_process_group('gloo'); torch.save([*t.gradients()], sys.argv[1])"
    in_two_processes(os.path.dirname(os.path.abspath(__file__)), lambda rank: ["-c", code, str(folder / f"{rank}.pt")])
    for rank in range(2):
        for two, one in zip(torch.load(folder / f"{rank}.pt", weights_only=True), gradients()):
            assert one.norm() > 0.1 and (two - one).norm() / one.norm() < 1e-6


def test_a_run_of_two_processes_leaves_what_a_run_of_one_leaves(folder):
    first, second = in_two_processes(folder, lambda rank: [SCRIPT, *SIZES, "--autoencoder_steps", "3", "--steps", "3", "--out_dir", "two"])
    assert first.count("BrierLM") == 4 and second == ""
    assert {"autoencoder.pt", "calm.pt", "sample.txt", "curves.png", "summary.json"} <= {path.name for path in (folder / "two").iterdir()}
    assert json.loads((folder / "two" / "summary.json").read_text())["calm"]["tokens"] == 3 * 4 * 32


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_text(place)
        start(place, *SIZES, *STEPS, "--out_dir", "undisturbed").communicate()
        resumed = kill_and_resume(place / "killed", kills, longest=5, seed=0)
        if any((place / "killed").glob("resume*.pt")):
            start(place, "--resume", "--out_dir", "killed").communicate()
        same = outcome(place / "killed") == outcome(place / "undisturbed")
        print(f"killed {kills} times at random moments, resumed {resumed} times: {'the same, bit for bit' if same else 'DIFFERENT'}")
        sys.exit(not same)
