"""Every store gives back what a plain list would."""

import copy
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mc.store.disk.store import DiskStore
from mc.store.history import History, store_format
from mc.store.ram import DROPPED, ERASED, KEPT, VOID, RamStore, StoreFormat
from tiny_mc import VOCAB, tiny_base, tiny_mc
from tiny_mc import K as tinyK

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


@pytest.fixture(params=["ram", "disk"])
def store(request, tmp_path):
    return RamStore(FORMAT) if request.param == "ram" else DiskStore.create(tmp_path / "store", FORMAT,
                                                                            partition_bytes=64)


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


def test_edits_of_the_text_are_told_from_other_versions(store):
    """And an append that is rolled back makes none."""
    filled(store)
    store.commit()
    store.append_tokens(torch.arange(3))
    store.roll_back()
    store.append_tokens(torch.arange(2))
    store.commit()
    assert (store.version, store.text_version) == (0, 0)
    store.set_detail(torch.tensor([1]), DROPPED)
    store.commit()
    store.rewrite_nodes(1, 0, vectors(1, D), vectors(1, P, C))
    store.truncate(0, store.n_tokens)
    store.truncate(1, 4)
    store.commit()
    assert store.text_version == 0 < store.version
    for edit in (lambda: store.rewrite_tokens(0, torch.tensor([1])), lambda: store.truncate(0, 9)):
        edit()
        before = store.version
        assert store.text_version <= before
        store.commit()
        assert store.text_version == store.version == before + 1
        store.append_tokens(torch.arange(2))
        store.commit()
        assert store.text_version == store.version == before + 1


def test_rewritten_records_replace_old_ones(store):
    filled(store)
    store.rewrite_tokens(7, torch.tensor([50, VOID, 52]))
    store.rewrite_nodes(1, 1, vectors(2, D, seed=8), vectors(2, P, C, seed=9))
    store.rewrite_nodes(2, 0, vectors(1, D, seed=7))
    assert store.tokens(torch.arange(6, 11)).tolist() == [6, 50, VOID, 52, 10]
    new, old = vectors(2, D, seed=8), vectors(9, D)
    assert torch.equal(store.gists(1, torch.tensor([2, 0, 1])), torch.stack([new[1], old[0], new[0]]))
    assert torch.equal(store.keys(torch.tensor([1, 2])), vectors(2, P, C, seed=9))
    assert torch.equal(store.gists(2, torch.tensor([0, 1])),
                       torch.stack([vectors(1, D, seed=7)[0], vectors(2, D, seed=2)[1]]))
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
    for refused in (lambda: store.set_detail(torch.tensor([1, 3]),
                                             KEPT), lambda: store.rewrite_tokens(10, torch.arange(3))):
        with pytest.raises(ValueError, match="erased"):
            refused()
    assert store.tokens(torch.arange(4, 12)).tolist() == list(range(4, 12))


def test_keys_come_with_blocks_only(store):
    for lod, keys in ((1, None), (2, vectors(1, P, C))):
        with pytest.raises(ValueError, match="lens keys"):
            store.append_nodes(lod, vectors(1, D), keys)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("d, p, c", [(6, 2, 3), (1, 1, 1), (5, 1, 7), (64, 4, 16)])
def test_stores_round_alike(tmp_path, dtype, d, p, c):
    """Any number of any records, none included; the smallest partitions hold one record."""
    form = StoreFormat(K, d, p, c, dtype)
    stores = RamStore(form), DiskStore.create(tmp_path / "s", form, partition_bytes=8)
    for store in stores:
        store.append_tokens(torch.arange(7)[::3])
        store.append_nodes(1, vectors(5, d)[:, :], vectors(5, p, c))
        store.append_nodes(1, vectors(0, d), vectors(0, p, c))
        store.append_nodes(2, vectors(1, 2 * d)[:, ::2])
    for index in ([], [4], [0, 3, 3, 1]):
        index_N = torch.tensor(index, dtype=torch.int64)
        ram, disk = ((s.gists(1, index_N), s.keys(index_N), s.tokens(index_N % 3), s.gists(2, index_N * 0))
                     for s in stores)
        for a, b in zip(ram, disk):
            assert a.dtype == b.dtype and torch.equal(a, b)
    with pytest.raises(IndexError, match="there are 5"):
        stores[1].gists(1, torch.tensor([0, 5]))


@pytest.mark.parametrize("disk", [False, True], ids=["ram", "disk"])
def test_eight_bit_vectors_are_off_by_half_a_step(tmp_path, disk):
    form = StoreFormat(K, D, P, C, torch.int8)
    store = DiskStore.create(tmp_path / "s", form) if disk else RamStore(form)
    x, keys = vectors(9, D) * torch.logspace(-6, 6, 9)[:, None], vectors(9, P, C)
    keys[3] = 0
    store.append_nodes(1, x, keys)
    for sent, back in ((x, store.gists(1, torch.arange(9))), (keys, store.keys(torch.arange(9)))):
        assert back.dtype == torch.float32
        assert ((back - sent).abs() <= sent.abs().amax(-1, keepdim=True) / 127 * 0.501).all()


# ---------------------------------------------------------------------------------------------------------------------
# Any sequence of operations, against plain lists


class Model:
    """What a store must give back: lists of token ids, of numbers that stand for vectors, and of block states."""

    def __init__(self):
        self.tokens, self.levels, self.keys, self.states = [], {1: [], 2: [], 3: []}, [], []

    def copy(self) -> "Model":
        return copy.deepcopy(self)


def gist(number: int) -> list[float]:
    return [float(number + d) for d in range(D)]


def gists_of(numbers: list[int]) -> torch.Tensor:
    return torch.tensor([gist(n) for n in numbers]).view(-1, D)


def keys_of(numbers: list[int]) -> torch.Tensor:
    return torch.tensor([[float(n * 10 + i) for i in range(P * C)] for n in numbers]).view(-1, P, C)


def check(store, model: Model) -> None:
    """Everything, backwards."""
    assert store.n_tokens == len(model.tokens)
    index = torch.arange(len(model.tokens)).flip(0)
    if model.tokens or store.n_tokens:
        erased = [i // K < len(model.states) and model.states[i // K] == ERASED for i in range(len(index))]
        assert store.tokens(index).tolist() == [VOID if e else t for t, e in zip(model.tokens, erased)][::-1]
    assert store.detail(torch.arange(len(model.states))).tolist() == model.states
    assert store.has_detail(torch.arange(len(model.states))).tolist() == [s == KEPT for s in model.states]
    for lod, numbers in model.levels.items():
        assert store.n_nodes(lod) == len(numbers)
        if numbers:
            assert torch.equal(store.gists(lod, torch.arange(len(numbers))), gists_of(numbers))
    if model.keys:
        assert torch.equal(store.keys(torch.arange(len(model.keys)).flip(0)), keys_of(model.keys[::-1]))


class StoreMachine(RuleBasedStateMachine):
    """Appends, edits and commits in any order. Numbers of vectors are drawn afresh, so that no two
    records are alike by accident."""

    @initialize()
    def begin(self):
        self.store, self.model, self.next = self.make(), Model(), 1
        self.committed, self.old, self.snapshots = self.model.copy(), {}, []

    def make(self):
        return RamStore(FORMAT)

    def numbers(self, count: int) -> list[int]:
        self.next += count
        return list(range(self.next - count, self.next))

    @rule(count=st.integers(0, 41), void=st.booleans())
    def append_tokens(self, count, void):
        ids = self.numbers(count)
        if void and ids:
            ids[-1] = VOID
        self.store.append_tokens(torch.tensor(ids, dtype=torch.int64))
        self.model.tokens += ids
        self.model.states += [KEPT] * (len(self.model.tokens) // K - len(self.model.states))

    @rule(lod=st.integers(1, 3), limit=st.integers(1, 30))
    def grow(self, lod, limit):
        below = self.model.tokens if lod == 1 else self.model.levels[lod - 1]
        numbers = self.numbers(min(len(below) // K - len(self.model.levels[lod]), limit))
        self.store.append_nodes(lod, gists_of(numbers), keys_of(numbers) if lod == 1 else None)
        self.model.levels[lod] += numbers
        self.model.keys += numbers if lod == 1 else []

    @rule(data=st.data())
    def rewrite_tokens(self, data):
        start = data.draw(st.integers(0, len(self.model.tokens)))
        ids = self.numbers(data.draw(st.integers(0, min(20, len(self.model.tokens) - start))))
        blocks = self.model.states[start // K:-(-(start + len(ids)) // K)]
        if ERASED in blocks:
            with pytest.raises(ValueError, match="erased"):
                self.store.rewrite_tokens(start, torch.tensor(ids))
        else:
            self.store.rewrite_tokens(start, torch.tensor(ids, dtype=torch.int64))
            self.model.tokens[start:start + len(ids)] = ids

    @rule(data=st.data(), lod=st.integers(1, 3))
    def rewrite_nodes(self, data, lod):
        level = self.model.levels[lod]
        if not level:
            return
        start = data.draw(st.integers(0, len(level) - 1))
        numbers = self.numbers(data.draw(st.integers(1, min(20, len(level) - start))))
        self.store.rewrite_nodes(lod, start, gists_of(numbers), keys_of(numbers) if lod == 1 else None)
        level[start:start + len(numbers)] = numbers
        if lod == 1:
            self.model.keys[start:start + len(numbers)] = numbers

    @rule(data=st.data(), lod=st.integers(0, 3))
    def truncate(self, data, lod):
        m = self.model
        n = data.draw(st.integers(0, len(m.levels[lod] if lod else m.tokens)))
        self.store.truncate(lod, n)
        if lod == 0:
            del m.tokens[n:], m.states[n // K:]
        for level in range(max(lod, 1), 4):
            del m.levels[level][n // K ** (level - lod):]
        if lod <= 1:
            del m.keys[n // K ** (1 - lod):]

    @rule(data=st.data(), state=st.sampled_from([KEPT, DROPPED, ERASED]))
    def set_detail(self, data, state):
        if not self.model.states:
            return
        blocks = data.draw(st.lists(st.integers(0, len(self.model.states) - 1), max_size=6, unique=True))
        if state != ERASED and any(self.model.states[b] == ERASED for b in blocks):
            with pytest.raises(ValueError, match="erased"):
                self.store.set_detail(torch.tensor(blocks), state)
            return
        self.store.set_detail(torch.tensor(blocks, dtype=torch.int64), state)
        for b in blocks:
            self.model.states[b] = state
            if state == ERASED:  # a truncation may leave a part of the block
                self.model.tokens[b * K:(b + 1) * K] = [VOID] * K

    @rule()
    def commit(self):
        self.store.commit()
        self.committed = self.model.copy()

    @rule()
    def snapshot(self):
        self.commit()
        self.snapshots = [*self.snapshots[-1:], (self.store.snapshot(), self.model.copy())]

    @invariant()
    def same(self):
        if hasattr(self, "store"):
            check(self.store, self.model)
            for snapshot, model in self.snapshots:
                check(snapshot, model)


class DiskMachine(StoreMachine):
    """The same on disk, where commits survive, versions stay, and readers see what was synced."""

    partition_bytes, durability = 64, "block"

    def make(self):
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
        return DiskStore.create(self.folder / "store", FORMAT, partition_bytes=self.partition_bytes,
                                durability=self.durability)

    def reopen(self):
        self.store = DiskStore.open(self.folder / "store", durability=self.durability)
        self.model = self.committed.copy()

    @rule()
    def commit(self):
        version = self.store.version
        before = self.committed
        super().commit()
        if self.store.version != version:
            self.old[version] = before

    @rule()
    def close(self):
        self.commit()
        self.store.close()
        self.reopen()
        assert not self.store.dropped

    @rule()
    def die(self):
        self.store._let_go()
        self.reopen()

    @rule()
    def roll_back(self):
        self.store.roll_back()
        self.model = self.committed.copy()

    @rule()
    def compact(self):
        self.commit()
        self.store.compact()
        self.old, self.snapshots = {}, []
        states = self.model.states = [ERASED if s else KEPT for s in self.model.states]
        self.model.tokens = [VOID if i // K < len(states) and states[i // K] else t
                             for i, t in enumerate(self.model.tokens)]
        self.committed = self.model.copy()

    @rule()
    def read_elsewhere(self):
        assert self.store.versions() == sorted([*self.old, self.store.version])
        for version, model in self.old.items():
            with DiskStore.open(self.folder / "store", "r", version=version) as reader:
                check(reader, model)
                assert reader.verify() == []
        if self.durability == "block":
            with DiskStore.open(self.folder / "store", "r") as reader:
                check(reader, self.committed)

    @rule()
    def verify(self):
        self.commit()
        assert self.store.verify() == []

    def teardown(self):
        if hasattr(self, "folder"):
            self.store._let_go()
            shutil.rmtree(self.folder)


class BatchMachine(DiskMachine):
    partition_bytes, durability = 1000, "batch"


SETTINGS = settings(max_examples=int(os.environ.get("STORE_EXAMPLES", 15)), stateful_step_count=30, deadline=None)
TestRam, TestDisk, TestDiskBatch = StoreMachine.TestCase, DiskMachine.TestCase, BatchMachine.TestCase
TestRam.settings = TestDisk.settings = TestDiskBatch.settings = SETTINGS


# ---------------------------------------------------------------------------------------------------------------------
# A history on disk


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8])
def test_history_on_disk_is_the_history_in_memory(tmp_path, dtype):
    """Whatever the pieces; also where the levels lag behind the tokens when the store is opened."""
    gpt = tiny_base()
    mc = tiny_mc(gpt).model
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (203,), generator=rng)
    ram, disk = (History(gpt, mc, store) for store in (
        RamStore(store_format(gpt, mc, dtype)), DiskStore.create(tmp_path / "a", store_format(gpt, mc, dtype),
                                                                 partition_bytes=200)))
    for piece in ids.split([1, 31, 32, 0, 33, 77, 29]):
        ram.append(piece)
        disk.append(piece)
    disk.store.append_tokens(ids[:50])
    disk.store.close()
    ram.append(ids[:50])
    lagging = DiskStore.open(tmp_path / "a")
    assert lagging.n_nodes(1) == 203 // tinyK < lagging.n_tokens // tinyK
    history = History(gpt, mc, lagging)
    history.grow()
    for lod in (1, 2):
        index = torch.arange(ram.store.n_nodes(lod)).flip(0)
        assert len(index) == 253 // tinyK ** lod == lagging.n_nodes(lod)
        torch.testing.assert_close(lagging.gists(lod, index), ram.store.gists(lod, index), rtol=0, atol=1e-12)
    torch.testing.assert_close(lagging.keys(torch.arange(63)), ram.store.keys(torch.arange(63)), rtol=0, atol=1e-12)
    assert torch.equal(lagging.tokens(torch.arange(253)), ram.store.tokens(torch.arange(253)))
