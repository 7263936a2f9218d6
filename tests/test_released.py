"""
Checkpoints in the layout of the released ones. golden/ holds two tiny models with random weights, saved by the authors'
released code, and in expected.npz what that code computes with them (float32, CPU) for the inputs that are in it too.
"""

import json
import os
import re
import shutil
import struct

import numpy
import pytest
import torch
from conftest import tiny_calm

import sample
from autoencoder import Autoencoder, InputError, kl_divergence
from calm import CALM, brier_score, evaluate_brier
from classroom.released import CALM_NAMES
from energy_head import energy_score

GOLDEN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "golden")


def relative_error(ours, expected):
    ours, expected = torch.as_tensor(ours).detach().double(), torch.as_tensor(expected).double()
    assert ours.shape == expected.shape
    return ((ours - expected).norm() / expected.norm()).item()


# What the released code computes


@pytest.fixture(scope="module", params=["k4", "k2"])
def golden(request):
    folder = os.path.join(GOLDEN, request.param)
    with numpy.load(os.path.join(folder, "expected.npz")) as arrays:
        return folder, {name: torch.from_numpy(arrays[name]) for name in arrays}


@torch.no_grad()
def test_the_autoencoder_computes_the_same(golden):
    folder, expected = golden
    model = Autoencoder.from_pretrained(os.path.join(folder, "autoencoder"))
    mean, log_std = model.encode(expected["ids"].view(-1, model.config.chunk_size))
    assert relative_error(mean, expected["enc_mean"]) < 1e-5
    assert relative_error(log_std, expected["enc_log_std"]) < 1e-5
    assert relative_error(model.decode(expected["enc_mean"]), expected["dec_logits"]) < 1e-5


@torch.no_grad()
def test_the_language_model_computes_the_same(golden):
    folder, expected = golden
    model = CALM.from_pretrained(os.path.join(folder, "calm"))
    assert relative_error(model.compress(expected["ids"]), expected["compressed"]) < 1e-5
    assert relative_error(model.hidden_states(expected["ids"]), expected["hidden"]) < 1e-5
    assert relative_error(model.head(expected["hidden"], expected["head_noise"]), expected["head_latents"]) < 1e-5


def test_the_scores_compute_the_same(golden):
    _, expected = golden
    targets = expected["es_mean"] + expected["es_eps"] * expected["es_log_std"].exp()
    assert relative_error(energy_score(expected["es_x"], targets), expected["es_score"]) < 1e-5
    kl = kl_divergence(expected["es_mean"], expected["es_log_std"], floor=0.5).mean()
    assert relative_error(kl, expected["kl_clamped"]) < 1e-5
    if "brier" in expected:
        estimate = brier_score(expected["brier_p1"], expected["brier_p2"], expected["brier_y"])
        assert relative_error(estimate.mean((0, 1)), expected["brier"]) < 1e-5


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_frozen_copy_is_the_autoencoder_and_another_may_be_given(golden):
    folder, _ = golden
    autoencoder = Autoencoder.from_pretrained(os.path.join(folder, "autoencoder"))
    own = CALM.from_pretrained(os.path.join(folder, "calm"))
    assert same_weights(own.autoencoder, autoencoder) and not any(p.requires_grad for p in own.autoencoder.parameters())
    with torch.no_grad():
        autoencoder.squeeze.bias += 1
    for other in (autoencoder, os.path.join(folder, "autoencoder")):
        model = CALM.from_pretrained(os.path.join(folder, "calm"), other)
        assert same_weights(model.autoencoder, own.autoencoder) == isinstance(other, str)
        assert same_weights(model.head, own.head) and same_weights(model.backbone, own.backbone)


# Layouts


def write_safetensors(path, tensors, aligned=True):
    """The format by its description: the header's length in 8 bytes, the header as JSON (and spaces), the tensors' bytes."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b""
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + (not aligned))
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_released(folder, weights, config, layout="bin"):
    """A folder of the released layout: weights {released name: tensor} and the config, in one file or in two parts."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    suffix = "safetensors" if "safetensors" in layout else "bin"
    name = {"bin": "pytorch_model", "safetensors": "model"}[suffix]
    parts = {f"{name}.{suffix}": weights}
    if layout.startswith("sharded"):
        items = list(weights.items())
        parts = {f"{name}-0000{i}-of-00002.{suffix}": dict(items[i - 1 :: 2]) for i in (1, 2)}
        index = {"metadata": {}, "weight_map": {key: file for file, part in parts.items() for key in part}}
        (folder / f"{name}.{suffix}.index.json").write_text(json.dumps(index))
    for file, part in parts.items():
        write_safetensors(folder / file, part) if suffix == "safetensors" else torch.save(part, folder / file)
    return folder


def read_golden(name):
    folder = os.path.join(GOLDEN, name)
    with open(os.path.join(folder, "config.json")) as f:
        return torch.load(os.path.join(folder, "pytorch_model.bin"), weights_only=True), json.load(f)


@pytest.mark.parametrize("layout", ["safetensors", "sharded bin", "sharded safetensors"])
def test_every_layout_holds_the_same_model(layout, tmp_path):
    for name, read in (("k2/autoencoder", Autoencoder.from_pretrained), ("k2/calm", CALM.from_pretrained)):
        folder = write_released(tmp_path / name[3:], *read_golden(name), layout)
        assert same_weights(read(folder), read(os.path.join(GOLDEN, name)))


def test_safetensors_that_are_not_aligned(tmp_path):
    weights, config = read_golden("k2/calm")
    folder = write_released(tmp_path / "calm", weights, config, "safetensors")
    write_safetensors(folder / "model.safetensors", weights, aligned=False)
    assert same_weights(CALM.from_pretrained(folder), CALM.from_pretrained(os.path.join(GOLDEN, "k2", "calm")))


def as_released(model):
    """Our CALM as the released code would save it: (weights under released names, config)."""
    back = {}  # our name -> all its released names
    for released, here in CALM_NAMES.items():
        back.setdefault(here, set()).add(released)
    weights = {}
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        number = re.search(r"(?<=blocks\.)\d+", module)
        pattern = module.replace(f"blocks.{number[0]}", "blocks.*") if number else module
        for released in back[pattern]:
            weights[f"{released}.{kind}".replace("*", number[0] if number else "*")] = tensor.clone()
        for released in back.get(name, ()):
            weights[released] = tensor.clone()
    c = model.config
    config = {
        "architectures": ["EnergyTransformer"], "ae_path": "/nowhere", "beta": 1.0, "hidden_act": "silu", "mlp_bias": False,
        "vocab_size": c.vocab_size, "patch_size": c.chunk_size, "latent_size": c.latent_size, "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size, "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_heads, "noise_size": c.noise_size, "num_mlp_layers": c.n_head_blocks,
        "num_samples": c.n_samples, "max_position_embeddings": c.context, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    return weights, config


@pytest.mark.parametrize("K", [1, 2, 4, 8])
def test_other_sizes_in_the_released_layout(K, tmp_path):
    model = tiny_calm(K, vocab_size=29)
    loaded = CALM.from_pretrained(write_released(tmp_path / "calm", *as_released(model)))
    assert same_weights(loaded, model)
    tokens = torch.randint(29, (2, 32))
    assert torch.equal(loaded.hidden_states(tokens), model.hidden_states(tokens))
    assert evaluate_brier(loaded, tokens.flatten(), 16)["positions"] > 0


def test_bfloat16_weights_stay_so_and_work(tmp_path):
    model = tiny_calm(vocab_size=29)
    weights, config = as_released(model.bfloat16())
    for layout in ("bin", "safetensors"):
        loaded = CALM.from_pretrained(write_released(tmp_path / layout, weights, config, layout))
        assert same_weights(loaded, model) and {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert sample.generate(loaded, torch.randint(29, (1, 8)), 8, temperature=0.5, pool=10).shape == (1, 16)
        assert loaded(torch.randint(29, (2, 32)))[0].isfinite()


def test_what_we_save_we_load_bit_for_bit(tmp_path):
    from dataclasses import asdict

    from classroom.texts import train_bpe
    from train import save_checkpoint

    model, encoding = tiny_calm(vocab_size=257), sample.make_encoding(train_bpe(["text"], 256))
    configs = {"autoencoder_config": asdict(model.autoencoder.config), "calm_config": asdict(model.config)}
    save_checkpoint(tmp_path, "calm", model, encoding, summary={}, **configs)
    loaded, same_encoding, _ = sample.load_model(tmp_path, "calm")
    assert same_weights(loaded, model) and loaded.config == model.config
    assert same_encoding.encode_ordinary("some text") == encoding.encode_ordinary("some text")


# The command


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A CALM folder of the released layout with a vocabulary of 600, and a tokenizer.model of the 256 bytes."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "tokenizer.model").write_text(sample.ranks_to_text({bytes([b]): b for b in range(256)}))
    write_released(folder / "calm", *as_released(tiny_calm(vocab_size=600)))
    return folder


def test_sample_writes_with_a_released_model(released, monkeypatch, capsys):
    arguments = ["--pretrained", released / "calm", "--tokenizer", released / "tokenizer.model", "--prompt", "To be,", "--n_tokens", 20]
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, arguments)])
    sample.run(sample.main)
    assert capsys.readouterr().out.startswith("To be,")


def test_the_llama_3_tokenizer(released):
    encoding = sample.load_tokenizer(str(released / "tokenizer.model"))
    assert encoding.n_vocab == 256 + 256 and sample.end_of_text(encoding) == "<|end_of_text|>"
    # The numbers behind Llama 3's 128 000 ranks: 128 000 begins a text, 128 001 ends it, 128 006 and 128 007 enclose a
    # header, 128 009 ends a turn.
    places = {"begin_of_text": 0, "end_of_text": 1, "start_header_id": 6, "end_header_id": 7, "eot_id": 9}
    places |= {"reserved_special_token_0": 2, "reserved_special_token_4": 8, "reserved_special_token_5": 10, "reserved_special_token_250": 255}
    for name, place in places.items():
        assert encoding.encode(f"<|{name}|>", allowed_special="all") == [256 + place]
    for text in ("It's 12345 o'clock\r\n\n  now! ", "Ünïcödé 漢字 🎭"):
        assert encoding.decode(encoding.encode_ordinary(text)) == text


def broken(change):
    """A way to spoil a folder: change(folder, weights, config) may write into the folder, or change the two and return True."""

    def spoil(folder):
        weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
        config = json.loads((folder / "config.json").read_text())
        if change(folder, weights, config) is True:
            write_released(folder, weights, config)

    return spoil


def rename(key, new):
    return lambda folder, weights, config: weights.__setitem__(new, weights.pop(key)) is None


def set_weight(key, tensor):
    return lambda folder, weights, config: weights.__setitem__(key, tensor) is None


def set_field(key, value):
    return lambda folder, weights, config: config.__setitem__(key, value) is None


MALFORMED = {
    "no weights": (lambda folder, *_: (folder / "pytorch_model.bin").unlink(), "pytorch_model.bin"),
    "no config": (lambda folder, *_: (folder / "config.json").unlink(), "config.json"),
    "no JSON": (lambda folder, *_: (folder / "config.json").write_text("{"), "config.json is not a JSON"),
    "a list as config": (lambda folder, *_: (folder / "config.json").write_text("[]"), "config.json is not a JSON"),
    "damaged": (lambda folder, *_: (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 damaged"), "damaged"),
    "truncated": (lambda folder, *_: os.truncate(folder / "pytorch_model.bin", 9000), "damaged"),
    "code in the pickle": (lambda folder, *_: torch.save({"x": os.system}, folder / "pytorch_model.bin"), "pytorch_model.bin"),
    "a list as weights": (lambda folder, *_: torch.save([1, 2], folder / "pytorch_model.bin"), "pytorch_model.bin"),
    "safetensors too short": (lambda folder, *_: (folder / "model.safetensors").write_bytes(b"\xff" * 7), "model.safetensors"),
    "safetensors header": (lambda folder, *_: (folder / "model.safetensors").write_bytes(b"\xff" * 99), "model.safetensors"),
    "empty safetensors": (lambda folder, *_: (folder / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "a shard is missing": (
        lambda folder, *_: (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "part-1.bin"}}'),
        "part-1.bin is missing",
    ),
    "a missing tensor": (lambda f, weights, c: bool(weights.pop("transformer.layers.1.mlp.up_proj.weight").ndim), "transformer.layers.*.mlp.up_proj.weight"),
    "an extra tensor": (set_weight("transformer.layers.0.extra.weight", torch.zeros(3)), "transformer.layers.0.extra.weight"),
    "an extra layer": (set_weight("transformer.layers.9.mlp.up_proj.weight", torch.zeros(32, 16)), "transformer.layers.9.mlp.up_proj"),
    "another name": (rename("transformer.norm.weight", "transformer.last.weight"), "transformer.last.weight"),
    "a wrong shape": (set_weight("embed_proj.0.bias", torch.zeros(3)), "embed_proj.0.bias"),
    "whole numbers as weights": (set_weight("embed_proj.0.bias", torch.zeros(32, dtype=torch.long)), "embed_proj.0.bias"),
    "no tensor": (set_weight("embed_proj.0.bias", "zeros"), "embed_proj.0.bias"),
    "heads that differ": (set_weight("mlp_generator.final_layer.linears.2.bias", torch.ones(8)), "final_layer.linears.2.bias"),
    "embeddings that differ": (set_weight("ae_model.decoder.lm_head_weight", torch.ones(600, 16)), "must equal its other copy"),
    "no frozen copy": (rename("ae_model.encoder.squeeze_layer.weight", "x"), "ae_model.encoder.squeeze_layer.weight"),
    "a diffusion model": (set_field("architectures", ["DiffusionTransformer"]), "architectures"),
    "a flow model": (set_field("architectures", ["FlowTransformer"]), "architectures"),
    "another K": (set_field("patch_size", 2), "patch_size"),
    "a field is missing": (lambda f, w, config: config.pop("noise_size") > 0, "noise_size"),
    "a field is a word": (set_field("hidden_size", "16"), "hidden_size"),
    "a field is a fraction": (set_field("num_hidden_layers", 2.5), "num_hidden_layers"),
    "a field is negative": (set_field("vocab_size", -3), "vocab_size"),
    "another width": (set_field("hidden_size", 32), "asks for"),
    "more layers": (set_field("num_hidden_layers", 3), "transformer.layers.*."),
    "another activation": (set_field("hidden_act", "gelu"), "hidden_act"),
    "grouped queries": (set_field("num_key_value_heads", 1), "num_key_value_heads"),
    "scaled RoPE": (set_field("rope_scaling", {"type": "linear"}), "rope_scaling"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_folder_is_one_sentence(case, released, tmp_path, command):
    change, word = MALFORMED[case]
    folder = tmp_path / "calm"
    shutil.copytree(released / "calm", folder)
    broken(change)(folder)
    assert word in command(sample.main, "--pretrained", folder, "--tokenizer", released / "tokenizer.model")


def test_an_autoencoder_that_does_not_fit_is_one_sentence(released, command):
    wrong = os.path.join(GOLDEN, "k2", "autoencoder")
    line = command(sample.main, "--pretrained", released / "calm", "--autoencoder", wrong, "--tokenizer", released / "tokenizer.model")
    assert "vocab_size 600" in line
    with pytest.raises(InputError, match="chunk_size"):
        weights, config = as_released(tiny_calm(4, vocab_size=61))
        CALM.from_pretrained(write_released(released / "k4", weights, config), wrong)


def test_tokenizers_that_do_not_fit(released, command, tmp_path):
    assert "--tokenizer" in command(sample.main, "--pretrained", released / "calm")
    small = write_released(tmp_path / "small", *as_released(tiny_calm(vocab_size=100)))
    line = command(sample.main, "--pretrained", small, "--tokenizer", released / "tokenizer.model")
    assert "more tokens than the model's vocabulary of 100" in line
