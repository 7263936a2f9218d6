import itertools

import pytest
import torch
from conftest import SEEDS, tiny_calm

from autoencoder import Autoencoder, AutoencoderConfig, InputError
from calm import CALM, CALMConfig, KVCache, brier_lm, brier_score, brier_score_pairs, draw_continuations, evaluate_brier, rotate, rotation
from energy_head import energy_loss
from sample import generate

# The backbone and the cache


@pytest.mark.parametrize("K", [1, 2, 4])
def test_no_hidden_state_sees_a_later_chunk(K):
    model, tokens = tiny_calm(K), torch.randint(13, (2, 32))
    before = model.hidden_states(tokens)
    for place in range(32):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 13
        moved = (model.hidden_states(changed) != before).any(-1)  # (B, L)
        assert not moved[:, : place // K].any(), "a later token moved an earlier state"
        assert moved[:, place // K].all(), "a chunk does not move its own state"


def test_the_loss_predicts_each_chunk_from_those_before_it():
    """Change the last chunk: what the head is given must stay, and the target must move."""
    model, tokens = tiny_calm(), torch.randint(13, (2, 32))
    seen = []
    model.head.hidden_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    changed = tokens.clone()
    changed[:, -4:] = (changed[:, -4:] + 1) % 13
    fidelities = []
    for batch in (tokens, changed):
        torch.manual_seed(0)
        fidelities.append(model(batch)[1]["fidelity"])
    assert torch.equal(seen[0], seen[1]) and seen[0].shape[1] == 7
    assert fidelities[0] != fidelities[1]


@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_cache_gives_what_the_full_pass_gives(K):
    model, tokens = tiny_calm(K).double(), torch.randint(13, (2, 32))
    full = model.hidden_states(tokens)
    for pieces in ([K] * (32 // K), [16, K, 16 - K], [4, 12, 16]):  # step by step; and several steps at once
        cache = KVCache()
        states = [model.hidden_states(part, cache) for part in tokens.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(states, dim=1), full)
        assert cache.length == 32 // K


def test_a_cache_that_was_set_back_forgets_what_lies_behind():
    model, tokens = tiny_calm().double(), torch.randint(13, (2, 32))
    cache = KVCache()
    model.hidden_states(torch.cat([tokens[:, :16], torch.randint(13, (2, 16))], dim=1), cache)
    cache.length = 4
    states = model.hidden_states(tokens[:, 16:], cache)
    torch.testing.assert_close(states, model.hidden_states(tokens)[:, 4:])


def test_rope_turns_by_the_difference_of_positions():
    q, k = torch.randn(2, 1, 1, 1, 16).double()

    def product(i, j):
        return (rotate(q, *rotation(torch.tensor([i]), 16, 1e4)) * rotate(k, *rotation(torch.tensor([j]), 16, 1e4))).sum().item()

    assert product(3, 1) == pytest.approx(product(12, 10))
    assert product(3, 1) != pytest.approx(product(1, 3))
    # Half-split: coordinate 0 turns together with coordinate 8, by the full angle of one radian a position.
    unit = torch.zeros(1, 1, 1, 16).double()
    unit[..., 0] = 1
    turned = rotate(unit, *rotation(torch.tensor([1]), 16, 1e4)).flatten()
    assert turned[[0, 8]].tolist() == pytest.approx([0.5403023, 0.8414710])


# CALM


def test_the_autoencoder_stays_frozen():
    model, tokens = tiny_calm(), torch.randint(13, (2, 32))
    model.train()
    assert not model.autoencoder.training
    assert model(tokens)[0].requires_grad
    model(tokens)[0].backward()
    assert all(p.grad is None for p in model.autoencoder.parameters())
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("autoencoder."))


def test_draws_are_the_decoded_samples_of_the_head():
    model, hidden = tiny_calm(), torch.randn(2, 3, 16)
    draws = model.draw_chunks(hidden, 5, torch.Generator().manual_seed(1))
    latent = model.head.sample(hidden, 5, torch.Generator().manual_seed(1))
    assert draws.shape == (5, 2, 3, 4)
    assert torch.equal(draws, model.autoencoder.decode(latent).argmax(-1))


def test_mixed_precision_leaves_the_posterior_and_the_energy_loss_in_float32():
    """The loss inside autocast is that of the head's bfloat16 draws, computed in float32 outside of it, with the same targets."""
    model, tokens, seen = tiny_calm(), torch.randint(13, (2, 32)), {}
    model.head.final_out.register_forward_hook(lambda *args: seen.update(samples=args[-1], state=torch.get_rng_state()))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model(tokens)
    mean, log_std = model.autoencoder.encode(tokens.view(2, 8, 4)[:, 1:])
    torch.set_rng_state(seen["state"])
    expected, *_ = energy_loss(seen["samples"].float(), mean, log_std, model.config.n_targets)
    assert seen["samples"].dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_models_that_do_not_fit_together_are_refused():
    autoencoder = Autoencoder(AutoencoderConfig(13, 4, 8, 16, 32))
    sizes = {"vocab_size": 13, "chunk_size": 4, "latent_size": 8, "hidden_size": 16, "n_heads": 2, "context": 32}
    for name, wrong in (("vocab_size", 14), ("chunk_size", 2), ("latent_size", 9)):
        with pytest.raises(InputError, match=name):
            CALM(CALMConfig(**{**sizes, name: wrong}), autoencoder)
    for wrong in ({"context": 30}, {"context": 4}, {"hidden_size": 18}, {"n_samples": 1}, {"n_layers": 0}):
        with pytest.raises(InputError):
            CALMConfig(**{**sizes, **wrong})


# The Brier score


@pytest.mark.parametrize("K", [1, 2, 4, 6])
def test_the_two_sample_estimate_is_unbiased(K):
    """By enumeration: the mean over all pairs of chunks, each with its probability, is 2 P(y) - sum_x P(x)^2 for each n."""
    chunks = torch.tensor(list(itertools.product(range(2), repeat=K)))  # all of them
    P = torch.rand(len(chunks)).double()
    P /= P.sum()
    y = torch.randint(2, (K,))
    estimates = brier_score(chunks[:, None], chunks[None, :], y.expand(len(chunks), len(chunks), K))
    mean = (P[:, None, None] * P[None, :, None] * estimates).sum((0, 1))
    assert mean.shape == (min(K, 4),)
    for n in range(1, min(K, 4) + 1):
        of_prefix = {}  # the probability of each n-gram
        for chunk, p in zip(chunks.tolist(), P.tolist()):
            of_prefix[tuple(chunk[:n])] = of_prefix.get(tuple(chunk[:n]), 0.0) + p
        exact = 2 * of_prefix[tuple(y[:n].tolist())] - sum(p * p for p in of_prefix.values())
        assert mean[n - 1].item() == pytest.approx(exact)


def test_the_estimate_from_all_pairs_is_unbiased():
    """By enumeration of all triples of samples over four chunks, each with its probability."""
    chunks = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    P = torch.tensor([0.5, 0.2, 0.2, 0.1]).double()
    y = chunks[1]
    mean = torch.zeros(2).double()
    for triple in itertools.product(range(4), repeat=3):
        mean += P[list(triple)].prod() * brier_score_pairs(chunks[list(triple)], y)
    assert mean.tolist() == pytest.approx([2 * 0.7 - (0.7**2 + 0.3**2), 2 * 0.2 - (0.25 + 0.04 + 0.04 + 0.01)])
    pair = chunks[torch.randint(4, (2, 50))]
    assert torch.equal(brier_score_pairs(pair, y.expand(50, 2)), brier_score(pair[0], pair[1], y.expand(50, 2)))


@pytest.mark.parametrize("seed", SEEDS)
def test_more_samples_make_the_estimate_less_noisy(seed):
    """H0: its variance at n = 8 is below a third of that at n = 2. 5 000 estimates each; the ratio is near 0.18 here."""
    torch.manual_seed(seed)
    P = torch.tensor([0.4, 0.3, 0.2, 0.1])
    variance = {n: brier_score_pairs(P.multinomial(n * 5000, True).view(n, 5000, 1), torch.zeros(5000, 1)).var().item() for n in (2, 8)}
    assert variance[8] < variance[2] / 3


def test_brier_score_of_single_cases():
    x, y, z = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 4], [7, 2, 3, 4]])
    assert brier_score(x, x, x).tolist() == [1, 1, 1, 1]  # right for certain
    assert brier_score(x, x, z).tolist() == [-1, -1, -1, -1]  # wrong for certain
    assert brier_score(x, z, x).tolist() == [1, 1, 1, 1]
    assert brier_score(x, y, x).tolist() == [1, 1, 1, 1]
    assert brier_score(y, z, x).tolist() == [1, 1, 0, 0]


def test_brier_lm_is_the_geometric_mean_with_each_factor_floored():
    assert brier_lm([0.4, 0.2, 0.1, 0.05]) == pytest.approx(100 * (0.4 * 0.2 * 0.1 * 0.05) ** 0.25)
    assert brier_lm(torch.full((4,), 0.3)) == pytest.approx(30)
    assert brier_lm([-0.1, -0.1, -0.1, -0.02]) == 0  # the product of the four is positive: floored as a whole, this were 7
    assert brier_lm([0.2, 0.1, -0.01, -0.01]) == 0


@pytest.mark.parametrize("K", [1, 2, 3])
def test_continuations_of_small_chunks_are_generated_from_their_own_history(K):
    """With a head without noise there is one continuation of each prefix, and `generate` says which."""
    model, tokens = tiny_calm(K, context=24, noisy=False), torch.randint(13, (2, 24))
    at = torch.arange(24 // K - -(-4 // K))
    drawn, truth = draw_continuations(model, tokens, at, 2)
    assert drawn.shape == (2, *truth.shape)
    for i in range(truth.shape[1]):
        begin = (i + 1) * K
        assert torch.equal(truth[:, i, :4], tokens[:, begin : begin + 4])
        expected = generate(model, tokens[:, :begin], 4)[:, begin:]
        assert torch.equal(drawn[0, :, i, :4], expected) and torch.equal(drawn[1, :, i, :4], expected)
    assert begin + truth.shape[2] == 24  # every position with enough text behind it is there


@pytest.mark.parametrize("K", [1, 2, 4])
def test_continuations_at_some_positions_are_those_at_all(K):
    model, tokens = tiny_calm(K, context=24, noisy=False), torch.randint(13, (2, 24))
    every = torch.arange(24 // K - -(-4 // K))
    some = every[[0, 2, 3]]
    for all_of, part in zip(draw_continuations(model, tokens, every, 2), draw_continuations(model, tokens, some, 2)):
        assert torch.equal(all_of[..., some, :], part)


def test_continuations_of_large_chunks_are_one_chunk():
    for K in (4, 6, 8):
        model, tokens = tiny_calm(K, context=24), torch.randint(13, (3, 24))
        drawn, truth = draw_continuations(model, tokens, torch.arange(24 // K - 1), 2)
        assert torch.equal(truth, tokens.view(3, -1, K)[:, 1:]) and drawn.shape == (2, *truth.shape)


class Urn(torch.nn.Module):
    """A model whose distribution is known: each chunk is drawn from one table, whatever came before."""

    def __init__(self, K, probabilities):
        super().__init__()
        self.config = CALMConfig(3, K, hidden_size=2, n_heads=1, context=24)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.chunks = torch.tensor(list(itertools.product(range(3), repeat=K)))
        self.probabilities = probabilities

    def hidden_states(self, tokens, cache=None, positions=None, visible=None):
        if cache is not None:
            cache.length += tokens.shape[1] // self.config.chunk_size
        return torch.zeros(len(tokens), tokens.shape[1] // self.config.chunk_size, 2)

    def draw_chunks(self, hidden, n, generator=None):
        shape = (n, *hidden.shape[:-1])
        draws = self.probabilities.multinomial(torch.Size(shape).numel(), replacement=True, generator=generator)
        return self.chunks[draws].view(*shape, -1)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_evaluate_brier_against_the_exact_score(K, seed):
    """
    H0: the mean of evaluate_brier is the exact Brier-n of a known distribution on the same text. 2 000 sequences of 24
    tokens; within 4.5 of its own standard errors, p < 1e-5. A standard error that is too small would fail too.
    """
    torch.manual_seed(seed)
    P = torch.rand(3**K).double() ** 3
    model = Urn(K, P / P.sum())
    text = torch.randint(3, (2000 * 24,))
    result = evaluate_brier(model, text, 24, batch_size=500)
    chunks = -(-4 // K)
    joint = model.probabilities
    for _ in range(chunks - 1):
        joint = torch.outer(joint, model.probabilities).flatten()
    grams = torch.tensor(list(itertools.product(range(3), repeat=chunks * K)))
    truth = text.view(2000, 24)[:, K:].unfold(1, chunks * K, K)  # (2000, positions, chunks · K)
    assert result["positions"] == truth.shape[0] * truth.shape[1] and result["context"] == 24
    for n in range(1, 5):
        ids = (grams[:, :n] * 3 ** torch.arange(n)).sum(-1)
        marginal = torch.zeros(3**n).double().index_add(0, ids, joint)
        exact = (2 * marginal[(truth[..., :n] * 3 ** torch.arange(n)).sum(-1)] - marginal.square().sum()).mean().item()
        assert abs(result["brier"][n - 1] - exact) < 4.5 * result["brier_se"][n - 1]
    assert result["brier_lm"] == pytest.approx(brier_lm(result["brier"]), rel=1e-5)


def test_the_standard_error_is_that_of_repeated_evaluations():
    """By hand: sequences scored 1 or -1 each, as if by a coin, have a mean with standard error 1 / sqrt(sequences)."""
    model = Urn(4, torch.eye(81)[0])  # always the chunk 0 0 0 0
    right = torch.randint(2, (400, 1))
    text = torch.where(right.bool(), 0, 1).expand(400, 24).flatten()
    result = evaluate_brier(model, text, 24)
    share = right.float().mean().item()
    assert result["brier"] == pytest.approx([2 * share - 1] * 4)
    assert result["brier_se"] == pytest.approx([2 * (share * (1 - share) / 400) ** 0.5] * 4, rel=0.1)


def test_a_text_or_context_that_is_too_short_is_refused():
    model = tiny_calm()
    with pytest.raises(InputError, match="less than one context"):
        evaluate_brier(model, torch.zeros(31, dtype=torch.long), 32)
    for context in (4, 30):
        with pytest.raises(InputError, match="multiple of chunk_size 4"):
            evaluate_brier(model, torch.zeros(100, dtype=torch.long), context)
