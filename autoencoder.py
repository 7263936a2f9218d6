"""The autoencoder: K tokens into one vector, and back.  (CALM paper, section 2)

The vector must be exact: the K tokens come back. And robust: the vectors that a language model
predicts are always a bit wrong.

    a *chunk*, K tokens --encode--> posterior N(mean, std^2) --draw--> z --decode--> logits (K, V)

Letters used for dimensions, here and in the other files:
    B  batch                T  tokens in a sequence    L  chunks in a sequence, T / K
    K  tokens in a chunk    V  vocabulary              l  size of the latent vector z
    d  width of a network                              ... any leading dimensions
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

NORM_EPS = 1e-6  # of every RMSNorm and LayerNorm, as released


@dataclass
class AutoencoderConfig:
    """The published autoencoder. `kl_floor` is the paper's lambda, `kl_weight` its beta."""
    vocab_size: int
    chunk_size: int = 4  # K
    latent_size: int = 128  # l
    hidden_size: int = 512  # d
    intermediate_size: int = 1280  # inner width of SwiGLU
    n_encoder_layers: int = 2  # half for tokens, then half for chunks
    n_decoder_layers: int = 2  # half for chunks, then half for tokens
    dropout: float = 0.15  # of input tokens and of coordinates of z
    kl_floor: float = 0.5
    kl_weight: float = 1e-3


def kl_divergence(mean, log_std, floor=0.0):
    """KL( N(mean, std^2) || N(0, I) ), nats: mean, log_std (..., l) -> (...).
    In a loss, it keeps the means from outgrowing the noise. "KL clipping" (paper, section 2): below
    `floor` a dimension counts as `floor`, a constant: nothing pulls it further to N(0, 1).
    """
    per_dimension = 0.5 * (mean**2 + torch.exp(2 * log_std) - 1 - 2 * log_std)  # (..., l)
    return per_dimension.clamp_min(floor).sum(-1)


def init_by_width(module):
    """Linear maps start with std 1/sqrt(fan-in): they keep a signal's size. Embeddings: std 1.
    The released code has 0.02 for both, which is 1/sqrt(2500): right for a width of 2500.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=1.0)


class SwiGLU(nn.Module):
    """A gated MLP: (..., d) -> (..., d)."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ResidualBlock(nn.Module):
    """x + SwiGLU(RMSNorm(x)): (..., d) -> (..., d). No attention."""

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
        n_encoder, n_decoder = c.n_encoder_layers, c.n_decoder_layers
        self.embedding = nn.Embedding(c.vocab_size, d)
        self.encoder_blocks = nn.Sequential(*[ResidualBlock(d, inner) for _ in range(n_encoder)])
        self.squeeze = nn.Linear(K * d, d)
        self.encoder_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.to_posterior = nn.Linear(d, 2 * c.latent_size)
        self.from_latent = nn.Linear(c.latent_size, d)
        self.decoder_blocks = nn.Sequential(*[ResidualBlock(d, inner) for _ in range(n_decoder)])
        self.expand = nn.Linear(d, K * d)
        self.decoder_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.apply(init_by_width)
        nn.init.normal_(self.embedding.weight, std=d**-0.5)  # logits of size 1

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
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def forward(self, tokens):
        """tokens (..., L·K) int -> loss (nats per chunk), metrics: scalars.  (paper, section 2)
        loss = K · CE(decoder(z), tokens) + beta · KL. In training, tokens and z are damaged.
        """
        c = self.config
        tokens = tokens.unflatten(-1, (-1, c.chunk_size))  # (..., L, K)
        inputs = tokens
        if self.training:  # DropToken: some become id 0, to be guessed from others
            lost = torch.rand(tokens.shape, device=tokens.device) < c.dropout
            inputs = tokens.masked_fill(lost, 0)
        mean, log_std = self.encode(inputs)  # (..., L, l) each
        z = mean
        if self.training:  # the decoder must be right in a whole neighbourhood of the mean
            z = mean + log_std.exp() * torch.randn_like(mean)
            z = F.dropout(z, c.dropout)
        logits = self.decode(z).float()  # (..., L, K, V)
        # Cross-entropy is a mean over tokens: K times that is the loss of a chunk.
        reconstruction = c.chunk_size * F.cross_entropy(logits.flatten(0, -2), tokens.flatten())
        kl = kl_divergence(mean.float(), log_std.float(), c.kl_floor).mean()
        metrics = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        if not self.training:  # not in training: it would read all logits once more at every step
            metrics["accuracy"] = (logits.argmax(-1) == tokens).float().mean()
            # The paper's test of robustness is the accuracy with noise on z.
            noisy = self.decode(mean + 0.3 * torch.randn_like(mean))
            metrics["accuracy_noise_0.3"] = (noisy.argmax(-1) == tokens).float().mean()
        loss = reconstruction + c.kl_weight * kl
        return loss, metrics
