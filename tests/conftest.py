"""What several tests share. The tests are the specification: each name says what must hold."""

import contextlib
import io
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import sample  # noqa: E402
from autoencoder import Autoencoder, AutoencoderConfig  # noqa: E402
from calm import CALM, CALMConfig  # noqa: E402

# Models so small lose by threads. The second line is for processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A statistical test runs on each of these seeds. Its threshold is a probability of at most 1e-4.
SEEDS = range(10 if os.environ.get("CALM_ALL_SEEDS") else 1)


def tiny_calm(chunk_size=4, vocab_size=13, context=32, seed=0, noisy=True):
    """A small CALM for evaluation, its head not zero. With noisy=False all draws are the same."""
    torch.manual_seed(seed)
    sizes = {"latent_size": 8, "hidden_size": 16, "intermediate_size": 32}
    autoencoder = Autoencoder(AutoencoderConfig(vocab_size, chunk_size, **sizes))
    sizes |= {"n_layers": 2, "n_heads": 2, "noise_size": 4, "n_head_blocks": 1}
    sizes |= {"n_samples": 4, "n_targets": 10, "alpha": 0.5, "context": context}
    model = CALM(CALMConfig(vocab_size, chunk_size, **sizes), autoencoder).eval()
    torch.nn.init.normal_(model.head.final[-1].weight)
    if not noisy:
        torch.nn.init.zeros_(model.head.noise_in.weight)
    return model


def chi_square_p(observed, expected):
    """The p-value of counts (outcomes,) against expected ones. The impossible must not occur."""
    possible = expected > 0
    assert observed[~possible].sum() == 0, "an impossible outcome occurred"
    statistic = ((observed - expected)[possible].double() ** 2 / expected[possible]).sum()
    freedom = (possible.sum() - 1).clamp_min(1)  # of one possible outcome the statistic is 0
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


def slow_energy_score(x, y, alpha=1.0):
    """The definition, as a double loop in float64: samples x (N, ..., l), targets y (M, ..., l)."""
    x, y = x.double(), y.double()
    to_targets = [(a - b).norm(dim=-1) ** alpha for a in x for b in y]
    to_each_other = [(a - b).norm(dim=-1) ** alpha for a, b in itertools.permutations(x, 2)]
    return torch.stack(to_each_other).mean(0) - 2 * torch.stack(to_targets).mean(0)


def run_in(folder, main, *arguments):
    """Calls the main of a command in a folder, with these arguments; returns what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        main()
    return printed.getvalue()


@pytest.fixture
def command(monkeypatch, capsys):
    """command(main, *arguments): main must end with status 2 and one line on stderr; returns it."""

    def call(main, *arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            sample.run(main)
        assert ended.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return call


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
