"""
From a trained model to text: temperature without likelihoods, generation, and `python sample.py`.    (paper, section 5)

A softmax model is sharpened by dividing its logits by T. CALM has no logits, it can only be drawn from. But counting draws
is enough: P(x)^n is the probability that n independent draws are all x. The file has four parts: temperature sampling (pure
functions on tensors, for any sampler), generation with CALM, tokenizers and checkpoints, and the command.

Letters: those of autoencoder.py (B, T, K, d, ...), N draws in a pool; T in formulas is the temperature, in shapes the number of tokens.
"""

import argparse
import base64
import functools
import itertools
import math
import os
import signal
import sys
import warnings

import numpy as np
import regex
import tiktoken
import torch

from autoencoder import Autoencoder, AutoencoderConfig, InputError
from calm import CALM, CALMConfig, KVCache, TransformerConfig, TransformerLM
from classroom.recipes import ChoiceCALM
from classroom.texts import END_OF_TEXT, PIECES, read_file

# ----------------------------------------------------------------------------------------------------------------------
# Temperature


def inverse_temperature(temperature):
    """
    1/T = n + a as (n, a), a whole number and a fraction 0 <= a < 1. Within 0.004 of a whole number it is taken for that:
    whoever types 0.333 means 1/3. Raises InputError unless 0 < T <= 1.
    """
    if not 1e-6 <= temperature <= 1:
        raise InputError(f"the temperature must be above 0 (at least 1e-6) and at most 1, not {temperature:g}.")
    n = math.floor(1 / temperature + 4e-3)
    a = 1 / temperature - n
    return (n, 0.0) if a < 4e-3 else (n, a)


def temperature_sample_exact(draw, temperature, max_draws=1_000_000, block=256, with_draws=False, generator=None):
    """
    One draw from P(x)^(1/T) / Z, exactly, for any 0 < T <= 1, given nothing but draws from P.  (paper, section 5)

    draw(m) -> (m, K) int: m independent draws  ->  (K,) int; with_draws=True: that, and the number of draws it took.
    Raises InputError after max_draws draws: an answer then would be biased towards the values that are accepted early.

    With 1/T = n + a, an attempt makes n draws. If all of them are equal, to x say (probability P(x)^n), a *Bernoulli factory*
    accepts x with probability P(x)^a: for i = 1, 2, ... it draws again; if that is x, it accepts; if not, it gives up with
    probability a/i. Why that is P(x)^a: with q = 1 - P(x), it reaches trial i+1 with probability
        q^i (1-a/1)(1-a/2)...(1-a/i),   and sum_i of it  = (1-q)^(a-1) = P(x)^(a-1),   the binomial series,
    which is the expected number of trials, each of which accepts with probability P(x). So an attempt accepts x with
    probability P(x)^(n+a), takes n + sum_x P(x)^(n+a-1) draws on average (just n if a = 0), and in all one needs
        (n + sum_x P(x)^(1/T - 1)) / sum_x P(x)^(1/T)   draws.
    The draws are made in blocks, to keep a GPU busy, but read one after the other, each once: to throw a draw away because of
    what it is, or to read it in two attempts, would make the attempts depend on each other.
    """
    n, a = inverse_temperature(temperature)
    used, like = 0, None  # draws read; the last block, for its dtype and device

    def read():
        nonlocal used, like
        while True:
            like = draw(block)
            for row in like.tolist():
                if used == max_draws:
                    raise InputError(f"no chunk was accepted in {max_draws:,} draws at temperature {temperature:g}: take a higher "
                                     "temperature, or the batch method.")  # fmt: skip
                used += 1
                yield row

    draws = read()
    while True:
        x, *others = itertools.islice(draws, n)
        if all(other == x for other in others) and (a == 0 or bernoulli_factory(draws, x, a, generator)):
            return (like.new_tensor(x), used) if with_draws else like.new_tensor(x)


def bernoulli_factory(draws, x, a, generator=None):
    """True with probability P(x)^a, 0 < a < 1; draws: an iterator over lists of K ints, x: one. See `temperature_sample_exact`."""
    device = generator.device if generator else "cpu"
    for i in itertools.count(1):
        if next(draws) == x:
            return True
        if torch.rand((), generator=generator, device=device).item() < a / i:
            return False


def distinct_draws(draws):
    """
    The different chunks of each pool: draws (pools, N, K) int >= 0, an array  ->  three arrays with one entry for each, pool by
    pool: the number of its pool, the place of one of its draws in it, and how often it was drawn.
    """
    n_pools, N, K = draws.shape
    size, place_bits = int(draws.max()) + 1, N.bit_length()
    ids, n_ids = np.zeros((n_pools, 1), np.int64), 1
    for token in np.ascontiguousarray(np.moveaxis(draws, -1, 0)):  # a chunk becomes one number, its tokens are the digits ...
        if (n_ids * size) << place_bits >= 2**63:  # ... made smaller where they would overflow
            ids = np.unique(ids, return_inverse=True)[1].reshape(n_pools, -1)
            n_ids = int(ids.max()) + 1
        ids, n_ids = ids * size + token, n_ids * size
    # Sorting brings equal chunks together, where comparing all pairs takes N^2; a draw's place travels in the lowest bits.
    ids = np.sort((ids << place_bits) | np.arange(N), axis=-1)
    places, ids = ids & ((1 << place_bits) - 1), ids >> place_bits  # taken apart again, now in order
    last = np.flatnonzero(np.diff(ids, append=-1))  # of a run of equals: the next differs, or the pool ends
    return last // N, places.ravel()[last], np.diff(last, prepend=-1)  # from end to end of the runs: their lengths


@functools.lru_cache(maxsize=8)
def log_weights(N, temperature):
    """For each count c = 0 … N the logarithm of its weight in `temperature_sample_batch`: an array (N + 1,)."""
    n, a = inverse_temperature(temperature)
    c = torch.arange(N + 1, dtype=torch.float64)
    log_c_choose_s = torch.lgamma(c + 1) - torch.lgamma((c - n - a).clamp_min(-a) + 1)  # but for Gamma(s+1), the same for all c
    return torch.where(c < n, 1000 * (c - n), log_c_choose_s).numpy()  # counts below n: the fallback


def temperature_sample_batch(pool, temperature, generator=None):
    """
    Choose from N draws as if from P(x)^(1/T) / Z, any 0 < T <= 1.          (paper, section 5: the batch approximation)

    pool (..., N, K) int: N independent draws of a chunk  ->  the chosen chunk (..., K); each leading index is its own pool.

    For T = 1/n, a value that was drawn c times fills C(c, n) of the C(N, n) ways to pick n draws, so that is its weight: it
    is as if the exact method had made one attempt on the pool in every order. That holds for any 1/T = s, with
    C(c, s) = Gamma(c+1) / (Gamma(s+1) Gamma(c-s+1)) for c >= floor(s), else 0. Let an exact attempt read the pool in random
    order, and its factory accept when the pool ends: then it accepts the value with probability C(c, s) / C(N, s) (by the
    Chu-Vandermonde identity). Where no value was drawn floor(s) times, s is lowered to the largest count (the paper: n-1, n-2, ...).
    Biased for a finite N, by that fallback and because a ratio of unbiased weights is biased; exact as N goes to infinity.
    The released code has this method alone, for T = 1/n, in a loop over the rows.
    """
    *leading, N, K = pool.shape
    log_weight = log_weights(N, temperature)
    draws = pool.reshape(-1, N, K).cpu().numpy()  # numpy sorts small rows of integers several times faster than torch
    pools, places, counts = distinct_draws(draws)
    # The Gumbel-max trick: log w + Gumbel noise is largest for a value with probability w / sum of w, with no sum to overflow.
    # The noise lies between -7 and 37, so e^-1000 for each draw short of n never beats a count of n; where all are short, the
    # largest count wins, equals at random, which is C(c, s) at s = that count: the fallback.
    device = generator.device if generator else torch.device("cpu")
    real = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    uniform = torch.rand(len(pools), generator=generator, device=device, dtype=real).clamp_min(torch.finfo(real).tiny)
    noise = -(-uniform.log()).log().cpu().numpy()
    score = log_weight[counts] + noise
    starts = np.searchsorted(pools, np.arange(len(draws)))  # where the entries of each pool begin
    best = score == np.maximum.reduceat(score, starts)[pools]  # the largest of its pool
    chosen = np.empty((len(draws), K), draws.dtype)
    chosen[pools[best]] = draws[pools[best], places[best]]
    return torch.from_numpy(chosen).view(*leading, K).to(pool.device)


# ----------------------------------------------------------------------------------------------------------------------
# Generation


def draws_that_begin_with(model, hidden, beginning, n, max_draws, generator=None):
    """
    n draws of the next chunk whose first tokens are given: hidden (d,), beginning (r,), 0 <= r < K  ->  (n, K).

    Drawing whole chunks and keeping those that begin with the r given tokens is *exact* conditioning without likelihoods:
    what is kept is distributed as P(chunk | its first r tokens, history), by the definition of conditional probability. It
    costs n / P(first r tokens) draws. If none of the first `max_draws` draws agrees, those that agree longest are taken and
    the given tokens are written over their beginnings: that is no longer exact, so a warning is issued.
    """
    r = len(beginning)
    kept, n_drawn, longest = [], 0, 0  # `longest`: tokens that the draws in `kept` share with the beginning
    # While too few agree; or none does yet, and there are draws to spare.
    while (longest == r and sum(map(len, kept)) < n) or (longest < r and n_drawn < max_draws):
        draws = model.draw_chunks(hidden, 1000 if r else n, generator=generator)
        n_drawn += len(draws)
        agreed = (draws[:, :r] == beginning).long().cumprod(-1).sum(-1)  # tokens, from the first to the last that agrees
        if agreed.max() > longest:
            kept, longest = [], int(agreed.max())
        kept.append(draws[agreed == longest])
    kept = torch.cat(kept)
    if longest < r:
        warnings.warn(f"none of {n_drawn} draws began with the last {r} tokens of the prompt: {longest} agreed, the others are forced.")
        kept = torch.cat([beginning.expand(len(kept), r), kept[:, r:]], dim=1).repeat(math.ceil(n / len(kept)), 1)
    return kept[:n]


@torch.no_grad()
def generate(model, prompt, n_tokens, temperature=1.0, method="batch", pool=200, generator=None, lead=None,
             max_draws=20_000, draws_used=None):  # fmt: skip
    """
    Continue each prompt by n_tokens tokens: prompt (B, T) int, T >= 1  ->  (B, T + n_tokens) int. At temperature 1 (of a
    TransformerLM: at any) a step is one draw. Below, the method is "batch" (choose from `pool` draws) or "exact" (draw until
    an attempt is accepted, raising InputError after 1 000 · max_draws). The list `draws_used`, if given, gets the number of
    draws that were read for each chunk, without those that did not begin with the prompt's last tokens.

    - The last (number of tokens mod K) tokens of a prompt fill no chunk: they are the beginning of the first chunk to be generated, which
      `draws_that_begin_with` draws. So nothing is padded inside the text, where training has never shown padding.
    - A prompt shorter than one chunk is completed to one *in front*, with the token `lead` (its own first token if None),
      because there must be something to condition on. The result does not contain these.
    - The model sees at most the history it was trained on, `config.context` less one chunk: of a longer prompt, the end. When
      a text outgrows it, the newest half is read again into a new cache.
    """
    K = model.config.chunk_size
    B, T = prompt.shape
    if T < 1:
        raise ValueError("generate needs a prompt of at least one token")
    draw_chunks = model.draw_chunks
    if isinstance(model, TransformerLM):  # its logits can be divided by the temperature: what is drawn then needs none
        draw_chunks, temperature = functools.partial(draw_chunks, temperature=temperature), 1.0
    sharper = inverse_temperature(temperature) != (1, 0.0)
    n, exact = pool if sharper else 1, sharper and method == "exact"
    longest = model.config.context // K - 1  # chunks of history
    in_front = max(0, K - T)
    first = prompt[:, :1] if lead is None else torch.full_like(prompt[:, :1], lead)
    prompt = torch.cat([first.expand(-1, in_front), prompt], dim=1)

    text, left_over = prompt.split([prompt.shape[1] // K * K, prompt.shape[1] % K], dim=1)
    cache, chunk = KVCache(), text[:, -longest * K :]
    while text.shape[1] < prompt.shape[1] + n_tokens:
        hidden = model.hidden_states(chunk, cache)[:, -1]  # (B, d): predicts the next chunk
        used = [n] * B
        if left_over.shape[1] or exact:  # one sequence at a time: each needs its own number of draws
            rows = []
            for b in range(B):
                draw = functools.partial(draws_that_begin_with, model, hidden[b], left_over[b], max_draws=max_draws, generator=generator)
                if exact:
                    row, used[b] = temperature_sample_exact(draw, temperature, 1000 * max_draws, with_draws=True, generator=generator)
                else:
                    row = temperature_sample_batch(draw(n), temperature, generator)
                rows.append(row)
            chunk, left_over = torch.stack(rows), left_over[:, :0]  # tokens are left over only before the first chunk
        else:
            draws = draw_chunks(hidden, n, generator=generator)  # (n, B, K)
            chunk = temperature_sample_batch(draws.transpose(0, 1), temperature, generator) if n > 1 else draws[0]
        if draws_used is not None:
            draws_used.extend(used)
        text = torch.cat([text, chunk], dim=1)
        if cache.length == longest:
            cache, chunk = KVCache(), text[:, -max(1, longest // 2) * K :]
    return text[:, in_front : prompt.shape[1] + n_tokens]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers and checkpoints

# A token's *rank* is its number, in the order of the merges. Llama 3's way to cut a text, and its special tokens, which follow
# the ranks of its `tokenizer.model`.
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_reserved = [f"<|reserved_special_token_{i}|>" for i in range(251)]
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *_reserved[:4], "<|start_header_id|>", "<|end_header_id|>",
                  _reserved[4], "<|eot_id|>", *_reserved[5:]]  # fmt: skip


def make_encoding(ranks, pattern=PIECES, special_tokens=None):
    """A tiktoken.Encoding from {token bytes: rank}; one end-of-text token follows the ranks unless special tokens are given."""
    special_tokens = special_tokens or {END_OF_TEXT: max(ranks.values()) + 1}
    return tiktoken.Encoding("calm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)


def ranks_to_text(ranks):
    """{token bytes: rank} in tiktoken's file format: one line per token, its bytes in base64, a space, its rank."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def ranks_from_text(text, source):
    """The inverse of `ranks_to_text`. Raises InputError, naming `source` and the line, where the text is not that."""
    ranks = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise InputError(f"{source} is not a file of token ranks: line {number} is not 'BASE64 RANK'.") from None
    numbers = {*ranks.values()}
    if not all(bytes([b]) in ranks for b in range(256)) or len(numbers) < len(ranks) or not numbers <= {*range(2 * len(ranks))}:
        raise InputError(f"{source} is not a file of token ranks: it must hold all 256 single bytes, no rank twice, and few gaps.")
    return ranks


def load_tokenizer(name_or_file):
    """
    A tiktoken.Encoding from a ranks file, or by tiktoken's name (`gpt2`, …). A file called `tokenizer.model` is Llama 3's,
    which holds its ranks alone: the pattern and the special tokens are in the code that reads it.
    """
    if os.path.exists(name_or_file):
        ranks = ranks_from_text(read_file(name_or_file), name_or_file)
        if os.path.basename(name_or_file) != "tokenizer.model":
            return make_encoding(ranks)
        return make_encoding(ranks, LLAMA3_PIECES, {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIAL)})
    names = tiktoken.list_encoding_names()
    if name_or_file not in names:
        raise InputError(f"{name_or_file} is neither a tokenizer file nor one of tiktoken's encodings ({', '.join(names)}).")
    try:
        return tiktoken.get_encoding(name_or_file)
    except Exception as error:  # tiktoken downloads the ranks: everything that a network can do wrong arrives here
        raise InputError(f"tiktoken could not fetch {name_or_file} ({type(error).__name__}): give --tokenizer FILE, its ranks.") from None


def end_of_text(encoding):
    """The special token that separates documents, as text. Raises InputError for a tokenizer without one."""
    for mark in (END_OF_TEXT, "<|end_of_text|>"):
        if mark in encoding.special_tokens_set:
            return mark
    raise InputError(f"the tokenizer {encoding.name} has no end-of-text token: take another.")


def load_checkpoint(out_dir, name):
    """
    What train.py saved in `out_dir`/`name`.pt: the dict {"kind", "weights", "autoencoder_config", …}, and its tokenizer.
    With weights_only=True nothing in a file can run as code: it may hold tensors, numbers, strings and containers of them.
    """
    path = os.path.join(out_dir, f"{name}.pt")
    if not os.path.exists(path):
        raise InputError(f"there is no {path}: train one with python train.py --out_dir {out_dir}, or name another --out_dir.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever a damaged file makes torch raise
        raise InputError(f"{path} cannot be read: it is damaged, or no checkpoint of train.py.") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("kind") != name:
        raise InputError(f"{path} is a checkpoint of something else, not of train.py's {name}.")
    saved = checkpoint["tokenizer"]
    return checkpoint, make_encoding(ranks_from_text(saved["ranks"], path), saved["pattern"], saved["special_tokens"])


def load_model(out_dir, name):
    """
    The trained "autoencoder", "calm" (its frozen autoencoder inside) or "baseline", its tokenizer, its part of summary.json.
    Raises InputError for a checkpoint that is missing, damaged, or made by something else.
    """
    try:
        checkpoint, encoding = load_checkpoint(out_dir, name)
        with torch.device("meta"):  # shapes without memory: the weights are put in their places, not copied
            if name == "baseline":
                model = TransformerLM(TransformerConfig(**checkpoint["baseline_config"]))
            else:
                model = Autoencoder(AutoencoderConfig(**checkpoint["autoencoder_config"]))
            if name == "calm":
                model = (ChoiceCALM if checkpoint.get("recipe") == "choices" else CALM)(CALMConfig(**checkpoint["calm_config"]), model)
        model.load_state_dict(checkpoint["weights"], assign=True)
        fit = all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in model.state_dict().values())
        if not fit or encoding.n_vocab > model.config.vocab_size or regex.match(encoding._pat_str, ""):
            raise ValueError("weights that are no numbers or too few for the tokenizer, or one that cuts texts into nothing")
        return model.eval(), encoding, {**checkpoint["summary"]}
    except InputError:
        raise
    except Exception as error:  # whatever wrong contents make Python and torch raise
        raise InputError(f"{out_dir}/{name}.pt is damaged, or of another version of train.py ({type(error).__name__}).") from None


# ----------------------------------------------------------------------------------------------------------------------
# The command


def write_text(model, encoding, prompt, n_tokens, temperature, method="batch", pool=200, generator=None, draws_used=None):
    """`prompt` (a string) and its continuation, up to the end of the document if the model ends it, as a string."""
    newline = encoding.encode_ordinary("\n")[0]  # a prompt shorter than one chunk begins on an empty page
    ids = encoding.encode_ordinary(prompt) or [newline]
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    out = generate(model, tokens, n_tokens, temperature, method, pool, generator, lead=newline, draws_used=draws_used)
    known = {*encoding._mergeable_ranks.values(), *encoding._special_tokens.values()}  # a vocabulary may have unused numbers
    known = [token for token in out[0, len(ids) :].tolist() if token in known]
    return prompt + encoding.decode(known).split(end_of_text(encoding))[0]


def pick_device(name):
    """The torch device of that name; for "auto" the best there is. Raises InputError for one that this machine lacks."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = here[0] if name == "auto" else name
    try:
        torch.zeros(1, device=name if name.split(":")[0] in here else "none")  # "none" raises, and so does cuda:7 where there is one GPU
        return name
    except RuntimeError:
        raise InputError(f"there is no device {name} here: choose {' or '.join(here)}.") from None


def run(main):
    """
    Runs a script's main(). A mistake of the user's, a file that cannot be written or too little memory become one sentence on
    stderr and exit status 2; Ctrl-C and SIGTERM become status 130; both after whatever was half-written is removed.
    """
    name = os.path.basename(sys.argv[0])
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"  # without the source code around it
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what this terminal cannot show is a ?
    try:
        main()
        sys.stdout.flush()  # here, where a full disk is still an error like the others
    except KeyboardInterrupt as stopped:
        print(f"{name}: {str(stopped) or 'stopped.'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except (InputError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in ("out of memory", "allocate", "Storage size")):
            raise  # a mistake of ours
        print(f"{name}: there is not enough memory for that: take smaller numbers.", file=sys.stderr)
        sys.exit(2)


def main():
    parser = argparse.ArgumentParser(description="Write text with a trained model.")
    parser.add_argument("--out_dir", default="out/quick", help="where train.py left calm.pt (default: out/quick)")
    parser.add_argument("--model", choices=("calm", "baseline"), default="calm", help="which of the models there (default: calm)")
    parser.add_argument("--pretrained", metavar="DIR", help="instead of --out_dir: a folder of the released layout")
    parser.add_argument("--autoencoder", metavar="DIR", help="with --pretrained: the folder of another copy of its autoencoder")
    parser.add_argument("--tokenizer", metavar="FILE", help="with --pretrained: its tokenizer.model, or another file of ranks")
    parser.add_argument("--prompt", default="\n", help="the text to continue, or FILE:path (default: an empty line)")
    parser.add_argument("--n_tokens", type=int, default=500, help="tokens to write (default: 500)")
    parser.add_argument("--n_samples", type=int, default=1, help="texts to write (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.5, help="above 0; for CALM at most 1 (default: 0.5)")
    parser.add_argument("--method", choices=("batch", "exact"), default="batch",
                        help="choose from a pool of draws, or draw until an attempt is accepted (default: batch)")  # fmt: skip
    parser.add_argument("--pool", type=int, default=200, help="draws to choose a chunk from when T < 1 (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="another seed writes another text (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
    args = parser.parse_args()

    if args.model == "calm":
        inverse_temperature(args.temperature)
    elif not 1e-6 <= args.temperature < math.inf:
        raise InputError(f"the temperature must be above 0 (at least 1e-6), not {args.temperature:g}.")
    if not all(0 < n < 2**31 for n in (args.n_tokens, args.n_samples, args.pool)):
        raise InputError("--n_tokens, --n_samples and --pool must be at least 1 and below 2 billion.")
    prompt = read_file(args.prompt[5:]) if args.prompt.startswith("FILE:") else args.prompt
    device = pick_device(args.device)
    if args.pretrained:
        if not args.tokenizer:
            raise InputError("--pretrained needs --tokenizer FILE, the model's tokenizer.model.")
        model, encoding = CALM.from_pretrained(args.pretrained, args.autoencoder), load_tokenizer(args.tokenizer)
        if max(encoding._mergeable_ranks.values()) >= model.config.vocab_size:
            raise InputError(f"{args.tokenizer} has more tokens than the model's vocabulary of {model.config.vocab_size}.")
    else:
        model, encoding, _ = load_model(args.out_dir, args.model)
    n_prompt, longest = len(encoding.encode_ordinary(prompt)), model.config.context - model.config.chunk_size
    if n_prompt > longest:
        warnings.warn(f"the prompt has {n_prompt} tokens and the model sees {longest}: its end is what counts.")
    generator = torch.Generator(device).manual_seed(args.seed % 2**64)
    model, draws_used = model.to(device), []
    for i in range(args.n_samples):
        text = write_text(model, encoding, prompt, args.n_tokens, args.temperature, args.method, args.pool, generator, draws_used)
        print("\n" + "-" * 80 + "\n" if i else "", text, sep="")
    if args.temperature < 1 and args.model == "calm":
        print(f"{sum(draws_used) / len(draws_used):,.1f} draws per chunk, at most {max(draws_used):,}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
