"""The search over a history's keys: exact where it scores, near-complete where it scans, the
same however the history grew."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_mc import randomize

from mc.lensnet import LOCAL_MEAN, LensNet, LensNetConfig
from mc.session.key_search import PAGE, KeySearch

torch.set_num_threads(1)
K, TAIL, D = 4, 8, 16


def small_lens(seed: int = 0, key_dim: int = 8) -> LensNet:
    lens = LensNet(LensNetConfig(D, block_size=K, n_keys=2, key_dim=key_dim, query_width=12, tail=TAIL)).double()
    randomize(lens, seed)
    return lens


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


def tail_of(lens: LensNet, seed: int) -> torch.Tensor:
    length = lens.config.tail + LOCAL_MEAN
    return torch.randn(1, length, lens.config.d_model, dtype=lens.log_gain.dtype,
                       generator=torch.Generator().manual_seed(seed))


def search_of(lens: LensNet, keys_NPC: torch.Tensor, **limits) -> KeySearch:
    search = KeySearch(lens, lambda index: keys_NPC[index], **limits)
    search.grow(len(keys_NPC))
    return search


def reference(lens: LensNet, tail: torch.Tensor, keys_NPC: torch.Tensor) -> torch.Tensor:
    cursor = torch.tensor([len(keys_NPC) * lens.config.block_size])
    return lens.focus_logits(tail, keys_NPC[None].to(tail.dtype), cursor)[0].detach()


def recall(found: torch.Tensor, logits: torch.Tensor, wanted: torch.Tensor, k: int) -> float:
    """Share of the k best by `wanted` [N] among the k best found."""
    best = found[logits.topk(k).indices]
    return float(torch.isin(wanted.topk(k).indices, best).double().mean())


@pytest.mark.parametrize("n", [1, 2, 31, 77, 128])
def test_a_short_history_is_scored_whole(n):
    lens, keys = small_lens(), unit(n, 2, 8)
    for seed in range(3):
        tail = tail_of(lens, seed)
        index, logits = search_of(lens, keys, flat_limit=128).top(tail, n * K + 3, n + 5)
        assert index.tolist() == list(range(n))
        torch.testing.assert_close(logits, reference(lens, tail, keys), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [129, 300, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_found_in_a_long_history_has_its_focus_logits(n, dtype):
    lens, keys = small_lens(), unit(n, 2, 8).to(dtype)
    search = search_of(lens, keys, flat_limit=128, keep=32)
    tail, also = tail_of(lens, 5), torch.tensor([n - 1, 3, 3, 40])
    index, logits = search.top(tail, n * K, 7, also)
    torch.testing.assert_close(logits, reference(lens, tail, keys)[index], rtol=0, atol=1e-12)
    assert torch.isin(also, index).all() and index.tolist() == sorted(set(index.tolist()))
    alone, best = search.top(tail, n * K, 7)
    assert len(alone) == 7 and len(index) <= 7 + 3 and torch.isin(alone, index).all()
    assert torch.equal(best.sort(descending=True).values, logits.sort(descending=True).values[:7])


def trained_like(n: int) -> tuple[LensNet, torch.Tensor]:
    """A lens and keys with the statistics of trained ones: half of the energy in an eighth of the dims,
    queries alike, trust uneven."""
    generator = torch.Generator().manual_seed(0)
    lens = LensNet(LensNetConfig(128))
    spread = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0] * torch.exp(-torch.arange(128) / 48)
    with torch.no_grad():
        lens.query.weight.copy_(spread)
        lens.trust.weight[:, :128] = torch.randn(128, generator=generator) / 8
        lens.distance_steps.copy_((torch.randn(32, generator=generator) / 4).diff(prepend=torch.zeros(1)))
        lens.age.copy_(torch.linspace(0, -2, len(lens.age)))
    return lens, F.normalize(torch.randn(n, 4, 128, generator=generator) @ spread.T, dim=-1)


def test_a_scan_finds_what_scoring_everything_finds():
    lens, keys = trained_like(8000)
    search = search_of(lens, keys, keep=250)  # the share that the default keeps of a million tokens
    tails = [tail_of(lens, seed) for seed in range(24)]
    wanted = [reference(lens, tail, keys) for tail in tails]

    def mean_recall(k: int) -> float:
        return float(np.mean([recall(*search.top(tail, 8000 * 32, k), logits, k)
                              for tail, logits in zip(tails, wanted)]))

    for k in (1, 4, 16):
        assert mean_recall(k) >= 0.99, k
    search._codes = search._codes.roll(1, 1)  # control: a broken index is noticed
    assert mean_recall(16) < 0.5


def test_a_scan_finds_the_one_block_that_is_unlike_all_others(monkeypatch):
    """Its keys lie where the codes do not look; the length of what they leave of a key tells."""
    lens, keys = trained_like(8000)
    _, *_, rare = torch.linalg.eigh(keys.flatten(0, 1).T @ keys.flatten(0, 1)).eigenvectors.T.flip(0)[:128]
    queries, trust = lens.queries(tail_of(lens, 0))
    aside = F.normalize(queries + 1.5 * rare, dim=-1)
    keys[77] = F.normalize(0.3 * keys[77] + rare, dim=-1)
    monkeypatch.setattr(lens, "queries", lambda tail: (aside, trust))
    wanted = reference(lens, tail_of(lens, 0), keys)
    assert wanted.argmax() == 77

    def finds() -> bool:
        return 77 in search_of(lens, keys, keep=100).top(tail_of(lens, 0), 8000 * 32, 4)[0]

    assert finds()
    monkeypatch.setattr("mc.session.key_search.DOUBT", 0.0)
    assert not finds()


@pytest.mark.parametrize("kind", ["alike", "duplicates", "clusters", "late"])
def test_a_scan_of_odd_keys_loses_no_score(kind):
    """Ties may be broken either way, so scores are compared: the best 8 found are as good as the best 8."""
    lens, keys = trained_like(16000)
    if kind == "alike":
        keys = keys[:1].expand(16000, -1, -1).contiguous()
    elif kind == "duplicates":
        keys = keys[:2000].repeat(8, 1, 1)
    elif kind == "clusters":
        keys = F.normalize(keys[:2000].repeat(8, 1, 1) + 0.05 * keys, dim=-1)
    else:  # nothing in the first quarter but one key
        keys[:4000] = keys[:1, :1]
    search = search_of(lens, keys)
    for seed in range(6):
        tail = tail_of(lens, seed)
        _, logits = search.top(tail, 16000 * 32, 8)
        wanted = reference(lens, tail, keys)
        assert float((wanted.topk(8).values
                      - logits.sort(descending=True).values).max()) <= 1e-2 * float(wanted.std() + 1e-3)


def test_exact_scores_are_computed_for_a_bounded_number_of_blocks():
    lens, keys, read = small_lens(), unit(5000, 2, 8), []

    def counted(index: torch.Tensor) -> torch.Tensor:
        read.append(len(index))
        return keys[index]

    search = KeySearch(lens, counted, flat_limit=256, keep=64)
    for n in (100, 256, 257, 700, 1000, 2000, 5000):
        search.grow(n)
        read.clear()
        search.top(tail_of(lens, n), n * K, 5, torch.tensor([0, n - 1]))
        assert search.n_exact == n if n <= 256 else search.n_exact <= 64 + PAGE + 2, n
        assert sum(read) == (0 if n <= 256 else search.n_exact)


def test_growing_reads_each_key_a_bounded_number_of_times():
    keys, read = unit(5000, 2, 8), []

    def counted(index: torch.Tensor) -> torch.Tensor:
        read.append(len(index))
        return keys[index]

    search = KeySearch(small_lens(), counted, flat_limit=256)
    for n in range(1, 5001):
        search.grow(n)
    assert sum(read) < 5 * 5000


steps = st.lists(st.integers(0, 700), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(steps, st.integers(0, 1000))
def test_the_index_does_not_depend_on_how_the_history_came(steps, seed):
    """Grown in pieces: as if built at once from what is there now."""
    lens, keys = small_lens(), unit(2000, 2, 8, seed=seed)
    search = KeySearch(lens, lambda index: keys[index], flat_limit=128, keep=24)
    for size in steps:
        search.grow(min(search.n_blocks + size, 2000))
    n = search.n_blocks
    if n == 0:
        return
    fresh, tail = search_of(lens, keys[:n], flat_limit=128, keep=24), tail_of(lens, seed)
    assert all(map(torch.equal, search.top(tail, n * K, 9), fresh.top(tail, n * K, 9)))
    assert (search._fitted, search._encoded) == (fresh._fitted, fresh._encoded)
    if fresh._fitted:
        assert torch.equal(search._codes[:, :fresh._encoded], fresh._codes[:, :fresh._encoded])


def test_misuse_is_refused():
    lens, keys = small_lens(), unit(20, 2, 8)
    search = search_of(lens, keys)
    with pytest.raises(ValueError, match="grow it first"):
        search.top(tail_of(lens, 0), 21 * K, 1)
    with pytest.raises(ValueError, match="only grows"):
        search.grow(19)
    with pytest.raises(ValueError, match="multiple"):
        KeySearch(lens, keys.__getitem__, flat_limit=100)
