"""`python classroom/bottle.py`: why the head learns slowly, seen without a Transformer.

Take the 64 contexts of four bytes that are most frequent in the plays, " the" for instance. For
each of them the text has thousands of next chunks: a distribution P that is known. So the best
possible Brier-n is known, too, and one sees in a minute what a head has learnt of it. A head here
gets a learnt vector for each context, in place of the Transformer's hidden state, and 1 024
examples a step, of a context and a chunk that follows it in the text.

*Signal*: how strongly the gradient teaches the dependence between the tokens of a chunk, divided by
the noise of a batch. So that heads can be compared, each has first learnt from chunks whose tokens
were exchanged, and so how frequent each token is.

Compared are the paper's head, the same head by parts, and two experiments: a head that rolls dice
(parts.py) and a head of choices (choices.py). Add your own: a class with `loss` and `draw`, and a
line in HEADS. Can you beat them?

Letters: those of autoencoder.py, and C contexts, n examples or draws.
"""

import argparse
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
import train  # noqa: E402
from autoencoder import Autoencoder, AutoencoderConfig  # noqa: E402
from classroom.choices import ChoiceHead  # noqa: E402
from classroom.parts import PartsHead, parts_of_latent  # noqa: E402
from energy_head import EnergyHead, energy_loss, energy_score  # noqa: E402

K = 4  # tokens in a chunk, and in a context
WIDTH = 128  # d of the heads, as in the preset `quick`
ALPHA = 0.25
N_SAMPLES = 4  # N
N_TARGETS = 25  # M
EXAMPLES = 1024  # in a step


# -------------------- The bottle: contexts, and what follows them


class Bottle:
    """Contexts of a text, tokens (T,) int, and for each all the chunks that follow it there."""

    def __init__(self, tokens, n_contexts=64):
        windows = np.lib.stride_tricks.sliding_window_view(tokens, 2 * K)  # (T-7, 8): all places
        # One number for each context: its tokens are the digits. There are 257 tokens.
        numbers = windows[:, :K].astype(np.int64) @ 257 ** np.arange(K)
        found, counts = np.unique(numbers, return_counts=True)
        self.chunks = []  # for each context (places, K): the chunks that follow it
        for number in found[counts.argsort()[::-1][:n_contexts]]:
            following = windows[numbers == number, K:]
            self.chunks.append(torch.from_numpy(following.astype(np.int64)))
        self.P = [prefix_probabilities(chunks) for chunks in self.chunks]

    def following(self, contexts):
        """For each of n contexts (n,) a chunk that follows it somewhere in the text: (n, K) int."""
        places = torch.rand(len(contexts)).tolist()
        chunks = []
        for context, place in zip(contexts.tolist(), places):
            following = self.chunks[context]
            chunks.append(following[int(place * len(following))])
        return torch.stack(chunks)

    def examples(self, n):
        """n contexts, each as likely as the others, and for each a chunk: (n,) and (n, K) int."""
        contexts = torch.randint(len(self.chunks), (n,))
        return contexts, self.following(contexts)

    def exchanged(self, contexts):
        """Like `following`, but each token comes from a chunk of its own. So every token is as
        frequent as before, and knows nothing of the others: (n, K) int.
        """
        tokens = [self.following(contexts)[:, k] for k in range(K)]
        return torch.stack(tokens, dim=1)

    def best(self):
        """Brier-1 … 4 of the true distributions: sum_x P(x)^2, the mean over contexts, (4,)."""
        squares = [[sum(p**2 for p in P.values()) for P in of_context] for of_context in self.P]
        return torch.tensor(squares).mean(0)

    def brier(self, draws):
        """Brier-1 … 4 of draws (C, n, K), n for each context: (4,).

        The text's chunks y have the known distribution P, so that only the model's side is drawn:
        the mean of 2 P(draw), less how often two draws are equal.
        """
        scores = []
        for P, of_context in zip(self.P, draws.tolist()):
            n = len(of_context)
            row = []
            for length in range(1, K + 1):
                prefixes = [tuple(draw[:length]) for draw in of_context]
                hits = sum(P[length - 1].get(prefix, 0.0) for prefix in prefixes) / n
                counts = np.unique(prefixes, axis=0, return_counts=True)[1]
                equal = (counts * (counts - 1)).sum() / (n * (n - 1))
                row.append(2 * hits - equal)
            scores.append(row)
        return torch.tensor(scores).mean(0)


def prefix_probabilities(chunks):
    """How probable is each beginning of length 1 … K of the chunks (n, K)? A dict for each."""
    result = []
    for length in range(1, K + 1):
        prefixes, counts = np.unique(chunks[:, :length].numpy(), axis=0, return_counts=True)
        shares = (counts / len(chunks)).tolist()
        result.append({tuple(prefix): p for prefix, p in zip(prefixes.tolist(), shares)})
    return result


# -------------------- The heads
#
# loss(h, chunks, autoencoder): h (n, d), the contexts' vectors; chunks (n, K), what follows them.
# draw(h, n, autoencoder): n chunks for each of h (C, d), (C, n, K).


class PapersHead(nn.Module):
    """One vector for a chunk, one energy score for all of it."""

    def __init__(self, autoencoder, bottle):
        super().__init__()
        self.head = EnergyHead(WIDTH, autoencoder.config.latent_size, n_blocks=1)

    def loss(self, h, chunks, autoencoder):
        mean, log_std = autoencoder.encode(chunks)
        return energy_loss(self.head.sample(h, N_SAMPLES), mean, log_std, N_TARGETS, ALPHA)[0]

    def draw(self, h, n, autoencoder):
        return autoencoder.decode(self.head.sample(h, n)).argmax(-1).transpose(0, 1)


class HeadByParts(nn.Module):
    """The paper's head once for each token: it draws the token's part of z, given the parts before.
    In training these are the text's own ("teacher forcing"), with a little noise, since in drawing
    they are not exact either.
    """

    def __init__(self, autoencoder, bottle):
        super().__init__()
        some = torch.cat([chunks[:500] for chunks in bottle.chunks])
        self.register_buffer("basis", parts_of_latent(autoencoder, some))
        self.size = autoencoder.config.latent_size // K
        self.heads = nn.ModuleList(EnergyHead(WIDTH, self.size, n_blocks=1) for _ in range(K))
        self.earlier = nn.ModuleList(nn.Linear(k * self.size, WIDTH) for k in range(1, K))

    def given(self, h, parts):
        """h, and what the parts before, (..., k·l/K), add to it."""
        k = parts.shape[-1] // self.size
        if k == 0:
            return h
        return h + self.earlier[k - 1](parts)

    def teacher_forcing(self, h, true, noise=0.3):
        """What each of the K heads is given in training: h, and the text's own parts before its
        part, each number with noise of this std. h (n, d), true (n, l), which has the K parts side
        by side -> K tensors (n, d), the first of them h itself.
        """
        noisy = true + noise * torch.randn_like(true)
        return [self.given(h, noisy[:, : k * self.size]) for k in range(K)]

    def loss(self, h, chunks, autoencoder):
        mean, log_std = autoencoder.encode(chunks)
        z = mean + log_std.exp() * torch.randn_like(mean)
        true = z @ self.basis  # (n, l): in this basis the parts stand side by side
        loss = 0
        for k, hidden in enumerate(self.teacher_forcing(h, true)):
            begin, end = k * self.size, (k + 1) * self.size
            samples = self.heads[k].sample(hidden, N_SAMPLES)
            # One target is enough: a posterior is narrow beside the distances between tokens.
            loss = loss - energy_score(samples, true[None, :, begin:end], ALPHA).mean()
        return loss

    def draw(self, h, n, autoencoder):
        h = h.expand(n, *h.shape)  # (n, C, d)
        parts = h[..., :0]
        for head in self.heads:
            parts = torch.cat([parts, head.sample(self.given(h, parts), 1)[0]], dim=-1)
        return autoencoder.decode(parts @ self.basis.T).argmax(-1).transpose(0, 1)


class HeadOfChoices(nn.Module):
    """`choices.py`: K softmaxes, each given the choices before it, each with a score of its own."""

    kind = ChoiceHead

    def __init__(self, autoencoder, bottle):
        super().__init__()
        c = autoencoder.config
        sizes = {"chunk_size": K, "vocab_size": c.vocab_size, "latent_size": c.latent_size}
        self.head = self.kind(SimpleNamespace(**sizes, hidden_size=WIDTH))
        some = torch.cat([chunks[:500] for chunks in bottle.chunks])
        self.head.start_from(autoencoder, some[torch.randperm(len(some))])

    def loss(self, h, chunks, autoencoder):
        return self.head.loss(h, chunks, autoencoder)

    def draw(self, h, n, autoencoder):
        return autoencoder.decode(self.head.sample(h, n)).argmax(-1).transpose(0, 1)


class HeadOfDice(HeadOfChoices):
    """`parts.py`: K dice. The sides of each depend on the tokens before it, and each has a score of
    its own.
    """

    kind = PartsHead


HEADS = {  # name: class, colour in the picture
    "the paper's head": (PapersHead, "tab:blue"),
    "the paper's head, by parts": (HeadByParts, "tab:green"),
    "dice, by parts": (HeadOfDice, "tab:purple"),
    "the head of choices": (HeadOfChoices, "tab:orange"),
}


# -------------------- Training


def trained_autoencoder(tokens, folder):
    """That of a run, or else a new one, trained for half a minute."""
    if folder is not None:
        model = sample.load_model(folder, "autoencoder")[0].requires_grad_(False)
        fits = (model.config.chunk_size, model.config.vocab_size) == (K, 257)
        sample.check(fits, f"{folder} must be a run with K = {K} that reads bytes")
        return model
    sizes = {"latent_size": 32, "hidden_size": 128, "intermediate_size": 320}
    model = Autoencoder(AutoencoderConfig(257, **sizes))
    optimiser = torch.optim.AdamW(model.parameters(), betas=train.BETAS)
    for step in range(1, 301):
        optimiser.param_groups[0]["lr"] = train.learning_rate(step, 300, 4e-3)
        loss, _ = model(train.random_windows(tokens, 512, K))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval().requires_grad_(False)


def signal(head, vectors, bottle, autoencoder, n=8):
    """How much does a step teach of the dependence between the tokens of a chunk? The length of
    that part of the gradient, divided by the length of the noise of one batch.

    The gradient is computed twice, with chunks of the text and with exchanged tokens. Both teach
    how frequent each token is; their difference is what the dependence adds.
    """
    parameters = [p for p in [*head.parameters(), *vectors.parameters()] if p.requires_grad]
    gradients = []  # of n batches of the text
    differences = []
    for seed in range(n):
        contexts, chunks = bottle.examples(EXAMPLES)
        pair = []
        for tokens in (chunks, bottle.exchanged(contexts)):
            torch.manual_seed(seed)  # the same noise for both
            loss = head.loss(vectors(contexts), tokens, autoencoder)
            parts = torch.autograd.grad(loss, parameters)
            pair.append(torch.cat([part.flatten() for part in parts]))
        gradients.append(pair[0])
        differences.append(pair[0] - pair[1])
    noise = torch.stack(gradients).var(0).sum().sqrt()
    # The mean of n differences has noise, too, which would make it longer. The means of two halves
    # have independent noise: their product estimates the square of the length without a bias.
    halves = torch.stack(differences).view(2, n // 2, -1).mean(1)  # (2, parameters)
    return (halves[0] @ halves[1]).clamp_min(0).sqrt().item() / noise.item()


def learn(head, bottle, autoencoder, steps, every, exchange=False):
    """Trains a head, and a vector for each context. Returns the vectors, and a row for each score:
    step, and the shares of the possible Brier-1 … 4. With `exchange`, the tokens of the chunks are
    exchanged, so that there is no dependence to be learnt.
    """
    vectors = nn.Embedding(len(bottle.chunks), WIDTH)
    parameters = [*head.parameters(), *vectors.parameters()]
    optimiser = torch.optim.AdamW([p for p in parameters if p.requires_grad], betas=train.BETAS)
    rows = []
    for step in range(1, steps + 1):
        optimiser.param_groups[0]["lr"] = train.learning_rate(step, steps, 1e-2)
        contexts, chunks = bottle.examples(EXAMPLES)
        if exchange:
            chunks = bottle.exchanged(contexts)
        head.loss(vectors(contexts), chunks, autoencoder).backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % every == 0 or step == steps:
            with torch.no_grad():
                draws = head.draw(vectors.weight, 256, autoencoder)  # (C, 256, K)
            rows.append([step, *(bottle.brier(draws) / bottle.best()).tolist()])
    return vectors, rows


def draw_picture(path, results, alone):
    """A panel for each n: the share of the possible Brier-n, over the steps, for each head. The
    red line is the share that one reaches without the dependence between tokens, (4,).
    """
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle("What a head has learnt of known distributions: the later tokens come slowly")
    for n, axes in enumerate(figure.subplots(1, K, sharey=True), start=1):
        for name, rows in results.items():
            steps = [row[0] for row in rows]
            axes.plot(steps, [row[n] for row in rows], label=name, color=HEADS[name][1])
        axes.axhline(alone[n - 1], color="tab:red", ls=":", label="each token by itself")
        axes.set(title=f"Brier-{n}", xlabel="steps", ylim=(0, 1.05))
        axes.axhline(1, color="0.6", ls=":")
    figure.axes[0].set_ylabel("share of the possible")
    figure.axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description="Heads on distributions that are known.")
    parser.add_argument("--autoencoder", help="the folder of a run (default: train one)")
    parser.add_argument("--steps", type=int, default=160, help="of each head")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    parser.add_argument("--picture", default=ROOT / "classroom/pictures/bottle.png")
    args = parser.parse_args()
    sample.check(args.steps >= 4, "--steps must be at least 4")
    begun = time.monotonic()
    torch.manual_seed(args.seed)
    settings = {"data": "shakespeare", "tokenizer": "bytes", "context": 256, "out_dir": "out"}
    tokens = train.load_tokens(SimpleNamespace(**settings)).train
    bottle = Bottle(tokens)
    best = ", ".join(f"{100 * b:.1f}" for b in bottle.best())
    print(f"{len(bottle.chunks)} contexts; the best possible Brier-1 … 4 (x 100): {best}")
    autoencoder = trained_autoencoder(tokens, args.autoencoder)
    print(f"the autoencoder is ready after {time.monotonic() - begun:.0f} s", flush=True)
    # Without the dependence: a thousand chunks of exchanged tokens for each context.
    contexts = torch.arange(len(bottle.chunks)).repeat_interleave(1000)
    exchanged = bottle.exchanged(contexts).view(len(bottle.chunks), 1000, K)
    alone = bottle.brier(exchanged) / bottle.best()
    results = {}
    print("\n| head | s, signal included | share of the possible Brier-1 … 4 | BrierLM | signal |")
    print("|---|--:|---|--:|--:|")
    for name, (kind, _) in HEADS.items():
        torch.manual_seed(args.seed)
        since = time.monotonic()
        head = kind(autoencoder, bottle)
        _, rows = learn(head, bottle, autoencoder, args.steps, args.steps // 4)
        results[name] = rows
        head = kind(autoencoder, bottle)
        vectors, _ = learn(head, bottle, autoencoder, args.steps // 4, args.steps, exchange=True)
        strength = signal(head, vectors, bottle, autoencoder)
        shares = ", ".join(f"{share:.2f}" for share in rows[-1][1:])
        score = train.brier_lm(torch.tensor(rows[-1][1:]) * bottle.best())
        print(f"| {name} | {time.monotonic() - since:.0f} | {shares} | {score:.2f} "
              f"| {strength:.2f} |", flush=True)  # fmt: skip
    print(f"| the true distribution | | 1, 1, 1, 1 | {train.brier_lm(bottle.best()):.2f} | |")
    shares = ", ".join(f"{share:.2f}" for share in alone.tolist())
    score = train.brier_lm(alone * bottle.best())
    print(f"| each token by itself | | {shares} | {score:.2f} | |")
    draw_picture(args.picture, results, alone.tolist())
    print(f"\ndrawn: {args.picture}; {time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    sample.run(main)
