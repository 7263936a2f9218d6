"""The energy head: a sampler of vectors, and the score that trains it.  (CALM paper, section 3)

CALM assumes no density for its vectors. The energy head is only a *sampler*: it turns a hidden
state and random noise into one vector, by one pass through a network of any form. It cannot say how
probable a vector is. The energy score needs no probabilities: samples tell a good sampler from a
bad one.

    hidden state h, noise u --energy head--> a draw z of the next chunk's vector
    N draws for one h, M draws of the true vector --energy score--> a number to be maximised

Letters: N head samples, M target samples, l latent size, d width, ... any leading dimensions.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from autoencoder import NORM_EPS, init_by_width

# ------ The energy score
#
# A score judges a sampler P by one observed outcome y, here the vector of the text's next chunk:
#
#     S(P, y) = E |x' - x''|^alpha  -  2 E |x - y|^alpha
#
# E is the mean over independent draws x, x' and x'' from P; y is given. All are vectors, and |.| is
# the length of one. The paper has alpha = 1.
#
# Let the outcomes y come from Q, the distribution of what really follows. We want the mean of S to
# be largest if P = Q, and only then: such a score is *strictly proper*, and whoever maximises it
# learns Q. The energy score is, for 0 < alpha < 2. To see why, look at the "energy distance"
#
#     D(P, Q) = 2 E |x - y|^alpha - E |x' - x''|^alpha - E |y' - y''|^alpha,
#
# where y' and y'' are draws from Q like y. The mean of S is -D - E |y' - y''|^alpha, and P cannot
# change the last term. So we ask whether D is 0 at P = Q, and positive everywhere else.
#
# Take alpha = 1 and numbers on a line. Then |x - y| is the length of the interval of all t between
# x and y: the integral, over all t, of 1 if t lies between them, and 0 if not. So E |x - y| is the
# integral of the probability that t lies between them. Let F(t) be the probability that x <= t, and
# G(t) that of y <= t. Then t lies between x and y with probability F (1 - G) + G (1 - F), between
# x' and x'' with 2 F (1 - F), and between y' and y'' with 2 G (1 - G). All together:
#
#     D = ∫ 2 F (1 - G) + 2 G (1 - F) - 2 F (1 - F) - 2 G (1 - G) dt = 2 ∫ (F - G)^2 dt.
#
# This is 0 if F = G everywhere, and positive otherwise. In more dimensions, the mean length of the
# projections of x - y on all lines through the origin is proportional to |x - y|, since no
# direction is special. So D is, but for a factor, a mean of such integrals. It is 0 only if P and Q
# look the same from every direction, and then they are equal (the theorem of Cramér and Wold).
#
# The other alpha below 2, our 1/4 too, can be treated with characteristic functions: D is, but for
# a factor, the integral of |p(t) - q(t)|^2 / |t|^(l + alpha), with p and q those of P and Q. (See
# Gneiting and Raftery, "Strictly Proper Scoring Rules, Prediction, and Estimation", 2007, section
# 4.3.) All alpha agree on the best P, and differ on others: a small one punishes small errors more.
#
# For alpha = 2 it fails. Expanding the squares leaves D = 2 |E x - E y|^2, which compares the means
# and nothing else: a sampler that always draws the mean of Q would have the best possible score.
# (The picture `classroom/pictures/energy.png` shows both cases.)


def fidelity_and_diversity(samples, targets, alpha=1.0):
    """The two parts of the energy score, unbiased: E |x - y|^alpha and E |x' - x''|^alpha.
    samples (N, ..., l), targets (M, ..., l) -> (...) each; N >= 2, 0 < alpha < 2. Gradients are
    finite, even where points coincide.

    "Fidelity" is small if the draws lie near the data. Alone it would pull all draws to one point.
    "Diversity" rewards draws that lie apart. At P = Q the two are equal, on average.
    """
    N = len(samples)
    assert N >= 2, "the diversity of a sampler needs at least 2 samples"
    assert 0 < alpha < 2, f"alpha must lie between 0 and 2, not {alpha}"

    # For many points `cdist` is the root of |x|^2 + |y|^2 - 2 x·y. Far from the origin these are
    # large numbers with a small difference, which rounding would spoil. So all points are moved
    # first, until the mean of the targets is the origin. Distances do not change.
    centre = targets.mean(0)  # (..., l)
    x = (samples - centre).movedim(0, -2)  # (..., N, l)
    y = (targets - centre).movedim(0, -2)  # (..., M, l)

    # If alpha < 1, the slope of r^alpha is infinite at r = 0, where two points coincide. That could
    # make gradients nan. (On a CPU, `cdist` turns it into 0 by itself.) Below the clamp it is 0.
    to_targets = torch.cdist(x, y).clamp_min(1e-12) ** alpha  # (..., N, M)
    to_each_other = torch.cdist(x, x).clamp_min(1e-12) ** alpha  # (..., N, N)

    fidelity = to_targets.mean((-1, -2))
    # We leave out the diagonal, the distance of each sample to itself, which is no pair of two
    # independent draws. N (N - 1) pairs remain. Dividing by N^2 would make diversity too small.
    itself = torch.eye(N, dtype=torch.bool, device=x.device)
    diversity = to_each_other.masked_fill(itself, 0).sum((-1, -2)) / (N * (N - 1))
    return fidelity, diversity


def energy_score(samples, targets, alpha=1.0):
    """The energy score of a sampler at observed targets, to be *maximised*.  (paper, section 3)
    samples (N, ..., l), targets (M, ..., l) -> (...), unbiased; N >= 2, 0 < alpha < 2.
    """
    fidelity, diversity = fidelity_and_diversity(samples, targets, alpha)
    return diversity - 2 * fidelity


def energy_loss(samples, mean, log_std, n_targets=100, alpha=1.0, generator=None):
    """Minus the energy score, averaged over positions; targets are draws from the posterior.
    samples (N, ..., l), mean and log_std (..., l) -> loss, fidelity, diversity: scalars, with
    loss = 2 · fidelity - diversity. A perfect head has fidelity = diversity, on average over texts.
    (paper, section 3; released: `EnergyTransformer.energy_score`)

    The decoder reads any likely draw of a posterior as the same chunk, so any of them is a good
    target. What the head should learn, Q, is then a mixture: first a chunk that may follow, then a
    draw from its posterior. A head that had to hit the posteriors' means would spend its effort on
    differences that no decoder sees.
    """
    samples, mean, log_std = samples.float(), mean.float(), log_std.float()
    # M = 1 would be unbiased, too; more targets reduce the variance. To save time, all positions
    # share M vectors of noise. The loss of each position stays unbiased.
    noise_shape = (n_targets, *[1] * (mean.dim() - 1), mean.shape[-1])  # (M, 1, …, 1, l)
    noise = torch.randn(noise_shape, device=mean.device, generator=generator)
    targets = mean + log_std.exp() * noise  # (M, ..., l)
    fidelity, diversity = fidelity_and_diversity(samples, targets, alpha)  # (...) each
    fidelity = fidelity.mean()
    diversity = diversity.mean()
    return 2 * fidelity - diversity, fidelity, diversity


# ------ The head


class HeadBlock(nn.Module):
    """x + down(SiLU(gate) · up), where (gate, up) = MLP([LayerNorm(x), c]): x (..., d) is the noise
    as refined so far; c (..., d) is the projected hidden state. (released: `MLPBlock`)

    It is a SwiGLU whose gate and up come from a small network instead of one matrix each, so that
    in every block noise and hidden state are mixed before they are multiplied.
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
        self.apply(init_by_width)
        # As released, the last map W starts at zero, and so does its bias: all first draws are z =
        # W a = 0. What parts them? The input a of W depends on the noise and differs from draw to
        # draw. Diversity has no gradient yet (below the clamp the slope is 0), but fidelity has: it
        # pulls the draws towards the data. After one step W is no longer zero, the draws W a
        # differ, and diversity begins to push them apart.
        nn.init.zeros_(self.final[-1].weight)

    def forward(self, hidden, noise):
        """hidden (..., d), noise (n, ..., noise_size) -> (n, ..., l). The leading n of `noise` is
        optional.
        """
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
        # Uniform in [-1/2, 1/2), as released. (The head turns it into another distribution.)
        return self(hidden, noise - 0.5)
