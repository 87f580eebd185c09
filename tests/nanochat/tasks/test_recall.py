"""The synthetic recall task is answerable from what a row stores, and from nothing else."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.tasks.recall import CurriculumSchedule, RecallTask

IDS = dict(keys=range(2049, 2561), aliases=range(2561, 3073), values=range(3073, 3105))


def key_of(task: RecallTask, alias: int) -> int:
    return task.keys.start + int(np.flatnonzero(task.alias_of_key == alias)[0])


def check_row(task: RecallTask, tokens, mask, num_blocks, episode_blocks, T):
    stored_end = num_blocks * task.block
    stored = tokens[:stored_end].reshape(-1, 2)
    facts = dict(stored.tolist())
    assert len(facts) == num_blocks * task.pairs_per_block, "all keys of a row are different"
    assert set(facts) <= set(task.keys) and set(facts.values()) <= set(task.values)
    assert not set(stored.ravel().tolist()) & set(task.aliases), "no alias is stored"
    assert tokens[T] in task.aliases and not mask[T]
    questions = tokens[stored_end:T].reshape(-1, 2)
    assert all(facts[key_of(task, alias)] == value for alias, value in questions.tolist())
    assert mask.sum() == len(questions) and mask[stored_end + 1 : T : 2].all()
    block_of = {key: i // task.pairs_per_block for i, (key, _) in enumerate(stored.tolist())}
    size = task.episode // 2
    for end in range(len(questions), 0, -size):
        episode = questions[max(0, end - size) : end]
        assert len(set(episode[:, 0].tolist())) == len(episode), "no key twice in an episode"
        blocks = [block_of[key_of(task, alias)] for alias in episode[:, 0]]
        assert len(set(blocks)) <= task.episode_blocks
        if len(episode) == size:
            announced, asked = blocks[: task.announce // 2], blocks[task.announce // 2 :]
            assert not announced or set(asked) <= set(announced), "what is announced tells where the answers lie"
            assert end < len(questions) or set(asked) == set(episode_blocks.tolist())


@given(st.integers(0, 10**12),
       st.sampled_from([(2, 1088), (7, 1088), (32, 1088), (31, 1100), (16, 1024), (2, 130), (5, 4096)]))
@settings(max_examples=25, deadline=None)
def test_every_asked_value_is_stored(first, shape):
    num_blocks, T = shape
    task = RecallTask(**IDS, seed=3)
    rows = task.rows("train", np.arange(first, first + 3), num_blocks, T)
    assert rows.tokens.shape == rows.mask.shape == (3, T + 1) and rows.tokens.dtype == np.int64
    for i in range(3):
        check_row(task, rows.tokens[i], rows.mask[i], num_blocks, rows.episode_blocks[i], T)


@pytest.mark.parametrize(
    "sizes", [dict(block=8, blocks=128), dict(announce=0), dict(episode_blocks=1, announce=8, ask=8),
              dict(announce=4, ask=60), dict(episode_blocks=4)]
)
def test_other_sizes(sizes):
    task = RecallTask(**IDS, **({"announce": 8, "ask": 8} if "block" in sizes else {}) | sizes)
    rows = task.rows("val", np.arange(4), task.blocks, task.blocks * task.block + 2 * task.episode)
    for i in range(4):
        check_row(task, rows.tokens[i], rows.mask[i], task.blocks, rows.episode_blocks[i], rows.tokens.shape[1] - 1)


def test_layout_of_the_main_job():
    rows = RecallTask(**IDS).rows("val", np.arange(2), 32, 1088)
    assert not rows.mask[:, :1024].any() and rows.mask[:, 1056:1088].sum() == 2 * 16
    assert rows.episode_blocks.shape == (2, 2) and (np.diff(rows.episode_blocks) > 0).all()


def test_a_row_depends_on_seed_split_and_index_only():
    task = RecallTask(**IDS)
    blocks = np.array([2, 32, 8, 16, 5])
    together = task.rows("train", np.array([5, 1, 9, 7, 2]), blocks, 1088)
    for i, index in enumerate([5, 1, 9, 7, 2]):
        alone = task.rows("train", np.array([index]), int(blocks[i]), 1088)
        for one, many in zip(alone, together):
            assert np.array_equal(one[0], many[i])
    assert not np.array_equal(task.rows("val", np.array([5]), 2, 1088).tokens[0], together.tokens[0])
    assert not np.array_equal(RecallTask(**IDS, seed=1).rows("train", np.array([5]), 2, 1088).tokens[0],
                              together.tokens[0])
    assert np.array_equal(task.alias_of_key, RecallTask(**IDS).alias_of_key)
    assert sorted(task.alias_of_key) == list(task.aliases)


def test_draws_are_uniform():
    """Chance level is 1/32 for values and blocks: nothing but the stored pairs tells an answer."""
    task = RecallTask(**IDS)
    rows = task.rows("train", np.arange(500), 32, 1088)
    values = np.bincount(rows.tokens[rows.mask] - task.values.start, minlength=32)
    assert values.min() > 0.8 * values.mean() and values.max() < 1.2 * values.mean()
    blocks = np.bincount(rows.episode_blocks.ravel(), minlength=32)
    assert blocks.min() > 10 and blocks.max() < 60
    assert len(np.unique(rows.tokens[:, 0])) > 250


@pytest.mark.parametrize("needles", [1, 2, 5, 32])
def test_needles_in_a_long_history(needles):
    task, filler, n = RecallTask(**IDS), np.arange(700) % 2048, 64 * 1024
    rows = task.needle_rows("val", np.arange(3), filler, n, needles)
    for i in range(3):
        tokens, mask = rows.tokens[i], rows.mask[i]
        blocks = tokens[:n].reshape(-1, task.block)
        planted = np.flatnonzero((blocks >= task.keys.start).any(axis=1))
        assert len(planted) == needles and set(rows.episode_blocks[i]) <= set(planted)
        assert len(rows.episode_blocks[i]) == min(needles, 2)
        facts = {k: (v, b) for b in planted for k, v in blocks[b].reshape(-1, 2).tolist()}
        assert len(facts) == needles * 16
        questions = tokens[n:-1].reshape(-1, 2).tolist()
        assert len(questions) == (16 if needles == 1 else 32) == mask.sum()
        assert len({alias for alias, _ in questions}) == len(questions)
        for alias, value in questions:
            answer, block = facts[key_of(task, alias)]
            assert answer == value and block in rows.episode_blocks[i]
        assert not mask[:n].any() and mask[n + 1 : -1 : 2].all()
        text = blocks[np.setdiff1d(np.arange(len(blocks)), planted)].ravel()
        assert (text < 2048).all()


def test_schedule_grows_then_half_the_rows_store_the_most():
    schedule = CurriculumSchedule(seed=1)
    early = schedule.num_blocks(np.linspace(0, 0.499, 100), np.arange(100))
    assert (np.diff(early) >= 0).all() and sorted(set(early.tolist())) == [2, 4, 8, 16, 32]
    late = schedule.num_blocks(0.7, np.arange(3000))
    assert set(late.tolist()) == {8, 16, 32} and abs((late == 32).mean() - 0.5) < 0.05
    assert (schedule.num_blocks(0.7, np.arange(100, 200)) == late[100:200]).all()
    assert CurriculumSchedule(blocks=24).num_blocks(0.49, 0) == 24
    assert set(CurriculumSchedule(grow=0).num_blocks(0.0, np.arange(50)).tolist()) == {8, 16, 32}
    assert CurriculumSchedule(blocks=2).num_blocks(0.9, np.arange(5)).max() == 2


@pytest.mark.parametrize(
    "bad, message",
    [
        (dict(blocks=33), "528 different keys, there are 512"),
        (dict(block=31), "block=31"),
        (dict(ask=0), "ask=0"),
        (dict(announce=-2), "announce=-2"),
        (dict(episode_blocks=0), "episode_blocks=0"),
        (dict(ask=64), "asks for 48 pairs, its 2 blocks hold 32"),
        (dict(aliases=range(10)), "512 keys, 10 aliases"),
    ],
)
def test_impossible_tasks_are_refused(bad, message):
    with pytest.raises(UserError, match=message):
        RecallTask(**IDS | bad)


def test_impossible_rows_are_refused():
    task = RecallTask(**IDS)
    for num_blocks, T, message in [(32, 1086, "got T=1086"), (2, 129, "got T=129"), (1, 1088, "asked for 1 to 1"),
                                   (33, 2048, "33 to 33")]:
        with pytest.raises(UserError, match=message):
            task.rows("train", np.arange(2), num_blocks, T)
    filler = np.arange(100)
    for n, needles, message in [(1000, 1, "n=1000"), (32, 2, "room for 2"), (3200, 33, "33 needles"),
                                (3200, 0, "0 needles")]:
        with pytest.raises(UserError, match=message):
            task.needle_rows("val", np.arange(2), filler, n, needles)
    with pytest.raises(UserError, match="filler"):
        task.needle_rows("val", np.arange(2), filler[:0], 320)
    with pytest.raises(UserError, match="curriculum"):
        CurriculumSchedule(blocks=1)


@given(st.integers(0, 10**6), st.sampled_from([(512, 6), (64, 2), (4160, 3), (12, 6)]))
@settings(max_examples=15, deadline=None)
def test_a_stream_holds_each_fact_once_where_it_should(first, shape):
    blocks, Q = shape
    task = RecallTask(**IDS, seed=3)
    rng = np.random.default_rng(first)
    places = np.stack([rng.permutation(blocks)[: 2 * Q].reshape(Q, 2) for _ in range(2)])
    stream = task.stream_rows("val", np.arange(first, first + 2), 32 * blocks, places)
    assert stream.tokens.shape == (2, 32 * blocks) and stream.questions.shape == (2, Q,
                                                                                  64) and stream.tokens.dtype == np.int64  # noqa: E501
    for tokens, questions, row in zip(stream.tokens, stream.questions, places):
        pairs = tokens.reshape(blocks, 16, 2)
        assert np.isin(pairs[..., 0], task.keys).all() and np.isin(pairs[..., 1], task.values).all()
        assert all(len(set(block[:, 0].tolist())) == 16 for block in pairs[:50])
        asked_keys = []
        for question, where in zip(questions, row):
            facts = dict(pairs[where].reshape(-1, 2).tolist())
            keys = [key_of(task, alias) for alias in question[::2].tolist()]
            assert [facts[key] for key in keys] == question[1::2].tolist() and len(set(keys)) == 32
            halves = [{np.flatnonzero((pairs[where, :, 0] == key).any(1))[0] for key in half}
                      for half in (keys[:16], keys[16:])]
            assert halves[0] == halves[1] == {0, 1}, "what is announced tells where the answers lie"
            asked_keys += keys
        counts = np.bincount(pairs[..., 0].ravel(), minlength=task.keys.stop)
        assert (counts[asked_keys] == 1).all() and counts.sum() == 16 * blocks
        rest = counts[sorted(set(task.keys) - set(asked_keys))]
        assert blocks < 500 or (rest > 1).all(), "distractors come again and again"
    again = task.stream_rows("val", np.arange(first + 1, first + 2), 32 * blocks, places[1:])
    assert np.array_equal(again.tokens[0], stream.tokens[1]) and np.array_equal(again.questions[0], stream.questions[1])


def test_a_stream_in_text():
    task, filler = RecallTask(**IDS, seed=3), np.arange(1000)
    stream = task.stream_rows("val", np.arange(2), 32 * 40, np.array([[[0, 39]], [[5, 6]]]), filler)
    for tokens, places in zip(stream.tokens.reshape(2, 40, 32), ([0, 39], [5, 6])):
        facts = (tokens >= 2049).all(1)
        assert np.flatnonzero(facts).tolist() == places
        flat, is_text = tokens.ravel(), np.repeat(~facts, 32)
        shift = (flat[is_text] - np.flatnonzero(is_text)) % 1000
        assert (shift == shift[0]).all(), "one piece of text, but for the facts"


@pytest.mark.parametrize("n, places, message", [
    (100, [[[0, 1]]], "multiple of the block"), (320, [[[0, 10]]], "blocks 0 to 10"), (320, [[[0, 0]]], "in one block"),
    (320, [[[0, 1, 2]]], "about 2 blocks"), (32 * 40, np.arange(32).reshape(1, 16, 2), "not asked for"),
])  # fmt: skip
def test_streams_that_do_not_fit_are_refused(n, places, message):
    with pytest.raises(UserError, match=message):
        RecallTask(**IDS).stream_rows("val", np.arange(1), n, np.array(places))
