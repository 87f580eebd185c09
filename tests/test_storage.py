"""Every store gives back what a plain list would."""

import pytest
import torch

from mc.storage import DROPPED, ERASED, KEPT, VOID, RamStore, StoreFormat

K, D, P, C = 4, 6, 2, 3
FORMAT = StoreFormat(K, D, P, C)


def vectors(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def filled(store, n: int = 37):
    """n tokens, the blocks that they complete, and the LOD2 nodes of those."""
    store.append_tokens(torch.arange(n))
    store.append_nodes(1, vectors(n // K, D), vectors(n // K, P, C))
    store.append_nodes(2, vectors(n // K**2, D, seed=2))
    store.commit()
    return store


@pytest.fixture(params=["ram"])
def store(request):
    return RamStore(FORMAT)


def test_truncation_keeps_what_is_still_complete(store):
    filled(store)
    store.set_detail(torch.tensor([1, 6]), DROPPED)
    store.truncate(0, 27)
    assert (store.n_tokens, store.n_nodes(1), store.n_nodes(2)) == (27, 6, 1)
    store.append_tokens(torch.arange(5))
    store.append_nodes(1, vectors(2, D, seed=5), vectors(2, P, C, seed=6))
    assert torch.equal(store.gists(1, torch.arange(8)), torch.cat([vectors(9, D)[:6], vectors(2, D, seed=5)]))
    assert torch.equal(store.keys(torch.arange(8)), torch.cat([vectors(9, P, C)[:6], vectors(2, P, C, seed=6)]))
    assert store.has_detail(torch.arange(8)).tolist() == [True, False] + [True] * 6, "a block made anew is kept"
    store.truncate(1, 3)
    assert (store.n_tokens, store.n_nodes(1), store.n_nodes(2)) == (32, 3, 0)


def test_rewritten_records_replace_old_ones(store):
    filled(store)
    store.rewrite_tokens(7, torch.tensor([50, VOID, 52]))
    store.rewrite_nodes(1, 1, vectors(2, D, seed=8), vectors(2, P, C, seed=9))
    store.rewrite_nodes(2, 0, vectors(1, D, seed=7))
    assert store.tokens(torch.arange(6, 11)).tolist() == [6, 50, VOID, 52, 10]
    assert torch.equal(store.gists(1, torch.tensor([2, 0, 1])), torch.stack([vectors(2, D, seed=8)[1], vectors(9, D)[0], vectors(2, D, seed=8)[0]]))
    assert torch.equal(store.keys(torch.tensor([1, 2])), vectors(2, P, C, seed=9))
    assert torch.equal(store.gists(2, torch.tensor([0, 1])), torch.stack([vectors(1, D, seed=7)[0], vectors(2, D, seed=2)[1]]))
    with pytest.raises(IndexError):
        store.rewrite_tokens(36, torch.arange(2))


def test_raw_tokens_given_up_and_restored(store):
    filled(store)
    store.set_detail(torch.tensor([2, 5]), DROPPED)
    store.set_detail(torch.tensor([3, 4]), torch.tensor([ERASED, KEPT]))
    assert store.detail(torch.arange(9)).tolist() == [KEPT, KEPT, DROPPED, ERASED, KEPT, DROPPED, KEPT, KEPT, KEPT]
    assert store.tokens(torch.arange(8, 18)).tolist() == [8, 9, 10, 11, *[VOID] * 4, 16, 17]
    store.set_detail(torch.tensor([2]), KEPT)
    assert store.has_detail(torch.tensor([5, 3, 2, 8])).tolist() == [False, False, True, True]
    for refused in (lambda: store.set_detail(torch.tensor([1, 3]), KEPT), lambda: store.rewrite_tokens(10, torch.arange(3))):
        with pytest.raises(ValueError, match="erased"):
            refused()
    assert store.tokens(torch.arange(4, 12)).tolist() == list(range(4, 12))


def test_keys_come_with_blocks_only(store):
    for lod, keys in ((1, None), (2, vectors(1, P, C))):
        with pytest.raises(ValueError, match="lens keys"):
            store.append_nodes(lod, vectors(1, D), keys)


def test_eight_bit_vectors_are_off_by_half_a_step():
    store = RamStore(StoreFormat(K, D, P, C, torch.int8))
    x, keys = vectors(9, D) * torch.logspace(-6, 6, 9)[:, None], vectors(9, P, C)
    keys[3] = 0
    store.append_nodes(1, x, keys)
    for sent, back in ((x, store.gists(1, torch.arange(9))), (keys, store.keys(torch.arange(9)))):
        assert back.dtype == torch.float32
        assert ((back - sent).abs() <= sent.abs().amax(-1, keepdim=True) / 127 * 0.501).all()
