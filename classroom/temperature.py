"""`python classroom/temperature.py out/quick out/baseline`: what does a temperature do to a text?

Three ways to write at a temperature T are compared by their words:

    CALM, by the batch method, which counts equal chunks among 200 draws;
    the discrete Transformer, token by token, where T divides the logits;
    the discrete Transformer, by the same batch method, from 200 continuations of K tokens.

The third way tells whether the method is at fault, or the model. A word is known if the training
text has it; `words.py` counts them. *Distinct* words count once, however often they are repeated.
"""

import argparse
import sys
from argparse import Namespace
from pathlib import Path

import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
import train  # noqa: E402
from calm import KVCache  # noqa: E402
from classroom.words import documents_in, share_of_words, words_of  # noqa: E402

TEMPERATURES = (1, 0.8, 0.65, 0.55, 0.5, 0.4, 1 / 3, 0.25)
CHARACTERS = 400
POOL = 200  # N


def by_chunks(model, text, K, n):
    """n continuations of K tokens each, by a TransformerLM: text (1, T) int -> (n, K) int."""
    # The text is read once. Then its keys and values serve all n continuations.
    cache = KVCache()
    hidden = model.hidden_states(text, cache)[:, -1].expand(n, -1)  # (n, d)
    for stored in (cache.keys, cache.values):
        for layer, tensor in stored.items():
            stored[layer] = tensor.expand(n, -1, -1, -1)
    tokens = [model.draw_chunks(hidden, 1)[0]]  # (n, 1)
    while len(tokens) < K:
        hidden = model.hidden_states(tokens[-1], cache)[:, 0]
        tokens.append(model.draw_chunks(hidden, 1)[0])
    return torch.cat(tokens, dim=1)


@torch.no_grad()
def write_by_chunks(model, encoding, temperature, K=4):
    """A text of the discrete Transformer, sharpened like CALM's: chunk by chunk, from a pool."""
    text = torch.tensor([encoding.encode_ordinary("\n")])  # (1, 1)
    longest = model.config.context - K
    while text.shape[1] <= CHARACTERS:
        pool = by_chunks(model, text[:, -longest:], K, POOL)  # (n, K)
        chunk = sample.temperature_sample_batch(pool, temperature)  # (K,)
        text = torch.cat([text, chunk[None]], dim=1)
    return sample.decode(encoding, text[0].tolist())


def write(model, encoding, temperature):
    """A text of either model, as `sample.py` writes it."""
    return sample.write_text(model, encoding, "\n", CHARACTERS, temperature, POOL)


def measure(writer, model, encoding, known, n_texts):
    """For each temperature: T, the known share of the words and of the distinct words, and the
    share of the most frequent word. A list of rows."""
    rows = []
    for temperature in TEMPERATURES:
        torch.manual_seed(0)
        texts = [writer(model, encoding, temperature)[:CHARACTERS] for _ in range(n_texts)]
        share, distinct, n = share_of_words(texts, known)
        words = [word for text in texts for word in words_of(text)]
        commonest = max(set(words), key=words.count)
        most = words.count(commonest) / n
        rows.append((temperature, share, distinct, most))
        print(f"| {temperature:.2f} | {share:.0%} | {distinct:.0%} | {commonest} {most:.0%} "
              f"| {texts[0][:60]!r} |", flush=True)  # fmt: skip
    return rows


def draw_picture(path, results):
    """Three panels over T: known words, known distinct words, the most frequent word."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle("Words that are words, against the temperature")
    titles = ("share of the words", "share of the distinct words", "share of the commonest word")
    for i, axes in enumerate(figure.subplots(1, 3, sharey=True), start=1):
        for name, rows in results.items():
            axes.plot([row[0] for row in rows], [row[i] for row in rows], "o-", label=name)
        axes.set(title=titles[i - 1], xlabel="temperature T", ylim=(0, 1.02))
        axes.invert_xaxis()
    figure.axes[-1].legend()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Words against the temperature.")
    parser.add_argument("calm", help="the --out_dir of a CALM")
    parser.add_argument("baseline", help="the --out_dir of a discrete Transformer")
    parser.add_argument("--n_texts", type=int, default=3, help="for each point, of 400 characters")
    parser.add_argument("--picture", default=ROOT / "classroom/pictures/words.png")
    args = parser.parse_args()
    calm, encoding = sample.load_model(args.calm)
    transformer, _ = sample.load_model(args.baseline, "baseline")
    settings = sample.load_checkpoint(args.calm, "calm")["settings"]
    data = train.load_tokens(Namespace(**settings))
    known = {word for text in documents_in(data.train, encoding) for word in words_of(text)}
    ways = {
        "CALM, chunk by chunk": (write, calm),
        "discrete, token by token": (write, transformer),
        "discrete, chunk by chunk": (write_by_chunks, transformer),
    }
    results = {}
    for name, (writer, model) in ways.items():
        print(f"\n{name}\n| T | words | distinct words | commonest | a text |\n|--|--|--|--|--|")
        results[name] = measure(writer, model, encoding, known, args.n_texts)
    draw_picture(args.picture, results)
    print(f"\ndrawn: {args.picture}")


if __name__ == "__main__":
    sample.run(main)
