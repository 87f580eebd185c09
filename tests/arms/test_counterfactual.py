"""Measured edits: legal, as measured one by one, positive where detail helps; what the lens learns from them."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc.arms.counterfactual import can_flip, draw_cut, draw_edits, edit_utilities, standardized, utility_order
from mc.arms.utility_labels import measure
from mc.focus_allocator import FocusConfig, GreedyAllocator, entries_needed
from mc.lens_loss import visible_blocks
from mc.model import read_rows, run_entries, take, with_continuation
from mc.working_context import check as check_cut
from mc.working_context import from_expanded
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig, token_losses
from tiny_mc import H, K, N, R, T, VOCAB, W, tiny_base, tiny_batch, tiny_mc
from per_query import VISIBLE, check, randoms

torch.set_num_threads(1)
BLOCKS, EDITABLE = T // K, (N - R) // K
ASKER, ANSWER = 1, 2


def asking_base() -> GPT:
    """One layer without positions: ASKER attends to ANSWER, every other token to everything alike; what
    is attended to is predicted."""
    gpt = GPT(GPTConfig(T, VOCAB, 1, 1, 1, 64, value_embeds=False, smear=False, resid_scalars=False, backout=False,
                        rope_fraction=0.0)).double()
    layer = gpt.transformer.h[0]
    with torch.no_grad():
        gpt.transformer.wte.weight.copy_(torch.eye(64))
        gpt.lm_head.weight.copy_(torch.eye(64))
        for matrix in (layer.attn.c_k, layer.attn.c_v, layer.attn.c_proj):
            matrix.weight.copy_(torch.eye(64))
        layer.mlp.c_proj.weight.zero_()
        # the unused dims keep its attention from being sure
        layer.attn.c_q.weight.zero_()[[ANSWER, *range(VOCAB, 64)], ASKER] = 1
    return gpt


def planted_batch(block: int) -> Batch:
    tokens = 3 + torch.arange(4 * T).view(4, T) * 7 % (VOCAB - 3)
    tokens[:, block * K:(block + 1) * K:2] = ANSWER
    tokens[:, N - 1] = ASKER
    targets = torch.full_like(tokens, -1)
    targets[:, N - 1] = ANSWER
    return Batch(tokens, targets, torch.arange(4), 4)


def test_measured_utility_is_positive_where_detail_helps_whether_shown_or_hidden():
    gpt, batch = asking_base(), planted_batch(3)
    mc = tiny_mc(gpt, gist="mean")
    tree, n = mc.model.build_tree(gpt.embed(batch.inputs)), torch.full((4,), N)
    expanded = list(mc.model.allocator.allocate(torch.where(torch.arange(BLOCKS) == 2, 0.0, -torch.inf).expand(4, -1),
                                                n).expanded)
    expanded[0] = expanded[0].clone()
    expanded[0][:, 2], expanded[0][2:, 3] = False, True
    utility, nll = edit_utilities(gpt, mc.model, tree, batch.inputs, batch.targets, n, expanded,
                                  torch.tensor([3, 1]).expand(4, 2))
    assert (utility[:, 0] > 0.05).all() and (utility[:, 1] < 1e-9).all()
    torch.testing.assert_close(utility[:2, 0], utility[2:, 0])
    torch.testing.assert_close(nll[:2] - nll[2:], utility[:2, 0])


def drawn(mc, n, rows, *key):
    editable = visible_blocks(n, BLOCKS, K, R)
    expanded = draw_cut(mc.model.allocator, editable, n, rows, *key)
    return editable, expanded, can_flip(expanded, editable, n, K)


@pytest.mark.parametrize("max_lod, n_gists", [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)])
def test_measured_utilities_are_those_of_cuts_run_one_by_one(max_lod, n_gists):
    gpt, batch, n = tiny_base(), tiny_batch(), torch.tensor([N, N, 44, 52])
    mc = tiny_mc(gpt, max_lod=max_lod, gists_per_block=n_gists, budget=W + 8 * (n_gists - 1), recent=R)
    budget = mc.config.budget
    tree = mc.model.build_tree(gpt.embed(batch.inputs))
    _, expanded, there = drawn(mc, n, batch.rows, 0)
    block, valid = draw_edits(torch.zeros(4, BLOCKS), there, 5, batch.rows, 0, 1)
    utility, nll = edit_utilities(gpt, mc.model, tree, batch.inputs, batch.targets, n, expanded, block)
    assert valid.sum() > 10

    def one(r: int, blocks: set[int]) -> float:
        row = slice(r, r + 1)
        raw = torch.zeros(1, BLOCKS, dtype=torch.bool)
        raw[0, sorted(blocks)] = True
        cut, fits = from_expanded([raw, *(x[row] for x in expanded[1:])], n[row], K, budget, n_gists)
        assert fits.all()
        check_cut(cut, n[row], budget, max_lod)
        entries = with_continuation(cut, n[row], H - 1)
        with torch.no_grad():
            out = run_entries(gpt, mc.model, mc.model.build_tree(gpt.embed(batch.inputs[row])), batch.inputs[row],
                              entries)
            read = read_rows(entries, K, H, 1, n_gists)
            wanted = batch.targets[row].gather(1, read.token_BP)
            return (token_losses(gpt.logits(take(out, read.slot_BP)), wanted).sum() / (wanted >= 0).sum()).item()

    for r, e in valid.nonzero().tolist():
        base, edited = set(expanded[0][r].nonzero()[:, 0].tolist()), int(block[r, e])
        assert nll[r].item() == pytest.approx(one(r, base), abs=1e-10)
        expected = one(r, base - {edited}) - one(r, base | {edited})
        assert utility[r, e].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("n_gists", [1, 2])
def test_labels_are_the_measured_utilities_of_each_end_of_history(n_gists):
    gpt, batch = tiny_base(), tiny_batch()
    mc = tiny_mc(gpt, max_lod=1, gists_per_block=n_gists, budget=40, recent=R)
    labels = measure(gpt, mc.model, batch.inputs, batch.targets, batch.rows, (48, 56), 3, 0)
    for q, end in enumerate((48, 56)):
        n = torch.full((4,), end)
        _, expanded, _ = drawn(mc, n, batch.rows, 0, end)
        utility, nll = edit_utilities(gpt, mc.model, mc.model.build_tree(gpt.embed(batch.inputs)), batch.inputs,
                                      batch.targets, n, expanded, labels.block_CQE[:, q])
        assert labels.valid_CQE[:, q].any()
        torch.testing.assert_close(labels.utility_CQE[:, q], utility.float().masked_fill(~labels.valid_CQE[:, q], 0))
        torch.testing.assert_close(labels.nll_CQ[:, q], nll.float())


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.lists(st.integers(6, 300), min_size=1, max_size=3),
       st.integers(1, 200), st.integers(1, 3), st.integers(0, 99))
def test_a_drawn_cut_fits_with_any_one_block_flipped(k, max_lod, lengths, budget, recent, seed):
    n, rows = torch.tensor(lengths), torch.arange(len(lengths))
    cfg = FocusConfig(budget, k, max_lod, recent=recent * k)
    if any(sum(entries_needed(length, cfg)) > budget for length in lengths):
        return
    blocks = max(lengths) // k
    editable = visible_blocks(n, blocks, k, recent * k)
    expanded = draw_cut(GreedyAllocator(cfg), editable, n, rows, seed)
    there = can_flip(expanded, editable, n, k)
    assert (editable.any(1) == there.any(1)).all(), "there is something to edit"
    for block in range(blocks):
        flipped = expanded[0] ^ (there & (torch.arange(blocks) == block))
        cut, fits = from_expanded([flipped, *expanded[1:]], n, k, budget)
        assert fits.all()
        check_cut(cut, n, budget, max_lod)
        for row in there[:, block].nonzero()[:, 0].tolist():  # it stands in the cut: raw, or as its gist
            standing = {(int(lod), int(index)) for lod, index, valid in zip(*(x[row] for x in cut[:3])) if valid}
            assert ((0, block * k) if flipped[row, block] else (1, block)) in standing


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 99), st.data())
def test_drawn_edits_are_legal(n_blocks, count, seed, data):
    editable = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=n_blocks, max_size=n_blocks),
                                               min_size=2, max_size=2)))
    block, valid = draw_edits(torch.randn(2, n_blocks), editable, count, torch.tensor([3, 10**9]), seed)
    assert block.shape == valid.shape == (2, min(count, n_blocks))
    for r in range(2):
        chosen = block[r][valid[r]].tolist()
        assert len(set(chosen)) == len(chosen) and editable[r, chosen].all() and len(chosen) <= editable[r].sum()


def test_half_of_the_edits_are_what_the_lens_wants():
    logits = torch.zeros(50, 32)
    logits[:, [4, 9]] = 20
    block, valid = draw_edits(logits, torch.ones(50, 32, dtype=torch.bool), 4, torch.arange(50), 0)
    assert valid.all() and all({4, 9} == set(row[:2]) for row in block.tolist())
    assert len(block[:, 2:].unique()) > 25


def test_standardized():
    x = randoms(3, 7, 12)
    got = standardized(x, VISIBLE)
    for b, q in itertools.product(range(3), range(7)):
        seen = VISIBLE[b, q].nonzero()[:, 0]
        if len(seen) > 1:
            torch.testing.assert_close(got[b, q, seen],
                                       (x[b, q, seen] - x[b, q, seen].mean()) / x[b, q, seen].std(correction=0))
        else:
            assert not got[b, q].any()


def test_utility_order():
    logits, utility, valid = randoms(3, 7), randoms(3, 7, seed=1), torch.ones(3, 7, dtype=torch.bool)
    valid[1, 2:5], valid[2, 1:], utility[0, 3] = False, False, utility[0, 4]
    expected = []
    for b in range(3):
        pairs = list(itertools.combinations(valid[b].nonzero()[:, 0].tolist(), 2))
        lost = 0.0
        for i, j in pairs:
            winner, loser = (i, j) if utility[b, i] > utility[b, j] else (j, i)
            lost += (utility[b, winner] - utility[b, loser]).item() * math.log1p(math.exp((logits[b, loser] - logits[b, winner]).item()))  # noqa: E501
        expected.append(lost / max(len(pairs), 1))
    check(utility_order(logits, utility, valid), torch.tensor(expected, dtype=torch.float64))
