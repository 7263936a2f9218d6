import itertools
import math

import pytest
import torch
from conftest import SEEDS, slow_energy_score, tiny_calm

from calm import CALMConfig, KVCache, TransformerLM, brier_lm, brier_score, evaluate_brier
from sample import generate


def tiny_transformer(vocab_size=13):
    model = TransformerLM(CALMConfig(vocab_size, 1, 8, 16, 32, 2, 2, context=32)).eval()
    torch.nn.init.normal_(model.unembedding.weight)  # sure of itself: histories matter
    return model


@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_backbone_is_causal(K):
    model, tokens = tiny_calm(K), torch.randint(13, (2, 32))
    before = model.hidden_states(tokens)
    for place in range(32):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 13
        moved = (model.hidden_states(changed) != before).any(-1)  # (B, L)
        assert not moved[:, : place // K].any(), "a later token moved an earlier state"
        assert moved[:, place // K :].all(), "an earlier token did not move a later state"


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_cache_gives_what_the_full_pass_gives(K):
    model, tokens = tiny_calm(K).double(), torch.randint(13, (2, 32))
    full, cache = model.hidden_states(tokens), KVCache()
    start, *steps = tokens.split([8] + [K] * (24 // K), dim=1)  # two chunks or more, then one each
    states = [model.hidden_states(part, cache) for part in (start, *steps)]
    torch.testing.assert_close(torch.cat(states, dim=1), full)
    assert cache.length == 32 // K
    with pytest.raises(AssertionError, match="one step at a time"):
        model.hidden_states(tokens, cache)
    # Set back, it forgets what lies behind: other tokens take their place.
    cache.length = 16 // K
    other = torch.cat([tokens[:, :16], torch.randint(13, (2, 16))], dim=1)
    states = [model.hidden_states(part, cache) for part in other[:, 16:].split(K, dim=1)]
    torch.testing.assert_close(torch.cat(states, dim=1), model.hidden_states(other)[:, 16 // K :])


@pytest.mark.parametrize("K", [1, 4])
def test_forward_is_the_slow_formula_and_the_autoencoder_gets_no_gradient(K):
    """The state before a chunk predicts it; in training, too, the autoencoder damages nothing."""
    model, tokens, losses = tiny_calm(K).train(), torch.randint(13, (2, 16)), []
    torch.manual_seed(1)
    loss, metrics = model(tokens)
    torch.manual_seed(1)
    noise, targets = torch.rand(4, 2, 16 // K - 1, 4) - 0.5, torch.randn(10, 8)
    for i in range(1, 16 // K):
        hidden = model.hidden_states(tokens[:, : i * K])[:, -1]  # (B, d)
        mean, log_std = model.autoencoder.encode(tokens[:, i * K : (i + 1) * K])  # (B, l) each
        samples = model.head(hidden, noise[:, :, i - 1])  # (N, B, l)
        y = mean + log_std.exp() * targets[:, None]  # (M, B, l)
        losses.append(-slow_energy_score(samples, y, alpha=0.5).mean())
    torch.testing.assert_close(loss.double(), torch.stack(losses).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, 2 * metrics["fidelity"] - metrics["diversity"])
    loss.backward()
    for name, p in model.named_parameters():
        trained = not name.startswith("autoencoder.")
        assert p.requires_grad == (p.grad is not None) == trained, name


@pytest.mark.parametrize("K", [1, 2, 4, 6])
def test_the_two_sample_estimate_is_unbiased(K):
    """The mean over all pairs of chunks, by their probabilities, is 2 P(y) - sum_x P(x)^2."""
    chunks = torch.tensor(list(itertools.product(range(2), repeat=K)))  # in order of their digits
    P, y = torch.rand(2**K).double(), torch.randint(2**K, ())
    P /= P.sum()
    estimates = brier_score(chunks[:, None], chunks[None], chunks[y].expand(2**K, 2**K, K))
    mean = (P[:, None, None] * P[None, :, None] * estimates).sum((0, 1))
    assert mean.shape == (min(K, 4),)
    for n, estimate in enumerate(mean, start=1):
        of_prefix = P.view(2**n, -1).sum(-1)  # the probability of each n-gram
        exact = 2 * of_prefix[y // 2 ** (K - n)] - of_prefix.square().sum()
        torch.testing.assert_close(estimate, exact)


def test_brier_lm_is_the_geometric_mean_with_each_factor_floored():
    assert brier_lm([0.4, 0.2, 0.1, 0.05]) == pytest.approx(100 * (0.4 * 0.2 * 0.1 * 0.05) ** 0.25)
    assert brier_lm([-0.1, -0.1, -0.1, -0.02]) == 0  # their product is positive


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 2, 4, "discrete"])
@pytest.mark.parametrize("seed", SEEDS)
def test_evaluate_brier_is_the_score_of_slow_draws(K, seed):
    """H0: no bias. 4 sequences, 4 places. 12 scores with 30 drawings each against 400 pairs of
    continuations by `generate`: the means agree within 6.8 standard errors (t-test, p < 1e-4).
    """
    model = tiny_transformer(3) if K == "discrete" else tiny_calm(K, vocab_size=3)
    K = model.config.chunk_size
    torch.manual_seed(seed)
    context = 4 * K + max(K, 4)  # chunks 0, 1, 2 and 3 have 4 tokens or more behind them
    text, slow = torch.randint(3, (4, context)), []
    many = text.repeat(30, 1).flatten()
    results = [evaluate_brier(model, many, context, 80) for _ in range(12)]  # 80 and 40 at a time
    assert results[0]["positions"] == 480 and results[0]["context"] == context
    fast = torch.tensor([result["brier"] for result in results])  # (12, 4)
    for begin in (K, 2 * K, 3 * K, 4 * K):
        history, target = text[:, :begin].repeat(800, 1), text[:, begin : begin + 4]
        first, second = generate(model, history, 4)[:, begin:].view(2, 400, 4, 4)
        slow.append(brier_score(first, second, target))  # (400, 4, 4)
    slow = torch.stack(slow).mean((0, 2))  # (400, 4)
    error = (fast.var(0) / 12 + slow.var(0) / 400).sqrt()
    assert ((fast.mean(0) - slow.mean(0)).abs() < 6.8 * error).all()


def test_the_standard_error_is_that_of_a_mean_over_sequences():
    """A certain model is right or wrong on each sequence. With a share of p right, the score is
    100 (2 p - 1), its error 200 sqrt(p (1 - p) / sequences). The bootstrap: within 10 %. One
    sequence has no standard error, and what is too short has no score.
    """
    model = tiny_calm(context=8, noisy=False)
    text = generate(model, torch.randint(13, (400, 4)), 4)
    text[:60, 4:] = (text[:60, 4:] + 1) % 13
    result = evaluate_brier(model, text.flatten(), 8)
    assert result["brier_lm"] == pytest.approx(100 * (2 * 0.85 - 1))
    assert result["brier_lm_se"] == pytest.approx(200 * (0.85 * 0.15 / 400) ** 0.5, rel=0.1)
    assert math.isnan(evaluate_brier(model, text[99], 8)["brier_lm_se"])
    for context, word in ((16, "too short"), (4, "too short")):
        with pytest.raises(AssertionError, match=word):
            evaluate_brier(model, text[99], context)


@pytest.mark.parametrize("K, places", [(1, 8), (2, 16)])
def test_small_chunks_are_scored_at_8_k_places_that_are_spread(K, places):
    """Of the 252 places, or 126, with 4 tokens behind them. A certain model is right on its own
    text. Where the second half is changed, it is wrong: at a half of the places, not at all.
    """
    model = tiny_calm(K, context=256, noisy=False)
    text = generate(model, torch.randint(13, (1, 4)), 252).flatten()
    result = evaluate_brier(model, text, 256)
    assert result["positions"] == places and result["brier"] == [1, 1, 1, 1]
    text[128:] = (text[128:] + 1) % 13
    assert -0.4 < evaluate_brier(model, text, 256)["brier"][0] < 0.4
