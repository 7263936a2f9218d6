"""Temperature, generation and tokenizers."""

import base64
import io
import itertools
import math
import sys

import pytest
import torch
from conftest import SEEDS, chi_square_p, tiny_calm

import sample
from calm import CALMConfig, TransformerLM
from sample import generate, temperature_sample_batch, temperature_sample_exact

MANY = [0.5, 0.0, *[0.05] * 10]  # eleven outcomes, and one that cannot be


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", [1, 0.75, 1 / 2, 0.4, 1 / 3])
@pytest.mark.parametrize("P", [[0.7, 0.3], MANY])
def test_the_exact_sampler_is_exact_and_its_factory_without_bias(P, temperature, seed):
    """H0: the answers have the distribution P^(1/T) / Z. 500 of them, chi-square, p > 1e-4. The
    tempting mistake, a in place of a/i in the factory, has p < 1e-6 with MANY at T = 0.75.
    """
    torch.manual_seed(seed)
    P = torch.tensor(P).double()
    draw = lambda m: P.multinomial(m, replacement=True).unsqueeze(-1)  # (m, 1)
    answers = torch.cat([temperature_sample_exact(draw, temperature) for _ in range(500)])
    sharpened = P ** (1 / temperature)
    counts = answers.bincount(minlength=len(P))
    assert chi_square_p(counts, 500 * sharpened / sharpened.sum()) > 1e-4


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p, a", [(0.7, 0.5), (0.3, 1 / 3), (0.2, 0.9), (0.01, 0.2)])
def test_the_factory_accepts_with_p_to_the_a_after_p_to_the_a_minus_1_draws(p, a, seed):
    """H0 for 4 000 runs: a share p^a accepts (chi-square, p > 1e-4); the mean number of draws is
    p^(a-1), within 3.9 standard errors.
    """
    torch.manual_seed(seed)
    hits, accepted, used = iter((torch.rand(300_000) < p).long()), 0, []
    for _ in range(4000):
        count = itertools.count()
        accepted += sample.bernoulli_factory((next(hits) for _ in count), torch.tensor(1), a)
        used.append(next(count))
    shares = torch.tensor([p**a, 1 - p**a])
    assert chi_square_p(torch.tensor([accepted, 4000 - accepted]), 4000 * shares) > 1e-4
    used = torch.tensor(used).double()
    assert abs(used.mean() - p ** (a - 1)) < 3.9 * used.std() / math.sqrt(4000)


def test_the_factory_accepts_by_coins_of_its_generator():
    def trials():
        generator, used = torch.Generator().manual_seed(3), itertools.count()
        for _ in range(50):  # no draw is 1, so the coins alone decide when it gives up
            zeros = (torch.tensor(0) for _ in used)
            assert not sample.bernoulli_factory(zeros, torch.tensor(1), 0.5, generator)
        return next(used)

    first = trials()
    torch.manual_seed(1)
    assert trials() == first


def chances_by_enumeration(pool, n, a):
    """P(x) of an attempt of the exact method on a pool in random order, if it accepts."""
    chances = [0.0] * len(pool)
    for x, *others in itertools.permutations(pool):
        if others[: n - 1] != [x] * (n - 1):
            continue  # the first n draws are not equal
        misses = itertools.takewhile(lambda draw: draw != x, others[n - 1 :]) if a > 0 else []
        chances[x] += math.prod(1 - a / i for i, _ in enumerate(misses, start=1))
    if sum(chances) == 0:
        return chances_by_enumeration(pool, n - 1, 0)
    return torch.tensor(chances) / sum(chances)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n, a", [(1, 0), (2, 0), (3, 0), (1, 1 / 9), (1, 1 / 3), (2, 0.5)])
def test_the_batch_sampler_weighs_by_the_exact_methods_chances(n, a, seed):
    """H0: for 1/T = n + a, that distribution. 300 choices of each pool, chi-square, p > 1e-4."""
    torch.manual_seed(seed)
    for pool in ([0, 1, 1, 2, 2, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 1]):
        chunks = torch.tensor([[x // 2, x % 2] for x in pool])  # (6, 2): they agree in part
        chosen = temperature_sample_batch(chunks.expand(300, 6, 2), 1 / (n + a))
        counts = (chosen @ torch.tensor([2, 1])).bincount(minlength=6)
        assert chi_square_p(counts, 300 * chances_by_enumeration(pool, n, a)) > 1e-4


def test_one_over_the_temperature_is_a_whole_number_and_a_fraction():
    for T, n, a in ((1, 1, 0), (1 / 3, 3, 0), (0.1, 10, 0), (0.4, 2, 0.5), (0.75, 1, 1 / 3)):
        assert sample.inverse_temperature(T) == (n, pytest.approx(a))


@pytest.mark.parametrize("temperature, pool", [(1.0, 50), (0.5, 50), (0.5, None), (0.7, None)])
@pytest.mark.parametrize("K, T", [(1, 8), (2, 8), (4, 11), (4, 100)])
def test_generation_with_a_cache_is_generation_without_one(K, T, temperature, pool):
    """A model without noise has one next chunk only. Of 11 tokens the first 3, 11 mod 4, are not
    read; of 100 only the last 28 are, since 32 tokens of context are 7 chunks of history and one to
    predict. When the history is full, it goes on from its newest half.
    """
    model, text = tiny_calm(K, noisy=False).double(), torch.randint(13, (3, T))
    longest = 32 // K - 1  # in chunks
    expected, begin = text, T - min(T // K, longest) * K
    while expected.shape[1] < T + 40:
        history = expected[:, begin:]
        chunk = model.draw_chunks(model.hidden_states(history)[:, -1], 1)[0]
        expected = torch.cat([expected, chunk], dim=1)
        if history.shape[1] == longest * K:
            begin = expected.shape[1] - longest // 2 * K
    assert torch.equal(generate(model, text, 40, temperature, pool), expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pool, power", [(None, 2), (1, 1)])
def test_generation_at_half_the_temperature_squares_the_probabilities(pool, power, seed):
    """H0: 300 texts go on with P^2 / Z by the exact method; from pools of one draw, with P itself.
    P is estimated from 100 000 draws; chi-square, p > 1e-4.
    """
    model, prompt = tiny_calm(1, vocab_size=4, seed=3), torch.tensor([[1, 2, 0, 3]])
    torch.manual_seed(seed)
    draws = model.draw_chunks(model.hidden_states(prompt)[0, -1], 100_000).flatten()
    P = (draws.bincount(minlength=4) / 100_000) ** power
    counts = generate(model, prompt.expand(300, -1), 1, 0.5, pool)[:, -1].bincount(minlength=4)
    assert chi_square_p(counts, 300 * P / P.sum()) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_baseline_divides_its_logits_by_any_temperature(temperature, seed):
    """H0: a new token has that softmax. 4 000 texts, chi-square, p > 1e-4."""
    model, prompt = TransformerLM(CALMConfig(5, 1, 8, 16, 32, 1, 2)), torch.tensor([[0, 2, 1]])
    P = (model.unembedding(model.hidden_states(prompt)[0, -1]) / temperature).softmax(-1)
    torch.manual_seed(seed)
    drawn = generate(model, prompt.expand(4000, -1), 1, temperature)[:, 3]
    assert chi_square_p(drawn.bincount(minlength=5), 4000 * P) > 1e-4


def rank_file(path, tokens, numbers):
    lines = [f"{base64.b64encode(token).decode()} {i}" for token, i in zip(tokens, numbers)]
    path.write_text("\n".join(lines) + "\n\n")  # a blank line at the end does no harm
    return str(path)


BYTES = [bytes([b]) for b in range(256)]


@pytest.mark.parametrize("numbers, end", [
    (range(264), 264), ([*range(1, 265)], 265),
    ([*range(256), *range(260, 268)], 268),  # some are left out, as in p50k
    (range(128_000), 128_001),  # Llama 3's, under any name
])  # fmt: skip
def test_a_file_of_ranks_is_a_tokenizer_and_the_end_has_a_number_of_its_own(numbers, end, tmp_path):
    tokens = BYTES + [b"12", b"45", b"123", b"1234", b"12345", b"th", b"the", b" the"]
    tokens += [b"\xff" + i.to_bytes(3, "big") for i in range(len(numbers) - len(tokens))]
    encoding = sample.load_tokenizer(rank_file(tmp_path / "anything", tokens, numbers))
    pieces = [encoding.decode([token]) for token in encoding.encode_ordinary("the the thx12345")]
    assert pieces == ["the", " the", " ", "th", "x", "123", "45"]
    assert encoding.eot_token == end == encoding.n_vocab - 1


@pytest.mark.parametrize("tokens, numbers, word", [
    (BYTES[1:], range(255), "256 bytes"), ([*BYTES, b"th"], [*range(256), 7], "twice"),
    (BYTES, ["x"] * 256, "invalid literal"), ([], [], "256 bytes"),
    ([*BYTES, b"a"], range(257), "twice"),
])  # fmt: skip
def test_a_bad_file_of_ranks_is_one_sentence(tokens, numbers, word, tmp_path):
    with pytest.raises(sample.UserError, match=word):
        sample.load_tokenizer(rank_file(tmp_path / "ranks", tokens, numbers))


def test_a_text_has_newlines_before_a_short_prompt_and_ends_at_its_end(tmp_path):
    """The newlines do not come back. Nor do numbers that are no tokens: a model has embeddings for
    600, but in this tokenizer 256 is left out, and the highest is 258, the end.
    """
    ranks = rank_file(tmp_path / "ranks", [*BYTES, b"th"], [*range(256), 257])
    model, encoding = tiny_calm(vocab_size=600), sample.load_tokenizer(ranks)
    model.autoencoder.embedding.weight[[256, 258]] *= 2.5  # the decoder prefers these
    torch.manual_seed(0)
    new = generate(model, torch.tensor([[10, 10, 10, 97]]), 200)[0, 4:].tolist()
    before, after = new[: new.index(258)], new[new.index(258) + 1 :]
    known = [t for t in before if t < 256 or t == 257]
    # Else this test would test nothing.
    assert known and 256 in before and max(before) > 258 and min(after) < 256
    torch.manual_seed(0)
    assert sample.write_text(model, encoding, "a", 200, 1.0) == "a" + encoding.decode(known)


def test_a_terminal_without_a_letter_shows_a_question_mark(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    sample.run(lambda: print("na\u00efve \U0001f600"))
    terminal.flush()
    assert terminal.buffer.getvalue().replace(b"\r", b"") == b"na?ve ?\n"


def test_only_the_users_mistakes_are_sentences(command):
    def student():
        assert 1 + 1 == 3, "mine"

    with pytest.raises(AssertionError, match="mine"):  # with its traceback
        sample.run(student)

    def mistake():
        sample.check(False, "do this instead")

    assert command(mistake) == "script.py: do this instead"


@pytest.mark.parametrize("temperature", [0.5, 0.9])
def test_the_exact_sampler_gives_up_after_max_draws(temperature):
    """No two draws agree: at T = 1/2 no attempt succeeds, at 0.9 no trial of the factory. It asks
    for some hundred draws at a time, so that it may make a few more than 1 000.
    """
    numbers = itertools.count()
    draw = lambda n: torch.tensor([[next(numbers)] for _ in range(n)])
    with pytest.raises(sample.UserError, match="T = 1, 1/2"):
        sample.temperature_sample_exact(draw, temperature, max_draws=1000)
    assert next(numbers) < 2000
