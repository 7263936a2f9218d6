"""
`python classroom/compare.py`: is predicting K tokens at a time a better trade of quality for compute?   (paper, section 6)

Trains the discrete Transformer at three sizes and CALM at K = 1, 2, 4 and 8, all on the same data, for the same number of
tokens (the autoencoders' come on top, and are counted in the FLOPs), with the same optimiser, by train.py. Prints a table (and leaves it in --out_dir), and draws two pictures: BrierLM
against training FLOPs, and BrierLM against cross-entropy over the checkpoints of the discrete models. Interrupted, it goes on
with the first model that is not finished. `--scale gpu --data SOURCE` does it with larger models and a larger text.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import sample  # noqa: E402
from autoencoder import InputError  # noqa: E402
from train import optimise  # noqa: E402

# For each scale: flags of all runs, of all CALMs, and of each model. The CALMs have the largest baseline's Transformer. The
# latent grows with K; at the quick scale below 16 numbers the autoencoder does not bear the noise.
SCALES = {
    "quick": {
        "all": "--steps 1500 --batch_size 16 --context 256 --lr 2e-3",
        "calm": "--recipe energy --hidden_size 128 --n_layers 4 --n_heads 4",
        "models": {
            "Transformer-S": "--stage baseline --hidden_size 64 --n_layers 2 --n_heads 2",
            "Transformer-M": "--stage baseline --hidden_size 96 --n_layers 3 --n_heads 3",
            "Transformer-L": "--stage baseline --hidden_size 128 --n_layers 4 --n_heads 4",
            "CALM, K = 1": "--chunk_size 1 --latent_size 16",
            "CALM, K = 2": "--chunk_size 2 --latent_size 16",
            "CALM, K = 4": "--chunk_size 4 --latent_size 32",
            "CALM, K = 8": "--chunk_size 8 --latent_size 64",
        },
    },
    "gpu": {
        "all": "--preset gpu --vocab_size 4096 --steps 4000 --batch_size 64 --context 1024 --lr 1e-3",
        "calm": "--recipe energy --hidden_size 512 --n_layers 8 --n_heads 8 --n_head_blocks 2 --autoencoder_steps 4000 --autoencoder_lr 1e-3",
        "models": {
            "Transformer-S": "--stage baseline --hidden_size 256 --n_layers 4 --n_heads 4",
            "Transformer-M": "--stage baseline --hidden_size 384 --n_layers 6 --n_heads 6",
            "Transformer-L": "--stage baseline --hidden_size 512 --n_layers 8 --n_heads 8",
            "CALM, K = 1": "--chunk_size 1 --latent_size 32",
            "CALM, K = 2": "--chunk_size 2 --latent_size 64",
            "CALM, K = 4": "--chunk_size 4 --latent_size 128",
            "CALM, K = 8": "--chunk_size 8 --latent_size 256",
        },
    },
}


def train(name, flags, folder):
    """
    Runs train.py with these flags, unless a finished run of the same flags is in the folder; one that was interrupted goes on.
    Returns its summary.
    """
    asked, done, command = folder / "flags.txt", folder / "summary.json", " ".join(flags)
    same, unfinished = asked.exists() and asked.read_text() == command, any(folder.glob("resume*.pt"))
    if same and done.exists() and not unfinished:
        print(f"{name}: already trained, in {folder}", flush=True)
        return json.loads(done.read_text())
    if same and unfinished:
        flags = ["--resume"]
    elif folder.exists():
        shutil.rmtree(folder)  # a run of other flags, or one that was interrupted before it began to train
    folder.mkdir(parents=True, exist_ok=True)
    asked.write_text(command)
    print(f"\n{name}: python train.py {command}", flush=True)
    finished = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *flags, "--out_dir", str(folder)])
    if finished.returncode:
        raise InputError(f"training {name} ended with status {finished.returncode}: see its message above. The next run begins there.")
    return json.loads(done.read_text())


def speeds(folders, summaries, rounds=3):
    """
    {name: (training, generation)} in tokens per second: the median of several rounds in which all models take their turn, on
    one machine in one sitting, after a warm-up. Training: four steps of the language model at the run's batch and context,
    with a learning rate of 0. Generation: one text of 256 tokens at temperature 1 after 16.
    """
    device, models, seconds = sample.pick_device("auto"), {}, {name: ([], []) for name in folders}
    for name, folder in folders.items():
        kind = "baseline" if "baseline" in summaries[name] else "calm"
        models[name] = sample.load_model(folder, kind)[0].to(device)
    for round in range(rounds + 1):
        for name, model in models.items():
            config = summaries[name].get("config") or summaries[name]["baseline"]["config"]
            batch = torch.randint(256, (config["batch_size"], config["context"]))
            started = time.perf_counter()
            sample.generate(model.eval(), batch[:1, :16].to(device), 256).cpu()
            generating = time.perf_counter() - started
            training = optimise(model, lambda: batch, 4, 0.0, lambda *_: None)
            if round:
                seconds[name][0].append(training / (4 * batch.numel()))
                seconds[name][1].append(generating / 256)
    return {name: tuple(1 / statistics.median(part) for part in parts) for name, parts in seconds.items()}


def table(summaries, speed):
    lines = ["| model | parameters | training FLOPs, all stages | inference FLOPs a token, T = 1 | language model's training, tokens/s "
             "| generation, tokens/s | BrierLM | bits per byte |", "|---|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for name, summary in summaries.items():
        part, size, flops = summary.get("calm") or summary["baseline"], "", 0.0
        if "calm" in summary:
            size = f" + {summary['autoencoder']['parameters'] / 1e6:.2f} M"
            flops = summary["autoencoder"]["training_flops"]
        bits = f"{part['bits_per_byte']:.3f}" if "bits_per_byte" in part else "–"
        lines.append(
            f"| {name} | {part['parameters'] / 1e6:.2f} M{size} | {part['training_flops'] + flops:.2e} | "
            f"{part['inference_flops_per_token']:.2e} | {speed[name][0]:,.0f} | {speed[name][1]:,.0f} | "
            f"{part['brier_lm']:.2f} ± {part['brier_lm_se']:.2f} | {bits} |"
        )
    return "\n".join(lines) + "\n"


def draw_flops(path, summaries):
    """BrierLM against training FLOPs, the autoencoder's included: a point for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for kind, label, style, below in (("baseline", "discrete Transformer, by size", "o-", 6), ("calm", "CALM, by K", "s-", -14)):
        chosen = {name: summary for name, summary in summaries.items() if kind in summary}
        flops = [s[kind]["training_flops"] + s.get("autoencoder", {}).get("training_flops", 0.0) for s in chosen.values()]
        scores = [s[kind]["brier_lm"] for s in chosen.values()]
        axes.errorbar(flops, scores, [s[kind]["brier_lm_se"] for s in chosen.values()], fmt=style, capsize=3, label=label)
        for name, x, y in zip(chosen, flops, scores):
            axes.annotate(name.removeprefix("CALM, ").removeprefix("Transformer-"), (x, y), (6, below), textcoords="offset points")
    axes.margins(x=0.12)
    axes.set(xscale="log", title="Quality for compute, at equal tokens", xlabel="training FLOPs (matrix products, autoencoder included)",
             ylabel="BrierLM on held-out text ± standard error")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)


def draw_correlation(path, logs):
    """BrierLM against cross-entropy over the reports of each discrete model; returns the Pearson correlation over all of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.8), layout="constrained")
    axes = figure.subplots()
    every = [(row["bits_per_byte"], row["brier_lm"]) for rows in logs.values() for row in rows if row["brier_lm"] > 0]  # 0: floored
    for name, rows in logs.items():
        axes.plot([row["bits_per_byte"] for row in rows], [row["brier_lm"] for row in rows], "o-", alpha=0.7, label=name)
    correlation = torch.corrcoef(torch.tensor(every).T)[0, 1].item()
    axes.set(title=f"Two scores of the same models: Pearson correlation {correlation:.3f}", ylabel="BrierLM (needs samples only)",
             xlabel="cross-entropy, bits per byte (needs likelihoods)")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return correlation


def main():
    parser = argparse.ArgumentParser(description="CALM against a discrete Transformer, at equal tokens, with the compute counted.")
    parser.add_argument("--scale", choices=SCALES, default="quick", help="quick: two CPU cores; gpu: larger models (default: quick)")
    parser.add_argument("--data", default="shakespeare", help="as for train.py (default: shakespeare)")
    parser.add_argument("--out_dir", help="where the models go (default: out/compare_<scale>)")
    parser.add_argument("--pictures", default=os.path.join(ROOT, "classroom", "pictures"), help="where the pictures go")
    parser.add_argument("--seed", type=int, default=0, help="of all runs (default: 0)")
    args = parser.parse_args()
    scale, out_dir = SCALES[args.scale], Path(args.out_dir or f"out/compare_{args.scale}")
    summaries, folders = {}, {}
    for name, flags in scale["models"].items():
        folders[name] = out_dir / name.replace(", ", "-").replace(" ", "")
        flags = [*scale["all"].split(), *([] if "baseline" in flags else scale["calm"].split()), *flags.split()]
        summaries[name] = train(name, [*flags, "--data", args.data, "--seed", str(args.seed)], folders[name])
    text = table(summaries, speeds(folders, summaries))
    (out_dir / "table.md").write_text(text)
    os.makedirs(args.pictures, exist_ok=True)
    pictures = [os.path.join(args.pictures, f"compare_{what}_{args.scale}.png") for what in ("flops", "scores")]
    draw_flops(pictures[0], summaries)
    logs = {name: [json.loads(line) for line in (folders[name] / "log.jsonl").open()] for name, s in summaries.items() if "baseline" in s}
    correlation = draw_correlation(pictures[1], logs)
    tokens = next(iter(summaries.values()))["baseline"]["tokens"]
    print(f"\n{text}\n{tokens / 1e6:.1f} million tokens each, seed {args.seed}. Over the {len(logs)} discrete models' reports, BrierLM and "
          f"cross-entropy have a Pearson correlation of {correlation:.3f}.\ndrawn: {', '.join(pictures)}")  # fmt: skip


if __name__ == "__main__":
    sample.run(main)
