"""`python classroom/benchmark.py`: what CALM costs on this machine, in four tables.

The energy loss and a training step, against the formulas as they are written; generation with a
trained model (--out_dir); the bias of the batch method. Times are medians, after a warm-up.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
import train  # noqa: E402
from autoencoder import Autoencoder, AutoencoderConfig  # noqa: E402
from calm import CALM, CALMConfig  # noqa: E402
from energy_head import energy_loss  # noqa: E402

DEVICE = sample.pick_device("auto")
# FLOPs a second by the maker's data sheets, of dense products in float32 (no TF32) and bfloat16.
PEAK = {"H100": (67e12, 989e12), "H200": (67e12, 989e12), "A100": (19.5e12, 312e12)}


def seconds(function, runs=5):
    """The median time of a call."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        function()
        if DEVICE != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first call warmed up


def peak_memory():
    """The largest memory in use so far, MB: of torch's tensors on a GPU, else of this process."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text()  # only Linux has it
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def loss_as_written(samples, mean, log_std, n_targets=100):
    """The energy loss as the released code writes it: all N·M differences of all positions."""
    targets = mean + log_std.exp() * torch.randn(n_targets, *mean.shape, device=mean.device)
    N = len(samples)
    fidelity = (samples[:, None] - targets).norm(dim=-1).mean()
    diversity = (samples[:, None] - samples).norm(dim=-1).sum((0, 1)).mean() / (N * (N - 1))
    return 2 * fidelity - diversity, fidelity, diversity


def loss_call(loss, positions):
    """A function that takes the loss forward and backward, at so many positions."""
    samples = torch.randn(8, positions, 128, device=DEVICE, requires_grad=True)
    mean, log_std = torch.randn(2, positions, 128, device=DEVICE)
    return lambda: loss(samples, mean, log_std)[0].backward()


def loss_memory(loss, positions):
    """By how many MB memory grows in one call. In a process of its own: a peak never goes down."""
    loss_call(loss, 2)()  # loads the kernels
    call, before = loss_call(loss, positions), peak_memory()
    call()
    return peak_memory() - before


def table_loss():
    print("\nEnergy loss, forward and backward: N = 8, M = 100, l = 128, float32")
    print("| positions | as written | here | as written | here |\n|--:|--:|--:|--:|--:|")
    for positions in (64, 256, 1024):
        row = [(loss, positions) for loss in (loss_as_written, energy_loss)]
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memories = pool.starmap(loss_memory, row, chunksize=1)
        times = [f"{1e3 * seconds(loss_call(*pair)):.1f} ms" for pair in row]
        print("|", positions, "|", *[f"{cell} |" for cell in times], end=" ")
        print(*[f"{mb:.0f} MB |" for mb in memories], flush=True)


def table_step():
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(257, 4, 64, 256, 640))
    model = CALM(CALMConfig(257, 4, 64, 256, 704, 4, 4, n_head_blocks=2, context=256), autoencoder)
    model.to(DEVICE).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, fused=True)
    tokens = torch.randint(257, (16, 256), device=DEVICE)

    def as_written(tokens):  # CALM.forward, with a copy of the hidden states for each sample
        hidden = model.hidden_states(tokens[:, :-4]).repeat(model.config.n_samples, 1, 1, 1)
        samples = model.head.sample(hidden, 1)[0]
        with torch.no_grad():
            mean, log_std = model.autoencoder.encode(model.chunks(tokens)[:, 1:])
        return loss_as_written(samples, mean, log_std)

    def step(forward, half):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            loss = forward(tokens)[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, train.GRADIENT_CLIP)
        optimiser.step()
        optimiser.zero_grad()

    with FlopCounterMode(display=False) as counter:  # of a step as train.py takes it
        step(model, half=False)
    flops, peak = counter.get_total_flops(), None
    ways = [("as written", as_written, False), ("float32", model, False)]
    if DEVICE == "cuda":
        ways += [("bfloat16", model, True), ("bfloat16, compiled", torch.compile(model), True)]
        name = torch.cuda.get_device_name()
        peak = next((PEAK[card] for card in PEAK if card in name), None)
    print("\nOne training step: width 256, 4 layers, K = 4, l = 64, 2 head blocks, 16 x 256 tokens")
    print("| way | time | tokens/s | TFLOPs/s | of the peak | memory |\n|---|--:|--:|--:|--:|--:|")
    for way, forward, half in ways:
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        t = seconds(lambda: step(forward, half))
        used = f"{flops / t / peak[half]:.1%}" if peak else "?"
        memory = f"{peak_memory():.0f} MB" if DEVICE == "cuda" else "?"
        print(f"| {way} | {1e3 * t:.0f} ms | {tokens.numel() / t:,.0f} | {flops / t / 1e12:.2f} "
              f"| {used} | {memory} |", flush=True)  # fmt: skip


def table_generation(out_dir):
    model, encoding = sample.load_model(out_dir, "calm")
    model.to(DEVICE)
    prompt = torch.tensor([encoding.encode_ordinary("\nROMEO:\n")], device=DEVICE)
    print("\nGeneration, one text of 80 tokens\n| T | method | tokens/s |\n|--:|---|--:|")
    for T, method, pool in ((1, "one draw", 200), (0.5, "batch", 200), (0.5, "exact", None)):
        torch.manual_seed(0)
        t = seconds(lambda: sample.generate(model, prompt, 80, T, pool), runs=1)
        print(f"| {T} | {method} | {80 / t:.0f} |", flush=True)


def table_bias(n=5000):
    temperatures, P = (0.9, 0.5, 0.4, 0.25), 1 / torch.arange(1, 21).double()
    print("\nThe batch method's bias: total variation distance to P(x)^(1/T) / Z, where P(x) ~ 1/x for")
    print(f"20 outcomes; {n} pools of N draws. (As many exact draws would show 0.02 or less.)")
    print("| N |", *[f"T = {T} |" for T in temperatures], "\n|--:|" + "--:|" * len(temperatures))
    for N in (10, 50, 200, 1000):
        print(f"| {N} |", end="")
        for T in temperatures:
            exact = P ** (1 / T) / (P ** (1 / T)).sum()
            pools = P.multinomial(n * N, replacement=True).view(n, N, 1)
            share = sample.temperature_sample_batch(pools, T).flatten().bincount(minlength=20) / n
            print(f" {0.5 * (share - exact).abs().sum():.3f} |", end="", flush=True)
        print()


def main():
    parser = argparse.ArgumentParser(description="What CALM costs on this machine.")
    parser.add_argument("--out_dir", default="out/quick", help="a trained CALM (out/quick)")
    args = parser.parse_args()
    sample.load_checkpoint(args.out_dir, "calm")  # a wrong --out_dir is told at once
    print(f"torch {torch.__version__}, {DEVICE}, {torch.get_num_threads()} threads")
    table_loss()
    table_step()
    table_generation(args.out_dir)
    table_bias()


if __name__ == "__main__":
    sample.run(main)
