"""
The authors' released checkpoints: `Autoencoder.from_pretrained(folder)` and `CALM.from_pretrained(folder, autoencoder=None)`.

A folder holds config.json and model.safetensors or pytorch_model.bin, perhaps in several parts. What is here is a
translation: of field names and of tensor names, with a check of everything that could not be translated.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from autoencoder import NORM_EPS, Autoencoder, AutoencoderConfig, InputError
from calm import CALM, CALMConfig
from classroom.texts import read_json


def name_table(text):
    """{"a": "b"} from the text "a=b": names in the released code = names here."""
    return dict(pair.split("=") for pair in text.split())


AUTOENCODER_CONFIG = name_table("""
    vocab_size=vocab_size  patch_size=chunk_size  latent_size=latent_size  hidden_size=hidden_size
    intermediate_size=intermediate_size  num_encoder_layers=n_encoder_layers  num_decoder_layers=n_decoder_layers
    ae_dropout=dropout  kl_clamp=kl_floor  kl_weight=kl_weight
""")
CALM_CONFIG = name_table("""
    vocab_size=vocab_size  patch_size=chunk_size  latent_size=latent_size  hidden_size=hidden_size
    intermediate_size=intermediate_size  num_hidden_layers=n_layers  num_attention_heads=n_heads  noise_size=noise_size
    num_mlp_layers=n_head_blocks  num_samples=n_samples  beta=alpha  max_position_embeddings=context  rope_theta=rope_theta
""")
# * is the number of a layer; all but the last go on with .weight or .bias. The last are the tied embedding's numbers once more.
AUTOENCODER_NAMES = name_table("""
    encoder.embed_tokens=embedding  encoder.encoder_layers.*.layernorm=encoder_blocks.*.norm
    encoder.encoder_layers.*.mlp.gate_proj=encoder_blocks.*.mlp.gate  encoder.encoder_layers.*.mlp.up_proj=encoder_blocks.*.mlp.up
    encoder.encoder_layers.*.mlp.down_proj=encoder_blocks.*.mlp.down
    encoder.squeeze_layer=squeeze  encoder.norm=encoder_norm  encoder.hidden_to_latent=to_posterior
    decoder.latent_to_hidden=from_latent  decoder.decoder_layers.*.layernorm=decoder_blocks.*.norm
    decoder.decoder_layers.*.mlp.gate_proj=decoder_blocks.*.mlp.gate  decoder.decoder_layers.*.mlp.up_proj=decoder_blocks.*.mlp.up
    decoder.decoder_layers.*.mlp.down_proj=decoder_blocks.*.mlp.down
    decoder.expand_layer=expand  decoder.norm=decoder_norm  decoder.lm_head_weight=embedding.weight
""")
CALM_NAMES = name_table("""
    transformer.embed_tokens=embedding  embed_proj.0=compression.0  embed_proj.2=compression.2  embed_proj.3=compression.3
    transformer.layers.*.input_layernorm=backbone.blocks.*.attention_norm
    transformer.layers.*.self_attn.q_proj=backbone.blocks.*.attention.query
    transformer.layers.*.self_attn.k_proj=backbone.blocks.*.attention.key
    transformer.layers.*.self_attn.v_proj=backbone.blocks.*.attention.value
    transformer.layers.*.self_attn.o_proj=backbone.blocks.*.attention.out
    transformer.layers.*.post_attention_layernorm=backbone.blocks.*.mlp_norm
    transformer.layers.*.mlp.gate_proj=backbone.blocks.*.mlp.gate  transformer.layers.*.mlp.up_proj=backbone.blocks.*.mlp.up
    transformer.layers.*.mlp.down_proj=backbone.blocks.*.mlp.down  transformer.norm=backbone.norm
""")
HEAD_NAMES = name_table("""
    noise_embd=noise_in  norm_noise=noise_norm  hidden_embd=hidden_in  norm_hidden=hidden_norm  mlp_blocks.*.in_ln=blocks.*.norm
    mlp_blocks.*.linears.0=blocks.*.linear_in  mlp_blocks.*.linears.2=blocks.*.linear_mid
    mlp_blocks.*.linears.4=blocks.*.linear_out  mlp_blocks.*.down_proj=blocks.*.down  final_layer.in_ln=final_norm
    final_layer.linears.0=final_in  final_layer.linears.2=final_out
""")
CALM_NAMES |= {f"ae_model.{released}": f"autoencoder.{here}" for released, here in AUTOENCODER_NAMES.items()}
CALM_NAMES |= {f"generative_head.{released}": f"head.{here}" for released, here in HEAD_NAMES.items()}
CALM_NAMES |= {f"mlp_generator.{released}": f"head.{here}" for released, here in HEAD_NAMES.items()}  # the head once more


def load_autoencoder(folder):
    """See `Autoencoder.from_pretrained`."""
    config = AutoencoderConfig(**read_config(folder, "Autoencoder", AUTOENCODER_CONFIG))
    with torch.device("meta"):  # shapes without memory: the weights are put in their places, not copied
        model = Autoencoder(config)
    return load_released(model, read_weights(folder), AUTOENCODER_NAMES)


def load_calm(folder, autoencoder=None):
    """See `CALM.from_pretrained`. The config's `ae_path` is not followed: it names a folder of the training server."""
    arguments, weights = read_config(folder, "EnergyTransformer", CALM_CONFIG), read_weights(folder)
    # Some configs count positions in tokens and some in chunks; to take them as tokens never exceeds what was trained.
    K = max(1, arguments["chunk_size"])
    config = CALMConfig(**{**arguments, "context": max(2, arguments["context"] // K) * K})
    loaded = {}
    if autoencoder is not None:
        if not isinstance(autoencoder, Autoencoder):
            autoencoder = load_autoencoder(autoencoder)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("ae_model.")}
        loaded = {f"autoencoder.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    with torch.device("meta"):
        model = CALM(config, autoencoder or Autoencoder(config_of_copy(weights, config)))
    return load_released(model, weights, CALM_NAMES, loaded)


def config_of_copy(weights, config):
    """The AutoencoderConfig of the frozen copy in a CALM checkpoint {released name: tensor}: its sizes are those of its tensors."""
    shapes = {name.removeprefix("ae_model."): tuple(tensor.shape) for name, tensor in weights.items() if name.startswith("ae_model.")}
    for name in ("encoder.squeeze_layer.weight", "encoder.encoder_layers.0.mlp.gate_proj.weight"):
        if len(shapes.get(name, ())) != 2:
            raise InputError(f"the weights lack ae_model.{name}: name the folder of an autoencoder.")
    d, inputs = shapes["encoder.squeeze_layer.weight"]
    if inputs != config.chunk_size * d:
        raise InputError(f"ae_model.encoder.squeeze_layer.weight joins {inputs / d:g} tokens, where patch_size is {config.chunk_size}.")
    inner = shapes["encoder.encoder_layers.0.mlp.gate_proj.weight"][0]
    n_layers = [len({name for name in shapes if re.match(rf"{side}\.{side}_layers\.\d+\.layernorm", name)}) for side in ("encoder", "decoder")]
    return AutoencoderConfig(config.vocab_size, config.chunk_size, config.latent_size, d, inner, *n_layers)


def read_config(folder, architecture, fields):
    """Our config's arguments from the released config.json. Raises InputError, naming the field, for a model that is not ours."""
    path, arguments = Path(folder) / "config.json", {}
    released = read_json(path)
    fixed = {"architectures": [architecture], "hidden_act": "silu", "rms_norm_eps": NORM_EPS, "mlp_bias": False,
             "attention_bias": False, "rope_scaling": None,
             "num_key_value_heads": released.get("num_attention_heads")}  # fmt: skip
    for field, value in fixed.items():
        if released.get(field, value) != value:
            raise InputError(f"{path} has {field} = {released[field]!r}, where only {value!r} is implemented here.")
    for field, name in fields.items():
        arguments[name] = value = released.get(field)
        fraction = field in ("ae_dropout", "kl_clamp", "kl_weight", "beta", "rope_theta")
        if type(value) is not int and not (fraction and type(value) is float):
            raise InputError(f"{path} must have a {'' if fraction else 'whole '}number as {field}, not {value!r}.")
    return arguments


def read_weights(folder):
    """{released name: tensor} of all the weight files in a folder, mapped into memory: a page is read when it is first used."""
    folder, weights = Path(folder), {}
    for name in ("model.safetensors", "pytorch_model.bin"):
        files = [folder / name]
        if (index := folder / f"{name}.index.json").exists():
            files = [folder / str(part) for part in dict.fromkeys(read_json(index).get("weight_map", {}).values())]
        elif not files[0].exists():
            continue
        for file in files:
            try:
                if file.suffix == ".safetensors":
                    weights |= load_file(file)
                else:
                    weights |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except FileNotFoundError:
                raise InputError(f"{file} is missing, though {index.name} names it.") from None
            except Exception:  # whatever a damaged file makes torch or safetensors raise
                raise InputError(f"{file} cannot be read: it is damaged, or holds something else than weights.") from None
        return weights
    raise InputError(f"{folder} holds neither model.safetensors nor pytorch_model.bin.")


def load_released(model, weights, names, loaded=None):
    """
    The model, with released weights {released name: tensor} in their places, and the tensors `loaded` {our name: tensor}
    besides. None is copied. Names that stand for one place (tied weights, or a part saved twice) must hold equal tensors.
    Raises InputError, naming the first misfit.
    """
    places, found = {name: parameter.shape for name, parameter in model.state_dict().items()}, dict(loaded or {})
    for released, tensor in weights.items():
        module, _, kind = released.rpartition(".")
        number = re.search(r"(?<=\.)\d+(?=\.)", module)
        pattern = module.replace(f".{number[0]}.", ".*.", 1) if number else module
        name = names.get(released) or f"{names.get(pattern, '?')}.{kind}".replace("*", number[0] if number else "*")
        if name not in places:
            raise InputError(f"the weights hold {released}, which has no place in this model.")
        if not isinstance(tensor, torch.Tensor) or tensor.shape != places[name] or not tensor.is_floating_point():
            shape = tuple(getattr(tensor, "shape", ()))
            raise InputError(f"the weights hold {released} of shape {shape}, where the config asks for {tuple(places[name])}.")
        if name in found and not torch.equal(found[name], tensor):
            raise InputError(f"the weights hold {released}, which must equal its other copy and does not.")
        found.setdefault(name, tensor)
    if missing := [name for name in places if name not in found]:
        module, _, kind = re.sub(r"\.\d+\.(?!weight|bias)", ".*.", missing[0]).rpartition(".")
        released = next((there for there, here in names.items() if here == module), "?")
        raise InputError(f"the weights lack {released}.{kind}, which is {missing[0]} here.")
    model.load_state_dict(found, assign=True)
    return model.eval()
