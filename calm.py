"""CALM: a Transformer that predicts the next *vector*, and a score that needs nothing but samples.

    chunk i --embed, compress--> input --Transformer--> h --energy head--> z --decoder--> chunk i+1

Letters: those of autoencoder.py, H attention heads, n samples.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from autoencoder import NORM_EPS, SwiGLU, init_by_width
from energy_head import EnergyHead, energy_loss

ROPE_THETA = 10_000.0  # base of the rotary position embedding, as in the released models


@dataclass
class CALMConfig:
    """The published CALM-M (371 M parameters with Llama 3's vocabulary)."""
    vocab_size: int
    chunk_size: int = 4  # K
    latent_size: int = 128  # l
    hidden_size: int = 1024  # d
    intermediate_size: int = 2752  # inner width of SwiGLU
    n_layers: int = 16
    n_heads: int = 16
    noise_size: int = 64  # of the energy head
    n_head_blocks: int = 4
    n_samples: int = 8  # N, draws of the head for a position
    n_targets: int = 100  # M, draws of the posterior for a position
    alpha: float = 1.0  # exponent of the distances in the loss
    context: int = 8192  # tokens in a sequence: 2048 steps


@dataclass
class TransformerConfig:
    """The paper's discrete Transformer-S (281 M parameters, Llama 3's tokens)."""
    vocab_size: int
    hidden_size: int = 768
    intermediate_size: int = 2048
    n_layers: int = 12
    n_heads: int = 16
    context: int = 2048
    chunk_size = 1  # not a field: a step is always one token


# ------ The backbone


class KVCache:
    """Keys and values of the steps taken. A lower `length` makes it forget the last ones."""

    def __init__(self):
        self.length = 0  # steps taken: `Backbone` counts them
        self.keys, self.values = {}, {}  # layer number -> (B, H, steps, d/H)

    def append(self, layer, k, v):
        """Keys and values of new steps, (B, H, new, d/H) -> of all steps."""
        if self.length > 0:  # of what is there, keep the first `length` steps
            k = torch.cat([self.keys[layer][:, :, : self.length], k], dim=2)
            v = torch.cat([self.values[layer][:, :, : self.length], v], dim=2)
        self.keys[layer], self.values[layer] = k, v
        return k, v


def rotate(x, positions):
    """Rotary position embedding: coordinates j and j + half of x (B, H, steps, size) are a point in
    a plane, and turn by the angle position · theta^(-j / half). If q and k turn by the same angle,
    q·k stays the same. So q·k depends only on the difference of their positions.
    """
    half = x.shape[-1] // 2
    j = torch.arange(half, device=x.device)
    angles = positions[:, None] * ROPE_THETA ** (-j / half)  # (steps, half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.split(half, dim=-1)  # (B, H, steps, half) each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention: (B, steps, d) -> (B, steps, d)."""

    def __init__(self, config):
        super().__init__()
        d, self.H = config.hidden_size, config.n_heads
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x, positions, cache, layer):
        B, steps, d = x.shape
        q = self.query(x).view(B, steps, self.H, d // self.H).transpose(1, 2)  # (B, H, steps, d/H)
        k = self.key(x).view(B, steps, self.H, d // self.H).transpose(1, 2)  # (B, H, steps, d/H)
        v = self.value(x).view(B, steps, self.H, d // self.H).transpose(1, 2)  # (B, H, steps, d/H)
        q = rotate(q, positions)
        k = rotate(k, positions)
        k, v = cache.append(layer, k, v)  # (B, H, all steps, d/H)
        # A single new step sees all before it: it needs no mask.
        x = F.scaled_dot_product_attention(q, k, v, is_causal=steps > 1)  # (B, H, steps, d/H)
        return self.out(x.transpose(1, 2).reshape(B, steps, d))


class TransformerBlock(nn.Module):
    """x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)): (B, steps, d) -> (B, steps, d)."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x, positions, cache, layer):
        x = x + self.attention(self.attention_norm(x), positions, cache, layer)
        return x + self.mlp(self.mlp_norm(x))


class Backbone(nn.Module):
    """(B, steps, d) -> (B, steps, d). A step is a chunk or a token. If the cache holds steps
    already, only one can be added at a time.
    """

    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)

    def forward(self, x, cache=None):
        cache = cache or KVCache()
        steps = x.shape[1]
        positions = torch.arange(cache.length, cache.length + steps, device=x.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, cache, layer)
        cache.length += steps
        return self.norm(x)


# ------ CALM


class CALM(nn.Module):
    """A Transformer that predicts vectors.  (paper, section 3; released: `EnergyTransformer`)"""

    def __init__(self, config, autoencoder):
        super().__init__()
        self.config = config
        d, K = config.hidden_size, config.chunk_size
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.compression = nn.Sequential(
            nn.Linear(K * d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d), nn.LayerNorm(d, eps=NORM_EPS)
        )
        self.backbone = Backbone(config)
        self.apply(init_by_width)  # not for the head and the autoencoder, below
        self.head = EnergyHead(d, config.latent_size, config.noise_size, config.n_head_blocks)
        self.autoencoder = autoencoder.requires_grad_(False)  # the target stands still

    def compress(self, tokens):
        """(B, T) -> (B, L, d): the K embeddings of each chunk made one, the backbone's input."""
        # Tokens, not vectors: so the error of a generated vector is not fed back.
        chunks = tokens.unflatten(1, (-1, self.config.chunk_size))  # (B, L, K)
        x = self.embedding(chunks).flatten(-2)  # (B, L, K·d)
        return self.compression(x)

    def hidden_states(self, tokens, cache=None):
        """(B, T) -> (B, L, d): the state at chunk i has seen chunks 0 … i and predicts i+1."""
        return self.backbone(self.compress(tokens), cache)

    def forward(self, tokens):
        """tokens (B, T) -> loss, metrics: scalars. Every chunk but the first is a target."""
        c = self.config
        # N draws of the vector after each chunk but the last.
        hidden = self.hidden_states(tokens[:, : -c.chunk_size])  # (B, L-1, d)
        samples = self.head.sample(hidden, c.n_samples)  # (N, B, L-1, l)
        # The targets: the frozen encoder's posterior of the text's own next chunk, undamaged.
        chunks = tokens.unflatten(1, (-1, c.chunk_size))  # (B, L, K)
        with torch.no_grad():
            mean, log_std = self.autoencoder.encode(chunks[:, 1:])  # (B, L-1, l)
        loss, fidelity, diversity = energy_loss(samples, mean, log_std, c.n_targets, c.alpha)
        metrics = {"fidelity": fidelity.detach(), "diversity": diversity.detach()}
        if not self.training:  # how sure is the decoder of what it reads in a draw?
            z = samples[0].detach().flatten(0, 1)[:512]  # (up to 512, l)
            best = self.autoencoder.decode(z).softmax(-1).amax(-1)  # (up to 512, K)
            metrics["confidence"] = best.prod(-1).mean()
        return loss, metrics

    @torch.no_grad()
    def draw_chunks(self, hidden, n, generator=None):
        """n draws of the next chunk: hidden (..., d) -> (n, ..., K) int. The vector is random; each
        token is the most probable one for it (paper, section 3).
        """
        latents = self.head.sample(hidden, n, generator)  # (n, ..., l)
        parts = latents.flatten(0, -2).split(512)  # logits of 512 chunks of Llama 3 take 1 GB
        tokens = torch.cat([self.autoencoder.decode(part).argmax(-1) for part in parts])
        return tokens.view(*latents.shape[:-1], -1)


# ------ The discrete Transformer, for comparison


class TransformerLM(nn.Module):
    """A language model on the same backbone. Its methods are CALM's with K = 1."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone = Backbone(config)
        self.unembedding = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(init_by_width)

    def hidden_states(self, tokens, cache=None):
        """(B, T) -> (B, T, d)."""
        return self.backbone(self.embedding(tokens), cache)

    def forward(self, tokens):
        """tokens (B, T) -> loss (cross-entropy, nats per token), metrics (none)."""
        logits = self.unembedding(self.hidden_states(tokens[:, :-1])).float()  # (B, T-1, V)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), {}

    @torch.no_grad()
    def draw_chunks(self, hidden, n, generator=None, temperature=1.0):
        """n draws of the next token: hidden (B, ..., d) -> (n, B, ..., 1) int."""
        logits = self.unembedding(hidden).float() / temperature  # (..., V)
        P = logits.softmax(-1).flatten(0, -2)  # (rows, V)
        draws = P.multinomial(n, replacement=True, generator=generator)  # (rows, n)
        return draws.T.reshape(n, *hidden.shape[:-1], 1)


# ------ BrierLM  (paper, section 4)
#
# The Brier score of a prediction P for the outcome y is 2 P(y) - sum_x P(x)^2. For y ~ Q its mean
# is sum_x (2 P Q - P^2) = sum_x (Q^2 - (P - Q)^2), largest at P = Q. Draws estimate both: P(y)
# is how often a draw is y, and sum_x P(x)^2 how often two draws are equal. The outcome of Brier-n
# is the next n tokens, all together.


def prefix_matches(first, second):
    """Do the first n tokens agree, n = 1 … 4?  (..., C) each -> (..., min(C, 4)), 1.0 or 0.0."""
    return (first == second)[..., :4].float().cumprod(-1)  # 0 from the first difference on


def brier_score(first, second, target):
    """The unbiased estimate of Brier-n, n = 1 … min(C, 4), from independent samples first, second
    and the text's target, C tokens each: (..., C) int -> (..., min(C, 4)).
    """
    hits = prefix_matches(first, target) + prefix_matches(second, target)
    return hits - prefix_matches(first, second)


def brier_lm(brier):
    """BrierLM = 100 · (Brier-1 · Brier-2 · Brier-3 · Brier-4)^(1/4): four numbers -> float."""
    # Each factor is floored at 0: two negative ones have a positive product.
    factors = [max(float(b), 0.0) for b in brier]
    return 100 * math.prod(factors) ** (1 / 4)


def draw_continuations(model, tokens, at, n):
    """After each chunk i of the list `at`: n draws of the next 4 tokens or more (whole chunks), and
    the text's own. tokens (B, T) -> (n, B, A, C), (B, A, C), with A = len(at), C >= 4.
    """
    B, K = len(tokens), model.config.chunk_size
    n_chunks = math.ceil(4 / K)
    target = torch.stack([tokens[:, (i + 1) * K : (i + 1 + n_chunks) * K] for i in at], dim=1)
    if n_chunks == 1:
        hidden = model.hidden_states(tokens)  # (B, L, d)
        return model.draw_chunks(hidden[:, at], n), target

    # For K < 4 this takes several steps. The cache forgets what is after chunk i, and takes drawn
    # chunks instead. What is before i stays the text's: so go from the last i to the first.
    cache = KVCache()
    hidden = model.hidden_states(tokens.repeat(n, 1), cache)  # (n·B, L, d)
    drawn = []
    for i in reversed(at):
        cache.length = i + 1
        h, chunks = hidden[:, i], []
        for _ in range(n_chunks):
            chunk = model.draw_chunks(h, 1)[0]  # (n·B, K)
            chunks.append(chunk)
            h = model.hidden_states(chunk, cache)[:, 0]  # (n·B, d)
        drawn.append(torch.cat(chunks, dim=-1).view(n, B, -1))
    return torch.stack(drawn[::-1], dim=2), target


@torch.no_grad()
def evaluate_brier(model, tokens, context, batch_size=16, places=None, n_samples=4):
    """Brier-1 … 4 and BrierLM of a CALM or a TransformerLM on a text, tokens (T,) int: a dict of
    "brier": [4], "brier_lm", "brier_lm_se" (its standard error), "context", "positions".

    Of each `context` tokens, up to `places` chunks, evenly spaced, are predicted: by default all,
    or 8 · K if K < 4, to save time. "positions" is the number of all predictions. A ValueError
    says what is too small to be scored.
    """
    K = model.config.chunk_size
    device = next(model.parameters()).device
    n_places = context // K - math.ceil(4 / K)  # 4 tokens or more must follow
    if n_places < 1:
        raise ValueError(f"a context of {context} tokens is too short to be scored")
    if len(tokens) < context:
        raise ValueError(f"{len(tokens)} tokens are fewer than one context of {context}")
    if n_samples < 2 or (places is not None and places < 1):
        raise ValueError("a score needs at least 2 samples and 1 place")
    if places is None:
        places = n_places if K >= 4 else 8 * K
    every = math.ceil(n_places / places)
    at = list(range(every // 2, n_places, every))
    sequences = tokens[: len(tokens) // context * context].view(-1, context)
    scores = []
    for batch in sequences.split(batch_size):
        drawn, target = draw_continuations(model, batch.to(device), at, n_samples)
        # Each pair gives an estimate.
        pairs = [brier_score(x1, x2, target) for x1, x2 in itertools.combinations(drawn, 2)]
        scores.append(torch.stack(pairs).mean((0, 2)).cpu())  # (pairs, B, A, 4) -> (B, 4)
    scores = torch.cat(scores)

    # The bootstrap: draw sequences again, with replacement. How do scores vary?
    again = torch.randint(len(scores), (1000, len(scores)))
    briers = scores[again].mean(1)  # (1000, 4)
    resampled = torch.tensor([brier_lm(brier) for brier in briers])
    brier, error = scores.mean(0), resampled.std().item()
    if len(scores) == 1:  # one sequence does not show how sequences vary
        error = math.nan
    result = {"brier": brier.tolist(), "brier_lm": brier_lm(brier), "brier_lm_se": error}
    return result | {"context": context, "positions": len(scores) * len(at)}
