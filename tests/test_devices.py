"""Each model on other devices, in mixed precision and compiled. The `meta` device holds shapes without
numbers: a tensor made on a wrong device raises there, and so does one whose value is read.
"""

import pytest
import torch
from conftest import tiny_calm

from calm import TransformerConfig, TransformerLM, draw_continuations
from sample import generate

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
MODELS = ["autoencoder", "calm", "transformer"]


def model_and_tokens(name, device="cpu", K=4):
    """A model in training mode and a batch for it, the same whenever they are made."""
    model, tokens = tiny_calm(K), torch.randint(1, 13, (8, 32))
    if name == "autoencoder":
        model, tokens = model.autoencoder.requires_grad_(True), tokens.view(-1, K)
    if name == "transformer":
        model = TransformerLM(TransformerConfig(13, 16, 32, 2, 2, context=32))
    return model.to(device).train(), tokens.to(device)


def step(model, tokens, forward=None):
    """The loss and the gradients of one training step with a seed of its own."""
    torch.manual_seed(1)
    loss, metrics = (forward or model)(tokens)
    loss.backward()
    assert not any(metric.requires_grad for metric in metrics.values())
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# Shapes only


@pytest.mark.parametrize("name", MODELS)
def test_a_training_step_makes_no_tensor_elsewhere_and_reads_none_back(name):
    loss, gradients = step(*model_and_tokens(name, "meta"))
    assert loss.is_meta and loss.shape == ()
    assert all(gradient is not None and gradient.is_meta for gradient in gradients.values())


@pytest.mark.parametrize("name, K", [("calm", 4), ("calm", 2), ("transformer", 1)])
def test_drawing_makes_no_tensor_elsewhere_and_reads_none_back(name, K):
    model, tokens = model_and_tokens(name, "meta", K)
    hidden = model.hidden_states(tokens)
    if name == "calm":
        assert model.head.sample(hidden, 3).shape == (3, 8, 32 // K, 8)
    chunks = model.draw_chunks(hidden, 3)
    assert chunks.is_meta and chunks.shape == (3, 8, 32 // K, K)
    text = generate(model, tokens[:, :8], 40)  # longer than the context
    assert text.is_meta and text.shape == (8, 48)
    drawn, target = draw_continuations(model, tokens, [0, 2], 3)
    assert drawn.is_meta and drawn.shape == (3, 8, 2, 4) and target.shape == (8, 2, 4)


# Mixed precision


def assert_autocast_is_close(name, device):
    model, tokens = model_and_tokens(name, device)
    plain, _ = step(model, tokens)
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast(device, torch.bfloat16):
        loss, _ = model(tokens)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.02, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", MODELS)
def test_a_bfloat16_step_is_close_to_float32(name):
    assert_autocast_is_close(name, "cpu")


@needs_cuda
@pytest.mark.parametrize("name", MODELS)
def test_a_bfloat16_step_on_cuda_is_close_to_float32(name):
    assert_autocast_is_close(name, "cuda")


# Compiled


@pytest.mark.parametrize("name", MODELS)
def test_a_step_compiles_whole_and_stays_the_same(name):
    model, tokens = model_and_tokens(name)
    plain = step(model, tokens)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(model, tokens, compiled), plain)


@needs_cuda
def test_a_compiled_step_on_cuda_is_close_to_the_plain_one():
    model, tokens = model_and_tokens("transformer", "cuda")  # nothing in it is random
    plain = step(model, tokens)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(step(model, tokens, compiled), plain, rtol=1e-3, atol=1e-5)
