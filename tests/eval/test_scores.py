"""Measures of focus: by hand, against slow obvious references, and on a tiny model whose
truth is computed cut by cut."""

import math
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from slow_spearman import slow_spearman
from tiny_mc import H, K, N, R, W, tiny_base, tiny_batch, tiny_mc

from mc.teachers import attention_mass
from nanochat.common import UserError
from nanochat.tasks.recall import RecallTask
from scripts.eval.bm25 import bm25_scores
from scripts.eval.comparison import FocusComparison
from scripts.eval.run_focus import Model, mean_of, recall_setting, seeds_gap_closed
from scripts.eval.scores import (  # noqa: E501
    CHEATS,
    SCORES,
    all_scores,
    measure_scores,
    most_useful,
    recall_contexts,
    tail_attention,
    utilities,
)

torch.set_num_threads(1)
BLOCKS, FREE = N // K, (N - R) // K


def comparison(rows=(0, 1, 2, 3), n: int = N, budget: int | None = None, **config) -> FocusComparison:
    batch, gpt = tiny_batch(rows), tiny_base()
    return FocusComparison(gpt, tiny_mc(gpt, **config).model, batch.inputs[:, :n + H], batch.targets[:, :n + H], n, 0,
                           batch.rows, budget)


# -- what matters -----------------------------------------------------------------------------------------------------


def test_what_is_most_useful():
    utility = torch.tensor([[0.3, -0.1, 0.2, 0.0], [-1.0, -2.0, -3.0, -4.0]])
    assert most_useful(utility, 3).tolist() == [[True, False, True, False], [False] * 4]
    assert most_useful(utility, 1).tolist() == [[True, False, False, False], [False] * 4]


# -- scores that need no training
# -------------------------------------------------------------------------------------------


def slow_bm25(row: list[int], block: int, tail: int) -> list[float]:
    blocks = [row[i * block:(i + 1) * block] for i in range(len(row) // block)]
    scores = [0.0] * len(blocks)
    for token in row[-tail:]:
        holds = sum(token in b for b in blocks)
        for i, b in enumerate(blocks):  # all blocks are of one length
            scores[i] += math.log(1 + (len(blocks) - holds + 0.5) / (holds
                                                                     + 0.5)) * b.count(token) / (b.count(token) + 1.5)
    return scores


def test_bm25_is_its_formula():
    tokens = torch.randint(6, (3, 22), generator=torch.Generator().manual_seed(0))
    found = bm25_scores(tokens, 4, tokens[:, -4:])
    assert found.shape == (3, 5)
    for row, scores in zip(tokens.tolist(), found.tolist()):
        assert scores == pytest.approx(slow_bm25(row, 4, 4), abs=1e-5)


def test_without_bm25s(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(UserError, match=r"megacontext\[eval\]"):
        bm25_scores(torch.zeros(1, 8, dtype=torch.int64), 4, torch.zeros(1, 4, dtype=torch.int64))


def test_attention_of_the_tail_has_not_read_the_continuation():
    focus = comparison()
    captured = []
    focus.gpt.hidden(focus.tokens, capture=captured)
    expected = attention_mass(captured, slice(None), slice(N - R, N), BLOCKS, K).sum(1)
    torch.testing.assert_close(tail_attention(focus), expected, rtol=0, atol=1e-12)
    changed = comparison()
    changed.tokens = torch.cat([focus.tokens[:, :N], (focus.tokens[:, N:] + 1) % 50], 1)
    changed.embeds = changed.gpt.embed(changed.tokens)
    assert torch.equal(tail_attention(changed), tail_attention(focus))
    for name, ahead in all_scores(changed).items():
        assert torch.equal(ahead, all_scores(focus)[name]) == (name in SCORES), name


# -- against the truth
# --------------------------------------------------------------------------------------------------------


def nll_of(focus: FocusComparison, blocks) -> torch.Tensor:
    scores = torch.full((len(focus.tokens), focus.n_blocks), -torch.inf)
    scores[:, list(blocks)] = 0
    return focus.outcome(scores).nll_B


def test_utility_is_what_one_block_saves():
    focus = comparison()
    found = utilities(focus, focus.alone())
    assert found.shape == (4, FREE)
    for block in range(FREE):
        torch.testing.assert_close(found[:, block], nll_of(focus, []) - nll_of(focus, [block]), rtol=0, atol=1e-12)


def test_where_sets_are_few_the_oracle_is_the_best_of_all():
    """Six blocks, two of them protected, a budget for two of the others."""
    focus = comparison(n=24, budget=18, max_lod=1)
    assert (focus.free_blocks, focus.most_shown) == (4, 2)
    every = [nll_of(focus, blocks) for size in range(3) for blocks in combinations(range(4), size)]
    assert torch.equal(focus.oracle({}).nll_B, torch.stack(every).amin(0))


def test_the_oracle_shows_no_block_where_that_is_best(monkeypatch):
    monkeypatch.setattr("scripts.eval.comparison.FEW_SETS", 0)  # greedy search alone
    focus = comparison(rows=range(48), n=24, budget=18, max_lod=1)
    oracle, nothing = focus.oracle({}), focus.nothing()
    assert torch.equal(nothing.nll_B, nll_of(focus, [])) and (oracle.nll_B <= nothing.nll_B).all()
    empty_B = oracle.shown_BN.sum(1) == R // K
    assert empty_B.any() and not empty_B.all() and torch.equal(oracle.nll_B == nothing.nll_B, empty_B)


def test_the_oracle_of_a_row_does_not_depend_on_the_rows_beside_it():
    rows, budget = range(8), W + 4 * K
    together, apart = comparison(rows, budget=budget).oracle({}), [comparison([row], budget=budget) for row in rows]
    assert apart[0].most_shown >= 4
    tried = []
    for i, one in enumerate(apart):
        count = len(tried)
        torch.testing.assert_close(one.oracle({}, lambda: tried.append(i)).nll_B, together.nll_B[i:i + 1], rtol=0,
                                   atol=1e-12)
        assert len(tried) > count
    assert len({tried.count(i) for i in range(len(apart))}) > 1, "rows whose searches end in different rounds"


def test_fewer_candidates_search_less_and_find_no_better():
    focus, tried = comparison(), []
    every = focus.oracle({}, lambda: tried.append(1))
    count, tried[:] = len(tried), []
    some = focus.oracle({}, lambda: tried.append(1), candidates=2, alone=focus.alone())
    assert len(tried) < count - FREE and (len(tried) % 2, bool(tried)) == (0, True)
    assert (some.nll_B >= every.nll_B).all() and (some.nll_B
                                                  < torch.stack([o.nll_B for o in focus.alone()]).amin(0)).any()


def test_measures_of_every_system():
    focus = comparison(rows=range(5))
    found = measure_scores(focus, None, candidates=3)
    assert set(found) == {*SCORES, *CHEATS, "oracle"}
    scores, utility = all_scores(focus), utilities(focus, focus.alone())
    named = scores["lens"][:, :FREE].argmax(1)
    assert torch.equal(found["lens"]["hit_at_1"],
                       most_useful(utility, focus.most_shown)[torch.arange(5), named].double())
    for name, x in scores.items():
        one = found[name]
        assert (one["regret"] >= 0).all() and torch.equal(one["nll"] - found["oracle"]["nll"], one["regret"])
        assert torch.equal(one["nll"], focus.outcome(x).nll_B) and one["entries"].max() <= W
        assert one["spearman"].tolist() == pytest.approx([slow_spearman(a, b)
                                                          for a, b in zip(x[:, :FREE].tolist(), utility.tolist())],
                                                         abs=1e-9)
    assert (found["oracle"]["regret"] == 0).all()


def test_known_blocks_count_as_hits():
    focus = comparison()
    matter = torch.zeros(4, BLOCKS, dtype=torch.bool)
    matter[:, FREE - 1] = matter[:, 3] = True
    found = measure_scores(focus, matter, candidates=1)
    assert found["recency"]["hit_at_1"].tolist() == [1.0] * 4  # the last block that is not protected
    assert found["recency"]["hit_at_most"].tolist() == [0.5 if focus.most_shown < FREE - 3 else 1.0] * 4


@pytest.mark.parametrize("budget", [20, 28, 44])
def test_a_budget_of_ones_own(budget):
    focus = comparison(budget=budget)
    entries = focus.outcome(focus.scores("recency")).entries_B
    assert budget - K < int(entries.max()) <= budget
    trained = comparison()
    assert torch.equal(comparison(budget=W).outcome(trained.scores("lens")).nll_B,
                       trained.outcome(trained.scores("lens")).nll_B)


def test_a_budget_that_shows_nothing_is_refused():
    with pytest.raises(UserError, match="too small"):
        comparison(budget=10)


# -- contexts -----------------------------------------------------------------------------------------------------------------  # noqa: E501


@pytest.mark.parametrize("size", [8, 4, 16])
@pytest.mark.parametrize("blocks", [2, 3, 9])
def test_answers_stand_in_the_blocks_that_matter(blocks, size):
    """Also where the blocks are more than the keys allow: three blocks of four keys, twelve keys; and in blocks of a
    model that are not the task's."""
    task = RecallTask(range(12), range(12, 24), range(24, 28), block=8, blocks=3, announce=4, ask=6, seed=5)
    tokens, targets, matter = recall_contexts(task, blocks, np.arange(4), size)
    n = blocks * 8 + 4
    assert tokens.shape == (4, n + 6) == targets.shape and matter.shape == (4, -(-n // size))
    assert size != 8 or matter.sum(1).tolist() == [2] * 4
    key_of = {int(alias): key for key, alias in enumerate(task.alias_of_key)}
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    for row, wanted, where in zip(tokens.tolist(), targets.tolist(), matter.tolist()):
        assert wanted[n:] == [x for t in range(n, n + 6) for x in ([row[t + 1]] if t % 2 == 0 else [-1])]
        found = set()
        for t in range(n, n + 6, 2):
            key = key_of[row[t]]
            holders = [i for i in range(blocks) if key in row[i * 8:(i + 1) * 8:2]]
            assert len(holders) == 1, "an asked key stands in one block only"
            block = row[holders[0] * 8:(holders[0] + 1) * 8]
            assert block[block.index(key) + 1] == row[t + 1]
            found.add((holders[0] * 8 + 2 * block[::2].index(key)) // size)
        assert found == {i for i, x in enumerate(where) if x}


def test_a_history_of_broken_blocks_is_refused():
    """33 blocks of the task, the announce part among them, are no blocks of 64 tokens; 34 are."""
    tokenizer = SimpleNamespace(key_ids=range(512), alias_ids=range(512, 1024), value_ids=range(1024, 1034))
    model = Model(None, SimpleNamespace(config=SimpleNamespace(block_size=64)),
                  {"flags": {"data": "recall", "seed": 1}})
    with pytest.raises(UserError, match="--recall_sizes: 32:8 is a history of 1056 tokens.*--mc_block_size=64"):
        recall_setting(model, tokenizer, "32:8")
    assert recall_setting(model, tokenizer, "33:8")[0].n == 1088


def test_summaries_of_contexts_without_a_value():
    """Nothing matters in most contexts: the interval is of those in which something does, and a number."""
    each = [np.array([math.nan] * 30 + [1.0, 0.0]), np.array([math.nan] * 30 + [1.0, math.nan])]
    found = mean_of(each)
    assert found["mean"] == pytest.approx(2 / 3) and found["seeds"] == [0.5, 1.0] and found["interval"] == [0.0, 1.0]


def test_gap_closed_is_the_share_of_the_way_from_window_to_full():
    seed = {name: {"nll": np.full(8, nll)}
            for name, nll in {"window": 3.0, "full": 2.0, "lens": 2.25, "worse": 3.5}.items()}
    assert seeds_gap_closed([seed, seed], "lens") == {"mean": pytest.approx(0.75),
                                                      "interval": [pytest.approx(0.75)] * 2}
    assert seeds_gap_closed([seed], "worse")["mean"] == pytest.approx(-0.5)
    assert seeds_gap_closed([{**seed, "full": {"nll": np.full(8, 2.95)}}], "lens") is None
