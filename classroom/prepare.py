"""A text of any size becomes a folder that train.py reads, as bytes or as byte pairs learnt here.

    python classroom/prepare.py SOURCE data/novels --vocab_size 256
    python train.py --data data/novels

SOURCE is a text file or a folder of them; .gz and .xz are opened. A file is one document, or
several with <|endoftext|> between. One is in memory at a time: a corpus may be larger than memory.
"""

import argparse
import base64
import gzip
import hashlib
import heapq
import json
import lzma
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import regex  # as tiktoken has it: Python's `re` knows no \p{L}

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
import train  # noqa: E402


BLOCK = 2**24  # bytes that are read at a time
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors begin a file with it: it is not text


def read_documents(source):
    """Yields the documents of a file or a folder, strings. Whoever needs them twice reads twice."""
    files, mark = [source], sample.END_OF_TEXT.encode()
    if source.is_dir():
        files = sorted(f for f in source.iterdir() if f.is_file() and not f.name.startswith("."))
    for path in files:
        opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
        rest = b""  # the last document so far
        try:
            with opener(path, "rb") as file:
                start = file.read(3)
                if start != BYTE_ORDER_MARK:
                    rest = start
                while block := file.read(BLOCK):
                    sample.check(b"\0" not in block, f"{path} is not text")
                    *documents, rest = (rest + block).split(mark)  # blocks may cut a mark in two
                    yield from (d.decode() for d in documents if d.strip())
            if rest.strip():
                yield rest.decode()
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, UnicodeDecodeError):
            raise sample.UserError(f"{path} is damaged, or no text in UTF-8") from None


def merge(word, pair):
    """A list of tokens, with each occurrence of the pair, from the left, made one token."""
    merged, i = [], 0
    while i < len(word):
        both = tuple(word[i : i + 2]) == pair
        merged.append(pair[0] + pair[1] if both else word[i])
        i += 1 + both
    return merged


def train_bpe(pieces, vocab_size):
    """Byte-pair encoding: begin with the 256 bytes, make the most frequent pair of neighbours a new
    token, repeat. pieces {string: count}, which no pair crosses  ->  {token bytes: rank}, fewer
    than `vocab_size` if no pair occurs twice. A merge recounts only the words with its pair.
    """
    words, counts = [[bytes([b]) for b in piece.encode()] for piece in pieces], [*pieces.values()]
    pair_counts, words_with = Counter(), defaultdict(set)
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[i]
            words_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size and heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair] or -count < 2:
            continue  # the count has changed, and a newer entry has it; or it is not worth a token
        ranks.setdefault(pair[0] + pair[1], len(ranks))  # no bytes twice
        changed = set()
        for i in words_with.pop(pair):
            old, words[i] = words[i], merge(words[i], pair)
            for word, sign in ((old, -1), (words[i], 1)):
                for neighbours in zip(word, word[1:]):
                    pair_counts[neighbours] += sign * counts[i]
                    words_with[neighbours].add(i)
                    changed.add(neighbours)
        for neighbours in changed:
            heapq.heappush(heap, (-pair_counts[neighbours], neighbours))
    return ranks


def choose_held_out(sizes, share):
    """The numbers of whole documents for validation and for test, two sets, spread over the text.
    Each makes up about this share of it: between half and twice as much. None if that cannot be.
    """
    chosen, held, seen = (set(), set()), [0, 0], 0
    for i, size in enumerate(sizes):
        seen += size
        smaller = held.index(min(held))
        if held[smaller] + size / 2 < share * seen:  # nearer to the share with it than without
            chosen[smaller].add(i)
            held[smaller] += size
    if min(held) > share / 2 * seen and max(held) < 2 * share * seen:
        return chosen
    return None


def main():
    parser = argparse.ArgumentParser(description="Make a text of any size ready for train.py.")
    parser.add_argument("source", type=Path, help="a text file, or a folder of them")
    parser.add_argument("folder", type=Path, help="where the tokens go")
    parser.add_argument("--vocab_size", type=int, default=256, help="above 256: byte pairs (256)")
    parser.add_argument("--held_out", type=float, default=0.05,
                        help="share of the text for "
                        "validation, and as much again for test (0.05)")  # fmt: skip
    args = parser.parse_args()
    check = sample.check
    check(args.vocab_size >= 256, "--vocab_size must be at least 256, a token for each byte")
    check(0 < args.held_out < 0.25, "--held_out must be above 0 and below 0.25")
    # Tokens among texts would hide the texts from train.py for good.
    texts = args.source if args.source.is_dir() else args.source.parent
    apart = texts.resolve() != args.folder.resolve()
    check(apart, f"tokens need a folder of their own: name another than {args.folder}")

    # The first reading: the pieces of the text, the tokenizer, the documents to hold out.
    pieces, sizes = Counter(), []
    for document in read_documents(args.source):
        sizes.append(len(document))
        if args.vocab_size > 256:
            pieces.update(match[0] for match in regex.finditer(sample.PATTERN, document))
    check(sizes, f"there is no text in {args.source}")
    ranks, held_out = train_bpe(pieces, args.vocab_size), choose_held_out(sizes, args.held_out)

    # The second: each document becomes tokens, with one end-of-text token behind them. data.json
    # says that the folder is complete: it goes first and comes last.
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in ("data.json", "train.bin", "validation.bin", "test.bin"):
        (args.folder / name).unlink(missing_ok=True)  # not changed: a run may be reading them
    encoding, digest = sample.make_encoding(ranks), hashlib.sha256()
    with (
        open(args.folder / "train.bin", "wb") as train_file,
        open(args.folder / "validation.bin", "wb") as validation_file,
        open(args.folder / "test.bin", "wb") as test_file,
    ):
        for i, document in enumerate(read_documents(args.source)):
            if args.vocab_size > 256:
                ids = encoding.encode_ordinary(document)
            else:  # the same, but ten times as fast
                ids = np.frombuffer(document.encode(), np.uint8)
            tokens = np.append(ids, encoding.eot_token).astype(np.int32)
            digest.update(tokens.tobytes())
            # Where whole documents would be too much or too little, the ends of all are held out.
            cuts = [len(tokens), len(tokens)]
            if held_out is None:
                cuts = [round(len(tokens) * (1 - n * args.held_out)) for n in (2, 1)]
            elif i in held_out[0]:
                cuts = [0, len(tokens)]
            elif i in held_out[1]:
                cuts = [0, 0]
            files = (train_file, validation_file, test_file)
            for file, part in zip(files, np.split(tokens, cuts)):
                file.write(part.tobytes())
        n_train, n_validation, n_test = [file.tell() // 4 for file in files]  # 4 bytes a token
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    train.write(args.folder / "ranks.txt", "".join(lines).encode())
    about = {"source": str(args.source), "characters": sum(sizes)}
    about |= {"tokens": n_train + n_validation + n_test, "sha256": digest.hexdigest()}
    train.write(args.folder / "data.json", json.dumps(about).encode())
    print(f"{len(sizes):,} documents; tokens to train on: {n_train:,}, to validate: "
          f"{n_validation:,}, to test: {n_test:,}")  # fmt: skip


if __name__ == "__main__":
    sample.run(main)
