import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn as nn
from conftest import SEEDS, slow_energy_score, tiny_calm

from autoencoder import Autoencoder, kl_divergence
from calm import CALM, KVCache, TransformerConfig, TransformerLM
from calm import brier_lm, brier_score, evaluate_brier
from energy_head import energy_score
from sample import generate

GOLDEN = Path(__file__).parent / "golden"


def tiny_transformer(vocab_size=13):
    return TransformerLM(TransformerConfig(vocab_size, 16, 32, 2, 2, context=32)).eval()


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
        losses.append(-slow_energy_score(samples, y).mean())
    torch.testing.assert_close(loss.double(), torch.stack(losses).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, 2 * metrics["fidelity"] - metrics["diversity"])
    loss.backward()
    for name, p in model.named_parameters():
        trained = not name.startswith("autoencoder.")
        assert p.requires_grad == (p.grad is not None) == trained, name


def test_the_discrete_transformer_predicts_each_token_from_those_before_it():
    model, tokens, losses = tiny_transformer(), torch.randint(13, (2, 9)), []
    for i in range(1, 9):
        log_p = model.unembedding(model.hidden_states(tokens[:, :i])[:, -1]).log_softmax(-1)
        losses.append(-log_p.gather(1, tokens[:, i : i + 1]))
    torch.testing.assert_close(model(tokens)[0], torch.stack(losses).mean())


def test_brier_score_of_single_cases():
    x, y, z = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 4], [7, 2, 3, 4]])
    assert brier_score(x, x, x).tolist() == [1, 1, 1, 1]  # right for certain
    assert brier_score(x, x, z).tolist() == [-1, -1, -1, -1]  # wrong for certain
    assert brier_score(x, z, x).tolist() == [1, 1, 1, 1]
    assert brier_score(y, z, x).tolist() == [1, 1, 0, 0]


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


class KnownHead(nn.Module):
    """A sampler with a known distribution: draws one of 40 latents, as the hidden state says."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Linear(16, 40)
        nn.init.normal_(self.logits.weight)  # sure of itself: histories matter
        self.latents = 3 * torch.randn(40, 8)

    def sample(self, hidden, n, generator=None):
        P = self.logits(hidden).softmax(-1).flatten(0, -2)
        drawn = P.multinomial(n, replacement=True, generator=generator).T  # (n, rows)
        return self.latents[drawn].view(n, *hidden.shape[:-1], -1)


def exact_brier(model, K, text, at, V=3):
    """Brier-1 … 4 of all continuations after the chunks `at`: text (B, T) of V tokens -> (B, 4)."""
    chunks, scores = torch.tensor(list(itertools.product(range(V), repeat=K))), []
    for begin in [(i + 1) * K for i in at]:
        histories, P = text[:, :begin], torch.ones(len(text), 1)
        for _ in range(math.ceil(4 / K)):
            P = (P.view(-1, 1) * next_chunk(model, K, histories)).view(len(text), -1)
            new = chunks.repeat(len(histories), 1)
            histories = torch.cat([histories.repeat_interleave(V**K, dim=0), new], dim=1)
        truth = (text[:, begin : begin + 4] * V ** torch.arange(3, -1, -1)).sum(-1, keepdim=True)
        for n in range(1, 5):
            of_prefix = P.view(len(text), V**n, -1).sum(-1)
            hit = of_prefix.gather(1, truth // V ** (4 - n))[:, 0]
            scores.append(2 * hit - of_prefix.square().sum(-1))
    return torch.stack(scores, dim=1).view(len(text), len(at), 4).mean(1)


def next_chunk(model, K, histories):
    """Histories (rows, t) -> (rows, 3^K): the probability of each next chunk, in order."""
    hidden = model.hidden_states(histories)[:, -1]
    if isinstance(model, TransformerLM):
        return model.unembedding(hidden).softmax(-1)
    chunks = model.autoencoder.decode(model.head.latents).argmax(-1)  # (40, K)
    ids = (chunks * 3 ** torch.arange(K - 1, -1, -1)).sum(-1)
    P = model.head.logits(hidden).softmax(-1)  # (rows, 40)
    return torch.zeros(len(P), 3**K).index_add(1, ids, P)


@torch.no_grad()
@pytest.mark.parametrize("K", [1, 2, 4, "discrete"])
@pytest.mark.parametrize("seed", SEEDS)
def test_evaluate_brier_against_exact_enumeration(K, seed):
    """H0: no bias. The model's own text, 20 parts of 20 sequences, scored at 2 of 3 places: the
    mean error is 0 within 5.5 standard errors, from the spread of the parts (t-test, p < 1e-4).
    """
    if K == "discrete":
        model, K = tiny_transformer(vocab_size=3), 1
        nn.init.normal_(model.unembedding.weight)  # sure of itself
    else:
        model = tiny_calm(K, vocab_size=3)
        model.head = KnownHead()
    torch.manual_seed(seed)
    context = 3 * K + max(K, 4)  # chunks 0, 1 and 2 have 4 tokens or more behind them
    text = generate(model, torch.randint(3, (400, K)), context - K).view(20, 20, context)
    exact = exact_brier(model, K, text.view(-1, context), at=(0, 2)).view(20, 20, 4).mean(1)
    results = [evaluate_brier(model, part.flatten(), context, 8, positions=2) for part in text]
    errors = torch.tensor([result["brier"] for result in results]) - exact  # (20, 4)
    assert (errors.mean(0).abs() < 5.5 * errors.std(0) / math.sqrt(20)).all()


@pytest.mark.parametrize("positions, places", [(None, 7), (4, 4), (2, 2), (1, 1)])
def test_some_evenly_spaced_positions(positions, places):
    """Every other chunk is random. A certain model tells the rest, each from its own history."""
    model, text = tiny_calm(noisy=False), torch.randint(13, (3, 4))
    for _ in range(4):
        text = torch.cat([generate(model, text, 4), torch.randint(13, (3, 4))], dim=1)
    result = evaluate_brier(model, text[:, :32].flatten(), 32, positions=positions)
    assert result["positions"] == 3 * places and result["context"] == 32
    assert (result["brier"] == [1, 1, 1, 1]) == (places < 7)


def test_the_standard_error_is_that_of_a_mean_over_sequences():
    """A certain model is right or wrong on each sequence. With a share of p right, the score is
    100 (2 p - 1), its error 200 sqrt(p (1 - p) / sequences). The bootstrap: within 10 %.
    """
    model = tiny_calm(context=8, noisy=False)
    text = generate(model, torch.randint(13, (400, 4)), 4)
    text[:60, 4:] = (text[:60, 4:] + 1) % 13
    result = evaluate_brier(model, text.flatten(), 8)
    assert result["brier_lm"] == pytest.approx(100 * (2 * 0.85 - 1))
    assert result["brier_lm_se"] == pytest.approx(200 * (0.85 * 0.15 / 400) ** 0.5, rel=0.1)


# Released checkpoints: golden/ holds tiny ones, and what the authors' code computes with them


def assert_close(ours, expected):
    assert ours.shape == expected.shape
    assert (ours.double() - expected).norm() / expected.double().norm() < 1e-5


def assert_same_weights(ours, expected):
    ours, expected = ours.state_dict(), expected.state_dict()
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@torch.no_grad()
@pytest.mark.parametrize("name", ["k2", "k4"])
def test_golden_checkpoints(name):
    arrays = numpy.load(GOLDEN / name / "expected.npz")
    e = {key: torch.from_numpy(arrays[key]) for key in arrays}
    autoencoder = Autoencoder.from_pretrained(GOLDEN / name / "autoencoder")
    mean, log_std = autoencoder.encode(e["ids"].view(-1, autoencoder.config.chunk_size))
    assert_close(mean, e["enc_mean"])
    assert_close(log_std, e["enc_log_std"])
    assert_close(autoencoder.decode(e["enc_mean"]), e["dec_logits"])
    model = CALM.from_pretrained(GOLDEN / name / "calm")
    assert_close(model.compress(e["ids"]), e["compressed"])
    assert_close(model.hidden_states(e["ids"]), e["hidden"])
    assert_close(model.head(e["hidden"], e["head_noise"]), e["head_latents"])
    assert_same_weights(model.autoencoder, autoencoder)  # its own copy, unless another is given
    assert CALM.from_pretrained(GOLDEN / name / "calm", autoencoder).autoencoder is autoencoder
    targets = e["es_mean"] + e["es_eps"] * e["es_log_std"].exp()
    assert_close(energy_score(e["es_x"], targets), e["es_score"])
    assert_close(kl_divergence(e["es_mean"], e["es_log_std"], 0.5).mean(), e["kl_clamped"])
    if "brier" in e:
        brier = brier_score(e["brier_p1"], e["brier_p2"], e["brier_y"])
        assert_close(brier.mean((0, 1)), e["brier"])


@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_any_chunk_size_in_the_released_layout(K, dtype, file, tmp_path):
    folder = GOLDEN / "k4/calm"
    golden = CALM.from_pretrained(folder)
    autoencoder = Autoencoder(replace(golden.autoencoder.config, chunk_size=K))
    model = CALM(replace(golden.config, chunk_size=K), autoencoder).to(dtype)
    # golden/k4 shows the released names: all its tensors differ, so equal ones tell which is which.
    weights, ours, golden = {}, model.state_dict(), golden.state_dict()
    for name, tensor in torch.load(folder / "pytorch_model.bin", weights_only=True).items():
        [same] = [key for key in golden if torch.equal(golden[key], tensor)]
        weights[name] = ours[same].clone()
    save = torch.save
    if file == "model.safetensors":
        save = pytest.importorskip("safetensors.torch").save_file
    for i in (0, 1):  # in two files; golden/ has one
        part = dict(list(weights.items())[i::2])
        save(part, tmp_path / file.replace(".", f"-0000{i + 1}-of-00002."))
    config = json.loads((folder / "config.json").read_text()) | {"patch_size": K}
    (tmp_path / "config.json").write_text(json.dumps(config))

    loaded = CALM.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert loaded.config.context == K * config["max_position_embeddings"] and not loaded.training
    assert generate(loaded, torch.randint(97, (1, 8)), 8, 0.5, pool=10).shape == (1, 16)
