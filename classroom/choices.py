"""An experiment, not in the paper: a head that makes K choices, one for each token.

    python classroom/choices.py --autoencoder out/quick --out_dir out/choices     (after train.py)

A vector is nearly the sum of what each token adds to it. This head chooses the summands, one for
each token, with a softmax each. heads.py says why token by token. Since all probabilities are
known, the energy score needs no draws at all: it has a closed form.
The price: K softmaxes over the vocabulary are back, small ones. The rest is CALM.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
from autoencoder import NORM_EPS, init_by_width  # noqa: E402
from classroom import heads  # noqa: E402

ALPHA = 0.5  # exponent of the distances: all in (0, 2) are proper, and 1/2 is a little better here


def energy_score_of_choice(P, distances, target):
    """The energy score of a choice among V points c_i, which `energy_score` estimates from draws:
    P (..., V), distances |c_i - c_j|^alpha (V, V), target y (...) int, the point observed -> (...).
    With distance 1 between all different points it is 2 P(y) - sum_i P(i)^2 - 1: the Brier score,
    less 1.
    """
    with torch.autocast(P.device.type, enabled=False):  # the two terms are close: all digits
        P = P.to(distances.dtype)
        fidelity = (P * distances[target]).sum(-1)  # E |c_i - c_y|^alpha
        diversity = ((P @ distances) * P).sum(-1)  # E |c_i - c_j|^alpha
    return diversity - 2 * fidelity


class ChoiceHead(nn.Module):
    """A sampler of vectors, like `EnergyHead`. Each is a sum of what K choices add:

        z = origin + codes[1, i_1] + … + codes[K, i_K],   i_k ~ P_k = softmax(network_k(x_k, c))
        x_1 = c = a map of the hidden state,   x_{k+1} = x_k + embedding_k[i_k]

    codes[k, v] is what token v at place k adds to the vector of a chunk. The autoencoder was not
    trained to be such a sum, but nearly is one.
    """

    def __init__(self, config):
        super().__init__()
        K, V, l, d = config.chunk_size, config.vocab_size, config.latent_size, config.hidden_size
        self.hidden = nn.Sequential(nn.Linear(d, d), nn.LayerNorm(d, eps=NORM_EPS))
        self.choices = nn.ModuleList(heads.TokenNetwork(d, V, V) for _ in range(K))
        self.choices[-1].embedding.requires_grad_(False)  # nothing follows the last choice
        self.register_buffer("origin", torch.zeros(l))
        self.register_buffer("codes", torch.zeros(K, V, l))
        self.apply(init_by_width)

    @torch.no_grad()
    def start_from(self, autoencoder, chunks, n=64):
        """From a trained autoencoder and chunks of text, (many, K) int: codes[k, v] is by what
        the mean vector of n of them moves when their token k becomes v. P begins as frequencies.
        Returns the share of the tokens that the decoder recovers from sums of their codes.
        """
        V = self.codes.shape[1]
        self.origin.copy_(autoencoder.encode(chunks[:n])[0].mean(0))
        self.codes.copy_(heads.mean_vectors(autoencoder, chunks[:n]) - self.origin)
        counts = torch.bincount(chunks.flatten(), minlength=V) + 1  # + 1: nothing is impossible
        for choice in self.choices:
            choice.mlp[-1].bias.copy_((counts / counts.sum()).log())
            nn.init.zeros_(choice.mlp[-1].weight)
        right = autoencoder.decode(self.sums(chunks[:1000])).argmax(-1) == chunks[:1000]
        return right.float().mean().item()

    def sums(self, chunks):
        """(..., K) int, the choices  ->  the vectors z, (..., l)."""
        return self.origin + sum(codes[i] for codes, i in zip(self.codes, chunks.unbind(-1)))

    def loss(self, hidden, chunks, autoencoder=None):
        """Minus the energy scores of the K choices: hidden (..., d), chunks (..., K) -> a scalar.
        Two values of one choice, all else equal, give vectors as far apart as their codes.
        """
        exact = "donot_use_mm_for_euclid_dist"  # a code's distance to itself must be 0
        distances = torch.cdist(self.codes, self.codes, compute_mode=exact) ** ALPHA  # (K, V, V)
        x = c = self.hidden(hidden)  # (..., d)
        loss = 0
        for choice, D, token in zip(self.choices, distances, chunks.unbind(-1)):
            P = choice(x, c).softmax(-1)  # (..., V)
            loss = loss - energy_score_of_choice(P, D, token).mean()
            x = x + choice.embedding(token)  # teacher forcing: the text's choice, not one drawn
        return loss

    def sample(self, hidden, n, generator=None):
        """n independent draws for each hidden state: (..., d)  ->  (n, ..., l)."""
        x = c = self.hidden(hidden).expand(n, *hidden.shape)  # (n, ..., d)
        chunk = []
        for choice in self.choices:
            P = choice(x, c).softmax(-1)  # (n, ..., V)
            i = P.flatten(0, -2).multinomial(1, generator=generator).view(P.shape[:-1])
            x = x + choice.embedding(i)
            chunk.append(i)
        return self.sums(torch.stack(chunk, dim=-1))


def load(out_dir):
    """The model in choices.pt, for evaluation, and its tokenizer."""
    return heads.load(out_dir, "choices", ChoiceHead)


if __name__ == "__main__":
    sample.run(lambda: heads.main("choices", ChoiceHead, 1.0))
