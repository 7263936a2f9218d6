"""What several tests share. The tests are the specification: each says in its name what must hold, and fails if it does not."""

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import sample  # noqa: E402
from autoencoder import Autoencoder, AutoencoderConfig  # noqa: E402
from calm import CALM, CALMConfig  # noqa: E402

# The tests' models are so small that sharing their work between threads costs more than it saves. The second line is for
# the processes that the tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# Statistical tests are repeated on these seeds and must pass on every one. Their thresholds are probabilities of about
# 1e-4 a seed or less: a correct program fails one in a thousand runs of a test with other seeds, and never with these.
SEEDS = range(10)


def tiny_calm(chunk_size=4, vocab_size=13, context=32, seed=0, noisy=True):
    """
    A CALM of 1 to 2 ms a call with random weights. Its last linear map, which starts at zero, is random too, or all its
    draws would be the same. With noisy=False the head ignores its noise, so that every draw is the most probable chunk.
    """
    torch.manual_seed(seed)
    autoencoder = Autoencoder(AutoencoderConfig(vocab_size, chunk_size, 8, hidden_size=16, intermediate_size=32))
    config = CALMConfig(
        vocab_size, chunk_size, 8, hidden_size=16, intermediate_size=32, n_layers=2, n_heads=2,
        noise_size=4, n_head_blocks=1, n_samples=4, n_targets=10, context=context,
    )  # fmt: skip
    model = CALM(config, autoencoder).eval()
    torch.nn.init.normal_(model.head.final_out.weight)
    if not noisy:
        torch.nn.init.zeros_(model.head.noise_in.weight)
    return model


def chi_square_p(observed, expected):
    """The p-value of counts against expected counts, (outcomes,) each; outcomes that cannot occur must not have occurred."""
    observed, expected = torch.as_tensor(observed).double(), torch.as_tensor(expected).double()
    assert observed[expected == 0].sum() == 0, "an impossible outcome occurred"
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(observed) == 1:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2).double(), statistic / 2).item()


@pytest.fixture
def command(monkeypatch, capsys):
    """command(main, *arguments): runs a script's main, which must end with status 2 and one line on stderr; returns that line."""

    def call(main, *arguments):
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
