"""
`python train.py`: from plain text to a trained CALM, its score, a sample and a picture.

    text -> tokens -> autoencoder (stage 1) -> frozen -> CALM (stage 2) -> BrierLM, sample.txt, curves.png, summary.json

The file is a straight line from top to bottom: settings, text as tokens, optimisation, checkpoints, the two stages, the report.

A run that was stopped, by Ctrl-C or a power cut, goes on with `python train.py --resume`, on a CPU bit for bit as if it had not
been. On several GPUs: `torchrun --nproc_per_node=N train.py …`, the same batch and schedule, each process a share of the batch.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import sample
from autoencoder import Autoencoder, AutoencoderConfig, InputError
from calm import CALM, CALMConfig, TransformerConfig, TransformerLM, evaluate_brier, flops_per_token
from classroom.curves import draw_curves, how_busy
from classroom.recipes import RECIPES, ChoiceCALM, build_calm
from classroom.texts import read_documents, read_json, train_bpe

# ----------------------------------------------------------------------------------------------------------------------
# Settings. Each row is a flag, each preset a column of defaults.

PRESETS = ("quick", "gpu", "calm_m")  # two CPU cores and minutes; one GPU and hours; the published CALM-M, GPUs and weeks
SETTINGS = {
    "data": ("shakespeare", "shakespeare", "shakespeare", "shakespeare, a text file, a folder of text files, or a URL; .gz and .xz are opened"),
    "vocab_size": (256, 8192, 32_768, "256 is plain bytes; more trains a byte-level BPE on the text"),
    "chunk_size": (4, 4, 4, "K, tokens in a chunk"),
    "latent_size": (32, 128, 128, "l, size of a chunk's vector"),
    "autoencoder_hidden_size": (128, 512, 512, "width of the autoencoder"),
    "autoencoder_batch_size": (512, 8192, 131_072, "chunks in a step of the autoencoder"),
    "autoencoder_steps": (800, 20_000, 30_000, "steps of the autoencoder"),
    "autoencoder_lr": (2e-3, 3e-4, 3e-4, "highest learning rate of the autoencoder"),
    "hidden_size": (128, 768, 1024, "d, width of the Transformer and of the head"),
    "n_layers": (4, 12, 16, "layers of the Transformer"),
    "n_heads": (4, 12, 16, "attention heads"),
    "n_head_blocks": (1, 3, 4, "blocks of the energy head; the paper takes a quarter of n_layers"),
    "n_samples": (4, 8, 8, "N, samples of the head at each position in the loss"),
    "context": (256, 2048, 8192, "tokens in a sequence"),
    "batch_size": (16, 32, 256, "sequences in a step"),
    "parts": (1, 2, 64, "a batch goes through the model in so many parts, one after the other or shared by processes, to save memory"),
    "steps": (3600, 40_000, 250_000, "steps of CALM"),
    "lr": (2e-3, 3e-4, 3e-4, "highest learning rate of CALM, unless the recipe brings its own"),
    "save_every": (120.0, 300.0, 600.0, "seconds between two checkpoints for --resume"),
}
BETAS, WEIGHT_DECAY, GRADIENT_CLIP = (0.9, 0.95), 0.1, 1.0  # AdamW, as published
REPORTS = 12  # reports in a stage
REPORT_CHUNKS = 10_000  # held-out chunks that the autoencoder is tried on
REPORT_SEQUENCES, FINAL_SEQUENCES = 64, 1024  # held-out sequences that a model is scored on: in a report, and at the end
BRIER_POSITIONS = 64  # places in each of them, at most
NOISE_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # standard deviations on z, for the picture
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 800, 0.5

# Set by torchrun: this process's number, how many there are, its number on this machine. Process 0 alone speaks, scores and writes.
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


def parse_settings():
    """
    (settings, run): the preset's column, overridden by the flags that were given; and the state of the run, new or, with
    --resume, as its newest checkpoint has it. Raises InputError for a value that cannot be.
    """
    parser = argparse.ArgumentParser(description="Train CALM from plain text. Any flag overrides the preset's value.")
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="a set of defaults (default: quick)")
    parser.add_argument("--stage", choices=("all", "autoencoder", "calm", "baseline"), default="all", help=(
        "calm takes the autoencoder and the tokenizer that are in --out_dir; baseline is a discrete Transformer (default: all)"))
    parser.add_argument("--recipe", choices=RECIPES, help="choices: for small runs; energy: the paper's head; released: all as "
                        "the released code (default of quick: choices; of the others, where that was not tried: energy)")  # fmt: skip
    parser.add_argument("--out_dir", metavar="DIR", help="everything a run writes goes there (default: out/<preset>)")
    parser.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out_dir, which knows its flags")
    parser.add_argument("--tokenizer", metavar="NAME_OR_FILE", help="instead of --vocab_size: gpt2, …, or a ranks file")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--device", default="auto", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=(
        "of the Transformer's and the head's matrix products in training (default: bfloat16 on GPUs that have it, else float32)"))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the training step (default: on such GPUs)")
    for name, (*columns, text) in SETTINGS.items():
        defaults = ", ".join(f"{preset}: {value}" for preset, value in zip(PRESETS, columns))
        parser.add_argument(f"--{name}", type=type(columns[0]), help=f"{text} ({defaults})")
    settings, run = parser.parse_args(), {"stage": None, "log": []}
    if settings.resume:
        run = load_run(settings.out_dir or f"out/{settings.preset}")
        known = {name: value for name, value in run["settings"].items() if value is not None}
        flags = [f"--{name}={value}" for name, value in known.items() if name not in ("compile", "nproc_per_node")]
        flags += ["--compile" if run["settings"].get("compile") else "--no-compile"]
        settings = parser.parse_args(flags + sys.argv[1:])  # what is given again counts, and must be the same: see below
    settings.recipe = settings.recipe or ("choices" if settings.preset == "quick" else "energy")
    for name, (*columns, _) in SETTINGS.items():
        if getattr(settings, name) is None:
            brought = {} if settings.stage == "baseline" else RECIPES[settings.recipe]
            setattr(settings, name, brought.get(name, columns[PRESETS.index(settings.preset)]))
        elif name != "data" and not 0 < getattr(settings, name) < 2**31:
            raise InputError(f"--{name} must be above 0 and below 2 billion, not {getattr(settings, name)}.")
    if settings.stage == "baseline":
        settings.chunk_size = 1
    if settings.vocab_size < 256:
        raise InputError(f"--vocab_size must be at least 256 (plain bytes), not {settings.vocab_size}.")
    shares = WORLD * max(1, settings.parts // WORLD)
    if settings.batch_size % shares or settings.autoencoder_batch_size % shares:
        raise InputError(f"the batch sizes, {settings.batch_size} and {settings.autoencoder_batch_size}, must be multiples of "
                         f"{shares}, the shares that {WORLD} processes and --parts {settings.parts} make of them.")  # fmt: skip
    settings.out_dir = settings.out_dir or f"out/{settings.preset}"
    if torch.cuda.device_count() > LOCAL_RANK:
        torch.cuda.set_device(LOCAL_RANK)  # what "cuda" means from here on
    settings.device = sample.pick_device(settings.device)
    modern = settings.device.startswith("cuda") and torch.cuda.get_device_capability(settings.device) >= (8, 0)  # Ampere or newer
    settings.dtype = settings.dtype or ("bfloat16" if modern else "float32")
    settings.compile = (modern and os.name != "nt") if settings.compile is None else settings.compile
    settings.nproc_per_node = WORLD  # no flag of this script, but a run cannot go on with another number
    del settings.resume
    for name, value in run.setdefault("settings", dict(vars(settings))).items():  # of a new run: itself
        if name != "out_dir" and getattr(settings, name) != value:
            raise InputError(f"--{name} was {value} when this run began and cannot become {getattr(settings, name)}: leave it out.")
    return settings, run


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
    """
    Writes a text, or calls content(path), to a temporary path and renames it: a reader never finds half a file. Nothing is
    written by any process but the first. Raises OSError, for a full disk too.
    """
    if RANK:
        return
    temporary = f"{path}.part"
    try:
        Path(temporary).write_text(content, encoding="utf-8") if isinstance(content, str) else content(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on the disk, not on its way there, before the old file is given up
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the second
        raise OSError(f"{path} could not be written: is the disk full? ({getattr(error, 'strerror', None) or str(error).splitlines()[:1]})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ----------------------------------------------------------------------------------------------------------------------
# Text as tokens


def where_to_cut(lengths, share=0.05):
    """
    A position in each document, from their lengths: what is before goes to training, the rest is held out. Whole documents
    where some have a fitting size, else the end of the longest. Does not depend on --seed, so that runs can be compared.
    """
    cuts, wanted, size = list(lengths), share * sum(lengths), 0
    for i in random.Random(0).sample(range(len(lengths)), len(lengths)):
        if size < wanted and size + lengths[i] <= 2 * wanted:
            cuts[i], size = 0, size + lengths[i]
    if size < wanted / 2:  # then the longest was too long to be among them
        cuts[lengths.index(max(lengths))] -= math.ceil(wanted - size)
    return cuts


def split_source(source):
    """
    (training, held_out, description): two functions that yield the documents of one part, read from the source anew at each
    call, because they may be more than memory holds; and what summary.json says of it.
    """
    digest, lengths = hashlib.sha256(), []
    for document in read_documents(source):
        digest.update(((sample.END_OF_TEXT if lengths else "") + document).encode("utf-8"))
        lengths.append(len(document))
    if not lengths:
        raise InputError(f"there is no text in {source}.")
    cuts = where_to_cut(lengths)

    def part(held_out):
        texts = ((text[cut:] if held_out else text[:cut]) for text, cut in zip(read_documents(source), cuts))
        return (text for text in texts if text)

    characters = sum(lengths) + len(sample.END_OF_TEXT) * (len(lengths) - 1)
    description = {"source": source, "characters": characters, "sha256": digest.hexdigest()}
    return (lambda: part(False)), (lambda: part(True)), description


def encode_documents(encoding, documents, at_once=2**24):
    """Yields the tokens of all the documents, each followed by one end-of-text token, as int32 arrays, one for some `at_once` characters."""
    end, group, size = encoding.encode(sample.end_of_text(encoding), allowed_special="all"), [], 0
    for document in itertools.chain(documents, [None]):  # None: there are no more
        if group and (document is None or size > at_once):
            ids = encoding.encode_ordinary_batch(group, num_threads=os.cpu_count() or 1)
            yield np.concatenate([np.array(tokens + end, np.int32) for tokens in ids])
            group, size = [], 0
        if document is not None:
            group.append(document)
            size += len(document)


def prepare_data(settings, encoding=None):
    """
    The text as tokens: train (T,) and validation (T,), int32, mapped from the files train.bin and validation.bin in --out_dir,
    so that they need no memory; the encoding (made here if none is given); what summary.json says of the text.
    """
    paths, shared = [Path(settings.out_dir, name) for name in ("train.bin", "validation.bin")], [None, None]
    if RANK == 0:
        training, held_out, data = split_source(settings.data)
        if encoding is None and settings.tokenizer:
            encoding = sample.load_tokenizer(settings.tokenizer)
        elif encoding is None:
            encoding = sample.make_encoding(train_bpe(training(), settings.vocab_size))
        for path, documents in zip(paths, (training, held_out)):
            write_atomically(path, lambda part: write_tokens(part, encode_documents(encoding, documents()), settings.context))
        shared = [encoding, data | {"tokens": sum(path.stat().st_size // 4 for path in paths)}]
    if WORLD > 1:
        dist.broadcast_object_list(shared)
    train, validation = (torch.from_file(str(path), shared=True, size=path.stat().st_size // 4, dtype=torch.int32) for path in paths)
    encoding, data = shared
    print(f"data: {settings.data}: {data['characters']:,} characters; {len(train):,} tokens to train on, {len(validation):,} held "
          f"out; a vocabulary of {encoding.n_vocab:,}")  # fmt: skip
    return train, validation, encoding, data


def write_tokens(path, batches, least):
    """Writes int32 arrays of tokens to a file. Raises InputError if they are fewer than `least` together."""
    done = 0
    with open(path, "wb") as file:
        for tokens in batches:
            file.write(tokens.tobytes())
            done += len(tokens)
            if done > 1e7:
                print(f"tokenising: {done / 1e6:,.0f} million tokens", flush=True)
    if done < least:
        raise InputError(f"the text is too short: one of its parts, to train on or held out, has {done} tokens, and each must be a "
                         f"context of {least}: use more text, or a smaller --context.")  # fmt: skip


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


def seed_everything(seed, stage, step):
    """
    Seeds all generators with the seed, the step's number and the process's: a step draws the same numbers whether or not the
    run was interrupted before it, or a report was made, and each process has data and noise of its own.
    """
    torch.manual_seed(random.Random(f"{seed} {stage} {step} {RANK}").getrandbits(63))


@contextlib.contextmanager
def interruptions():
    """
    Yields a list that is empty until Ctrl-C or SIGTERM comes, so that a step can end in peace. Another one, five seconds later
    or more (schedulers send it twice at once), is heeded immediately.
    """
    signals = []

    def note(number, frame):
        signals.append(time.monotonic())
        if signals[-1] - signals[0] > 5:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def optimise(model, next_batch, steps, highest_lr, report, run=None, stage=None, parts=1):
    """
    Takes `steps` steps of AdamW on model(next_batch()) -> loss, metrics; calls report(step, seconds, metrics) about REPORTS times.
    Returns the seconds of training alone. Raises InputError when the loss is no longer finite.

    Given a run and the name of its stage: goes on where the run was, and saves it now and then. A batch is cut into `parts`,
    which processes share: see `backward`.
    """
    options = run["settings"] if run else {"seed": 0, "dtype": "float32", "compile": False}
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    matrices, others = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]  # others: biases, norms
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, betas=BETAS, fused=True)
    done, seconds = resume_stage(run, stage, model, optimiser) if run else (0, 0.0)
    forward = torch.compile(model) if options["compile"] else model
    if WORLD > 1:  # from here on, gradients are means over all processes
        forward = torch.nn.parallel.DistributedDataParallel(forward)
    # The autoencoder stays in float32: it is a small part of the work, and exp(log_std) is no place to save bits.
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options["dtype"] == "bfloat16" and stage != "autoencoder")
    saved = time.monotonic()
    with interruptions() if run else contextlib.nullcontext([]) as interrupted:
        for step in range(done + 1, steps + 1):
            started = time.monotonic()
            seed_everything(options["seed"], stage, step)
            model.train()
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, steps, highest_lr)
            batch = next_batch()
            if device.type == "cuda":
                batch = batch.pin_memory()  # memory that the GPU fetches by itself
            optimiser.zero_grad()
            metrics = backward(forward, batch.to(device, non_blocking=True), max(1, parts // WORLD), autocast)
            norm = torch.nn.utils.clip_grad_norm_(trained, GRADIENT_CLIP).item()
            if not math.isfinite(norm + metrics["loss"]):  # before it reaches the weights
                raise InputError(f"the loss was no longer finite at step {step}: try a lower learning rate. What was saved before is kept.")
            optimiser.step()
            seconds += time.monotonic() - started
            if RANK == 0 and (step % math.ceil(steps / REPORTS) == 0 or step == steps):
                model.eval()
                report(step, seconds, metrics)
            stop = any_process(interrupted)
            if run and (stop or step == steps or time.monotonic() - saved > options["save_every"]):
                run |= {"step": step, "seconds": seconds}
                save_run(run, model, optimiser)
                saved = time.monotonic()
            if stop:
                break
        if any_process(interrupted):  # once more: there may have been no step to make
            raise KeyboardInterrupt(f"stopped: python train.py --resume --out_dir {options['out_dir']} goes on.")
    model.eval()  # also where there was no step to make any more
    return seconds


def backward(forward, batch, parts, autocast):
    """
    Puts the gradient of a batch's loss into the parameters; returns loss and metrics, floats. The batch goes through the model
    in `parts` parts, one after the other, whose gradients add up: less memory, and but for random numbers the same gradient.
    """
    means = Counter()
    for i, part in enumerate(batch.chunk(parts)):
        exchange = WORLD == 1 or i == parts - 1  # several processes add up their gradients once a batch
        with contextlib.nullcontext() if exchange else forward.no_sync():
            with autocast:
                loss, metrics = forward(part)
            (loss / parts).backward()
        means.update({name: value / parts for name, value in {**metrics, "loss": loss.item()}.items()})  # Counter.update adds
    return dict(means)


def any_process(interrupted):
    """Has any process been interrupted? All must stop after the same step."""
    flag = torch.tensor(float(bool(interrupted)))
    if WORLD > 1:
        flag = flag.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(flag)
    return flag.item() > 0


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind on its way
#
# A run is a dict: settings, data (its part of summary.json), log (rows), and where it is: stage, step, seconds of training.
# resume.pt is that with weights and optimiser; resume.old.pt is the one before. Random states need no saving: `seed_everything`.


def resume_stage(run, stage, model, optimiser):
    """(step, seconds) at which a stage goes on: where the run was, its weights put in place, or at the beginning."""
    if run["stage"] == stage and "weights" in run:
        try:
            model.load_state_dict(run.pop("weights"))
            optimiser.load_state_dict(run.pop("optimiser"))
        except Exception:  # whatever wrong contents make torch raise
            raise InputError("the checkpoint does not fit the run: it is damaged, or of another version. Delete resume.pt to begin anew.") from None
    else:
        run |= {"stage": stage, "step": 0, "seconds": 0.0}
        save_run(run, model, optimiser)  # so that there is something to resume from the first step on
    return run["step"], run["seconds"]


def save_run(run, model, optimiser):
    path = Path(run["settings"]["out_dir"], "resume.pt")
    state = {**run, "weights": model.state_dict(), "optimiser": optimiser.state_dict()}

    def save(temporary):
        torch.save(state, temporary)
        if path.exists():
            os.replace(path, path.with_name("resume.old.pt"))

    write_atomically(path, save)


def load_run(out_dir):
    """The newest checkpoint of an unfinished run, or, if that is damaged, the one before. Raises InputError if there is neither."""
    for name in ("resume.pt", "resume.old.pt"):
        path = Path(out_dir, name)
        try:
            run = torch.load(path, map_location="cpu", weights_only=True)
            kinds = {"settings": dict, "data": dict, "stage": str, "step": int, "seconds": float, "log": list, "weights": dict, "optimiser": dict}
            if all(isinstance(run[part], kind) for part, kind in kinds.items()):
                return run
            raise ValueError
        except FileNotFoundError:
            continue
        except (OSError, MemoryError):  # unread is not damaged
            raise
        except Exception:  # whatever a damaged file makes torch raise
            print(f"note: {path} is damaged; the one before is tried.", file=sys.stderr)
    raise InputError(f"{out_dir} holds no checkpoint of an unfinished run: leave out --resume to begin one.")


def read_log(out_dir):
    """The rows of log.jsonl, a dict for each report of each stage. Raises InputError if it is damaged."""
    path = Path(out_dir) / "log.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
        return [row for row in rows if row["stage"]]  # raises for what is no row
    except (ValueError, TypeError, KeyError, RecursionError):
        raise InputError(f"{path} is damaged: move it away.") from None


def log_report(run, row, steps, flops, text):
    """Adds a row to the run's log, writes log.jsonl, prints `text` and what the machine does. flops: per token, in training."""
    before = run["log"][-1] if run["log"] and run["log"][-1]["stage"] == row["stage"] else {"seconds": 0, "tokens": 0, "step": 0}
    run["log"].append(row)
    write_atomically(Path(run["settings"]["out_dir"], "log.jsonl"), "".join(json.dumps(row) + "\n" for row in run["log"]))
    seconds = row["seconds"] - before["seconds"]  # since the last report
    speed, left = (row["tokens"] - before["tokens"]) / seconds, round(seconds / (row["step"] - before["step"]) * (steps - row["step"]))
    machine = how_busy(speed * flops / WORLD, run["settings"]["device"])
    print(f"{row['stage']} {row['step']:6}/{steps}  {text}  {speed:,.0f} tokens/s  {machine}  left {left // 60}:{left % 60:02}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The stages


def save_checkpoint(out_dir, kind, model, encoding, **more):
    """`kind`.pt: weights, tokenizer and `more` (the configs), all that sample.py needs, as tensors, strings and numbers."""
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise InputError(f"the weights are no longer finite: {kind}.pt is not written. Try a lower learning rate.")
    ranks = sample.ranks_to_text(encoding._mergeable_ranks)
    tokenizer = {"ranks": ranks, "pattern": encoding._pat_str, "special_tokens": encoding._special_tokens}
    checkpoint = {"kind": kind, "weights": model.state_dict(), "tokenizer": tokenizer, **more}
    write_atomically(os.path.join(out_dir, f"{kind}.pt"), lambda path: torch.save(checkpoint, path))


def train_autoencoder(settings, run, train, validation, encoding):
    """Stage 1. Leaves autoencoder.pt; returns the model and its part of summary.json."""
    config = model_configs(settings, encoding.n_vocab)["autoencoder"]
    K, steps, batch = config.chunk_size, settings.autoencoder_steps, settings.autoencoder_batch_size
    seed_everything(settings.seed, "autoencoder", 0)
    model = Autoencoder(config).to(settings.device)
    flops = flops_per_token(config)[0]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"autoencoder: {parameters:,} parameters, {K} tokens <-> {config.latent_size} numbers")
    held_out = validation[: len(validation) // K * K].view(-1, K)[:REPORT_CHUNKS].long().to(settings.device)

    def accuracy(noise=0.0):
        return model.accuracy(held_out, noise, torch.Generator(settings.device).manual_seed(0))

    def report(step, seconds, metrics):
        row = {"stage": "autoencoder", "step": step, "seconds": seconds, "tokens": step * batch * K, **metrics}
        row |= {"val_accuracy": accuracy(), "val_accuracy_noise_0.3": accuracy(noise=0.3)}
        log_report(run, row, steps, flops, (
            f"loss {row['loss']:.3f} = reconstruction {row['reconstruction']:.3f} + {config.kl_weight:g} · KL {row['kl']:.1f}  "
            f"held-out tokens recovered {row['val_accuracy']:.2%}, from noisy z {row['val_accuracy_noise_0.3']:.2%}"
        ))  # fmt: skip

    def next_batch():
        return random_windows(train, batch // WORLD, K)

    seconds = optimise(model, next_batch, steps, settings.autoencoder_lr, report, run, "autoencoder", settings.parts)
    if RANK:
        return model, {}
    by_noise, tokens = {str(noise): accuracy(noise) for noise in NOISE_LEVELS}, steps * batch * K
    summary = {"accuracy": by_noise["0.0"], "accuracy_noise_0.3": by_noise["0.3"], "accuracy_by_noise": by_noise}
    summary |= {"parameters": parameters, "seconds": seconds, "tokens": tokens, "training_flops": tokens * flops}
    save_checkpoint(settings.out_dir, "autoencoder", model, encoding, autoencoder_config=asdict(config), summary=summary)
    return model, summary


@torch.no_grad()
def evaluate(model, sequences, batch_size, tokens_per_byte):
    """
    A model on held-out sequences (n, T) int, as one dict: all of `evaluate_brier`, its loss and, for CALM, the loss's terms and
    the decoder's confidence in the head's draws: its probability of its best chunk, 1 at a posterior, less between two.
    """
    totals, device = Counter(), next(model.parameters()).device
    seed_everything(0, "evaluation", 0)
    for batch in sequences.to(device).split(batch_size):
        loss, metrics = model(batch)
        if not loss.isfinite():
            raise InputError("the loss on held-out text is no longer finite: try a lower learning rate.")
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


def train_language_model(settings, run, train, validation, encoding, autoencoder=None):
    """Stage 2, or the baseline if no autoencoder is given. Leaves `kind`.pt; returns the model and its part of summary.json."""
    kind = "calm" if autoencoder else "baseline"
    config = model_configs(settings, encoding.n_vocab)[kind]
    context, steps, batch = config.context, settings.steps, settings.batch_size
    seed_everything(settings.seed, kind, 0)
    chunks = random_windows(train, 4096, config.chunk_size) if autoencoder and settings.recipe == "choices" else None
    model = build_calm(settings.recipe, config, autoencoder, chunks) if autoencoder else TransformerLM(config).to(settings.device)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{kind}: {parameters:,} parameters, {context} tokens = {context // config.chunk_size} steps of {config.chunk_size}")
    flops = model.flops_per_token() if isinstance(model, ChoiceCALM) else flops_per_token(config, autoencoder and autoencoder.config)
    held_out = validation[: len(validation) // context * context].view(-1, context)[:FINAL_SEQUENCES].long()
    text = held_out[~torch.isin(held_out, torch.tensor([*encoding._special_tokens.values()]))]
    tokens_per_byte = held_out.numel() / len(encoding.decode_bytes(text.tolist()))

    def report(step, seconds, metrics):
        row = {"stage": kind, "step": step, "seconds": seconds, "tokens": step * batch * context, "train_loss": metrics["loss"]}
        row |= evaluate(model, held_out[:REPORT_SEQUENCES], max(1, batch // settings.parts), tokens_per_byte)
        log_report(run, row, steps, flops[0], f"loss {row['train_loss']:.3f}  {describe(row)}")

    def next_batch():
        return random_windows(train, batch // WORLD, context)

    seconds = optimise(model, next_batch, steps, settings.lr, report, run, kind, settings.parts)
    if RANK:
        return model, {}
    tokens, at_once = steps * batch * context, max(1, batch // settings.parts)
    summary = {**evaluate(model, held_out, at_once, tokens_per_byte), "parameters": parameters, "seconds": seconds, "tokens": tokens}
    summary |= {"training_flops": tokens * flops[0], "inference_flops_per_token": flops[1]}
    configs = {"autoencoder_config": asdict(autoencoder.config), "recipe": settings.recipe} if autoencoder else {}
    save_checkpoint(settings.out_dir, kind, model, encoding, summary=summary, **{f"{kind}_config": asdict(config)}, **configs)
    return model, summary


# ----------------------------------------------------------------------------------------------------------------------
# The report


def main():
    settings, run = parse_settings()
    model_configs(settings, vocab_size=257)  # sizes that do not fit together are said before anything long begins
    if settings.context < settings.chunk_size + 4:
        raise InputError(f"--context must be at least {settings.chunk_size + 4}: BrierLM compares 4 tokens after the first chunk.")
    out_dir, summary = Path(settings.out_dir), {}
    out_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(out_dir, os.W_OK):
        raise InputError(f"--out_dir {out_dir} cannot be written to.")
    # A stage replaces its own part of summary.json and of the log, and drops what was built on it. None: nothing goes.
    kept = {"all": ("baseline",), "autoencoder": ("baseline",), "calm": ("autoencoder", "baseline")}.get(settings.stage)
    if (out_dir / "summary.json").exists():
        summary = {name: part for name, part in read_json(out_dir / "summary.json").items() if kept is None or name in kept}
    if run["stage"] is None:
        if unfinished := " and ".join(str(path) for path in out_dir.glob("resume*.pt")):
            raise InputError(f"{out_dir} holds an unfinished run: add --resume to go on with it, or delete {unfinished} to begin anew.")
        run |= {"log": [row for row in read_log(out_dir) if row["stage"] in (kept or ("autoencoder", "calm"))]}
    run["settings"]["out_dir"] = settings.out_dir  # the folder may have been moved
    start_processes(settings)

    autoencoder = encoding = None
    if "calm" in (settings.stage, run["stage"]):
        autoencoder, encoding, summary["autoencoder"] = sample.load_model(out_dir, "autoencoder")
        autoencoder.to(settings.device)
    *texts, encoding, data = prepare_data(settings, encoding)
    if run.setdefault("data", data) != data:
        raise InputError(f"the text of --data {settings.data}, or its tokens, are not what they were when this run began.")
    about = {"data": data, "config": vars(settings), "seed": settings.seed, "device": settings.device, "torch": torch.__version__}
    if settings.stage in ("all", "autoencoder") and not autoencoder:
        autoencoder, summary["autoencoder"] = train_autoencoder(settings, run, *texts, encoding)
    if settings.stage != "autoencoder":
        kind, prefix = ("calm", "") if autoencoder else ("baseline", "baseline_")
        model, summary[kind] = train_language_model(settings, run, *texts, encoding, autoencoder)
    if RANK:
        return
    if settings.stage != "autoencoder":
        about["protocol"] = {name: summary[kind].pop(name) for name in ("context", "positions")} | {"split": "validation"}
    (summary if autoencoder else summary["baseline"]).update(about)
    write_atomically(out_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    if settings.stage != "autoencoder":
        generator = torch.Generator(settings.device).manual_seed(settings.seed % 2**64)
        text = sample.write_text(model, encoding, "\n", SAMPLE_TOKENS, SAMPLE_TEMPERATURE, generator=generator)
        write_atomically(out_dir / f"{prefix}sample.txt", text)
        curves = draw_curves([row for row in run["log"] if row["stage"] == kind], autoencoder and summary["autoencoder"])
        write_atomically(out_dir / f"{prefix}curves.png", lambda path: curves.savefig(path, format="png", dpi=110))
        print(f"\nA sample at temperature {SAMPLE_TEMPERATURE}:\n{'-' * 80}\n{text.strip()}\n{'-' * 80}\n{describe(summary[kind])}")
        print("(Brier scores × 100; {positions:,} held-out positions, contexts of {context} tokens)".format(**about["protocol"]))
    if autoencoder:
        part = summary["autoencoder"]
        print(f"autoencoder: {part['accuracy']:.3%} of held-out tokens recovered, {part['accuracy_noise_0.3']:.3%} with noise of 0.3 on z")
    for name in ("resume.old.pt", "resume.pt"):  # finished
        (out_dir / name).unlink(missing_ok=True)
    print(f"in {out_dir}: " + ", ".join(sorted(os.listdir(out_dir))))


def start_processes(settings):
    """Under torchrun: meets the other processes, and leaves speaking to the first."""
    if settings.device.startswith("cuda:"):
        torch.cuda.set_device(settings.device)
    if WORLD > 1:
        backend = "nccl" if settings.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))  # the first may be long at reading a corpus
    if RANK:
        sys.stdout = open(os.devnull, "w")


if __name__ == "__main__":
    sample.run(main)
