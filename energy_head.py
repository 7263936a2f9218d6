"""The energy head: a sampler of vectors, and the score that trains it.  (CALM paper, section 3)

There is no softmax over vectors. The energy head is only a *sampler*: it turns a hidden state and
random noise into one vector. The energy score needs only samples to tell a good sampler from a bad
one.

Letters: N head samples, M target samples, l latent size, d width, ... any leading dimensions.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

NORM_EPS = 1e-6  # as in autoencoder.py


# ------ The energy score
#
#     S(P, y) = E |x' - x''|^alpha  -  2 E |x - y|^alpha,      x, x', x'' independent draws from P
#
# For 0 < alpha < 2 it is *strictly proper*: its mean over y ~ Q (what may follow a text)
# is largest at P = Q, and only there. Let y, y' be independent draws from Q. The "energy distance"
#
#     D = 2 E |x - y|^alpha - E |x' - x''|^alpha - E |y - y'|^alpha
#
# is 0 if P = Q, and else positive (a theorem). The mean of S is -D - E |y - y'|^alpha, where only D
# depends on P.
#
# "Fidelity", E |x - y|^alpha, is small if draws lie near the data. Alone it would pull them all to
# one point. "Diversity", E |x' - x''|^alpha, keeps them apart. At P = Q the two are equal.


def fidelity_and_diversity(x, y, alpha):
    """E |x - y|^alpha and E |x' - x''|^alpha, unbiased: x (..., N, l), y (..., M, l) -> (...) each.
    The points should lie about the origin: see `energy_score`.
    """
    N = x.shape[-2]
    if not 0 < alpha < 2:
        raise ValueError(f"alpha must lie between 0 and 2, not {alpha}")
    if N < 2:
        raise ValueError("the diversity of a sampler needs at least 2 samples")
    # If alpha < 1, the slope of |.|^alpha is infinite at 0. The clamp makes it 0.
    to_targets = torch.cdist(x, y).clamp_min(1e-12) ** alpha  # (..., N, M)
    to_each_other = torch.cdist(x, x).clamp_min(1e-12) ** alpha  # (..., N, N)
    fidelity = to_targets.mean((-1, -2))
    # A sample's distance to itself, 0 but for the clamp, does not count: N (N - 1), not N^2.
    diversity = to_each_other.sum((-1, -2)) / (N * (N - 1))
    return fidelity, diversity


def energy_score(samples, targets, alpha=1.0):
    """The energy score of a sampler at observed targets, to be *maximised*.  (paper, section 3)
    samples (N, ..., l), targets (M, ..., l) -> (...), unbiased; N >= 2, 0 < alpha < 2.
    """
    # For many points `cdist` uses |x|^2 + |y|^2 - 2 x·y. Far from the origin these are large, and
    # rounding would swamp small distances. So shift all points: the targets' mean to the origin.
    centre = targets.mean(0)
    x = (samples - centre).movedim(0, -2)  # (..., N, l)
    y = (targets - centre).movedim(0, -2)  # (..., M, l)
    fidelity, diversity = fidelity_and_diversity(x, y, alpha)
    return diversity - 2 * fidelity


def energy_loss(samples, mean, log_std, n_targets=100, alpha=1.0, generator=None):
    """Minus the energy score, averaged over positions; targets are draws from the posterior.
    samples (N, ..., l), mean and log_std (..., l) -> loss, fidelity, diversity: scalars, with
    loss = 2 · fidelity - diversity. A perfect head has fidelity = diversity, on average over texts.

    M = 1 would be unbiased, too; more targets lessen the noise. To save time, all positions share
    M vectors of noise: on average the loss is the same.
    """
    samples, mean, log_std = samples.float(), mean.float(), log_std.float()
    shape = (n_targets, mean.shape[-1])  # (M, l)
    noise = torch.randn(shape, device=mean.device, generator=generator)
    # Centred, as in energy_score: y = mean + std * noise, less the mean.
    x = (samples - mean).movedim(0, -2)  # (..., N, l)
    y = log_std.exp().unsqueeze(-2) * noise  # (..., M, l)
    fidelity, diversity = fidelity_and_diversity(x, y, alpha)
    fidelity, diversity = fidelity.mean(), diversity.mean()
    return 2 * fidelity - diversity, fidelity, diversity


# ------ The head


class HeadBlock(nn.Module):
    """x + down(SiLU(gate) · up), where (gate, up) = MLP([LayerNorm(x), c]): x (..., d) is what the
    noise has become, c (..., d) what the hidden state says.  (released: `MLPBlock`)
    """

    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(2 * d, d), nn.SiLU(), nn.Linear(d, d), nn.SiLU(), nn.Linear(d, 2 * d)
        )
        self.down = nn.Linear(d, d)

    def forward(self, x, c):
        both = torch.cat([self.norm(x), c], dim=-1)  # (..., 2·d)
        gate, up = self.mlp(both).chunk(2, dim=-1)  # (..., d) each
        return x + self.down(F.silu(gate) * up)


class EnergyHead(nn.Module):
    """One forward pass is one draw of a vector. (paper, section 3; released: `MLPGenerator`)"""

    def __init__(self, hidden_size, latent_size, noise_size=64, n_blocks=4):
        super().__init__()
        d = hidden_size
        self.noise_size = noise_size
        self.noise_in = nn.Linear(noise_size, d)
        self.noise_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.hidden_in = nn.Linear(d, d)
        self.hidden_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.blocks = nn.ModuleList(HeadBlock(d) for _ in range(n_blocks))
        self.final_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.final = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, latent_size))
        # std 1/sqrt(fan-in): see `init_by_width` in autoencoder.py.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        # As released, the last map starts at 0: all draws are 0. After a step, noise parts them.
        nn.init.zeros_(self.final[-1].weight)

    def forward(self, hidden, noise):
        """hidden (..., d), noise (n, ..., noise_size) -> (n, ..., l). noise may lack n."""
        x = self.noise_norm(self.noise_in(noise))  # (n, ..., d)
        c = self.hidden_norm(self.hidden_in(hidden))  # (..., d)
        c = c.expand_as(x)  # (n, ..., d): n draws share one hidden state
        for block in self.blocks:
            x = block(x, c)
        return self.final(self.final_norm(x))

    def sample(self, hidden, n, generator=None):
        """n independent draws for each hidden state: (..., d) -> (n, ..., l)."""
        shape = (n, *hidden.shape[:-1], self.noise_size)
        noise = torch.rand(shape, generator=generator, device=hidden.device, dtype=hidden.dtype)
        return self(hidden, noise - 0.5)  # uniform in [-1/2, 1/2), as released
