"""The classroom's tools: texts of any size, other heads, words, the bottle."""

import lzma
from argparse import Namespace
from collections import Counter

import pytest
import regex
import torch
from conftest import chi_square_p, run_in, sample, tiny_calm
from test_train import END, texts_of

from calm import CALMConfig, TransformerLM, prefix_matches
from classroom import bottle, compare, exercise_9, parts, prepare, temperature, words
from classroom.choices import ALPHA, ChoiceHead, energy_score_of_choice
from classroom.heads import HeadCALM

TEXT = "low lower lowest slow slower, blow! The show below: 123 1234 élan élan\n\n  lows aaaaa" * 3


def test_byte_pair_encoding_is_the_naive_algorithm():
    pieces = TEXT.split() + [f"{i**3:b}" for i in range(60)]  # long runs of 0 and 1
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


@pytest.mark.parametrize("vocab_size", [256, 270])
def test_prepare_writes_what_train_reads(vocab_size, tmp_path, monkeypatch, command):
    """Whole documents are held out, with an end-of-text token behind each."""
    texts = [f"{i} {TEXT}" for i in range(18)]
    (tmp_path / "a.txt").write_text(END + END.join(texts[:10]) + END + " \n")  # two are blank
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(END.join(texts[10:]).encode()))
    monkeypatch.setattr(prepare, "BLOCK", 11)  # marks and letters of two bytes are cut in two
    arguments = [tmp_path, tmp_path / "tokens", "--vocab_size", vocab_size]
    run_in(tmp_path, prepare.main, *arguments)
    data, found = texts_of(tmp_path / "tokens")
    pieces = Counter(p for text in texts for p in regex.findall(sample.PATTERN, text))
    assert data.encoding._mergeable_ranks == prepare.train_bpe(pieces, vocab_size)
    assert data.about["tokens"] == sum(map(len, (data.train, data.validation, data.test)))
    assert data.about["characters"] == sum(map(len, texts))
    held_out = [part.removesuffix(END) for part in found[1:]]
    assert found[0] == "".join(text + END for text in texts if text not in held_out)
    assert set(held_out) < set(texts) and held_out[0] != held_out[1]
    (tmp_path / "c.xz").write_bytes(lzma.compress(TEXT.encode())[:-30])
    assert "damaged" in command(prepare.main, *arguments)


@pytest.mark.parametrize("sizes, whole", [
    ([10] * 40, True), ([10] * 20, True), ([1000, 1], False), ([1, 1000], False), ([1000], False),
    ([1, 1], False), ([100] * 5 + [1], False), ([1000, 10] + [1000] * 7, False),
])  # fmt: skip
def test_about_the_share_is_held_out_or_the_end_of_each_document(sizes, whole):
    """A long document and a tiny one: the tiny one alone would be too little."""
    chosen = prepare.choose_held_out(sizes, 0.05)
    assert (chosen is not None) == whole
    for documents in chosen or ():
        assert 0.025 < sum(sizes[i] for i in documents) / sum(sizes) < 0.1


def test_the_ends_of_uneven_documents_are_held_out(tmp_path):
    """1 001 tokens are cut at 801 and 901, 10 at 8 and 9. A byte order mark is no text."""
    digits = "0123456789" * 100
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a").write_text(digits, encoding="utf-8-sig")
    (tmp_path / "texts/b").write_text("abcdefghi")
    run_in(tmp_path, prepare.main, "texts", "tokens", "--held_out", 0.1)
    data, found = texts_of(tmp_path / "tokens")
    assert found == [digits[:801] + "abcdefgh", digits[801:901] + "i", digits[901:] + END + END]
    assert data.about["characters"] == 1009


def test_scores_of_zero_are_a_picture_too(tmp_path):
    rows = [{"val_loss": 5.0 - i, "brier_lm": 0.0} for i in range(3)]
    compare.draw_scores(tmp_path / "scores.png", {"Transformer-S": rows})
    assert (tmp_path / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_the_closed_form_is_the_sum_over_all_pairs():
    P, points, target = torch.rand(6, 5).softmax(-1), torch.randn(5, 4), torch.randint(5, (6,))
    D = torch.cdist(points, points) ** 0.7
    expected = torch.einsum("ni,nj,ij->n", P, P, D) - 2 * torch.einsum("ni,in->n", P, D[:, target])
    torch.testing.assert_close(energy_score_of_choice(P, D, target), expected)
    brier = 2 * P[range(6), target] - P.square().sum(-1)  # with equal distances, less 1
    torch.testing.assert_close(energy_score_of_choice(P, 1 - torch.eye(5), target), brier - 1)


def random_head(kind, K=3):
    """A CALM with a head of this class, all of whose numbers are random: no term hides behind a 0.
    And a text of three chunks.
    """
    base = tiny_calm(K, vocab_size=5, context=24)
    model = HeadCALM(base.config, base.autoencoder, kind)
    for tensor in model.head.state_dict().values():
        tensor.normal_(std=0.3)
    return model, torch.randint(5, (1, 3 * K))


def test_the_loss_is_that_of_each_choice_after_those_of_the_text():
    (model, tokens), expected = random_head(ChoiceHead), 0
    hidden = model.hidden_states(tokens)[0, :2]
    for h, chunk in zip(hidden, tokens.view(3, 3)[1:]):  # a state predicts the next chunk
        x = c = model.head.hidden(h)
        for choice, codes, token in zip(model.head.choices, model.head.codes, chunk):
            P = choice.mlp(torch.cat([choice.norm(x), c])).softmax(-1)
            D = (codes[:, None] - codes).norm(dim=-1) ** ALPHA
            expected -= energy_score_of_choice(P, D, token) / 2
            x = x + choice.embedding.weight[token]
    torch.testing.assert_close(model.train()(tokens)[0], expected)
    assert "fidelity" in model.eval()(tokens)[1], "in evaluation the loss is CALM's"


def test_the_score_of_a_die_is_the_sum_over_all_pairs_of_rolls():
    sides, target = torch.randn(6, 5, 3), torch.randn(6, 3)
    expected = []
    for x, y in zip(sides, target):
        pairs = [(a - b).norm() for a in x for b in x]  # 25 of them, also a side with itself
        expected.append(sum(pairs) / 25 - 2 * sum((a - y).norm() for a in x) / 5)
    torch.testing.assert_close(parts.score_of_die(sides, target), torch.stack(expected))
    same = torch.zeros(1, 4, 3, requires_grad=True)  # all sides on the target
    parts.score_of_die(same, torch.zeros(1, 3)).backward()
    assert same.grad.isfinite().all()


def test_the_loss_is_that_of_each_die_after_the_tokens_of_the_text():
    (model, tokens), expected = random_head(parts.PartsHead, K=4), 0
    head, chunks = model.head, tokens.view(3, 4)[1:]
    torch.manual_seed(3)
    loss = model.train()(tokens)[0]
    mean, log_std = model.autoencoder.encode(chunks[None])
    torch.manual_seed(3)  # the same draw from the posterior
    z = (mean + log_std.exp() * torch.randn_like(mean))[0]
    for h, part, chunk in zip(model.hidden_states(tokens)[0], z @ head.basis, chunks):
        x = c = head.hidden(h)
        for die, target, token in zip(head.dice, part.view(4, -1), chunk):
            sides = die.mlp(torch.cat([die.norm(x), c])).view(32, -1)
            expected -= parts.score_of_die(sides, target) / 2
            x = x + die.embedding.weight[token]
    torch.testing.assert_close(loss, expected)


@torch.no_grad()
def test_all_sides_are_equally_likely_and_the_next_die_knows_the_token():
    """H0: 40 000 draws are evenly spread over the 32 sides of the first die and, for each, the 32
    sides that the second has after the token whose code is nearest; chi-square over 1 024 pairs,
    p > 1e-4, seed 0.
    """
    head = random_head(parts.PartsHead, K=2)[0].head
    head.basis.copy_(torch.linalg.qr(head.basis)[0])
    h = torch.randn(1, head.hidden[0].in_features)
    x = c = head.hidden(h)
    first = head.dice[0](x, c).view(32, -1)  # (32, l/2)
    tokens = (first[:, None] - head.codes[0]).square().sum(-1).argmin(-1)  # (32,)
    assert len(tokens.unique()) > 1
    after = head.dice[1](x + head.dice[0].embedding.weight[tokens], c.expand(32, -1))
    after = after.view(32, 32, -1)  # (32, 32, l/2): for each first side
    possible = torch.cat([first[:, None].expand_as(after), after], dim=-1) @ head.basis.T
    distances = torch.cdist(head.sample(h, 40_000)[:, 0], possible.flatten(0, 1))
    assert distances.amin(1).max() < 0.01  # but for rounding
    observed = distances.argmin(1).bincount(minlength=1024)
    assert chi_square_p(observed, torch.full((1024,), 40_000 / 1024)) > 1e-4


def test_words_are_two_letters_or_more_and_whole():
    assert words.words_of("The cat's a fée, 3abc-de\nend") == ["The", "cat", "fée", "abc", "de"]
    assert words.share_of_words(["The cat ", "tho cat ca"], {"The", "cat"}) == (3 / 4, 2 / 3, 4)


def test_the_bottle_scores_draws_by_all_pairs():
    """The best score is how often two of the text's chunks agree. All pairs of places count, also a
    place with itself: that is sum_x P(x)^2. Of draws only different ones are a pair.
    """
    known = bottle.Bottle(torch.randint(3, (2000,)).numpy(), n_contexts=5)
    draws, best, score = torch.randint(3, (5, 6, 4)), [], []
    for chunks, drawn in zip(known.chunks, draws):
        best.append(prefix_matches(chunks[:, None], chunks).mean((0, 1)))
        hits = prefix_matches(drawn[:, None], chunks).mean((0, 1))
        equal = (prefix_matches(drawn[:, None], drawn).sum((0, 1)) - 6) / (6 * 5)
        score.append(2 * hits - equal)
    torch.testing.assert_close(known.best(), torch.stack(best).mean(0))
    torch.testing.assert_close(known.brier(draws).float(), torch.stack(score).mean(0))


def test_the_parts_of_a_latent_are_a_basis_in_which_the_tokens_stand_side_by_side():
    """An autoencoder whose vector is a sum of what its tokens add, in directions that are mixed."""

    class Sum:
        config = Namespace(latent_size=8, chunk_size=4)
        mix = torch.linalg.qr(torch.randn(8, 8))[0]

        def encode(self, chunks):
            parts = torch.nn.functional.one_hot(chunks, 3)[..., :2].float()  # (n, K, 2)
            return parts.flatten(1) @ self.mix, None

    basis = parts.parts_of_latent(Sum(), torch.randint(3, (500, 4)))
    torch.testing.assert_close(basis.T @ basis, torch.eye(8), atol=1e-5, rtol=0)
    overlap = (Sum.mix @ basis).view(4, 2, 4, 2).square().sum((1, 3)) / 2
    torch.testing.assert_close(overlap, torch.eye(4), atol=1e-4, rtol=0)


def test_teacher_forcing_gives_each_head_the_texts_earlier_parts_and_noise():
    base = tiny_calm(vocab_size=3).autoencoder
    head = bottle.HeadByParts(base, Namespace(chunks=[torch.randint(3, (200, 4))]))
    h, true = torch.randn(1000, bottle.WIDTH), torch.randn(1000, 8)
    expected = [h, *(h + earlier(true[:, : earlier.in_features]) for earlier in head.earlier)]
    torch.testing.assert_close(list(head.teacher_forcing(h, true, noise=0.0)), expected)
    head.given = lambda h, parts: parts
    noise = head.teacher_forcing(h, true)[3] - true[:, :6]
    assert abs(noise.std().item() - 0.3) < 4.5 * 0.3 / 12_000**0.5


def test_the_test_of_exercise_9_knows_the_unbiased_diversity_each_time():
    names = ("divided_by_n_squared", "clamp_counted", "power_after_the_mean")
    for name in ("fidelity_and_diversity", *names):
        function = getattr(exercise_9, name)
        answers = {exercise_9.diversity_is_unbiased(function) for _ in range(20)}
        assert answers == {name == "fidelity_and_diversity"}, name


class Pairs(torch.nn.Module):
    """A head whose gradient is known: how often the first two tokens are each of four pairs."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 2))

    def loss(self, h, chunks, autoencoder):
        return self.weight[chunks[:, 0], chunks[:, 1]].mean() + 0 * h.sum()


@pytest.mark.parametrize("same", [0.9, 0.5])
def test_the_signal_is_what_the_dependence_adds_beside_the_noise_of_a_batch(same):
    """Two tokens agree with probability 0.9: each pair is 0.2 more or less frequent than if they
    were independent. The four differences have the length 0.4; of 1 024 examples the noise has
    (sum of p (1 - p) / 1 024)^(1/2). H0: the estimate from 64 batches is within 25 %, four standard
    errors of the noise's length, and 0 if nothing depends; seed 0.
    """
    first = torch.randint(2, (40_000,))
    second = torch.where(torch.rand(40_000) < same, first, 1 - first)
    bottle_of_pairs = object.__new__(bottle.Bottle)
    bottle_of_pairs.chunks = [torch.stack([first, second, first, first], dim=1)]
    p = torch.tensor([same / 2, same / 2, (1 - same) / 2, (1 - same) / 2])
    noise = ((p * (1 - p)).sum() / bottle.EXAMPLES).sqrt()
    expected = ((p - 0.25) ** 2).sum().sqrt() / noise
    found = bottle.signal(Pairs(), torch.nn.Embedding(1, 1), bottle_of_pairs, None, n=64)
    assert found == pytest.approx(expected.item(), rel=0.25, abs=0.2)


@torch.no_grad()
def test_continuations_by_chunks_have_the_probabilities_of_token_by_token():
    """H0: 20 000 pairs of tokens have P(first) P(second | first), from two passes over the whole
    text; chi-square over 16 pairs, p > 1e-4, seed 0.
    """
    model = TransformerLM(CALMConfig(4, 1, 8, 16, 32, 2, 2, context=32)).eval()
    text = torch.randint(4, (1, 6))
    P = lambda tokens: model.unembedding(model.hidden_states(tokens)[:, -1]).softmax(-1)
    longer = torch.cat([text.expand(4, -1), torch.arange(4)[:, None]], dim=1)  # (4, 7)
    expected = P(text).T * P(longer)  # (4, 4): the first token, the second
    pairs = temperature.by_chunks(model, text, 2, 20_000) @ torch.tensor([4, 1])
    observed = pairs.bincount(minlength=16)
    assert chi_square_p(observed, 20_000 * expected.flatten()) > 1e-4
