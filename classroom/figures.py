"""`python classroom/figures.py [NAME …]`: pictures of the method, into classroom/pictures/.

    energy        a sampler learns a ring of Gaussians; with alpha = 2 it learns only the mean
    robustness    how much noise an autoencoder bears, without each of its regularisers
    temperature   what both methods draw, beside the exact distribution
    draws         how many draws the exact method reads for a chunk of a trained model's text
    training      CALM in --out_dir beside the discrete Transformer in {out_dir}-baseline
"""

import argparse
import contextlib
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
import train  # noqa: E402
from autoencoder import Autoencoder, AutoencoderConfig  # noqa: E402
from classroom import compare  # noqa: E402
from energy_head import EnergyHead, energy_score  # noqa: E402

# The same thing has the same colour in all pictures, and a marker or a line of its own besides.
TRUTH, OURS, BATCH, WRONG = "0.35", "tab:blue", "tab:orange", "tab:red"
matplotlib.rcParams |= {"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}


def save(figure, name):
    path = ROOT / "classroom" / "pictures" / f"{name}.png"
    figure.savefig(path, dpi=110)
    print(f"drawn: {path}", flush=True)


def fit(model, loss_of_batch, steps, lr):
    """The training loop of this file: `loss_of_batch()` makes a batch and returns its loss."""
    optimiser = torch.optim.AdamW(model.parameters(), betas=train.BETAS)
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = train.learning_rate(step, steps, lr)
        optimiser.zero_grad()
        loss_of_batch().backward()
        optimiser.step()


# -------------------- The energy score


def ring(n):
    """n draws from eight Gaussians on a circle, those on the right three times as often: (n, 2)."""
    angle = torch.arange(8) * torch.pi / 4
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=-1)  # (8, 2)
    weights = torch.where(centres[:, 0] > 0.1, 3.0, 1.0)
    return centres[weights.multinomial(n, replacement=True)] + 0.12 * torch.randn(n, 2)


def squared_score(samples, targets):
    """The energy score at alpha = 2, where E |x' - x''|^2 is twice the variance of x."""
    return 2 * samples.var(0).sum() - 2 * torch.cdist(samples, targets).square().mean()


def learn_ring(score, steps):
    """An energy head, trained for some steps to maximise a score; 1 000 of its draws, (1000, 2)."""
    torch.manual_seed(0)
    head, hidden = EnergyHead(hidden_size=64, latent_size=2, n_blocks=2), torch.zeros(64)
    fit(head, lambda: -score(head.sample(hidden, 256), ring(256)), steps, lr=5e-3)
    return head.sample(hidden, 1000).detach()


def draw_energy(_):
    panels = [("the data", TRUTH, ring(1000))]
    panels += [(f"α = 1, {n} steps", OURS, learn_ring(energy_score, n)) for n in (100, 2000)]
    panels += [("α = 2, 2000 steps", WRONG, learn_ring(squared_score, 2000))]
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    figure.suptitle("The energy score teaches a sampler the distribution, with α = 2 only its mean")
    for axes, (title, colour, points) in zip(figure.subplots(1, 4, sharey=True), panels):
        mean, spread = points.mean(0), points.std(0).mean().item()
        axes.plot(*mean, "o", mfc="none", mec="black", mew=1.5, ms=15, label="mean")
        axes.plot(*points.T, ".", color=colour, ms=9 if spread < 0.01 else 4, alpha=0.5)
        axes.set(title=f"{title}\nstandard deviation {spread:.2f}", xlabel="y₁")
        axes.set(xlim=(-2.9, 2.9), ylim=(-2.9, 2.9), aspect="equal")
    figure.axes[0].set_ylabel("y₂")
    figure.axes[0].legend(loc="lower left")
    save(figure, "energy")


# -------------------- The autoencoder


def learn_chunks(tokens, **settings):
    """An autoencoder of the quick preset's size, with some settings of its loss changed."""
    torch.manual_seed(0)
    sizes = {"latent_size": 32, "hidden_size": 128, "intermediate_size": 320}
    model = Autoencoder(AutoencoderConfig(257, **sizes, **settings))
    fit(model, lambda: model(train.random_windows(tokens, 512, 4))[0], steps=500, lr=2e-3)
    return model.eval()


def draw_robustness(_):
    tokens = np.frombuffer("".join(train.shakespeare()).encode(), np.uint8)
    cut = len(tokens) * 9 // 10
    held_out = torch.from_numpy(tokens[cut : cut + 40_000].astype(np.int64)).view(-1, 4)
    variants = {  # a flag of train.py: line, colour, what it sets
        "the published loss": ("o-", OURS, {}),
        "--kl_floor 0": ("v:", "tab:olive", {"kl_floor": 0}),
        "--kl_weight 0": ("D--", "tab:cyan", {"kl_weight": 0}),
        "--dropout 0": ("s-.", "tab:purple", {"dropout": 0}),
        "--dropout 0 --kl_weight 0": ("X-", WRONG, {"dropout": 0, "kl_weight": 0}),
    }
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    # Relative to the latents' own size: else a network could shrink the noise with large latents.
    sigmas = [0.1 * i for i in range(10)]
    for name, (style, colour, settings) in variants.items():
        model = learn_chunks(tokens[:cut], **settings)
        with torch.no_grad():
            mean, _ = model.encode(held_out)
            noise, size = torch.randn_like(mean), mean.std().item()
            noisy = [mean + sigma * size * noise for sigma in sigmas] + [mean + 0.3 * noise]
            hits = [(model.decode(z).argmax(-1) == held_out).float().mean() for z in noisy]
        *curve, paper = [100 * share.item() for share in hits]
        size_of_marker = 13 - 1.5 * len(axes.lines)  # hollow and ever smaller: some curves coincide
        axes.plot(sigmas, curve, style, color=colour, mfc="none", ms=size_of_marker, label=name)
        print(f"{name}: latents' std {size:.2f}; with noise of half of it {curve[5]:.2f} %, of 0.9 "
              f"{curve[9]:.2f} %; with noise of 0.3 {paper:.2f} %", flush=True)  # fmt: skip
    axes.set_title("How much noise the decoder bears, without parts of the autoencoder's loss")
    axes.set(xlabel="noise on z (standard deviations of z)", ylabel="held-out tokens recovered (%)")
    axes.legend(loc="lower left")
    save(figure, "robustness")


# -------------------- Temperature


def draw_temperature(_, n=4000, pool=20):
    outcomes = torch.arange(1, 13)
    P = 1 / outcomes / (1 / outcomes).sum()
    draw = lambda m: P.multinomial(m, replacement=True).unsqueeze(-1)  # (m, 1): a chunk of 1 token
    share = lambda drawn: drawn.flatten().bincount(minlength=12) / n
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle("The exact method meets P(x)^(1/T) / Z, the batch method stays nearer to T = 1")
    for axes, T in zip(figure.subplots(1, 2, sharey=True), (0.6, 0.35)):
        sharpened = P ** (1 / T) / (P ** (1 / T)).sum()
        exact = share(torch.stack([sample.temperature_sample_exact(draw, T) for _ in range(n)]))
        batch = share(sample.temperature_sample_batch(draw(n * pool).view(n, pool, 1), T))
        error = 2 * (sharpened * (1 - sharpened) / n).sqrt()
        axes.bar(outcomes, sharpened, color="0.8", edgecolor=TRUTH, label="P(x)^(1/T) / Z")
        axes.plot(outcomes, P, "_", color="black", ms=16, label="P(x), which is T = 1")
        axes.errorbar(outcomes - 0.15, exact, error, fmt="o", color=OURS, ms=4, capsize=2,
                      label="exact method ± 2 standard errors")  # fmt: skip
        axes.plot(outcomes + 0.2, batch, "x", color=BATCH, mew=2, label=f"batch method, N = {pool}")
        axes.set(title=f"T = {T}", xlabel="outcome x", xticks=outcomes)
        print(f"T = {T}, x = 1: {sharpened[0]:.3f}; exact {exact[0]:.3f}, batch {batch[0]:.3f}")
    figure.axes[0].set_ylabel(f"probability; share of {n:,} draws")
    figure.axes[0].legend()
    save(figure, "temperature")


def count_draws(model, h, T, limit):
    """How many draws the exact method reads for the chunk after h (d,): at most `limit`."""
    count = 0

    def draw(m):  # handed out one by one, so that only those are counted that are read
        nonlocal count
        for chunk in model.draw_chunks(h, m):
            count += 1
            yield chunk

    with contextlib.suppress(ValueError):  # raised when it gives up
        sample.temperature_sample_exact(draw, T, limit)
    return min(count, limit)


@torch.no_grad()
def draw_draws(out_dir, n_chunks=31, limit=50_000):
    model, encoding = sample.load_model(out_dir, "calm")
    K = model.config.chunk_size
    prompt = torch.tensor([encoding.encode_ordinary("\nROMEO:\nWhat say'st thou?\n\n")])
    text = sample.generate(model, prompt, n_chunks * K, 0.5)
    hidden = model.hidden_states(text[:, text.shape[1] % K :])[0, -n_chunks:]  # (n_chunks, d)
    temperatures, medians = (1.0, 0.9, 0.75, 2 / 3, 0.6, 0.5), []
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for T in temperatures:
        counts = torch.tensor([count_draws(model, h, T, limit) for h in hidden])
        medians.append(counts.median())
        spread = T + 0.006 * torch.linspace(-1, 1, n_chunks)  # side by side, not on one another
        axes.plot(spread, counts, ".", color=OURS, alpha=0.5, label="one chunk" * (T == 1))
        print(f"T = {T:.2f}: median {medians[-1]}, given up {(counts == limit).sum()}", flush=True)
    axes.plot(temperatures, medians, "s", color="black", label=f"median of {n_chunks} chunks")
    axes.axhline(200, color=BATCH, ls="--", label="batch method: a pool of 200")
    axes.axhline(limit, color=WRONG, ls=":", label=f"given up after {limit:,} draws")
    axes.set_title("An exact temperature costs far more draws than a pool of 200")
    axes.set(xlabel="temperature T", ylabel=f"draws read for a chunk of {K} tokens")
    axes.set(yscale="log", ylim=(0.7, 2e6), xlim=(1.03, 0.47))
    axes.legend(loc="upper left", ncols=2)
    save(figure, "draws")


# -------------------- Two runs


def draw_training(out_dir):
    """BrierLM over tokens and over FLOPs, and CALM's confidence, from the checkpoints' logs."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    figure.suptitle("CALM and the discrete Transformer, trained for the same time")
    grid = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(2, 1))
    runs = [("baseline", f"{out_dir}-baseline", "s--", "black", "discrete Transformer")]
    runs += [("calm", out_dir, "o-", OURS, "CALM")]
    for kind, folder, style, colour, label in runs:
        saved = sample.load_checkpoint(folder, kind)
        log = [row for row in saved["log"] if row["stage"] == kind]
        per_step = compare.flops_of_training(folder, kind, saved["settings"])
        steps = np.array([row["step"] for row in log])
        tokens = [row["tokens"] / 1e6 for row in log]
        for axes, x in zip(grid[0], (tokens, per_step * steps)):
            axes.errorbar(x, [row["brier_lm"] for row in log],
                          [row["brier_lm_se"] for row in log], fmt=style, color=colour,
                          capsize=3, label=label)  # fmt: skip
        for axes, x in zip(grid[1], (tokens, per_step * steps)):
            if kind == "calm":
                axes.plot(x, [row["confidence"] for row in log], style, color=colour)
    grid[0, 0].set_ylabel("BrierLM")
    grid[0, 0].legend()
    grid[1, 0].set(xlabel="training tokens (millions)", ylabel="confidence of CALM", ylim=(0, 1))
    grid[1, 1].set(xlabel="FLOPs of training (matrix products)")
    save(figure, "training")


FIGURES = {"energy": draw_energy, "robustness": draw_robustness}
FIGURES |= {"temperature": draw_temperature, "draws": draw_draws, "training": draw_training}


def main():
    parser = argparse.ArgumentParser(description="Draw the pictures of the method.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)} (all)")
    parser.add_argument("--out_dir", default="out/quick", help="a trained CALM (out/quick)")
    args = parser.parse_args()
    for name in args.names:
        known = name in FIGURES
        sample.check(known, f"there is no picture {name}: choose from {', '.join(FIGURES)}")
    for name in args.names or FIGURES:
        torch.manual_seed(0)
        FIGURES[name](args.out_dir)


if __name__ == "__main__":
    sample.run(main)
