"""Is predicting K tokens at a time a better trade of quality for compute?  (CALM paper, section 6)

    python classroom/compare.py                                      (two CPU cores: some hours)
    python classroom/compare.py --scale gpu --data data/novels       (a folder of prepare.py's)

Trains the discrete Transformer at three sizes, and CALM at K = 1, 2, 4 and 8 with the largest of
these Transformers, by train.py: on the same data, with as many tokens. Prints a table and draws
BrierLM against training FLOPs and against cross-entropy. Interrupted, it goes on where it was.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import timeit
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from calm import KVCache  # noqa: E402

# Flags: of all runs at a scale, then of each. The latent vector grows with K; below 16 numbers the
# small autoencoders do not bear noise.
SCALES = {
    "quick": ("--steps 1500 --eval_interval 150 --batch_size 16 --context 256", {
        "Transformer-S": "--stage baseline --hidden_size 64 --n_layers 2 --n_heads 2",
        "Transformer-M": "--stage baseline --hidden_size 96 --n_layers 3 --n_heads 3",
        "Transformer-L": "--stage baseline --hidden_size 128 --n_layers 4 --n_heads 4",
        "CALM-1": "--chunk_size 1 --latent_size 16 --hidden_size 128 --n_layers 4 --n_heads 4",
        "CALM-2": "--chunk_size 2 --latent_size 16 --hidden_size 128 --n_layers 4 --n_heads 4",
        "CALM-4": "--chunk_size 4 --latent_size 32 --hidden_size 128 --n_layers 4 --n_heads 4",
        "CALM-8": "--chunk_size 8 --latent_size 64 --hidden_size 128 --n_layers 4 --n_heads 4",
    }),
    "gpu": ("--preset gpu --steps 4000 --batch_size 64 --context 1024 --lr 1e-3", {
        "Transformer-S": "--stage baseline --hidden_size 256 --n_layers 4 --n_heads 4",
        "Transformer-M": "--stage baseline --hidden_size 384 --n_layers 6 --n_heads 6",
        "Transformer-L": "--stage baseline --hidden_size 512 --n_layers 8 --n_heads 8",
        "CALM-1": "--chunk_size 1 --latent_size 32 --hidden_size 512 --n_layers 8 --n_heads 8",
        "CALM-2": "--chunk_size 2 --latent_size 64 --hidden_size 512 --n_layers 8 --n_heads 8",
        "CALM-4": "--chunk_size 4 --latent_size 128 --hidden_size 512 --n_layers 8 --n_heads 8",
        "CALM-8": "--chunk_size 8 --latent_size 256 --hidden_size 512 --n_layers 8 --n_heads 8",
    }),
}  # fmt: skip


def kind_of(name):
    return "calm" if name.startswith("CALM") else "baseline"


def train(name, flags, folder):
    """Runs train.py, unless it has already finished with these flags; returns its summary."""
    asked, done = folder / "flags.txt", folder / "summary.json"
    same = asked.exists() and asked.read_text(encoding="utf-8") == " ".join(flags)
    begun = same and any(folder.glob("*.pt"))
    if begun and done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    if asked.exists() and not begun:
        trained = any(folder.glob("*.pt"))
        sample.check(not trained, f"{folder} has a model of other flags: name another --out_dir")
        shutil.rmtree(folder)  # a run that did not get far
    folder.mkdir(parents=True, exist_ok=True)
    asked.write_text(" ".join(flags), encoding="utf-8")
    print(f"\n{name}: python train.py {' '.join(flags)}", flush=True)
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--out_dir", str(folder)]
    status = subprocess.run(command + ["--resume"] * begun).returncode
    sample.check(status == 0, f"training {name} ended with status {status}: its message is above")
    return json.loads(done.read_text(encoding="utf-8"))


def flops(step):
    """The floating-point operations of the matrix products in a call of step()."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def flops_of_training(folder, kind, config):
    """FLOPs of one step of training the model {kind}.pt in a folder, with the settings `config`."""
    model, _ = sample.load_model(folder, kind)
    batch = torch.randint(256, (1, config["context"]))
    if kind == "autoencoder":
        batch = batch.view(-1, config["chunk_size"])
    one_sequence = flops(lambda: model.train()(batch)[0].backward())
    return config["batch_size"] * one_sequence


def compute_of(name, folder, summary):
    """FLOPs of training, all stages; FLOPs of a generated token and speed, at temperature 1."""
    config, training = summary["config"], 0
    for kind in ["autoencoder"] * (kind_of(name) == "calm") + [kind_of(name)]:
        training += summary[kind]["step"] * flops_of_training(folder, kind, config)

    # A step of generation, after half a context. K tokens come of it.
    model, _ = sample.load_model(folder, kind_of(name))
    cache, K = KVCache(), model.config.chunk_size
    tokens = torch.randint(256, (1, config["context"]))
    half = config["context"] // 2 // K * K
    with torch.no_grad():
        model.hidden_states(tokens[:, :half], cache)
        chunk = tokens[:, half : half + K]
        step = flops(lambda: model.draw_chunks(model.hidden_states(chunk, cache)[:, -1], 1))
    text = lambda: sample.generate(model, tokens[:, :16], 240)
    speed = 240 / min(timeit.repeat(text, number=1, repeat=4))
    return {"training": training, "step": step / K, "speed": speed}


def table(summaries, compute):
    lines = ["| model | parameters | training FLOPs | FLOPs a generated token | training, tokens/s "
             "| generation on a CPU, tokens/s | BrierLM | bits a token |", "|--" * 8 + "|"]
    for name, summary in summaries.items():
        row, cost, bits = summary[kind_of(name)], compute[name], "–"
        if kind_of(name) == "baseline":
            bits = f"{row['val_loss'] / math.log(2):.3f}"
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {cost['training']:.2e} "
            f"| {cost['step']:.2e} | {row['tokens'] / row['seconds']:,.0f} | {cost['speed']:,.0f} "
            f"| {row['brier_lm']:.2f} ± {row['brier_lm_se']:.2f} | {bits} |"
        )
    return "\n".join(lines) + "\n"


def draw_flops(path, summaries, compute):
    """BrierLM against training FLOPs: a point for each model."""
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    kinds = [("baseline", "s", "black", "discrete Transformer"), ("calm", "o", "tab:blue", "CALM")]
    for kind, marker, colour, label in kinds:
        names = [name for name in summaries if kind_of(name) == kind]
        x = [compute[name]["training"] for name in names]
        y = [summaries[name][kind]["brier_lm"] for name in names]
        error = [summaries[name][kind]["brier_lm_se"] for name in names]
        axes.errorbar(x, y, error, fmt=marker, color=colour, capsize=3, label=label)
        for name, *point in zip(names, x, y):
            short = name.replace("CALM-", "K = ")
            axes.annotate(short, point, (6, -12), textcoords="offset points")
    axes.margins(x=0.15)
    axes.set(xscale="log", xlabel="FLOPs of training (matrix products)", ylabel="BrierLM")
    axes.set_title("Discrete Transformers of three sizes, and CALM with four K")
    axes.legend()
    figure.savefig(path, dpi=110)


def draw_scores(path, logs):
    """BrierLM against cross-entropy, over the reports of the discrete models."""
    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    axes, points = figure.subplots(), []
    for (name, rows), style in zip(logs.items(), ("o:", "s--", "D-")):
        bits = [row["val_loss"] / math.log(2) for row in rows]
        scores = [row["brier_lm"] for row in rows]
        axes.plot(bits, scores, style, color="black", mfc="none", label=name)
        points += [point for point in zip(bits, scores) if point[1] > 0]  # 0: floored, no score
    if len(points) > 1:
        correlation = torch.corrcoef(torch.tensor(points).T)[0, 1].item()
        axes.set_title(f"BrierLM rises as cross-entropy falls (correlation {correlation:.2f})")
    axes.set(xlabel="cross-entropy, bits a token", ylabel="BrierLM")
    axes.legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="CALM against the discrete Transformer.")
    parser.add_argument("--scale", choices=SCALES, default="quick", help="sizes of the models")
    parser.add_argument("--data", default="shakespeare", help="as for train.py")
    parser.add_argument("--out_dir", help="where all goes (default: out/compare_SCALE)")
    parser.add_argument("--pictures", default=ROOT / "classroom/pictures", help="where they go")
    parser.add_argument("--seed", type=int, default=0, help="of all runs")
    args = parser.parse_args()
    out_dir, pictures = Path(args.out_dir or f"out/compare_{args.scale}"), Path(args.pictures)
    summaries, compute, logs = {}, {}, {}
    shared, models = SCALES[args.scale]
    for name, flags in models.items():
        flags = [*shared.split(), *flags.split(), "--data", args.data, "--seed", str(args.seed)]
        summaries[name] = train(name, flags, out_dir / name)
        compute[name] = compute_of(name, out_dir / name, summaries[name])
        if kind_of(name) == "baseline":
            rows = sample.read_text(out_dir / name / "log.jsonl").splitlines()
            logs[name] = [json.loads(row) for row in rows]
    text = table(summaries, compute)
    (out_dir / "table.md").write_text(text, encoding="utf-8")
    draw_flops(pictures / f"compare_flops_{args.scale}.png", summaries, compute)
    draw_scores(pictures / f"compare_scores_{args.scale}.png", logs)
    print(f"\n{text}")


if __name__ == "__main__":
    sample.run(main)
