"""What the experiments with other heads share: choices.py and parts.py train CALM with a head of
their own, on the autoencoder of a run. The five files of the project do not know them.

A head is a module with three methods:

    start_from(autoencoder, chunks)       before training: chunks of text, (many, K) int -> a float,
                                          the share of their tokens that its vectors can express
    loss(hidden, chunks, autoencoder)     hidden (..., d), the text's next chunks (..., K) -> scalar
    sample(hidden, n, generator)          n draws of the next vector: (..., d) -> (n, ..., l)
"""

import argparse
import sys
from pathlib import Path

import tiktoken
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
import train  # noqa: E402
from calm import CALM, CALMConfig  # noqa: E402


@torch.no_grad()
def mean_vectors(autoencoder, chunks):
    """For each place k and each token v the mean vector of the chunks (n, K) whose token k is made
    v: (K, V, l).
    """
    result = []
    for k in range(autoencoder.config.chunk_size):
        for v in range(autoencoder.config.vocab_size):
            changed = chunks.clone()
            changed[:, k] = v
            result.append(autoencoder.encode(changed)[0].mean(0))
    return torch.stack(result).unflatten(0, (-1, autoencoder.config.vocab_size))


class HeadCALM(CALM):
    """CALM with another head. In evaluation its loss is the paper's, so that heads compare."""

    def __init__(self, config, autoencoder, head):
        super().__init__(config, autoencoder)
        self.head = head

    def forward(self, tokens):
        """tokens (B, T) -> loss, metrics: scalars."""
        if not self.training:
            return super().forward(tokens)
        K = self.config.chunk_size
        hidden = self.hidden_states(tokens[:, :-K])  # (B, L-1, d)
        chunks = tokens.unflatten(1, (-1, K))  # (B, L, K)
        return self.head.loss(hidden, chunks[:, 1:], self.autoencoder), {}


def load(out_dir, kind, head):
    """The model in {kind}.pt, whose head is of the class `head`, for evaluation, and its tokenizer:
    like `sample.load_model`.
    """
    saved = sample.load_checkpoint(out_dir, kind)
    config = CALMConfig(**saved["configs"][kind])
    autoencoder = sample.build_model("autoencoder", saved["configs"])
    model = HeadCALM(config, autoencoder, head(config))
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
    changed = {"resume": False, "lr": 3e-3, "compile": False, "dtype": "float32"}
    changed["device"] = sample.pick_device("auto")
    changed["steps"] = round(settings["steps"] * share_of_steps)
    args = argparse.Namespace(**settings | changed | vars(folders))
    there = any(Path(args.out_dir).glob("*.pt"))
    sample.check(not there, f"{args.out_dir} holds a trained model: name another --out_dir")
    Path(args.out_dir).mkdir(parents=True, exist_ok=True)
    data = train.load_tokens(args)

    calm, log = train.new_model("calm", args, data)
    model = HeadCALM(calm.config, calm.autoencoder.eval(), head(calm.config))
    chunks = train.random_windows(data.train, 20_000, args.chunk_size)
    share = model.head.start_from(model.autoencoder, chunks)
    print(f"vectors of this head can express {share:.2%} of the tokens")
    train.PURPOSES[kind] = "which is CALM with another head"
    log = train.train(kind, model, args, data, log)
    train.finish(kind, model, args, data, log)
