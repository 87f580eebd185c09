"""The tree of a history that grows, against a batch build of all its tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mc import VOCAB, randomize, tiny_base

import mc.store.history
from mc.config import MCConfig
from mc.mega_context import TreeShape, build_tree
from mc.model import MegaContext
from mc.store.history import History, store_format
from mc.store.ram import VOID, RamStore
from nanochat.common import UserError

torch.set_num_threads(1)
EXACT = {"atol": 1e-12, "rtol": 0}
GPT = tiny_base()


def networks(K: int = 4, **config) -> MegaContext:
    mc = MegaContext(MCConfig(**{**dict(block_size=K, max_lod=3, gist_width=16, lens_key_dim=16, lens_keys=2), **config}), GPT.config.n_embd).double()
    randomize(mc)
    return mc


def history(mc: MegaContext) -> History:
    return History(GPT, mc, RamStore(store_format(GPT, mc)))


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def level(found: History, lod: int) -> torch.Tensor:
    return found.store.gists(lod, torch.arange(found.store.n_nodes(lod)))


def check(found: History, ids: torch.Tensor) -> None:
    """All nodes and lens keys are those of a batch build of ids (no void slots)."""
    mc = found.mc
    with torch.no_grad():
        embeds = GPT.embed(ids[None])
        want, keys = build_tree(embeds, mc.gistnet, found.block_size, found.max_lod), mc.lensnet.keys(embeds)[0]
    assert found.n_tokens == len(ids) and found.shape == want.shape
    assert torch.equal(found.store.tokens(torch.arange(len(ids))), ids)
    for lod, expected in enumerate(want.levels):
        if lod and expected.shape[1]:
            torch.testing.assert_close(level(found, lod), expected[0], **EXACT)
    if len(keys):
        torch.testing.assert_close(found.store.keys(torch.arange(len(keys))), keys, **EXACT)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([4, 8, 32]), st.lists(st.sampled_from([0, 1, 31, 32, 33, 77, 1023, 1025]) | st.integers(0, 40), min_size=1, max_size=5))
def test_any_pieces_are_one_batch_build(K, pieces):
    """C2, trap 14."""
    found, ids, at = history(networks(K)), tokens(sum(pieces)), 0
    for n in pieces:
        found.append(ids[at:at + n])
        at += n
        assert [found.store.n_nodes(lod) for lod in range(1, 4)] == TreeShape(at, K, 3).counts[1:]
    check(found, ids)


def test_token_by_token():
    found, ids = history(networks()), tokens(85)
    for token in ids:
        found.append(token[None])
    check(found, ids)


def test_each_node_is_made_once_in_few_calls(monkeypatch):
    """An append makes the new blocks of a level together, at most MAX_BLOCKS at a time, and none twice."""
    monkeypatch.setattr(mc.store.history, "MAX_BLOCKS", 5)
    found, made = history(networks()), []
    gistnet = found.mc.gistnet.forward
    monkeypatch.setattr(found.mc.gistnet, "forward", lambda x, mask, lod: (made.append((lod, len(x))), gistnet(x, mask, lod))[1])
    ids = tokens(331)
    for piece in ids.split([200, 3, 1, 100, 27]):
        found.append(piece)
    assert max(n for _, n in made) == 5
    assert [sum(n for lod, n in made if lod == at) for at in (1, 2, 3)] == found.shape.counts[1:]
    check(found, ids)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 22), min_size=1, max_size=6))
def test_sources_begin_at_blocks_and_void_slots_count_for_nothing(sources):
    """C3: the gist and the keys of a short last block are those of its tokens alone."""
    found, K = history(networks()), 4
    for i, n in enumerate(sources):
        found.append(tokens(n, i))
        found.end_source()
        assert found.n_tokens % K == 0
    at = 0
    for i, n in enumerate(sources):
        ids = tokens(n, i)
        blocks = -(-n // K)
        assert found.store.tokens(torch.arange(at, at + blocks * K)).tolist() == ids.tolist() + [VOID] * (blocks * K - n)
        short = ids[(blocks - 1) * K:]
        with torch.no_grad():
            embeds = GPT.embed(short[None])
            want = found.mc.gistnet(embeds, torch.ones(1, len(short), dtype=torch.bool), 1)[0, 0]
            padded = torch.cat([embeds, torch.zeros(1, K - len(short), embeds.shape[2], dtype=embeds.dtype)], 1)
        last = at // K + blocks - 1
        torch.testing.assert_close(found.store.gists(1, torch.tensor([last]))[0], want, **EXACT)
        torch.testing.assert_close(found.store.keys(torch.tensor([last]))[0], found.mc.lensnet.keys(padded)[0, 0].detach(), **EXACT)
        at += blocks * K


def test_wrong_appends_change_nothing():
    found = history(networks())
    found.append(tokens(6))
    for bad in ([3, VOCAB], [-1], [2, 1 << 40]):
        with pytest.raises(UserError, match=f"token id {bad[-1]} is outside the vocabulary of {VOCAB}"):
            found.append(torch.tensor(bad))
    check(found, tokens(6))


def test_a_store_of_another_model_is_refused():
    mine, other = networks(), networks(gist="mean", gist_width=64)
    found = history(mine)
    with pytest.raises(UserError, match="made by another model: model differ"):
        History(GPT, other, found.store)
    with pytest.raises(UserError, match="block_size"):
        History(GPT, networks(8), found.store)
