"""The cut against a slow reference in plain Python, and its invariants under random edits."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mc import working_context as wc
from mc.mega_context import tiling

torch.set_num_threads(1)
SIZES = [1, 31, 32, 33, 77, 1023, 1025]
quick = settings(max_examples=40, deadline=None)


def entries(cut: wc.Cut) -> list[list[tuple[int, int]]]:
    rows = zip(cut.lod_BW.tolist(), cut.index_BW.tolist(), cut.valid_BW.tolist())
    return [[(lod, i) for lod, i, v in zip(*row) if v] for row in rows]


def same(a: wc.Cut, b: wc.Cut) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3]))


def random_expanded(n_B, k, max_lod, p, gen):
    n_blocks = int(n_B.max()) // k
    sizes = [n_blocks // k**level for level in range(max_lod)]
    return [torch.rand(len(n_B), size, generator=gen) < p for size in sizes]


def reference_cut(expanded_row, n, k, max_lod):
    """Walk down from the roots: a complete node that is not expanded is an entry."""
    out = []

    def visit(lod, index):
        complete = (index + 1) * k**lod <= n
        if lod == 0 or (complete and not (lod <= max_lod and expanded_row[lod - 1][index])):
            out.extend([(lod, index)] if complete else [])
        else:
            for child in range(index * k, (index + 1) * k):
                if child * k ** (lod - 1) < n:
                    visit(lod - 1, child)

    for index in range(-(-n // k**max_lod)):
        visit(max_lod, index)
    return out


def reference_expand(row, mask, k):
    children = lambda lod, i: [(lod - 1, i * k + c) for c in range(k)]  # noqa: E731
    return [e for entry, m in zip(row, mask) for e in (children(*entry) if m and entry[0] else [entry])]


shapes = st.tuples(
    st.sampled_from([2, 4, 8, 32]), st.integers(1, 3), st.lists(st.sampled_from(SIZES), min_size=1, max_size=4),
    st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)


@quick
@given(shapes)
def test_from_expanded_is_the_walk_down_the_tree(case):
    k, max_lod, sizes, seed, p = case
    n_B, gen = torch.tensor(sizes), torch.Generator().manual_seed(seed)
    expanded = random_expanded(n_B, k, max_lod, p, gen)
    cut, fits_B = wc.from_expanded(expanded, n_B, k, max(sizes))
    assert fits_B.all()
    wc.check(cut, n_B, max(sizes), max_lod)
    for b, n in enumerate(sizes):
        assert entries(cut)[b] == reference_cut([x[b].tolist() for x in expanded], n, k, max_lod)


@quick
@given(shapes, st.sampled_from([1, 2, 4]), st.integers(-3, 3))
@example((2, 1, [1], 0, 0.0), 1, -1)
def test_entries_of_nodes_with_several_gists(case, n_gists, spare):
    """C5: every node of G entries, in order; they tile the history, are counted by the capacity,
    and a row beyond it is empty."""
    k, max_lod, sizes, seed, p = case
    k, n_B, gen = max(k, 2 * n_gists), torch.tensor(sizes), torch.Generator().manual_seed(seed)
    expanded = random_expanded(n_B, k, max_lod, p, gen)
    want = [[(lod, i * (n_gists if lod else 1) + g)
             for lod, i in reference_cut([x[b].tolist() for x in expanded], n, k, max_lod)
             for g in range(n_gists if lod else 1)] for b, n in enumerate(sizes)]  # fmt: skip
    capacity = max(max(map(len, want)) + spare, 1)
    cut, fits_B = wc.from_expanded(expanded, n_B, k, capacity, n_gists)
    assert fits_B.tolist() == [len(row) <= capacity for row in want]
    wc.check(wc.Cut(*(x[fits_B] for x in cut[:3]), k, n_gists), n_B[fits_B], capacity, max_lod)
    lod_BW, index_BW, valid_BW = wc.by_entry(cut)
    assert lod_BW.shape == cut.lod_BW.shape and torch.equal(valid_BW.sum(1), wc.entries_used(cut))
    assert entries(wc.Cut(lod_BW, index_BW, valid_BW, k)) == [row if len(row) <= capacity else [] for row in want]
    length_BW = wc.width(lod_BW, k, n_gists) * valid_BW
    end_BW = length_BW.cumsum(1)
    assert torch.equal((index_BW * length_BW)[valid_BW], (end_BW - length_BW)[valid_BW])
    assert torch.equal(length_BW.sum(1), n_B * fits_B)
    opened, applied_B = wc.expand(cut, torch.rand(cut.lod_BW.shape, generator=gen) < 0.3)
    assert (wc.entries_used(opened) <= capacity).all() and all(same(opened, cut)
                                                               for _ in range(1) if not applied_B.any())


@pytest.mark.parametrize("k", [2, 4, 8, 32])
@pytest.mark.parametrize("max_lod", [1, 2, 3])
def test_coarsest_is_the_least_tiling(k, max_lod):
    n_B = torch.tensor(SIZES)
    closed = [torch.zeros(len(SIZES), max(SIZES) // k ** (level + 1), dtype=torch.bool) for level in range(max_lod)]
    cut = wc.coarsest(n_B, k, max_lod, 1025)
    wc.check(cut, n_B, 1025, max_lod)
    assert same(cut, wc.from_expanded(closed, n_B, k, 1025)[0])
    assert wc.entries_used(cut).tolist() == [tiling(n, k, max_lod) for n in SIZES]
    assert same(wc.coarsest(77, k, max_lod, 1025), wc.Cut(*(x[4:5] for x in cut[:3]), k))
    assert entries(wc.coarsest(n_B, k, 0, 1025)) == [[(0, i) for i in range(n)] for n in SIZES]


@quick
@given(shapes, st.integers(8, 700))
def test_random_expansions_match_the_reference_and_keep_every_invariant(case, slack):
    k, max_lod, sizes, seed, p = case
    n_B, gen = torch.tensor(sizes), torch.Generator().manual_seed(seed)
    capacity = max(tiling(n, k, max_lod) for n in sizes) + slack
    cut = wc.coarsest(n_B, k, max_lod, capacity)
    for _ in range(4):
        before, mask_BW = entries(cut), torch.rand(cut.lod_BW.shape, generator=gen) < p
        cut, applied_B = wc.expand(cut, mask_BW)
        want = [reference_expand(row, mask, k) for row, mask in zip(before, mask_BW.tolist())]
        assert applied_B.tolist() == [len(row) <= capacity for row in want]
        assert entries(cut) == [row if len(row) <= capacity else old for row, old in zip(want, before)]
        wc.check(cut, n_B, capacity, max_lod)


def test_permuting_the_batch_permutes_the_cut():
    n_B, gen, order = torch.tensor([1025, 31, 77, 1023]), torch.Generator().manual_seed(0), torch.tensor([2, 0, 3, 1])
    expanded = random_expanded(n_B, 8, 3, 0.5, gen)
    cut, _ = wc.from_expanded(expanded, n_B, 8, 1025)
    mask_BW = torch.rand(cut.lod_BW.shape, generator=gen) < 0.3
    rows = lambda c: wc.Cut(*(x[order] for x in c[:3]), 8)  # noqa: E731
    assert same(rows(cut), wc.from_expanded([x[order] for x in expanded], n_B[order], 8, 1025)[0])
    assert same(rows(wc.expand(cut, mask_BW)[0]), wc.expand(rows(cut), mask_BW[order])[0])


def test_a_row_over_capacity_is_empty_or_unchanged():
    n_B = torch.tensor([64, 8])
    cut, fits_B = wc.from_expanded([torch.ones(2, 8, dtype=torch.bool)], n_B, 8, 20)
    assert fits_B.tolist() == [False, True] and wc.entries_used(cut).tolist() == [0, 8]
    cut = wc.coarsest(n_B, 8, 1, 20)
    edited, applied_B = wc.expand(cut, torch.ones_like(cut.valid_BW))
    assert applied_B.tolist() == [False, True] and wc.entries_used(edited).tolist() == [8, 8]


def test_tokens_are_not_expanded():
    cut, _ = wc.from_expanded([torch.tensor([[True, False, False, False]])], torch.tensor([9]), 2, 12)
    assert entries(cut) == [[(0, 0), (0, 1), (1, 1), (1, 2), (1, 3), (0, 8)]]
    assert entries(wc.expand(cut, torch.ones_like(cut.valid_BW))[0]) == [[(0, i) for i in range(9)]]


@pytest.mark.parametrize(
    "lods, indices, valid, message",
    [
        ([1, 0, 0], [0, 3, 0], [1, 1, 0], "starts at 3, not at 2"),
        ([0, 0, 0], [0, 1, 2], [1, 0, 1], "padding before an entry"),
        ([1, 1, 0], [0, 1, 0], [1, 1, 0], "ends at 4, beyond 3"),
        ([1, 0, 0], [0, 0, 0], [1, 0, 0], "covers 2 of 3"),
        ([1, 0, 0], [0, 2, 5], [1, 1, 0], "padding is not"),
        ([0, 0, 0], [0, 1, 2], [1, 1, 1], "exceed the budget of 2"),
        ([2, 0, 0], [0, 0, 0], [1, 0, 0], "no level 2"),
    ],
)
def test_check_names_what_is_wrong(lods, indices, valid, message):
    cut = wc.Cut(torch.tensor([lods]), torch.tensor([indices]), torch.tensor([valid]).bool(), 2)
    with pytest.raises(AssertionError, match=message):
        wc.check(cut, torch.tensor([3]), 2, max_lod=1)


def test_compiles_once_for_changing_values():
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    @torch.compile(fullgraph=True, backend=backend)
    def edit(lod_BW, index_BW, valid_BW, mask_BW):
        cut, _ = wc.expand(wc.Cut(lod_BW, index_BW, valid_BW, 8), mask_BW)
        return wc.spans(cut)

    gen = torch.Generator().manual_seed(0)
    for n in (77, 512, 130):
        cut = wc.coarsest(torch.tensor([n, n // 2]), 8, 2, 96)
        mask_BW = torch.rand(cut.lod_BW.shape, generator=gen) < 0.2
        want = wc.spans(wc.expand(cut, mask_BW)[0])
        assert all(map(torch.equal, edit(*cut[:3], mask_BW), want))
    assert len(graphs) == 1
