"""An experiment, not in the paper: a head whose noise is K choices.

    python classroom/choices.py --out_dir out/quick      # after python train.py, which left autoencoder.pt

Two things keep the paper's head from learning in minutes. A continuous map of continuous noise slides
across the gaps between the vectors of different chunks, and its draws fall between them: a choice
jumps. And the energy score of a whole chunk teaches how token 2 depends on token 1 only where a draw
has token 1 right, which is rare at first: a choice has a score of its own, after the text's choices
("teacher forcing"). Among finitely many points the score has a closed form, without draws.

The price: K softmaxes over the vocabulary are back, small ones. The rest is CALM: one step for K
tokens, the autoencoder and its vectors, temperature and BrierLM from draws alone.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
import train  # noqa: E402
from autoencoder import NORM_EPS, init_by_width  # noqa: E402
from calm import CALM, CALMConfig  # noqa: E402

ALPHA = 0.5  # exponent of the distances: all in (0, 2) are proper, and 1/2 is a little better here
WIDER = 3  # width of a choice's MLP, in units of d
LR = 3e-3  # learns faster than with the 2e-3 of the other models


def energy_score_of_choice(P, distances, target):
    """The energy score of a choice among V points c_i, in closed form: P (..., V), distances (V, V)
    of |c_i - c_j|^alpha, target (...) int, the point observed  ->  (...). `energy_score` estimates it
    from draws. With all distances 1 it is 2 P(y) - sum_i P(i)^2 - 1: the Brier score, less 1.
    """
    with torch.autocast(P.device.type, enabled=False):  # the two terms are close: all digits
        P = P.to(distances.dtype)
        fidelity = (P * distances[target]).sum(-1)  # E |c_i - c_y|^alpha
        diversity = (P @ distances * P).sum(-1)  # E |c_i - c_j|^alpha
    return diversity - 2 * fidelity


class Choice(nn.Module):
    """P of one choice among V: softmax(MLP([LayerNorm(x), c])), x and c (..., d)  ->  (..., V)."""

    def __init__(self, d, vocab_size):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.wide = nn.Linear(2 * d, WIDER * d)
        self.logits = nn.Linear(WIDER * d, vocab_size)
        self.embedding = nn.Embedding(vocab_size, d)  # tells the next choices about this one

    def forward(self, x, c):
        both = torch.cat([self.norm(x), c], dim=-1)  # (..., 2·d)
        return self.logits(F.silu(self.wide(both))).softmax(-1)


class ChoiceHead(nn.Module):
    """A sampler of vectors, like `EnergyHead`. Each is a sum of what K choices add:

        z = origin + codes[1, i_1] + … + codes[K, i_K],   i_k ~ P_k = Choice_k(x_k, c)
        x_1 = c = a map of the hidden state,   x_{k+1} = x_k + embedding_k[i_k]

    codes[k, v] is what token v at place k adds to the vector of a chunk. No autoencoder was trained
    to make such sums, but ours nearly does: `main` prints how often the decoder reads one right.
    """

    def __init__(self, d, latent_size, chunk_size, vocab_size):
        super().__init__()
        self.hidden_in = nn.Linear(d, d)
        self.hidden_norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.choices = nn.ModuleList(Choice(d, vocab_size) for _ in range(chunk_size))
        self.choices[-1].embedding.requires_grad_(False)  # nothing follows the last choice
        self.register_buffer("origin", torch.zeros(latent_size))
        self.register_buffer("codes", torch.zeros(chunk_size, vocab_size, latent_size))
        self.apply(init_by_width)

    @torch.no_grad()
    def start_from(self, autoencoder, chunks, n=64):
        """Takes the codes from a trained autoencoder and chunks of text, (many, K) int: codes[k, v] is
        how far the mean vector of n of them moves when their token k becomes v. Every choice begins
        with the tokens' frequencies.
        """
        V, few = self.codes.shape[1], chunks[:n]
        self.origin.copy_(autoencoder.encode(few)[0].mean(0))
        for k, codes in enumerate(self.codes):  # a view, (V, l): it writes into self.codes
            for v in range(V):
                changed = few.clone()
                changed[:, k] = v
                codes[v] = autoencoder.encode(changed)[0].mean(0) - self.origin
        counts = torch.bincount(chunks.flatten(), minlength=V) + 1  # + 1: nothing is impossible
        for choice in self.choices:
            choice.logits.bias.copy_((counts / counts.sum()).log())
            nn.init.zeros_(choice.logits.weight)

    def sums(self, chunks):
        """The vector of each chunk's choices: (..., K) int -> (..., l)."""
        return self.origin + sum(codes[i] for codes, i in zip(self.codes, chunks.unbind(-1)))

    def loss(self, hidden, chunks):
        """Minus the energy scores of the K choices, summed, a mean over positions: hidden (..., d),
        chunks (..., K) int -> a scalar. Two values of one choice, all else equal, give vectors as far
        apart as their codes: distances of codes are distances of z.
        """
        # Not by matrix products: a code's distance to itself must be 0.
        how = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(self.codes, self.codes, compute_mode=how) ** ALPHA  # (K, V, V)
        x = c = self.hidden_norm(self.hidden_in(hidden))
        loss = 0
        for k, choice in enumerate(self.choices):
            token = chunks[..., k]
            loss = loss - energy_score_of_choice(choice(x, c), distances[k], token).mean()
            x = x + choice.embedding(token)  # teacher forcing: the text's choice, not one drawn
        return loss

    def sample(self, hidden, n, generator=None):
        """n independent draws for each hidden state: (..., d)  ->  (n, ..., l)."""
        c = self.hidden_norm(self.hidden_in(hidden))
        x = c = c.expand(n, *c.shape)  # (n, ..., d)
        drawn = []
        for choice in self.choices:
            P = choice(x, c)  # (n, ..., V)
            i = P.flatten(0, -2).multinomial(1, generator=generator).view(P.shape[:-1])
            x = x + choice.embedding(i)
            drawn.append(i)
        return self.sums(torch.stack(drawn, dim=-1))


class ChoiceCALM(CALM):
    """CALM with a `ChoiceHead`. In evaluation its loss is the paper's, so that heads compare."""

    def __init__(self, config, autoencoder):
        super().__init__(config, autoencoder)
        c = config
        self.head = ChoiceHead(c.hidden_size, c.latent_size, c.chunk_size, c.vocab_size)

    def forward(self, tokens):
        """tokens (B, T)  ->  loss, metrics: scalars."""
        if not self.training:
            return super().forward(tokens)
        hidden = self.hidden_states(tokens[:, : -self.config.chunk_size])  # (B, L-1, d)
        return self.head.loss(hidden, self.chunks(tokens)[:, 1:]), {}


def build(configs):
    """A new ChoiceCALM of these sizes, {kind: dict}."""
    autoencoder = sample.build_model("autoencoder", configs)
    return ChoiceCALM(CALMConfig(**configs["calm"]), autoencoder)


def load(out_dir):
    """The model in choices.pt, for evaluation, and its tokenizer: like `sample.load_model`."""
    saved = sample.load_checkpoint(out_dir, "choices")
    model = build(saved["configs"])
    model.load_state_dict(saved["weights"])
    return model.eval(), sample.tiktoken.Encoding("saved", **saved["tokenizer"])


def main():
    parser = argparse.ArgumentParser(description="Train CALM with a head of K choices.")
    parser.add_argument("--out_dir", default="out/quick", help="where train.py left autoencoder.pt")
    out_dir = Path(parser.parse_args().out_dir)
    saved = sample.load_checkpoint(out_dir, "autoencoder")
    settings = saved["settings"] | {"out_dir": str(out_dir), "resume": False, "lr": LR}
    args = argparse.Namespace(**settings)
    args.device = sample.pick_device(args.device)
    data = train.load_tokens(args)
    train.seed_step(args.seed, 0)
    model = build(saved["configs"])
    model.autoencoder.load_state_dict(saved["weights"])
    chunks = train.random_windows(data[0], 20_000, args.chunk_size)
    model.head.start_from(model.autoencoder, chunks)
    right = model.autoencoder.decode(model.head.sums(chunks)).argmax(-1) == chunks
    print(f"the decoder reads {right.float().mean():.2%} of the tokens in sums of their codes")

    log = train.train("choices", model, saved["configs"], args, data)
    lines = "".join(json.dumps(row) + "\n" for row in log)
    train.write(out_dir / "choices_log.jsonl", lines.encode())
    text = sample.write_text(model.eval(), data[2], "\n", n_tokens=800, temperature=0.5)
    print(f"\nA sample at temperature 0.5:\n{text}\n")
    print(f"BrierLM {log[-1]['brier_lm']:.2f} ± {log[-1]['brier_lm_se']:.2f}")


if __name__ == "__main__":
    sample.run(main)
