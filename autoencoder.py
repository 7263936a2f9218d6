"""
The autoencoder: K tokens into one vector, and back.                                  (CALM paper, section 2)

A language model usually takes one step for one token. CALM takes one step for a *chunk* of K tokens, and for that it
needs a vector that stands for a chunk: small, exact (the K tokens come back), and *robust* (a slightly wrong vector still
comes back as the same K tokens, because the vectors that the language model predicts are always slightly wrong).

    tokens (K)  --encode-->  posterior N(mean, std^2) over R^l  --sample z-->  z (l)  --decode-->  logits (K, V)

Exactness is easy. Robustness is what the four regularisers below are for: the posterior's noise with a KL penalty, the
floor of that penalty in each dimension, the dropout of latent coordinates, and DropToken.

Letters used for dimensions, here and in the other files:
    B  batch                T  tokens in a sequence    L  chunks in a sequence, T / K    K  tokens in a chunk
    V  vocabulary           d  width of a network      l  size of the latent vector      ... any leading dimensions
"""

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

NORM_EPS = 1e-6  # of every RMSNorm and LayerNorm, as in the released code


class InputError(Exception):
    """A mistake that the person at the keyboard can mend, told in one sentence: the scripts print it and exit with status 2."""


@dataclass
class AutoencoderConfig:
    """The published autoencoder, except for the vocabulary. `kl_floor` is the paper's lambda, `kl_weight` its beta."""

    vocab_size: int
    chunk_size: int = 4  # K
    latent_size: int = 128  # l
    hidden_size: int = 512  # d
    intermediate_size: int = 1280  # inner width of SwiGLU
    n_encoder_layers: int = 2  # half of them before the squeeze, half after
    n_decoder_layers: int = 2  # half of them before the expansion, half after
    dropout: float = 0.15  # of input tokens (DropToken) and of latent coordinates
    kl_floor: float = 0.5
    kl_weight: float = 1e-3

    def __post_init__(self):
        for name in ("vocab_size", "chunk_size", "latent_size", "hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("n_encoder_layers", "n_decoder_layers"):
            if getattr(self, name) < 0 or getattr(self, name) % 2:
                raise InputError(f"{name} must be even, half on either side of the squeeze, not {getattr(self, name)}.")


def kl_divergence(mean, log_std, floor=0.0):
    """
    KL( N(mean, std^2) || N(0, I) ), each dimension's share raised to at least `floor`, summed over the dimensions:
    mean, log_std (..., l)  ->  (...), in nats.

    The floor ("KL clipping", paper section 2) is applied to each dimension *before* the sum: below it nothing pulls a
    dimension further onto the prior, where it would say nothing of its chunk. A floor on the sum could not prevent that.
    """
    per_dimension = 0.5 * (mean.square() + torch.exp(2 * log_std) - 1 - 2 * log_std)
    return per_dimension.clamp_min(floor).sum(-1)


def init_by_width(module):
    """
    For `module.apply`: linear maps start with weights of std 1/sqrt(fan-in), which keeps the size of what passes through at
    *any* width; embeddings start with std 1, the size of a normalised activation.

    The released code has std 0.02 throughout, near 1/sqrt(fan-in) for its widths of 1024 and more. At a classroom's width of
    128 that is four times too small: signals fade from layer to layer, and training begins with a long plateau.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=1.0)


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)), without biases: (..., d) -> (..., d)."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ResidualBlock(nn.Module):
    """x + SwiGLU(RMSNorm(x)): (..., d) -> (..., d). It sees one position at a time: the autoencoder has no attention."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Autoencoder(nn.Module):
    """
    The chunk autoencoder (paper, section 2; released code: `Autoencoder`). Each chunk is coded on
    its own: attention between chunks helped reconstruction, but hurt the language model built on it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        d, K, l, inner = config.hidden_size, config.chunk_size, config.latent_size, config.intermediate_size
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.encoder_blocks = nn.ModuleList(ResidualBlock(d, inner) for _ in range(config.n_encoder_layers))
        self.squeeze = nn.Linear(K * d, d)
        self.encoder_norm = nn.RMSNorm(d, eps=NORM_EPS)
        self.to_posterior = nn.Linear(d, 2 * l)
        self.from_latent = nn.Linear(l, d)
        self.decoder_blocks = nn.ModuleList(ResidualBlock(d, inner) for _ in range(config.n_decoder_layers))
        self.expand = nn.Linear(d, K * d)
        self.decoder_norm = nn.RMSNorm(d, eps=NORM_EPS)

        self.apply(init_by_width)
        # The embedding is also the un-embedding (tied), a linear map of fan-in d: with std 1 the first logits would have std
        # sqrt(d), and the first loss would be several times log V.
        nn.init.normal_(self.embedding.weight, std=d**-0.5)

    @classmethod
    def from_pretrained(cls, folder):
        """The autoencoder in a folder of the released layout. Raises InputError, naming what is wrong, for any other folder."""
        config = AutoencoderConfig(**read_config(folder, "Autoencoder", RELEASED_CONFIG))
        with torch.device("meta"):  # shapes without memory: the weights are put in their places, not copied
            model = cls(config)
        return load_released(model, read_weights(folder), RELEASED_NAMES)

    def encode(self, tokens):
        """tokens (..., K) int  ->  mean, log_std of the posterior over z, each (..., l)."""
        x = self.embedding(tokens)  # (..., K, d)
        half = len(self.encoder_blocks) // 2
        for block in self.encoder_blocks[:half]:
            x = block(x)
        x = self.squeeze(x.flatten(-2))  # (..., K·d) -> (..., d): the only place where the K tokens meet
        for block in self.encoder_blocks[half:]:
            x = block(x)
        return self.to_posterior(self.encoder_norm(x)).chunk(2, dim=-1)  # mean, log_std

    def decode(self, latent):
        """latent (..., l)  ->  logits (..., K, V), one distribution for each of the K tokens."""
        x = self.from_latent(latent)  # (..., d)
        half = len(self.decoder_blocks) // 2
        for block in self.decoder_blocks[:half]:
            x = block(x)
        x = self.expand(x).unflatten(-1, (self.config.chunk_size, -1))  # (..., K, d)
        for block in self.decoder_blocks[half:]:
            x = block(x)
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def decode_tokens(self, latent, max_logits=2**24):
        """
        latent (..., l)  ->  the most probable token at each place, (..., K) int.
        Decoded in slices of at most `max_logits` logits: for 200 candidates over 128 k words there would be 100 M at once.
        """
        rows = latent.reshape(-1, latent.shape[-1])
        n = max(1, max_logits // (self.config.chunk_size * self.config.vocab_size))
        return torch.cat([self.decode(part).argmax(-1) for part in rows.split(n)]).view(*latent.shape[:-1], -1)

    def forward(self, tokens):
        """
        tokens (..., K) int  ->  loss (a scalar, nats per chunk), metrics (floats: reconstruction, kl, accuracy).

            loss = K · CE(decoder(z~), tokens) + beta · KL            (paper, section 2)

        In training mode the encoder is shown a damaged chunk and the decoder a damaged latent; the *targets* stay whole:
        - DropToken: each input token becomes id 0 with probability `dropout`, so a chunk's vector must also say what its
          tokens are likely to be, given each other: similar chunks move together, and the latent space becomes smooth;
        - z = mean + std · noise: the decoder must be right in a whole neighbourhood;
        - dropout of latent coordinates: no token may hang on one coordinate.
        In evaluation mode nothing is damaged and z is the posterior's mean.
        """
        c, inputs = self.config, tokens
        if self.training:
            inputs = tokens.masked_fill(torch.rand(tokens.shape, device=tokens.device) < c.dropout, 0)
        mean, log_std = self.encode(inputs)
        latent = mean
        if self.training:
            latent = F.dropout(mean + log_std.exp() * torch.randn_like(mean), c.dropout)
        logits = self.decode(latent)  # (..., K, V)

        reconstruction = c.chunk_size * F.cross_entropy(logits.flatten(0, -2), tokens.flatten())
        kl = kl_divergence(mean, log_std, c.kl_floor).mean()
        loss = reconstruction + c.kl_weight * kl
        accuracy = (logits.argmax(-1) == tokens).float().mean()
        return loss, {"reconstruction": reconstruction.item(), "kl": kl.item(), "accuracy": accuracy.item()}

    @torch.no_grad()
    def accuracy(self, tokens, noise=0.0, generator=None):
        """
        tokens (..., K) int -> a float, the share of them that come back when Gaussian noise of standard deviation `noise` is
        added to the posterior's mean. The paper's test of robustness has noise = 0.3.
        """
        mean, _ = self.encode(tokens)
        epsilon = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return (self.decode_tokens(mean + noise * epsilon) == tokens).float().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# The released checkpoints: a folder with config.json and pytorch_model.bin or model.safetensors, perhaps in several parts


def name_table(text):
    """{"a": "b"} from the text "a=b": names in the released code = names here."""
    return dict(pair.split("=") for pair in text.split())


RELEASED_CONFIG = name_table("""
    vocab_size=vocab_size  patch_size=chunk_size  latent_size=latent_size  hidden_size=hidden_size
    intermediate_size=intermediate_size  num_encoder_layers=n_encoder_layers  num_decoder_layers=n_decoder_layers
    ae_dropout=dropout  kl_clamp=kl_floor  kl_weight=kl_weight
""")
# * is the number of a layer; all but the last go on with .weight or .bias. The last are the tied embedding's numbers once more.
RELEASED_NAMES = name_table("""
    encoder.embed_tokens=embedding  encoder.encoder_layers.*.layernorm=encoder_blocks.*.norm
    encoder.encoder_layers.*.mlp.gate_proj=encoder_blocks.*.mlp.gate  encoder.encoder_layers.*.mlp.up_proj=encoder_blocks.*.mlp.up
    encoder.encoder_layers.*.mlp.down_proj=encoder_blocks.*.mlp.down
    encoder.squeeze_layer=squeeze  encoder.norm=encoder_norm  encoder.hidden_to_latent=to_posterior
    decoder.latent_to_hidden=from_latent  decoder.decoder_layers.*.layernorm=decoder_blocks.*.norm
    decoder.decoder_layers.*.mlp.gate_proj=decoder_blocks.*.mlp.gate  decoder.decoder_layers.*.mlp.up_proj=decoder_blocks.*.mlp.up
    decoder.decoder_layers.*.mlp.down_proj=decoder_blocks.*.mlp.down
    decoder.expand_layer=expand  decoder.norm=decoder_norm  decoder.lm_head_weight=embedding.weight
""")


def read_json(path):
    """The object in a JSON file. Raises InputError if there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content


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
            except (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, AttributeError, pickle.UnpicklingError, SafetensorError):
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
