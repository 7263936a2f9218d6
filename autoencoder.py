"""
The autoencoder: K tokens into one vector, and back.                                  (CALM paper, section 2)

A language model usually takes one step for one token. CALM takes one step for a *chunk* of K tokens, and for that it
needs a vector that stands for a chunk: small, exact (the K tokens come back), and *robust* (a slightly wrong vector still
comes back as the same K tokens, because the vectors that the language model predicts are always slightly wrong).

    tokens (K)  --encode-->  posterior N(mean, std^2) over R^l  --sample z-->  z (l)  --decode-->  logits (K, V)

Exactness is easy. Robustness is what the four regularisers below are for: the posterior's noise with a KL penalty, the
floor of that penalty in each dimension, the dropout of latent coordinates, and DropToken.

Letters used for dimensions, here and in the other files:
    B  batch                T  tokens in a sequence    L  chunks in a sequence, T / K    K  tokens in a chunk
    V  vocabulary           d  width of a network      l  size of the latent vector      ... any leading dimensions
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

NORM_EPS = 1e-6  # of every RMSNorm and LayerNorm, as in the released code


class InputError(Exception):
    """A mistake that the person at the keyboard can mend, told in one sentence: the scripts print it and exit with status 2."""


@dataclass
class AutoencoderConfig:
    """The published autoencoder, except for the vocabulary. `kl_floor` is the paper's lambda, `kl_weight` its beta."""

    vocab_size: int
    chunk_size: int = 4  # K
    latent_size: int = 128  # l
    hidden_size: int = 512  # d
    intermediate_size: int = 1280  # inner width of SwiGLU
    n_encoder_layers: int = 2  # half of them before the squeeze, half after
    n_decoder_layers: int = 2  # half of them before the expansion, half after
    dropout: float = 0.15  # of input tokens (DropToken) and of latent coordinates
    kl_floor: float = 0.5
    kl_weight: float = 1e-3

    def __post_init__(self):
        for name in ("vocab_size", "chunk_size", "latent_size", "hidden_size", "intermediate_size"):
            if not 1 <= getattr(self, name) < 2**31:
                raise InputError(f"{name} must be at least 1, and no more than a computer can hold, not {getattr(self, name)}.")
        for name in ("n_encoder_layers", "n_decoder_layers"):
            if not 0 <= getattr(self, name) < 1000 or getattr(self, name) % 2:
                raise InputError(f"{name} must be even, half on either side of the squeeze, not {getattr(self, name)}.")


def kl_divergence(mean, log_std, floor=0.0):
    """
    KL( N(mean, std^2) || N(0, I) ), each dimension's share raised to at least `floor`, summed over the dimensions:
    mean, log_std (..., l)  ->  (...), in nats.

    The floor ("KL clipping", paper section 2) is applied to each dimension *before* the sum: below it nothing pulls a
    dimension further onto the prior N(0, 1), on which it would say nothing of its chunk. With a floor under the sum, single
    dimensions could still get there.
    """
    per_dimension = 0.5 * (mean.square() + torch.exp(2 * log_std) - 1 - 2 * log_std)
    return per_dimension.clamp_min(floor).sum(-1)


def init_by_width(module):
    """
    For `module.apply`: linear maps start with weights of std 1/sqrt(fan-in), which keeps the size of what passes through at
    *any* width; embeddings start with std 1, the size of a normalised activation.

    The released code has std 0.02 throughout, near 1/sqrt(fan-in) for its widths of 1024 and more. At a classroom's width of
    128 that is four times too small: signals fade from layer to layer, and training begins with a long plateau.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=1.0)


class SwiGLU(nn.Module):
    """A gated MLP, as in LLaMA: down(SiLU(gate(x)) * up(x)), without biases: (..., d) -> (..., d)."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ResidualBlock(nn.Module):
    """x + SwiGLU(RMSNorm(x)): (..., d) -> (..., d). It sees one position at a time: the autoencoder has no attention."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Autoencoder(nn.Module):
    """
    The chunk autoencoder (paper, section 2; released code: `Autoencoder`). Each chunk is coded on
    its own: attention between chunks helped reconstruction, but hurt the language model built on it (the paper's finding).
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        d, K, l, inner = config.hidden_size, config.chunk_size, config.latent_size, config.intermediate_size
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.encoder_blocks = nn.ModuleList(ResidualBlock(d, inner) for _ in range(config.n_encoder_layers))
        self.squeeze = nn.Linear(K * d, d)
        self.encoder_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.to_posterior = nn.Linear(d, 2 * l)
        self.from_latent = nn.Linear(l, d)
        self.decoder_blocks = nn.ModuleList(ResidualBlock(d, inner) for _ in range(config.n_decoder_layers))
        self.expand = nn.Linear(d, K * d)
        self.decoder_norm = nn.RMSNorm(d, eps=NORM_EPS)

        self.apply(init_by_width)
        # The embedding is also the un-embedding (tied), a linear map of fan-in d: with std 1 the first logits would have std
        # sqrt(d), and the first loss would be several times log V.
        nn.init.normal_(self.embedding.weight, std=d**-0.5)

    @classmethod
    def from_pretrained(cls, folder):
        """The autoencoder in a folder of the released layout. Raises InputError, naming what is wrong, for any other folder."""
        from classroom.released import load_autoencoder

        return load_autoencoder(folder)

    def encode(self, tokens):
        """tokens (..., K) int  ->  mean, log_std of the posterior over z, each (..., l)."""
        x = self.embedding(tokens)  # (..., K, d)
        half = len(self.encoder_blocks) // 2
        for block in self.encoder_blocks[:half]:
            x = block(x)
        x = self.squeeze(x.flatten(-2))  # (..., K·d) -> (..., d): the only place where the K tokens meet
        for block in self.encoder_blocks[half:]:
            x = block(x)
        return self.to_posterior(self.encoder_norm(x)).chunk(2, dim=-1)  # mean, log_std

    def decode(self, latent):
        """latent (..., l)  ->  logits (..., K, V), one distribution for each of the K tokens."""
        x = self.from_latent(latent)  # (..., d)
        half = len(self.decoder_blocks) // 2
        for block in self.decoder_blocks[:half]:
            x = block(x)
        x = self.expand(x).unflatten(-1, (self.config.chunk_size, -1))  # (..., K, d)
        for block in self.decoder_blocks[half:]:
            x = block(x)
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def decode_tokens(self, latent, max_logits=2**24):
        """
        latent (..., l)  ->  the most probable token at each place, (..., K) int.
        Decoded in slices of at most `max_logits` logits: for a pool of 200 draws over 128 k words there would be 100 M at once.
        """
        rows = latent.reshape(-1, latent.shape[-1])
        n = max(1, max_logits // (self.config.chunk_size * self.config.vocab_size))
        return torch.cat([self.decode(part).argmax(-1) for part in rows.split(n)]).view(*latent.shape[:-1], -1)

    def forward(self, tokens):
        """
        tokens (..., K) int  ->  loss (a scalar, nats per chunk), metrics (floats: reconstruction, kl, accuracy).

            loss = K · CE(decoder(damaged z), tokens) + beta · KL       (paper, section 2; CE is a mean over tokens)

        In training mode the encoder is shown a damaged chunk and the decoder a damaged latent; the *targets* stay whole:
        - DropToken: each input token becomes id 0 (a token like others, there is no mask) with probability `dropout`, so a
          chunk's vector must also say what its tokens are likely to be, given each other: similar chunks move together;
        - z = mean + std · noise: the decoder must be right in a whole neighbourhood;
        - dropout of latent coordinates: no token may hang on one coordinate.
        In evaluation mode nothing is damaged and z is the posterior's mean.
        """
        c, inputs = self.config, tokens
        if self.training:
            inputs = tokens.masked_fill(torch.rand(tokens.shape, device=tokens.device) < c.dropout, 0)
        mean, log_std = self.encode(inputs)
        latent = mean
        if self.training:
            latent = F.dropout(mean + log_std.exp() * torch.randn_like(mean), c.dropout)
        logits = self.decode(latent)  # (..., K, V)

        reconstruction = c.chunk_size * F.cross_entropy(logits.flatten(0, -2), tokens.flatten())
        kl = kl_divergence(mean, log_std, c.kl_floor).mean()
        loss = reconstruction + c.kl_weight * kl
        accuracy = (logits.argmax(-1) == tokens).float().mean()
        return loss, {"reconstruction": reconstruction.item(), "kl": kl.item(), "accuracy": accuracy.item()}

    @torch.no_grad()
    def accuracy(self, tokens, noise=0.0, generator=None):
        """
        tokens (..., K) int -> a float, the share of them that come back when Gaussian noise of standard deviation `noise` is
        added to the posterior's mean. The paper's test of robustness has noise = 0.3.
        """
        mean, _ = self.encode(tokens)
        epsilon = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return (self.decode_tokens(mean + noise * epsilon) == tokens).float().mean().item()
