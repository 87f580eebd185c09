"""Questions of two hops are answerable from what a row stores, the second block only by way of the first."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.dataloader import RecallSource
from nanochat.tasks.hops import HopTask

IDS = dict(keys=range(2049, 2561), aliases=range(2561, 3073), values=range(3073, 3105))


def check_row(task: HopTask, tokens, mask, num_blocks, last_blocks, T):
    end, P = num_blocks * task.block, task.pairs_per_block
    stored = tokens[:end].reshape(num_blocks, P, 2)
    facts = {key: (block, second) for block, pairs in enumerate(stored.tolist()) for key, second in pairs}
    key_of = {alias: task.keys.start + i for i, alias in enumerate(task.alias_of_key.tolist())}
    assert len(facts) == num_blocks * P, "all keys of a row are different"
    links = [block for block in range(num_blocks) if set(stored[block, :, 1].tolist()) <= set(task.aliases)]
    partners = [{facts[key_of[alias]][0] for alias in stored[block, :, 1].tolist()} for block in links]
    assert len(links) == num_blocks // 2 and all(len(p) == 1 for p in partners), "a block of links leads to one other"
    ends = set().union(*partners)
    assert len(ends) == len(links) and not ends & set(links)
    assert all(set(stored[block, :, 1].tolist()) <= set(task.values) for block in range(num_blocks)
               if block not in links)

    assert tokens[T] in task.aliases and not mask[:end + 1].any() and not mask[T]
    chains = tokens[end + (T - end) % 3:T].reshape(-1, 3)
    expected = np.zeros(T + 1, dtype=bool)
    for i, (asked, named, value) in enumerate(chains.tolist()):
        block, second = facts[key_of[asked]]
        assert block in links and second == named and facts[key_of[named]][1] == value
        expected[T - 3 * (len(chains) - i) + 1:][:2] = True
    if (T - end) % 3 == 2:  # the start of the first chain is cut: the value still follows what names its key
        expected[end + 1] = True
    assert np.array_equal(mask, expected)
    for last in range(len(chains), 0, -P):
        episode = chains[max(last - P, 0):last, 0].tolist()
        assert len(set(episode)) == len(episode) and len({facts[key_of[a]][0]
                                                          for a in episode}) == 1, "an episode asks for the links of one block"  # noqa: E501
    asked, named, _ = chains[-1].tolist()
    assert last_blocks.tolist() == [facts[key_of[asked]][0], facts[key_of[named]][0]]


@given(st.integers(0, 10**12), st.sampled_from([(2, 1088), (7, 1088), (32, 1088), (31, 1101), (16, 1024), (5, 209)]))
@settings(max_examples=25, deadline=None)
def test_every_chain_leads_through_two_blocks(first, shape):
    num_blocks, T = shape
    task = HopTask(**IDS, seed=3)
    rows = task.rows("train", np.arange(first, first + 3), num_blocks, T)
    assert rows.tokens.shape == rows.mask.shape == (3, T + 1) and rows.tokens.dtype == np.int64
    for i in range(3):
        check_row(task, rows.tokens[i], rows.mask[i], num_blocks, rows.episode_blocks[i], T)


def test_rows_are_a_function_of_their_numbers():
    """Alone or in a batch, whatever the others store; the two splits differ."""
    task = HopTask(**IDS, seed=1)
    together = task.rows("val", np.array([7, 3, 9]), np.array([8, 32, 12]), 1088)
    for i, (row, blocks) in enumerate([(7, 8), (3, 32), (9, 12)]):
        alone = task.rows("val", np.array([row]), blocks, 1088)
        assert np.array_equal(alone.tokens[0], together.tokens[i]) and np.array_equal(alone.mask[0], together.mask[i])
        assert np.array_equal(alone.episode_blocks[0], together.episode_blocks[i])
    assert not np.array_equal(task.rows("train", np.array([7]), 8, 1088).tokens[0], together.tokens[0])
    order = task.rows("val", np.arange(40), 8, 400).episode_blocks[:, 0]
    assert len(set(order.tolist())) == 8, "any block may hold the links"


def test_as_a_source_of_rows():
    task = HopTask(**IDS, blocks=4)
    tokens, mask = RecallSource(task, 200, "val").row_tokens(np.arange(2))
    assert tokens.shape == (2, 201) and mask.sum(1).tolist() == [48, 48]  # 24 chains


@pytest.mark.parametrize("num_blocks, T, message",
                         [(1, 1088, "2 to 32 blocks, asked for 1"), (33, 2000, "asked for 33"), (32, 1071, "1072")])
def test_impossible_rows(num_blocks, T, message):
    with pytest.raises(UserError, match=message):
        HopTask(**IDS).rows("train", np.arange(2), num_blocks, T)
