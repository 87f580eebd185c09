import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gpt import random_tokens, tiny_gpt

from nanochat.common import UserError
from nanochat.engine import Engine, decode_stream, sample
from nanochat.tokenizer import Reserved, Tokenizer

torch.set_num_threads(1)
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [4], [9, 8, 7]]


def columns(steps) -> list[list]:
    """Each row's tokens."""
    return [list(row) for row in zip(*steps)]


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The uncached way: read everything again for each token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def test_greedy_is_the_uncached_argmax_beyond_the_window_too():
    model = tiny_gpt(sequence_len=5)
    got = columns(Engine(model).generate(PROMPTS, 8, temperature=0))
    assert got == [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert Engine(model).reach == 5


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 13), min_size=1, max_size=4), st.integers(1, 15))
def test_neither_chunks_nor_neighbours_matter(lengths, chunk):
    model = tiny_gpt(sequence_len=7, window_pattern="SL")
    prompts = [random_tokens(n, seed=n).tolist() for n in lengths]
    together = columns(Engine(model, prefill_chunk=chunk).generate(prompts, 3, temperature=0))
    assert together == [columns(Engine(model).generate([p], 3, temperature=0))[0] for p in prompts]


def test_draws_come_from_the_seed_alone():
    engine = Engine(tiny_gpt())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = columns(engine.generate(PROMPTS, 20, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert columns(engine.generate(PROMPTS, 20, seed=1)) == first != columns(engine.generate(PROMPTS, 20, seed=2))


def test_sampling_follows_temperature_and_top_k():
    g = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    many = logits.expand(40_000, 4)
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 2), (1.0, 99)):
        kept = logits.clone()
        if top_k == 2:
            kept[[0, 3]] = -math.inf
        shares = torch.bincount(sample(many, temperature, top_k, g), minlength=4) / len(many)
        torch.testing.assert_close(shares, (kept / temperature).softmax(-1), atol=0.01, rtol=0)
    assert (sample(many, 0.0, None, g) == 1).all() and (sample(many, 3.0, 1, g) == 1).all()


def test_rows_stop_on_their_own():
    engine = Engine(tiny_gpt())
    free = columns(engine.generate(PROMPTS, 6, temperature=0))
    stop = free[0][2]
    steps = list(engine.generate(PROMPTS, 6, temperature=0, stop_ids=[stop]))
    for row, unstopped in zip(columns(steps), free):
        end = unstopped.index(stop) + 1 if stop in unstopped else 6
        assert row == (unstopped[:end] + [None] * 6)[:len(steps)]
    alone = list(engine.generate(PROMPTS[:1], 6, temperature=0, stop_ids=[stop]))
    assert [t for (t,) in alone] == free[0][:free[0].index(stop) + 1]


def test_it_streams():
    model = tiny_gpt()
    calls = []
    hidden = model.hidden
    model.hidden = lambda *a, **k: calls.append(1) or hidden(*a, **k)
    steps = Engine(model).generate(PROMPTS, 6)
    assert not calls
    next(steps), next(steps)
    assert len(calls) == 2  # the prompt, and one token; the third is not yet asked for
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("prompts, kwargs, message", [
    ([], {}, "empty"), ([[1], []], {}, "empty"), ([[1, 50]], {}, "token id 50 .* vocabulary of 50"), ([[-1]], {}, "token id -1"),
    ([[1]], {"temperature": -0.5}, "temperature -0.5"), ([[1]], {"temperature": math.nan}, "temperature nan"),
    ([[1]], {"temperature": math.inf}, "temperature inf"), ([[1]], {"top_k": 0}, "top_k 0"),
    ([[1]], {"stop_ids": [77]}, "token id 77"), ([[1]], {"max_tokens": 0}, "max_tokens 0")])
def test_bad_requests_are_refused_before_anything_runs(prompts, kwargs, message):
    with pytest.raises(UserError, match=message):
        Engine(tiny_gpt()).generate(prompts, **{"max_tokens": 3, **kwargs})


def test_engines_that_cannot_be():
    with pytest.raises(UserError, match="prefill_chunk 0"):
        Engine(tiny_gpt(), prefill_chunk=0)
    with pytest.raises(UserError, match="257 ids, the model 50"):
        Engine(tiny_gpt(), byte_tokenizer())


def byte_tokenizer() -> Tokenizer:
    return Tokenizer([bytes([i]) for i in range(256)], reserved=Reserved(0, 0, 0))


def test_completed_text_comes_in_whole_characters():
    assert list(decode_stream(byte_tokenizer(), iter("aé€😀b".encode()))) == ["a", "é", "€", "😀", "b"]
    assert "".join(decode_stream(byte_tokenizer(), iter("a€".encode()[:-1]))) == "a\ufffd"
    assert "".join(decode_stream(byte_tokenizer(), iter(b"\xff" * 20))) == "\ufffd" * 20


def test_complete_starts_at_bos_and_ends_at_it():
    engine = Engine(tiny_gpt(vocab_size=257), byte_tokenizer())
    ids = [token for (token,) in engine.generate([[256, *b"hello"]], 40, seed=3, stop_ids=[256])]
    text = "".join(engine.complete("hello", 40, seed=3))
    assert text == engine.tokenizer.decode([t for t in ids if t != 256])
    with torch.no_grad():
        engine.model.lm_head.weight.zero_()
        engine.model.lm_head.weight[256] = 100 * engine.model.hidden(torch.tensor([[256]]))[0, 0]
    assert list(engine.complete("", 40, temperature=0)) == []
