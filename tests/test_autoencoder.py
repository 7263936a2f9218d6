import math

import pytest
import torch
import torch.nn.functional as F
from conftest import SEEDS
from torch.distributions import Normal

from autoencoder import Autoencoder, AutoencoderConfig, kl_divergence


def tiny(**changes):
    sizes = {"latent_size": 6, "hidden_size": 16, "intermediate_size": 32}
    return Autoencoder(AutoencoderConfig(vocab_size=11, **sizes | changes))


def loss_of(model, latent, inputs, tokens):
    """K · cross-entropy of a latent vector's logits + beta · KL of the inputs' posterior."""
    cross_entropy = F.cross_entropy(model.decode(latent).flatten(0, -2), tokens.flatten())
    return 4 * cross_entropy + 1e-3 * kl_divergence(*model.encode(inputs), floor=0.5).mean()


def test_kl_is_the_textbook_formula():
    mean, log_std = torch.randn(2, 5, 3, 7).double()
    prior = Normal(torch.zeros(7).double(), 1)
    textbook = torch.distributions.kl_divergence(Normal(mean, log_std.exp()), prior)
    torch.testing.assert_close(kl_divergence(mean, log_std), textbook.sum(-1))


def test_each_dimension_is_floored_before_the_sum_and_not_pulled_below_the_floor():
    mean = torch.tensor([3.0, 0.0, 0.1], requires_grad=True)  # KL of the dimensions: 4.5, 0, 0.005
    kl = kl_divergence(mean, torch.zeros(3), floor=0.5)
    assert kl.item() == pytest.approx(4.5 + 0.5 + 0.5)
    kl.backward()
    assert mean.grad.tolist() == pytest.approx([3.0, 0.0, 0.0])


def test_in_evaluation_nothing_is_damaged():
    model, tokens = tiny().eval(), torch.randint(1, 11, (50, 4))
    mean, log_std = model.encode(tokens)
    loss, metrics = model(tokens)
    kl = kl_divergence(mean, log_std, model.config.kl_floor).mean()
    torch.testing.assert_close(metrics["kl"], kl, msg="metrics['kl'] is wrong")
    torch.testing.assert_close(loss, loss_of(model, mean, tokens, tokens))
    right = model.decode(mean).argmax(-1) == tokens
    torch.testing.assert_close(metrics["accuracy"], right.float().mean())
    # In training an argmax over the vocabulary would be thrown away at every step.
    assert model.train()(tokens)[1].keys() == {"reconstruction", "kl"}


def test_the_noise_of_the_second_accuracy_has_a_std_of_0_3_in_evaluation():
    """H0: the second vector that is decoded is mean + 0.3 · noise. n = 60 000; 4.5 sigma."""
    model, tokens, seen = tiny().eval(), torch.randint(11, (10_000, 4)), []
    model.from_latent.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens)
    noise = seen[1].flatten(0, -2) - model.encode(tokens)[0]
    assert abs(noise.mean().item()) < 4.5 * 0.3 / math.sqrt(60_000)
    assert abs(noise.std().item() - 0.3) < 4.5 * 0.3 / math.sqrt(120_000)


def test_with_all_dropped_the_decoder_reads_zeros_and_must_say_the_tokens():
    """With all dropped, the encoder reads zeros, the decoder too, and must still say the tokens."""
    model, tokens = tiny(dropout=1.0).train(), torch.randint(1, 11, (50, 4))
    torch.nn.init.normal_(model.from_latent.bias)  # or z = 0 would make all tokens as probable
    expected = loss_of(model, torch.zeros(50, 6), torch.zeros_like(tokens), tokens)
    torch.testing.assert_close(model(tokens)[0], expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_and_latent_coordinates_are_dropped_at_the_right_rate(seed):
    """H0: each drops with probability 0.15. n = 40 000 tokens, 60 000 coordinates; 4.5 sigma."""
    model = tiny().train()
    torch.manual_seed(seed)
    seen = []
    for module in (model.embedding, model.from_latent):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.randint(1, 11, (10_000, 4)))  # no token is 0 by itself
    for inputs in seen:
        dropped = (inputs == 0).float()
        sigma = math.sqrt(0.15 * 0.85 / dropped.numel())
        assert abs(dropped.mean().item() - 0.15) < 4.5 * sigma
    z = seen[1].flatten(0, -2)
    assert (z == 0).all(-1).sum() < 10, "coordinates are dropped one by one, not whole vectors"
    # What is left is scaled up, so that the mean of z stays. H0: the slope of z over mean is 1.
    mean, log_std = model.encode(seen[0].flatten(0, -2))
    variance = (mean**2 + (2 * log_std).exp()) / 0.85 - mean**2
    slope = (z * mean).sum() / mean.square().sum()
    sigma = (mean**2 * variance).sum().sqrt() / mean.square().sum()
    assert abs(slope - 1) < 4.5 * sigma


@pytest.mark.parametrize("seed", SEEDS)
def test_training_decodes_a_draw_of_the_posterior(seed):
    """H0: (z - mean) / std is standard normal. n = 60 000; mean and variance within 4.5 sigma."""
    model = tiny(dropout=0.0).train()
    torch.manual_seed(seed)
    tokens, seen = torch.randint(11, (10_000, 4)), []
    model.from_latent.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(tokens)
    mean, log_std = model.encode(tokens)
    noise = (seen[0].flatten(0, -2) - mean) / log_std.exp()
    assert abs(noise.mean().item()) < 4.5 / math.sqrt(60_000)
    assert abs(noise.var().item() - 1) < 4.5 * math.sqrt(2 / 60_000)


def test_the_gradient_passes_through_the_draw_to_mean_and_std():
    model = tiny(dropout=0.0, kl_weight=0.0).train()
    model(torch.randint(11, (50, 4)))[0].backward()
    gradient = model.to_posterior.weight.grad
    assert gradient is not None, "the draw must be a function of mean and std: see the hints"
    assert gradient.view(2, -1).norm(dim=1).min() > 0  # the rows of the mean, and of log std
