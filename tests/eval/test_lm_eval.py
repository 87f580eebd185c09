"""Our models under the lm-evaluation-harness: what it asks is answered as the model itself would."""

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from tiny_gpt import tiny_gpt
from tiny_mc import tiny_mc

from mc.session.config import SessionConfig
from mc.session.session import SessionPool
from nanochat.common import UserError
from nanochat.engine import Engine, sample
from nanochat.harness import PlainLM, read_options
from nanochat.tokenizer import Reserved, Tokenizer
from scripts.eval.lm_eval_sessions import SessionLM

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
    "context, continuation",
    [("the fox", " ran"), ("", "a"), ("the fox ", "ran"), ("<|key_1|>", "<|value_2|>"), ("Zoë", "’s")],
)
def test_likelihood_of_a_continuation(context, continuation):
    lm = PlainLM(GPT, TOKENIZER)
    expected = slow_likelihood(
        [TOKENIZER.bos_id, *ids(context + continuation)],
        len(ids(context + continuation)) - len(ids(context.rstrip(" "))),
    )
    ((nats, greedy),) = lm.loglikelihood(requests("loglikelihood", (context, continuation)))
    assert nats == pytest.approx(expected[0], abs=1e-9) and greedy == expected[1] and lm.cut == 0
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
    made = [
        t
        for (t,) in Engine(GPT).generate([prompt], 12, temperature=0, stop_ids=[TOKENIZER.bos_id])
        if t != TOKENIZER.bos_id
    ]
    whole = TOKENIZER.decode(made)
    assert lm.generate_until(requests("generate_until", ("the fox", {"until": [], "max_gen_toks": 12}))) == [whole]
    stop = whole[3:5]
    assert lm.generate_until(requests("generate_until", ("the fox", {"until": stop, "max_gen_toks": 12}))) == [
        whole[: whole.index(stop)]
    ]
    with pytest.raises(UserError, match="generation_kwargs with top_p"):
        lm.generate_until(requests("generate_until", ("a", {"top_p": 0.5})))
    with pytest.raises(UserError, match="leaves nothing of the window"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 128})))


def said(lm, options: dict, pieces: list[bytes]) -> str:
    """The answer of a model that says these pieces, which are what it is asked for at most."""
    tokenizer = Tokenizer(
        [*(bytes([i]) for i in range(256)), *(p for p in pieces if len(p) > 1)], reserved=Reserved(4, 4, 4)
    )
    lm.tokenizer = tokenizer
    ids = [tokenizer._tokens.index(piece) for piece in pieces]
    lm.continuation = lambda context, most, seed, **sampling: iter(ids[:most])
    return lm.generate_until(requests("generate_until", ("a", options)))[0]


@pytest.mark.parametrize(
    "until, answer",
    [
        ([], "a stop here"),
        (None, "a stop here"),
        ("", "a stop here"),
        ([""], "a stop here"),
        (["@@", ""], "a stop here"),
        ("stop", "a "),
        (["stop"], "a "),
        (("stop", "here"), "a "),
        (["top h", "here"], "a s"),
        (["op", "st"], "a "),
        (["top here", "here"], "a s"),
        (["here", "top here"], "a stop "),
        (["a"], ""),
    ],
)
def test_an_answer_ends_before_its_first_stop(until, answer):
    pieces = [b"a", b" s", b"t", b"o", b"p", b" ", b"he", b"re"]
    assert said(PlainLM(GPT, TOKENIZER), {"until": until, "max_gen_toks": 12}, pieces) == answer


def test_of_stops_that_overlap_in_one_token_the_harness_takes_the_first_named():
    pieces = [b"x", b"abc"]
    assert said(PlainLM(GPT, TOKENIZER), {"until": ["bc", "ab"]}, pieces) == "xa"
    assert said(PlainLM(GPT, TOKENIZER), {"until": ["ab", "bc"]}, pieces) == "x"


@pytest.mark.parametrize(
    "options, most",
    [
        ({}, 256),
        ({"max_gen_toks": None}, 256),
        ({"max_gen_toks": 5}, 5),
        ({"max_new_tokens": 5}, 5),
        ({"max_tokens": "5"}, 5),
        ({"max_completion_tokens": 5.0}, 5),
        ({"max_tokens": 7, "max_new_tokens": 5}, 5),
        ({"max_new_tokens": 7, "max_gen_toks": 5}, 5),
        ({"max_length": 7}, 5),
        ({"max_length": 7, "max_gen_toks": 300}, 5),
    ],
)
def test_an_answer_is_as_long_as_the_harness_would_have_it(options, most):
    for kind in (PlainLM(GPT, TOKENIZER, max_length=600), SessionLM(None, TOKENIZER)):
        assert said(kind, {"until": []} | options, [b"z"] * 400) == "z" * most


def test_a_window_too_small_for_the_default_cuts_it_and_says_so_once(capsys):
    lm = PlainLM(GPT, TOKENIZER)
    assert said(lm, {"until": []}, [b"z"] * 400) == said(lm, {"max_gen_toks": 256}, [b"z"] * 400) == "z" * 64
    assert capsys.readouterr().out.count("note: the harness's default of max_gen_toks=256") == 1
    assert (
        said(PlainLM(GPT, TOKENIZER, max_length=512), {}, [b"z"] * 400) == "z" * 256
        and "note" not in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "options, temperature, top_k, top_p",
    [
        ({}, 0, None, 1),
        ({"temperature": 0.7}, 0.7, None, 1),
        ({"temperature": "0.7", "do_sample": True}, 0.7, None, 1),
        ({"temperature": 0.7, "do_sample": False}, 0, None, 1),
        ({"temperature": 0.0, "do_sample": True, "top_p": 0.0}, 0, None, 1),
        ({"do_sample": True}, 0, None, 1),
        ({"do_sample": False, "top_p": 0.95, "top_k": 50}, 0, None, 1),
        ({"temperature": 0.2, "do_sample": True, "top_p": 0.95}, 0.2, None, 0.95),
        ({"temperature": 0.2, "top_k": 50}, 0.2, 50, 1),
        ({"temperature": 0.2, "top_k": 0, "top_p": None, "num_beams": 1}, 0.2, None, 1),
        (
            {
                "temperature": 0.2,
                "top_k": -1,
                "repetition_penalty": 1.0,
                "min_p": 0,
                "length_penalty": 2,
                "early_stopping": True,
            },
            0.2,
            None,
            1,
        ),
    ],
)
def test_an_answer_is_drawn_as_its_options_say(options, temperature, top_k, top_p):
    wanted = read_options(options, 256)
    assert (wanted.temperature, wanted.top_k, wanted.top_p) == (temperature, top_k, top_p)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 10},
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 3},
        {"stop": ["x"]},
        {"until": [1]},
        {"until": {"x": 1}},
        {"max_gen_toks": 0},
        {"max_gen_toks": -1},
        {"max_new_tokens": 2.5},
        {"max_tokens": "many"},
        {"max_gen_toks": True},
        {"temperature": -1},
        {"temperature": float("inf")},
        {"do_sample": "yes"},
        {"top_p": 0.5},
        {"top_k": 3},
        {"max_length": 0},
    ],
)
def test_an_option_that_cannot_be_honoured_is_named_before_anything_is_generated(options):
    lm = PlainLM(GPT, TOKENIZER)
    lm.continuation = None
    with pytest.raises(UserError, match=f"generation_kwargs with {next(iter(options))}=") as caught:
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 3}), ("a", options)))
    assert "\n" not in str(caught.value)


def test_top_p_draws_among_the_fewest_tokens_that_hold_so_much():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    draw = lambda top_p, seed: int(
        sample(logits[:, [2, 0, 3, 1]], 1.0, None, torch.Generator().manual_seed(seed), top_p)
    )
    for top_p, kept in ((0.01, {1}), (0.5, {1}), (0.6, {1, 3}), (0.8, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        assert {draw(top_p, seed) for seed in range(200)} == kept
    with pytest.raises(UserError, match="top_p 0: above 0"):
        Engine(GPT).generate([[1]], 2, top_p=0)


def test_a_request_that_cannot_be_scored_costs_no_other():
    lm = PlainLM(GPT, TOKENIZER)
    lm.score = None
    for bad in (("a", ""), ("", ""), ("", "<|bos|>"), ("a", "b" * 129)):
        with pytest.raises(UserError, match="adds no token|does not fit"):
            lm.loglikelihood(requests("loglikelihood", ("a", "b"), bad))


def test_a_text_that_begins_with_bos_has_one():
    lm = PlainLM(GPT, TOKENIZER)
    for with_bos, without in (
        (("<|bos|>fox", " ran"), ("fox", " ran")),
        (("", "<|bos|>a"), ("", "a")),
        (("a\n", "b"), ("a", "\nb")),
    ):
        assert lm.split(*with_bos) == lm.split(*without)
    heard = []
    lm.continuation = lambda context, most, seed, **sampling: heard.append(context) or iter([])
    lm.generate_until(requests("generate_until", ("<|bos|>a", {"max_gen_toks": 2}), ("a", {"max_gen_toks": 2})))
    assert heard[0] == heard[1]


def test_answers_that_the_harness_has_kept_are_not_asked_again(tmp_path):
    lm = CachingLM(PlainLM(GPT, TOKENIZER), str(tmp_path / "kept.db"))
    pair, text = (
        requests("loglikelihood", ("the fox", " ran")),
        requests("generate_until", ("the fox", {"until": [""], "max_gen_toks": 4})),
    )
    first = lm.loglikelihood(pair), lm.generate_until(text)
    lm.lm.score = lm.lm.continuation = None
    assert (lm.loglikelihood(pair), lm.generate_until(text)) == first


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
    assert short == pytest.approx(
        PlainLM(GPT, TOKENIZER).loglikelihood(requests("loglikelihood", ("the fox", " ran")))[0][0], abs=1e-6
    ), "nothing is far"
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", (context,)))[0] < 0
    (text,) = lm.generate_until(requests("generate_until", (context, {"until": [], "max_gen_toks": 6})))
    session = pool.open()
    session.begin([TOKENIZER.bos_id, *ids(context)])
    made = list(session.generate(6, temperature=0))
    session.close()
    made = made[: made.index(TOKENIZER.bos_id)] if TOKENIZER.bos_id in made else made
    assert text == TOKENIZER.decode(made)
    assert not pool.sessions, "every request gives its place back"


@pytest.mark.parametrize("kind", ["window", "session"])
def test_the_least_top_p_or_top_k_is_the_likeliest_token(kind):
    pool = SessionPool(GPT, tiny_mc(GPT).model, SessionConfig(), trained_lods=[1, 2])
    lm = PlainLM(GPT, TOKENIZER) if kind == "window" else SessionLM(pool, TOKENIZER)
    answer = lambda **how: lm.generate_until(requests("generate_until",
                                                      ("the fox", {"until": [], "max_gen_toks": 8} | how)))
    greedy, drawn = answer(), answer(temperature=1.0)
    assert greedy == answer(temperature=1.0, top_p=1e-9) == answer(temperature=1.0, top_k=1) != drawn
    assert drawn == answer(temperature=1.0, do_sample=True) != answer(temperature=3.0)


def test_requests_whose_context_does_not_fit_are_counted():
    # the tail takes up to 11 entries, a block 4
    pool = SessionPool(GPT, tiny_mc(GPT).model, SessionConfig(budget=15), trained_lods=[1])
    lm = SessionLM(pool, TOKENIZER)
    lm.loglikelihood(requests("loglikelihood", ("the fox", " ran")))
    assert lm.left_out == 0
    lm.loglikelihood(requests("loglikelihood", ("a history, " * 18, " and its end")))
    assert lm.left_out == 1 and not pool.sessions
