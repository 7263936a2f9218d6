"""
What small runs learn, and how soon.

    python classroom/small_runs.py words out/quick [--model baseline]    # how many of the words that it writes are words?
    python classroom/small_runs.py plot out/quick out/released …         # BrierLM against tokens, into classroom/pictures/

A word is two letters or more between two characters that are none. It counts as one if the training text has it, in the same
case: capitals and all.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
import train  # noqa: E402
from autoencoder import InputError  # noqa: E402
from classroom.texts import read_json  # noqa: E402

LABELS = {"choices": "recipe choices", "energy": "recipe energy", "released": "recipe released: std 0.02, lr 3e-4, N = 8"}


def words_of(text):
    """The words of a text, a list: runs of two letters or more, but for one that its end may have cut."""
    return re.findall(r"[^\W\d_]{2,}(?=[\W\d_])", text)


def share_of_words(texts, known):
    """The share of the words of all the texts that are in the set `known`, and how many there are."""
    words = [word for text in texts for word in words_of(text)]
    return sum(word in known for word in words) / max(1, len(words)), len(words)


def print_words(args):
    model, encoding, _ = sample.load_model(args.folders[0], args.model)
    training, held_out, _ = train.split_source(args.data)
    known = {word for document in training() for word in words_of(document)}
    print(f"{args.model} in {args.folders[0]}: {args.texts} texts of {args.n_tokens} tokens; {len(known):,} words in the training text, "
          f"and {share_of_words(held_out(), known)[0]:.1%} of the held-out text's words are among them")  # fmt: skip
    for temperature in (1.0, 0.5, 0.25):
        generator = torch.Generator().manual_seed(args.seed)
        texts = [sample.write_text(model, encoding, "\n", args.n_tokens, temperature, generator=generator) for _ in range(args.texts)]
        share, n = share_of_words(texts, known)
        print(f"T = {temperature:.2f}: {share:.1%} of {n} words", flush=True)


def draw_recipes(args):
    """BrierLM against training tokens, from the reports in each folder's log.jsonl."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for folder in args.folders:
        rows = [row for row in train.read_log(folder) if row["stage"] == "calm"]
        if not rows:
            raise InputError(f"{folder} has no log of a CALM: train one with python train.py --out_dir {folder}.")
        config = read_json(Path(folder) / "summary.json").get("config", {})
        label = f"{LABELS.get(config.get('recipe'), folder)}, {rows[-1]['step']:,} steps"
        millions, scores = [row["tokens"] / 1e6 for row in rows], [row["brier_lm"] for row in rows]
        axes.errorbar(millions, scores, [row["brier_lm_se"] for row in rows], marker="o", ms=3, capsize=2, label=label)
        passed = next((m for m, s in zip(millions, scores) if s > 1), None)
        print(f"{folder}: BrierLM passes 1 " + (f"by {passed:.2f} million tokens" if passed else f"not within {millions[-1]:.1f} million tokens"))
    axes.axhline(1, color="grey", ls=":", label="BrierLM = 1")
    axes.set(xscale="log", xlabel="training tokens (millions)", ylabel="BrierLM on held-out text", title="How soon a small CALM learns (K = 4)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path = Path(args.pictures) / "recipes.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    train.write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    print(f"drawn: {path}")


def main():
    parser = argparse.ArgumentParser(description="What small runs learn, and how soon.")
    parser.add_argument("what", choices=("words", "plot"))
    parser.add_argument("folders", nargs="+", metavar="DIR", help="out_dir of a run (plot: of several)")
    parser.add_argument("--model", choices=("calm", "baseline"), default="calm", help="for words (default: calm)")
    parser.add_argument("--data", default="shakespeare", help="for words: the text it was trained on (default: shakespeare)")
    parser.add_argument("--texts", type=int, default=10, help="texts to write (default: 10)")
    parser.add_argument("--n_tokens", type=int, default=400, help="tokens in each (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the texts (default: 0)")
    parser.add_argument("--pictures", default=str(ROOT / "classroom" / "pictures"), help="where the picture goes")
    args = parser.parse_args()
    {"words": print_words, "plot": draw_recipes}[args.what](args)


if __name__ == "__main__":
    sample.run(main)
