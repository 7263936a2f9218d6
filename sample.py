"""From a trained model to text: temperature without likelihoods.  (CALM paper, section 5)

    a prompt --hidden_states--> h --draws of the next chunk, temperature--> a chunk --> text

Most language models write better at a temperature T below 1: they then prefer what they find
probable. Where there is a softmax, one divides its logits by T. CALM has draws only, so this file
begins with two ways to get by with draws.

Letters: those of autoencoder.py, and N draws in a pool. In 1/T, T is the temperature.
"""

import argparse
import base64
import itertools
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import tiktoken
import torch

from autoencoder import NORM_EPS, Autoencoder, AutoencoderConfig
from calm import CALM, ROPE_THETA, CALMConfig, KVCache, TransformerLM

# ------ Mistakes at the keyboard


class UserError(ValueError):
    """A mistake of the person at the keyboard. Its text is one sentence that says what to do."""


def check(holds, sentence):
    """Raises a UserError unless `holds`. An `assert` would be skipped under `python -O`."""
    if not holds:
        raise UserError(sentence)


# ------ Temperature
#
# Temperature T turns a distribution P into P(x)^(1/T) / Z, where Z makes the sum 1. Here x is a
# whole chunk. For a single token that is what dividing logits by T gives. But a model that draws
# token by token does so for each token, with a Z of its own, before the next one is drawn. So the
# same T means different things: do not compare the two at equal T.
#
# Counting replaces the power: n independent draws are all equal to x with probability P(x)^n.


def inverse_temperature(temperature):
    """1/T = n + a as (n, a): a whole number and a fraction 0 <= a < 1."""
    check(1e-6 <= temperature <= 1, f"the temperature must be above 0, at most 1: {temperature}")
    n = math.floor(1 / temperature)
    return n, 1 / temperature - n


def uniform(generator):
    """A random number in [0, 1), a float, from a generator or else from torch's own on the CPU."""
    device = "cpu"
    if generator is not None:
        device = generator.device
    return torch.rand((), generator=generator, device=device).item()


def one_by_one(draw, max_draws):
    """Yields independent draws, (K,) each, on the CPU. They are made 256 at a time, since Python
    has to wait for a GPU each time that it looks at a number there.
    """
    for _ in range(math.ceil(max_draws / 256)):
        yield from draw(256).cpu()
    raise UserError(f"nothing accepted in {max_draws:,} draws: take T = 1, 1/2 or another method")


def bernoulli_factory(draws, x, a, generator=None):
    """A coin that shows True with probability P(x)^a, 0 < a < 1, although nobody knows P(x).
    draws: an iterator over independent draws of P; x (K,) int.  (paper, section 5)

    Trial i = 1, 2, … looks at the next draw. If it is x, accept. If not, give up with probability
    a/i, and go on to the next trial otherwise.

    Let p = P(x) and q = 1 - p. Trial 1 always takes place. Trial 2 does if trial 1 missed and did
    not give up, with probability q (1 - a), trial 3 with q^2 (1 - a) (1 - a/2), and so on. Each
    accepts with probability p, and at most one can, so the probabilities add:

        P(accept) = p · [1 + q (1 - a) + q^2 (1 - a) (1 - a/2) + q^3 (1 - a) (1 - a/2) (1 - a/3) …]

    By the binomial theorem, which Newton extended to any exponent, (1 - q)^(a-1) is a sum of powers
    q^k, with coefficients (1 - a) (2 - a) … (k - a) / k!, or (1 - a) (1 - a/2) … (1 - a/k). So the
    bracket is (1 - q)^(a-1) = p^(a-1), and P(accept) = p · p^(a-1) = p^a.

    A case to check by hand is a = 1/2, p = 1/4, q = 3/4. The bracket is 1 + q/2 + 3 q^2/8 +
    5 q^3/16 + … = 1 + 0.38 + 0.21 + 0.13 + …, which tends to 2. P(accept) = 1/4 · 2 = (1/4)^(1/2).
    (The loop ends: x has been drawn, so p > 0.)
    """
    for i in itertools.count(1):
        if torch.equal(next(draws), x):
            return True
        if uniform(generator) < a / i:
            return False


def temperature_sample_exact(draw, temperature, max_draws=1_000_000, generator=None):
    """One draw from P(x)^(1/T) / Z, exactly, for 0 < T <= 1.  (paper, section 5)
    draw: a function, draw(m) makes m independent draws from P, (m, K) int. Returns (K,) int on the
    CPU. Raises a UserError, which is a ValueError, after max_draws.

    With 1/T = n + a, an attempt makes n draws, even if the first two differ. They are all x with
    probability P(x)^n. If a > 0, a Bernoulli factory then accepts x with probability P(x)^a, from
    new draws. Otherwise the attempt fails and we start again. So x comes with probability
    P(x)^(1/T). Among the attempts that succeed, its share is that divided by the sum over all x,
    which is Z.
    """
    n, a = inverse_temperature(temperature)
    draws = one_by_one(draw, max_draws)
    while True:
        x, *others = [next(draws) for _ in range(n)]
        if not all(torch.equal(other, x) for other in others):
            continue  # the attempt has failed
        if a == 0 or bernoulli_factory(draws, x, a, generator):
            return x


def temperature_sample_batch(pool, temperature, generator=None):
    """Chooses from N draws as if from P(x)^(1/T) / Z.  (paper, section 5: batch approximation)
    pool (..., N, K) int: N draws of a chunk -> (..., K), a choice from each pool.

    The exact method throws most draws away. For T = 1/n, this one looks at all sets of n draws from
    the pool, and chooses one of those whose draws are all equal. A value that was drawn c times has
    C(c, n) sets, "c choose n", c! / (n! (c - n)!). In the pool A A A B B C at T = 1/2, A has 3 sets
    of two, B has 1 and C has none: A is chosen with probability 3/4. As N grows, C(c, n) approaches
    c^n / n!, so that the choice approaches P(x)^n / Z. For a finite N it is biased: what was drawn
    fewer than n times has no chance. If no value was drawn n times, we lower n to the greatest
    count. If 1/T is not whole, the gamma function serves: Γ(k + 1) = k!, and it takes any number.
    """
    n, a = inverse_temperature(temperature)
    chosen = []
    for draws in pool.reshape(-1, *pool.shape[-2:]).cpu():  # (N, K)
        # The U different values among them, and how often each was drawn.
        values, counts = torch.unique(draws, dim=0, return_counts=True)  # (U, K), (U,)
        least = n
        power = n + a  # 1/T
        if counts.max() < n:
            least = power = counts.max().item()
        enough = counts >= least
        values = values[enough]
        c = counts[enough].double()
        # log C(c, 1/T) = log Γ(c + 1) - log Γ(c - 1/T + 1) - log Γ(1/T + 1). The last is the same
        # for all values.
        log_weights = torch.lgamma(c + 1) - torch.lgamma(c - power + 1)
        weights = log_weights.softmax(0)
        # A draw from the weights: the first value at which their running sum reaches u.
        u = uniform(generator)
        chosen.append(values[(weights.cumsum(0) < u).sum()])
    return torch.stack(chosen).view(*pool.shape[:-2], -1).to(pool.device)


# ------ Generation


def next_chunk(model, hidden, temperature, pool, generator):
    """hidden (B, d), the states that predict the next chunks -> (B, K) int."""
    if isinstance(model, TransformerLM):  # has logits to divide by the temperature
        return model.draw_chunks(hidden, 1, generator, temperature)[0]
    if temperature == 1:
        return model.draw_chunks(hidden, 1, generator)[0]
    if pool is not None:
        draws = model.draw_chunks(hidden, pool, generator)  # (N, B, K)
        return temperature_sample_batch(draws.transpose(0, 1), temperature, generator)
    chunks = []
    for h in hidden:  # the exact method
        draw = lambda n: model.draw_chunks(h, n, generator)
        chunks.append(temperature_sample_exact(draw, temperature, generator=generator))
    return torch.stack(chunks).to(hidden.device)


@torch.no_grad()
def generate(model, prompt, n_tokens, temperature=1.0, pool=200, generator=None):
    """Continues each prompt: (B, T) int, T >= K -> (B, T + n_tokens) int. `pool` is the number of
    draws for the batch method; with None, the exact method is used.

    The model reads whole chunks. If T is no multiple of K, the first T mod K tokens stay unread: it
    is better to miss the oldest tokens than the newest.
    """
    K, T = model.config.chunk_size, prompt.shape[1]
    # In training the longest history was a context minus the chunk that is predicted.
    longest = model.config.context // K - 1
    unread = prompt[:, T % K :][:, -longest * K :]
    text = prompt
    cache = KVCache()
    while text.shape[1] < T + n_tokens:
        # Read what is new, and draw the next chunk.
        hidden = model.hidden_states(unread, cache)[:, -1]  # (B, d)
        chunk = next_chunk(model, hidden, temperature, pool, generator)  # (B, K)
        text = torch.cat([text, chunk], dim=1)
        unread = chunk
        if cache.length == longest:
            # Positions beyond these were never trained. We read the last half of the chunks again,
            # from position 0. Then there is room for as many new ones.
            unread = text[:, -max(1, longest // 2) * K :]
            cache = KVCache()
    return text[:, : T + n_tokens]


# ------ Texts and tokenizers

END_OF_TEXT = "<|endoftext|>"
# A tokenizer cuts a text into pieces, such as words. In a piece it begins with bytes and joins
# neighbours into tokens, those of lowest number ("rank") first. A file of ranks does not contain
# the pattern that cuts the text, so we use Llama 3's for every file: endings ('ll), words with the
# sign before them, up to three digits, other signs, new lines, blanks.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_text(path):
    """The text of a file in UTF-8, on every machine. A byte order mark at its start is no text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text in UTF-8") from None


def make_encoding(ranks):
    """The tiktoken.Encoding of {token bytes: its number} and an end-of-text token."""
    end = max(ranks.values()) + 1  # not len(ranks): a list may begin at 1, or leave numbers out
    if end == 128_000:  # Llama 3: 128 000 begins a text, 128 001 ends it
        end = 128_001
    special = {END_OF_TEXT: end}
    return tiktoken.Encoding("", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def encoding_parts(encoding):
    """All that makes a tokenizer, a dict: tiktoken.Encoding("any name", **parts) makes it again."""
    names = ("pat_str", "mergeable_ranks", "special_tokens")
    return {name: getattr(encoding, f"_{name}") for name in names}


def load_tokenizer(name):
    """A tiktoken.Encoding: "bytes", a file of ranks, or one of tiktoken's names (gpt2, …)."""
    if name == "bytes":
        return make_encoding({bytes([b]): b for b in range(256)})
    try:
        if not Path(name).exists():
            return tiktoken.get_encoding(name)
        words = Path(name).read_text(encoding="ascii").split()  # BASE64 NUMBER, for each token
        ranks = {}
        for token, rank in zip(words[::2], words[1::2]):
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, OSError) as error:  # not known, no connection, or not such lines
        reason = str(error).splitlines()[0]
        raise UserError(f"there is no tokenizer {name}: {reason}") from None
    # Any text can be written if each byte is a token. No two tokens may have the same number.
    fits = all(bytes([b]) in ranks for b in range(256))
    fits = fits and len(set(ranks.values())) == len(words) / 2
    check(fits, f"the tokenizer {name} lacks some of the 256 bytes, or has a number twice")
    return make_encoding(ranks)


def decode(encoding, tokens):
    """The text of a list of tokens. A model may draw a number that its tokenizer leaves out: such
    numbers have no text, and are skipped.
    """
    known = set(encoding._mergeable_ranks.values())
    return encoding.decode([token for token in tokens if token in known])


# ------ Checkpoints of train.py


def load_weights(path):
    """A dict that torch has saved, on the CPU; a UserError if there is none. weights_only: a file
    may hold tensors, numbers and strings, but no code, which could do anything.
    """
    check(path.exists(), f"there is no {path}: train it, or name its folder")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damage makes torch raise
        what = type(error).__name__
        raise UserError(f"{path} is damaged, or not the file but a note about it: {what}") from None


def load_checkpoint(out_dir, kind):
    """What train.py wrote to {kind}.pt, a dict."""
    return load_weights(Path(out_dir, f"{kind}.pt"))


def build_model(kind, configs):
    """A new "autoencoder", "calm" or "baseline" of these sizes, {kind: dict}."""
    if kind == "baseline":
        return TransformerLM(CALMConfig(**configs["baseline"]))
    autoencoder = Autoencoder(AutoencoderConfig(**configs["autoencoder"]))
    if kind == "autoencoder":
        return autoencoder
    return CALM(CALMConfig(**configs["calm"]), autoencoder)


def load_model(out_dir, kind="calm"):
    """The model in {kind}.pt, for evaluation, and its tokenizer. In the folder of a baseline, which
    has no calm.pt, the model is that in baseline.pt.
    """
    if kind == "calm" and Path(out_dir, "baseline.pt").exists():
        kind = "baseline"
    checkpoint = load_checkpoint(out_dir, kind)
    model = build_model(kind, checkpoint["configs"])
    model.load_state_dict(checkpoint["weights"])
    return model.eval(), tiktoken.Encoding("saved", **checkpoint["tokenizer"])


# ------ Checkpoints of the authors
#
# A folder in the layout of the released models holds a config.json and the weights, in one file or
# several. Their code: https://github.com/shaochenze/calm, commit c556310, in the folder models/.

# A setting's name here, and in a config.json (configuration_autoencoder.py, configuration_calm.py).
RELEASED_FIELDS = {
    "vocab_size": "vocab_size",
    "chunk_size": "patch_size",
    "latent_size": "latent_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "n_encoder_layers": "num_encoder_layers",
    "n_decoder_layers": "num_decoder_layers",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "noise_size": "noise_size",
    "n_head_blocks": "num_mlp_layers",
    "context": "max_position_embeddings",
}
# For these, this code has one value only. Another one would load, and give wrong numbers without a
# word, so it is refused.
FIXED = {
    "hidden_act": "silu",
    "rms_norm_eps": NORM_EPS,
    "rope_theta": ROPE_THETA,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
}
# Parts of the weights' names in their checkpoints, and what they are called here.
RELEASED_NAMES = {
    # modeling_autoencoder.py
    "ae_model.": "autoencoder.",
    "encoder.embed_tokens": "embedding",
    "encoder.encoder_layers": "encoder_blocks",
    "encoder.squeeze_layer": "squeeze",
    "encoder.norm": "encoder_norm",
    "encoder.hidden_to_latent": "to_posterior",
    "decoder.latent_to_hidden": "from_latent",
    "decoder.decoder_layers": "decoder_blocks",
    "decoder.expand_layer": "expand",
    "decoder.norm": "decoder_norm",
    "decoder.lm_head_weight": "embedding.weight",  # tied: the same tensor under two names
    ".layernorm": ".norm",
    # modeling_calm.py: the input and the Transformer, which is LLaMA's
    "embed_proj": "compression",
    "transformer.embed_tokens": "embedding",
    "transformer.layers": "backbone.blocks",
    "transformer.norm": "backbone.norm",
    ".input_layernorm": ".attention_norm",
    ".post_attention_layernorm": ".mlp_norm",
    ".self_attn.q_proj": ".attention.query",
    ".self_attn.k_proj": ".attention.key",
    ".self_attn.v_proj": ".attention.value",
    ".self_attn.o_proj": ".attention.out",
    ".gate_proj": ".gate",
    ".up_proj": ".up",
    ".down_proj": ".down",
    # modeling_energy.py: the head, which is saved under two names
    "generative_head.": "head.",
    "mlp_generator.": "head.",
    "noise_embd": "noise_in",
    "norm_noise": "noise_norm",
    "hidden_embd": "hidden_in",
    "norm_hidden": "hidden_norm",
    "mlp_blocks": "blocks",
    "final_layer.in_ln": "final_norm",  # before .in_ln and .linears, which it contains
    "final_layer.linears": "final",
    ".in_ln": ".norm",
    ".linears": ".mlp",
}


def read_released(folder, kind):
    """The config of a `kind`, AutoencoderConfig or CALMConfig, and the weights {our name: tensor}
    in a folder. Raises a KeyError or ValueError for a config that is not of such a model.
    """
    released = json.loads(read_text(Path(folder, "config.json")))
    # As many keys and values as queries: some models let several queries share a key.
    fixed = FIXED | {"num_key_value_heads": released.get("num_attention_heads")}
    for name, value in fixed.items():
        found = released.get(name, value)
        check(found == value, f"{folder} asks for {name} = {found}, but here it is always {value}")
    config = {}
    for field in fields(kind):
        if field.name in RELEASED_FIELDS:  # the others are for training, and keep their defaults
            config[field.name] = released[RELEASED_FIELDS[field.name]]

    weights = {}
    for file in Path(folder).glob("*.bin"):
        for name, tensor in load_weights(file).items():
            for theirs, ours in RELEASED_NAMES.items():
                name = name.replace(theirs, ours)
            weights[name] = tensor
    return kind(**config), weights


def load_released_autoencoder(folder):
    """The autoencoder in a folder of the released layout, in evaluation mode. Raises a RuntimeError
    that lists the weights that are missing, not known, or of another shape.
    """
    config, weights = read_released(folder, AutoencoderConfig)
    model = Autoencoder(config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def load_released_calm(folder, autoencoder=None):
    """The CALM in a folder of the released layout, in evaluation mode. It has the frozen
    autoencoder of that folder, unless another is given, which then gets the weights' dtype. Raises
    what `load_released_autoencoder` raises.
    """
    config, weights = read_released(folder, CALMConfig)
    config.context *= config.chunk_size  # theirs counts chunks
    # The config does not give the widths of the autoencoder, but the shape of a weight does.
    gate = weights["autoencoder.encoder_blocks.0.mlp.gate.weight"]
    theirs = AutoencoderConfig(config.vocab_size, config.chunk_size, config.latent_size)
    theirs.intermediate_size, theirs.hidden_size = gate.shape
    # On "meta", tensors have shapes and no memory: the model is given those that are loaded.
    with torch.device("meta"):
        model = CALM(config, Autoencoder(theirs))
    model.load_state_dict(weights, assign=True)
    if autoencoder is not None:
        check(autoencoder.config == theirs, f"the autoencoder is not of the sizes in {folder}")
        model.autoencoder = autoencoder.to(gate.dtype).requires_grad_(False)
    return model.eval()


# ------ The command


def write_text(model, encoding, prompt, n_tokens, temperature, pool=200):
    """`prompt` and its continuation, up to an end of the text, a string."""
    ids = encoding.encode_ordinary(prompt)
    while len(ids) < model.config.chunk_size:  # a whole chunk is needed
        ids = encoding.encode_ordinary("\n") + ids
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    new = generate(model, tokens, n_tokens, temperature, pool)[0, len(ids) :].tolist()
    if encoding.eot_token in new:
        new = new[: new.index(encoding.eot_token)]
    return prompt + decode(encoding, new)


def pick_device(name):
    """cuda, mps or cpu: for "auto" the best there is."""
    best = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    check(name in ("auto", "cpu", best), f"there is no device {name} here: try --device {best}")
    if name == "auto":
        return best
    return name


def run(main, when_stopped="stopped"):
    """Runs the main of a command. A mistake of the user's, or a file that cannot be read or
    written, becomes one sentence on stderr and exit status 2. Other errors keep their traceback.
    """
    # A terminal may lack letters (Windows, LANG=C). It then shows question marks, and no error.
    sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except (UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: {when_stopped}", file=sys.stderr)
        sys.exit(130)  # what a shell expects after Ctrl-C


def main():
    parser = argparse.ArgumentParser(description="Write text with a trained model.")
    add = parser.add_argument
    add("--out_dir", default="out/quick", help="the folder of a run")
    add("--pretrained", help="a folder of released weights instead")
    add("--autoencoder", help="with --pretrained: a folder with another autoencoder")
    add("--tokenizer", default="tokenizer.model", help="with --pretrained: a file of ranks")
    add("--prompt", default="\n", help="a text, or FILE:path")
    add("--n_tokens", type=int, default=500, help="new tokens in a text")
    add("--n_samples", type=int, default=1, help="number of texts")
    add("--temperature", type=float, default=0.5, help="above 0, for CALM at most 1")
    add("--method", choices=("batch", "exact"), default="batch", help="for T < 1")
    add("--pool", type=int, default=200, help="draws that the batch method counts")
    add("--device", default="auto", help="cpu, cuda or mps (the best there is)")
    add("--seed", type=int, default=0, help="change it for a different text")
    args = parser.parse_args()
    for name in ("n_tokens", "n_samples", "pool", "temperature"):
        check(getattr(args, name) > 0, f"--{name} must be above 0")
    check(args.pretrained or not args.autoencoder, "--autoencoder needs --pretrained")
    torch.manual_seed(args.seed)
    prompt = args.prompt
    if prompt.startswith("FILE:"):
        prompt = read_text(prompt[5:])
    pool = args.pool
    if args.method == "exact":
        pool = None

    if args.pretrained:
        autoencoder = None
        try:
            if args.autoencoder:
                autoencoder = load_released_autoencoder(args.autoencoder)
            model = load_released_calm(args.pretrained, autoencoder)
        except (KeyError, ValueError, RuntimeError) as error:
            what = " ".join(str(error).split())[:300]
            raise UserError(f"{args.pretrained} does not hold a released model: {what}") from None
        encoding = load_tokenizer(args.tokenizer)
        # Llama 3 has 255 special tokens that this encoding has not.
        fits = 0 <= model.config.vocab_size - encoding.n_vocab < 256
        check(fits, f"the tokenizer {args.tokenizer} is of another model")
    else:
        model, encoding = load_model(args.out_dir)
    model.to(pick_device(args.device))
    for _ in range(args.n_samples):
        text = write_text(model, encoding, prompt, args.n_tokens, args.temperature, pool)
        print(text, end="\n\n")


if __name__ == "__main__":
    run(main)
