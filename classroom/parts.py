"""An experiment, not in the paper: a head that rolls a die for each token's part of the vector.

    python classroom/parts.py --autoencoder out/quick --out_dir out/parts         (after train.py)

Like the paper's head it is a sampler without a softmax, and the energy score trains it. Three
things are different:

1. *Parts.* z is turned so that each token has coordinates of its own, its part of z. The head draws
   one part after the other, each given the tokens before it, and each part has a score of its own.
2. *Teacher forcing.* In training the given tokens are the text's. heads.py says why that matters.
3. *A die.* The noise is not a vector but the roll of a die: for each part the network gives S
   points, its "sides", and one of them is drawn, each with probability 1/S. A continuous function
   of continuous noise has to slide from one token's place to another's; a die jumps. All sides come
   from one pass of the network, so the score is over all of them, and exact for the outcome at
   hand. (The gain does not come from the exact score: lab book, question 2.)

The Transformer still takes one step for K tokens. The price: K small networks, one after the other,
and probabilities that are multiples of 1/S. (One could even count them, and compute how probable a
chunk is. Nothing here does.)

Letters: those of autoencoder.py, and S sides of a die. A part has l/K numbers.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
from autoencoder import NORM_EPS, init_by_width  # noqa: E402
from classroom import heads  # noqa: E402

SIDES = 32  # S: 16 learn less, 64 hardly more (lab book, question 2)


def parts_of_latent(autoencoder, chunks):
    """An orthonormal basis of the latent space, (l, l), whose k-th l/K columns belong to token k.
    chunks (many, K) int.

    Exchange the tokens after the k-th of a chunk for those of another: the vector moves. The
    directions in which it moves least belong to the first k tokens. (Directions in which vectors
    hardly vary at all would be among those of token 1.)
    """
    l, K = autoencoder.config.latent_size, autoencoder.config.chunk_size
    other = chunks[torch.randperm(len(chunks))]
    basis = torch.zeros(l, 0)
    for k in range(1, K):
        exchanged = torch.cat([chunks[:, :k], other[:, k:]], dim=1)
        moved = autoencoder.encode(chunks)[0] - autoencoder.encode(exchanged)[0]  # (n, l)
        # What the columns so far leave over: of no columns, the whole space.
        rest = torch.linalg.svd(basis, full_matrices=True)[0][:, basis.shape[1] :]
        _, directions = torch.linalg.eigh(rest.T @ moved.T @ moved @ rest)  # smallest first
        basis = torch.cat([basis, rest @ directions[:, : l // K]], dim=1)
    rest = torch.linalg.svd(basis, full_matrices=True)[0][:, basis.shape[1] :]
    return torch.cat([basis, rest], dim=1)


def score_of_die(sides, target):
    """The energy score of a die for an outcome, with alpha = 1 as in the paper: sides (..., S,
    l/K), target (..., l/K) -> (...). In the bottle 1/2 and 1 learn equally fast.

    The sides are no draws from some distribution: they *are* the distribution. Two rolls show any
    pair of sides with probability 1/S^2, also a side with itself. So diversity is a mean over all
    S^2 pairs, and the S zeros of the diagonal count. (`fidelity_and_diversity` leaves them out,
    since its samples are draws.)
    """
    to_target = (sides - target.unsqueeze(-2)).norm(dim=-1)  # (..., S)
    exact = "donot_use_mm_for_euclid_dist"  # a side's distance to itself must be 0
    to_each_other = torch.cdist(sides, sides, compute_mode=exact)  # (..., S, S)
    return to_each_other.mean((-1, -2)) - 2 * to_target.mean(-1)


def nearest(part, codes):
    """The token whose code is nearest: part (..., l/K), codes (V, l/K) -> (...) int."""
    return torch.cdist(part.flatten(0, -2), codes).argmin(-1).view(part.shape[:-1])


class PartsHead(nn.Module):
    """A sampler of vectors, like `EnergyHead`:

        z = basis · [part 1, …, part K],   part k = one of the S points network_k(x_k, c)
        x_1 = c = a map of the hidden state,   x_{k+1} = x_k + embedding_k[token k]

    A drawn part is read as the token whose code is nearest: codes[k, v] is where the part of token
    v at place k lies on average. Why is the next die not given the part itself? The part of a token
    moves a little with the later tokens, too. In training, where it is the text's, the next die
    would learn to read them there. But a drawn part is one of S points, too few to tell.
    """

    def __init__(self, config):
        super().__init__()
        K, V, l, d = config.chunk_size, config.vocab_size, config.latent_size, config.hidden_size
        self.hidden = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d, eps=NORM_EPS))
        sample.check(l % K == 0, "--latent_size must be a multiple of --chunk_size")
        n_outputs = SIDES * (l // K)
        self.dice = nn.ModuleList(heads.TokenNetwork(d, n_outputs, V) for _ in range(K))
        self.dice[-1].embedding.requires_grad_(False)  # nothing follows the last part
        self.register_buffer("basis", torch.eye(l))
        self.register_buffer("codes", torch.zeros(K, V, l // K))
        self.apply(init_by_width)

    def split(self, z):
        """z (..., l) -> its K parts, (..., l/K) each."""
        return (z @ self.basis).split(self.codes.shape[-1], dim=-1)

    @torch.no_grad()
    def start_from(self, autoencoder, chunks, n=64):
        """From a trained autoencoder and chunks of text, (many, K) int: finds the parts, and a code
        for each token, a mean over n chunks. The sides of a die begin at the parts of S chunks.
        Returns the share of the tokens whose code is the nearest to their part.
        """
        self.basis.copy_(parts_of_latent(autoencoder, chunks))
        for k, means in enumerate(heads.mean_vectors(autoencoder, chunks[:n])):  # (V, l)
            self.codes[k] = self.split(means)[k]
        for die, part in zip(self.dice, self.split(autoencoder.encode(chunks[:SIDES])[0])):
            nn.init.zeros_(die.mlp[-1].weight)
            die.mlp[-1].bias.copy_(part.flatten())
        parts = self.split(autoencoder.encode(chunks[:1000])[0])
        read = torch.stack([nearest(part, codes) for part, codes in zip(parts, self.codes)], -1)
        return (read == chunks[:1000]).float().mean().item()

    def loss(self, hidden, chunks, autoencoder):
        """Minus the energy scores of the K dice: hidden (..., d), chunks (..., K) -> a scalar. The
        outcome is one draw from the posterior of the text's chunk.
        """
        with torch.no_grad():
            mean, log_std = autoencoder.encode(chunks)
            z = mean + log_std.exp() * torch.randn_like(mean)  # (..., l)
        x = c = self.hidden(hidden)  # (..., d)
        loss = 0
        for die, part, token in zip(self.dice, self.split(z), chunks.unbind(-1)):
            sides = die(x, c).unflatten(-1, (SIDES, -1))  # (..., S, l/K)
            loss = loss - score_of_die(sides, part).mean()
            x = x + die.embedding(token)  # teacher forcing: the text's token, not one drawn
        return loss

    def sample(self, hidden, n, generator=None):
        """n independent draws for each hidden state: (..., d) -> (n, ..., l)."""
        x = c = self.hidden(hidden).expand(n, *hidden.shape)  # (n, ..., d)
        parts = []
        for die, codes in zip(self.dice, self.codes):
            sides = die(x, c).unflatten(-1, (SIDES, -1))  # (n, ..., S, l/K)
            shape = (*x.shape[:-1], 1, 1)
            roll = torch.randint(SIDES, shape, generator=generator, device=x.device)
            part = sides.take_along_dim(roll, dim=-2).squeeze(-2)  # (n, ..., l/K)
            x = x + die.embedding(nearest(part, codes))
            parts.append(part)
        return torch.cat(parts, dim=-1) @ self.basis.T


def load(out_dir):
    """The model in parts.pt, for evaluation, and its tokenizer."""
    return heads.load(out_dir, "parts", PartsHead)


if __name__ == "__main__":
    sample.run(lambda: heads.main("parts", PartsHead, 0.8))  # a step takes a quarter longer
