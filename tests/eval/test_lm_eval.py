"""Our models under the lm-evaluation-harness: what it asks is answered as the model itself would."""

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from mc.harness import SessionLM
from mc.session import SessionConfig, SessionPool
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.harness import PlainLM
from nanochat.tokenizer import Reserved, Tokenizer
from tiny_gpt import tiny_gpt
from tiny_mc import tiny_mc

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)], reserved=Reserved(4, 4, 4))
GPT = tiny_gpt(vocab_size=TOKENIZER.vocab_size, sequence_len=128, n_kv_head=4, rope_fraction=0.5)


def requests(kind: str, *args: tuple) -> list[Instance]:
    return [Instance(kind, {}, a, i) for i, a in enumerate(args)]


def slow_likelihood(row: list[int], count: int) -> tuple[float, bool]:
    """Of the last `count` ids of a row, one forward pass each."""
    total, greedy = 0.0, True
    with torch.inference_mode():
        for at in range(len(row) - count, len(row)):
            logits = GPT(torch.tensor([row[:at]]))[0, -1].double()
            total += float(logits.log_softmax(-1)[row[at]])
            greedy &= int(logits.argmax()) == row[at]
    return total, greedy


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, special=True)


@pytest.mark.parametrize(
    "context, continuation", [("the fox", " ran"), ("", "a"), ("the fox ", "ran"), ("<|key_1|>", "<|value_2|>"), ("Zoë", "’s")]
)
def test_likelihood_of_a_continuation(context, continuation):
    lm = PlainLM(GPT, TOKENIZER)
    expected = slow_likelihood(
        [TOKENIZER.bos_id, *ids(context + continuation)], len(ids(context + continuation)) - len(ids(context.rstrip(" ")))
    )
    ((nats, greedy),) = lm.loglikelihood(requests("loglikelihood", (context, continuation)))
    assert nats == pytest.approx(expected[0], abs=1e-9) and greedy == expected[1] and lm.cut == 0
    likeliest = TOKENIZER.decode([int(GPT(torch.tensor([[TOKENIZER.bos_id, *ids("x")]]))[0, -1, :128].argmax())])
    assert likeliest  # a byte that is a character
    with pytest.raises(UserError, match="adds no token"):
        lm.loglikelihood(requests("loglikelihood", ("a", "")))


def test_a_continuation_that_is_the_likeliest_is_greedy():
    lm, row = PlainLM(GPT, TOKENIZER), [TOKENIZER.bos_id, *ids("the")]
    best = int(GPT(torch.tensor([row]))[0, -1].argmax())
    lm.split = lambda context, continuation: (row, [best])
    assert lm.loglikelihood(requests("loglikelihood", ("the", "?")))[0][1] is True
    lm.split = lambda context, continuation: (row, [(best + 1) % 256])
    assert lm.loglikelihood(requests("loglikelihood", ("the", "?")))[0][1] is False


def test_what_does_not_fit_the_window_is_cut_and_counted():
    lm = PlainLM(GPT, TOKENIZER, max_length=16)
    text = "a context that is longer than the window"
    ((nats, _),) = lm.loglikelihood(requests("loglikelihood", (text, " end")))
    assert nats == pytest.approx(slow_likelihood(ids(text + " end")[-17:], 4)[0], abs=1e-9) and lm.cut == 1
    with pytest.raises(UserError, match="does not fit the window of 16"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b" * 17)))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 50])
def test_rolling_likelihood_predicts_every_token_once(length):
    lm, text = PlainLM(GPT, TOKENIZER, max_length=16), "some text goes on and on, and then it goes on and on"[:length]
    (nats,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    row, expected = [TOKENIZER.bos_id, *ids(text)], 0.0
    for first in range(1, len(row), 16):
        piece = row[max(0, min(first, len(row) - 16) - 1 if first > 1 else 0) : first + 16]
        new = len(row[first : first + 16])
        expected += slow_likelihood(piece[-17:], new)[0]
    assert nats == pytest.approx(expected, abs=1e-9) and lm.cut == 0


def test_generation_is_the_engines_up_to_a_stop():
    lm = PlainLM(GPT, TOKENIZER)
    prompt = [TOKENIZER.bos_id, *ids("the fox")]
    made = [t for (t,) in Engine(GPT).generate([prompt], 12, temperature=0, stop_ids=[TOKENIZER.bos_id]) if t != TOKENIZER.bos_id]
    whole = TOKENIZER.decode(made)
    assert lm.generate_until(requests("generate_until", ("the fox", {"until": [], "max_gen_toks": 12}))) == [whole]
    stop = whole[3:5]
    assert lm.generate_until(requests("generate_until", ("the fox", {"until": stop, "max_gen_toks": 12}))) == [whole[: whole.index(stop)]]
    with pytest.raises(UserError, match="generation_kwargs with top_p"):
        lm.generate_until(requests("generate_until", ("a", {"top_p": 0.5})))
    with pytest.raises(UserError, match="leaves nothing of the window"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 128})))


def test_sessions_answer_beyond_any_window():
    mc = tiny_mc(GPT).model
    pool = SessionPool(GPT, mc, SessionConfig(), trained_lods=[1, 2])
    lm, context = SessionLM(pool, TOKENIZER), "a history, " * 18
    ((nats, greedy),) = lm.loglikelihood(requests("loglikelihood", (context, " and its end")))
    session = pool.open()
    session.begin([TOKENIZER.bos_id, *ids(context.rstrip(" "))])
    tokens = ids("  and its end")
    logits = session.score(tokens).double()
    session.close()
    assert nats == pytest.approx(float(logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum()), abs=1e-9)
    assert greedy == bool((logits.argmax(-1) == torch.tensor(tokens)).all())
    short = lm.loglikelihood(requests("loglikelihood", ("the fox", " ran")))[0][0]
    assert short == pytest.approx(PlainLM(GPT, TOKENIZER).loglikelihood(requests("loglikelihood", ("the fox", " ran")))[0][0], abs=1e-6), (
        "nothing is far"
    )
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", (context,)))[0] < 0
    (text,) = lm.generate_until(requests("generate_until", (context, {"until": [], "max_gen_toks": 6})))
    session = pool.open()
    session.begin([TOKENIZER.bos_id, *ids(context)])
    made = list(session.generate(6, temperature=0))
    session.close()
    made = made[: made.index(TOKENIZER.bos_id)] if TOKENIZER.bos_id in made else made
    assert text == TOKENIZER.decode(made)
    assert not pool.sessions, "every request gives its place back"
