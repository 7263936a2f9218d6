"""From a trained model to text: temperature without likelihoods.  (CALM paper, section 5)

Dividing logits by T sharpens a softmax: P(x) becomes P(x)^(1/T) / Z. The chunks x of CALM have no
logits, only draws. But counting is enough: n draws are all x with probability P(x)^n.
Letters: those of autoencoder.py, N draws in a pool. In 1/T, T is the temperature.
"""

import argparse
import base64
import itertools
import math
import sys
from pathlib import Path

import tiktoken
import torch

from autoencoder import Autoencoder, AutoencoderConfig
from calm import CALM, CALMConfig, KVCache, TransformerConfig, TransformerLM

# ------ Temperature


def inverse_temperature(temperature):
    """1/T = n + a as (n, a): a whole number and a fraction 0 <= a < 1."""
    assert 1e-6 <= temperature <= 1, f"the temperature must be above 0 and at most 1: {temperature}"
    n = math.floor(1 / temperature + 0.004)  # 0.3334 means 1/3
    a = 1 / temperature - n
    return n, (a if a > 0.004 else 0.0)


def one_by_one(draw, max_draws, block=256):
    """Yields independent draws, (K,) each, made in blocks for speed."""
    for _ in range(math.ceil(max_draws / block)):
        yield from draw(block)
    raise ValueError(f"nothing accepted in {max_draws:,} draws: take a higher temperature")


def bernoulli_factory(draws, x, a, generator=None):
    """True with probability P(x)^a, 0 < a < 1. draws: an iterator over draws of P; x (K,).

    Trial i makes a draw. If it is x, accept; if not, give up with probability a/i. With q = 1 -
    P(x), trials 1, 2, 3, … take place with probabilities  1, q (1 - a), q^2 (1 - a) (1 - a/2), …
    By Newton's binomial series their sum, the mean number of trials, is (1 - q)^(a-1) = P(x)^(a-1).
    Each accepts with probability P(x), at most one does: P(accept) = P(x) · P(x)^(a-1) = P(x)^a.
    """
    for i in itertools.count(1):
        if torch.equal(next(draws), x):
            return True
        if torch.rand((), generator=generator, device=x.device) < a / i:
            return False


def temperature_sample_exact(draw, temperature, max_draws=1_000_000, generator=None):
    """One draw from P(x)^(1/T) / Z, exactly, for any 0 < T <= 1: (K,) int.  (paper, section 5)
    draw: a function, draw(m) makes m independent draws from P, (m, K). ValueError after max_draws.

    With 1/T = n + a, an attempt makes n draws. They are all x with probability P(x)^n; a Bernoulli
    factory then accepts x with probability P(x)^a. Else all starts over.
    """
    n, a = inverse_temperature(temperature)
    draws = one_by_one(draw, max_draws)
    while True:
        x, *others = [next(draws) for _ in range(n)]
        if not all(torch.equal(other, x) for other in others):
            continue  # start all over
        if a == 0 or bernoulli_factory(draws, x, a, generator):
            return x


def temperature_sample_batch(pool, temperature, generator=None):
    """Chooses from N draws as if from P(x)^(1/T) / Z.  (paper, section 5: batch approximation)
    pool (..., N, K) int: N draws of a chunk -> (..., K), a choice from each pool.

    For T = 1/n: of all sets of n draws that are equal, choose one. A value drawn c times has
    C(c, n) such sets, about c^n / n!. If no value was drawn n times, the greatest c takes the place
    of 1/T. For other T, Γ(k + 1) = k! extends C(c, 1/T), for c >= n. Biased for a finite N.
    """
    n, a = inverse_temperature(temperature)
    chosen = []
    for draws in pool.reshape(-1, *pool.shape[-2:]).cpu():  # (N, K)
        values, counts = torch.unique(draws, dim=0, return_counts=True)  # (U, K), (U,)
        least, power = n, n + a
        if counts.max() < n:
            least = power = counts.max().item()
        enough = counts >= least
        values, c = values[enough], counts[enough].double()
        # log C(c, power) = log Γ(c + 1) - log Γ(c - power + 1), less a constant.
        log_weights = torch.lgamma(c + 1) - torch.lgamma(c - power + 1)
        weights = log_weights.softmax(0)
        # A draw from the weights: the first value at which their sum reaches u.
        u = torch.rand((), generator=generator, device=pool.device).item()
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
    return torch.stack(chunks)


@torch.no_grad()
def generate(model, prompt, n_tokens, temperature=1.0, pool=200, generator=None):
    """Continues each prompt: (B, T) int, T >= K -> (B, T + n_tokens) int. `pool`: draws for the
    batch method; None: the exact method.

    Whole chunks are read: the first T mod K tokens are not. (In training, chunks begin anywhere.)
    """
    K, T = model.config.chunk_size, prompt.shape[1]
    assert T >= K, f"a prompt must have at least {K} tokens, one chunk"
    longest = model.config.context // K - 1  # chunks of history, as in training
    unread = prompt[:, T % K :][:, -longest * K :]
    text, cache = prompt, KVCache()
    while text.shape[1] < T + n_tokens:
        # Read what is new, and draw the next chunk.
        hidden = model.hidden_states(unread, cache)[:, -1]  # (B, d)
        chunk = next_chunk(model, hidden, temperature, pool, generator)  # (B, K)
        # Append and continue.
        text = torch.cat([text, chunk], dim=1)
        unread = chunk
        if cache.length == longest:  # full: read the newer half again, from position 0
            unread, cache = text[:, -max(1, longest // 2) * K :], KVCache()
    return text[:, : T + n_tokens]


# ------ Tokenizers and checkpoints

END_OF_TEXT = "<|endoftext|>"
# How Llama 3 cuts a text before it merges byte pairs. A file of ranks lacks that: all get this.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_encoding(ranks):
    """The tiktoken.Encoding of {token bytes: rank, its number} and an end-of-text token."""
    end = len(ranks)
    if end == 128_000:  # Llama 3: 128 000 begins a text, 128 001 ends it
        end += 1
    parts = {"mergeable_ranks": ranks, "special_tokens": {END_OF_TEXT: end}}
    return tiktoken.Encoding("ranks", pat_str=PATTERN, **parts)


def load_tokenizer(name):
    """A tiktoken.Encoding: "bytes", a file of ranks, or one of tiktoken's names (gpt2, …)."""
    if name == "bytes":
        return make_encoding({bytes([b]): b for b in range(256)})
    try:
        if not Path(name).exists():
            return tiktoken.get_encoding(name)
        lines = [line.split() for line in Path(name).read_text().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        return make_encoding(ranks)
    except (ValueError, OSError):
        raise ValueError(f"the tokenizer {name} is neither bytes, nor a file of lines BASE64 RANK, "
                         "nor one that tiktoken can fetch") from None  # fmt: skip


def load_checkpoint(out_dir, kind):
    """What train.py wrote to {kind}.pt."""
    path = Path(out_dir, f"{kind}.pt")
    assert path.exists(), f"there is no {path}: train it, or name its --out_dir"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever damage makes torch raise
        raise ValueError(f"{path} is damaged; {path}.old is the one before") from None


def build_model(kind, configs):
    """A new "autoencoder", "calm" or "baseline" of these sizes, {kind: dict}."""
    if kind == "baseline":
        return TransformerLM(TransformerConfig(**configs["baseline"]))
    autoencoder = Autoencoder(AutoencoderConfig(**configs["autoencoder"]))
    if kind == "autoencoder":
        return autoencoder
    return CALM(CALMConfig(**configs["calm"]), autoencoder)


def load_model(out_dir, kind):
    """The model in {kind}.pt, for evaluation, and its tokenizer."""
    checkpoint = load_checkpoint(out_dir, kind)
    with torch.device("meta"):  # shapes without memory
        model = build_model(kind, checkpoint["configs"])
    model.load_state_dict(checkpoint["weights"], assign=True)
    return model.eval(), tiktoken.Encoding("saved", **checkpoint["tokenizer"])


# ------ The command


def write_text(model, encoding, prompt, n_tokens, temperature, pool=200):
    """`prompt` and its continuation, up to an end of the text, a string."""
    ids = encoding.encode_ordinary(prompt)
    missing = max(0, model.config.chunk_size - len(ids))
    ids = encoding.encode_ordinary("\n") * missing + ids  # a whole chunk
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    new = generate(model, tokens, n_tokens, temperature, pool)[0, len(ids) :].tolist()
    if encoding.eot_token in new:
        new = new[: new.index(encoding.eot_token)]
    known = [t for t in new if t < len(encoding._mergeable_ranks)]  # the others have no bytes
    return prompt + encoding.decode(known)


def pick_device(name):
    """cuda, mps or cpu: for "auto" the best there is."""
    best = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    assert name in ("auto", "cpu", best), f"there is no device {name} here, but {best}"
    return best if name == "auto" else name


def run(main):
    """Runs a main. A mistake of the user's is one sentence on stderr, exit status 2."""
    try:
        main()
    except (AssertionError, ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description="Write text with a trained model.")
    add = parser.add_argument
    add("--out_dir", default="out/quick", help="where calm.pt is")
    add("--model", choices=("calm", "baseline"), default="calm", help="one of the models there")
    add("--pretrained", metavar="DIR", help="a folder of released weights instead")
    add("--autoencoder", metavar="DIR", help="with --pretrained: another autoencoder")
    add("--tokenizer", default="tokenizer.model", metavar="FILE", help="with --pretrained")
    add("--prompt", default="\n", help="a text, or FILE:path")
    add("--n_tokens", type=int, default=500, help="length of a text")
    add("--n_samples", type=int, default=1, help="number of texts")
    add("--temperature", type=float, default=0.5, help="above 0, for CALM at most 1")
    add("--method", choices=("batch", "exact"), default="batch", help="for T < 1")
    add("--pool", type=int, default=200, help="draws that the batch method counts")
    add("--seed", type=int, default=0, help="another one, another text")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    for name in ("n_tokens", "n_samples", "pool", "temperature"):
        assert getattr(args, name) > 0, f"--{name} must be above 0"
    if args.pretrained:
        autoencoder = args.autoencoder and Autoencoder.from_pretrained(args.autoencoder)
        model = CALM.from_pretrained(args.pretrained, autoencoder)
        encoding = load_tokenizer(args.tokenizer)
    else:
        model, encoding = load_model(args.out_dir, args.model)
    model.to(pick_device("auto"))
    if args.prompt.startswith("FILE:"):
        args.prompt = Path(args.prompt[5:]).read_text()
    pool = args.pool if args.method == "batch" else None
    for _ in range(args.n_samples):
        text = write_text(model, encoding, args.prompt, args.n_tokens, args.temperature, pool)
        print(text, end="\n\n")


if __name__ == "__main__":
    run(main)
