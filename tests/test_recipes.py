"""The recipe for small runs: a head whose noise is K choices, and its score in closed form. What small runs learn."""

import itertools
import sys
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import SEEDS, chi_square_p, tiny_calm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sample
import train
from autoencoder import Autoencoder, AutoencoderConfig
from calm import CALM, CALMConfig
from classroom.recipes import ChoiceCALM, ChoiceHead, accuracy_of_codes, build_calm, energy_score_of_choice
from classroom.small_runs import share_of_words, words_of
from energy_head import energy_score, pairwise_distances

V, K, D, L = 5, 3, 12, 4


def random_head(seed=0):
    """Every number of it random, so that no term can hide behind a zero."""
    torch.manual_seed(seed)
    head = ChoiceHead(D, L, K, V)
    for tensor in [*head.parameters(), head.origin, head.codes]:
        nn.init.normal_(tensor, std=0.5)
    return head.double()


def plain_probabilities(head, hidden, chosen):
    """P of the next choice after the choices `chosen`, for one hidden state (d,): the conditioning concatenated, one by one."""
    c = head.hidden_norm(head.hidden_in(hidden))
    x = c + sum(block.embedding.weight[i] for block, i in zip(head.blocks, chosen))
    block = head.blocks[len(chosen)]
    return block.logits(F.silu(block.linear_in(torch.cat([block.norm(x), c])))).softmax(-1)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_the_closed_form_is_the_sum_over_all_pairs(alpha):
    P, codes, target = torch.rand(6, V).double().softmax(-1), torch.randn(V, L).double(), torch.randint(V, (6,))
    found = energy_score_of_choice(P, pairwise_distances(codes, alpha), target)
    for p, y, score in zip(P, target, found):
        expected = sum(p[i] * p[j] * (codes[i] - codes[j]).norm() ** alpha for i in range(V) for j in range(V))
        expected -= 2 * sum(p[i] * (codes[i] - codes[y]).norm() ** alpha for i in range(V))
        torch.testing.assert_close(score, expected)


def test_the_closed_form_is_what_the_estimate_from_draws_estimates():
    """H0: equal means. 40 000 estimates from 4 draws each; 4.5 standard errors, p < 1e-5; seeds 0 to 9."""
    for seed in SEEDS:
        torch.manual_seed(seed)
        p, codes = torch.randn(V).softmax(-1), torch.randn(V, L)
        draws = codes[p.expand(40_000, V).multinomial(4, replacement=True).T]  # (4, 40 000, L)
        estimates = energy_score(draws, codes[2].expand(1, 40_000, L))
        exact = energy_score_of_choice(p, pairwise_distances(codes, 1.0), torch.tensor(2))
        assert abs(estimates.mean() - exact) < 4.5 * estimates.std() / 200


def test_with_equal_distances_it_is_the_brier_score():
    P, target = torch.rand(6, V).softmax(-1), torch.randint(V, (6,))
    brier = 2 * P.gather(1, target[:, None])[:, 0] - P.square().sum(-1)
    torch.testing.assert_close(energy_score_of_choice(P, 1 - torch.eye(V), target), brier - 1)


def test_the_loss_is_that_of_each_choice_after_the_true_ones():
    head, hidden, tokens = random_head(), torch.randn(2, 3, D).double(), torch.randint(V, (2, 3, K))
    expected = 0
    for h, chunk in zip(hidden.view(-1, D), tokens.view(-1, K)):
        for k in range(K):
            P = plain_probabilities(head, h, chunk[:k])
            expected -= energy_score_of_choice(P, torch.cdist(head.codes[k], head.codes[k]) ** 0.8, chunk[k]) / 6
    torch.testing.assert_close(head.loss(hidden, tokens, alpha=0.8), expected)


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_draws_have_the_probabilities_of_the_chain_rule(seed):
    """H0: P(i_1, …, i_K) is the product of the choices' probabilities. n = 20 000, two positions; p > 1e-4."""
    head, hidden = random_head(seed), torch.randn(2, D).double()
    draws = head.sample(hidden, 20_000, torch.Generator().manual_seed(seed))
    chunks = list(itertools.product(range(V), repeat=K))
    points = torch.stack([head.origin + sum(head.codes[k, i] for k, i in enumerate(chunk)) for chunk in chunks])
    for position in range(2):
        nearest = torch.cdist(draws[:, position], points)
        assert nearest.amin(-1).max() < 1e-6, "a draw is no sum of codes"
        P = torch.tensor([
            torch.stack([plain_probabilities(head, hidden[position], chunk[:k])[chunk[k]] for k in range(K)]).prod() for chunk in chunks
        ])  # fmt: skip
        observed = torch.bincount(nearest.argmin(-1), minlength=len(chunks))
        common = P * 20_000 >= 5  # the test wants expected counts of 5 or more: the others are counted as one
        together = lambda x: torch.cat([x[common], x[~common].sum()[None]])  # noqa: E731
        assert chi_square_p(together(observed.double()), together(P * 20_000)) > 1e-4


def test_draws_of_one_state_and_of_many_have_their_shapes():
    head = random_head()
    assert head.sample(torch.randn(D).double(), 7).shape == (7, L)
    assert head.sample(torch.randn(2, 3, D).double(), 7).shape == (7, 2, 3, L)


class AdditiveAutoencoder(nn.Module):
    """Latents that are sums exactly, and a decoder that looks its chunks up."""

    def __init__(self):
        super().__init__()
        self.parts, self.chunks = torch.randn(K, V, L), torch.cartesian_prod(*[torch.arange(V)] * K)

    def encode(self, tokens):
        mean = 1 + sum(part[t] for part, t in zip(self.parts, tokens.unbind(-1)))
        return mean, torch.zeros_like(mean)

    def decode_tokens(self, latent):
        return self.chunks[torch.cdist(latent, self.encode(self.chunks)[0]).argmin(-1)]


def test_codes_of_an_additive_autoencoder_are_its_parts():
    autoencoder, head = AdditiveAutoencoder(), ChoiceHead(D, L, K, V)
    chunks = torch.tensor([0, 0, 0, 1, 1, 3]).repeat(400)[torch.randperm(2400)].view(-1, K)
    head.start_from(autoencoder, chunks)
    sums = head.origin + sum(codes[t] for codes, t in zip(head.codes, autoencoder.chunks.unbind(-1)))
    torch.testing.assert_close(sums, autoencoder.encode(autoencoder.chunks)[0])
    assert accuracy_of_codes(head, autoencoder, autoencoder.chunks) == 1.0
    head.codes[:, 3] += 100
    assert accuracy_of_codes(head, autoencoder, torch.tensor([[3, 1, 0]])) < 1.0


def test_the_first_probabilities_are_the_tokens_frequencies():
    head = ChoiceHead(D, L, K, V)
    head.start_from(AdditiveAutoencoder(), torch.tensor([0, 0, 0, 1, 1, 3]).repeat(400).view(-1, K))
    for block in head.blocks:
        P = block(torch.randn(D), torch.randn(D))
        torch.testing.assert_close(P, torch.tensor([1201, 801, 1, 401, 1]) / 2405)


def test_in_evaluation_the_loss_is_the_papers():
    model = tiny_calm()
    choices = ChoiceCALM(model.config, model.autoencoder).eval()
    tokens = torch.randint(13, (2, 32))
    torch.manual_seed(0)
    found = choices(tokens)
    torch.manual_seed(0)
    expected = CALM.forward(choices, tokens)
    assert found[0] == expected[0] and found[1] == expected[1] and set(found[1]) == {"fidelity", "diversity"}
    choices.train()
    hidden = choices.hidden_states(tokens)[:, :-1]
    torch.testing.assert_close(choices(tokens)[0], choices.head.loss(hidden, tokens.view(2, 8, 4)[:, 1:], alpha=0.5))


@pytest.mark.parametrize("a", [AutoencoderConfig(50, 4, 16, 32, 80), AutoencoderConfig(20, 1, 8, 64, 128), AutoencoderConfig(9, 8, 64, 32, 64)])
def test_flops(a):
    config = CALMConfig(a.vocab_size, a.chunk_size, a.latent_size, 32, 64, n_layers=2, n_heads=2, context=64)
    model, tokens = ChoiceCALM(config, Autoencoder(a)), torch.randint(a.vocab_size, (3, 64))
    training, inference = model.flops_per_token(draws=5)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)[0].backward()
    once_a_step = a.chunk_size * 2 * a.vocab_size**2 * a.latent_size  # distances between codes
    assert (counter.get_total_flops() - once_a_step) / tokens.numel() == pytest.approx(training, rel=1e-9)
    model.eval()
    history = tokens[:, : -a.chunk_size]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.draw_chunks(model.hidden_states(history), 5)
    assert counter.get_total_flops() / history.numel() == pytest.approx(inference, rel=1e-9)


# The recipes as settings


def test_the_released_recipe_has_the_released_first_weights():
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(40, 4, 8, 32, 64))
    before = [p.clone() for p in autoencoder.parameters()]
    model = build_calm("released", CALMConfig(40, 4, 8, 64, 128, n_layers=1, n_heads=2), autoencoder, None)
    assert not model.head.final_out.weight.any()
    for name, p in model.named_parameters():
        if p.requires_grad and p.dim() == 2 and name != "head.final_out.weight":
            assert 0.015 < p.std() < 0.025, name
    assert all(torch.equal(a, b) for a, b in zip(before, autoencoder.parameters()))
    assert type(model) is CALM


@pytest.mark.parametrize(
    "flags, lr, n_samples",
    [("", 3e-3, 4), ("--recipe released", 3e-4, 8), ("--recipe released --lr 1e-3", 1e-3, 8), ("--recipe energy", 2e-3, 4), ("--stage baseline", 2e-3, 4)],
)
def test_a_recipe_brings_its_settings_and_a_flag_overrides_them(flags, lr, n_samples, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *flags.split()])
    settings, _ = train.parse_settings()
    assert (settings.lr, settings.n_samples) == (lr, n_samples)
    assert settings.recipe == (flags.split()[1] if "--recipe" in flags else "choices")


def test_a_checkpoint_brings_its_head_back(tmp_path):
    encoding = sample.make_encoding({bytes([b]): b for b in range(256)})
    autoencoder = Autoencoder(AutoencoderConfig(257, 4, 8, 16, 32))
    config = CALMConfig(257, 4, 8, 16, 32, n_layers=1, n_heads=2, context=32)
    model = build_calm("choices", config, autoencoder, torch.randint(257, (100, 4))).eval()
    configs = {"calm_config": asdict(config), "autoencoder_config": asdict(autoencoder.config)}
    train.save_checkpoint(tmp_path, "calm", model, encoding, recipe="choices", summary={}, **configs)
    loaded, _, _ = sample.load_model(tmp_path, "calm")
    prompt = torch.randint(257, (2, 8))
    texts = [sample.generate(m, prompt, 20, 0.5, generator=torch.Generator().manual_seed(0)) for m in (model, loaded)]
    assert torch.equal(*texts)


# What small runs learn


def test_words_are_two_letters_or_more_and_whole():
    assert words_of("The cat's a fée, 2x 3abc-de\nend") == ["The", "cat", "fée", "abc", "de"]
    assert share_of_words(["The cat ", "tho cat ca"], {"The", "cat"}) == (3 / 4, 4)


def test_mixed_precision_leaves_the_score_of_choices_in_float32():
    """Codes that differ by a hundredth of their size: bfloat16, whose numbers have 8 bits, would take them for equal."""
    torch.manual_seed(0)
    head = ChoiceHead(16, 8, 2, 5)
    head.codes.copy_(1 + 0.01 * torch.randn(2, 5, 8))
    hidden, tokens = torch.randn(50, 16), torch.randint(5, (50, 2))
    with torch.no_grad():
        full = head.loss(hidden, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = head.loss(hidden, tokens)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, full, rtol=0.02, atol=0)
