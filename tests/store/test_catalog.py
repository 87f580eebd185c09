"""The catalog keeps what is told, survives a crash on either side of the store's commit, and
refuses what it cannot read."""

import os
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mc.store.catalog import FILE, MAX_BUFFERED, Catalog, Edit
from mc.store.ram import DROPPED, ERASED, VOID, RamStore, StoreFormat
from nanochat.common import UserError

K = 4


def store_of(n: int, void: int = 0) -> RamStore:
    store = RamStore(StoreFormat(K, 2, 1, 2))
    store.append_tokens(torch.cat([torch.arange(n - void), torch.full((void,), VOID)]))
    store.append_nodes(1, torch.zeros(n // K, 2), torch.zeros(n // K, 1, 2))
    return store


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    return Catalog(tmp_path, K)


def test_sources_are_found_by_what_is_known_of_them(catalog):
    before = time.time()
    a = catalog.add_source("docs/a.md", 0, hash="aa", kind="text", tokens=6, complete=True)
    b = catalog.add_source("src/b.py", 8, hash="bb", kind="code", retrieval_score=0.5, tokens=4, complete=True)
    c = catalog.add_source("chat", 12, tokens=0)
    catalog.add_tags(a, [(0, 2, "heading"), (2, 6, "paragraph")])
    assert [s.id for s in catalog.sources()] == [a, b, c]
    assert [s.uri
            for s in catalog.sources(uri="*.py")] == ["src/b.py"] and [s.id for s in catalog.sources(kind="text")] == [a]  # noqa: E501
    assert [s.id for s in catalog.sources(tag="heading")] == [a] and catalog.sources(tag="table") == []
    assert [s.id for s in catalog.sources(min_score=0.4)] == [b]
    assert len(catalog.sources(since=before)) == 3 and catalog.sources(until=before) == []
    assert catalog.tags(a) == [(0, 2, "heading"), (2, 6, "paragraph")]
    assert catalog.complete_source("bb").id == b and catalog.complete_source("") is None
    for start, stop, expected in ((0, 6, [a]), (5, 9, [a, b]), (6, 8, []), (7, 8, []), (8, 9, [b]), (0, 40, [a, b, c]),
                                  (30, 31, [c])):
        assert [s.id for s in catalog.sources_in(start, stop, store_of(40))] == expected, (start, stop)
    with pytest.raises(ValueError, match="starts at slot 3"):
        catalog.add_source("x", 3)
    with pytest.raises(UserError, match="no source 9"):
        catalog.source(9)


def test_a_reader_sees_what_is_committed_while_another_writes(catalog, tmp_path):
    catalog.add_source("a", 0, tokens=3, complete=True)
    with Catalog(tmp_path, K, read_only=True) as reader:
        assert [s.uri for s in reader.sources()] == ["a"]
        catalog.add_source("b", 4, tokens=3, complete=True)
        assert [s.uri for s in reader.sources()] == ["a", "b"]
        with pytest.raises(UserError, match="readonly.*make the folder writable"):
            reader.set("x", "y")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_reader_needs_no_write_permission(catalog, tmp_path):
    catalog.add_source("a", 0, tokens=3, complete=True)
    catalog.close()
    tmp_path.chmod(0o500)
    with Catalog(tmp_path, K, read_only=True) as reader:
        assert len(reader.sources()) == 1


def test_statistics_are_counted_in_memory_and_written_together(catalog, tmp_path):
    """A raw block counts once a working context, however many of its tokens are shown."""
    lod, index = torch.tensor([2, 1, 0, 0, 0, 0, 0]), torch.tensor([0, 16, 68, 69, 70, 71, 72])
    for _ in range(3):
        catalog.count_access(lod, index)
    catalog.count_sensitivity(0, 17, 0.5)
    catalog.count_sensitivity(0, 17, -0.1)
    with Catalog(tmp_path, K, read_only=True) as reader:
        assert reader.statistics() == [], "nothing is written before flush"
        catalog.flush()
        catalog.count_access(torch.tensor([0]), torch.tensor([68]))
        catalog.flush()
        found = {(s.lod, s.index): (s.accesses, s.sensitivity) for s in reader.statistics()}
        assert found == {(2, 0): (3, None), (1, 16): (3, None), (0, 17): (4, pytest.approx(0.2)), (0, 18): (3, None)}
        assert [s.index for s in reader.statistics(lod=0, limit=1)] == [17]
    catalog.set_variance(1, torch.tensor([16, 20]), torch.tensor([0.25, 0.5]))
    assert {s.index: s.variance for s in catalog.statistics(lod=1)} == {16: 0.25, 20: 0.5}
    utility = catalog.detail_utility(19)
    assert utility[17] == pytest.approx(4 * 0.2) and utility[18] == pytest.approx(3 * 0.2) and utility.sum() == utility[17] + utility[18]  # noqa: E501
    assert len(catalog.detail_utility(5)) == 5


def test_counting_needs_bounded_memory(catalog):
    entries = torch.arange(MAX_BUFFERED // 4)
    for _ in range(6):
        catalog.count_access(torch.ones_like(entries), entries % 50)
    assert sum(map(len, catalog._accessed)) <= MAX_BUFFERED
    catalog.flush()
    assert sum(s.accesses for s in catalog.statistics()) == 6 * len(entries)


def test_what_was_announced_and_not_committed_is_taken_back(catalog):
    """The process dies after the catalog wrote and before the store committed."""
    store = store_of(16)
    catalog.add_source("whole", 0, tokens=8, complete=True)
    catalog.add_source("cut", 8, tokens=30, complete=True)
    catalog.add_source("never", 40, tokens=5, complete=True)
    notes = catalog.reconcile(store)
    assert len(notes) == 2 and "never" in notes[0] and "cut off at 8 of 30 tokens" in notes[1]
    assert [(s.uri, s.tokens, s.complete) for s in catalog.sources()] == [("whole", 8, True), ("cut", 8, False)]
    assert catalog.reconcile(store) == []


def test_a_growing_source_reaches_to_the_end(catalog):
    store = store_of(8)
    chat = catalog.add_source("chat", 8)
    store.append_tokens(torch.arange(6))
    assert catalog.totals(store) == (6, 1)
    assert catalog.reconcile(store) == [] and catalog.source(chat).tokens == 6
    store.append_tokens(torch.full((2,), VOID))
    catalog.add_source("next", 16)
    store.append_tokens(torch.arange(3))
    catalog.reconcile(store)
    assert [(s.uri, s.tokens) for s in catalog.sources()] == [("chat", 6), ("next", 3)]


def test_void_slots_come_from_no_source(catalog):
    """Whatever the catalog says of the sources that may grow: the store knows how many tokens they have."""
    store = store_of(12, void=2)
    a = catalog.add_source("cut off", 0)
    assert catalog.sources_in(10, 12, store) == [] and [s.tokens for s in catalog.sources_in(9, 11, store)] == [10]
    b = catalog.add_source("begun", 12)
    assert catalog.sources_in(10, 12, store) == []
    store.append_tokens(torch.arange(3))
    assert [s.id for s in catalog.sources_in(10, 14, store)] == [b]
    assert [(s.id, s.tokens) for s in catalog.sources_in(9, 14, store)] == [(a, 10), (b, 3)]


@pytest.mark.parametrize("tail", range(5))
def test_a_growing_source_keeps_its_tokens_where_blocks_are_erased(catalog, tail):
    """Erased slots read as void, and were not."""
    store = store_of(16)
    store.append_tokens(torch.arange(tail))
    chat = catalog.add_source("chat", 0)
    store.set_detail(torch.tensor([0, 2, 3]), ERASED)
    catalog.reconcile(store)
    assert catalog.source(chat).tokens == 16 + tail == catalog.totals(store)[0]


def test_void_slots_that_were_counted_stay_so_when_their_block_is_erased(catalog):
    store = store_of(12, void=2)
    cut_off = catalog.add_source("cut off", 0)
    catalog.reconcile(store)
    assert catalog.source(cut_off).tokens == 10
    store.set_detail(torch.tensor([2]), ERASED)
    catalog.reconcile(store)
    assert catalog.source(cut_off).tokens == 10 == catalog.totals(store)[0]


def test_a_source_announced_beyond_the_end_has_no_tokens_yet(catalog):
    """A reader comes between the catalog's word and the store's commit."""
    catalog.add_source("a", 0, tokens=8, complete=True)
    catalog.add_source("b", 20)
    assert catalog.totals(store_of(8)) == (8, 2) and catalog.sources_in(0, 40, store_of(8))[-1].uri == "a"


def test_slots_without_a_source_are_told(catalog):
    assert catalog.reconcile(store_of(12)) == ["12 slots at the end have no source"]


def test_tombstones_follow_the_store(catalog):
    store = store_of(40)
    catalog.add_source("a", 0, tokens=16, complete=True)
    catalog.add_source("b", 16, tokens=24, complete=True)
    store.set_detail(torch.tensor([2, 3, 4, 5, 9]), DROPPED)
    assert catalog.reconcile(store) == ["the pruned state of 5 blocks was not known: taken from the store"]
    first = catalog.tombstones()
    assert [(run, count) for run, count, _ in first] == [(2, 2), (4, 2), (9, 1)], "a run lies within one source"
    store.set_detail(torch.tensor([3]), 0)
    catalog.set_tombstones(~store.has_detail(torch.arange(10)).numpy())
    assert [run[:2] for run in catalog.tombstones()] == [(2, 1), (4, 2),
                                                         (9, 1)] and catalog.tombstones()[0][2] == first[0][2]
    catalog.set_tombstones(np.zeros(10, dtype=bool))
    assert catalog.tombstones() == []


def edited(catalog: Catalog, source: int, start: int, removed: int, inserted: int) -> Edit:
    """The catalog after an edit that the store has committed."""
    where = catalog.source(source)
    blocks = where.blocks(K)
    shift = -(-(where.tokens + inserted - removed) // K) - len(blocks)
    edit = Edit(source, start, removed, inserted, blocks.stop, shift, 0)
    catalog.begin_edit(edit)
    catalog.finish_edit({})
    return edit


def span_in(n: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.sets(st.integers(0, n), min_size=2, max_size=2).map(lambda ends: (min(ends), max(ends)))


@settings(deadline=None)
@given(tags=st.lists(span_in(40), max_size=8), replaced=span_in(40) | st.integers(0, 40).map(lambda at: (at, at)),
       inserted=st.integers(0, 12))
def test_tags_stay_with_their_tokens(tags, replaced, inserted):
    """Token by token: a new token has the tags of the one whose place it takes, or of the last one before it."""
    start, stop = replaced
    assume(inserted or 0 < stop - start < 40)  # other edits are refused
    tokens = {f"{i}": range(*tag) for i, tag in enumerate(tags)}
    # the token that each one of the new text was, or stands in for
    stands_for = [*range(start), *(min(start + i, max(stop, start + 1) - 1) if stop > start else start - 1
                                   for i in range(inserted)), *range(stop, 40)]
    with Catalog(None, K) as catalog:
        source = catalog.add_source("a", 0, tokens=40, complete=True)
        catalog.add_tags(source, [(*tag, f"{i}") for i, tag in enumerate(tags)])
        edited(catalog, source, start, stop - start, inserted)
        found = {tag: list(range(first, last)) for first, last, tag in catalog.tags(source)}
    expected = {tag: [i for i, was in enumerate(stands_for) if was in span] for tag, span in tokens.items()}
    assert found == {tag: kept for tag, kept in expected.items() if kept}


def test_tags_behind_a_deletion_move_by_its_length(catalog):
    source = catalog.add_source("a", 0, tokens=200, complete=True)
    catalog.add_tags(source, [(112, 120, "near"), (140, 150, "far"), (90, 105, "into"), (102, 108, "gone")])
    edited(catalog, source, 100, 10, 0)
    assert catalog.tags(source) == [(90, 100, "into"), (102, 110, "near"), (130, 140, "far")]


@settings(deadline=None)
@given(replaced=span_in(150), inserted=st.integers(1, 40), same=st.booleans())
def test_statistics_stay_where_the_content_does(replaced, inserted, same):
    """Of every node of a history, those whose blocks an edit leaves as they were, and where they were."""
    start, stop = replaced
    inserted = stop - start if same else inserted
    with Catalog(None, K) as catalog:
        catalog.add_source("before", 0, tokens=64, complete=True)
        source = catalog.add_source("edited", 64, tokens=150, complete=True)
        catalog.add_source("after", 216, tokens=200, complete=True)
        blocks = range(104)
        nodes = [(lod, i) for lod in range(5) for i in range(len(blocks) // K ** max(lod - 1, 0))]
        for lod in range(5):
            index = torch.tensor([i * (K if lod == 0 else 1) for at, i in nodes if at == lod])
            catalog.count_access(torch.full_like(index, lod), index)
        catalog.flush()
        edit = edited(catalog, source, start, stop - start, inserted)
        found = {(s.lod, s.index) for s in catalog.statistics()}
    first, same_blocks = (64 + start) // K, -(-(64 + stop) // K)
    last = same_blocks if stop - start == inserted else edit.stop_block  # of the source, rechunked to its end
    expected = set()
    for lod, i in nodes:
        mine = [b for b in blocks if b // K ** max(lod - 1, 0) == i]
        if all(b < first or b >= last for b in mine):
            if mine[0] < first and mine[-1] < first or not edit.shift:
                expected.add((lod, i))
            elif lod <= 1:  # moved with its block
                expected.add((lod, i + edit.shift))
    assert found == expected


def test_versions_and_settings(catalog):
    assert catalog.setting("checkpoint") is None
    catalog.set("checkpoint", "a")
    catalog.set("checkpoint", "b")
    catalog.add_version("f1", "here")
    catalog.add_version("f1", "here")
    catalog.add_version("f2", "there")
    assert catalog.setting("checkpoint") == "b" and [v["model"] for v in catalog.versions()] == ["f1", "f2"]


def test_what_is_no_catalog_is_refused(tmp_path):
    with pytest.raises(UserError, match="no catalog at"):
        Catalog(tmp_path, K, read_only=True)
    path = tmp_path / FILE
    path.touch()
    with pytest.raises(UserError, match="is empty, as a creation that was cut off leaves it; open the store for writ"):
        Catalog(tmp_path, K, read_only=True)
    Catalog(tmp_path, K).close()
    Catalog(tmp_path, K, read_only=True).close()
    path.write_bytes(b"not a database, but long enough to be read as the header of one" * 20)
    with pytest.raises(UserError, match="not a database; restore it from a copy"):
        Catalog(tmp_path, K)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE other (x)")
    with pytest.raises(UserError, match="database of something else"):
        Catalog(tmp_path, K)
    path.unlink()
    Catalog(tmp_path, K).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="version 99, this program reads version 1"):
        Catalog(tmp_path, K)


def test_a_second_writer_waits_or_is_refused(catalog, tmp_path, monkeypatch):
    other = Catalog(tmp_path, K)
    other.db.execute("PRAGMA busy_timeout = 50")
    catalog.db.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match="database is locked; another process is writing"):
        other.set("a", "b")
    catalog.db.execute("ROLLBACK")
    other.set("a", "b")


def test_in_memory_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Catalog(None, K) as catalog:
        catalog.add_source("a", 0)
    assert list(Path(tmp_path).iterdir()) == []
