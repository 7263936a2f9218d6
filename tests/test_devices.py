"""The models on other devices, in mixed precision, compiled. The device `meta` has shapes alone:
what is made elsewhere raises, and so does a value that is read."""

import pytest
import torch
from conftest import tiny_calm

from calm import TransformerConfig, TransformerLM, draw_continuations
from sample import generate

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
models = pytest.mark.parametrize("name", ["autoencoder", "calm", "transformer"])


def model_and_tokens(name, device, K=4):
    """A model in training mode and a batch for it, the same whenever they are made."""
    model, tokens = tiny_calm(K), torch.randint(1, 13, (8, 32))
    if name == "autoencoder":
        model, tokens = model.autoencoder.requires_grad_(True), tokens.view(-1, K)
    if name == "transformer":
        model = TransformerLM(TransformerConfig(13, 16, 32, 2, 2, context=32))
    return model.to(device).train(), tokens.to(device)


def step(model, tokens, precision=torch.float32):
    """The loss and the gradients of a training step, always with the same seed."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast(tokens.device.type, precision, enabled=precision != torch.float32):
        loss, _ = model(tokens)
    loss.backward()
    return loss, [p.grad for p in model.parameters() if p.requires_grad]


@models
def test_a_training_step_makes_no_tensor_elsewhere_and_reads_none(name):
    model, tokens = model_and_tokens(name, "meta")
    loss, metrics = model(tokens)
    loss.backward()
    assert all(value.is_meta and value.shape == () for value in (loss, *metrics.values()))
    assert not any(metric.requires_grad for metric in metrics.values())
    assert all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name, K", [("calm", 4), ("calm", 2), ("transformer", 1)])
def test_drawing_makes_no_tensor_elsewhere_and_reads_none(name, K):
    model, tokens = model_and_tokens(name, "meta", K)
    hidden = model.hidden_states(tokens)
    if name == "calm":
        assert model.head.sample(hidden, 3).shape == (3, 8, 32 // K, 8)
    assert model.draw_chunks(hidden, 3).shape == (3, 8, 32 // K, K)
    assert generate(model, tokens[:, :8], 40).shape == (8, 48)  # more than a context
    drawn, target = draw_continuations(model, tokens, [0, 2], 3)
    assert drawn.is_meta and drawn.shape == (3, 8, 2, 4) and target.shape == (8, 2, 4)


@models
@pytest.mark.parametrize("device", DEVICES)
def test_a_bfloat16_step_is_close_to_float32(name, device):
    model, tokens = model_and_tokens(name, device)
    plain, _ = step(model, tokens)
    loss, gradients = step(model, tokens, torch.bfloat16)
    assert loss.dtype == torch.float32 and all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(loss, plain, rtol=0.02, atol=0)


@models
def test_a_step_compiles_whole_and_stays_the_same(name):
    model, tokens = model_and_tokens(name, "cpu")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, tokens), step(model, tokens))


@CUDA
def test_a_compiled_step_on_cuda_is_close_to_the_plain_one():
    model, tokens = model_and_tokens("transformer", "cuda")  # nothing in it is random
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(step(compiled, tokens), step(model, tokens), rtol=1e-3, atol=1e-5)
