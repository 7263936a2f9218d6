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
    """The published CALM-M. With Llama 3's 128 256 tokens and one for padding it has 372 M trained
    parameters, the head and the input embedding among them (the paper says 371 M), and 76 M frozen
    ones. The paper's discrete Transformer-S is TransformerLM(CALMConfig(V, 1, hidden_size=768,
    intermediate_size=2048, n_layers=12, n_heads=16)), with 281 M.
    """

    vocab_size: int
    chunk_size: int = 4  # K; 1 for the discrete Transformer
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


# ------ The backbone


class KVCache:
    """The keys and values of the steps so far. With it, a new step costs one step and not a pass
    over the whole history. Reducing `length` discards the most recent steps.
    """

    def __init__(self):
        self.length = 0  # steps so far: `Backbone` counts them
        self.keys = {}  # layer number -> (B, H, steps, d/H)
        self.values = {}

    def append(self, layer, k, v):
        """Keys and values of new steps, (B, H, new, d/H) -> those of all steps."""
        if self.length > 0:  # of what is stored, the first `length` steps count
            k = torch.cat([self.keys[layer][:, :, : self.length], k], dim=2)
            v = torch.cat([self.values[layer][:, :, : self.length], v], dim=2)
        self.keys[layer] = k
        self.values[layer] = v
        return k, v


def rotate(x, positions):
    """Rotary position embedding: x (B, H, steps, size), positions (steps,) -> like x.

    Attention alone does not know the order of its inputs. So queries and keys are turned, by an
    angle that grows with the position. Coordinates j and j + half of x are a point in a plane,
    which is turned by position · theta^(-j / half): fast for small j, slowly for large. Turning q
    and k by the same angle does not change q·k, so only the difference of their positions counts.
    """
    half = x.shape[-1] // 2
    j = torch.arange(half, device=x.device)
    angles = positions[:, None] * ROPE_THETA ** (-j / half)  # (steps, half)
    cos = angles.cos().to(x.dtype)
    sin = angles.sin().to(x.dtype)
    first, second = x.split(half, dim=-1)  # (B, H, steps, half) each
    # (first, second) times the matrix that turns a plane: [[cos, -sin], [sin, cos]].
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention: (B, steps, d) -> (B, steps, d)."""

    def __init__(self, config):
        super().__init__()
        d = config.hidden_size
        self.H = config.n_heads
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)

    def forward(self, x, positions, cache, layer):
        B, steps, d = x.shape
        # Each of the H heads has its own d/H coordinates.
        heads = (B, steps, self.H, d // self.H)
        q = rotate(self.query(x).view(heads).transpose(1, 2), positions)  # (B, H, steps, d/H)
        k = rotate(self.key(x).view(heads).transpose(1, 2), positions)  # (B, H, steps, d/H)
        v = self.value(x).view(heads).transpose(1, 2)  # (B, H, steps, d/H)
        if cache is not None:  # in generation: the new steps look back at all before them
            k, v = cache.append(layer, k, v)  # (B, H, all steps, d/H)
        # The mask hides from each step the steps after it. A single new step is the last, and may
        # see all.
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
    """A Transformer like LLaMA's: (B, steps, d) -> (B, steps, d). A step is a chunk or a token.
    With a cache that holds steps already, x is the one step after them.
    """

    def __init__(self, config):
        super().__init__()
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)

    def forward(self, x, cache=None):
        steps = x.shape[1]
        begin = 0
        if cache is not None:
            begin = cache.length
        # With several new steps, `is_causal` would hide from them the steps in the cache.
        assert begin == 0 or steps == 1, "after a filled cache, take one step at a time"
        positions = torch.arange(begin, begin + steps, device=x.device)
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, cache, layer)
        if cache is not None:
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
        self.apply(init_by_width)  # the head, below, does this itself
        self.head = EnergyHead(d, config.latent_size, config.noise_size, config.n_head_blocks)
        # The autoencoder is trained before, and then frozen: the targets must not move. (Training
        # mode changes its `forward` alone, which is not called here.)
        self.autoencoder = autoencoder.requires_grad_(False)

    def compress(self, tokens):
        """(B, T) -> (B, L, d): the K embeddings of each chunk become one input of the backbone."""
        # The input is the chunk's tokens rather than its vector. In generation they are decoded
        # from a predicted vector, so that its error is not carried into the next step.
        chunks = tokens.unflatten(1, (-1, self.config.chunk_size))  # (B, L, K)
        x = self.embedding(chunks).flatten(-2)  # (B, L, K·d)
        return self.compression(x)

    def hidden_states(self, tokens, cache=None):
        """(B, T) -> (B, L, d): the state at chunk i has seen chunks 0 … i and predicts i+1."""
        return self.backbone(self.compress(tokens), cache)

    def forward(self, tokens):
        """tokens (B, T) -> loss, metrics: scalars. Every chunk but the first is a target."""
        c = self.config
        # After each chunk but the last: the hidden state, and N draws of the next vector.
        hidden = self.hidden_states(tokens[:, : -c.chunk_size])  # (B, L-1, d)
        samples = self.head.sample(hidden, c.n_samples)  # (N, B, L-1, l)
        # The target: the posterior that the frozen encoder gives for the text's own next chunk.
        chunks = tokens.unflatten(1, (-1, c.chunk_size))  # (B, L, K)
        with torch.no_grad():
            mean, log_std = self.autoencoder.encode(chunks[:, 1:])  # (B, L-1, l) each
        loss, fidelity, diversity = energy_loss(samples, mean, log_std, c.n_targets, c.alpha)
        # Fidelity above diversity: the draws miss the data, or spread too little. Where the two are
        # equal, the loss equals them, and lower is better.
        metrics = {"fidelity": fidelity.detach(), "diversity": diversity.detach()}
        if not self.training:
            # One draw at each of 512 positions is enough for a mean.
            metrics["confidence"] = self.confidence(samples[0].flatten(0, 1)[:512])
        return loss, metrics

    @torch.no_grad()
    def confidence(self, latents):
        """How confident is the decoder about drawn vectors? (n, l) -> the mean probability of the
        most probable chunk: near 1 at the vectors of real chunks, and lower between them.
        """
        best = self.autoencoder.decode(latents).softmax(-1).amax(-1)  # (n, K)
        return best.prod(-1).mean()  # given z, the decoder's K distributions are independent

    @torch.no_grad()
    def draw_chunks(self, hidden, n, generator=None):
        """n draws of the next chunk: hidden (..., d) -> (n, ..., K) int. The vector is random; each
        token is the most probable one for it (paper, section 3).
        """
        latents = self.head.sample(hidden, n, generator)  # (n, ..., l)
        # We decode 512 vectors at a time: their logits, with Llama 3's vocabulary, take 1 GB.
        tokens = []
        for part in latents.flatten(0, -2).split(512):
            tokens.append(self.autoencoder.decode(part).argmax(-1))  # (up to 512, K)
        return torch.cat(tokens).view(*latents.shape[:-1], -1)


# ------ The discrete Transformer, for comparison


class TransformerLM(nn.Module):
    """A language model on the same backbone. Its methods are CALM's with K = 1."""

    def __init__(self, config):
        super().__init__()
        assert config.chunk_size == 1, "the discrete Transformer takes one token in a step"
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
# The usual score, perplexity, is exp of the mean of -log P(token). It needs the probability of the
# text, which CALM does not have. The Brier score needs samples only. For a prediction P and the
# outcome y it is 2 P(y) - sum_x P(x)^2. Let y come from Q. The score's mean is
#
#     sum_x (2 P(x) Q(x) - P(x)^2) = sum_x Q(x)^2 - sum_x (P(x) - Q(x))^2,
#
# largest at P = Q and only there: it is strictly proper. Both terms can be estimated from draws,
# since P(y) is how often a draw equals y, and sum_x P(x)^2 how often two draws are equal.
#
# The outcome of Brier-n is the next n tokens, all of them together. BrierLM is the geometric mean
# of Brier-1 to Brier-4: if one of them is 0, so is BrierLM.


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
    if n_chunks == 1:  # K >= 4: a chunk has all that BrierLM asks for, and this is all there is
        hidden = model.hidden_states(tokens)  # (B, L, d)
        return model.draw_chunks(hidden[:, at], n), target

    # K < 4: a draw of 4 tokens takes several steps. We read n copies of the text, one for each
    # draw, and keep their cache. At each i we cut the cache back to the chunks 0 … i of the text,
    # and append the drawn chunks. What is cut off is lost, so we go from the last i to the first.
    cache = KVCache()
    hidden = model.hidden_states(tokens.repeat(n, 1), cache)  # (n·B, L, d)
    drawn = []
    for i in reversed(at):
        cache.length = i + 1
        chunks = [model.draw_chunks(hidden[:, i], 1)[0]]  # (n·B, K)
        while len(chunks) < n_chunks:
            h = model.hidden_states(chunks[-1], cache)[:, 0]  # (n·B, d)
            chunks.append(model.draw_chunks(h, 1)[0])
        drawn.append(torch.cat(chunks, dim=-1).view(n, B, -1))  # (n, B, C)
    return torch.stack(drawn[::-1], dim=2), target


@torch.no_grad()
def evaluate_brier(model, tokens, context, batch_size=16, n_samples=4):
    """Brier-1 … 4 and BrierLM of a CALM or a TransformerLM on a text, tokens (T,) int: a dict of
    "brier": [4], "brier_lm", "brier_lm_se" (its standard error), "context", "positions".

    The text is cut into sequences of `context` tokens. In each, all chunks but the first are
    predicted. If K < 4 it is up to 8 · K of them, evenly spaced, because a prediction then takes
    4 / K steps, each with a long cache. "positions" counts all predictions.
    """
    K = model.config.chunk_size
    device = next(model.parameters()).device
    n_places = context // K - math.ceil(4 / K)  # 4 tokens or more must follow
    assert n_places > 0 and len(tokens) >= context, "the text or the context is too short"
    every = 1
    if K < 4:
        every = math.ceil(n_places / (8 * K))
    at = list(range(every // 2, n_places, every))  # the middle of each stretch

    # Score all sequences. Every pair of the draws for a place gives one estimate.
    sequences = tokens[: len(tokens) // context * context].view(-1, context)
    scores = []
    for batch in sequences.split(batch_size):
        drawn, target = draw_continuations(model, batch.to(device), at, n_samples)
        pairs = [brier_score(x1, x2, target) for x1, x2 in itertools.combinations(drawn, 2)]
        scores.append(torch.stack(pairs).mean((0, 2)).cpu())  # (pairs, B, A, 4) -> (B, 4)
    scores = torch.cat(scores)

    # How much would another text of this length change the score? The bootstrap draws as many
    # sequences from ours, with replacement, a thousand times, and looks at how the scores vary.
    again = torch.randint(len(scores), (1000, len(scores)))
    briers = scores[again].mean(1)  # (1000, 4)
    error = torch.tensor([brier_lm(brier) for brier in briers]).std().item()
    if len(scores) == 1:  # one sequence does not show how sequences vary
        error = math.nan
    brier = scores.mean(0)  # (4,)
    result = {"brier": brier.tolist(), "brier_lm": brier_lm(brier), "brier_lm_se": error}
    return result | {"context": context, "positions": len(scores) * len(at)}
