"""
From a trained model to text: temperature without likelihoods.              (CALM paper, section 5)

A softmax model is sharpened by dividing its logits by T: P(x) becomes P(x)^(1/T) / Z. CALM has no
logits, it can only be drawn from. But counting draws is enough: P(x)^n is the probability that n
independent draws are all x. The file has four parts: temperature sampling (functions on tensors,
for any sampler), generation, tokenizers and checkpoints, and the command `python sample.py`.

Letters: those of autoencoder.py (B, T, K, d, ...), N draws in a pool. In formulas T is the
temperature, in shapes the number of tokens.
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

# -------------------------------------------------------------------------------------------------
# Temperature


def inverse_temperature(temperature):
    """
    1/T = n + a as (n, a): a whole number and a fraction 0 <= a < 1. Within 0.004 of a whole number
    it is taken for that: whoever types 0.333 means 1/3.
    """
    assert 0 < temperature <= 1, f"the temperature must lie above 0 and up to 1, not {temperature}"
    n = math.floor(1 / temperature + 0.004)
    a = 1 / temperature - n
    return (n, a) if a >= 0.004 else (n, 0.0)


def one_by_one(draw, max_draws, block=256):
    """Yields independent draws, (K,) each. They are made in blocks, which a GPU likes better."""
    for _ in range(math.ceil(max_draws / block)):
        yield from draw(block)
    raise ValueError(
        f"no chunk was accepted in {max_draws:,} draws: take a higher temperature, or --method batch"
    )


def bernoulli_factory(draws, x, a, generator=None):
    """
    True with probability P(x)^a, for 0 < a < 1, from draws of P alone: draws, an iterator over (K,)
    tensors; x (K,).

    At the i-th draw: if it is x, accept. If not, give up with probability a/i. Let q = 1 - P(x).
    The trial i+1 is reached with probability  q^i (1 - a/1) (1 - a/2) … (1 - a/i).  The sum of these
    over i is the binomial series of (1 - q)^(a-1) = P(x)^(a-1): the mean number of trials. Each of
    them accepts with probability P(x), so together they accept with probability P(x)^a.
    """
    for i in itertools.count(1):
        if torch.equal(next(draws), x):
            return True
        if torch.rand((), generator=generator, device=x.device) < a / i:
            return False


def temperature_sample_exact(draw, temperature, max_draws=1_000_000, generator=None):
    """
    One draw from P(x)^(1/T) / Z, exactly, for any 0 < T <= 1.             (paper, section 5)
    draw(m) -> (m, K) int: m independent draws from P  ->  (K,) int.
    Raises ValueError after max_draws draws.

    With 1/T = n + a, an attempt makes n draws. They are all x with probability P(x)^n, and a
    Bernoulli factory then accepts x with probability P(x)^a. In all, an attempt ends in x with
    probability P(x)^(1/T). Every draw is read once: attempts must not depend on each other.
    """
    n, a = inverse_temperature(temperature)
    draws = one_by_one(draw, max_draws)
    while True:
        attempt = [next(draws) for _ in range(n)]
        x = attempt[0]
        if not all(torch.equal(other, x) for other in attempt):
            continue  # start all over
        if a == 0 or bernoulli_factory(draws, x, a, generator):
            return x


def temperature_sample_batch(pool, temperature, generator=None):
    """
    Chooses from N draws as if from P(x)^(1/T) / Z.       (paper, section 5: the batch approximation)
    pool (..., N, K) int: N draws of a chunk  ->  (..., K), the choice from each pool by itself.

    For T = 1/n, a value that was drawn c times fills C(c, n) of the ways to pick n draws from the
    pool: that is its weight. If no value was drawn n times, n is lowered. For any other T the same
    formula is used, with Gamma functions for factorials. Biased for a finite N; exact as N grows.
    """
    rows = [choose(draws, temperature, generator) for draws in pool.flatten(0, -3).cpu()]
    return torch.stack(rows).view(*pool.shape[:-2], -1).to(pool.device)


def choose(draws, temperature, generator=None):
    """`temperature_sample_batch` for one pool: (N, K) -> (K,)."""
    n, a = inverse_temperature(temperature)
    values, counts = torch.unique(draws, dim=0, return_counts=True)  # (U, K), (U,)
    power = n + a
    if counts.max() < n:  # the fallback
        n = power = counts.max().item()
    # log C(c, power) but for a constant; impossible for values drawn fewer than n times.
    c = counts.double()
    log_weights = torch.lgamma(c + 1) - torch.lgamma((c - power).clamp_min(-a) + 1)
    log_weights = log_weights.masked_fill(counts < n, -torch.inf)
    weights = (log_weights - log_weights.max()).exp()
    return values[weights.multinomial(1, generator=generator)[0]]


# -------------------------------------------------------------------------------------------------
# Generation


def next_chunk(model, hidden, temperature, pool, generator):
    """hidden (B, d): the state that predicts the next chunk  ->  (B, K) int."""
    if isinstance(model, TransformerLM):  # has logits, which can be divided by the temperature
        return model.draw_chunks(hidden, 1, generator, temperature)[0]
    if temperature == 1:
        return model.draw_chunks(hidden, 1, generator)[0]
    if pool is not None:
        draws = model.draw_chunks(hidden, pool, generator)  # (N, B, K)
        return temperature_sample_batch(draws.transpose(0, 1), temperature, generator)
    # The exact method: each text needs its own number of draws.
    rows = []
    for h in hidden:
        draw = lambda n: model.draw_chunks(h, n, generator)
        rows.append(temperature_sample_exact(draw, temperature, generator=generator))
    return torch.stack(rows)


@torch.no_grad()
def generate(model, prompt, n_tokens, temperature=1.0, pool=200, generator=None):
    """
    Continues each prompt: (B, T) int, T >= K  ->  (B, T + n_tokens) int. pool: how many draws the
    batch method chooses from; None: the exact method.

    The model reads whole chunks. Training sequences begin anywhere in the text, so a prompt may
    lose its first T mod K tokens for that. (The released code pads inside the text instead.)
    """
    K = model.config.chunk_size
    T = prompt.shape[1]
    assert T >= K, f"a prompt must have at least {K} tokens, one chunk"
    longest = model.config.context // K - 1  # chunks of history that training has shown
    text = prompt
    unread = prompt[:, T % K :][:, -longest * K :]
    cache = KVCache()
    while text.shape[1] < T + n_tokens:
        # Read what is new, and draw the next chunk.
        hidden = model.hidden_states(unread, cache)[:, -1]  # (B, d)
        chunk = next_chunk(model, hidden, temperature, pool, generator)  # (B, K)
        # Append and continue.
        text = torch.cat([text, chunk], dim=1)
        unread = chunk
        if cache.length == longest:
            # The context is full: start again from the newest half of it.
            cache = KVCache()
            unread = text[:, -max(1, longest // 2) * K :]
    return text[:, : T + n_tokens]


# -------------------------------------------------------------------------------------------------
# Tokenizers and checkpoints

END_OF_TEXT = "<|endoftext|>"
# How a text is cut into pieces before byte pairs are merged. A file of ranks does not say it, so all
# files are read with Llama 3's rule. tiktoken's own encodings (gpt2, …) bring theirs.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_encoding(ranks):
    """The tiktoken.Encoding of {token bytes: rank}; one token that ends a text follows the ranks."""
    end = len(ranks)
    if end == 128_000:  # Llama 3's token that begins a text comes first
        end += 1
    special = {END_OF_TEXT: end}
    return tiktoken.Encoding("ranks", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def load_tokenizer(name):
    """A tiktoken.Encoding: "bytes", a file of ranks, or one of tiktoken's names (gpt2, …)."""
    if name == "bytes":
        return make_encoding({bytes([b]): b for b in range(256)})
    try:
        if not Path(name).exists():
            return tiktoken.get_encoding(name)
        lines = [line.split() for line in Path(name).read_text().splitlines()]
        return make_encoding({base64.b64decode(token): int(rank) for token, rank in lines})
    except (ValueError, OSError):
        raise ValueError(
            f"the tokenizer {name} is neither bytes, nor a file of lines BASE64 RANK, nor one that "
            f"tiktoken can fetch: {', '.join(tiktoken.list_encoding_names())}"
        ) from None


def build_model(kind, configs):
    """A new "autoencoder", "calm" or "baseline"; configs: {kind: dict}, CALM's with both."""
    if kind == "baseline":
        return TransformerLM(TransformerConfig(**configs["baseline"]))
    autoencoder = Autoencoder(AutoencoderConfig(**configs["autoencoder"]))
    if kind == "autoencoder":
        return autoencoder
    return CALM(CALMConfig(**configs["calm"]), autoencoder)


def load_checkpoint(out_dir, kind):
    """What train.py wrote to {kind}.pt, a dict: see `save_checkpoint` there."""
    path = Path(out_dir, f"{kind}.pt")
    if not path.exists():
        raise ValueError(f"there is no {path}: train it with python train.py, or name its --out_dir")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_model(out_dir, kind):
    """The model in {kind}.pt, for evaluation, and its tokenizer."""
    checkpoint = load_checkpoint(out_dir, kind)
    with torch.device("meta"):  # shapes without memory: the weights are then put in place
        model = build_model(kind, checkpoint["configs"])
    model.load_state_dict(checkpoint["weights"], assign=True)
    return model.eval(), tiktoken.Encoding("saved", **checkpoint["tokenizer"])


# -------------------------------------------------------------------------------------------------
# The command


def write_text(model, encoding, prompt, n_tokens, temperature, pool=200):
    """`prompt` and its continuation, up to the end of the text if the model ends it: strings."""
    # A prompt shorter than one chunk gets newlines in front.
    ids = encoding.encode_ordinary(prompt)
    ids = encoding.encode_ordinary("\n") * (model.config.chunk_size - len(ids)) + ids
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    out = generate(model, tokens, n_tokens, temperature, pool)
    new = out[0, len(ids) :].tolist()
    if encoding.eot_token in new:
        new = new[: new.index(encoding.eot_token)]
    # A model's vocabulary may be larger than its tokenizer's.
    known = [token for token in new if token < len(encoding._mergeable_ranks)]
    return prompt + encoding.decode(known)


def pick_device(name):
    """The torch device of that name; for "auto" the best there is."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def run(main):
    """Runs a script's main. A mistake of the user's is one sentence on stderr, exit status 2."""
    try:
        main()
    except (AssertionError, ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description="Write text with a trained model.")
    add = parser.add_argument
    add("--out_dir", default="out/quick", help="where train.py left calm.pt")
    add("--model", choices=("calm", "baseline"), default="calm", help="which of the models there")
    add("--pretrained", metavar="DIR", help="instead of --out_dir: a folder of released weights")
    add("--autoencoder", metavar="DIR", help="with --pretrained: a folder of another autoencoder")
    add("--tokenizer", default="bytes", metavar="FILE", help="with --pretrained: its tokenizer.model")
    add("--prompt", default="\n", help="the text to continue, or FILE:path")
    add("--n_tokens", type=int, default=500, help="tokens to write")
    add("--n_samples", type=int, default=1, help="texts to write")
    add("--temperature", type=float, default=0.5, help="above 0, for CALM at most 1")
    add("--method", choices=("batch", "exact"), default="batch", help="for temperatures below 1")
    add("--pool", type=int, default=200, help="draws from which the batch method chooses a chunk")
    add("--seed", type=int, default=0, help="another seed writes another text")
    add("--device", default="auto", help="cpu, cuda or mps")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.pretrained:
        autoencoder = None
        if args.autoencoder:
            autoencoder = Autoencoder.from_pretrained(args.autoencoder)
        model = CALM.from_pretrained(args.pretrained, autoencoder)
        encoding = load_tokenizer(args.tokenizer)
    else:
        model, encoding = load_model(args.out_dir, args.model)
    model.to(pick_device(args.device))
    prompt = args.prompt
    if prompt.startswith("FILE:"):
        prompt = Path(prompt[5:]).read_text()
    pool = args.pool if args.method == "batch" else None
    for i in range(args.n_samples):
        if i > 0:
            print("-" * 80)
        print(write_text(model, encoding, prompt, args.n_tokens, args.temperature, pool))


if __name__ == "__main__":
    run(main)
