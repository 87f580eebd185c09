"""Edits of a history equal a history made of the edited text, at the cost that the design promises."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mc.store.catalog import Catalog
from mc.store.disk.commits import Commits
from mc.store.disk.store import DiskStore
from mc.store.edits import edit_source, pruned_blocks
from mc.store.history import History, store_format
from mc.store.ram import DROPPED, ERASED, KEPT, RamStore
from nanochat.common import UserError
from tiny_gpt import random_tokens
from tiny_mc import VOCAB, K, tiny_base, tiny_mc

GPT = tiny_base()
MC = tiny_mc(GPT, max_lod=3).model.eval()


def history_of(texts: list[list[int]], *, store=None, open_end: bool = False) -> tuple[History, Catalog]:
    """A history and catalog of sources; open_end: the last one may grow."""
    history = History(GPT, MC, store or RamStore(store_format(GPT, MC)))
    catalog = Catalog(None, K)
    for i, text in enumerate(texts):
        last = open_end and i == len(texts) - 1
        catalog.add_source(f"text {i}", history.n_tokens, tokens=len(text), complete=not last)
        history.append(torch.tensor(text))
        if not last:
            history.end_source()
    return history, catalog


def assert_same(history: History, catalog: Catalog, texts: list[list[int]], open_end: bool = False) -> None:
    """Every record equals that of a history made anew."""
    made, made_catalog = history_of(texts, open_end=open_end)
    assert history.n_tokens == made.n_tokens
    every = torch.arange(made.n_tokens)
    assert torch.equal(history.store.tokens(every), made.store.tokens(every))
    for lod in range(1, MC.config.max_lod + 1):
        assert (count := history.store.n_nodes(lod)) == made.store.n_nodes(lod)
        if count:
            torch.testing.assert_close(
                history.store.gists(lod, torch.arange(count)), made.store.gists(lod, torch.arange(count)), rtol=0,
                atol=1e-12
            )
    blocks = torch.arange(history.store.n_nodes(1))
    if len(blocks):
        torch.testing.assert_close(history.store.keys(blocks), made.store.keys(blocks), rtol=0, atol=1e-12)
    assert [(s.uri, s.start, s.tokens) for s in catalog.sources()] == [(s.uri, s.start, s.tokens)
                                                                       for s in made_catalog.sources()]
    assert catalog.reconcile(history.store) == []


tokens = st.integers(0, VOCAB - 1)
texts_of = st.lists(st.lists(tokens, min_size=1, max_size=40), min_size=1, max_size=6)
drawn = dict(deadline=None, suppress_health_check=list(HealthCheck))


@given(data=st.data(), texts=texts_of, open_end=st.booleans())
@settings(max_examples=40, **drawn)
def test_any_edits_equal_a_rebuild(data, texts, open_end):
    edit_and_compare(data, texts, open_end, *history_of(texts, open_end=open_end))


@given(data=st.data(), texts=texts_of, open_end=st.booleans())
@settings(max_examples=15, **drawn)
def test_any_edits_on_disk_equal_a_rebuild(data, texts, open_end):
    """Across partitions of a few records, and again after opening."""
    with tempfile.TemporaryDirectory() as folder:
        store = DiskStore.create(Path(folder) / "s", store_format(GPT, MC), durability="none", partition_bytes=2048)
        history, catalog = history_of(texts, store=store, open_end=open_end)
        edit_and_compare(data, texts, open_end, history, catalog)
        store.close()
        with DiskStore.open(Path(folder) / "s") as again:
            assert again.repairs == [] and again.verify() == []
            assert_same(History(GPT, MC, again), catalog, texts, open_end)


def edit_and_compare(data, texts: list[list[int]], open_end: bool, history: History, catalog: Catalog) -> None:
    for _ in range(data.draw(st.integers(1, 4))):
        which = data.draw(st.integers(0, len(texts) - 1))
        text = texts[which]
        start = data.draw(st.integers(0, len(text)))
        removed = data.draw(st.integers(0, len(text) - start))
        same = data.draw(st.booleans())
        new = data.draw(st.lists(tokens, min_size=removed if same else 0, max_size=removed if same else 30))
        if not (removed or new) or len(text) - removed + len(new) == 0:
            continue
        before = [history.store.n_nodes(lod) for lod in (1, 2, 3)]
        report = edit_source(history, catalog, which + 1, start, removed, torch.tensor(new, dtype=torch.long))
        stop_block = -(-len(text) // K)
        text[start : start + removed] = new
        if len(new) == removed:
            first = sum(-(-len(t) // K) for t in texts[:which]) + start // K
            stop = sum(-(-len(t) // K) for t in texts[:which]) + -(-(start + removed) // K)
            for lod in (1, 2, 3):
                assert report.recomputed.get(lod, 0) == max(0, min(stop, before[lod - 1]) - first)
                first, stop = first // K, -(-stop // K)
            assert report.moved == 0
        elif -(-len(text) // K) == stop_block:
            assert report.recomputed.get(1, 0) <= stop_block - start // K and report.moved == 0
        else:
            after = sum(-(-len(t) // K) for t in texts[which + 1 :])
            assert report.recomputed.get(1, 0) <= -(-len(text) // K) - start // K
            assert report.moved == after - (open_end and which < len(texts) - 1 and len(texts[-1]) % K > 0)
    assert_same(history, catalog, texts, open_end)


def test_one_percent_of_the_tokens_in_place():
    """Blocks recomputed are those edited and their ancestors, counted."""
    texts = [random_tokens(length, seed=length).tolist() for length in (301, 1023, 77, 599, 2000)]
    history, catalog = history_of(texts)
    total = sum(map(len, texts))
    generator = torch.Generator().manual_seed(3)
    edited = {1: set(), 2: set(), 3: set()}
    recomputed = dict.fromkeys(edited, 0)
    for _ in range(total // 100):
        which = int(torch.randint(len(texts), (), generator=generator))
        at = int(torch.randint(len(texts[which]), (), generator=generator))
        texts[which][at] = int(torch.randint(VOCAB, (), generator=generator))
        report = edit_source(history, catalog, which + 1, at, 1, torch.tensor([texts[which][at]]))
        slot = catalog.source(which + 1).start + at
        for lod in edited:
            exists = slot // K**lod < history.store.n_nodes(lod)
            edited[lod] |= {slot // K**lod} if exists else set()
            recomputed[lod] += report.recomputed.get(lod, 0)
            assert report.recomputed.get(lod, 0) == exists
        assert report.moved == 0
    assert len(edited[1]) > 30 and all(recomputed[lod] >= len(edited[lod]) for lod in edited)
    assert_same(history, catalog, texts)


def test_pruned_blocks_move_with_their_content():
    texts = [random_tokens(length, seed=length).tolist() for length in (13, 30, 22)]
    history, catalog = history_of(texts)
    store = history.store
    store.set_detail(torch.tensor([4, 5]), DROPPED)  # of the second source
    store.set_detail(torch.tensor([13, 14]), ERASED)  # of the third
    catalog.set_tombstones(pruned_blocks(store))
    gists = store.gists(1, torch.arange(12, 18))
    edit_source(history, catalog, 1, 2, 0, torch.arange(5))  # 13 → 18 tokens: one block more
    assert torch.flatten((~store.has_detail(torch.arange(store.n_nodes(1)))).nonzero()).tolist() == [5, 6, 14, 15]
    assert store.detail(torch.tensor([5, 15])).tolist() == [DROPPED, ERASED]
    assert torch.equal(store.gists(1, torch.arange(13, 19)), gists), "blocks whose tokens are gone keep their gists"
    assert [(first, count) for first, count, _ in catalog.tombstones()] == [(5, 2), (14, 2)]
    assert torch.equal(store.tokens(torch.arange(5 * K, 7 * K)), torch.tensor(texts[1][: 2 * K])[-2 * K :]), (
        "a dropped block's tokens moved too"
    )
    edit_source(history, catalog, 2, 1, 1, torch.tensor([7]))  # through a dropped block
    assert [(first, count) for first, count, _ in catalog.tombstones()] == [(6, 1), (14, 2)]
    before = store.tokens(torch.arange(store.n_tokens))
    with pytest.raises(UserError, match="2 blocks .* pruned and compacted away .*block 14"):
        edit_source(history, catalog, 3, 0, 1, torch.empty(0, dtype=torch.long))
    assert torch.equal(store.tokens(torch.arange(store.n_tokens)), before) and catalog.reconcile(store) == []
    edit_source(history, catalog, 3, 0, 1, torch.tensor([9]))  # a block of its own, not erased


@pytest.mark.parametrize(
    "arguments, message",
    {
        "no such source": ((9, 0, 1, []), "no source 9"),
        "outside": ((1, 3, 11, []), r"tokens \[3, 14\) of source 1, which has 13"),
        "negative": ((1, -1, 1, []), "give a range inside"),
        "nothing": ((1, 3, 0, []), "removes nothing and inserts nothing"),
        "everything": ((1, 0, 13, []), "would leave nothing of source 1"),
        "foreign token": ((1, 0, 1, [VOCAB]), f"token id {VOCAB} is outside the vocabulary"),
    }.values(),
)
def test_a_wrong_edit_changes_nothing(arguments, message):
    history, catalog = history_of([list(range(13)), list(range(9))])
    source, start, removed, ids = arguments
    with pytest.raises(UserError, match=message):
        edit_source(history, catalog, source, start, removed, torch.tensor(ids, dtype=torch.long))
    assert_same(history, catalog, [list(range(13)), list(range(9))])
    assert catalog.edits() == [] and catalog.count("intent") == 0


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("new", [5, 1])
def test_a_crash_between_store_and_catalog_is_settled(committed, new, monkeypatch):
    """Whether or not the store committed the edit before the process died, the catalog agrees with
    it when it is opened again."""
    texts = [list(range(13)), list(range(9)), list(range(6))]
    history, catalog = history_of(texts)
    catalog.add_tags(2, [(0, 4, "heading")])
    catalog.count_access(torch.tensor([1, 1]), torch.tensor([0, 6]))
    catalog.flush()

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    if committed:
        monkeypatch.setattr(Catalog, "finish_edit", die)
    else:
        monkeypatch.setattr(Catalog, "abandon_edit", die)
        monkeypatch.setattr("mc.store.edits._rechunk", die)
    with pytest.raises(Killed):
        edit_source(history, catalog, 1, 2, 0, torch.arange(new))
    monkeypatch.undo()
    assert catalog.count("intent") == 1
    notes = catalog.reconcile(history.store)
    assert len(notes) == 1 and ("finished" if committed else "undone") in notes[0]
    if committed:
        texts[0][2:2] = range(new)
    assert_same(history, catalog, texts)
    assert catalog.tags(2) == [(0, 4, "heading")] and catalog.source(1).edits == committed
    expected = [(1, 6 + (committed and new > 3), 1)] if committed else [(1, 0, 1), (1, 6, 1)]
    assert [(s.lod, s.index, s.accesses) for s in catalog.statistics()] == expected


@pytest.mark.parametrize("committed", [False, True])
@pytest.mark.parametrize("since", ["repair", "prune", "adopt"])
def test_what_else_makes_a_version_is_not_taken_for_the_edit(committed, since, tmp_path, monkeypatch):
    """Between a crash in an edit and the opening that settles it, the store may be repaired."""
    texts = [random_tokens(length, seed=length).tolist() for length in (40, 30, 60)]
    store = DiskStore.create(tmp_path / "s", store_format(GPT, MC), partition_bytes=2048)
    history, catalog = history_of(texts, store=store)

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Catalog, "finish_edit" if committed else "abandon_edit", die)
        if not committed:
            patch.setattr("mc.store.edits._rechunk", die)
        with pytest.raises(Killed):
            edit_source(history, catalog, 1, 3, 7, torch.arange(20))
    store.close()
    if since == "repair":
        path = max((tmp_path / "s" / "L1").iterdir())
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with DiskStore.open(tmp_path / "s", check=False) as store:
        before = store.version
        if since == "repair":
            assert store.repair(History(GPT, MC, store).nodes) == []
        elif since == "prune":
            store.set_detail(torch.tensor([3]), DROPPED)
            store.commit()
            store.set_detail(torch.tensor([3]), KEPT)
            store.commit()
        else:
            with DiskStore.create(tmp_path / "beside", store.format, partition_bytes=2048) as beside:
                History(GPT, MC, beside).fill(store.tokens(torch.arange(store.n_tokens)))
            store.adopt(beside)
        store.commit()
        assert store.version > before
    with DiskStore.open(tmp_path / "s") as store:
        notes = catalog.reconcile(store)
        assert len(notes) == 1 and ("finished" if committed else "undone") in notes[0]
        if committed:
            texts[0][3:10] = range(20)
        assert_same(History(GPT, MC, store), catalog, texts)


def test_a_note_without_the_version_of_its_text_is_read(tmp_path, monkeypatch):
    """As programs before wrote it: every version counts as one of the text, which is how they told an edit."""
    write = Commits.write_version
    monkeypatch.setattr(Commits, "write_version", lambda self, note: write(
        self, {name: value for name, value in note.items() if name != "text_version"}))
    with DiskStore.create(tmp_path / "s", store_format(GPT, MC)) as store:
        store.append_tokens(torch.arange(8))
        store.commit()
        store.rewrite_tokens(3, torch.tensor([1]))
    with DiskStore.open(tmp_path / "s") as store:
        assert store.version == store.text_version == 1 and store.repairs == []


def test_an_edit_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    texts = [random_tokens(length, seed=length).tolist() for length in (40, 30, 60)]
    with DiskStore.create(tmp_path / "s", store_format(GPT, MC), partition_bytes=2048) as store:
        history, catalog = history_of(texts, store=store)
        for removed, new in ((3, 3), (3, 20)):  # in place, and with what follows moving
            with monkeypatch.context() as patch:
                patch.setattr(history, "nodes", lambda lod, index_N: (_ for _ in ()).throw(MemoryError("no room")))
                with pytest.raises(MemoryError):
                    edit_source(history, catalog, 2, 5, removed, torch.arange(new))
            assert catalog.edits() == [] and store.version == 0
            assert_same(history, catalog, texts)
        edit_source(history, catalog, 2, 5, 3, torch.arange(20))
        texts[1][5:8] = range(20)
        assert_same(history, catalog, texts)
