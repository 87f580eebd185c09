"""The stored history that training shows around a row's own: valid cuts, of other rows, in their places."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mc import K, N, R, T, tiny_base, tiny_batch, tiny_mc
from torch import Tensor

from mc.config import MCConfig, from_dict
from mc.far_history import BLOCKS_OF_A_ROW, NODES_OF_A_LEVEL, FarHistory, draw_far_cut, draw_far_history, make_pools, most_entries, place_far, with_far_tokens  # noqa: E501
from mc.working_context import Cut, check, spans
from nanochat.common import UserError
from scripts.eval.outlook import session_note

FAR = dict(far_tokens=400, far_entries=40)
ROWS = torch.arange(4)


def far_config(block_size: int, max_lod: int, far_tokens: int, spare: int) -> MCConfig:
    """Exactly the entries that the longest tilings take, and a few to open paths with."""
    config = MCConfig(block_size=block_size, max_lod=max_lod, far_tokens=far_tokens, recent=block_size)
    return MCConfig(block_size=block_size, max_lod=max_lod, far_tokens=far_tokens, recent=block_size,
                    far_entries=most_entries(config) + spare)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([2, 3, 4, 32]), st.integers(1, 4), st.integers(32, 10**7), st.integers(0, 100),
       st.integers(0, 10**9))
def test_every_cut_tiles_its_length(block_size, max_lod, far_tokens, spare, step):
    """Also where the longest tiling fills all entries: nothing is left out, and what does not fit stays closed."""
    far_tokens = min(far_tokens, 200 * block_size**max_lod)
    config = far_config(block_size, max_lod, far_tokens, spare)
    cut, split = draw_far_cut(config, torch.arange(100), 0, step)
    length = spans(cut)[1].sum(1)
    check(cut, length, config.far_entries, max_lod)
    assert (length % block_size == 0).all() and (length
                                                 <= far_tokens).all() and ((0 <= split) & (split <= length)).all()
    assert not (cut.lod_BW[cut.valid_BW] == 0).any(), "gists only: another row's tokens would contradict the row's own"


def test_the_most_entries_are_reached_and_never_passed():
    config = far_config(4, 3, 1000, 0)
    digits = [sum([n // 64, n // 16 % 4, n // 4 % 4]) for n in range(0, 1001, 4)]
    assert most_entries(config) >= max(digits) >= most_entries(config) - 1


def test_lengths_and_gaps_are_log_uniform_and_paths_are_open():
    config = far_config(32, 4, 2**23, 64)
    cut, split = draw_far_cut(config, torch.arange(2000), 0, 0)
    start, span = spans(cut)
    length = span.sum(1)
    for quantity in (length, length - split):
        assert quantity.min() == 0 and quantity.max() > 2**21
    share = [((length >= 2**i) & (length < 2 ** (i + 1))).float().mean() for i in range(8, 23)]
    assert max(share) < 1.5 / 18 and min(share) > 0.6 / 18
    lods = {lod: ((cut.lod_BW == lod) & cut.valid_BW).any(1).float().mean().item() for lod in range(1, 5)}
    assert lods[4] > 0.1 and all(share > 0.3 for lod, share in lods.items() if lod < 4)
    # at the row's own part the far one is open down to blocks
    far = (length > 32**3) & (length - split > 32**2) & (split > 32**2)
    before, behind = ((start + span == split[:, None]) & cut.valid_BW, (start == split[:, None]) & cut.valid_BW)
    assert far.sum() > 100 and (before & (cut.lod_BW <= 2)).any(1)[far].float().mean() > 0.9
    assert (behind & (cut.lod_BW == 1)).any(1)[far].float().mean() > 0.9


def pools(embeds: Tensor, gistnet, chosen=slice(None), max_lod: int = 3) -> list[Tensor]:
    return make_pools(gistnet, embeds, ROWS, chosen, max_lod, 0, 1)


def test_pools_are_made_of_the_other_rows():
    gpt = tiny_base()
    mc = tiny_mc(gpt, max_lod=3, **FAR)
    embeds = gpt.embed(tiny_batch().inputs)
    before = pools(embeds, mc.model.gistnet)
    assert [x.shape[1] for x in before] == [3 * BLOCKS_OF_A_ROW, NODES_OF_A_LEVEL, NODES_OF_A_LEVEL]
    changed = embeds.clone()
    changed[2] = embeds[2].flip(0)
    after = pools(changed, mc.model.gistnet)
    for x, y in zip(before, after):
        assert torch.equal(x[2], y[2]), "a row's pool does not depend on the row"
        assert all((x[b] != y[b]).any() for b in (0, 1, 3))
    for x, y in zip(before, pools(embeds, mc.model.gistnet, slice(None, None, 2))):
        torch.testing.assert_close(x[::2], y, rtol=0, atol=1e-12)
    blocks = mc.model.build_tree(embeds).levels[1]
    lent = before[0][0].unflatten(0, (3, BLOCKS_OF_A_ROW))
    for other, nodes in zip((1, 2, 3), lent):
        assert torch.cdist(nodes, blocks[other]).amin(1).max() < 1e-6


def test_gistnet_learns_to_make_the_upper_levels_and_nothing_else_gets_a_gradient():
    gpt = tiny_base()
    mc = tiny_mc(gpt, max_lod=3, **FAR)
    embeds = gpt.embed(tiny_batch().inputs)
    made = pools(embeds, mc.model.gistnet)
    assert not made[0].requires_grad
    weights = list(mc.model.gistnet.parameters())
    for level in made[1:]:
        grads = torch.autograd.grad(level.square().sum() + level.sum(), [*weights, gpt.transformer.wte.weight],
                                    retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in grads[:-1]) and grads[-1] is None


def slow_places(start: list[int], far: FarHistory, b: int) -> tuple[list[int], list[int]]:
    """Laid out by hand, backwards from the boundary: the inner part, the row's older entries, the front."""
    entries = [(int(lod), int(i)) for lod, i, v in zip(far.cut.lod_BW[b], far.cut.index_BW[b], far.cut.valid_BW[b])
               if v]
    split, boundary = int(far.split_B[b]), int(far.boundary_B[b])
    at, places = boundary, {}
    for lod, i in reversed([e for e in entries if e[1] * K ** e[0] >= split]):
        at -= K**lod
        places[lod, i] = at
    gap = boundary - at
    at = -gap
    for lod, i in reversed([e for e in entries if e[1] * K ** e[0] < split]):
        at -= K**lod
        places[lod, i] = at
    return [s - gap * (s < boundary) for s in start], [places[e] for e in entries]


def test_places_are_those_laid_out_by_hand():
    gpt = tiny_base()
    mc = tiny_mc(gpt, max_lod=3, **FAR)
    rows = torch.arange(8)
    far = draw_far_history(mc.config, mc.model.gistnet, gpt.embed(tiny_batch(rows).inputs), rows, slice(None),
                           torch.full((8,), N), 1, 0, 3)
    own = torch.arange(N).expand(8, N)
    start, far_start, far_length = place_far(own, far)
    assert len(far.boundary_B.unique()) > 3 and far.boundary_B.max() < N - R and (far.boundary_B % K == 0).all()
    for b in range(8):
        expected_own, expected_far = slow_places(own[b].tolist(), far, b)
        used = int(far.cut.valid_BW[b].sum())
        assert start[b].tolist() == expected_own and far_start[b, :used].tolist() == expected_far
        covered = sorted([*start[b].tolist(),
                          *(s + i for s, n in zip(far_start[b, :used].tolist(), far_length[b, :used].tolist())
                            for i in range(n))])
        assert covered == list(range(covered[0], N)), "raw own tokens and far history together: no hole, no overlap"


def test_a_far_history_is_drawn_per_row_and_repeated_per_variant():
    gpt = tiny_base()
    mc = tiny_mc(gpt, max_lod=3, **FAR)
    embeds, n = gpt.embed(tiny_batch().inputs), torch.full((2,), N)
    far = draw_far_history(mc.config, mc.model.gistnet, embeds, ROWS, slice(None, None, 2), n, 3, 0, 3)
    for x in (*far.cut[:3], *far[1:]):
        assert torch.equal(x[:2], x[2:4]) and torch.equal(x[:2], x[4:])
    again = draw_far_cut(mc.config, torch.tensor([2, 77, 0]), 0, 3)[0]
    assert torch.equal(again.lod_BW[[2, 0]], far.cut.lod_BW[:2])
    other = draw_far_cut(mc.config, torch.tensor([0, 2]), 0, 4)[0]
    assert not torch.equal(other.lod_BW, far.cut.lod_BW[:2])


@pytest.mark.parametrize("config, micro_batch, message", [
    (dict(far_tokens=400, far_entries=10), 4, "take up to 28 entries"), (dict(far_tokens=400), 1, "has one row"),
    (dict(far_tokens=3), 4, "less than a block"), (dict(far_entries=64), 4, "no effect"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(config, micro_batch, message):
    with pytest.raises(UserError, match=message):
        tiny_mc(tiny_base(), micro_batch=micro_batch, **config)


def test_an_empty_far_history_is_none_at_all():
    empty = Cut(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64),
                torch.zeros(2, 5, dtype=torch.bool), K)
    far = FarHistory(empty, torch.zeros(2, 5, 8), torch.zeros(2, dtype=torch.int64), torch.tensor([0, 8]))
    start, _, length = place_far(torch.arange(T).expand(2, T), far)
    assert torch.equal(start, torch.arange(T).expand(2, T)) and not length.any()


@pytest.mark.parametrize(
    "config, micro_batch, tokens, why",
    [(dict(), 2, 2**23, None), (dict(block_size=8), 2, 8 * 8**4, None), (dict(max_lod=2), 2, 8 * 32**2, None),
     (dict(max_lod=1), 2, 256, None),
     (dict(far_entries=95), 2, 2 * 32**4, None), (dict(far_entries=93), 2, 0, "--mc_far_entries=93"),
     (dict(), 1, 0, "--device_batch_size=1"),
     (dict(gists_per_block=2), 2, 0, "--mc_gists_per_block=2"),
     (dict(gist_source="hidden"), 2, 0, "--mc_gist_source=hidden"),
     (dict(far_tokens=0), 1, 0, None), (dict(far_tokens=4096), 1, 4096, None)],
)  # fmt: skip
def test_far_histories_are_the_default_where_they_are_possible(config, micro_batch, tokens, why):
    found, obstacle = with_far_tokens(from_dict({"far_tokens": -1} | config), micro_batch)
    assert found.far_tokens == tokens and (why is None) == (obstacle is None) and (why is None or why in obstacle)
    if found.far_tokens and micro_batch > 1:
        assert most_entries(found) <= found.far_entries, "what is the default is not refused"


def test_a_checkpoint_of_before_far_histories_had_none():
    values = {name: value for name, value in vars(MCConfig(far_tokens=0, max_lod=2)).items() if name != "far_tokens"}
    assert from_dict(values).far_tokens == 0


def test_the_outlook_is_that_of_the_levels_that_are_trained():
    def note(**config) -> str:
        mc = tiny_mc(tiny_base(), **config)
        return session_note(mc.model.focus_config(), mc.meta()["trained_lods"])

    # rows of 64 tokens hold two levels of blocks of 4
    assert "LOD1 to LOD2 are trained; of 1,048,576 tokens they show" in note(max_lod=4)
    assert "LOD1 to LOD4 are trained" in note(max_lod=4, far_tokens=-1)
