"""What is run behind a common beginning equals what is run from scratch: hidden states, labels, gradients."""

import pytest
import torch

from mc.arms.shared_prefix import continuation_from_cache, shared_entries, sharing
from mc.arms.utility_labels import measure
from mc.model import run_entries, with_continuation
from mc.teachers import continuation_pass, gate_utility
from mc.working_context import from_expanded
from tiny_gpt import tiny_gpt
from tiny_mc import H, K, N, R, T, tiny_base, tiny_batch, tiny_mc

torch.set_num_threads(1)
BLOCKS = T // K
PLAIN = dict(value_embeds=False, smear=False, resid_scalars=False, backout=False)
BASES = {"every feature": {}, "shifted keys": {"key_shift": True}, "windows of 12": {"sequence_len": 12},
         "plain": PLAIN, "grouped heads": {"n_kv_head": 2}}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def edited_cuts(mc, n_R: torch.Tensor, seed: int, each: int = 6):
    """Entries of `each` cuts a row: one at random, and it with one block flipped, now and then with none."""
    draw = torch.rand(len(n_R), BLOCKS, generator=torch.Generator().manual_seed(seed))
    raw = (draw < 0.15) | (torch.arange(BLOCKS) >= (n_R[:, None] - R) // K)
    flip = torch.randint(BLOCKS - R // K - 3, (len(n_R), each), generator=torch.Generator().manual_seed(seed + 1))
    flips = (torch.arange(BLOCKS) == flip[..., None]) & (torch.arange(each) > 1)[:, None]
    raw_C = (raw[:, None] ^ flips).flatten(0, 1)
    n_C = n_R.repeat_interleave(each)
    cut, fits = from_expanded([raw_C], n_C, K, mc.config.budget, mc.config.gists_per_block)
    return with_continuation(cut, n_C, H - 1), fits, n_C


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("n_gists", [1, 2])
def test_cuts_run_together_are_those_run_from_scratch(base, n_gists, dtype):
    gpt = tiny_base(dtype=dtype, **BASES[base])
    mc = tiny_mc(tiny_base(dtype=dtype), max_lod=1, gists_per_block=n_gists, budget=52)  # refuses windows
    batch, each = tiny_batch(), 6
    for seed in range(3):
        entries, fits, n_C = edited_cuts(mc, torch.tensor([N, N - 3, 44, 31]), seed)
        assert fits.float().mean() > 0.9
        tokens = batch.inputs.repeat_interleave(each, 0)
        with torch.no_grad():
            tree = mc.model.build_tree(gpt.embed(tokens))
            scratch = run_entries(gpt, mc.model, tree, tokens, entries)
            shared = run_entries(gpt, mc.model, tree, tokens, entries, run=sharing(gpt, entries, each))
        there = entries.valid_BM & fits[:, None] & fits[::each].repeat_interleave(each)[:, None]
        torch.testing.assert_close(shared[there], scratch[there], rtol=0, atol=TOLERANCE[dtype])


def test_only_what_follows_an_edit_is_run():
    gpt = tiny_base()
    mc, each = tiny_mc(gpt, max_lod=1, budget=52), 6
    entries, fits, _ = edited_cuts(mc, torch.tensor([N, N - 3, 44, 31]), 0)
    first = shared_entries(entries, each)
    for c, shared in enumerate(first.tolist()):
        one, base = (list(zip(*(x[row].tolist() for x in entries[:3]))) for row in (c, c - c % each))
        same = next((i for i, (a, b) in enumerate(zip(one, base)) if a != b), len(one))
        assert shared == max(min(same, int(entries.used_B[c]) - 1), 0)
    assert (first.view(-1, each)[:, :2] == entries.used_B.view(-1, each)[:, :2] - 1).all(), "the same cut is not run"
    ran, hidden = [], gpt.hidden
    gpt.hidden = lambda idx, **inputs: ran.append(idx.numel()) or hidden(idx, **inputs)
    batch = tiny_batch()
    tokens = batch.inputs.repeat_interleave(each, 0)
    tree = mc.model.build_tree(gpt.embed(tokens))
    with torch.no_grad():
        run_entries(gpt, mc.model, tree, tokens, entries, run=sharing(gpt, entries, each))
    assert sum(ran) < 0.75 * entries.lod_BM.numel()


@pytest.mark.parametrize("positions", ["gaussian", "contiguous"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_labels_do_not_depend_on_what_is_reused(dtype, positions):
    gpt, batch = tiny_base(dtype=dtype, key_shift=True), tiny_batch()
    mc = tiny_mc(gpt, max_lod=2, budget=40, recent=R, positions=positions)
    reused, scratch = (measure(gpt, mc.model, batch.inputs, batch.targets, batch.rows, (44, 56), 5, 3, reuse)
                       for reuse in (True, False))
    assert torch.equal(reused.block_CQE, scratch.block_CQE) and reused.valid_CQE.any()
    for name in ("utility_CQE", "nll_CQ"):  # labels are float32
        torch.testing.assert_close(getattr(reused, name), getattr(scratch, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gate_utilities_of_a_continuation_need_no_gradient_through_the_history(base, dtype):
    gpt, batch = tiny_gpt(0, dtype, **{"sequence_len": 128, "n_layer": 3} | BASES[base]), tiny_batch()
    for n in (2, 31, N):
        queries = slice(n - 1, T - 1)
        shared, scratch = (gate_utility(run(gpt, batch.inputs, batch.targets, n), slice(None), queries, n // K, K)
                           for run in (continuation_from_cache, continuation_pass))
        assert n < K or scratch.abs().max() > 0
        torch.testing.assert_close(shared, scratch, rtol=0, atol=TOLERANCE[dtype])
