import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SEEDS
from torch.utils._python_dispatch import TorchDispatchMode

from energy_head import EnergyHead, diversity, energy_loss, energy_score, posterior_fidelity


def slow_energy_score(x, y, alpha):
    """The definition as a double loop, in float64: x (N, ..., l), y (M, ..., l) -> (...)."""
    x, y = x.double(), y.double()
    fidelity = torch.stack([(a - b).norm(dim=-1) ** alpha for a in x for b in y]).mean(0)
    diversity = torch.stack([(a - b).norm(dim=-1) ** alpha for i, a in enumerate(x) for j, b in enumerate(x) if i != j]).mean(0)
    return diversity - 2 * fidelity


# The score


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_energy_score_is_the_double_loop(alpha, leading):
    x, y = torch.randn(5, *leading, 9), 1 + torch.randn(7, *leading, 9)
    torch.testing.assert_close(energy_score(x, y, alpha).double(), slow_energy_score(x, y, alpha), rtol=1e-5, atol=1e-5)


def test_energy_score_far_from_the_origin():
    """Distances of 1e-2 at |x| = 1e3: |x|^2 + |y|^2 - 2 x·y alone would lose them all in float32, whose steps there are 0.06."""
    x, y = (1e3 / 4 + 1e-2 * torch.randn(n, 6, 16) / 4 for n in (5, 7))
    torch.testing.assert_close(energy_score(x, y).double(), slow_energy_score(x, y, 1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_energy_score_of_two_gaussians_in_closed_form(seed):
    """
    For x ~ N(m, s^2) in one dimension, E|x - x'| = 2 s / sqrt(pi) and E|x - y| is the mean of a folded normal distribution.
    H0: the estimate is unbiased. 20 000 independent estimates with N = 4, M = 3; within 4.5 standard errors, p < 1e-5.
    """
    torch.manual_seed(seed)
    m, s, r = 0.7, 1.3, 0.5  # the targets are N(0, r^2)
    scores = energy_score(m + s * torch.randn(4, 20_000, 1), r * torch.randn(3, 20_000, 1))
    spread = math.sqrt(s * s + r * r)  # x - y ~ N(m, spread^2)
    folded = spread * math.sqrt(2 / math.pi) * math.exp(-m * m / (2 * spread**2)) + m * math.erf(m / (spread * math.sqrt(2)))
    expected = 2 * s / math.sqrt(math.pi) - 2 * folded
    assert abs(scores.mean().item() - expected) < 4.5 * scores.std().item() / math.sqrt(20_000)


def test_the_score_is_largest_for_the_true_distribution():
    targets = torch.randn(200, 4000, 1)
    noise = torch.randn(8, 4000, 1)
    score = {(m, s): energy_score(m + s * noise, targets).mean().item() for m in (-0.5, 0.0, 0.5) for s in (0.5, 1.0, 2.0)}
    assert max(score, key=score.get) == (0.0, 1.0)


def test_alpha_outside_its_range_and_a_single_sample_are_refused():
    x = torch.randn(3, 5)
    for alpha in (0.0, 2.0, -1.0):
        with pytest.raises(ValueError, match="alpha"):
            energy_score(x, x, alpha)
    with pytest.raises(ValueError, match="2 samples"):
        energy_score(x[:1], x)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_gradients(alpha):
    x, y = torch.randn(3, 2, 4).double().requires_grad_(), torch.randn(2, 2, 4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: energy_score(x, y, alpha), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: energy_score(x, y, alpha), (x, y))


def test_gradients_where_samples_coincide():
    """|x - y| has no derivative at 0; central differences give the middle of its subgradient, 0, and so must we."""
    x = torch.randn(3, 2, 4).double()
    x[1] = x[0]
    y = torch.stack([x[2], torch.randn(2, 4).double()])
    x, y = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(energy_score, (x, y))
    for alpha in (0.5, 1.0):
        (gradient,) = torch.autograd.grad(energy_score(x, y, alpha).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        assert gradient.isfinite().all() and second.isfinite().all()
    same = torch.ones(4, 3, 5, requires_grad=True)
    diversity(same, 0.5).sum().backward()
    assert torch.equal(same.grad, torch.zeros_like(same))


def test_samples_on_a_target_have_the_distance_zero_in_float32_too():
    """Here |x|^2 + |y|^2 - 2 x·y leaves up to 1e-4 in place of 0, whose root would be 1e-2."""
    x, away = torch.randn(500, 128), torch.randn(500, 128)
    score = energy_score(x.expand(3, -1, -1), torch.stack([x, x + away]))
    torch.testing.assert_close(score, -away.norm(dim=-1), rtol=1e-5, atol=0)  # no diversity; half of the targets lie |away| away


# The loss


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_loss_is_minus_the_score_of_posterior_draws(alpha):
    x, mean, log_std = torch.randn(4, 2, 5, 6), torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    loss, fidelity, spread = energy_loss(x, mean, log_std, 30, alpha, torch.Generator().manual_seed(1))
    noise = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    targets = mean + log_std.exp() * noise[:, None, None, :]
    torch.testing.assert_close(loss.double(), -slow_energy_score(x, targets, alpha).mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, 2 * fidelity - spread)


def test_gradients_of_the_loss():
    x, mean, log_std = (torch.randn(*shape).double().requires_grad_() for shape in ((3, 2, 4), (2, 4), (2, 4)))
    noise = torch.randn(5, 4).double()
    assert torch.autograd.gradcheck(lambda *args: posterior_fidelity(*args, noise), (x, mean, log_std))
    assert torch.autograd.gradcheck(diversity, x)


@pytest.mark.parametrize("seed", SEEDS)
def test_sharing_the_noise_between_positions_is_unbiased(seed):
    """
    H0: with one set of M draws for all positions the expected fidelity is that of draws made for each position.
    400 estimates of M = 4 shared draws at 8 positions against 100 000 independent draws; 4.5 standard errors, p < 1e-5.
    """
    torch.manual_seed(seed)
    x, mean, log_std = torch.randn(2, 8, 3), torch.randn(8, 3), 0.5 * torch.randn(8, 3)
    shared = torch.stack([posterior_fidelity(x, mean, log_std, torch.randn(4, 3)).mean() for _ in range(400)])
    targets = mean + log_std.exp() * torch.randn(100_000, 8, 3)
    independent = torch.stack([(a - targets).norm(dim=-1).mean((1)) for a in x]).mean(0)  # (100 000,)
    error = math.sqrt(shared.var().item() / 400 + independent.var().item() / 100_000)
    assert abs(shared.mean() - independent.mean()).item() < 4.5 * error


def test_half_precision_is_computed_in_float32():
    x, mean, log_std = torch.randn(4, 50, 64), torch.randn(50, 64), torch.randn(50, 64) - 1
    generator = torch.Generator().manual_seed(0)
    expected = energy_loss(x, mean, log_std, generator=generator)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert energy_loss(x, mean, log_std, generator=generator.manual_seed(0))[0] == expected
        assert energy_score(x, x[:2]).dtype == torch.float32
    assert energy_score(x.bfloat16(), x[:2].bfloat16()).dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of any tensor made while it is active."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() == t.numel() * t.element_size():
                self.largest = max(self.largest, t.numel())
        return result


def test_no_tensor_of_all_the_differences_is_ever_made():
    N, M, positions, l = 8, 50, 64, 32
    x = torch.randn(N, positions, l, requires_grad=True)
    mean, log_std = torch.randn(positions, l), torch.randn(positions, l)
    with LargestTensor() as mode:
        energy_loss(x, mean, log_std, M)[0].backward()
        energy_score(x, torch.randn(M, positions, l)).sum().backward()
    assert mode.largest <= positions * M * l  # of the targets themselves: N times less than all differences
    assert mode.largest >= N * positions * l  # the mode did see something


# The head


def plain_head(head, hidden, noise):
    """The head as the paper's figure has it: the conditioning repeated for each sample, and concatenated."""
    x = head.noise_norm(head.noise_in(noise))
    c = head.hidden_norm(head.hidden_in(hidden)).expand_as(x)
    for block in head.blocks:
        h = block.linear_in(torch.cat([block.norm(x), c], dim=-1))
        gate, up = block.linear_out(F.silu(block.linear_mid(F.silu(h)))).chunk(2, dim=-1)
        x = x + block.down(F.silu(gate) * up)
    return head.final_out(F.silu(head.final_in(head.final_norm(x))))


def random_head():
    head = EnergyHead(hidden_size=12, latent_size=5, noise_size=7, n_blocks=2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return head


def test_head_without_repeating_the_conditioning_is_the_plain_head():
    head, hidden, noise = random_head(), torch.randn(2, 3, 12), torch.rand(4, 2, 3, 7) - 0.5
    torch.testing.assert_close(head(hidden, noise), plain_head(head, hidden, noise))


def test_the_head_starts_at_the_origin():
    head = EnergyHead(12, 5)
    assert torch.equal(head.sample(torch.randn(3, 12), 2), torch.zeros(2, 3, 5))


def test_samples_differ_between_draws_and_between_positions():
    head = random_head()
    samples = head.sample(torch.zeros(3, 4, 12), 6)
    assert samples.shape == (6, 3, 4, 5)
    assert len(samples.reshape(-1, 5).unique(dim=0)) == 6 * 3 * 4


@pytest.mark.parametrize("seed", SEEDS)
def test_the_noise_is_uniform_on_minus_half_to_half(seed):
    """H0: mean 0, variance 1/12. n = 70 000; 4.5 sigma, p < 1e-5."""
    torch.manual_seed(seed)
    head, seen = random_head(), []
    head.noise_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    head.sample(torch.randn(1000, 12), 10)
    noise = seen[0].flatten()
    assert noise.min() >= -0.5 and noise.max() < 0.5
    assert abs(noise.mean().item()) < 4.5 * math.sqrt(1 / 12 / len(noise))
    assert abs(noise.square().mean().item() - 1 / 12) < 4.5 * math.sqrt(1 / 180 / len(noise))


def test_a_generator_makes_draws_repeatable():
    head, hidden = random_head(), torch.randn(3, 12)
    first, second = (head.sample(hidden, 2, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, head.sample(hidden, 2))
