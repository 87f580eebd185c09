"""Tasks of every kind that the lm-evaluation-harness has, on small local data: what it asks, taken from its own log, is
answered as one forward pass a token answers it, whether the model has a window or a session."""

import json

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")
import yaml
from lm_eval.tasks import TaskManager
from tiny_gpt import tiny_gpt
from tiny_mc import tiny_mc

from mc.session.config import SessionConfig
from mc.session.session import SessionPool
from nanochat.common import UserError
from nanochat.harness import PlainLM
from nanochat.tokenizer import Reserved, Tokenizer
from scripts.eval.lm_eval_sessions import SessionLM
from scripts.run_lm_eval import loads_checked

MERGES = [b"wa", b"te", b"wate", b"water", b" h", b"ou", b"se", b" hou"]
TOKENIZER = Tokenizer([*(bytes([i]) for i in range(256)), *MERGES], reserved=Reserved(4, 4, 4))
BOS = TOKENIZER.bos_id
GPT = tiny_gpt(vocab_size=TOKENIZER.vocab_size, sequence_len=128, n_kv_head=4, rope_fraction=0.5)
ROWS = {
    "choice": [
        {"q": "The fox", "c": ["ran", "sat", "ran"], "a": 0},
        {"q": "", "c": ["ran", "a"], "a": 1},
        {"q": "ends in a line\n", "c": ["ran", "\tsat"], "a": 0},
        {"q": "<|bos|>begins", "c": ["<|key_1|>", "Zoë’s"], "a": 0},
        {"q": "  ", "c": ["x", "y"], "a": 0},
    ],
    "join": [
        {"q": "wate", "c": ["r", "xyz"], "a": 0},
        {"q": "the hou", "c": ["se", "xyz", " water"], "a": 0},
        {"q": "wa", "c": ["te", "ter", "terse"], "a": 1},
    ],
    "fill": [{"c": ["The fox", "The dog"], "q": "ran away.", "a": 1}, {"c": ["It is ", "It was"], "q": "so", "a": 0}],
    "likelihood": [{"q": "The red fox", "a": "ran"}, {"q": "", "a": "water"}, {"q": "x " * 80, "a": "y"}],
    "rolling": [{"q": "some text goes on and on. " * 8}, {"q": "x"}, {"q": ""}, {"q": "Zoë’s 狐"}],
    "answer": [{"q": "The fox"}, {"q": ""}, {"q": "wate"}],
}
CHOICES = {"output_type": "multiple_choice", "doc_to_choice": "{{c}}", "doc_to_target": "{{a}}"}
TASKS = {
    "choice": CHOICES
    | {"doc_to_text": "{{q}}", "metric_list": [{"metric": m} for m in ("acc", "acc_norm", "acc_mutual_info")]},
    "join": CHOICES | {"doc_to_text": "{{q}}", "target_delimiter": "", "metric_list": [{"metric": "acc"}]},
    "fill": CHOICES | {"doc_to_text": "{{a}}", "doc_to_target": "{{q}}", "metric_list": [{"metric": "acc"}]},
    "likelihood": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": m} for m in ("byte_perplexity", "bits_per_byte")],
    },
}
GENERATION = {  # what the harness's own files write, and their neighbours
    "plain": {"until": [], "max_gen_toks": 6},
    "empty_stop": {"until": ["@@", ""], "max_gen_toks": 6},
    "no_stop": {"until": None, "max_gen_toks": 6},
    "new_tokens": {"until": [], "max_new_tokens": 5, "num_beams": 1, "temperature": 0.0},
    "twice": {"until": [], "max_gen_toks": 3, "max_tokens": 9},
    "cold": {"until": [], "max_gen_toks": 4, "do_sample": False, "temperature": 1.0, "top_p": 0.95},
    "hot_at_zero": {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 0.0},
    "together": {"until": [], "max_length": 40},
    "beams_off": {"until": [], "max_gen_toks": 4, "repetition_penalty": 1.0, "top_k": None, "length_penalty": 0.6},
}


def split(context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As `lm_eval.api.model.TemplateLM` cuts a request; encoded apart where it would have nothing to score."""
    encode = lambda text: TOKENIZER.encode(text, special=True)
    if context == "":
        ids = encode(continuation)
        return ([BOS], ids) if ids[0] != BOS else (ids[:1], ids[1:])
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation, context = context[-spaces:] + continuation, context[:-spaces]
    before = encode(context)
    after = encode(context + continuation)[len(before) :] or encode(continuation)
    return ([] if before[:1] == [BOS] else [BOS]) + before, after


@torch.inference_mode()
def slow(before: list[int], after: list[int]) -> tuple[float, bool]:
    """Nats of `after`, and whether it is what a greedy reader says: one forward pass a token, of at most 128."""
    row, nats, greedy = [*before, *after], 0.0, True
    start = max(0, len(row) - 1 - 128)
    for at in range(len(before), len(row)):
        logits = GPT(torch.tensor([row[start:at]]))[0, -1].double()
        nats += float(logits.log_softmax(-1)[row[at]])
        greedy &= int(logits.argmax()) == row[at]
    return nats, greedy


@torch.inference_mode()
def slow_answer(context: str, count: int) -> str:
    ids = TOKENIZER.encode(context, special=True)
    row = made = [BOS, *ids]
    while len(made) - len(row) < count:
        made = [*made, int(GPT(torch.tensor([made]))[0, -1].argmax())]
        if made[-1] == BOS:
            return TOKENIZER.decode(made[len(row) : -1])
    return TOKENIZER.decode(made[len(row) :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tasks' YAML, each with its rows."""
    path = tmp_path_factory.mktemp("tasks")
    generate = {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "x",
        "metric_list": [{"metric": "exact_match"}],
    }
    tasks = TASKS | {name: generate | {"generation_kwargs": options} for name, options in GENERATION.items()}
    tasks |= {
        "beams": generate | {"generation_kwargs": {"num_beams": 10}},
        "unset": generate | {"doc_to_text": "{{missing}}"},
    }
    tasks |= {
        "drawn": generate
        | {"generation_kwargs": {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}, "repeats": 3}
    }
    for name, rows in ROWS.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in tasks.items():
        data = {
            "data_files": {"test": f"{path}/{name if name in ROWS else 'answer'}.jsonl"},
            "cache_dir": f"{path}/cache",
        }
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": data,
            "test_split": "test",
            "metadata": {"version": 1},
        } | task
        (path / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    return path


def make_lm(kind: str, seed: int = 0):
    if kind == "window":
        return PlainLM(GPT, TOKENIZER, seed=seed)
    return SessionLM(SessionPool(GPT, tiny_mc(GPT).model, SessionConfig(), trained_lods=[1, 2]), TOKENIZER, seed)


def ask(lm, folder, names) -> dict:
    """task -> [(arguments, responses)] of its requests, and its results under "results"."""
    found = lm_eval.simple_evaluate(
        lm,
        tasks=list(names),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    asked = {
        name: [pair for s in samples for pair in zip(s["arguments"], s["resps"])]
        for name, samples in found["samples"].items()
    }
    return asked | {"results": found["results"]}


@pytest.fixture(scope="module", params=["window", "session"])
def answered(request, folder):
    lm = make_lm(request.param)
    return lm, ask(lm, folder, [*TASKS, *GENERATION])


def near(lm, tokens: int) -> bool:
    """Whether a session shows all of a history of so many tokens raw, so that it says what the model itself says."""
    return isinstance(lm, PlainLM) or tokens < 24


@pytest.mark.parametrize("name", ["choice", "join", "fill", "likelihood"])
def test_likelihoods_are_those_of_one_pass_a_token(answered, name):
    lm, found = answered
    checked = 0
    for (context, continuation), [(nats, greedy)] in found[name]:
        before, after = split(context, continuation)
        assert nats < 0 and type(greedy) is bool
        if near(lm, len(before) + len(after)):
            assert (nats, greedy) == (pytest.approx(slow(before, after)[0], abs=1e-6), slow(before, after)[1]), (
                context,
                continuation,
            )
            checked += 1
    assert checked >= 2 and all(
        0 <= value <= 1 for key, value in found["results"][name].items() if key.startswith("acc,")
    )


def test_a_choice_that_completes_its_contexts_last_token_is_encoded_apart(answered):
    lm, found = answered
    assert lm.apart == 3, "wate|r, wa|te and wa|ter are one token each"
    scores = {args: resps[0][0] for args, resps in ((tuple(a), r) for a, r in found["join"])}
    assert scores["wate", "r"] == pytest.approx(
        slow([BOS, *TOKENIZER.encode("wate")], TOKENIZER.encode("r"))[0], abs=1e-6
    )


def test_documents_are_rolled_over_once(answered):
    lm, found = answered
    documents = [(text, nats) for (text,), [nats] in found["rolling"]]
    assert [type(nats) for _, nats in documents] == [float] * 4 and dict(documents)[""] == 0
    for text, nats in documents:
        ids = TOKENIZER.encode(text)
        if near(lm, len(ids)) and len(ids) <= 128:
            assert nats == pytest.approx(slow([BOS], ids)[0], abs=1e-6)
        elif isinstance(lm, PlainLM):
            first, rest = ids[:128], ids[128:]
            assert nats == pytest.approx(
                slow([BOS], first)[0] + slow(ids[: len(ids) - len(rest)][-(129 - len(rest)) :], rest)[0], abs=1e-6
            )
    assert found["results"]["rolling"]["bits_per_byte,none"] > 0


@pytest.mark.parametrize("name", GENERATION)
def test_answers_are_as_long_as_their_options_say(answered, name):
    lm, found = answered
    options = GENERATION[name]
    for (context, _), [text] in found[name]:
        most = options.get("max_gen_toks", options.get("max_new_tokens"))
        most = most or options["max_length"] - 1 - len(TOKENIZER.encode(context))
        if near(lm, most + len(TOKENIZER.encode(context))):
            assert text == slow_answer(context, most), (name, context)
        assert text


def test_a_question_that_is_repeated_is_drawn_anew_and_the_same_again(folder):
    texts = [[texts for _, texts in ask(make_lm("window", seed), folder, ["drawn"])["drawn"]] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(each) == 3 and len(set(each)) > 1 for each in texts[0])


@pytest.mark.parametrize(
    "name, says",
    [
        ("beams", "^task beams: generation_kwargs with num_beams=10: this adapter knows"),
        ("unset", "^--tasks=likelihood,unset: the harness cannot load them .UndefinedError: 'missing' is undefined"),
    ],
)
def test_a_task_that_cannot_be_run_is_named_before_any_is_asked(folder, name, says):
    manager, lm = TaskManager(include_path=str(folder), include_defaults=False), make_lm("window")
    loads_checked(manager, lm)
    lm.score = None
    with pytest.raises(UserError, match=says) as caught:
        lm_eval.simple_evaluate(lm, tasks=["likelihood", name], task_manager=manager, bootstrap_iters=0)
    assert "\n" not in str(caught.value)
    assert manager.load(["likelihood", "plain"])["tasks"].keys() == {"likelihood", "plain"}
