import itertools
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import SEEDS, chi_square_p, tiny_calm

import sample
from autoencoder import InputError
from sample import distinct_draws, generate, temperature_sample_batch, temperature_sample_exact

# Temperature


# 2 to 50 outcomes, one with an outcome of probability zero, one nearly deterministic.
DISTRIBUTIONS = {
    "two": [0.7, 0.3],
    "one is impossible": [0.5, 0.0, 0.3, 0.2],
    "nearly certain": [0.985, 0.01, 0.005],
    "fifty": [1 / (i + 1) ** 2 for i in range(50)],
}
TEMPERATURES = [1, 0.9, 0.75, 2 / 3, 0.5, 0.4, 1 / 3, 0.23]


def exact_samples(P, temperature, n, seed):
    """n answers of temperature_sample_exact for the distribution P: the counts of the outcomes, and the draws of each (n,)."""
    torch.manual_seed(seed)
    place, stream = 0, torch.empty(0, 1, dtype=torch.long)

    def draw(m):  # from a long stream of independent draws, which is faster than drawing a few at a time
        nonlocal place, stream
        if place + m > len(stream):
            place, stream = 0, P.multinomial(2**20, replacement=True).unsqueeze(-1)
        place += m
        return stream[place - m : place]

    answers, used = zip(*(temperature_sample_exact(draw, temperature, block=24, with_draws=True) for _ in range(n)))
    return torch.stack(answers).flatten().bincount(minlength=len(P)), torch.tensor(used).double()


def exact_cases():
    """
    Each temperature with each distribution: 5 000 answers, and the seeds go round. With CALM_ALL_SEEDS=1 in the environment,
    20 000 answers on each of the ten seeds, which takes 10 minutes.
    """
    cases = list(itertools.product(DISTRIBUTIONS, TEMPERATURES))
    if os.environ.get("CALM_ALL_SEEDS"):
        return [(*case, seed, 20_000) for case in cases for seed in SEEDS]
    return [(*case, i % len(SEEDS), 5_000) for i, case in enumerate(cases)]


@pytest.mark.parametrize("name, temperature, seed, answers", exact_cases())
def test_exact_sampler_against_the_distribution_and_the_expected_draws(name, temperature, seed, answers):
    """
    H0: the answers have the distribution P^(1/T) / Z, and the mean number of draws is (n + sum P^(1/T-1)) / sum P^(1/T), or
    n / sum P^n for 1/T = n. Chi-square, p > 1e-4; draws within 3.9 standard errors, p > 1e-4 as well.
    """
    P = torch.tensor(DISTRIBUTIONS[name]).double()
    P /= P.sum()
    counts, used = exact_samples(P, temperature, answers, seed)
    sharpened = P ** (1 / temperature)
    assert chi_square_p(counts, answers * sharpened / sharpened.sum()) > 1e-4
    if name == "fifty":
        return  # where a rare value starts a factory it may take thousands of draws: 20 000 answers do not know that tail
    n = math.floor(1 / temperature + 1e-9)
    factory = 0 if abs(1 / temperature - n) < 1e-9 else (P[P > 0] ** (1 / temperature - 1)).sum()
    expected = (n + factory) / sharpened.sum()
    assert abs(used.mean() - expected) <= 3.9 * used.std() / math.sqrt(len(used)) + 1e-9


def test_a_factory_with_a_in_place_of_a_over_i_is_caught(monkeypatch):
    """The tempting mistake, and the same chi-square test with the same 20 000 answers: it must say no."""

    def wrong_factory(draws, x, a, generator=None):
        for draw in draws:
            if draw == x:
                return True
            if torch.rand(()) < a:
                return False

    monkeypatch.setattr(sample, "bernoulli_factory", wrong_factory)
    P = torch.tensor(DISTRIBUTIONS["two"]).double()
    counts, _ = exact_samples(P, 0.75, 20_000, seed=0)
    sharpened = P ** (1 / 0.75)
    assert chi_square_p(counts, 20_000 * sharpened / sharpened.sum()) < 1e-4


def test_blocks_do_not_change_the_answer_or_the_count():
    """The draws are read in order: with draws from the same stream, every block size must end in the same attempt."""
    P = torch.tensor([0.5, 0.3, 0.2])
    for seed in range(50):
        stream = P.multinomial(4000, replacement=True, generator=torch.Generator().manual_seed(seed)).unsqueeze(-1)
        results = set()
        for block in (1, 3, 50, 300):
            rest = iter(stream)
            chunk, used = temperature_sample_exact(
                lambda m: torch.stack(list(itertools.islice(rest, m))), 1 / 3, block=block, with_draws=True
            )
            results.add((chunk.item(), used))
        assert len(results) == 1


def test_the_exact_method_does_not_ask_how_large_the_pool_is():
    model, used = tiny_calm(), []
    generate(model, torch.randint(13, (2, 8)), 4, 0.5, "exact", pool=1, draws_used=used)
    assert min(used) >= 2


def test_too_many_draws_end_in_a_sentence():
    draws = itertools.count()
    with pytest.raises(InputError):  # no two draws are equal
        temperature_sample_exact(lambda m: torch.tensor([[next(draws)] for _ in range(m)]), 0.5, max_draws=500)
    with pytest.raises(InputError, match="temperature"):
        temperature_sample_exact(lambda m: torch.zeros(m, 4), 0.0)


def exact_choice(pool, n):
    """The distribution of the choice from a pool, by enumeration: all ways to pick n draws that agree are equally likely."""
    while True:
        agreeing = [pick[0] for pick in itertools.combinations(pool, n) if len(set(pick)) == 1]
        if agreeing:
            return {value: count / len(agreeing) for value, count in Counter(agreeing).items()}
        n -= 1  # the fallback


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_batch_sampler_against_enumeration(n, seed):
    """
    H0: for one of five pools, and for pools drawn at random, the choice has the distribution found by enumeration.
    4 000 choices a pool; chi-square, p > 1e-4.
    """
    torch.manual_seed(seed)
    pools = [[0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1], torch.randint(3, (6,)).tolist()]
    chunks = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]])  # chunks that agree in part
    for pool in pools:
        drawn = chunks[torch.tensor(pool)].expand(4000, 6, 2)
        chosen = temperature_sample_batch(drawn, 1 / n)
        ids = (chosen * torch.tensor([2, 1])).sum(-1)
        exact = exact_choice(pool, n)
        expected = torch.tensor([4000 * exact.get(i, 0.0) for i in range(6)])
        assert chi_square_p(torch.bincount(ids, minlength=6), expected) > 1e-4


def accepted_orders(pool, value, n, a):
    """How likely does the exact method accept a value in one attempt on the pool in random order? By enumeration of orders."""
    total = 0.0
    for order in itertools.permutations(pool):
        if any(draw != value for draw in order[:n]):
            continue
        chance, i = 1.0, 0
        for draw in order[n:]:
            if draw == value:
                break
            i += 1
            chance *= 1 - a / i  # it has not given up
        total += chance
    return total / math.factorial(len(pool))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("temperature", [0.9, 0.75, 0.4])
def test_batch_sampler_between_whole_numbers(temperature, seed):
    """H0: the choice has weights equal to the exact method's chances on the pool in every order. 4 000 choices, p > 1e-4."""
    torch.manual_seed(seed)
    n = math.floor(1 / temperature)
    for pool in ([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1]):
        chances = torch.tensor([accepted_orders(pool, value, n, 1 / temperature - n) for value in range(3)])
        chosen = temperature_sample_batch(torch.tensor(pool).view(1, 6, 1).expand(4000, -1, -1), temperature).flatten()
        assert chi_square_p(torch.bincount(chosen, minlength=3), 4000 * chances / chances.sum()) > 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_batch_sampler_over_all_pools_of_a_distribution(seed):
    """
    H0: the whole procedure, drawing the pool included, has the distribution summed over all 81 pools of 4 draws from P.
    20 000 pools; chi-square, p > 1e-4. That distribution is not yet P^2 / Z: the bias of a small pool.
    """
    torch.manual_seed(seed)
    P = torch.tensor([0.5, 0.3, 0.2])
    exact = torch.zeros(3)
    for pool in itertools.product(range(3), repeat=4):
        for value, share in exact_choice(pool, 2).items():
            exact[value] += P[list(pool)].prod() * share
    pools = P.multinomial(20_000 * 4, replacement=True).view(20_000, 4, 1)
    chosen = temperature_sample_batch(pools, 0.5).flatten()
    assert chi_square_p(torch.bincount(chosen, minlength=3), 20_000 * exact) > 1e-4
    assert chi_square_p(torch.bincount(chosen, minlength=3), 20_000 * P**2 / (P**2).sum()) < 1e-4


def test_batch_sampler_keeps_pools_apart():
    pools = torch.arange(6).view(2, 3, 1, 1).expand(2, 3, 7, 4)
    assert torch.equal(temperature_sample_batch(pools, 0.5), pools[:, :, 0])


def test_one_over_t_as_a_whole_number_and_a_fraction():
    assert [sample.inverse_temperature(T) for T in (1, 0.5, 1 / 3, 0.333, 0.33333, 0.25)] == [(n, 0.0) for n in (1, 2, 3, 3, 3, 4)]
    n, a = sample.inverse_temperature(0.4)
    assert n == 2 and a == pytest.approx(0.5)


def test_distinct_draws_are_what_a_counter_finds():
    """
    Also where a chunk's tokens, read as digits of one number, would overflow 64 bits: with powers of 2 for digits and base,
    chunks whose first tokens differ would then become the same number.
    """
    for tokens, K in (([0, 1, 2], 4), ([0, 2**15, 2**16 - 1], 4), ([0, 2**31, 2**32 - 1], 8)):
        draws = torch.tensor(tokens)[torch.randint(0, 3, (5, 40, K))]
        found = [Counter() for _ in draws]
        for pool, place, count in zip(*distinct_draws(draws.numpy())):
            found[pool][tuple(draws[pool, place].tolist())] += count.item()
        assert found == [Counter(map(tuple, pool)) for pool in draws.tolist()]


def test_large_counts_do_not_overflow():
    """C(1 500, 50) is beyond float32, and C(1 500, 750) beyond float64."""
    pool = torch.tensor([0] * 1500 + [1] * 500).view(-1, 1)
    for n in (50, 750):
        assert all(temperature_sample_batch(pool, 1 / n).item() == 0 for _ in range(5))


@pytest.mark.parametrize("temperature", [0.0, -0.5, 1e-320, 1.01, 2.0, float("nan"), float("inf")])
def test_temperatures_outside_their_range_are_refused(temperature):
    with pytest.raises(InputError, match="temperature"):
        temperature_sample_batch(torch.zeros(5, 4), temperature)


# Generation


@pytest.mark.parametrize("K", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("T", [1, 2, 5, 8, 23, 24, 25, 60])
@pytest.mark.filterwarnings("ignore:none of")
def test_prompts_and_texts_of_any_length(K, T):
    """Longer than the context of 24 included. The prompt comes back unchanged in front of the new tokens."""
    model, prompt = tiny_calm(K, context=24), torch.randint(13, (2, T))
    for n_tokens in (0, 1, 7, 40):
        out = generate(model, prompt, n_tokens, max_draws=500)
        assert out.shape == (2, T + n_tokens)
        assert torch.equal(out[:, :T], prompt)


@pytest.mark.parametrize("method", ["batch", "exact"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.5])
def test_generation_by_both_methods_reports_its_draws(temperature, method):
    model, prompt, used = tiny_calm(noisy=False), torch.randint(13, (2, 8)), []
    out = generate(model, prompt, 8, temperature, method, pool=50, draws_used=used)
    assert torch.equal(out, generate(model, prompt, 8))  # without noise there is one answer
    # All draws agree: an attempt of n draws, and one trial of the factory if 1/T is no whole number.
    assert used == [{1.0: 1, 0.7: 2, 0.5: 2}[temperature] if method == "exact" or temperature == 1 else 50] * 4


@pytest.mark.parametrize("K", [1, 2, 4])
def test_generation_with_the_cache_is_generation_without_it(K):
    model, prompt = tiny_calm(K, context=32, noisy=False).double(), torch.randint(13, (2, 8))
    text = prompt
    while text.shape[1] < 32:
        text = torch.cat([text, model.draw_chunks(model.hidden_states(text)[:, -1], 1)[0]], dim=1)
    assert torch.equal(generate(model, prompt, 24), text)


def test_a_text_longer_than_the_context_goes_on_from_its_newest_half():
    """The context of 32 tokens is 7 chunks of history; when they are full, the last 3 are read again."""
    model, prompt = tiny_calm(context=32, noisy=False).double(), torch.randint(13, (1, 28))
    out = generate(model, prompt, 20)
    first = model.draw_chunks(model.hidden_states(prompt)[:, -1], 1)[0]
    assert torch.equal(out[:, 28:32], first)
    for begin in (32, 36, 40):
        history = out[:, 20:begin]
        assert torch.equal(out[:, begin : begin + 4], model.draw_chunks(model.hidden_states(history)[:, -1], 1)[0])


def test_of_a_long_prompt_only_the_end_counts():
    model, prompt = tiny_calm(context=32, noisy=False), torch.randint(13, (1, 100))
    changed = prompt.clone()
    changed[:, : 100 - 28] = 0
    assert torch.equal(generate(model, prompt, 12)[:, 100:], generate(model, changed, 12)[:, 100:])


def test_a_prompt_shorter_than_a_chunk_is_completed_in_front():
    model = tiny_calm(noisy=False)
    assert torch.equal(generate(model, torch.tensor([[5]]), 8, lead=3), generate(model, torch.tensor([[3, 3, 3, 5]]), 8)[:, 3:])
    assert torch.equal(generate(model, torch.tensor([[5]]), 8), generate(model, torch.tensor([[5, 5, 5, 5]]), 8)[:, 3:])
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, torch.zeros(1, 0, dtype=torch.long), 8)


@pytest.mark.parametrize("seed", SEEDS)
def test_left_over_tokens_condition_exactly(seed):
    """
    H0: with a left-over token g, `generate` draws the rest of the chunk from P(rest | the chunk begins with g, history).
    P is estimated from 200 000 draws of whole chunks; 200 texts are generated; two-sample chi-square, p > 1e-4.
    """
    model = tiny_calm(chunk_size=2, vocab_size=4, seed=3)
    torch.manual_seed(seed)
    history = torch.tensor([[1, 2, 0, 3]])
    draws = model.draw_chunks(model.hidden_states(history)[0, -1], 200_000)
    given = draws[:, 0].bincount(minlength=4).argsort()[-2]  # the second most probable first token: most draws disagree
    P = draws[draws[:, 0] == given, 1].bincount(minlength=4).double()
    assert P.count_nonzero() > 1 and len(draws) > 2 * P.sum()

    prompt = torch.cat([history, given.view(1, 1)], dim=1)
    texts = generate(model, prompt.expand(200, -1), 1)
    assert (texts[:, 4] == given).all()
    observed = texts[:, 5].bincount(minlength=4).double()
    both = observed + P  # counts of two samples from the same distribution, so the expected shares come from both
    statistic = sum(((counts - counts.sum() * both / both.sum()) ** 2 / (counts.sum() * both / both.sum()))[both > 0].sum() for counts in (observed, P))
    freedom = (both > 0).sum() - 1
    assert torch.special.gammaincc(freedom.double() / 2, statistic / 2) > 1e-4


def test_left_over_tokens_that_no_draw_begins_with():
    model = tiny_calm(noisy=False)  # all draws are equal
    whole = torch.randint(13, (1, 8))
    (only,) = model.draw_chunks(model.hidden_states(whole)[:, -1], 1)[0]
    prompt = torch.cat([whole, only[None, :1], (only[None, 1:2] + 1) % 13], dim=1)  # its first token is right, its second not
    with pytest.warns(UserWarning, match="1 agreed"):
        out = generate(model, prompt, 2, max_draws=100)
    assert torch.equal(out[:, :10], prompt) and torch.equal(out[:, 10:], only[None, 2:])


# Tokenizers


@pytest.fixture(scope="module")
def encodings():
    from train import train_bpe

    texts = ["the cat sat on the mat; the cat's hat, the bat's. " * 20]
    return [sample.make_encoding(train_bpe(texts, n)) for n in (256, 270)]


def test_tokenizers_give_back_any_text(encodings):
    random = torch.Generator().manual_seed(0)
    for encoding in encodings:
        for n in range(1, 40):
            points = torch.randint(1, 0x110000, (n,), generator=random).tolist() + list(range(n))
            text = "".join(map(chr, (p for p in points if not 0xD800 <= p < 0xE000)))  # all but surrogates are characters
            assert encoding.decode(encoding.encode_ordinary(text)) == text
        for text in ("", "\n\n  \t\r\n", "the cat<|endoftext|>", "a" * 100_000, " " * 100_000, "Ünïcödé 漢字 🎭"):
            assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_tokenizers_have_every_byte_and_one_end_of_text(encodings):
    for encoding, n in zip(encodings, (256, 270)):
        assert [encoding.encode_single_token(bytes([b])) for b in range(256)] == list(range(256))
        assert encoding.decode_bytes(list(range(256))) == bytes(range(256))
        assert encoding.n_vocab == n + 1 and encoding.eot_token == n


def test_plain_bytes_are_bytes(encodings):
    assert encodings[0].encode_ordinary("aé\n") == list("aé\n".encode())


def test_a_ranks_file_is_read_as_it_was_written(encodings, tmp_path):
    path = tmp_path / "my.tiktoken"
    path.write_text(sample.ranks_to_text(encodings[1]._mergeable_ranks))
    loaded = sample.load_tokenizer(str(path))
    text = "the cat's mat"
    assert loaded.encode_ordinary(text) == encodings[1].encode_ordinary(text)


@pytest.mark.parametrize("content", ["hello", "aGk= x", "!!!! 3", "aGk= 0\naGk= 1", "", "\ufffd"])
def test_files_that_are_no_ranks_are_refused(content, tmp_path):
    path = tmp_path / "wrong.tiktoken"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="wrong.tiktoken"):
        sample.load_tokenizer(str(path))


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(InputError, match="no_such_encoding"):
        sample.load_tokenizer("no_such_encoding")


# The command's bad input (that its good input works is seen at the end of test_train.py)


def test_bad_input_ends_in_one_sentence_and_status_2(command, tmp_path):
    """One real process, to see the exit status that a shell sees; the others run inside this one."""
    script = os.path.join(os.path.dirname(sample.__file__), "sample.py")
    result = subprocess.run([sys.executable, script, "--out_dir", str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1 and "train.py" in result.stderr


def test_a_checkpoint_of_something_else(command, tmp_path):
    torch.save({"model": torch.zeros(3)}, tmp_path / "calm.pt")
    assert "something else" in command(sample.main, "--out_dir", tmp_path)
    (tmp_path / "calm.pt").write_bytes(b"not a checkpoint at all")
    assert "damaged" in command(sample.main, "--out_dir", tmp_path)


def test_a_checkpoint_that_would_run_code_is_not_opened(command, tmp_path):
    torch.save({"kind": "calm", "code": math.floor}, tmp_path / "calm.pt")
    assert "calm.pt" in command(sample.main, "--out_dir", tmp_path)


@pytest.mark.parametrize("temperature", [0, 1.5, -1, "nan"])
def test_wrong_temperatures_at_the_command(command, temperature, tmp_path):
    assert "temperature" in command(sample.main, "--out_dir", tmp_path, "--temperature", temperature)


def test_other_wrong_arguments(command, tmp_path):
    assert "--n_tokens" in command(sample.main, "--n_tokens", 0)
    assert "cannot be read" in command(sample.main, "--prompt", f"FILE:{tmp_path / 'none.txt'}")
    assert "no device" in command(sample.main, "--device", "abacus")
