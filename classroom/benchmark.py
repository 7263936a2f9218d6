"""`python classroom/benchmark.py`: what CALM costs on this machine, in four tables.

The energy loss and a training step, against the formulas as they are written; generation with a
trained model (--out_dir); the bias of the batch method. Times are medians, after a warm-up.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
from autoencoder import Autoencoder, AutoencoderConfig  # noqa: E402
from calm import CALM, CALMConfig  # noqa: E402
from energy_head import energy_loss  # noqa: E402

DEVICE = sample.pick_device("auto")
# FLOPs a second by the maker's data sheets, of dense products in float32 (no TF32) and bfloat16.
PEAK = {"H100": (67e12, 989e12), "H200": (67e12, 989e12), "A100": (19.5e12, 312e12)}


def seconds(function):
    """The median time of a call, after a warm-up."""
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1).median


def peak_memory():
    """The largest memory in use so far, MB: of torch's tensors on a GPU, else of this process."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if not Path("/proc/self/status").exists():  # only Linux has it
        return torch.nan
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def loss_as_written(samples, mean, log_std, n_targets=100):
    """The energy loss as the released code writes it: all N·M differences of all positions."""
    targets = mean + log_std.exp() * torch.randn(n_targets, *mean.shape, device=mean.device)
    N = len(samples)
    fidelity = (samples[:, None] - targets).norm(dim=-1).mean()
    diversity = (samples[:, None] - samples).norm(dim=-1).sum((0, 1)).mean() / (N * (N - 1))
    return 2 * fidelity - diversity, fidelity, diversity


def loss_cost(loss, positions):
    """Milliseconds of a loss, forward and backward, and by how many MB memory grows."""
    samples = torch.randn(8, positions, 128, device=DEVICE, requires_grad=True)
    mean, log_std = torch.randn(2, positions, 128, device=DEVICE)
    call = lambda n: loss(samples[:, :n], mean[:n], log_std[:n])[0].backward()
    call(2)  # loads the kernels
    before = peak_memory()
    call(positions)
    grown = peak_memory() - before
    return 1e3 * seconds(lambda: call(positions)), grown


def table_loss():
    print("\nEnergy loss, forward and backward: N = 8, M = 100, l = 128, float32")
    print("| positions | as written | here | as written | here |\n|--:|--:|--:|--:|--:|")
    for n in (64, 256, 1024):
        # Each in a process of its own, since a peak of memory never goes down.
        with torch.multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            costs = pool.starmap(loss_cost, [(loss_as_written, n), (energy_loss, n)], chunksize=1)
        (plain, plain_mb), (ours, ours_mb) = costs
        print(f"| {n} | {plain:.1f} ms | {ours:.1f} ms | {plain_mb:.0f} MB | {ours_mb:.0f} MB |")


def table_step():
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(257, 4, 64, 256, 640))
    model = CALM(CALMConfig(257, 4, 64, 256, 704, 4, 4, n_head_blocks=2, context=256), autoencoder)
    optimiser = torch.optim.AdamW(model.to(DEVICE).parameters(), fused=True)
    tokens = torch.randint(257, (16, 256), device=DEVICE)

    def as_written(tokens):  # CALM.forward, with a copy of the hidden states for each sample
        hidden = model.hidden_states(tokens[:, :-4]).repeat(model.config.n_samples, 1, 1, 1)
        samples = model.head.sample(hidden, 1)[0]
        mean, log_std = model.autoencoder.encode(tokens.unflatten(1, (-1, 4))[:, 1:])  # frozen
        return loss_as_written(samples, mean, log_std)

    def step(forward, half):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            loss = forward(tokens)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    with FlopCounterMode(display=False) as counter:  # of a step as train.py takes it
        step(model, half=False)
    flops = counter.get_total_flops()
    ways = [("as written", as_written, False), ("float32", model, False)]
    if DEVICE == "cuda":
        ways += [("bfloat16", model, True), ("bfloat16, compiled", torch.compile(model), True)]
        card = torch.cuda.get_device_name()
        peak = next((PEAK[name] for name in PEAK if name in card), (torch.nan, torch.nan))
    print("\nOne training step: width 256, 4 layers, K = 4, l = 64, 2 head blocks, 16 x 256 tokens")
    print("| way | time | tokens/s | TFLOPs/s | of peak | memory |\n|---|--:|--:|--:|--:|--:|")
    for way, forward, half in ways:
        t = seconds(lambda: step(forward, half))
        cells = [way, f"{1e3 * t:.0f} ms", f"{tokens.numel() / t:,.0f}", f"{flops / t / 1e12:.2f}"]
        if DEVICE == "cuda":
            cells += [f"{flops / t / peak[half]:.1%}", f"{peak_memory():.0f} MB"]
            torch.cuda.reset_peak_memory_stats()
        print("|", " | ".join(cells), "|", flush=True)


def table_generation(model, encoding):
    prompt = torch.tensor([encoding.encode_ordinary("\nROMEO:\n")], device=DEVICE)
    print("\nGeneration, one text of 80 tokens\n| T | method | tokens/s |\n|--:|---|--:|")
    for T, method, pool in ((1, "one draw", 200), (0.5, "batch", 200), (0.5, "exact", None)):
        torch.manual_seed(0)
        t = seconds(lambda: sample.generate(model, prompt, 80, T, pool))
        print(f"| {T} | {method} | {80 / t:.0f} |", flush=True)


def table_bias(n=5000):
    temperatures, P = (0.9, 0.5, 0.4, 0.25), 1 / torch.arange(1, 21).double()
    print("\nThe bias of the batch method: total variation distance to P(x)^(1/T) / Z, P(x) ~ 1/x,")
    print(f"20 outcomes, {n} pools of N draws. (As many exact draws would show 0.021 to 0.005.)")
    print("| N |", *[f"T = {T} |" for T in temperatures], end="\n|--:|--:|--:|--:|--:|\n")
    for N in (10, 50, 200, 1000):
        distances = []
        for T in temperatures:
            exact = P ** (1 / T) / (P ** (1 / T)).sum()
            pools = P.multinomial(n * N, replacement=True).view(n, N, 1)
            share = sample.temperature_sample_batch(pools, T).flatten().bincount(minlength=20) / n
            distances.append(0.5 * (share - exact).abs().sum())
        print(f"| {N} |", *[f"{distance:.3f} |" for distance in distances], flush=True)


def main():
    parser = argparse.ArgumentParser(description="What CALM costs on this machine.")
    parser.add_argument("--out_dir", default="out/quick", help="a trained CALM (out/quick)")
    trained, encoding = sample.load_model(parser.parse_args().out_dir, "calm")
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads")
    table_loss()
    table_step()
    table_generation(trained.to(DEVICE), encoding)
    table_bias()


if __name__ == "__main__":
    sample.run(main)
