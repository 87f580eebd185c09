"""C1, C2, C4, traps 10 and 14: the tree against brute force, grown in any pieces, ragged, and read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc.gistnet import GistNet, GistNetConfig
from mc.mega_context import TreeShape, build_tree, tiling

D = 6
ODD = [1, 31, 32, 33, 77, 1023, 1025]
shapes = st.builds(TreeShape, st.integers(0, 700), st.sampled_from([2, 3, 4, 8, 32]), st.integers(0, 4))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(K: int, max_lod: int = 3, n_gists: int = 1) -> GistNet:
    """A small float64 GistNet that has left the mean."""
    torch.manual_seed(0)
    net = GistNet(GistNetConfig(D, K, max_lod, variant="slots", width=4, n_gists=n_gists)).double()
    torch.nn.init.normal_(net.summaries[0].head.weight)
    torch.nn.init.normal_(net.summaries[0].level_LC)
    return net


def embeds(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def naive_node(x_TD: torch.Tensor, net, K: int, lod: int, index: int) -> torch.Tensor:
    """A node by recursion from its children, one block at a time."""
    if lod == 0:
        return x_TD[index]
    children = torch.stack([naive_node(x_TD, net, K, lod - 1, index * K + k) for k in range(K)])
    return net(children[None].flatten(1, -2), None, lod)[0].squeeze(0)


def all_nodes(shape: TreeShape) -> list[tuple[int, int]]:
    return [(lod, index) for lod, count in enumerate(shape.counts) for index in range(count)]


def nodes_tensor(nodes: list[tuple[int, int]], B: int) -> tuple[torch.Tensor, torch.Tensor]:
    lod, index = torch.tensor(nodes, dtype=torch.long).reshape(-1, 2).T
    return lod.expand(B, -1), index.expand(B, -1)


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_shape_against_brute_force(shape):
    """Rows number the nodes level by level; spans of nodes and children agree; tensors and ints agree."""
    n, K, L = shape.n_tokens, shape.block_size, shape.max_lod
    nodes = [(lod, i) for lod in range(L + 1) for i in range(n + 1) if (i + 1) * K**lod <= n]
    assert nodes == all_nodes(shape) and shape.n_nodes == len(nodes)
    assert [shape.node_row(*node) for node in nodes] == list(range(len(nodes)))
    assert shape.offsets == [sum(1 for lod, _ in nodes if lod < level) for level in range(L + 1)]
    for lod, i in nodes[:: max(1, len(nodes) // 40)]:
        start, length = shape.span(lod, i)
        assert length == K**lod and start == i * length
        if lod:
            below, first = lod - 1, i * K
            spans = [shape.span(below, first + k) for k in range(K)]
            assert [t for s, m in spans for t in range(s, s + m)] == list(range(start, start + length))
    lod, index = torch.meshgrid(torch.arange(-1, L + 3), torch.arange(-1, n + 2), indexing="ij")
    want = torch.tensor([[(a, b) in set(nodes) for b in range(-1, n + 2)]
                         for a in range(-1, L + 3)]) if n < 60 else None
    exists = shape.exists(lod, index)
    assert want is None or torch.equal(exists, want)
    assert int(exists.sum()) == len(nodes) and all(shape.exists(*node) is True for node in nodes)
    assert torch.equal(shape.node_row(lod, index)[exists], torch.arange(len(nodes)))
    lod, index = nodes_tensor(nodes, 1)
    got = torch.stack(shape.span(lod + 1, index))[:, 0].T
    assert got.tolist() == [list(shape.span(a + 1, b)) for a, b in nodes]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 300), st.sampled_from([2, 3, 8]), st.integers(0, 4), st.sampled_from([1, 2, 4]))
def test_tiling_is_the_least_number_of_entries(n, K, L, G):
    """Against dynamic programming over aligned nodes."""
    least, G = [0], min(G, K - 1)
    for end in range(1, n + 1):
        least.append(min((G if lod else 1) + least[end - K**lod] for lod in range(L + 1) if end % K**lod == 0))
    assert tiling(n, K, L, G) == least[n]
    assert tiling(torch.arange(n + 1), K, L, G).tolist() == least


def test_tiling_with_enough_levels_is_the_digit_sum():
    assert tiling(3 * 32**3 + 5 * 32 + 7, 32, 4) == 3 + 5 + 7


def test_impossible_shapes_are_refused():
    for bad in ((-1, 8, 1), (5, 1, 1), (5, 8, -1)):
        with pytest.raises(ValueError, match="needs"):
            TreeShape(*bad)


@pytest.mark.parametrize("K, T", [(4, 77), (4, 64), (4, 3), (8, 80), (2, 31), (32, 33)])
def test_batch_tree_is_the_naive_recursion(K, T):
    """C1: each node is made of its own children, at every level, and the table holds it in its own row."""
    net, x = make(K), embeds(2, T)
    tree = build_tree(x, net, K, 3)
    nodes = all_nodes(tree.shape)
    lod, index = nodes_tensor(nodes, 2)
    got = tree.gather(lod, index, torch.ones_like(lod, dtype=torch.bool))
    want = torch.stack([torch.stack([naive_node(row, net, K, *node) for node in nodes]) for row in x])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert torch.equal(got, tree.table_BND) and torch.equal(tree.levels[0], x)
    assert [level.shape[1] for level in tree.levels] == tree.shape.counts
    assert tree.levels[-1].untyped_storage().data_ptr() == tree.table_BND.untyped_storage().data_ptr()


def test_upper_levels_see_gists_only():
    """C1: LOD2 changes with its LOD1 children alone. With LOD1 replaced, the tokens under it no longer matter."""
    calls = []

    def spy(x, mask, lod):
        calls.append((lod, x.clone()))
        return x.mean(1, keepdim=True)

    tree = build_tree(embeds(2, 70), spy, 4, 3)
    assert [lod for lod, _ in calls] == [1, 2, 3]  # one call per level
    for lod, seen in calls:
        assert torch.equal(seen.reshape(2, -1, D), tree.levels[lod - 1][:, : tree.shape.counts[lod] * 4])


def test_gather_reads_pads_and_poisons():
    tree = build_tree(embeds(2, 20), make(4), 4, 3)
    lod = torch.tensor([[0, 1, 2, 1, 0, 3], [1, 0, 0, 9, 2, 0]])
    index = torch.tensor([[19, 4, 0, 5, 20, 0], [0, 7, -1, 0, 1, 3]])
    valid = torch.tensor([[True] * 5 + [False], [True] * 6])
    got = tree.gather(lod, index, valid)
    expected = torch.full_like(got, torch.nan)
    expected[0, 5] = 0
    for b, w in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 5)):
        expected[b, w] = tree.levels[lod[b, w]][b, index[b, w]]
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
    assert tree.gather(lod[:, :0], index[:, :0], valid[:, :0]).shape == (2, 0, D)


def test_gradients_reach_tokens_and_gistnet_through_gathered_nodes():
    net, x = make(4), embeds(2, 21).requires_grad_()
    lod, index = torch.tensor([[2, 1], [0, 1]]), torch.tensor([[0, 4], [20, 0]])
    tree = build_tree(x, net, 4, 2)
    (tree.gather(lod, index, torch.ones_like(lod, dtype=torch.bool)) * embeds(2, 2)).sum().backward()
    reached = x.grad.abs().amax(-1) > 0
    assert reached[0].tolist() == [True] * 20 + [False] and reached[1].tolist() == [True] * 4 + [False] * 16 + [True]
    assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_ragged_rows_are_their_own_trees():
    """C3: a row of n tokens in a longer batch has the nodes of n tokens; padding, even NaN, reaches nothing."""
    lengths, K = [77, 0, 3, 64, 33, 4], 4
    net, x = make(K), embeds(len(lengths), 77)
    inside = torch.arange(77) < torch.tensor(lengths)[:, None]
    padded = x.masked_fill(~inside[..., None], torch.nan).requires_grad_()
    tree = build_tree(padded, net, K, 3, torch.tensor(lengths))
    lod, index = nodes_tensor(all_nodes(tree.shape), len(lengths))
    exists = tree.exists(lod, index)
    for b, n in enumerate(lengths):
        own = TreeShape(n, K, 3)
        assert [node for node, e in zip(all_nodes(tree.shape), exists[b]) if e] == all_nodes(own)
        alone = build_tree(x[b : b + 1, :n], net, K, 3).table_BND[0]
        torch.testing.assert_close(tree.table_BND[b][exists[b]], alone, rtol=0, atol=1e-12)
    assert (tree.table_BND[~exists] == 0).all()
    got = tree.gather(lod, index, torch.ones_like(exists))
    assert torch.equal(got.isnan().all(-1), ~exists) and torch.equal(got.isnan().any(-1), ~exists)
    (tree.gather(lod, index, exists) * embeds(*lod.shape)).sum().backward()
    assert torch.equal(padded.grad.abs().amax(-1) > 0, inside)
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_permuting_rows_permutes_the_tree():
    """Trap 10."""
    net, x, order = make(4), embeds(4, 33), torch.tensor([2, 0, 3, 1])
    lengths = torch.tensor([33, 20, 7, 16])
    trees = build_tree(x, net, 4, 3, lengths), build_tree(x[order], net, 4, 3, lengths[order])
    torch.testing.assert_close(trees[1].table_BND, trees[0].table_BND[order], rtol=0, atol=1e-12)
    lod, index = torch.randint(0, 3, (4, 9)), torch.randint(0, 2, (4, 9))
    valid = trees[0].exists(lod, index)
    torch.testing.assert_close(
        trees[1].gather(lod[order], index[order], valid[order]), trees[0].gather(lod, index, valid)[order], rtol=0,
        atol=1e-12
    )


@pytest.mark.parametrize("lengths", [None, [77, 50, 3]])
def test_a_node_of_several_gists_is_the_naive_recursion(lengths):
    """C5: two vectors side by side per node; above LOD1 GistNet reads all of the children's."""
    K, T, G, net = 4, 77, 2, make(4, n_gists=2)
    x = embeds(3, T)
    tree = build_tree(x, net, K, 3, lengths and torch.tensor(lengths), n_gists=G)
    assert [level.shape[1] for level in tree.levels] == [77, 38, 8, 2]
    for b, n in enumerate(lengths or [T] * 3):
        nodes = all_nodes(TreeShape(n, K, 3))
        entries = [(lod, index * (G if lod else 1) + g) for lod, index in nodes for g in range(G if lod else 1)]
        lod, index = nodes_tensor(entries, 3)
        got = tree.gather(lod, index, torch.ones_like(lod, dtype=torch.bool))[b]
        want = torch.cat([naive_node(x[b], net, K, *node).reshape(-1, D) for node in nodes])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    beyond = torch.tensor([[1, 38 if lengths is None else 24]] * 3).T[:, :, None]
    assert tree.gather(beyond[0], beyond[1], torch.ones(3, 1, dtype=torch.bool))[1:].isnan().all()


def test_another_number_of_gists_is_refused():
    with pytest.raises(ValueError, match="n_gists=1"):
        build_tree(embeds(1, 8), make(4, n_gists=2), 4, 1)
