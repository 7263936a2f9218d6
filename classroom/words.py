"""How many of the words that a model writes are words?

    python classroom/words.py FOLDER

A word is a run of two letters or more. It counts if the training text has it, in the same case.
"""

import argparse
import json
import re
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
import train  # noqa: E402
from classroom import choices, parts  # noqa: E402


def words_of(text):
    """The words of a text, a list, but for a last one that the text's end may have cut."""
    return re.findall(r"[^\W\d_]{2,}(?=[\W\d_])", text)


def share_of_words(texts, known):
    """The share of the words of all texts that are in the set `known`, that of the distinct words,
    which repeats of a frequent word do not flatter, and how many words there are.
    """
    words = [word for text in texts for word in words_of(text)]
    distinct = set(words)
    share = sum(word in known for word in words) / max(1, len(words))
    return share, len(distinct & known) / max(1, len(distinct)), len(words)


def documents_in(tokens, encoding):
    """Yields the texts in an array of tokens."""
    for document in np.split(tokens, np.flatnonzero(tokens == encoding.eot_token)):
        yield encoding.decode(document[document != encoding.eot_token].tolist())


def main():
    parser = argparse.ArgumentParser(description="How many of the words that a model writes are?")
    parser.add_argument("folder", nargs="?", default="out/quick", help="the --out_dir of a run")
    args = parser.parse_args()
    if Path(args.folder, "choices.pt").exists():
        model, encoding = choices.load(args.folder)
    elif Path(args.folder, "parts.pt").exists():
        model, encoding = parts.load(args.folder)
    else:
        model, encoding = sample.load_model(args.folder)

    settings = json.loads(sample.read_text(Path(args.folder, "summary.json")))["config"]
    data = train.load_tokens(Namespace(**settings))
    known = {word for text in documents_in(data.train, encoding) for word in words_of(text)}
    share, *_ = share_of_words(documents_in(data.test, encoding), known)
    print(f"{len(known):,} words in the training text, {share:.1%} of the test text's words")

    for temperature in (1, 1 / 2, 1 / 4):
        torch.manual_seed(0)
        start = time.monotonic()
        texts = [sample.write_text(model, encoding, "\n", 400, temperature) for _ in range(10)]
        speed = 10 * 400 / (time.monotonic() - start)
        share, distinct, n = share_of_words([text[:400] for text in texts], known)
        print(f"T = {temperature:.2f}: {share:.1%} of {n} words and {distinct:.1%} of the distinct "
              f"ones are known, {speed:,.0f} tokens/s", flush=True)  # fmt: skip


if __name__ == "__main__":
    sample.run(main)
