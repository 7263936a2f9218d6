"""The autoencoder: K tokens become one vector, and back.  (CALM paper, section 2)

    a *chunk*, K tokens --encode--> posterior N(mean, std^2) --draw--> z --decode--> logits (K, V)

The vector z has to meet two demands. It must be exact, so that the decoder recovers all K tokens.
It must also be robust, because a language model never predicts it perfectly: vectors close to z
have to decode to the same tokens. A plain autoencoder meets the first demand only, and between the
vectors of two chunks its decoder may say anything.

So this is a *variational* autoencoder. Its encoder does not name a point but a small cloud, a
Gaussian with a mean and a std for each of l coordinates. It is called the *posterior*, what one
knows of z after seeing the chunk; the *prior*, what one knows before, is N(0, 1) for each. (Nobody
draws from this prior here: the Transformer will know better.) In training the decoder sees a random
point of the cloud, and learns to be right everywhere in it.

Letters used for dimensions, here and in the other files:
    B  batch                T  tokens in a sequence    L  chunks in a sequence, T / K
    K  tokens in a chunk    V  vocabulary              l  size of the latent vector z
    d  width of a network                              ... any leading dimensions
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# RMSNorm divides a vector by the root of its mean square; LayerNorm subtracts the mean first. Both
# add this under the root, as released, since the square may be 0.
NORM_EPS = 1e-6


@dataclass
class AutoencoderConfig:
    """The published autoencoder. `kl_floor` is the paper's lambda, `kl_weight` its beta."""

    vocab_size: int
    chunk_size: int = 4  # K
    latent_size: int = 128  # l
    hidden_size: int = 512  # d
    intermediate_size: int = 1280  # inner width of SwiGLU, below
    n_encoder_layers: int = 2  # half for tokens, then half for chunks
    n_decoder_layers: int = 2  # half for chunks, then half for tokens
    dropout: float = 0.15  # of input tokens and of coordinates of z
    kl_floor: float = 0.5
    kl_weight: float = 1e-3


def kl_divergence(mean, log_std, floor=0.0):
    """KL( N(mean, std^2) || N(0, I) ), nats: mean, log_std (..., l) -> (...).

    KL(p || q) is the mean of log p(z) - log q(z) over z ~ p: 0 if p = q, and positive otherwise.
    For a coordinate of our two Gaussians, log p - log q = z^2/2 - (z - mean)^2/(2 std^2) - log std.
    Over z ~ p the mean of z^2 is mean^2 + std^2, and that of (z - mean)^2 is std^2: so KL is the
    line below. (A nat is the unit of natural logarithms. The encoder gives log std, since any
    number may be a logarithm.)

    The reconstruction loss alone would let the encoder escape from its own noise: it could move the
    means far apart, or shrink the std to 0. This term makes both expensive. But a coordinate at
    N(0, 1), where the term is 0, says nothing about its chunk. "KL clipping" (paper, section 2)
    prevents such a collapse: below `floor` a coordinate counts as `floor`, a constant without a
    gradient, so nothing pulls it further.
    """
    per_dimension = 0.5 * (mean**2 + torch.exp(2 * log_std) - 1 - 2 * log_std)  # (..., l)
    return per_dimension.clamp_min(floor).sum(-1)


def init_by_width(module):
    """Initial weights: for a linear map std 1/sqrt(fan-in), for an embedding std 1.

    An output of a map is a sum over its inputs, fan-in of them. For inputs of variance 1 the terms
    have variance 1/fan-in and random signs, so their sum has variance 1: a signal keeps its size in
    a network of any width. The released code has std 0.02 everywhere, which is 1/sqrt(2500): right
    for a width of 2500, and far too small for narrow networks.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=1.0)


class SwiGLU(nn.Module):
    """A gated MLP: (..., d) -> (..., d). SiLU(g) = g · sigmoid(g) is near 0 for a negative gate g,
    and near g for a positive one: so the gate blocks each coordinate of `up`, or scales it.
    """

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ResidualBlock(nn.Module):
    """x + SwiGLU(RMSNorm(x)): (..., d) -> (..., d). There is no attention. The authors tried it:
    the autoencoder's loss was lower, but CALM learnt less, perhaps because the vectors were harder
    to predict (https://github.com/shaochenze/calm/issues/5).
    """

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Autoencoder(nn.Module):
    """Codes each chunk on its own.  (paper, section 2; released: `Autoencoder`)"""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        d, K, inner = c.hidden_size, c.chunk_size, c.intermediate_size
        # The encoder: blocks for single tokens, a map that joins K of them, blocks for the chunk.
        self.embedding = nn.Embedding(c.vocab_size, d)
        self.encoder_blocks = nn.Sequential()
        for _ in range(c.n_encoder_layers):
            self.encoder_blocks.append(ResidualBlock(d, inner))
        self.squeeze = nn.Linear(K * d, d)
        self.encoder_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.to_posterior = nn.Linear(d, 2 * c.latent_size)
        # The decoder is its mirror.
        self.from_latent = nn.Linear(c.latent_size, d)
        self.decoder_blocks = nn.Sequential()
        for _ in range(c.n_decoder_layers):
            self.decoder_blocks.append(ResidualBlock(d, inner))
        self.expand = nn.Linear(d, K * d)
        self.decoder_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.apply(init_by_width)
        # The embedding is used twice ("tied"): as rows to look up here, and in `decode` as the map
        # to the logits. There std 1/sqrt(d), as for any map, gives logits of size 1. (The small
        # rows do no harm: a block norms what it reads, and what it adds has size 1.)
        nn.init.normal_(self.embedding.weight, std=d**-0.5)

    def encode(self, tokens):
        """tokens (..., K) int -> mean, log_std of the posterior of z, each (..., l)."""
        half = len(self.encoder_blocks) // 2
        x = self.embedding(tokens)  # (..., K, d)
        x = self.encoder_blocks[:half](x)
        x = self.squeeze(x.flatten(-2))  # (..., d): here the K tokens meet
        x = self.encoder_blocks[half:](x)
        x = self.to_posterior(self.encoder_norm(x))  # (..., 2·l)
        return x.split(self.config.latent_size, dim=-1)  # mean, log_std

    def decode(self, latent):
        """latent (..., l) -> logits (..., K, V)."""
        half = len(self.decoder_blocks) // 2
        x = self.from_latent(latent)  # (..., d)
        x = self.decoder_blocks[:half](x)
        x = self.expand(x).unflatten(-1, (self.config.chunk_size, -1))  # (..., K, d)
        x = self.decoder_blocks[half:](x)
        return F.linear(self.decoder_norm(x), self.embedding.weight)  # (..., K, V)

    def forward(self, tokens):
        """tokens (..., L·K) int -> loss (nats per chunk), metrics: scalars.  (paper, section 2)
        loss = K · CE(decoder(z), tokens) + beta · KL

        In training, three kinds of damage make the vectors robust: lost input tokens, the draw from
        the posterior, and lost coordinates of z. In evaluation the loss is of undamaged vectors.
        """
        c = self.config
        tokens = tokens.unflatten(-1, (-1, c.chunk_size))  # (..., L, K)
        inputs = tokens
        if self.training:
            # "DropToken": some tokens become id 0, and must be guessed from the others in the
            # chunk. Id 0 is a real token, too; among bytes it is one that no text has.
            lost = torch.rand(tokens.shape, device=tokens.device) < c.dropout
            inputs = tokens.masked_fill(lost, 0)
        mean, log_std = self.encode(inputs)  # (..., L, l) each
        z = mean
        if self.training:
            # A draw from N(mean, std^2), written as a function of mean and std, and of noise that
            # does not depend on them. So the gradient passes through z to the encoder.
            z = mean + log_std.exp() * torch.randn_like(mean)
            # What dropout leaves is divided by 0.85, so that the mean of z stays the same.
            z = F.dropout(z, c.dropout)
        logits = self.decode(z).float()  # (..., L, K, V)
        # `cross_entropy` is a mean over tokens. K times that is the loss of a chunk.
        reconstruction = c.chunk_size * F.cross_entropy(logits.flatten(0, -2), tokens.flatten())
        kl = kl_divergence(mean.float(), log_std.float(), c.kl_floor).mean()
        metrics = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        if not self.training:  # not in training: it would read all logits once more at every step
            metrics["accuracy"] = (logits.argmax(-1) == tokens).float().mean()
            # The paper's test of robustness is the accuracy with noise of size 0.3 on z, coordinate
            # by coordinate. In training the noise is smaller: the posteriors had a std of 0.15
            # after a run of the preset `quick`. The means of different chunks had a std of 1.4, so
            # there is room for both.
            noisy = self.decode(mean + 0.3 * torch.randn_like(mean))
            metrics["accuracy_noise_0.3"] = (noisy.argmax(-1) == tokens).float().mean()
        loss = reconstruction + c.kl_weight * kl
        return loss, metrics
