import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SEEDS
from torch.distributions import Normal

from autoencoder import Autoencoder, AutoencoderConfig, InputError, kl_divergence


def tiny(**changes):
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(**{"vocab_size": 11, "latent_size": 6, "hidden_size": 16, "intermediate_size": 32, **changes}))


def inputs_of(module, run):
    """What a module of the network is given while run() runs."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    run()
    hook.remove()
    return seen[0]


# The KL divergence


def test_kl_is_the_textbook_formula():
    mean, log_std = torch.randn(5, 3, 7).double(), torch.randn(5, 3, 7).double()
    textbook = torch.distributions.kl_divergence(Normal(mean, log_std.exp()), Normal(torch.zeros(7).double(), torch.ones(7).double()))
    torch.testing.assert_close(kl_divergence(mean, log_std), textbook.sum(-1))


def test_kl_floor_is_applied_to_each_dimension_before_the_sum():
    mean, log_std = torch.tensor([3.0, 0.0, 0.1]), torch.zeros(3)  # KL of the dimensions: 4.5, 0 and 0.005
    assert kl_divergence(mean, log_std, floor=0.5).item() == pytest.approx(4.5 + 0.5 + 0.5)


def test_a_dimension_under_the_floor_is_not_pulled_towards_the_prior():
    mean = torch.tensor([3.0, 0.1], requires_grad=True)
    kl_divergence(mean, torch.zeros(2), floor=0.5).backward()
    assert mean.grad.tolist() == pytest.approx([3.0, 0.0])


# The network


@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
def test_shapes_for_any_chunk_size_and_leading_dimensions(K):
    model = tiny(chunk_size=K)
    for leading in [(), (3,), (2, 3)]:
        mean, log_std = model.encode(torch.randint(11, (*leading, K)))
        assert mean.shape == log_std.shape == (*leading, 6)
        assert model.decode(mean).shape == (*leading, K, 11)
        assert model.decode_tokens(mean).shape == (*leading, K)


def test_decode_tokens_in_slices_is_the_argmax_of_decode():
    model, latent = tiny(), torch.randn(3, 17, 6)
    assert torch.equal(model.decode_tokens(latent, max_logits=5 * 4 * 11), model.decode(latent).argmax(-1))


def test_chunks_do_not_see_each_other():
    model = tiny()
    tokens = torch.randint(11, (3, 4))
    changed = tokens.clone()
    changed[1, 2] = (changed[1, 2] + 1) % 11
    before, after = model.encode(tokens)[0], model.encode(changed)[0]
    assert torch.equal(before[[0, 2]], after[[0, 2]]) and not torch.equal(before[1], after[1])


def test_half_of_the_blocks_stand_on_either_side_of_the_squeeze():
    model = tiny(n_encoder_layers=4, n_decoder_layers=2)
    tokens = torch.randint(11, (5, 4))
    for i, shape in enumerate([(5, 4, 16), (5, 4, 16), (5, 16), (5, 16)]):
        assert inputs_of(model.encoder_blocks[i], lambda: model.encode(tokens)).shape == shape
    for i, shape in enumerate([(5, 16), (5, 4, 16)]):
        assert inputs_of(model.decoder_blocks[i], lambda: model.decode(torch.randn(5, 6))).shape == shape


def test_the_embedding_is_tied():
    model = tiny()
    assert [name for name, p in model.named_parameters() if 11 in p.shape] == ["embedding.weight"]
    model.decode(torch.randn(5, 6)).square().sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0  # the decoder uses it too


# The loss


def test_in_evaluation_nothing_is_damaged():
    model = tiny().eval()
    tokens = torch.randint(1, 11, (50, 4))
    loss, metrics = model(tokens)
    mean, log_std = model.encode(tokens)
    cross_entropy = F.cross_entropy(model.decode(mean).flatten(0, -2), tokens.flatten())
    torch.testing.assert_close(loss, 4 * cross_entropy + 1e-3 * kl_divergence(mean, log_std, 0.5).mean())
    assert metrics["reconstruction"] == pytest.approx(4 * cross_entropy.item(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((model.decode(mean).argmax(-1) == tokens).float().mean().item())


def test_the_damage_of_training_spares_the_targets():
    """With everything dropped, the encoder reads zeros and the decoder sees the zero latent, but must still say the tokens."""
    model = tiny(dropout=1.0).train()
    torch.nn.init.normal_(model.from_latent.bias)  # with all biases 0 the logits would be 0, and every target as good
    tokens = torch.randint(1, 11, (50, 4))
    loss, _ = model(tokens)
    mean, log_std = model.encode(torch.zeros_like(tokens))
    cross_entropy = F.cross_entropy(model.decode(torch.zeros(50, 6)).flatten(0, -2), tokens.flatten())
    torch.testing.assert_close(loss, 4 * cross_entropy + 1e-3 * kl_divergence(mean, log_std, 0.5).mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_drop_token_and_latent_dropout_have_the_right_rate(seed):
    """H0: each token, and each latent coordinate, is dropped with probability 0.15. n = 40 000 and 60 000; 4.5 sigma, p < 1e-5."""
    model = tiny().train()
    torch.manual_seed(seed)
    tokens = torch.randint(1, 11, (10_000, 4))  # no token is 0 by itself
    for module, n in ((model.embedding, 40_000), (model.from_latent, 60_000)):
        seen = inputs_of(module, lambda: model(tokens))
        dropped = (seen == 0).float().mean().item()
        assert abs(dropped - 0.15) < 4.5 * math.sqrt(0.15 * 0.85 / n)


@pytest.mark.parametrize("seed", SEEDS)
def test_training_decodes_a_draw_of_the_posterior(seed):
    """H0: without dropout, (z - mean) / std is standard normal. n = 60 000; mean and variance within 4.5 sigma, p < 1e-5."""
    model = tiny(dropout=0.0).train()
    torch.manual_seed(seed)
    tokens = torch.randint(11, (10_000, 4))
    latent = inputs_of(model.from_latent, lambda: model(tokens))
    mean, log_std = model.encode(tokens)
    standardised = ((latent - mean) / log_std.exp()).flatten()
    assert abs(standardised.mean().item()) < 4.5 / math.sqrt(60_000)
    assert abs(standardised.var().item() - 1) < 4.5 * math.sqrt(2 / 60_000)


def test_accuracy_falls_with_noise_on_a_trained_model():
    model = tiny().train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimiser.zero_grad()
        model(torch.randint(11, (128, 4)))[0].backward()
        optimiser.step()
    tokens = torch.randint(11, (2000, 4))
    accuracies = [model.accuracy(tokens, noise) for noise in (0.0, 1.0, 10.0)]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[0] - accuracies[2] > 0.3


def test_impossible_configs_are_refused():
    for wrong in ({"n_encoder_layers": 3}, {"chunk_size": 0}, {"n_decoder_layers": -2}):
        with pytest.raises(InputError):
            AutoencoderConfig(**{"vocab_size": 11, **wrong})
