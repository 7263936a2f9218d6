"""What the experiments with other heads share: choices.py and parts.py train CALM with a head of
their own, on the autoencoder of a run. The five files of the project do not know them.

Both draw a vector token by token: a first network draws what token 1 adds to it, a second what
token 2 adds, given token 1, and so on. In training the given tokens are the text's, not drawn ones
("teacher forcing"). So every position teaches how token 2 depends on token 1; with one score for
the whole vector, only draws that have token 1 right would teach it.

A head is a module with three methods:

    start_from(autoencoder, chunks)       before training: chunks of text, (many, K) int -> a float,
                                          the share of tokens that can be read in the head's terms
    loss(hidden, chunks, autoencoder)     hidden (..., d), the text's next chunks (..., K) -> scalar
    sample(hidden, n, generator)          n draws of the next vector: (..., d) -> (n, ..., l)

Letters: those of autoencoder.py.
"""

import argparse
import sys
from pathlib import Path

import tiktoken
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
import train  # noqa: E402
from autoencoder import NORM_EPS  # noqa: E402
from calm import CALM, CALMConfig  # noqa: E402


class TokenNetwork(nn.Module):
    """The network for one place in a chunk, and what the networks after it are told of its token.

    MLP([LayerNorm(x), c]): x, c (..., d) -> (..., n_outputs). c is a map of the hidden state. x is
    c plus the embeddings of the tokens before.
    """

    def __init__(self, d, n_outputs, vocab_size):
        super().__init__()
        self.norm = nn.LayerNorm(d, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(2 * d, 3 * d), nn.SiLU(), nn.Linear(3 * d, n_outputs))
        self.embedding = nn.Embedding(vocab_size, d)

    def forward(self, x, c):
        return self.mlp(torch.cat([self.norm(x), c], dim=-1))


@torch.no_grad()
def mean_vectors(autoencoder, chunks):
    """(K, V, l): at [k, v], the mean vector of the chunks (n, K) after token k of each is replaced
    by v. (For one place, the encoder reads all V · n of them at once.)
    """
    V = autoencoder.config.vocab_size
    result = []
    for k in range(autoencoder.config.chunk_size):
        changed = chunks.repeat(V, 1, 1)  # (V, n, K)
        changed[:, :, k] = torch.arange(V).unsqueeze(1)
        result.append(autoencoder.encode(changed)[0].mean(1))  # (V, l)
    return torch.stack(result)


class HeadCALM(CALM):
    """CALM with a head of another class. In evaluation its loss is the paper's, with the paper's
    distances, so that heads can be compared by it. (Their losses in training cannot.)
    """

    def __init__(self, config, autoencoder, head):
        super().__init__(config, autoencoder)
        self.head = head(config)

    def forward(self, tokens):
        """tokens (B, T) -> loss, metrics: scalars."""
        if not self.training:
            return super().forward(tokens)
        K = self.config.chunk_size
        hidden = self.hidden_states(tokens[:, :-K])  # (B, L-1, d)
        chunks = tokens.unflatten(1, (-1, K))  # (B, L, K), with L = T / K
        return self.head.loss(hidden, chunks[:, 1:], self.autoencoder), {}


def load(out_dir, kind, head):
    """The model in {kind}.pt, whose head is of the class `head`, for evaluation, and its tokenizer:
    like `sample.load_model`.
    """
    saved = sample.load_checkpoint(out_dir, kind)
    config = CALMConfig(**saved["configs"][kind])
    autoencoder = sample.build_model("autoencoder", saved["configs"])
    model = HeadCALM(config, autoencoder, head)
    model.load_state_dict(saved["weights"])
    return model.eval(), tiktoken.Encoding("saved", **saved["tokenizer"])


def main(kind, head, share_of_steps):
    """The command of choices.py or parts.py: trains CALM with a head of this class, and leaves
    {kind}.pt and the other files of a run. It takes a share of the steps that the autoencoder's run
    takes for CALM, so that the two take about as long.
    """
    parser = argparse.ArgumentParser(description="Train CALM with another head.")
    parser.add_argument("--autoencoder", default="out/quick", help="the run that has trained it")
    parser.add_argument("--out_dir", default=f"out/{kind}", help="where all that it writes goes")
    folders = parser.parse_args()
    settings = sample.load_checkpoint(folders.autoencoder, "autoencoder")["settings"]
    # Scores of dice and choices are differences of close numbers: float32. They learn well with a
    # learning rate of 3e-3, above that of the paper's head.
    changed = {"resume": False, "lr": 3e-3, "compile": False, "dtype": "float32"}
    changed["device"] = sample.pick_device("auto")
    changed["steps"] = round(settings["steps"] * share_of_steps)
    args = argparse.Namespace(**settings | changed | vars(folders))
    there = any(Path(args.out_dir).glob("*.pt"))
    sample.check(not there, f"{args.out_dir} holds a trained model: name another --out_dir")
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    data = train.load_tokens(args)

    calm, log = train.new_model("calm", args, data)
    model = HeadCALM(calm.config, calm.autoencoder.eval(), head)
    chunks = train.random_windows(data.train, 20_000, args.chunk_size)
    share = model.head.start_from(model.autoencoder, chunks)
    print(f"before training, {share:.2%} of the tokens can be read in the terms of this head")
    train.PURPOSES[kind] = "which is CALM with another head"
    log = train.train(kind, model, args, data, log)
    train.finish(kind, model, args, data, log)
