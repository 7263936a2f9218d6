"""The discrete Transformer, its Brier score against enumeration, and the arithmetic of every model against torch's counter."""

import itertools
import math

import pytest
import torch
import torch.nn as nn
from conftest import SEEDS, chi_square_p, tiny_calm
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import Autoencoder, AutoencoderConfig, InputError
from calm import CALM, CALMConfig, TransformerConfig, TransformerLM, brier_by_likelihoods, brier_score_pairs, draw_continuations
from calm import evaluate_brier, flops_per_token
from sample import generate


V = 5


def tiny_transformer(seed=0, context=32):
    torch.manual_seed(seed)
    model = TransformerLM(TransformerConfig(V, 16, 32, 2, 2, context)).eval()
    nn.init.normal_(model.unembedding.weight, std=0.5)
    return model


# The model's likelihoods and draws


def test_tokens_of_either_integer_type_and_a_single_hidden_state():
    model, tokens = tiny_transformer(), torch.randint(V, (2, 9))
    assert torch.equal(model.log_likelihood(tokens), model.log_likelihood(tokens.int()))
    assert model.draw_chunks(torch.randn(16), 7).shape == (7, 1)


def test_an_evaluation_of_nothing_is_refused():
    for wrong in ({"positions": 0}, {"n_samples": 1}):
        with pytest.raises(InputError, match="2 samples and 1 position"):
            evaluate_brier(tiny_transformer(), torch.zeros(40, dtype=torch.long), 12, **wrong)


def test_log_likelihood_is_that_of_one_token_after_the_other():
    model, tokens = tiny_transformer(), torch.randint(V, (2, 9))
    for i in range(1, 9):
        logits = model.unembedding(model.hidden_states(tokens[:, :i])[:, -1])
        expected = logits.log_softmax(-1).gather(1, tokens[:, i : i + 1])[:, 0]
        torch.testing.assert_close(model.log_likelihood(tokens)[:, i - 1], expected)
    assert model(tokens)[0].item() == pytest.approx(-model.log_likelihood(tokens).mean().item())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_the_baseline_is_sampled_at_any_temperature(temperature, seed):
    """H0: two tokens drawn by `generate` have probability prod softmax(logits / T). 3 000 texts; chi-square, p > 1e-4."""
    model = tiny_transformer(seed)
    prompt = torch.tensor([[1, 2, 3]])
    out = generate(model, prompt.expand(3000, 3), 2, temperature)
    assert torch.equal(out[:, :3], prompt.expand(3000, 3))
    expected = torch.zeros(V, V)
    first = (model.unembedding(model.hidden_states(prompt)[0, -1]) / temperature).softmax(-1)
    for v in range(V):
        second = model.unembedding(model.hidden_states(torch.tensor([[1, 2, 3, v]]))[0, -1])
        expected[v] = first[v] * (second / temperature).softmax(-1)
    observed = (out[:, 3] * V + out[:, 4]).bincount(minlength=V * V)
    assert chi_square_p(observed, 3000 * expected.flatten().double()) > 1e-4


# Brier against enumeration


def exact_brier(step, K, tokens, at):
    """
    Brier-1 … 4 after the chunks `at` of a text by enumerating all continuations: (B, T) -> (B, positions, 4).
    step(histories (rows, t)) -> (rows, V^K): the distribution of the next chunk, chunks in lexicographic order.
    """
    chunks = torch.tensor(list(itertools.product(range(V), repeat=K)))
    result = []
    for i in at.tolist():
        begin = (i + 1) * K
        histories, P = tokens[:, :begin], torch.ones(len(tokens), 1)
        for _ in range(math.ceil(4 / K)):
            P = (P.view(-1, 1) * step(histories)).view(len(tokens), -1)
            histories = torch.cat([histories.repeat_interleave(len(chunks), 0), chunks.repeat(len(histories), 1)], dim=1)
        scores = []
        for n in range(1, 5):
            marginal = P.view(len(tokens), V**n, -1).sum(-1)
            y = (tokens[:, begin : begin + n] * V ** torch.arange(n - 1, -1, -1)).sum(-1, keepdim=True)
            scores.append(2 * marginal.gather(1, y)[:, 0] - marginal.square().sum(-1))
        result.append(torch.stack(scores, dim=-1))
    return torch.stack(result, dim=1)


def assert_unbiased(estimates, exact):
    """H0: the mean over sequences of (estimate - exact), (B, positions, 4), is 0: 4.5 standard errors, p < 1e-5."""
    errors = (estimates - exact).mean(1)
    assert (errors.mean(0).abs() < 4.5 * errors.std(0) / math.sqrt(len(errors)) + 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_brier_of_the_baseline_against_enumeration(seed):
    """All 4-grams over 5 tokens, 60 texts; by likelihoods, and by four samples; the former must be much less noisy."""
    model, text = tiny_transformer(seed), torch.randint(V, (60, 12))
    at = torch.tensor([0, 7])
    exact = exact_brier(lambda h: model.unembedding(model.hidden_states(h)[:, -1]).softmax(-1), 1, text, at)
    by_likelihoods = brier_by_likelihoods(model, text, at)
    by_samples = brier_score_pairs(*draw_continuations(model, text, at, 4))
    assert_unbiased(by_likelihoods, exact)
    assert_unbiased(by_samples, exact)
    torch.testing.assert_close(by_likelihoods[..., 0], exact[..., 0], rtol=1e-4, atol=1e-5)  # nothing is sampled for n = 1
    assert (by_likelihoods - exact).var() < 0.2 * (by_samples - exact).var()


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_evaluate_brier_of_the_baseline_within_its_standard_errors(seed):
    """As a whole, over all positions: within 3 standard errors of the exact score of the same text, which is much the closer."""
    model, text = tiny_transformer(seed), torch.randint(V, (40, 10))
    exact = exact_brier(lambda h: model.unembedding(model.hidden_states(h)[:, -1]).softmax(-1), 1, text, torch.arange(6))
    result = evaluate_brier(model, text.flatten(), 10, batch_size=25)
    assert result["positions"] == 240
    for n in range(4):
        assert abs(result["brier"][n] - exact[..., n].mean().item()) < 3 * result["brier_se"][n]


class KnownHead(nn.Module):
    """In place of the energy head: draws one of 40 fixed latents, with probabilities that the hidden state gives."""

    def __init__(self, latents, hidden_size):
        super().__init__()
        self.latents, self.logits = latents, nn.Linear(hidden_size, len(latents))

    def sample(self, hidden, n, generator=None):
        P = self.logits(hidden).softmax(-1)
        drawn = P.view(-1, P.shape[-1]).multinomial(n, replacement=True, generator=generator).T
        return self.latents[drawn].view(n, *hidden.shape[:-1], -1)


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_brier_of_calm_with_a_known_head_against_enumeration(K, seed):
    """The decoder makes a chunk of each latent, so the distribution of chunks is known after every history. 60 texts."""
    model = tiny_calm(K, V, context=24, seed=seed)
    latents = 3 * torch.randn(40, 8)
    model.head = KnownHead(latents, 16)
    ids = (model.autoencoder.decode_tokens(latents) * V ** torch.arange(K - 1, -1, -1)).sum(-1)

    def step(histories):
        P = model.head.logits(model.hidden_states(histories)[:, -1]).softmax(-1)
        return torch.zeros(len(P), V**K).index_add(1, ids, P)

    text, at = torch.randint(V, (60, 16 // K * K)), torch.tensor([0, 2])
    assert_unbiased(brier_score_pairs(*draw_continuations(model, text, at, 4)), exact_brier(step, K, text, at))


def test_some_positions_of_each_sequence_are_enough():
    model = tiny_transformer()
    text = torch.randint(V, (60 * 12,))
    result = evaluate_brier(model, text, 12, batch_size=7, positions=3)
    assert result["positions"] == 180
    every = evaluate_brier(model, text, 12)
    assert all(abs(a - b) < 4 * e for a, b, e in zip(result["brier"], every["brier"], result["brier_se"]))


# Floating-point operations


def counted(model, tokens, backward=True):
    """What torch counts in a step of model(tokens), attention by plain matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = model(tokens)
        if backward:
            loss.backward()
    return counter.get_total_flops()


AUTOENCODERS = [
    AutoencoderConfig(50, 4, 16, 32, 80),
    AutoencoderConfig(300, 2, 8, 48, 96, n_encoder_layers=6, n_decoder_layers=4),
    AutoencoderConfig(20, 8, 64, 64, 128, n_encoder_layers=4, n_decoder_layers=2),
]


@pytest.mark.parametrize("config", AUTOENCODERS)
def test_flops_of_the_autoencoder(config):
    tokens = torch.randint(config.vocab_size, (7, config.chunk_size))
    training, inference = flops_per_token(config)
    assert counted(Autoencoder(config), tokens) / tokens.numel() == pytest.approx(training, rel=1e-9)
    with torch.no_grad():
        assert counted(Autoencoder(config).eval(), tokens, backward=False) / tokens.numel() == pytest.approx(inference, rel=1e-9)


@pytest.mark.parametrize("sizes", [(50, 32, 64, 2, 2, 64), (300, 64, 192, 3, 4, 16), (20, 48, 128, 1, 2, 256)])
def test_flops_of_the_transformer(sizes):
    config = TransformerConfig(*sizes)
    model, tokens = TransformerLM(config), torch.randint(config.vocab_size, (3, config.context))
    training, inference = flops_per_token(config)
    assert counted(model, tokens) / tokens.numel() == pytest.approx(training, rel=1e-9)
    per_step = counted(model, tokens, backward=False) / (3 * (config.context - 1))
    assert per_step == pytest.approx(inference, rel=1e-9)


def test_flops_of_the_published_models():
    """With Llama 3's vocabulary, at their contexts: the paper's inference FLOPs a token, 4.4e8 and 2.9e8."""
    assert flops_per_token(TransformerConfig(128256))[1] == pytest.approx(4.4e8, rel=0.02)
    assert flops_per_token(CALMConfig(128256), AutoencoderConfig(128256))[1] == pytest.approx(2.9e8, rel=0.02)


@pytest.mark.parametrize(
    "autoencoder, sizes",
    list(zip(AUTOENCODERS, [
        dict(hidden_size=32, intermediate_size=64, n_layers=2, n_heads=2, n_head_blocks=1, n_samples=4, n_targets=100, context=64),
        dict(hidden_size=64, intermediate_size=192, n_layers=3, n_heads=4, n_head_blocks=2, n_samples=8, n_targets=30, context=16),
        dict(hidden_size=48, intermediate_size=128, n_layers=1, n_heads=2, n_head_blocks=3, n_samples=2, noise_size=16, context=256),
    ])),
)  # fmt: skip
def test_flops_of_calm(autoencoder, sizes):
    a = autoencoder
    config = CALMConfig(a.vocab_size, a.chunk_size, a.latent_size, **sizes)
    model, tokens = CALM(config, Autoencoder(a)), torch.randint(a.vocab_size, (3, config.context))
    training, inference = flops_per_token(config, a, draws=5)
    assert counted(model, tokens) / tokens.numel() == pytest.approx(training, rel=1e-9)
    history = tokens[:, : -config.chunk_size]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.draw_chunks(model.hidden_states(history), 5)
    assert counter.get_total_flops() / history.numel() == pytest.approx(inference, rel=1e-9)
