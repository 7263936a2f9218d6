"""
CALM: a Transformer that predicts the next *vector*, and the score that judges it by its samples alone.

    tokens of chunk i  --embed, compress-->  one input  --Transformer-->  h_i  --energy head-->  z of chunk i+1
                                                                                    |
                                             tokens of chunk i+1  <--frozen autoencoder's decoder--

A sequence of T tokens is L = T/K steps long. The file has five parts: the backbone (an ordinary LLaMA-style Transformer with
a key/value cache), CALM itself, the discrete Transformer it is compared with, and for the comparison the Brier score of
their predictions (BrierLM) and the arithmetic that they cost.

Letters: those of autoencoder.py (B, T, L, K, V, d, l, ...), H attention heads, n samples.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from autoencoder import NORM_EPS, AutoencoderConfig, InputError, SwiGLU, init_by_width
from energy_head import EnergyHead, energy_loss


@dataclass
class CALMConfig:
    """The published CALM-M (371 M parameters), except for the vocabulary."""

    vocab_size: int
    chunk_size: int = 4  # K
    latent_size: int = 128  # l
    hidden_size: int = 1024  # d
    intermediate_size: int = 2752  # inner width of SwiGLU
    n_layers: int = 16
    n_heads: int = 16
    noise_size: int = 64  # of the energy head
    n_head_blocks: int = 4
    n_samples: int = 8  # N, samples of the head for one position in the loss
    n_targets: int = 100  # M, draws from the target's posterior in the loss
    alpha: float = 1.0  # exponent of the distances in the loss
    context: int = 8192  # tokens in a training sequence: 2048 steps
    rope_theta: float = 10_000.0

    def __post_init__(self):
        if not 0 < self.alpha < 2:
            raise InputError(f"alpha must lie strictly between 0 and 2, not {self.alpha}.")
        check_sizes(self)
        if self.n_samples < 2:
            raise InputError("n_samples must be at least 2: the energy score compares samples with each other.")


@dataclass
class TransformerConfig:
    """The discrete model that the paper compares with: its Transformer-S (281 M parameters), except for the vocabulary."""

    vocab_size: int
    hidden_size: int = 768
    intermediate_size: int = 2048
    n_layers: int = 12
    n_heads: int = 12
    context: int = 2048
    rope_theta: float = 10_000.0
    chunk_size = 1  # no field: a step is always one token

    def __post_init__(self):
        check_sizes(self)


def check_sizes(config):
    """Raises InputError, saying what to change, for sizes that cannot be."""
    for name, value in vars(config).items():
        limit = 1000 if name.endswith(("layers", "blocks")) else 2**31
        if name != "alpha" and not 1 <= value < limit:
            raise InputError(f"{name} must be at least 1, and no more than a computer can hold, not {value}.")
    if config.hidden_size % (2 * config.n_heads):
        raise InputError(f"hidden_size {config.hidden_size} must be a multiple of twice n_heads ({config.n_heads}).")
    if config.context % config.chunk_size or config.context < 2 * config.chunk_size:
        near = max(2, config.context // config.chunk_size) * config.chunk_size
        raise InputError(f"context {config.context} is not a multiple of chunk_size {config.chunk_size} with two chunks or more: try {near}.")


# ----------------------------------------------------------------------------------------------------------------------
# The backbone


class KVCache:
    """
    The keys and values of the steps already taken, so that the next step need not compute them again: for each layer
    (B, H, capacity, d/H), of which the first `length` steps count. To go back in time, set `length` to something smaller.
    """

    def __init__(self):
        self.length = 0
        self.layers = {}  # layer number -> (keys, values)

    def append(self, layer, keys, values):
        """Stores keys and values (B, H, new, d/H) after the first `length` steps; returns those of all, (B, H, length + new, d/H)."""
        end = self.length + keys.shape[2]
        if layer not in self.layers:
            self.layers[layer] = (keys, values)
        elif end > self.layers[layer][0].shape[2]:
            room = torch.zeros_like(self.layers[layer][0][:, :, :1]).expand(-1, -1, end, -1)  # at least doubles: growth is rare
            self.layers[layer] = tuple(torch.cat([old, room], dim=2) for old in self.layers[layer])
        for stored, new in zip(self.layers[layer], (keys, values)):
            stored[:, :, self.length : end] = new
        return tuple(stored[:, :, :end] for stored in self.layers[layer])

    def repeat(self, n):
        """n copies of the whole batch, one behind the other: B becomes n · B."""
        self.layers = {i: (k.repeat(n, 1, 1, 1), v.repeat(n, 1, 1, 1)) for i, (k, v) in self.layers.items()}


def rotation(positions, size, theta):
    """cos and sin of the angles position · theta^(-j / half), j < half = size / 2: positions (steps,) -> (steps, half) each."""
    half = size // 2
    frequencies = theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """
    Rotary position embedding (RoPE): turn each pair of coordinates (j, j + half) of x (B, H, steps, size) by its angle, so
    that dot products depend on *differences* of positions: cos, sin (steps, size / 2) -> the shape of x. Half-split pairs, as
    in the released code, not neighbours.
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """
    Self-attention with RoPE, without biases: x (B, steps, d) -> (B, steps, d). turn: (cos, sin) of `rotation`; visible:
    (steps, all steps) bool, or None for causal; cache: a KVCache or None; layer: its number there.
    """

    def __init__(self, config):
        super().__init__()
        d, self.n_heads = config.hidden_size, config.n_heads
        self.query, self.key, self.value, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x, turn, visible, cache, layer):
        # (B, steps, d) -> (B, H, steps, d/H) each
        q, k, v = (f(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
        return self.out(x.transpose(1, 2).flatten(-2))


class TransformerBlock(nn.Module):
    """x + Attention(RMSNorm(x)), then x + SwiGLU(RMSNorm(x)): (B, steps, d) -> (B, steps, d)."""

    def __init__(self, config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x, *attention_arguments):
        x = x + self.attention(self.attention_norm(x), *attention_arguments)
        return x + self.mlp(self.mlp_norm(x))


class Backbone(nn.Module):
    """
    The Transformer between inputs and hidden states: (B, steps, d) -> (B, steps, d). It need not know what a step is. Given
    a cache, it continues after the steps in it. Causal, unless both positions (steps,) and visible (steps, steps in the cache
    + steps), bool, say otherwise. Released code: its `transformer`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=NORM_EPS)

    def forward(self, x, cache=None, positions=None, visible=None):
        past, steps = (0 if cache is None else cache.length), x.shape[1]
        if positions is None:
            positions = torch.arange(past, past + steps, device=x.device)
            if past:  # the new steps see all of the past, and of each other what is not in their future
                visible = torch.ones(steps, past + steps, dtype=torch.bool, device=x.device).tril(past)
        turn = rotation(positions, self.config.hidden_size // self.config.n_heads, self.config.rope_theta)
        for layer, block in enumerate(self.blocks):
            x = block(x, turn, visible, cache, layer)
        if cache is not None:
            cache.length += steps
        return self.norm(x)


# ----------------------------------------------------------------------------------------------------------------------
# CALM


class CALM(nn.Module):
    """
    The continuous autoregressive language model (paper, section 3; released code: `EnergyTransformer`).
    The autoencoder is frozen, so that the target stands still.
    """

    def __init__(self, config, autoencoder):
        super().__init__()
        for name in ("vocab_size", "chunk_size", "latent_size"):
            ours, theirs = getattr(config, name), getattr(autoencoder.config, name)
            if ours != theirs:
                raise InputError(f"the language model has {name} {ours}, but its autoencoder has {theirs}: they must agree.")
        self.config = config
        d, K = config.hidden_size, config.chunk_size
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.compression = nn.Sequential(nn.Linear(K * d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d), nn.LayerNorm(d, eps=NORM_EPS))
        self.backbone = Backbone(config)
        self.apply(init_by_width)  # before the head and the autoencoder, which have starts of their own
        self.head = EnergyHead(d, config.latent_size, config.noise_size, config.n_head_blocks)
        self.autoencoder = autoencoder.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder, autoencoder=None):
        """
        The model in a folder of the released layout. Its autoencoder is the folder's own frozen copy, unless another is given
        (a module or a folder). Raises InputError, naming what is wrong, for any other folder.
        """
        from classroom.released import load_calm

        return load_calm(folder, autoencoder)

    def train(self, mode=True):
        """As for every module, but the frozen autoencoder stays in evaluation mode: its targets are undamaged."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def chunks(self, tokens):
        """(B, T) -> (B, L, K). T must be a multiple of K."""
        K = self.config.chunk_size
        if tokens.shape[-1] % K:
            raise ValueError(f"{tokens.shape[-1]} tokens are not a whole number of chunks of {K}")
        return tokens.unflatten(-1, (-1, K))

    def compress(self, tokens):
        """
        The inputs of the backbone, the K embeddings of each chunk squeezed into one: (B, T) -> (B, L, d).

        Inputs are made of *tokens*, not of latents: a generated vector is decoded first, so that its small errors do not pile
        up from step to step (latents as inputs were worse; paper, section 3).
        """
        return self.compression(self.embedding(self.chunks(tokens)).flatten(-2))

    def hidden_states(self, tokens, cache=None, positions=None, visible=None):
        """(B, T) -> (B, L, d). The state at chunk i has seen chunks 0 to i and predicts chunk i+1. The rest: see `Backbone`."""
        return self.backbone(self.compress(tokens), cache, positions, visible)

    def forward(self, tokens):
        """
        tokens (B, T)  ->  loss (a scalar), metrics (floats: fidelity, diversity).
        Chunk 0 has no history and is only read. The targets of the others are the autoencoder's posteriors.
        """
        c = self.config
        hidden = self.hidden_states(tokens[:, : -c.chunk_size])  # (B, L-1, d)
        samples = self.head.sample(hidden, c.n_samples)  # (N, B, L-1, l)
        with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):  # targets as they were trained: in float32
            mean, log_std = self.autoencoder.encode(self.chunks(tokens)[:, 1:])  # (B, L-1, l)
        loss, fidelity, diversity = energy_loss(samples, mean, log_std, c.n_targets, c.alpha)
        return loss, {"fidelity": fidelity.item(), "diversity": diversity.item()}

    @torch.no_grad()
    def draw_chunks(self, hidden, n, generator=None):
        """
        n independent draws of the next chunk for each hidden state: (..., d) -> (n, ..., K) int.
        All the randomness is in the latent; each token is the decoder's most probable one for it (paper, section 3).
        """
        return self.autoencoder.decode_tokens(self.head.sample(hidden, n, generator=generator))


# ----------------------------------------------------------------------------------------------------------------------
# The discrete Transformer, for comparison


def draw_categorical(P, n, generator=None):
    """n independent draws from each distribution: P (..., V) -> (n, ...) int."""
    draws = P.reshape(-1, P.shape[-1]).multinomial(n, replacement=True, generator=generator)  # (rows, n)
    return draws.T.reshape(n, *P.shape[:-1])


class TransformerLM(nn.Module):
    """
    The ordinary language model on the same backbone: one token a step, a softmax over the vocabulary, cross-entropy. Its
    methods have the names and shapes of CALM's with K = 1, so whatever draws from CALM can draw from it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.backbone = Backbone(config)
        self.unembedding = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(init_by_width)

    def hidden_states(self, tokens, cache=None, positions=None, visible=None):
        """(B, T) -> (B, T, d). The state at token i has seen tokens 0 to i and predicts token i+1. The rest: see `Backbone`."""
        return self.backbone(self.embedding(tokens), cache, positions, visible)

    def log_likelihood(self, tokens):
        """(B, T) -> (B, T-1): log P(token i | the tokens before it), in nats, from the second token on."""
        logits = self.unembedding(self.hidden_states(tokens[:, :-1]))
        return -F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten().long(), reduction="none").view(len(tokens), -1)

    def forward(self, tokens):
        """tokens (B, T)  ->  loss (the cross-entropy, nats per token), metrics (empty: the loss says it all)."""
        return -self.log_likelihood(tokens).mean(), {}

    @torch.no_grad()
    def draw_chunks(self, hidden, n, generator=None, temperature=1.0):
        """n independent draws of the next token: (..., d) -> (n, ..., 1) int. With logits, any temperature > 0 is a division."""
        return draw_categorical((self.unembedding(hidden).float() / temperature).softmax(-1), n, generator).unsqueeze(-1)


# ----------------------------------------------------------------------------------------------------------------------
# BrierLM
#
# The Brier score of a prediction P for the outcome y is 2 P(y) - sum_x P(x)^2: for y ~ Q, sum Q^2 - sum (P - Q)^2 on average,
# which is largest at P = Q.
# Samples estimate both terms without bias: P(y) is how often one hits y, and sum_x P(x)^2 how often two of them collide.
# The outcome of Brier-n is the next n tokens, all of which must agree.                                 (paper, section 4)


def prefix_matches(first, second):
    """Do the first n tokens agree, for each n up to 4?  (..., K) and (..., K) -> (..., min(K, 4)), 1.0 or 0.0."""
    return (first == second)[..., :4].long().cumprod(-1).float()  # 1 until the first difference, 0 from there on


def brier_score(first, second, target):
    """
    The unbiased two-sample estimate  1{x1 = y} + 1{x2 = y} - 1{x1 = x2}  of Brier-n for n = 1 … min(K, 4):
    first and second (independent samples) and target, each (..., K) int  ->  (..., min(K, 4)) float.
    """
    return prefix_matches(first, target) + prefix_matches(second, target) - prefix_matches(first, second)


def brier_score_pairs(samples, target):
    """
    The same estimate from all n (n-1) / 2 pairs of n >= 2 samples: unbiased as well, and the less noisy the larger n is.
    samples (n, ..., K) int, target (..., K) int  ->  (..., min(K, 4)) float.
    """
    scores = [brier_score(first, second, target) for first, second in itertools.combinations(samples, 2)]
    return sum(scores) / len(scores)


def brier_lm(brier):
    """
    BrierLM = 100 · (Brier-1 · Brier-2 · Brier-3 · Brier-4)^(1/4): four numbers (a tensor or a sequence) -> float.
    Each factor is floored at 0. The released code floors their *product*, which two or four
    negative estimates make positive: a model that has learnt nothing then has a score.
    """
    factors = [max(float(b), 0.0) for b in brier]
    return 100 * math.prod(factors) ** (1 / len(factors))


def grow_branches(model, tokens, n, n_chunks, at, generator=None):
    """
    Continues a text by n_chunks chunks, n times, after each of the chunks `at` (positions,): tokens (B, T). Yields, for each
    of the n_chunks, the hidden states it is drawn from, (n or 1, B, positions, d), and the draws, (n, B, positions, K).

    All positions at once: the text is a stem, the continuation after chunk i a branch that sees chunks 0 … i of the stem and
    its own chunks, and no other branch. Round j feeds the newest chunk of every branch side by side, as `positions` steps of
    one sequence, in which branch i's has position i + j.
    """
    B = len(tokens)
    cache = KVCache() if n_chunks > 1 else None
    hidden = model.hidden_states(tokens, cache)  # the stem
    visible = torch.arange(hidden.shape[1], device=at.device) <= at[:, None]  # (positions, L): branch i sees the stem up to i
    hidden = hidden[:, at]
    chunk = model.draw_chunks(hidden, n, generator=generator)
    yield hidden.unsqueeze(0), chunk
    if n_chunks > 1:
        cache.repeat(n)
    for j in range(1, n_chunks):
        # The new columns: each branch sees its own chunk. A round's chunks, (n, B, positions, K), are n · B sequences of tokens.
        visible = torch.cat([visible, torch.eye(len(at), dtype=torch.bool, device=at.device)], dim=1)
        hidden = model.hidden_states(chunk.reshape(n * B, -1), cache, at + j, visible).unflatten(0, (n, B))
        chunk = model.draw_chunks(hidden, 1, generator=generator)[0]
        yield hidden, chunk


def draw_continuations(model, tokens, at, n, generator=None):
    """
    n continuations of at least 4 tokens after the chunks `at` of a text, and the text's own: tokens (B, T), at (positions,)
    ->  (n, B, positions, >= 4), (B, positions, >= 4). For K < 4 several chunks are generated, each from its own history.
    """
    K, n_chunks = model.config.chunk_size, math.ceil(4 / model.config.chunk_size)
    drawn = torch.cat([chunk for _, chunk in grow_branches(model, tokens, n, n_chunks, at, generator)], dim=-1)
    return drawn, tokens[:, K:].unfold(1, n_chunks * K, K)[:, at]  # window i: the n_chunks · K tokens after chunk i


def brier_by_likelihoods(model, tokens, at, generator=None):
    """
    Brier-1 … 4 of a TransformerLM after the tokens `at`: (B, T), (positions,) -> (B, positions, 4). Its likelihoods say P(y)
    exactly. The sum over all n-grams x is too long, but its last factor is exact too, and one sampled path, on which the
    probabilities are known, estimates the rest without bias:
        sum_x P(x)^2  =  E over x ~ P of   P(x_1 … x_{n-1}) · sum_v P(v | x_1 … x_{n-1})^2 .
    """
    hits = model.log_likelihood(tokens).unfold(1, 4, 1)[:, at].cumsum(-1).exp()  # P(the next n tokens), n = 1 … 4
    collisions, path = [], torch.ones(len(tokens), len(at), device=tokens.device)
    for hidden, chunk in grow_branches(model, tokens, 1, 4, at, generator):
        P = model.unembedding(hidden[0]).float().softmax(-1)  # [0]: of the one path
        collisions.append(path * P.square().sum(-1))
        path = path * P.take_along_dim(chunk[0], -1).squeeze(-1)
    return 2 * hits - torch.stack(collisions, dim=-1)


@torch.no_grad()
def evaluate_brier(model, tokens, context, batch_size=16, n_samples=4, positions=None, generator=None):
    """
    Brier-1 … 4 and BrierLM of a CALM or a TransformerLM on a text, with standard errors and with the protocol, which is part
    of the score: in an independent reproduction another length of context changed it by 30 %.

    tokens (T,) int are cut into sequences of `context` tokens (a multiple of K; a rest is left out), and each chunk is
    predicted from the sequence before it (CALM: `n_samples` times, 2 or more); `positions`: no more than that many chunks of
    a sequence, at random places, the same in a batch. `generator`: on the model's device. Returns {"brier": [4], "brier_se":
    [4], "brier_lm", "brier_lm_se", "context", "positions"}; Brier-n are at most 1 in expectation, BrierLM at most 100, standard
    errors NaN for a single sequence. Raises InputError for a text shorter than one context.
    """
    K = model.config.chunk_size
    if context % K or context < K + 4:
        raise InputError(f"the context of an evaluation must be a multiple of chunk_size {K} and at least {K + 4}, not {context}.")
    if n_samples < 2 or (positions is not None and positions < 1):
        raise InputError("an evaluation needs 2 samples and 1 position at least.")
    if len(tokens) < context:
        raise InputError(f"the text to evaluate has {len(tokens)} tokens, less than one context of {context}.")
    device = next(model.parameters()).device
    available = context // K - math.ceil(4 / K)  # chunks with 4 tokens or more after them
    scores = []  # (4,) for each sequence: sequences are nearly independent pieces of text, the tokens in one are not
    for batch in tokens[: len(tokens) // context * context].view(-1, context).split(batch_size):
        at = torch.randperm(available, generator=generator, device=device)[:positions].sort().values
        if isinstance(model, TransformerLM):
            score = brier_by_likelihoods(model, batch.to(device), at, generator)
        else:
            score = brier_score_pairs(*draw_continuations(model, batch.to(device), at, n_samples, generator))
        scores.append(score.mean(1).cpu())
    scores = torch.cat(scores)

    # The bootstrap: how much do the figures move when the sequences are drawn again, from themselves, with replacement?
    draws = torch.randint(len(scores), (1000, len(scores)), generator=torch.Generator().manual_seed(0))
    resampled = scores[draws].mean(1)  # (1000, 4)
    resampled_lm = torch.tensor([brier_lm(b) for b in resampled])
    known = 1.0 if len(scores) > 1 else math.nan  # one sequence says nothing of how much sequences differ
    return {
        "brier": scores.mean(0).tolist(), "brier_se": (known * resampled.std(0)).tolist(),
        "brier_lm": brier_lm(scores.mean(0)), "brier_lm_se": known * resampled_lm.std().item(),
        "context": context, "positions": len(scores) * len(at),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Compute


def flops_per_token(config, autoencoder=None, draws=1):
    """
    (training, inference): floating-point operations per token of the model with that config: an AutoencoderConfig, a
    TransformerConfig, or a CALMConfig with its AutoencoderConfig. Matrix products alone, as is usual; a multiply-add counts 2.

    Training costs 3 forward passes except where noted, the backward pass being twice as long, in sequences of config.context
    tokens. Inference is one step at the end of such a sequence, its chunk chosen from `draws` draws. Masked attention counts too.
    """
    c, K, d = config, config.chunk_size, config.hidden_size
    if isinstance(c, AutoencoderConfig):
        encoder, decoder = autoencoder_flops(c)
        return 3 * (encoder + decoder) / K, (encoder + decoder) / K
    steps = c.context // K - 1  # with something to predict
    if isinstance(c, TransformerConfig):
        forward = backbone_flops(c) + 2 * d * c.vocab_size
        return 3 * forward * steps / c.context, forward
    encoder, decoder = autoencoder_flops(autoencoder)
    l, M, N = c.latent_size, c.n_targets, c.n_samples
    once = 4 * (K + 1) * d * d + backbone_flops(c) + 2 * (1 + c.n_head_blocks) * d * d  # compression, Transformer, what h gives the head
    noise_in = 2 * c.noise_size * d
    draw = noise_in + (10 * c.n_head_blocks + 2) * d * d + 2 * d * l  # what each draw adds
    loss = 2 * M * l + 2 * 2 * N * M * l + 3 * 2 * N * N * l  # norms of targets (no gradient), distances to them, between samples
    training = 3 * (once + N * draw) - N * noise_in + loss + encoder  # no gradient for the noise, or in the encoder
    return training * steps / c.context, (once + draws * (draw + decoder)) / K


def backbone_flops(c):
    """Floating-point operations per step of a forward pass: projections, attention to a full context, SwiGLU."""
    return c.n_layers * (8 * c.hidden_size**2 + 4 * (c.context // c.chunk_size - 1) * c.hidden_size + 6 * c.hidden_size * c.intermediate_size)


def autoencoder_flops(c):
    """(encoder, decoder): floating-point operations per chunk of a forward pass, from an AutoencoderConfig."""
    K, d, l = c.chunk_size, c.hidden_size, c.latent_size
    block = 6 * d * c.intermediate_size * (K + 1) // 2  # half of the blocks see the K tokens apart, half the chunk
    encoder = c.n_encoder_layers * block + 2 * K * d * d + 4 * d * l
    return encoder, c.n_decoder_layers * block + 2 * l * d + 2 * K * d * d + 2 * K * d * c.vocab_size
