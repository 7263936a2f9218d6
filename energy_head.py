"""
The energy head: a sampler of vectors, and the score that trains it without likelihoods.    (CALM paper, section 3)

A softmax gives every token a probability, and cross-entropy trains it. A vector in R^l has no softmax: the energy head is
only a *sampler*, a small network that turns the Transformer's hidden state and random noise into one vector. Nobody can ask
it how probable a vector is. The energy score needs nothing but samples to tell a good sampler from a bad one.

The first half of this file is that score, as pure functions on tensors, for any sampler. The second half is the head.

Letters: N head samples, M target samples, l latent size, d width, ... any number of leading dimensions (see autoencoder.py).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

NORM_EPS = 1e-6  # as in autoencoder.py: this file imports none of the others


# ----------------------------------------------------------------------------------------------------------------------
# The energy score
#
#     S(P, y) = E |x' - x''|^alpha  -  2 E |x - y|^alpha ,     x, x', x'' independent draws from P
#
# For 0 < alpha < 2 it is *strictly proper*: on average over y ~ Q it is largest when P = Q, and only then (what P loses
# against Q is a weighted squared distance of their characteristic functions; Székely and Rizzo). The second term
# (fidelity) pulls the samples towards the data; the first (diversity) pushes them apart, or they would all land on the
# median. When P = Q the two expectations are equal: E |x' - x''| = E |x - y|. At alpha = 2 the score sees only the mean.


def distance_power(products, squares, alpha):
    """
    |x - y|^alpha from the products x·y and the squares |x|^2 + |y|^2, two tensors of one shape -> that shape.

    |x - y|^2 = |x|^2 + |y|^2 - 2 x·y costs l times less memory than all the differences x - y, but where x = y rounding
    leaves a few times 1e-7 of the squares in float32. So what is at most 16 machine epsilons of them counts as 0, and its
    gradient is 0 (not NaN). Shift clouds far from the origin to it first, or rounding swallows their distances.
    """
    if not 0 < alpha < 2:
        raise ValueError(f"alpha must lie strictly between 0 and 2 for the energy score to be strictly proper, not {alpha}")
    squared = squares - 2 * products
    same = squared <= 16 * torch.finfo(squared.dtype).eps * squares
    # The inner fill keeps the root away from 0: its derivative there is infinite, and 0 · inf would be NaN.
    return squared.masked_fill(same, 1.0).pow(alpha / 2).masked_fill(same, 0.0)


def pairwise_distances(x, alpha):
    """|x_i - x_j|^alpha for all pairs of points: (..., N, l) -> (..., N, N)."""
    products = x @ x.transpose(-1, -2)
    own = products.diagonal(dim1=-2, dim2=-1)  # |x_i|^2
    return distance_power(products, own[..., :, None] + own[..., None, :], alpha)


def in_full_precision(*tensors):
    """At least float32: in half precision, sums of squares lose the distances that they are made of."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def diversity(samples, alpha=1.0):
    """E |x' - x''|^alpha over all pairs of *different* draws: (N, ..., l) -> (...), unbiased, N >= 2."""
    n = samples.shape[0]
    if n < 2:
        raise ValueError("the diversity of a sampler needs at least 2 samples")
    x = (samples - samples.mean(0)).movedim(0, -2)  # (..., N, l), the cloud about its centre
    # A draw's distance to itself is 0 and adds nothing, but does not count as a pair: divide by N (N - 1), not by N^2.
    return pairwise_distances(x, alpha).sum((-1, -2)) / (n * (n - 1))


def energy_score(samples, targets, alpha=1.0):
    """
    The energy score of a sampler at observed targets, to be *maximised*.               (paper, section 3)

    samples (N, ..., l), targets (M, ..., l)  ->  (...), unbiased, N >= 2. For half precision it is computed in float32.
    The released code holds all the differences at once: N·M·positions·l numbers. Training takes the cheaper `energy_loss`,
    which knows that the targets are Gaussian.
    """
    with torch.autocast(samples.device.type, enabled=False):
        samples, targets = in_full_precision(samples, targets)
        centre = targets.mean(0)
        x, y = (samples - centre).movedim(0, -2), (targets - centre).movedim(0, -2)  # (..., N, l) and (..., M, l)
        squares = x.square().sum(-1)[..., :, None] + y.square().sum(-1)[..., None, :]
        distances = distance_power(x @ y.transpose(-1, -2), squares, alpha)  # (..., N, M)
        return diversity(samples, alpha) - 2 * distances.mean((-1, -2))


def posterior_fidelity(samples, mean, log_std, noise, alpha=1.0):
    """
    E |x - y|^alpha for targets y_m = mean + std∘noise_m (∘: by coordinate): the same M draws of noise for every position.

    samples (N, ..., l), mean and log_std (..., l), noise (M, l)  ->  (...).

    Sharing needs fewer random numbers and stays unbiased: each position still sees M independent draws of its own posterior,
    and a mean over positions does not mind that they are related. And the distances become two matrix products, without any
    target being made: with r = x - mean,
        |x - y|^2 = |r - std∘noise|^2 = |r|^2 - 2 (r∘std)·noise + std^2·noise^2
    """
    std = log_std.exp()
    targets_squared = std.square() @ noise.square().T  # (..., M)

    def of_sample(x):
        r = x - mean
        squares = r.square().sum(-1, keepdim=True) + targets_squared  # (..., M)
        return distance_power((r * std) @ noise.T, squares, alpha).mean(-1)

    return sum(of_sample(x) for x in samples) / len(samples)  # one by one: fewer temporaries at once


def energy_loss(samples, mean, log_std, n_targets=100, alpha=1.0, generator=None):
    """
    Minus the energy score, averaged over all positions, with targets drawn from the autoencoder's posterior.

    samples (N, ..., l), mean and log_std (..., l)  ->  loss, fidelity, diversity: scalars, loss = 2·fidelity - diversity.

    The target is the whole posterior: M = `n_targets` draws of it cost little beside the N samples of the network.
    When the head matches the data, fidelity = diversity; their gap shows how far it still is.
    """
    with torch.autocast(samples.device.type, enabled=False):
        samples, mean, log_std = in_full_precision(samples, mean, log_std)
        noise = torch.randn(n_targets, mean.shape[-1], device=mean.device, dtype=mean.dtype, generator=generator)
        fidelity = posterior_fidelity(samples, mean, log_std, noise, alpha).mean()
        spread = diversity(samples, alpha).mean()
        return 2 * fidelity - spread, fidelity, spread


# ----------------------------------------------------------------------------------------------------------------------
# The head


def init_linear_maps(module):
    """The weights of all its linear maps get std 1/sqrt(fan-in), their biases 0: see `init_by_width` in autoencoder.py."""
    for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)


def linear_of_both(linear, x, c):
    """linear([x, c]) for x (n, ..., d), c (..., d). W [x, c] = W_x x + W_c c, and all n share c: its half is computed once."""
    weight_x, weight_c = linear.weight.split([x.shape[-1], c.shape[-1]], dim=1)
    return F.linear(x, weight_x) + F.linear(c, weight_c, linear.bias)


class HeadBlock(nn.Module):
    """
    x <- x + down(SiLU(gate) · up), where (gate, up) = MLP([LayerNorm(x), c]), c: what the hidden state says.
    x (n, ..., d), c (..., d) -> (n, ..., d).
    Released code: `mlp_generator.mlp_blocks` of `EnergyTransformer`.
    """

    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.linear_in = nn.Linear(2 * d, d)
        self.linear_mid = nn.Linear(d, d)
        self.linear_out = nn.Linear(d, 2 * d)
        self.down = nn.Linear(d, d)

    def forward(self, x, c):
        h = linear_of_both(self.linear_in, self.norm(x), c)
        gate, up = self.linear_out(F.silu(self.linear_mid(F.silu(h)))).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class EnergyHead(nn.Module):
    """
    One draw of the next latent vector from one forward pass (a diffusion head needs many).      (paper, section 3)
    Released code: `mlp_generator` of `EnergyTransformer`. The paper gives it about a quarter of the Transformer's number of blocks.
    """

    def __init__(self, hidden_size, latent_size, noise_size=64, n_blocks=4):
        super().__init__()
        d = hidden_size
        self.noise_size = noise_size
        self.noise_in, self.noise_norm = nn.Linear(noise_size, d), nn.LayerNorm(d, eps=NORM_EPS)
        self.hidden_in, self.hidden_norm = nn.Linear(d, d), nn.LayerNorm(d, eps=NORM_EPS)
        self.blocks = nn.ModuleList(HeadBlock(d) for _ in range(n_blocks))
        self.final_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.final_in = nn.Linear(d, d)
        self.final_out = nn.Linear(d, latent_size)
        init_linear_maps(self)
        nn.init.zeros_(self.final_out.weight)  # so that every first prediction is the origin

    def forward(self, hidden, noise):
        """hidden (..., d), noise (..., noise_size), which may have more leading dimensions than hidden  ->  latent (..., l)."""
        x = self.noise_norm(self.noise_in(noise))
        c = self.hidden_norm(self.hidden_in(hidden))
        for block in self.blocks:
            x = block(x, c)
        return self.final_out(F.silu(self.final_in(self.final_norm(x))))

    def sample(self, hidden, n, generator=None):
        """n independent draws for each hidden state: (..., d) -> (n, ..., l). The noise is uniform in [-1/2, 1/2)."""
        shape = (n, *hidden.shape[:-1], self.noise_size)
        noise = torch.rand(shape, device=hidden.device, dtype=hidden.dtype, generator=generator) - 0.5
        return self(hidden, noise)
