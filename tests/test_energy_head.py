import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SEEDS, slow_energy_score

from energy_head import EnergyHead, energy_loss, energy_score

# Far from the origin |x|^2 + |y|^2 - 2 x·y has steps of 0.06 in float32: distances would be lost.
near_and_far = pytest.mark.parametrize("origin, size", [(0.0, 1.0), (1e3, 1e-2)])


@near_and_far
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
@pytest.mark.parametrize("N, M", [(5, 40), (40, 2)])
def test_energy_score_is_the_double_loop(N, M, leading, alpha, origin, size):
    """Of 40 points `cdist` finds that each is 0.01 or so from itself: that must not count."""
    x = origin + size * torch.randn(N, *leading, 9)
    y = origin + size * torch.randn(M, *leading, 9)
    score = energy_score(x, y, alpha).double()
    torch.testing.assert_close(score, slow_energy_score(x, y, alpha), rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_the_score_is_largest_for_the_true_distribution(alpha):
    targets, noise = torch.randn(20, 4000, 1), torch.randn(8, 4000, 1)
    grid = [(m, s) for m in (-0.5, 0.0, 0.5) for s in (0.5, 1.0, 2.0)]
    scores = [energy_score(m + s * noise, targets, alpha).mean().item() for m, s in grid]
    assert grid[scores.index(max(scores))] == (0.0, 1.0)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("n", [4, 40])  # more than 25 points are computed in another way
def test_the_gradient_is_finite_where_samples_coincide(alpha, n):
    x = torch.randn(n, 2, 4)
    x[1] = x[0]
    x.requires_grad_()
    energy_score(x, x[2:].detach(), alpha).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    same = torch.ones(n, 2, 4, requires_grad=True)  # the head's first samples are all the same
    energy_score(same, torch.ones(n, 2, 4), alpha).sum().backward()
    assert torch.equal(same.grad, torch.zeros_like(same))


@near_and_far
@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_minus_the_score_of_posterior_draws(dtype, alpha, origin, size):
    x, mean = origin + size * torch.randn(4, 2, 5, 6), origin + size * torch.randn(2, 5, 6)
    log_std = math.log(size) + 0.5 * torch.randn(2, 5, 6)
    x, mean, log_std = x.to(dtype), mean.to(dtype), log_std.to(dtype)
    generator = torch.Generator().manual_seed(1)
    loss, fidelity, diversity = energy_loss(x, mean, log_std, 30, alpha, generator)
    noise = torch.randn(30, 6, generator=generator.manual_seed(1)).double()
    targets = mean.double() + log_std.double().exp() * noise[:, None, None]  # (M, 2, 5, l)
    expected = -slow_energy_score(x, targets, alpha).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, 2 * fidelity - diversity)


def random_head():
    head = EnergyHead(hidden_size=12, latent_size=5, noise_size=7, n_blocks=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def test_the_head_is_the_formula():
    head, hidden, noise = random_head(), torch.randn(2, 3, 12), torch.rand(4, 2, 3, 7) - 0.5
    x = head.noise_norm(head.noise_in(noise))
    c = head.hidden_norm(head.hidden_in(hidden)).repeat(4, 1, 1, 1)
    for block in head.blocks:
        first, _, second, _, third = block.mlp
        y = F.silu(first(torch.cat([block.norm(x), c], dim=-1)))
        y = third(F.silu(second(y)))
        x = x + block.down(F.silu(y[..., :12]) * y[..., 12:])
    expected = head.final[2](F.silu(head.final[0](head.final_norm(x))))
    torch.testing.assert_close(head(hidden, noise), expected)


def test_the_head_starts_at_the_origin_and_leaves_it():
    head = EnergyHead(12, 5)
    samples = head.sample(torch.randn(3, 12), 2)
    assert torch.equal(samples, torch.zeros(2, 3, 5))
    energy_loss(samples, torch.ones(3, 5), torch.zeros(3, 5))[0].backward()
    assert head.final[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_are_independent_and_their_noise_is_uniform(seed):
    """H0: on [-1/2, 1/2), so mean 0 and variance 1/12. n = 70 000; within 4.5 sigma."""
    torch.manual_seed(seed)
    head, seen = random_head(), []
    head.noise_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten()))
    samples = head.sample(torch.zeros(10, 100, 12), 10)
    assert samples.shape == (10, 10, 100, 5)
    assert len(samples.view(-1, 5).unique(dim=0)) == 10_000  # none is there twice
    noise = seen[0]
    assert noise.min() >= -0.5 and noise.max() < 0.5
    assert abs(noise.mean().item()) < 4.5 * math.sqrt(1 / 12 / 70_000)
    assert abs(noise.square().mean().item() - 1 / 12) < 4.5 * math.sqrt(1 / 180 / 70_000)
