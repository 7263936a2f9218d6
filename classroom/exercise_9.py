"""Exercise 9: a test for the diversity. It says True of the right function, and False of the wrong
ones below, each of which is a plausible slip. All of them are called like fidelity_and_diversity.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from energy_head import fidelity_and_diversity  # noqa: E402


def divided_by_n_squared(samples, targets, alpha=1.0):
    N = len(samples)
    fidelity, diversity = fidelity_and_diversity(samples, targets, alpha)
    return fidelity, diversity * (N - 1) / N


def clamp_counted(samples, targets, alpha=1.0):
    """The diagonal is in the sum: not as 0, but as what `clamp_min(1e-12)` makes of it."""
    N = len(samples)
    fidelity, diversity = fidelity_and_diversity(samples, targets, alpha)
    return fidelity, diversity + 1e-12**alpha / (N - 1)


def power_after_the_mean(samples, targets, alpha=1.0):
    fidelity, distance = fidelity_and_diversity(samples, targets, 1.0)
    return fidelity**alpha, distance**alpha


def diversity_is_unbiased(fidelity_and_diversity):
    """Is its diversity the mean of |x' - x''|^alpha over the N (N - 1) pairs of *different* samples?
    Given a function like fidelity_and_diversity -> True or False, the same at each call.
    """
    samples = torch.tensor([[0.0], [1.0], [4.0]])  # distances 1, 3 and 4
    expected = (1**0.25 + 3**0.25 + 4**0.25) / 3
    _, diversity = fidelity_and_diversity(samples, samples, 0.25)
    return abs(diversity.item() - expected) < 1e-5
