"""
`python classroom/benchmark.py`: what the likelihood-free tools cost, on this machine, against the plain way to write them.

Each figure is the median of several runs after a warm-up; figures that are compared were taken in turn, in one run. Python's
garbage collection is on, as it is for users, except where a column says otherwise. Memory is
the growth of the process (on a GPU: of torch's allocations) at its peak, measured in a process of its own. Six tables: the
energy loss, a whole training step, the batch sampler, its bias against the size of the pool (with a picture), the Brier estimate from more samples,
and generation with a trained model. About three minutes on two CPU cores.
"""

import argparse
import gc
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import Counter

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import sample  # noqa: E402
from autoencoder import Autoencoder, AutoencoderConfig, InputError  # noqa: E402
from calm import CALM, CALMConfig, brier_score_pairs  # noqa: E402
from classroom.curves import peak_resident  # noqa: E402
from energy_head import energy_loss  # noqa: E402


def median_seconds(functions, device, runs=7, calls=1):
    """The median over `runs` of a function's mean time in a block of calls; the blocks in turn, A B A B …, after one to warm up."""
    times = [[] for _ in functions]
    for run in range(runs + 1):
        for function, seconds in zip(functions, times):
            started = time.perf_counter()
            for _ in range(calls):
                function()
            if device == "cuda":
                torch.cuda.synchronize()
            if run:
                seconds.append((time.perf_counter() - started) / calls)
    return [statistics.median(seconds) for seconds in times]


# The energy loss


def materialised_energy_loss(samples, mean, log_std, n_targets=100):
    """The formula as it is written: M targets for each position, and all N·M differences of all positions at once."""
    targets = mean + log_std.exp() * torch.randn(n_targets, *mean.shape, device=mean.device)
    fidelity = (samples[:, None] - targets[None]).norm(dim=-1).mean()
    n = len(samples)
    diversity = (samples[:, None] - samples[None]).norm(dim=-1).sum((0, 1)).mean() / (n * (n - 1))
    return 2 * fidelity - diversity


def loss_steps(positions, device, N=8, l=128):
    """The two losses, forward and backward, as functions without arguments."""
    samples = torch.randn(N, positions, l, device=device, requires_grad=True)
    mean, log_std = torch.randn(positions, l, device=device), torch.full((positions, l), -1.0, device=device)

    def ours():
        samples.grad = None
        energy_loss(samples, mean, log_std)[0].backward()

    def materialised():
        samples.grad = None
        materialised_energy_loss(samples, mean, log_std).backward()

    return ours, materialised


def peak_bytes(which, positions, device, result):
    """Puts into the queue `result` by how much one step lets the memory grow; for a process of its own."""
    loss_steps(2, device)[which]()  # loads the kernels
    step = loss_steps(positions, device)[which]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        result.put(torch.cuda.max_memory_allocated() - before)
    else:
        before = peak_resident()
        step()
        result.put(peak_resident() - before)


def measure_peak(which, positions, device):
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=peak_bytes, args=(which, positions, device, result))
    process.start()
    value = result.get()
    process.join()
    return value


def table_energy_loss(device):
    print(f"\nEnergy loss, forward and backward, on {device}: N = 8, M = 100, l = 128, float32")
    print("| positions | materialised, ms | here, ms | faster | materialised, MB | here, MB | less memory |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for positions in (64, 256, 512, 1024) + ((4096, 8192) if device == "cuda" else ()):
        ours, plain = median_seconds(loss_steps(positions, device), device)
        ours_bytes, plain_bytes = (measure_peak(which, positions, device) for which in (0, 1))
        print(
            f"| {positions} | {1e3 * plain:.1f} | {1e3 * ours:.1f} | {plain / ours:.1f} × | {plain_bytes / 1e6:.0f} | "
            f"{ours_bytes / 1e6:.1f} | {plain_bytes / max(ours_bytes, 1):.0f} × |",
            flush=True,
        )


# A training step


def training_steps(device):
    """Whole training steps of one small CALM, as functions without arguments: as train.py takes them, and the formulas as written."""
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(257, 4, 64, 256, 640))
    model = CALM(CALMConfig(257, 4, 64, 256, 704, n_layers=4, n_heads=4, n_head_blocks=2, context=256), autoencoder).to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, fused=True)
    tokens = torch.randint(257, (16, 256), device=device)

    def plain_loss():
        """Each sample of the head has a copy of its conditioning, and the distances are all made at once."""
        hidden = model.hidden_states(tokens[:, :-4])
        copies = hidden.repeat(model.config.n_samples, 1, 1, 1)
        samples = model.head(copies, torch.rand(*copies.shape[:-1], model.config.noise_size, device=device) - 0.5)
        with torch.no_grad():
            mean, log_std = model.autoencoder.encode(model.chunks(tokens)[:, 1:])
        return materialised_energy_loss(samples, mean, log_std)

    def step(loss):
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()

    return lambda: step(model(tokens)[0]), lambda: step(plain_loss())


def table_training_step(device):
    ours, plain = median_seconds(training_steps(device), device, runs=5)
    print(f"\nOne training step on {device}: width 256, 4 layers, K = 4, l = 64, 16 sequences of 256 tokens, N = 8, M = 100, float32")
    print("| the formulas as written, ms | here, ms | faster |\n|--:|--:|--:|")
    print(f"| {1e3 * plain:.0f} | {1e3 * ours:.0f} | {plain / ours:.1f} × |", flush=True)


# The batch sampler


def counter_loop(pool, n):
    """The batch approximation as a loop over rows, one Counter a row: (P, N, K) -> (P, K)."""
    chosen = []
    for row in pool.tolist():
        counts = Counter(map(tuple, row))
        power = n
        while not any(count >= power for count in counts.values()):
            power -= 1
        weights = [math.comb(count, power) for count in counts.values()]
        chosen.append(random.choices(list(counts), weights)[0])
    return torch.tensor(chosen, device=pool.device)


def table_batch_sampler(device):
    print(f"\nBatch temperature sampling on {device}: pools of 200 chunks of 4 tokens, T = 1/2")
    print("| pools | loop of Counters, ms | here, ms | faster | faster, without garbage collection |")
    print("|--:|--:|--:|--:|--:|")
    for pools in (1, 8, 64, 512):
        P = torch.arange(1, 301).double().pow(-1.0)  # 300 chunks, as unequal as words are
        chunks = torch.randint(257, (300, 4))
        pool = chunks[P.multinomial(pools * 200, replacement=True)].view(pools, 200, 4).to(device)
        both = [lambda: counter_loop(pool, 2), lambda: sample.temperature_sample_batch(pool, 0.5)]
        loop, ours = median_seconds(both, device, runs=11, calls=20)
        gc.disable()
        loop_alone, ours_alone = median_seconds(both, device, runs=5, calls=20)
        gc.enable()
        ratios = f"{loop / ours:.1f} × | {loop_alone / ours_alone:.1f} ×"
        print(f"| {pools} | {1e3 * loop:.2f} | {1e3 * ours:.2f} | {ratios} |", flush=True)


def table_bias(picture):
    print("\nBias of the batch method: total variation distance to P^(1/T)/Z; P: 20 outcomes, P(i) ~ 1/i; 20 000 pools, seed 0")
    P = 1 / torch.arange(1, 21).double()
    P /= P.sum()
    temperatures, sizes = (0.9, 0.5, 0.4, 0.25), (5, 10, 20, 50, 100, 200, 500, 1000)
    print("| N | " + " | ".join(f"T = {T}" for T in temperatures) + " |\n|--:|" + "--:|" * len(temperatures))
    torch.manual_seed(0)
    distances = {T: [] for T in temperatures}
    for N in sizes:
        for T in temperatures:
            exact = P ** (1 / T) / (P ** (1 / T)).sum()
            counts = torch.zeros(20).double()
            for _ in range(20):  # a part at a time, to save memory
                pools = P.multinomial(1000 * N, replacement=True).view(1000, N, 1)
                counts += sample.temperature_sample_batch(pools, T).flatten().bincount(minlength=20)
            distances[T].append(0.5 * (counts / counts.sum() - exact).abs().sum().item())
        print(f"| {N} | " + " | ".join(f"{distances[T][-1]:.4f}" for T in temperatures) + " |", flush=True)
    # 20 000 exact draws would still lie this far from the distribution that they are drawn from: no less can be seen here.
    floors = {}
    for T in temperatures:
        exact = P ** (1 / T) / (P ** (1 / T)).sum()
        floors[T] = 0.5 * (exact * (1 - exact) / 20_000 * 2 / math.pi).sqrt().sum().item()
    print("| exact draws | " + " | ".join(f"{floors[T]:.4f}" for T in temperatures) + " |")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for i, (T, values) in enumerate(distances.items()):
        axes.loglog(sizes, values, marker="o", color=f"C{i}", label=f"T = {T} (dotted: 20 000 exact draws)")
        axes.axhline(floors[T], color=f"C{i}", ls=":")
    axes.set(title="Batch temperature sampling: bias against the pool", xlabel="N, draws in the pool",
             ylabel="total variation distance to P^(1/T)/Z")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    os.makedirs(os.path.dirname(picture), exist_ok=True)
    figure.savefig(picture, dpi=110)
    print(f"drawn in {picture}")


def table_brier():
    print("\nVariance of the Brier-1 estimate by the number of samples n: 50 outcomes, P(i) ~ 1/i, y drawn from P, 20 000 estimates")
    print("| n | variance | against n = 2 |\n|--:|--:|--:|")
    torch.manual_seed(0)
    P = 1 / torch.arange(1, 51).double()
    target = P.multinomial(20_000, replacement=True).unsqueeze(-1)
    exact = 2 * P[target[:, 0]] / P.sum() - (P / P.sum()).square().sum()  # of each y, so only the samples' noise is left
    first = None
    for n in (2, 4, 8, 16):
        samples = P.multinomial(n * 20_000, replacement=True).view(n, 20_000, 1)
        variance = (brier_score_pairs(samples, target)[:, 0] - exact).square().mean().item()
        first = first or variance
        print(f"| {n} | {variance:.4f} | {variance / first:.3f} |", flush=True)


# Generation


def table_generation(out_dir, device):
    try:
        model, encoding, _ = sample.load_model(out_dir, "calm")
    except InputError as error:
        print(f"\nGeneration is left out: {error}")
        return
    model = model.to(device)
    prompt = torch.tensor([encoding.encode_ordinary("\nROMEO:\n")[:8]], device=device)
    print(f"\nGeneration on {device} with {out_dir}: one text of 160 tokens, seed 0")
    print("| temperature | method | chunks/s | tokens/s | draws a chunk |\n|--:|---|--:|--:|--:|")
    for temperature, method in ((1.0, "batch"), (0.5, "batch"), (0.75, "exact"), (0.5, "exact")):
        used, generator = [], torch.Generator(device).manual_seed(0)
        sample.generate(model, prompt, 16, temperature, method, generator=generator)  # warm-up
        started = time.perf_counter()
        sample.generate(model, prompt, 160, temperature, method, generator=generator, draws_used=used)
        seconds = time.perf_counter() - started
        name = "pool of 200" if method == "batch" and temperature < 1 else "one draw" if temperature == 1 else "exact"
        print(
            f"| {temperature} | {name} | {len(used) / seconds:.1f} | {len(used) * model.config.chunk_size / seconds:.0f} | "
            f"{sum(used) / len(used):.0f} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description="What the likelihood-free tools cost on this machine.")
    parser.add_argument("--out_dir", default="out/quick", help="a trained model, for the table of generation (default: out/quick)")
    picture = os.path.join(ROOT, "classroom", "pictures", "batch_bias.png")
    parser.add_argument("--picture", default=picture, help="where to draw the curve of the bias")
    args = parser.parse_args()
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads" + (f", {torch.cuda.get_device_name()}" if "cuda" in devices else ""))
    for device in devices:
        table_energy_loss(device)
        table_training_step(device)
        table_batch_sampler(device)
        table_generation(args.out_dir, device)
    table_brier()
    table_bias(args.picture)


if __name__ == "__main__":
    sample.run(main)
