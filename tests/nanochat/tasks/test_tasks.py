"""Every generated task is answerable from its text alone, and its rows say where the answer lies."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.tasks.generated import TASKS, task_named, task_rows
from nanochat.tasks.recall import CurriculumSchedule
from nanochat.tasks.schema import Example, batch_of, history_of, ruler_score
from nanochat.tasks.source import TaskSource, most_blocks, parse_mix
from nanochat.tasks.words import Words
from nanochat.tokenizer import Reserved, Tokenizer

LINES = [
    "the quick brown fox jumps over the lazy dog and then it was there",
    "one more line of some words for a small tokenizer",
    "it is the end of the line and the start of another one",
]
TOKENIZER = Tokenizer.train(LINES * 20, 330, Reserved(512, 512, 32))
WORDS = Words.of(TOKENIZER, np.array([i for line in LINES * 40 for i in TOKENIZER.encode(" " + line)]))
NAME = re.compile(r"<\|(key|alias)_(\d+)\|>")
TOKEN = re.compile(r"<\|\w+\|>|[^<]")


def tokens_of(text: str) -> list[str]:
    return TOKEN.findall(text)


def key_of(name: str) -> str:
    """The key that an alias means, or the key itself."""
    kind, number = NAME.fullmatch(name).groups()
    if kind == "key":
        return name
    return f"<|key_{int(np.flatnonzero(WORDS.aliases == TOKENIZER.alias_ids.start + int(number))[0])}|>"


def facts_of(context: str) -> dict[str, list[str]]:
    """name -> everything that ever follows it directly, in order. A name that is itself a value is
    skipped over by the `.` behind it."""
    found, tokens = defaultdict(list), tokens_of(context)
    for name, value in zip(tokens, tokens[1:]):
        if name.startswith(("<|key", "<|alias")) and value.startswith("<|"):
            found[name].append(value)
    return found


def solve(e: Example) -> str:
    """The answer, worked out slowly from the text of context, question and prefix. (topic_lm has none.)"""
    facts, names = facts_of(e.context), NAME.findall(e.question)
    names = [f"<|{kind}_{number}|>" for kind, number in names]
    assert e.answer_prefix == "=" + (names[0] if names else "")
    if e.task in ("frequent", "common"):
        counts = Counter(re.findall(r"<\|value_\d+\|>", e.context)).most_common()
        assert counts[e.max_new_tokens - 1][1] > counts[e.max_new_tokens][1]
        top = [word for word, _ in counts[: e.max_new_tokens]]
        return "".join(top if e.task == "frequent" else sorted(top, key=lambda word: int(word[8:-2])))
    if e.task == "topic":
        counts = Counter(int(number) // 64 for number in re.findall(r"<\|key_(\d+)\|>", e.context)).most_common()
        assert counts[0][1] > counts[1][1]
        return f"<|value_{counts[0][0]}|>"
    if e.task in ("vt1", "vt2", "qa2"):
        walk = names[:1]
        while not walk[-1].startswith("<|value"):
            walk.append(facts[walk[-1]][-1])
        return "".join(walk[1:])
    if e.task == "niah_multivalue":
        return "".join(sorted(facts[names[0]], key=lambda word: int(word[8:-2])))
    if e.task in ("passkey", "copy"):
        after = tokens_of(e.context[e.context.index(names[0]) + len(names[0]) :])
        return "".join(after[: e.max_new_tokens])
    if e.task == "alias":
        return "".join(name + facts[key_of(name)][-1] for name in names)[len(names[0]) :]
    return "".join(name + facts[name][-1] for name in names)[len(names[0]) :]


SIZES = {"topic": [608, 1056, 2080, 37 * 32], "topic_lm": [608, 1056, 2080, 37 * 32],
         "frequent": [256, 352, 1056, 2080]}


@pytest.mark.parametrize("name", TASKS)
def test_the_text_alone_gives_the_answer(name):
    for n in SIZES.get(name, [352, 608, 1056, 2080]):
        batch = task_rows(name, WORDS, "val", np.arange(5), n, seed=n)
        H = TASKS[name].answer_tokens
        assert batch.tokens.shape == batch.targets.shape == (5, n + H) and batch.tokens.dtype == batch.targets.dtype == np.int64  # noqa: E501
        for tokens, targets, e in zip(batch.tokens, batch.targets, batch.examples):
            assert TOKENIZER.encode(e.context + e.question + e.answer_prefix + e.answer,
                                    special=True) == tokens.tolist(), (
                "text and tokens are one"
            )
            assert TOKENIZER.decode(tokens[:n]) == e.context + e.question + e.answer_prefix and tokens[0] == TOKENIZER.bos_id  # noqa: E501
            if name != "topic_lm":
                assert e.answer == solve(e)
            assert e.max_new_tokens == H and ruler_score(e.answer, e.references) == 1
            judged = targets[n - 1 : -1]
            assert (targets[: n - 1] == -1).all() and targets[-1] == -1
            assert ((judged == -1) | (judged == tokens[n:])).all() and judged[0] == tokens[n]
            assert [TOKENIZER.decode([t]) for t in judged[judged >= 0]] == list(e.references)
            check_evidence(e, tokens, targets, n)


@pytest.mark.parametrize("name", ["frequent", "common"])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_as_many_of_the_most_frequent_words_as_are_asked_for(name, top):
    for e in task_rows(name, WORDS, "val", np.arange(20), 1056, top=top).examples:
        assert e.max_new_tokens == top and e.answer == solve(e)


def check_evidence(e: Example, tokens, targets, n: int):
    if TASKS[e.task].one_question:
        assert e.evidence == () and e.depth is None
        return
    assert list(e.evidence) == sorted(set(e.evidence)) and e.evidence[-1] < n - TASKS[e.task].question_tokens
    assert set(targets[targets >= 0].tolist()) <= set(tokens[list(e.evidence)].tolist()), (
        "every token that is asked for stands in the evidence"
    )
    assert e.depth == e.evidence[0] / (n - TASKS[e.task].question_tokens)


@given(
    st.sampled_from([n for n in TASKS if not TASKS[n].one_question and not hasattr(TASKS[n], "hops")]),
    st.floats(0, 1),
    st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_the_answer_lies_where_it_is_asked_for(name, depth, row):
    e = task_rows(name, WORDS, "val", [row], 1056, depth=depth).examples[0]
    assert e.answer == solve(e)
    if name not in ("overwrite", "qa1"):  # there the last of several
        m = e.length - TASKS[name].question_tokens
        assert min(abs(place / m - depth) for place in e.evidence) < 0.08, "one of the facts it takes"


@pytest.mark.parametrize("name", ["mqar", "passkey", "niah_multikey", "copy"])
@pytest.mark.parametrize("block_size", [8, 32])
def test_facts_may_straddle_the_edge_of_a_block(name, block_size):
    options = dict(length=4) if name == "copy" else {}
    for e in task_rows(name, WORDS, "val", np.arange(6), 640, block_size=block_size, straddle=True, **options).examples:
        assert e.answer == solve(e) if name != "copy" else e.answer in e.context
        first = [place for place in e.evidence if place - 1 not in e.evidence]
        assert first and all((place + 1) % block_size == 0
                             for place in first), "the name ends a block, its value begins the next"
    plain = task_rows("mqar", WORDS, "val", np.arange(6), 640, block_size=block_size).examples
    assert all(place % block_size != block_size - 1 or place - 1 in e.evidence for e in plain
               for place in e.evidence), (
        "and do not by default"
    )


def test_long_histories_repeat_names_that_are_not_asked_for():
    for name in ("mqar", "alias", "overwrite"):
        for e in task_rows(name, WORDS, "val", np.arange(3), 6400).examples:
            facts = facts_of(e.context)
            asked = [key_of(f"<|{kind}_{number}|>") for kind, number in NAME.findall(e.question)]
            assert all(len(facts[key]) == task_named(name).updates for key in asked) and e.answer == solve(e)


@pytest.mark.parametrize("name", TASKS)
def test_rows_depend_on_seed_split_task_and_row_alone(name):
    rows = task_rows(name, WORDS, "train", [7, 3, 10**12], 1056, seed=5).tokens
    assert (task_rows(name, WORDS, "train", [3], 1056, seed=5).tokens == rows[1]).all()
    assert (task_rows(name, WORDS, "train", [10**12], 1056, seed=5,
                      horizon=20).tokens[0, : rows.shape[1]] == rows[2]).all()
    for other in (task_rows(name, WORDS, "val", [3], 1056, seed=5), task_rows(name, WORDS, "train", [3], 1056, seed=6)):
        assert (other.tokens != rows[1]).any(), "another split or seed gives another row"


def test_splits_are_disjoint():
    for name in TASKS:
        made = {
            split: {row.tobytes()
                    for row in task_rows(name, WORDS, split, np.arange(40), 608 if "topic" in name else 352).tokens}
            for split in ("train", "val")
        }
        assert len(made["train"]) == len(made["val"]) == 40 and not made["train"] & made["val"]


@pytest.mark.parametrize("T", [1088, 703])
def test_training_rows_answer_what_they_ask(T):
    """Read as text, every counted answer of a training row is the one that its context gives."""
    schedule = CurriculumSchedule(most_blocks(T), grow=0.5)
    for name in TASKS:
        source = TaskSource({name: 1.0}, WORDS, T, "train", 1, schedule, 100)
        tokens, counted = source.row_tokens(np.array([0, 30, 60, 99]))
        assert tokens.shape == counted.shape == (4, T + 1) and (counted.sum(1) > 0).all() and not counted[:, 0].any()
        task = TASKS[name]
        if task.one_question:
            continue
        for row, count in zip(tokens, counted):
            text = TOKENIZER.decode(row)
            context, *questions = re.split(re.escape(task.mark), text)
            assert questions
            for question in questions:
                ask, _, rest = question.partition("=")
                names = [f"<|{kind}_{number}|>" for kind, number in NAME.findall(ask)]
                e = Example(context, ask, "=" + names[0], rest[len(names[0]) :], task.answer_tokens, name)
                assert e.answer == solve(e)
            marks = np.flatnonzero(np.isin(row, TOKENIZER.encode("=")))
            assert not count[marks].any() and not count[: marks[0]].any()
    full = TaskSource({"mqar": 1.0}, WORDS, 1088, "val", 1).row_tokens(np.arange(3))[0]
    assert (full[:, :1024] != TOKENIZER.bos_id).sum(1).min() > 1020, "without a curriculum contexts are full"


def test_the_mix_is_kept_and_named():
    source = TaskSource(parse_mix("mqar=3,topic"), WORDS, 1088, "train", 1)
    drawn = Counter(source.task_of(row) for row in range(2000))
    assert set(drawn) == {"mqar", "topic"} and abs(drawn["mqar"] / 2000 - 0.75) < 0.04
    assert source.fingerprint != TaskSource(parse_mix("mqar,topic"), WORDS, 1088, "train", 1).fingerprint
    assert parse_mix("") == dict.fromkeys(TASKS, 1 / len(TASKS))
    for bad in ("nonsense", "mqar=none", "mqar=0", "mqar=nan"):
        with pytest.raises(UserError, match="tasks"):
            parse_mix(bad)


def test_what_cannot_be_made_is_refused_in_one_line():
    for call in (
        lambda: task_rows("mqar", WORDS, "val", [0], 100),
        lambda: task_rows("none", WORDS, "val", [0], 96),
        lambda: task_rows("vt1", WORDS, "val", [0], 1056, depth=0.5),
        lambda: task_rows("frequent", WORDS, "val", [0], 1056, depth=0.5),
        lambda: task_rows("frequent", WORDS, "val", [0], 32, top=3),
        lambda: task_rows("niah_single", WORDS, "val", [0], 96, facts=40),
        lambda: task_rows("mqar", WORDS, "val", [0], 1056, depth=2.0),
        lambda: task_rows("mqar", WORDS, "val", [0], 1056, colour=1),
        lambda: task_rows("copy", WORDS, "val", [0], 1056, horizon=8),
        lambda: task_rows("passkey", WORDS, "val", [0], 1056, values=2),
        lambda: Words.of(TOKENIZER, np.array([1, 2])),
        lambda: TaskSource({"mqar": 1.0}, WORDS, 40, "val", 1),
        lambda: batch_of([], TOKENIZER, 8),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_no_block_gives_the_shared_topic_away():
    topic_of_block = []
    for example in task_rows("topic", WORDS, "val", np.arange(200), 1056).examples:
        context = np.array([int(number) // 64 for number in re.findall(r"<\|key_(\d+)\|>", example.context)])
        topic_of_block.append([context[place] == np.bincount(context).argmax()
                               for place in range(40, len(context),
                                                  32)] + [context[-1] == np.bincount(context).argmax()])
    share = np.mean(topic_of_block, 0)
    assert (np.abs(share - share.mean()) < 0.15).all(), share


def test_examples_of_any_length_become_one_batch():
    examples = [Example("the fox and ", "who?", " the", " dog", 4, "made"),
                Example("it", " is", "", "<|key_3|>!", 4, "made")]
    batch = batch_of(examples, TOKENIZER, 8)
    assert batch.n % 8 == 0 and batch.tokens.shape == batch.targets.shape
    for row, targets, e in zip(batch.tokens, batch.targets, examples):
        history, answer = (TOKENIZER.encode(text, special=True)
                           for text in (e.context + e.question + e.answer_prefix, e.answer))
        assert row[batch.n
                   - len(history) : batch.n].tolist() == history and (row[: batch.n
                                                                          - len(history)] == TOKENIZER.bos_id).all()
        assert targets[batch.n - 1 :][: len(answer)].tolist() == answer and (targets >= 0).sum() == len(answer)
    with pytest.raises(UserError, match="empty answer"):
        batch_of([Example("a", "b", "", "", 1, "made")], TOKENIZER, 8)


@pytest.mark.parametrize("most", [9, 10, 24, 32])
def test_a_history_that_is_too_long_loses_the_middle_of_its_context(most):
    example = Example(" ".join(f"the {i}" for i in range(20)), " who?", " the", " dog", 4, "made")
    context, asked = (TOKENIZER.encode(text, special=True)
                      for text in (example.context, example.question + example.answer_prefix))
    found = history_of(example, TOKENIZER, most)
    assert len(found) == most and found[-len(asked):] == asked
    kept = found[:-len(asked)]
    assert kept == context[: len(kept) // 2] + context[len(context) - (len(kept) + 1) // 2 :]
    assert batch_of([example], TOKENIZER, 8, most).tokens[0, : -(-most // 8) * 8][-most:].tolist() == found
    assert history_of(example, TOKENIZER, 1000) == history_of(example, TOKENIZER)
    with pytest.raises(UserError, match="leaves no context"):
        history_of(example, TOKENIZER, len(asked) + 1)


def test_scores_are_rulers():
    assert ruler_score("It was THE Cat.", ["the cat"]) == 1 and ruler_score("a b", ["A", "c"]) == 0.5
    assert ruler_score("a b", ["", "c"], part=True) == 0 and ruler_score("a b", ["", "b", "c"]) == 0.5
    assert ruler_score("red", [" red "]) == 1 and ruler_score("Zoe\u0308", ["zo\u00eb"]) == 1
    with pytest.raises(UserError, match="missing or empty"):
        ruler_score("x", ["", " "])
    assert ruler_score("a b", ["A", "c"], part=True) == 1 and ruler_score("", ["x"], part=True) == 0
    with pytest.raises(UserError, match="without references"):
        ruler_score("x", [])
