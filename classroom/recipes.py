"""
How a small CALM is made to learn: the recipes of `python train.py --recipe NAME`.

    choices     what learns in minutes, NOT in the paper: the energy head is replaced by one whose noise is K choices
    energy      the paper's head and loss, with first weights that suit the width (see `init_by_width` in autoencoder.py)
    released    the same with the released code's first weights (std 0.02), learning rate (3e-4) and number of samples (N = 8)

All three have the same backbone and autoencoder; they differ in the language model alone. Two things keep the paper's head from
learning in minutes (README, "What holds small runs back"):

- A continuous map of continuous noise slides across the gaps between the posteriors of different chunks: its draws fall
  between them. A choice jumps.
- The energy score of a whole chunk teaches how token 2 depends on token 1 only where a draw has token 1 right, which is rare
  at first. A choice can have a score of its own, given that the choices before it are the text's ("teacher forcing"). And for
  a choice among finitely many points the score has a closed form: no draws, no noise in the gradient.

The price: K softmaxes over the vocabulary have come back, small ones, for each step of the Transformer. The rest is CALM: one
step for K tokens, the autoencoder and its latents, temperature and BrierLM from draws alone.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from calm import CALM, autoencoder_flops, backbone_flops, draw_categorical
from energy_head import NORM_EPS, init_linear_maps, linear_of_both, pairwise_distances

# The settings that a recipe brings along. `choices` learns faster with a higher learning rate than the quick preset's 2e-3. For
# this and the two constants below, README has the figures ("What holds small runs back").
RECIPES = {"choices": {"lr": 3e-3}, "energy": {}, "released": {"lr": 3e-4, "n_samples": 8}}
WIDER = 3  # the width of a choice's MLP, in units of d


def energy_score_of_choice(P, distances, target):
    """
    The energy score of a choice among V points c_i in closed form: P (..., V), distances (V, V) of |c_i - c_j|^alpha, target (...)
    int, the point that was observed  ->  (...). What `energy_head.energy_score` estimates from draws, here without any.
    With all distances equal to 1 it is 2 P(y) - sum_i P(i)^2 - 1: the Brier score, less 1.
    """
    with torch.autocast(P.device.type, enabled=False):  # bfloat16 is too coarse for the difference of two distances
        P = P.float() if P.dtype == torch.bfloat16 else P
        fidelity = (P * distances[target]).sum(-1)  # E |c_i - c_y|^alpha
        diversity = ((P @ distances) * P).sum(-1)  # E |c_i - c_j|^alpha
    return diversity - 2 * fidelity


class ChoiceBlock(nn.Module):
    """The probabilities of one choice among V: softmax(MLP([LayerNorm(x), c])), x (..., d), which may have more leading dimensions than c (..., d)  ->  (..., V)."""

    def __init__(self, d, vocab_size):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.linear_in, self.logits = nn.Linear(2 * d, WIDER * d), nn.Linear(WIDER * d, vocab_size)
        self.embedding = nn.Embedding(vocab_size, d)  # what a choice tells the blocks after it; std 1, torch's default

    def forward(self, x, c):
        return self.logits(F.silu(linear_of_both(self.linear_in, self.norm(x), c))).softmax(-1)


class ChoiceHead(nn.Module):
    """
    A sampler of vectors, like `EnergyHead`, each the sum of what K choices added:

        z = origin + codes[1, i_1] + ... + codes[K, i_K],     i_k ~ P_k = softmax(MLP_k([x_k, c])),     x_{k+1} = x_k + embedding_k[i_k],     x_1 = c = a map of h

    codes[k, v] is what token v at place k adds to the latent of a chunk. The autoencoder is not made to be such a sum, but nearly is
    one: see `start_from`, and `accuracy_of_codes`, which measures it.
    """

    def __init__(self, hidden_size, latent_size, chunk_size, vocab_size):
        super().__init__()
        d = hidden_size
        self.hidden_in, self.hidden_norm = nn.Linear(d, d), nn.LayerNorm(d, eps=NORM_EPS)
        self.blocks = nn.ModuleList(ChoiceBlock(d, vocab_size) for _ in range(chunk_size))
        self.blocks[-1].embedding.requires_grad_(False)  # nothing follows the last choice
        self.register_buffer("origin", torch.zeros(latent_size))
        self.register_buffer("codes", torch.zeros(chunk_size, vocab_size, latent_size))
        init_linear_maps(self)

    @torch.no_grad()
    def start_from(self, autoencoder, chunks, n=64):
        """
        Takes the codes from a trained autoencoder and chunks of the training text, (many, K) int: codes[k, v] is how far the
        mean latent of n of them moves when their token k is replaced by v. Every choice begins with the tokens' frequencies.
        """
        few, V = chunks[:n], self.codes.shape[1]
        self.origin.copy_(autoencoder.encode(few)[0].mean(0))
        for k, codes in enumerate(self.codes.zero_()):  # views: += and -= write into self.codes
            for chunk in few:
                changed = chunk.repeat(V, 1)
                changed[:, k] = torch.arange(V, device=chunk.device)
                codes += autoencoder.encode(changed)[0] / len(few)
            codes -= self.origin
        counts = torch.bincount(chunks.flatten(), minlength=V) + 1  # + 1: no token is impossible
        for block in self.blocks:
            block.logits.bias.copy_((counts / counts.sum()).log())
            nn.init.zeros_(block.logits.weight)

    def loss(self, hidden, tokens, alpha=0.5):
        """
        Minus the energy scores of the K choices, summed, their mean over positions: hidden (..., d), tokens (..., K) int -> a
        scalar. Two values of one choice, all else equal, give latents that differ as their codes do: distances of codes are
        distances of z. alpha: any in (0, 2) is proper, and 1/2 does a little better here than the paper's 1.
        """
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would take near codes for equal
            distances = [pairwise_distances(codes, alpha) for codes in self.codes]
        x = c = self.hidden_norm(self.hidden_in(hidden))
        loss = 0
        for block, distance, token in zip(self.blocks, distances, tokens.unbind(-1)):
            loss = loss - energy_score_of_choice(block(x, c), distance, token).mean()
            x = x + block.embedding(token)  # teacher forcing: the next choice is told what the text has, not what was drawn
        return loss

    def sample(self, hidden, n, generator=None):
        """n independent draws for each hidden state: (..., d) -> (n, ..., l)."""
        x = c = self.hidden_norm(self.hidden_in(hidden))
        z = self.origin
        for k, (block, codes) in enumerate(zip(self.blocks, self.codes)):
            P = block(x, c)  # (..., V) for the first choice, which nothing precedes, then (n, ..., V)
            choice = draw_categorical(P, 1, generator)[0] if k else draw_categorical(P, n, generator)
            x, z = x + block.embedding(choice), z + codes[choice]
        return z


class ChoiceCALM(CALM):
    """CALM with a `ChoiceHead`. In evaluation mode its loss is the paper's, so that heads can be compared."""

    def __init__(self, config, autoencoder):
        super().__init__(config, autoencoder)
        # In place of the energy head. Of the config, n_samples, n_targets and alpha are for evaluation alone.
        self.head = ChoiceHead(config.hidden_size, config.latent_size, config.chunk_size, config.vocab_size)

    def forward(self, tokens):
        """tokens (B, T)  ->  loss (a scalar), metrics (floats: fidelity, diversity in evaluation mode)."""
        if not self.training:
            return super().forward(tokens)
        hidden = self.hidden_states(tokens[:, : -self.config.chunk_size])
        return self.head.loss(hidden, self.chunks(tokens)[:, 1:]), {}

    def flops_per_token(self, draws=1):
        """As `calm.flops_per_token`. Not counted: the distances between codes, which are the same for all positions of a step."""
        c, a = self.config, self.autoencoder.config
        K, d, V = c.chunk_size, c.hidden_size, c.vocab_size
        once = 4 * (K + 1) * d * d + backbone_flops(c) + 2 * d * d  # compression, Transformer, the head's map of h
        choice = WIDER * (2 * d * d + 2 * d * V)  # a block's map of x, and its logits; its map of c needs h alone
        training = 3 * (once + K * (WIDER * 2 * d * d + choice)) + 2 * K * 2 * V * V  # P times the distances, which need no gradient
        inference = once + K * WIDER * 2 * d * d + choice + draws * ((K - 1) * choice + autoencoder_flops(a)[1])  # all draws share the first P
        return training * (c.context // K - 1) / c.context, inference / K


@torch.no_grad()
def accuracy_of_codes(head, autoencoder, chunks):
    """The share of the tokens of chunks (n, K) that the decoder recovers from origin + the sum of their codes."""
    z = head.origin + sum(codes[token] for codes, token in zip(head.codes, chunks.unbind(-1)))
    return (autoencoder.decode_tokens(z) == chunks).float().mean().item()


def build_calm(recipe, config, autoencoder, chunks):
    """The untrained CALM of that recipe, on the autoencoder's device; chunks (many, K) int: some of the training text, for `choices`."""
    device = next(autoencoder.parameters()).device
    model = (ChoiceCALM if recipe == "choices" else CALM)(config, autoencoder).to(device)
    if recipe == "choices":
        model.head.start_from(autoencoder, chunks.to(device))
        accuracy = accuracy_of_codes(model.head, autoencoder, chunks.to(device))
        print(f"choices: {accuracy:.2%} of the text's tokens are recovered from sums of codes, one for each token")
    if recipe == "released":
        for name, p in model.named_parameters():  # but for what starts at 0, and the autoencoder, which is trained already
            if p.requires_grad and p.dim() == 2 and name != "head.final_out.weight":
                nn.init.normal_(p, std=0.02)
    return model
