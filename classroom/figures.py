"""
`python classroom/figures.py`: five pictures of the method, each from a run of its own, into classroom/pictures/.

    energy        a sampler learns a mixture of Gaussians by the energy score; and by alpha = 2, which sees only the mean
    robustness    how much noise the autoencoder bears, with and without each of its regularisers
    temperature   draws from P^(1/T)/Z by both methods, beside the exact distribution
    draws         how many draws the exact method reads for a chunk, against T    (needs a trained model, by default out/quick)
    scores        BrierLM against cross-entropy over a training run               (needs a baseline, by default out/quick)

`python classroom/figures.py NAME …` draws only those.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "classroom")]

import sample  # noqa: E402
import train  # noqa: E402
from autoencoder import Autoencoder, AutoencoderConfig, InputError  # noqa: E402
from classroom.texts import train_bpe  # noqa: E402
from compare import draw_correlation  # noqa: E402
from energy_head import energy_score  # noqa: E402


def save(figure, name, args):
    os.makedirs(args.pictures, exist_ok=True)
    path = os.path.join(args.pictures, f"{name}.png")
    train.write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    print(f"drawn: {path}", flush=True)


# The energy score


def ring(n):
    """n draws from eight Gaussians on a circle, the right half three times as frequent as the left: (n, 2)."""
    angle = torch.arange(8) * torch.pi / 4
    centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=-1)
    weights = torch.where(centres[:, 0] > 0.1, 3.0, 1.0)
    return centres[weights.multinomial(n, replacement=True)] + 0.12 * torch.randn(n, 2)


def squared_score(samples, targets):
    """The energy score's formula at alpha = 2, unbiased; `energy_score` refuses it, because it is not strictly proper."""
    n = len(samples)
    return torch.cdist(samples, samples).square().sum() / (n * (n - 1)) - 2 * torch.cdist(samples, targets).square().mean()


class Sampler(nn.Module):
    """A small generator: 8 random numbers to 2 coordinates, two residual blocks wide 128."""

    def __init__(self, width=128):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)) for _ in range(2)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, noise):
        x = self.first(noise)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def uniform(n):
    return torch.rand(n, 8) - 0.5


def binary(n):
    return torch.randint(2, (n, 8)) - 0.5


def learn_ring(score, noise, steps, snapshots):
    """A Sampler of that noise, trained to maximise a score; {step: 1 000 of its draws}."""
    torch.manual_seed(0)
    sampler, drawn = Sampler(), {}
    optimiser = torch.optim.AdamW(sampler.parameters(), betas=train.BETAS)
    for step in range(steps + 1):
        if step in snapshots:
            drawn[step] = sampler(noise(1000)).detach()
        for group in optimiser.param_groups:
            group["lr"] = train.learning_rate(step, steps, 2e-3)
        loss = -score(sampler(noise(256)), ring(256))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return drawn


def draw_energy(args):
    steps = 2000
    drawn = learn_ring(energy_score, binary, steps, (100, 500, steps))
    panels = {"the data": ring(1000)} | {f"α = 1, step {step}": points for step, points in drawn.items()}
    panels["α = 1, continuous noise"] = learn_ring(energy_score, uniform, steps, (steps,))[steps]
    two = learn_ring(squared_score, binary, steps, (steps,))[steps]
    panels[f"α = 2 (std {two.std(0).mean():.2g}, data {panels['the data'].std(0).mean():.2g})"] = two
    figure = Figure(figsize=(9.5, 6.6), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    for axes, (title, points) in zip(grid.flat, panels.items()):
        axes.plot(*points.mean(0), "x", color="orange", ms=11, mew=3, label="mean")
        axes.scatter(*points.T, s=4, alpha=0.4, zorder=3, color="black" if title == "the data" else "C3" if "α = 2" in title else "C0")
        axes.set(title=title, xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xlabel="y₁" if axes in grid[1] else None)
        axes.set_aspect("equal")
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("y₂")
    grid[0, 0].legend(loc="upper left")
    save(figure, "energy", args)


# The autoencoder


class WholeInput(Autoencoder):
    """Without DropToken: the encoder reads the tokens as they are, whatever `forward` does to them."""

    def forward(self, tokens):
        self.whole = tokens
        return super().forward(tokens)

    def encode(self, tokens):
        return super().encode(self.whole if self.training else tokens)


class DropTokenOnly(Autoencoder):
    """For a config with dropout 0: input tokens are dropped all the same, so what is missing is the dropout of the latent."""

    def encode(self, tokens):
        return super().encode(tokens.masked_fill(torch.rand(tokens.shape) < 0.15, 0) if self.training else tokens)


class WithoutNoise(Autoencoder):
    """A plain autoencoder: with a standard deviation of almost 0, z is the mean."""

    def encode(self, tokens):
        mean, log_std = super().encode(tokens)
        return mean, torch.full_like(log_std, -20.0)


def draw_robustness(args):
    training, held_out, _ = train.split_source(args.data)
    encoding = sample.make_encoding(train_bpe(training(), 256))
    tokens, validation = (torch.from_numpy(np.concatenate([*train.encode_documents(encoding, part())])) for part in (training, held_out))
    chunks = validation[: len(validation) // 4 * 4].view(-1, 4)[:5000].long()
    variants = {
        "all four regularisers": (Autoencoder, {}),
        "no DropToken": (WholeInput, {}),
        "no dropout of the latent": (DropTokenOnly, {"dropout": 0.0}),
        "no floor under the KL": (Autoencoder, {"kl_floor": 0.0}),
        "no KL": (Autoencoder, {"kl_weight": 0.0}),
        "none, and no noise on z": (WithoutNoise, {"dropout": 0.0, "kl_weight": 0.0}),
    }
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    relative = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]  # to the latents' own size, or whoever makes latents large would win
    for i, (name, (kind, changes)) in enumerate(variants.items()):
        torch.manual_seed(0)
        model = kind(AutoencoderConfig(**{"vocab_size": 257, "latent_size": 32, "hidden_size": 128, "intermediate_size": 320, **changes}))
        seconds = train.optimise(model, lambda: train.random_windows(tokens, 512, 4), 500, 2e-3, lambda *_: None)
        size = model.encode(chunks)[0].std().item()
        accuracies = [100 * model.eval().accuracy(chunks, share * size) for share in relative]
        at_03 = model.accuracy(chunks, 0.3)
        axes.plot(relative, accuracies, marker="os^vD*"[i], label=f"{name} (latents' std {size:.2f}; at σ = 0.3: {at_03:.2%})")
        print(f"{name}: {seconds:.0f} s, latents' std {size:.2f}; recovered: {accuracies[0]:.2f} %, with noise of 0.3 {at_03:.2%}, "
              f"of half their std {accuracies[5]:.2f} %", flush=True)  # fmt: skip
    axes.set(title="What each regulariser is for", xlabel="σ of the Gaussian noise on z, in units of the latents' std", ylabel="held-out tokens recovered (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, "robustness", args)


# Temperature


def draw_temperature(args):
    torch.manual_seed(0)
    P = 1 / torch.arange(1, 13).double()
    P /= P.sum()
    n, place = 4000, torch.arange(1, 13)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axes, T in zip(figure.subplots(1, 3, sharey=True), (1.0, 0.6, 0.35)):

        def draw(m):
            return P.multinomial(m, replacement=True).unsqueeze(-1)

        exact = torch.stack([sample.temperature_sample_exact(draw, T, block=128) for _ in range(n)]).flatten().bincount(minlength=12) / n
        pools = P.multinomial(n * 20, replacement=True).view(n, 20, 1)
        batch = sample.temperature_sample_batch(pools, T).flatten().bincount(minlength=12) / n
        sharpened = P ** (1 / T) / (P ** (1 / T)).sum()
        axes.bar(place, sharpened, color="lightgrey", label="P^(1/T) / Z")
        axes.errorbar(place - 0.15, exact, 2 * (sharpened * (1 - sharpened) / n).sqrt(), fmt="o", ms=4, label="exact, ± 2 standard errors")
        axes.plot(place + 0.2, batch, "x", color="C3", label="batch, from pools of 20")
        axes.set(title=f"T = {T:g}", xlabel="outcome")
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].set_ylabel(f"share of {n:,} draws")
    figure.axes[0].legend()
    save(figure, "temperature", args)


def draw_draws(args, chunks=31, limit=50_000):
    """The median over `chunks` chunks, since the mean is a matter of a few; a chunk may take no more than `limit` draws."""
    model, encoding, _ = sample.load_model(args.out_dir, "calm")
    generator, prompt = torch.Generator().manual_seed(0), torch.tensor([encoding.encode_ordinary("\nROMEO:\nWhat say'st thou?\n\n")[:20]])
    hidden = model.hidden_states(sample.generate(model, prompt, 4 * chunks, 0.5, generator=generator))[0, -chunks:].detach()
    temperatures, draws = (1.0, 0.9, 0.75, 2 / 3, 0.6, 0.55, 0.5), []
    for T in temperatures:
        used = []
        for h in hidden:
            try:
                used.append(sample.temperature_sample_exact(lambda m: model.draw_chunks(h, m, generator), T, limit, 1024, True)[1])
            except InputError:
                used.append(limit)
        draws.append(sorted(used))
        print(f"T = {T:.2f}: a median of {draws[-1][chunks // 2]:,} draws a chunk, {used.count(limit)} of {chunks} above {limit:,}", flush=True)
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for T, used in zip(temperatures, draws):
        axes.plot([T] * chunks, used, "o", color="C0", alpha=0.3)
    axes.plot(temperatures, [used[chunks // 2] for used in draws], "s-", color="black", label=f"median of {chunks} chunks of one text")
    axes.axhline(limit, color="C3", ls="--", label="given up here")
    axes.axhline(200, color="grey", ls=":", label="the batch method: a pool of 200")
    axes.set(yscale="log", ylim=(0.7, 2e6), title="The price of an exact temperature", xlabel="temperature T", ylabel="draws read for a chunk of 4 bytes")
    axes.invert_xaxis()
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    save(figure, "draws", args)


def draw_scores(args):
    rows = [row for row in train.read_log(args.out_dir) if row["stage"] == "baseline"]
    if not rows:
        raise InputError(f"{args.out_dir} has no baseline: python train.py --stage baseline --out_dir {args.out_dir} trains one.")
    os.makedirs(args.pictures, exist_ok=True)
    path = os.path.join(args.pictures, "scores.png")
    correlation = draw_correlation(path, {"reports of one training run": rows})
    print(f"drawn: {path} (Pearson correlation {correlation:.3f})")


FIGURES = {"energy": draw_energy, "robustness": draw_robustness, "temperature": draw_temperature, "draws": draw_draws, "scores": draw_scores}


def main():
    parser = argparse.ArgumentParser(description="Draw the pictures of the method.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these, of {', '.join(FIGURES)}")
    parser.add_argument("--out_dir", default="out/quick", help="a trained CALM and baseline (default: out/quick)")
    parser.add_argument("--data", default="shakespeare", help="text for the autoencoders (default: shakespeare)")
    parser.add_argument("--pictures", default=str(ROOT / "classroom" / "pictures"), help="where the pictures go")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in FIGURES]:
        raise InputError(f"there is no picture {unknown[0]}: choose from {', '.join(FIGURES)}.")
    for name in args.names or FIGURES:
        FIGURES[name](args)


if __name__ == "__main__":
    sample.run(main)
