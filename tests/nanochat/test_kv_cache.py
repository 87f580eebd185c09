import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gpt import random_tokens, tiny_gpt

from nanochat.kv_cache import KVCache

torch.set_num_threads(1)
EXACT = {"atol": 1e-10, "rtol": 0}
STATE = ("k", "v", "k_unshifted", "x_unsmeared")


def new_cache(model, batch: int = 2, slots: int = 64) -> KVCache:
    return KVCache(model.config, batch, slots, dtype=torch.float64)


def read(model, *pieces, cache: KVCache | None = None) -> tuple[torch.Tensor, KVCache]:
    cache = cache or new_cache(model, len(pieces[0]))
    with torch.no_grad():
        return torch.cat([model.hidden(piece, cache=cache) for piece in pieces], 1), cache


@st.composite
def plans(draw):
    """Row lengths, and chunks as (width, valid entries a row) that spend them."""
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=3))
    left, chunks = list(lengths), []
    while any(left):
        width = draw(st.integers(1, max(left)))
        counts = [draw(st.integers(0, min(width, n))) if draw(st.booleans()) else min(width, n) for n in left]
        if any(counts):
            chunks.append((width, counts))
            left = [n - c for n, c in zip(left, counts)]
    return lengths, chunks


@settings(max_examples=60, deadline=None)
@given(plans(), st.booleans(), st.sampled_from(["L", "SL"]))
def test_any_chunking_of_rows_of_any_length_is_one_shot(plan, short_window, pattern):
    lengths, chunks = plan
    model = tiny_gpt(sequence_len=3 if short_window else 40, window_pattern=pattern)
    rows = [random_tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    cache = new_cache(model, len(rows), sum(width for width, _ in chunks) + 14)
    got, done = [[] for _ in rows], [0] * len(rows)
    for width, counts in chunks:
        piece = random_tokens(len(rows), width, seed=99)  # padding is random tokens: it must not matter
        for b, count in enumerate(counts):
            piece[b, :count] = rows[b][0, done[b]:done[b] + count]
        with torch.no_grad():
            hidden = model.hidden(piece, cache=cache, counts=torch.tensor(counts))
        for b, count in enumerate(counts):
            got[b].append(hidden[b, :count])
            done[b] += count
    assert cache.lengths.tolist() == lengths
    for b, row in enumerate(rows):
        torch.testing.assert_close(torch.cat(got[b]), model.hidden(row)[0].detach(), **EXACT)


@pytest.mark.parametrize("off", [{}, {"smear": False}, {"key_shift": False}, {"value_embeds": False}, {"n_kv_head": 4}, {"rope_fraction": 0.0}])
def test_decoding_token_by_token_is_the_uncached_pass(off):
    model, idx = tiny_gpt(**off), random_tokens(2, 12)
    hidden, cache = read(model, *idx.split(1, 1))
    torch.testing.assert_close(hidden, model.hidden(idx).detach(), **EXACT)
    assert cache.used == 12 and cache.nbytes() == sum(getattr(cache, n).nbytes for n in STATE if getattr(cache, n) is not None)


def test_explicit_positions_and_links_through_a_cache():
    model, idx = tiny_gpt(), random_tokens(2, 12)
    positions = torch.randint(1, 9, (2, 12), generator=torch.Generator().manual_seed(1)).cumsum(1)
    linked = torch.rand(2, 12, generator=torch.Generator().manual_seed(2)) < 0.6
    linked[:, 5] = torch.tensor([True, False])  # both, right behind the chunk's border
    cache, parts = new_cache(model), []
    for span in (slice(0, 5), slice(5, 12)):
        parts.append(model.hidden(idx[:, span], positions=positions[:, span], linked=linked[:, span], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden(idx, positions=positions, linked=linked), **EXACT)


def test_windows_lifted_through_a_cache():
    model, idx = tiny_gpt(), random_tokens(2, 12)
    cache = new_cache(model)
    parts = [model.hidden(piece, cache=cache, lift_windows=True) for piece in idx.split(5, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), tiny_gpt(sequence_len=100).hidden(idx), **EXACT)


@pytest.mark.parametrize("lengths", [torch.tensor([3, 7]), 5, 0])
def test_truncated_and_continued_is_never_having_read_the_rest(lengths):
    model, idx, more = tiny_gpt(), random_tokens(2, 10), random_tokens(2, 4, seed=8)
    _, cache = read(model, idx)
    cache.truncate(lengths)
    got, _ = read(model, more, cache=cache)
    for b, kept in enumerate(torch.as_tensor(lengths).expand(2).tolist()):
        whole = model.hidden(torch.cat([idx[b:b + 1, :kept], more[b:b + 1]], 1))
        torch.testing.assert_close(got[b], whole[0, kept:].detach(), **EXACT)
    cache.truncate(1000)
    assert cache.used == int(cache.lengths.max())


def test_splicing_in_what_is_there_changes_nothing():
    model, idx = tiny_gpt(), random_tokens(2, 10)
    _, cache = read(model, idx)
    _, other = read(model, idx)
    before = {name: getattr(cache, name).clone() for name in STATE}
    cache.splice(3, 6, other, 3, 6)
    assert all(torch.equal(getattr(cache, name), before[name]) for name in STATE)
    assert cache.lengths.tolist() == [10, 10] and cache.used == 10


@pytest.mark.parametrize("start, stop, new", [(3, 6, 3), (3, 6, 1), (3, 6, 0), (3, 3, 4), (0, 4, 2), (7, 10, 5)])
def test_spliced_cache_holds_prefix_new_piece_and_what_followed(start, stop, new):
    model, idx, fresh = tiny_gpt(), random_tokens(2, 10), random_tokens(2, new, seed=4)
    _, cache = read(model, idx)
    _, other = read(model, torch.cat([idx[:, :start], fresh], 1))
    old = {name: getattr(cache, name).clone() for name in STATE}
    cache.splice(start, stop, other, start, start + new)
    assert cache.lengths.tolist() == [10 - (stop - start) + new] * 2 and cache.used == int(cache.lengths[0])
    scratch = read(model, torch.cat([idx[:, :start], fresh, idx[:, stop:]], 1))[1]
    for name in STATE:
        dim, mine = (1 if name == "x_unsmeared" else 2), getattr(cache, name)
        # up to the end of the new piece every layer is as if read from scratch; what follows is kept as it was
        torch.testing.assert_close(mine.narrow(dim, 0, start + new), getattr(scratch, name).narrow(dim, 0, start + new), **EXACT)
        assert torch.equal(mine.narrow(dim, start + new, 10 - stop), old[name].narrow(dim, stop, 10 - stop))
    if stop < 10:  # before attention nothing depends on what was replaced but, through smear, the first entry after it
        after = slice(start + new + 1, start + new + 10 - stop)
        torch.testing.assert_close(cache.v[0, :, after], scratch.v[0, :, after], **EXACT)


def test_rows_of_different_lengths_are_spliced_alike():
    model, idx = tiny_gpt(), random_tokens(2, 10)
    _, cache = read(model, idx)
    cache.truncate(torch.tensor([10, 7]))
    _, other = read(model, idx[:, :4])
    cache.splice(2, 5, other, 2, 3)
    assert cache.lengths.tolist() == [8, 5] and cache.used == 8
    more = random_tokens(2, 3, seed=6)
    got, _ = read(model, more, cache=cache)
    for b, length in ((0, 10), (1, 7)):
        alone = read(model, idx[b:b + 1, :length])[1]
        alone.splice(2, 5, read(model, idx[b:b + 1, :4])[1], 2, 3)
        torch.testing.assert_close(got[b:b + 1], read(model, more[b:b + 1], cache=alone)[0], **EXACT)


def test_what_does_not_fit_is_refused():
    model = tiny_gpt()
    cache, other = new_cache(model, slots=8), new_cache(model, slots=20)
    model.hidden(random_tokens(2, 6), cache=cache)
    model.hidden(random_tokens(2, 20), cache=other)
    with pytest.raises(ValueError, match="8 entries, 6 are used, 3 more"):
        model.hidden(random_tokens(2, 3), cache=cache)
    with pytest.raises(ValueError, match="no such entries"):
        cache.splice(4, 7, other, 0, 1)
    with pytest.raises(ValueError, match="needs 11"):
        cache.splice(0, 0, other, 0, 5)
    assert cache.lengths.tolist() == [6, 6]
