"""Checkpoints of the authors: golden/ holds tiny ones, and what their code computes with them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

import sample
from autoencoder import Autoencoder, kl_divergence
from calm import CALM, brier_score
from energy_head import energy_score
from sample import generate, load_released_autoencoder, load_released_calm

GOLDEN = Path(__file__).parent / "golden"


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
    autoencoder = load_released_autoencoder(GOLDEN / name / "autoencoder")
    mean, log_std = autoencoder.encode(e["ids"].view(-1, autoencoder.config.chunk_size))
    assert_close(mean, e["enc_mean"])
    assert_close(log_std, e["enc_log_std"])
    assert_close(autoencoder.decode(e["enc_mean"]), e["dec_logits"])
    model = load_released_calm(GOLDEN / name / "calm")
    assert_close(model.compress(e["ids"]), e["compressed"])
    assert_close(model.hidden_states(e["ids"]), e["hidden"])
    assert_close(model.head(e["hidden"], e["head_noise"]), e["head_latents"])
    assert_same_weights(model.autoencoder, autoencoder)  # its own copy, unless another is given
    assert load_released_calm(GOLDEN / name / "calm", autoencoder).autoencoder is autoencoder
    targets = e["es_mean"] + e["es_eps"] * e["es_log_std"].exp()
    assert_close(energy_score(e["es_x"], targets), e["es_score"])
    assert_close(kl_divergence(e["es_mean"], e["es_log_std"], 0.5).mean(), e["kl_clamped"])
    if "brier" in e:
        brier = brier_score(e["brier_p1"], e["brier_p2"], e["brier_y"])
        assert_close(brier.mean((0, 1)), e["brier"])


@pytest.mark.parametrize("K", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_chunk_size_in_the_released_layout(K, dtype, tmp_path):
    folder = GOLDEN / "k4/calm"
    golden = load_released_calm(folder)
    autoencoder = Autoencoder(replace(golden.autoencoder.config, chunk_size=K))
    model = CALM(replace(golden.config, chunk_size=K), autoencoder).to(dtype)
    # golden/k4 shows the released names: all its tensors differ, so equal ones tell which is which.
    weights, ours, golden = {}, model.state_dict(), golden.state_dict()
    for name, tensor in torch.load(folder / "pytorch_model.bin", weights_only=True).items():
        [same] = [key for key in golden if torch.equal(golden[key], tensor)]
        weights[name] = ours[same].clone()
    for i in (0, 1):  # in two files; golden/ has one
        part = dict(list(weights.items())[i::2])
        torch.save(part, tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    config = json.loads((folder / "config.json").read_text()) | {"patch_size": K}
    (tmp_path / "config.json").write_text(json.dumps(config))

    loaded = load_released_calm(tmp_path)
    assert_same_weights(loaded, model)
    assert loaded.config.context == K * config["max_position_embeddings"] and not loaded.training
    assert generate(loaded, torch.randint(97, (1, 8)), 8, 0.5, pool=10).shape == (1, 16)


@pytest.fixture
def folder(tmp_path):
    """A copy of golden/k4/calm, to be spoilt."""
    shutil.copytree(GOLDEN / "k4/calm", tmp_path / "calm")
    return tmp_path / "calm"


def refusal(folder, command):
    """The one sentence that says why a folder cannot be loaded."""
    said = command(sample.main, "--pretrained", folder)
    assert len(said) < 500
    return said


@pytest.mark.parametrize("name, value", [
    ("rope_theta", 500_000.0), ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("rms_norm_eps", 1e-5), ("hidden_act", "gelu"), ("num_key_value_heads", 2),
    ("attention_bias", True), ("mlp_bias", True),
])  # fmt: skip
def test_a_config_that_asks_for_another_computation_is_refused(folder, name, value, command):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    assert name in refusal(folder, command)


@pytest.mark.parametrize("name, tensor, word", [
    ("layers.2.", None, "Missing"), ("ae_", None, "encoder_blocks"),
    ("bias_of_something", torch.ones(3), "bias_of_something"),
    ("transformer.norm.weight", torch.ones(3), "size mismatch"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(folder, name, tensor, word, command):
    """None stands for weights that are lost."""
    file = folder / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    if tensor is None:
        weights = {key: weight for key, weight in weights.items() if name not in key}
    else:
        weights[name] = tensor
    torch.save(weights, file)
    assert word in refusal(folder, command)


@pytest.mark.parametrize("file, content, word", [
    ("config.json", b"<html>Not found</html>", "does not hold"),
    ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1", "not the file but a note"),
    ("pytorch_model.bin", b"PK\x03\x04", "not the file but a note"),
])  # fmt: skip
def test_a_file_that_is_another_is_refused(folder, file, content, word, command):
    (folder / file).write_bytes(content)
    assert word in refusal(folder, command)


def test_another_autoencoder_computes_in_the_precision_of_the_model(folder):
    file = folder / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    torch.save({name: weight.bfloat16() for name, weight in weights.items()}, file)
    model = load_released_calm(folder, load_released_autoencoder(GOLDEN / "k4/autoencoder"))
    assert generate(model, torch.randint(97, (1, 8)), 8).shape == (1, 16)
    assert model(torch.randint(97, (1, 16)))[0].isfinite()
