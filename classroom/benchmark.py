"""`python classroom/benchmark.py`: how fast this machine trains and writes, in one table.

For each preset that fits it takes steps as `train.py` does, on random tokens, and then writes with
the untrained model: speed does not depend on what a model has learnt. (The exact method's does, so
it is not here.) On a CPU only `quick` is tried. Paste what it prints wherever you report a speed.
"""

import argparse
import platform
import sys
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
import train  # noqa: E402

# FLOPs a second by the maker's data sheets, of dense products in bfloat16 and float32 (no TF32).
PEAK = {"H100": (989e12, 67e12), "H200": (989e12, 67e12), "A100": (312e12, 19.5e12)}
VOCABULARY = 257  # bytes, and an end of the text


def settings_of(preset):
    """The settings of a preset on this machine, as `train.py` would have them."""
    before = sys.argv
    sys.argv = ["train.py", "--preset", preset]
    args = train.parse_settings()
    sys.argv = before
    return args


def seconds(function, least=2):
    """The median time of a call, after a warm-up, from calls of at least so many seconds."""
    function()
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=least).median


def training(kind, args):
    """One part of a batch, forward and backward, and a step: the model, the part's tokens, its
    FLOPs, and its time in seconds. (A step of several parts costs as many times that, nearly.)
    """
    model = sample.build_model(kind, train.model_configs(args, VOCABULARY))
    model.to(args.device).train()
    optimiser = train.make_optimiser(model)
    n = args.batch_size // args.gradient_accumulation_steps
    tokens = torch.randint(VOCABULARY, (n, args.context), device=args.device)
    forward = model
    if args.compile:
        forward = torch.compile(model)
    half = torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    def step(forward=forward):
        with half:
            loss, _ = forward(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.GRADIENT_CLIP)
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()  # waits for a GPU

    with FlopCounterMode(display=False) as counter:  # of matrix products
        step(model)
    return model, tokens, counter.get_total_flops(), seconds(step)


def writing(model, device, temperature):
    """Tokens a second of one text, the batch method's 200 draws included."""
    prompt = torch.randint(VOCABULARY, (1, 32), device=device)
    call = lambda: sample.generate(model.eval(), prompt, 128, temperature)
    return 128 / seconds(call, least=1)


def row(preset, kind):
    """A line of the table."""
    args = settings_of(preset)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, tokens, flops, time = training(kind, args)
    way = args.dtype
    if args.compile:
        way += ", compiled"
    share = memory = "–"
    if args.device == "cuda":
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        for card, (bfloat16, float32) in PEAK.items():
            if card in torch.cuda.get_device_name():
                peak = {"bfloat16": bfloat16, "float32": float32}[args.dtype]
                share = f"{flops / time / peak:.1%}"
    cells = [preset, kind, way, f"{tokens.shape[0]} × {tokens.shape[1]}", f"{1e3 * time:,.0f} ms"]
    cells += [f"{tokens.numel() / time:,.0f}", f"{flops / time / 1e12:.3g}", share, memory]
    cells += [f"{writing(model, args.device, T):,.0f}" for T in (1, 0.5)]
    return "| " + " | ".join(cells) + " |"


def main():
    argparse.ArgumentParser(description="How fast does this machine train and write?").parse_args()
    device = sample.pick_device("auto")
    name = platform.processor() or platform.machine()
    presets = ["quick"]
    if device == "cuda":
        name = torch.cuda.get_device_name()
    if device != "cpu":
        presets = train.PRESETS
    print(f"{device} ({name}), {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"Python {platform.python_version()}, {platform.system()}\n")  # fmt: skip
    print("| preset | model | way | one part | time | training, tokens/s | TFLOP/s | of the peak "
          "| memory | writing at T = 1, tokens/s | at T = ½ |")  # fmt: skip
    print("|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for preset in presets:
        for kind in ("calm", "baseline"):
            try:
                print(row(preset, kind), flush=True)
            except torch.OutOfMemoryError:
                print(f"| {preset} | {kind} | does not fit in memory " + "| " * 9 + "|")


if __name__ == "__main__":
    sample.run(main)
