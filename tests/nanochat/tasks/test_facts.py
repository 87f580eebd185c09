"""Facts in real text: what is asked for stands in one note, the text is whole, only the note tells the answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataloader import make_source
from nanochat.dataset import docstrings, open_corpus
from nanochat.tasks.facts import PAUSE, FactTask
from nanochat.tasks.recall import RecallTask
from nanochat.tokenizer import Tokenizer

WORDS = 50  # ids 0 to 49 are text, 0 ends a line
NAMES = RecallTask(keys=range(100, 400), aliases=range(400, 700), values=range(700, 732), blocks=8, seed=3)
LEAD, END = (60, 61), (62,)
ENDS_LINE = np.arange(732) == 0


@st.composite
def tasks(draw) -> tuple[FactTask, int]:
    """A task and a length of rows that it fits."""
    notes = draw(st.integers(1, 7))
    task = FactTask(NAMES, LEAD, END, notes, 2 * draw(st.integers(1, 8)), draw(st.integers(1, notes)))
    return task, task.notes * task.note_tokens + task.ending + notes + draw(st.integers(1, 77))


def text_of(task: FactTask, T: int, rows: int) -> np.ndarray:
    return np.random.default_rng(T).integers(0, WORDS, (rows, task.text_tokens(T)))


@settings(max_examples=25)
@given(tasks(), st.integers(0, 10**9))
def test_rows(of, first):
    task, T = of
    indices, text = first + np.arange(3), text_of(task, T, 3)
    made = task.rows("val", indices, text, ENDS_LINE, T)
    alias_of = {alias: key for key, alias in enumerate(NAMES.alias_of_key)}
    for row in range(3):
        tokens, mask, asked = made.tokens[row], made.mask[row], made.asked[row]
        assert len(tokens) == T + 1 and tokens[T] in NAMES.aliases and not mask[T]
        # in order: notes between pieces of text, then episodes with pauses between; read with a slow pointer
        at, read, facts, places, pools = 0, [], {}, {}, []
        front = T - task.ending
        while at < front:
            if tokens[at] != LEAD[0]:
                read.append(tokens[at])
                assert mask[at] and not asked[at]
                at += 1
                continue
            begin = at
            assert tuple(tokens[at:at + 2]) == LEAD and tokens[at + task.note_tokens - 1] == END[0]
            pairs = tokens[at + 2:at + task.note_tokens - 1].reshape(-1, 2)
            assert len(pairs) == task.facts and not mask[at:at + task.note_tokens].any()
            for key, value in pairs:
                assert key - NAMES.keys.start not in facts, "a key stands twice"
                facts[key - NAMES.keys.start], places[key - NAMES.keys.start] = value, begin
            pools.append(sorted(pairs[:, 1]))
            at += task.note_tokens
        assert len(pools) == task.notes and all(pool == pools[0] for pool in pools), "values tell the notes apart"
        assert len(set(pools[0])) == task.facts
        asked_in = []
        for episode in range(task.episodes):
            pairs = tokens[at:at + task.episode_tokens].reshape(-1, 2)
            (place,) = {places[alias_of[alias]] for alias, _ in pairs}
            assert [facts[alias_of[alias]] for alias, _ in pairs] == pairs[:, 1].tolist()
            assert len({alias for alias, _ in pairs}) == task.facts
            assert mask[at:at + task.episode_tokens].tolist() == [False, True] * task.facts
            assert asked[at:at + task.episode_tokens].tolist() == [False] * task.facts + [
                i % 2 == 1 for i in range(task.facts, 2 * task.facts)]
            asked_in.append(place)
            at += task.episode_tokens
            if episode + 1 < task.episodes:
                read += tokens[at:at + PAUSE].tolist()
                assert mask[at:at + PAUSE].all() and not asked[at:at + PAUSE].any()
                at += PAUSE
        assert at == T and read == text[row].tolist(), "the text is not what it was"
        assert len(set(asked_in)) == task.episodes and asked_in[-1] == made.note_at[row]


@given(tasks())
@settings(max_examples=10)
def test_notes_stand_behind_ends_of_lines_as_far_as_there_are_any(of):
    task, T = of
    text = np.ones((1, task.text_tokens(T)), dtype=np.int64)
    ends = np.flatnonzero(np.random.default_rng(T).random(text.shape[1] - (task.episodes - 1) * PAUSE) < 0.2)
    text[0, ends] = 0
    made = task.rows("val", np.array([5]), text, ENDS_LINE, T)
    begins = np.flatnonzero(made.tokens[0] == LEAD[0])
    behind = sum(at > 0 and (made.tokens[0, at - 1] == 0) for at in begins)
    stacked = sum(made.tokens[0, at - 1] == END[0] for at in begins if at)
    assert behind == min(task.notes, len(ends)) and stacked == 0


@given(tasks(), st.integers(0, 99))
@settings(max_examples=10)
def test_a_row_is_a_function_of_its_number(of, first):
    task, T = of
    indices, text = first + np.arange(4), text_of(task, T, 4)
    together = task.rows("train", indices, text, ENDS_LINE, T)
    for i in range(4):
        alone = task.rows("train", indices[i:i + 1], text[i:i + 1], ENDS_LINE, T)
        assert all((a[0] == t[i]).all() for a, t in zip(alone, together))
    held_out = task.rows("val", indices, text, ENDS_LINE, T)
    assert (held_out.tokens != together.tokens).any()


def test_what_does_not_fit_is_refused():
    for wrong, message in (({"facts": 3}, "3 facts"), ({"notes": 0}, "0 notes"), ({"episodes": 13}, "12 notes"),
                           ({"notes": 26}, "26 notes of 12 facts need as many different keys; there are 300")):
        with pytest.raises(UserError, match=message):
            FactTask(NAMES, LEAD, END, **wrong)
    task = FactTask(NAMES, LEAD, END)
    with pytest.raises(UserError, match="rows of 512 tokens: 12 notes of 27 tokens and 192 of questions leave -4"):
        task.text_tokens(512)


PROSE = "A sentence of prose that says what the module is for, and why anybody would want it. " * 4


@pytest.fixture
def corpora(tmp_path, monkeypatch) -> Tokenizer:
    """The embedded corpora, of a few modules."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    modules = tmp_path / "modules"
    modules.mkdir()
    for i in range(12):
        functions = "".join(f'def f{j}(x):\n    """{PROSE}{i} {j}"""\n    return x + {j}\n\n' for j in range(30))
        (modules / f"m{i}.py").write_text(f'"""{PROSE}"""\n' + functions)
    build = dataset.build_stdlib
    monkeypatch.setattr(dataset, "build_stdlib", lambda: build(modules))
    monkeypatch.setitem(dataset.EMBEDDED, "stdlib", lambda: build(modules))
    return Tokenizer.train((d.text for d in open_corpus("stdlib").documents("train")), vocab_size=340)


def test_code_and_prose_in_turn_each_from_its_own_split(corpora):
    T = 1068
    sources = {split: make_source("facts", split, T=T, seed=1, tokenizer=corpora, needles=4)
               for split in ("train", "val")}
    shown = {}
    for split, source in sources.items():
        rows = source.row_tokens(np.arange(6))
        assert rows[0].shape == rows[1].shape == (6, T + 1) and rows[1].any(1).all()
        texts = [corpora.decode([t for t in row if t < corpora.bos_id]) for row in rows[0].tolist()]
        assert all("def " in code or "return" in code for code in texts[::2])
        assert not any("def " in prose for prose in texts[1::2])
        shown[split] = set(texts)
        again = make_source("facts", split, T=T, seed=1, tokenizer=corpora, needles=4)
        assert again.fingerprint == source.fingerprint and (again.row_tokens(np.arange(6))[0] == rows[0]).all()
    assert not shown["train"] & shown["val"]
    other = make_source("facts", "train", T=T, seed=2, tokenizer=corpora, needles=4)
    assert len({s.fingerprint for s in (*sources.values(), other)}) == 3


def test_docstrings_are_held_out_where_their_code_is(corpora):
    for split in ("train", "val"):
        code = {d.source: d.text for d in open_corpus("stdlib").documents(split)}
        prose = {d.source: d for d in open_corpus("docstrings").documents(split)}
        assert prose.keys() == code.keys() and {d.kind for d in prose.values()} == {"prose"}
        for source, document in prose.items():
            assert all(part.strip() in code[source] for part in document.text.split("\n\n"))


def test_docstrings_in_their_order_the_long_ones_without_examples():
    long = PROSE.strip()
    code = (f'"""{long} 1"""\nclass A:\n    """short"""\n    def f(self):\n        """{long} 2"""\n'
            f'def g():\n    """{long}\n\n    >>> g()\n    """\nasync def h():\n    """{long} 3"""\n')
    assert docstrings(code).split("\n\n") == [f"{long} {i}" for i in (1, 2, 3)]
    assert docstrings("def broken(:\n") == docstrings("") == docstrings("x = 1\n") == docstrings("a\0b") == ""
