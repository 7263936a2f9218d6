import itertools
import json
import math
import re
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn as nn
from conftest import SEEDS, slow_energy_score, tiny_calm

from autoencoder import Autoencoder, AutoencoderConfig, kl_divergence
from calm import CALM, CALMConfig, KVCache, TransformerConfig, TransformerLM
from calm import brier_lm, brier_score, draw_continuations, evaluate_brier, rotate
from energy_head import energy_score
from sample import generate

GOLDEN = Path(__file__).parent / "golden"


def tiny_transformer(vocab_size=13):
    torch.manual_seed(0)
    return TransformerLM(TransformerConfig(vocab_size, 16, 32, 2, 2, context=32)).eval()


# The backbone and its cache


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


def test_rope_turns_by_the_difference_of_positions():
    q, k = torch.randn(2, 1, 1, 1, 16).double()
    turn = lambda x, position: rotate(x, torch.tensor([position]))
    product = lambda i, j: (turn(q, i) * turn(k, j)).sum().item()
    assert product(3, 1) == pytest.approx(product(12, 10))
    assert product(3, 1) != pytest.approx(product(1, 3))
    # Coordinate 0 turns together with coordinate 8, by one radian a position.
    unit = torch.zeros(1, 1, 1, 16)
    unit[..., 0] = 1
    assert turn(unit, 1).flatten()[[0, 8]].tolist() == pytest.approx([0.5403023, 0.8414710])


# CALM


@pytest.mark.parametrize("K", [1, 4])
def test_forward_is_the_slow_formula(K):
    """Each chunk but the first is the target of the state before it, in training as in evaluation."""
    model, tokens = tiny_calm(K).train(), torch.randint(13, (2, 16))
    L, losses = 16 // K, []
    torch.manual_seed(1)
    loss, metrics = model(tokens)
    torch.manual_seed(1)
    noise, targets = torch.rand(4, 2, L - 1, 4) - 0.5, torch.randn(10, 8)
    for i in range(1, L):
        hidden = model.hidden_states(tokens[:, : i * K])[:, -1]  # (B, d)
        mean, log_std = model.autoencoder.encode(tokens[:, i * K : (i + 1) * K])  # (B, l) each
        samples = model.head(hidden, noise[:, :, i - 1])  # (N, B, l)
        y = mean + log_std.exp() * targets[:, None]  # (M, B, l)
        losses.append(-slow_energy_score(samples, y).mean())
    torch.testing.assert_close(loss.double(), torch.stack(losses).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, 2 * metrics["fidelity"] - metrics["diversity"])


def test_the_autoencoder_is_frozen_and_undamaged():
    model, tokens = tiny_calm(), torch.randint(13, (2, 32))
    chunks = model.chunks(tokens)
    posterior = model.autoencoder.encode(chunks)
    model.train()(tokens)[0].backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("autoencoder."), name
    assert all(map(torch.equal, model.autoencoder.encode(chunks), posterior))


def test_draws_are_the_most_probable_chunks_of_the_heads_samples():
    model, hidden = tiny_calm(), torch.randn(2, 3, 16)
    draws = model.draw_chunks(hidden, 100, torch.Generator().manual_seed(1))  # 600: over one part
    latents = model.head.sample(hidden, 100, torch.Generator().manual_seed(1))
    assert draws.shape == (100, 2, 3, 4)
    assert torch.equal(draws, model.autoencoder.decode(latents).argmax(-1))


def test_models_that_do_not_fit_together_are_refused():
    autoencoder = Autoencoder(AutoencoderConfig(13, 4, 8, 16, 32))
    for name, wrong in (("vocab_size", 14), ("chunk_size", 2), ("latent_size", 9)):
        sizes = {"vocab_size": 13, "chunk_size": 4, "latent_size": 8} | {name: wrong}
        with pytest.raises(AssertionError, match=name):
            CALM(CALMConfig(**sizes, hidden_size=16, n_layers=1, n_heads=2), autoencoder)


def test_the_discrete_transformer_predicts_each_token_from_those_before_it():
    model, tokens = tiny_transformer(), torch.randint(13, (2, 9))
    losses = []
    for i in range(1, 9):
        log_p = model.unembedding(model.hidden_states(tokens[:, :i])[:, -1]).log_softmax(-1)
        losses.append(-log_p.gather(1, tokens[:, i : i + 1]))
    torch.testing.assert_close(model(tokens)[0], torch.stack(losses).mean())


# The Brier score


def test_brier_score_of_single_cases():
    x, y, z = torch.tensor([[1, 2, 3, 4], [1, 2, 9, 4], [7, 2, 3, 4]])
    assert brier_score(x, x, x).tolist() == [1, 1, 1, 1]  # right for certain
    assert brier_score(x, x, z).tolist() == [-1, -1, -1, -1]  # wrong for certain
    assert brier_score(x, z, x).tolist() == [1, 1, 1, 1]
    assert brier_score(x, y, x).tolist() == [1, 1, 1, 1]
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
    assert brier_lm(torch.full((4,), 0.3)) == pytest.approx(30)
    assert brier_lm([-0.1, -0.1, -0.1, -0.02]) == 0  # their product is positive
    assert brier_lm([0.2, 0.1, -0.01, -0.01]) == 0


class KnownHead(nn.Module):
    """A sampler with a known distribution: draws one of 40 latents, as the hidden state says."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Linear(16, 40)
        self.latents = 3 * torch.randn(40, 8)

    def sample(self, hidden, n, generator=None):
        P = self.logits(hidden).softmax(-1).flatten(0, -2)
        drawn = P.multinomial(n, replacement=True, generator=generator).T  # (n, rows)
        return self.latents[drawn].view(n, *hidden.shape[:-1], -1)


def exact_brier(next_chunk, K, text, places, V=3):
    """Brier-1 … 4, (B, 4), from the probabilities of all continuations after chunks 0 … places - 1.
    next_chunk: histories (rows, t) -> (rows, V^K), the distribution of the next chunk.
    """
    chunks, scores = torch.tensor(list(itertools.product(range(V), repeat=K))), []
    digits = V ** torch.arange(3, -1, -1)
    for begin in range(K, (places + 1) * K, K):
        histories, P = text[:, :begin], torch.ones(len(text), 1)
        for _ in range(math.ceil(4 / K)):
            P = (P.view(-1, 1) * next_chunk(histories)).view(len(text), -1)
            new = chunks.repeat(len(histories), 1)
            histories = torch.cat([histories.repeat_interleave(V**K, dim=0), new], dim=1)
        truth = (text[:, begin : begin + 4] * digits).sum(-1, keepdim=True)
        for n in range(1, 5):
            of_prefix = P.view(len(text), V**n, -1).sum(-1)
            hit = of_prefix.gather(1, truth // V ** (4 - n))[:, 0]
            scores.append(2 * hit - of_prefix.square().sum(-1))
    return torch.stack(scores, dim=1).view(len(text), places, 4).mean(1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [1, 2, 4, "discrete"])
@pytest.mark.parametrize("seed", SEEDS)
def test_evaluate_brier_against_exact_enumeration(kind, seed):
    """H0: evaluate_brier has no bias. 20 parts of a text with 20 sequences each, 3 places a sequence:
    the mean of 20 errors is 0 within 5.5 of its standard errors (Student's t, p < 1e-4).
    """
    K = 1 if kind == "discrete" else kind
    model = tiny_transformer(vocab_size=3) if kind == "discrete" else tiny_calm(K, vocab_size=3)
    if kind == "discrete":
        next_chunk = lambda h: model.unembedding(model.hidden_states(h)[:, -1]).softmax(-1)
    else:
        model.head, digits = KnownHead(), 3 ** torch.arange(K - 1, -1, -1)
        ids = (model.autoencoder.decode(model.head.latents).argmax(-1) * digits).sum(-1)
        known = lambda h: model.head.logits(model.hidden_states(h)[:, -1]).softmax(-1)
        next_chunk = lambda h: torch.zeros(len(h), 3**K).index_add(1, ids, known(h))
    torch.manual_seed(seed)
    context = 3 * K + max(K, 4)
    text = torch.randint(3, (20, 20, context))
    exact = exact_brier(next_chunk, K, text.view(-1, context), 3).view(20, 20, 4).mean(1)
    results = [evaluate_brier(model, part.flatten(), context, batch_size=8) for part in text]
    errors = torch.tensor([result["brier"] for result in results]) - exact  # (20, 4)
    assert (errors.mean(0).abs() < 5.5 * errors.std(0) / math.sqrt(20)).all()
    assert all(r["positions"] == 60 and r["context"] == context for r in results)
    assert all(r["brier_lm"] == pytest.approx(brier_lm(r["brier"]), rel=1e-5) for r in results)


@pytest.mark.parametrize("K", [1, 2, 4, 6])
def test_continuations_at_some_places_each_come_from_their_own_history(K):
    """A head without noise has one continuation of each prefix, and `generate` says which."""
    model, tokens, at = tiny_calm(K, noisy=False), torch.randint(13, (2, 24)), [0, 1, 2]
    drawn, target = draw_continuations(model, tokens, at, 2)
    assert drawn.shape == (2, *target.shape)
    for place, i in enumerate(at):
        history, text = tokens[:, : (i + 1) * K], tokens[:, (i + 1) * K :]
        assert torch.equal(target[:, place, :4], text[:, :4])
        expected = generate(model, history, 4)[:, -4:]
        assert all(torch.equal(draw[:, place, :4], expected) for draw in drawn)


def test_some_positions_of_each_sequence_are_evenly_spaced():
    """A certain model, on a text of 8 chunks that it tells right up to chunk 4, and then mostly wrong."""
    model = tiny_calm(noisy=False)
    text = generate(model, torch.randint(13, (50, 4)), 28)
    text[:, 20:] = (text[:, 20:] + 1) % 13
    for positions, at in ((None, [*range(7)]), (7, [*range(7)]), (4, [0, 2, 4, 6]), (2, [0, 4])):
        result = evaluate_brier(model, text.flatten(), 32, positions=positions)
        assert result["positions"] == 50 * len(at)
        drawn, target = draw_continuations(model, text, at, 1)
        hits = (drawn[0] == target)[..., 0].float().mean().item()
        assert result["brier"][0] == pytest.approx(2 * hits - 1)


def test_the_standard_error_is_that_of_a_mean_over_sequences():
    """A certain model is right, or wrong, on whole sequences. With a share of p right the score is
    100 (2 p - 1), and its standard error 200 sqrt(p (1 - p) / sequences). The bootstrap: within 10 %.
    """
    model = tiny_calm(context=8, noisy=False)
    text = generate(model, torch.randint(13, (400, 4)), 4)
    text[:60, 4:] = (text[:60, 4:] + 1) % 13
    result = evaluate_brier(model, text.flatten(), 8)
    assert result["brier_lm"] == pytest.approx(100 * (2 * 0.85 - 1))
    assert result["brier_lm_se"] == pytest.approx(200 * (0.85 * 0.15 / 400) ** 0.5, rel=0.1)


def test_a_text_shorter_than_one_context_is_refused():
    with pytest.raises(AssertionError, match="fewer than one context"):
        evaluate_brier(tiny_calm(), torch.zeros(31, dtype=torch.long), 32)


# Released checkpoints: golden/ holds tiny ones, and what the authors' code computes with them


def assert_close(ours, expected):
    assert ours.shape == expected.shape
    assert (ours.double() - expected).norm() / expected.double().norm() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["k2", "k4"])
def test_golden_checkpoints(name):
    arrays = numpy.load(GOLDEN / name / "expected.npz")
    e = {key: torch.from_numpy(arrays[key]) for key in arrays}
    # The autoencoder.
    autoencoder = Autoencoder.from_pretrained(GOLDEN / name / "autoencoder")
    mean, log_std = autoencoder.encode(e["ids"].view(-1, autoencoder.config.chunk_size))
    assert_close(mean, e["enc_mean"])
    assert_close(log_std, e["enc_log_std"])
    assert_close(autoencoder.decode(e["enc_mean"]), e["dec_logits"])
    # The language model.
    model = CALM.from_pretrained(GOLDEN / name / "calm")
    assert_close(model.compress(e["ids"]), e["compressed"])
    assert_close(model.hidden_states(e["ids"]), e["hidden"])
    assert_close(model.head(e["hidden"], e["head_noise"]), e["head_latents"])
    # The scores.
    targets = e["es_mean"] + e["es_eps"] * e["es_log_std"].exp()
    assert_close(energy_score(e["es_x"], targets), e["es_score"])
    assert_close(kl_divergence(e["es_mean"], e["es_log_std"], 0.5).mean(), e["kl_clamped"])
    if "brier" in e:
        brier = brier_score(e["brier_p1"], e["brier_p2"], e["brier_y"])
        assert_close(brier.mean((0, 1)), e["brier"])


OURS_AND_THEIRS = [  # in this order, the first that fits
    (r"autoencoder\.embedding", "ae_model.encoder.embed_tokens"),
    (r"autoencoder\.(en|de)coder_blocks\.(\d).norm", r"ae_model.\1coder.\1coder_layers.\2.layernorm"),
    (r"autoencoder\.(en|de)coder_blocks\.(\d).mlp\.(\w+)", r"ae_model.\1coder.\1coder_layers.\2.mlp.\3_proj"),
    (r"autoencoder\.(en|de)coder_norm", r"ae_model.\1coder.norm"),
    (r"autoencoder\.squeeze", "ae_model.encoder.squeeze_layer"),
    (r"autoencoder\.to_posterior", "ae_model.encoder.hidden_to_latent"),
    (r"autoencoder\.from_latent", "ae_model.decoder.latent_to_hidden"),
    (r"autoencoder\.expand", "ae_model.decoder.expand_layer"),
    (r"embedding", "transformer.embed_tokens"), (r"compression", "embed_proj"),
    (r"backbone\.blocks\.(\d)\.attention_norm", r"transformer.layers.\1.input_layernorm"),
    (r"backbone\.blocks\.(\d)\.mlp_norm", r"transformer.layers.\1.post_attention_layernorm"),
    (r"backbone\.blocks\.(\d)\.attention\.(\w)\w+", r"transformer.layers.\1.self_attn.\2_proj"),
    (r"backbone\.blocks\.(\d)\.mlp\.(\w+)", r"transformer.layers.\1.mlp.\2_proj"),
    (r"backbone\.norm", "transformer.norm"), (r"head\.(noise|hidden)_in", r"mlp_generator.\1_embd"),
    (r"head\.(noise|hidden)_norm", r"mlp_generator.norm_\1"),
    (r"head\.blocks\.(\d)\.norm", r"mlp_generator.mlp_blocks.\1.in_ln"),
    (r"head\.blocks\.(\d)\.mlp", r"mlp_generator.mlp_blocks.\1.linears"),
    (r"head\.blocks\.(\d)\.down", r"mlp_generator.mlp_blocks.\1.down_proj"),
    (r"head\.final_norm", "mlp_generator.final_layer.in_ln"),
    (r"head\.final", "mlp_generator.final_layer.linears"),
]  # fmt: skip


def released_names(model):
    """The weights of a CALM as the released code names them: some twice."""
    weights = {}
    for name, tensor in model.state_dict().items():
        ours, theirs = next(pair for pair in OURS_AND_THEIRS if re.match(pair[0], name))
        name = re.sub(f"^{ours}", theirs, name)
        weights[name] = tensor.clone()
        if name.startswith("mlp_generator"):
            weights[name.replace("mlp_generator", "generative_head")] = tensor.clone()
    lm_head = weights["ae_model.encoder.embed_tokens.weight"].clone()
    return weights | {"ae_model.decoder.lm_head_weight": lm_head}


def save_released(folder, model, save=torch.save, ending="bin", n_files=1):
    """A folder of the released layout with the weights in n files."""
    folder.mkdir(exist_ok=True)
    c, weights = model.config, released_names(model)
    config = json.loads((GOLDEN / "k4/calm/config.json").read_text())
    config |= {"vocab_size": c.vocab_size, "patch_size": c.chunk_size, "latent_size": c.latent_size}
    config |= {"hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size}
    config |= {"num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads}
    config |= {"noise_size": c.noise_size, "num_mlp_layers": c.n_head_blocks}
    config |= {"max_position_embeddings": c.context // c.chunk_size}  # it counts chunks
    (folder / "config.json").write_text(json.dumps(config))
    name = "pytorch_model" if ending == "bin" else "model"
    for i in range(n_files):
        part = {key: weights[key] for key in list(weights)[i::n_files]}
        save(part, folder / f"{name}-{i + 1:05}-of-{n_files:05}.{ending}")
    return folder


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("name", ["k2", "k4"])
def test_golden_weights_get_their_names_back(name):
    released = torch.load(GOLDEN / name / "calm/pytorch_model.bin", weights_only=True)
    back = released_names(CALM.from_pretrained(GOLDEN / name / "calm"))
    assert back.keys() == released.keys()
    assert all(torch.equal(back[key], released[key]) for key in back)


@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_any_chunk_size_in_the_released_layout(K, tmp_path):
    model, tokens = tiny_calm(K, context=64), torch.randint(13, (2, 32))
    for n_files in (1, 2):
        loaded = CALM.from_pretrained(save_released(tmp_path / str(n_files), model, n_files=n_files))
        assert_same_weights(loaded, model)
        assert loaded.config.context == 64 and not loaded.training
        assert torch.equal(loaded.hidden_states(tokens), model.hidden_states(tokens))


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = tiny_calm()
    for n_files in (1, 2):
        folder = save_released(tmp_path / str(n_files), model, save_file, "safetensors", n_files)
        assert_same_weights(CALM.from_pretrained(folder), model)


def test_bfloat16_weights_stay_so_and_generate(tmp_path):
    model = tiny_calm().bfloat16()
    loaded = CALM.from_pretrained(save_released(tmp_path, model))
    assert_same_weights(loaded, model)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    text = generate(loaded, torch.randint(13, (1, 8)), 8, temperature=0.5, pool=10)
    assert text.shape == (1, 16)


def test_another_autoencoder_may_be_given():
    autoencoder = Autoencoder.from_pretrained(GOLDEN / "k2/autoencoder")
    own = CALM.from_pretrained(GOLDEN / "k2/calm")
    assert_same_weights(own.autoencoder, autoencoder)
    nn.init.ones_(autoencoder.squeeze.bias)
    model = CALM.from_pretrained(GOLDEN / "k2/calm", autoencoder)
    assert_same_weights(model.autoencoder, autoencoder)
    assert_same_weights(model.head, own.head)
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
    with pytest.raises(AssertionError, match="does not fit"):
        CALM.from_pretrained(GOLDEN / "k4/calm", autoencoder)
