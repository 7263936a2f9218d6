"""The picture that train.py leaves beside a model, curves.png; and what its reports say of the machine."""

import os

import torch

# Floating-point operations a second in bfloat16, without sparsity, from the makers' data sheets: what 100 % would be.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def peak_resident():
    """The largest memory, in bytes, that this process has had so far; 0 where that cannot be known."""
    if os.path.exists("/proc/self/status"):  # Linux: getrusage would count the parent process as well
        with open("/proc/self/status") as f:
            return 1024 * next(int(line.split()[1]) for line in f if line.startswith("VmHWM"))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes


def how_busy(flops_per_second, device):
    """What training makes of a device, as text: operations a second, the share of its peak if that is known (MFU), the peak of memory."""
    cuda = device.startswith("cuda")
    peaks = [peak for name, peak in PEAK_FLOPS.items() if cuda and name in torch.cuda.get_device_name()]
    share = f" ({flops_per_second / peaks[0]:.1%} of the peak)" if peaks else ""
    memory = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    return f"{flops_per_second / 1e9:,.0f} GFLOP/s{share}  {memory / 1e9:.1f} GB"


def draw_curves(rows, autoencoder=None):
    """
    How the loss came down and the score went up, over the rows of log.jsonl of one stage; and, for CALM, how much noise its
    autoencoder bears (its part of summary.json). Returns the figure.
    """
    from matplotlib.figure import Figure  # here, because it takes a second to load

    figure = Figure(figsize=(15 if autoencoder else 10, 4.2), layout="constrained")
    left, middle, *right = figure.subplots(1, 3 if autoencoder else 2)
    millions = [row["tokens"] / 1e6 for row in rows]
    terms = {"val_loss": "energy loss = 2 · fidelity − diversity", "fidelity": "fidelity  E‖x − y‖", "diversity": "diversity  E‖x′ − x″‖"}
    for name, label in terms.items() if autoencoder else [("bits_per_byte", "cross-entropy")]:
        left.plot(millions, [row[name] for row in rows], label=label, ls="--" if name == "diversity" else "-")
    for n in range(4):
        middle.plot(millions, [100 * row["brier"][n] for row in rows], label=f"Brier-{n + 1}")
    lm, errors = [row["brier_lm"] for row in rows], [row["brier_lm_se"] for row in rows]
    middle.errorbar(millions, lm, errors, color="black", lw=2, capsize=3, label="BrierLM ± standard error")
    for axes, what, unit in (left, "loss", "distance in latent space" if autoencoder else "bits per byte"), (middle, "score", "score × 100"):
        axes.set(title=f"The {what} on held-out text", xlabel="training tokens (millions)", ylabel=unit)
    if autoencoder:
        noise = {float(sigma): 100 * accuracy for sigma, accuracy in autoencoder["accuracy_by_noise"].items()}
        right[0].plot(noise.keys(), noise.values(), marker="o", label="the posterior's mean + noise, decoded")
        right[0].axvline(0.3, color="grey", ls=":", label="the paper's test: σ = 0.3")
        right[0].set(title="Autoencoder: noise on the latent", xlabel="σ of the noise on z", ylabel="held-out tokens recovered (%)")
    for axes in (left, middle, *right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", loc=(0.43, 0.42) if axes is middle else "best")  # between Brier-1 and Brier-2
    return figure
