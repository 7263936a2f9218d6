"""The classroom's tools: texts of any size, the head of choices, words."""

import itertools
import lzma
import sys
from argparse import Namespace
from collections import Counter

import pytest
import regex
import torch
from conftest import SEEDS, chi_square_p, tiny_calm

import sample
import train
from calm import CALM
from classroom import prepare, words
from classroom.choices import ALPHA, ChoiceCALM, energy_score_of_choice

TEXT = "low lower lowest slow slower, blow! The show below: 123 1234 élan élan\n\n  lows aaaaa" * 3


def test_byte_pair_encoding_is_the_naive_algorithm():
    pieces = regex.findall(sample.PATTERN, TEXT)
    ranks = {bytes([b]): b for b in range(256)}
    parts = [[bytes([b]) for b in piece.encode()] for piece in pieces]
    while len(ranks) < 290:  # all pairs counted anew; among equal counts the first in order
        counts = Counter(pair for part in parts for pair in zip(part, part[1:]))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        ranks.setdefault(pair[0] + pair[1], len(ranks))
        for part in parts:
            for i in range(len(part) - 1):
                if tuple(part[i : i + 2]) == pair:
                    part[i : i + 2] = [pair[0] + pair[1]]
    assert prepare.train_bpe(Counter(pieces), 290) == ranks
    assert len(prepare.train_bpe({"abcdefg": 1}, 1000)) == 256, "no pair occurs twice"


@pytest.mark.parametrize("vocab_size, several", [(256, True), (270, True), (256, False)])
def test_prepare_writes_what_train_reads(vocab_size, several, tmp_path, monkeypatch, command):
    end, source, folder = "<|endoftext|>", tmp_path / "texts", tmp_path / "tokens"
    texts = [f"{i} {TEXT}" for i in range(18 if several else 1)]
    source.mkdir()
    (source / "a.txt").write_text(end.join(texts[:10]) + end + " \n")  # the last is no document
    (source / "b.txt.xz").write_bytes(lzma.compress(end.join(texts[10:]).encode()))
    monkeypatch.setattr(prepare, "BLOCK", 11)  # marks and letters of two bytes are cut in two
    flags = ["--vocab_size", str(vocab_size), "--held_out", "0.1"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", str(source), str(folder), *flags])
    prepare.main()
    *tokens, encoding, about = train.load_tokens(Namespace(data=folder, out_dir="", tokenizer=""))
    assert encoding.n_vocab == vocab_size + 1 and about["tokens"] == sum(map(len, tokens))
    assert about["characters"] == sum(map(len, texts)) and not [*folder.glob("*.part")]
    found = [encoding.decode(part.tolist()) for part in tokens]
    if several:  # whole documents are held out, an end-of-text token behind each
        parts = [[t + end for i, t in enumerate(texts) if (i in (5, 15)) == out] for out in (0, 1)]
        assert found == ["".join(part) for part in parts]
    else:
        assert "".join(found) == texts[0] + end and len(tokens[1]) == sum(map(len, tokens)) // 10
    (source / "c.xz").write_bytes(lzma.compress(TEXT.encode())[:-30])
    assert "damaged" in command(prepare.main, source, folder)


def test_the_closed_form_is_the_sum_over_all_pairs():
    P, points, target = torch.rand(6, 5).softmax(-1), torch.randn(5, 4), torch.randint(5, (6,))
    D = torch.cdist(points, points) ** 0.7
    diversity = sum(P[:, i] * P[:, j] * D[i, j] for i in range(5) for j in range(5))
    fidelity = sum(P[:, i] * D[i, target] for i in range(5))
    torch.testing.assert_close(energy_score_of_choice(P, D, target), diversity - 2 * fidelity)
    brier = 2 * P[range(6), target] - P.square().sum(-1)  # with equal distances, less 1
    torch.testing.assert_close(energy_score_of_choice(P, 1 - torch.eye(5), target), brier - 1)


def choice_calm(seed=0):  # all numbers of its head are random: no term hides behind a zero
    base = tiny_calm(chunk_size=3, vocab_size=5, context=24, seed=seed)
    model = ChoiceCALM(base.config, base.autoencoder)
    for tensor in model.head.state_dict().values():
        tensor.normal_(std=0.5)
    return model


def plain_P(head, h, chosen):
    """P of the choice after the choices `chosen`, for one hidden state (d,)."""
    x = head.hidden(h) + sum(c.embedding.weight[i] for c, i in zip(head.choices, chosen))
    choice = head.choices[len(chosen)]
    return choice.mlp(torch.cat([choice.norm(x), head.hidden(h)])).softmax(-1)


def test_the_loss_is_that_of_each_choice_after_those_of_the_text():
    model, tokens, expected = choice_calm(), torch.randint(5, (1, 9)), 0
    hidden = model.hidden_states(tokens)[0]
    for h, chunk in zip(hidden[:-1], tokens.view(3, 3)[1:]):  # a state predicts the next chunk
        for k, codes in enumerate(model.head.codes):
            D, P = (codes[:, None] - codes).norm(dim=-1) ** ALPHA, plain_P(model.head, h, chunk[:k])
            expected -= energy_score_of_choice(P, D, chunk[k]) / 2
    torch.testing.assert_close(model.train()(tokens)[0], expected)
    torch.manual_seed(0)
    loss = model.eval()(tokens)[0]
    torch.manual_seed(0)
    assert loss == CALM.forward(model, tokens)[0], "in evaluation: the paper's"


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
def test_draws_follow_the_chain_rule(seed):
    """H0: P(i_1, i_2, i_3) = P(i_1) P(i_2 | i_1) P(i_3 | i_1, i_2). 20 000 draws; p > 1e-4."""
    head, hidden = choice_calm(seed).head, torch.randn(2, 16)
    chunks = torch.tensor(list(itertools.product(range(5), repeat=3)))
    for h, z in zip(hidden, head.sample(hidden, 20_000).unbind(1)):
        distance, which = torch.cdist(z, head.sums(chunks)).min(-1)
        assert distance.max() < 1e-2, "a draw is no sum of codes"
        P = torch.stack([plain_P(head, h, c[:k])[c[k]] for c in chunks for k in range(3)])
        expected, observed = 20_000 * P.view(-1, 3).prod(-1), which.bincount(minlength=125)
        often = expected >= 5  # the test wants that: the rare ones are left out
        scale = observed[often].sum() / expected[often].sum()
        assert chi_square_p(observed[often], scale * expected[often]) > 1e-4


def test_codes_say_how_far_a_token_moves_the_vector():
    model, parts, chunks = choice_calm(), torch.randn(3, 5, 8), torch.randint(4, (70, 3))
    model.autoencoder.encode = lambda x: (1 + sum(parts[k, x[:, k]] for k in range(3)), None)
    model.head.start_from(model.autoencoder, chunks)
    torch.testing.assert_close(model.head.sums(chunks), model.autoencoder.encode(chunks)[0])
    P, x = (torch.bincount(chunks.flatten(), minlength=5) + 1) / 215, torch.randn(16)
    torch.testing.assert_close(model.head.choices[1](x, x), P)


def test_words_are_two_letters_or_more_and_whole():
    assert words.words_of("The cat's a fée, 3abc-de\nend") == ["The", "cat", "fée", "abc", "de"]
    assert words.share_of_words(["The cat ", "tho cat ca"], {"The", "cat"}) == (3 / 4, 4)
