"""A history on disk: what it refuses and how, one writer, versions, repair, room given back.
Its records: test_storage.py."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mc.store.disk.commits
import mc.store.disk.files
import mc.store.disk.records
from mc.store.disk.commits import note_bytes, read_note
from mc.store.disk.files import FileSystem, partition_files
from mc.store.disk.store import DiskStore
from mc.store.history import History, store_format
from mc.store.ram import DROPPED, ERASED, KEPT, VOID, StoreFormat
from nanochat.common import UserError
from tiny_mc import VOCAB, tiny_base, tiny_mc
from tiny_mc import K as TINY_K

K, D, P, C = 4, 6, 2, 3
FORMAT = StoreFormat(K, D, P, C)
repeat = np.repeat


def vectors(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def fill(store: DiskStore, n: int, seed: int = 0) -> None:
    """n tokens and the blocks they complete, committed."""
    store.append_tokens(torch.arange(store.n_tokens, store.n_tokens + n))
    count = store.n_tokens // K - store.n_nodes(1)
    store.append_nodes(1, vectors(count, D, seed=seed), vectors(count, P, C, seed=seed))
    store.commit()


@pytest.fixture
def path(tmp_path) -> Path:
    """Of a closed store of 150 tokens in partitions of 64 bytes."""
    with DiskStore.create(tmp_path / "store", FORMAT, partition_bytes=64) as store:
        fill(store, 150)
    return tmp_path / "store"


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lock"}


# ---------------------------------------------------------------------------------------------------------------------
# Refusals: one line, nothing changed


def _write(name: str, at: int, data: bytes):
    def damage(path: Path) -> None:
        with open(path / name, "r+b") as f:
            f.seek(at)
            f.write(data)
    return damage


def _newer(name: str):
    """A file whose header says format 9, checksums right."""
    def change(path: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for module in (mc.store.disk.files, mc.store.disk.commits):
                patch.setattr(module, "FORMAT_VERSION", 9)
            with DiskStore.create(path.parent / "newer", FORMAT, partition_bytes=64) as store:
                fill(store, 150)
        shutil.copyfile(path.parent / "newer" / name, path / name)
    return change


def _from_model(name: str):
    def change(path: Path) -> None:
        with DiskStore.create(path.parent / "other", StoreFormat(K, D, P, C, model="abcdef"),
                              partition_bytes=64) as store:
            fill(store, 150)
        shutil.copyfile(path.parent / "other" / name, path / name)
    return change


WRONG = {
    "no store": (lambda path: (path / "manifest").unlink(), "is not a MegaContext store"),
    "no folder": (shutil.rmtree, "is not a MegaContext store"),
    "foreign manifest": (lambda path: (path / "manifest").write_bytes(b"SQLite format 3\0" * 600),
                         "is not that of a MegaContext store"),
    "empty manifest": (lambda path: (path / "manifest").write_bytes(b""), "is not that of a MegaContext store"),
    "both slots damaged": (lambda path: [_write("manifest", at, b"xx")(path) for at in (30, 4126)],
                           "manifest is damaged"),
    "version damaged": (lambda path: (path / "versions" / "000000.ctx").write_bytes(b"MCTXnote"),
                        "is damaged, both copies"),
    "version lost": (lambda path: (path / "versions" / "000000.ctx").unlink(), "version 0 is not there"),
    "newer manifest": (_newer("manifest"), "has format version 9, this program reads up to 1"),
    "newer partition": (_newer("L0/000002.v0000.ctx"), "has format version 9, this program reads up to 1"),
    "truncated partition": (lambda path: os.truncate(path / "L1" / "000003.v0000.ctx", 100),
                            "000003.v0000.ctx: truncated"),
    "short header": (lambda path: os.truncate(path / "L1" / "000003.v0000.ctx", 10), "shorter than its header"),
    "lost partition": (lambda path: (path / "K1" / "000000.v0000.ctx").unlink(), "K1/000000.v0000.ctx: missing"),
    "foreign partition": (_write("L0/000000.v0000.ctx", 0, b"PK\3\4...."), "not a partition of a MegaContext store"),
    "swapped partitions": (lambda path: shutil.copyfile(path / "L0" / "000001.v0000.ctx",
                                                        path / "L0" / "000000.v0000.ctx"),
                           "belongs to another store, level or place"),
    "of another model": (_from_model("L1/000001.v0000.ctx"), "made by model abcdef"),
    "damaged tail": (_write("L0/000009.v0000.ctx", 64, b"\xff"),
                     "records damaged (L0 records 144–150, tokens 144–150)"),
}


@pytest.mark.parametrize("mode", ["r", "rw"])
@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_what_is_not_a_whole_store_is_refused(path, change, message, mode):
    change(path)
    before = contents(path.parent)
    with pytest.raises(UserError) as refused:
        DiskStore.open(path, mode)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert contents(path.parent) == before


def test_a_store_is_made_where_nothing_is(path, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for folder, message in ((path, "already holds a store"), (tmp_path / "full", "is not empty (thesis.tex)"),
                            (tmp_path / "full" / "thesis.tex" / "store", "Not a directory")):
        before = contents(tmp_path)
        with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
            DiskStore.create(folder, FORMAT)
        assert contents(tmp_path) == before
    with pytest.raises(UserError, match="durability 'fast': use one of block, batch, none"):
        DiskStore.open(path, durability="fast")
    for bad in (dict(mode="w"), dict(version=0)):
        with pytest.raises(UserError, match="mode"):
            DiskStore.open(path, **bad)


def test_of_two_creators_the_second_is_refused(tmp_path, monkeypatch):
    """Also where the first makes its store between the second's look at the folder and its lock."""
    take = DiskStore._take_lock

    def late(store: DiskStore) -> None:
        monkeypatch.setattr(DiskStore, "_take_lock", take)
        with DiskStore.create(tmp_path / "s", FORMAT) as first:
            fill(first, 8)
        take(store)

    monkeypatch.setattr(DiskStore, "_take_lock", late)
    with pytest.raises(UserError, match="already holds a store; open it instead"):
        DiskStore.create(tmp_path / "s", FORMAT)
    with DiskStore.open(tmp_path / "s") as store:
        assert store.n_tokens == 8, "and the lock of the second is free"


def test_another_models_store_is_refused_by_the_history(tmp_path):
    gpt = tiny_base()
    model = tiny_mc(gpt).model
    with DiskStore.create(tmp_path / "s", StoreFormat(**{**vars(store_format(gpt, model)), "model": "feed"})) as store:
        with pytest.raises(UserError, match="made by another model: model differ"):
            History(gpt, model, store)


class Refusing(FileSystem):
    """Raises an error at a write, from the n-th on."""

    def __init__(self, error: int, after: int):
        self.error, self.after = error, after

    def write(self, fd, data, offset):
        self.after -= 1
        if self.after < 0:
            raise OSError(self.error, os.strerror(self.error))
        super().write(fd, data, offset)


@pytest.mark.parametrize("edit", [False, True], ids=["append", "edit"])
def test_a_full_disk_changes_nothing(tmp_path, edit):
    """At whichever write it is full: the error says so, and the store, still open or opened
    anew, is at its last commit."""
    path, outcomes = tmp_path / "store", set()
    with DiskStore.create(path, FORMAT, partition_bytes=128) as store:
        fill(store, 50)
    for after in range(100):
        before = {p: data[:56] + data[64:] for p, data in contents(path).items()}
        fs = Refusing(errno.ENOSPC, 10**9)
        store = DiskStore.open(path, durability="block", fs=fs)
        fs.after = after
        try:
            if edit:
                store.rewrite_tokens(10, torch.arange(20))
            fill(store, 30)
            fs.after = 10**9
            store.close()
            break
        except UserError as e:
            outcomes.add(store._closed)
            assert "the disk is full" in str(e) and "\n" not in str(e)
            if store._closed:
                assert "closed, open it again" in str(e)
                with pytest.raises(UserError, match="the disk is full"):
                    store.commit()
            else:
                assert store.n_tokens == 50 and store.n_nodes(1) == 12
                assert {p: data[:56] + data[64:]
                        for p, data in contents(path).items()} == before, "but for seals of partitions not full"
                fs.after = 10**9
                assert torch.equal(store.tokens(torch.arange(50)), torch.arange(50))
                store.close()
        with DiskStore.open(path) as store:
            assert store.verify() == []
            if store.n_tokens == 80:  # the commit was whole, its copy could not be written
                break
            assert torch.equal(store.tokens(torch.arange(50)), torch.arange(50)) and store.n_nodes(1) == 12
    assert after > 10 and outcomes == {True, False}
    with DiskStore.open(path) as store:
        assert store.n_tokens == 80 and store.verify() == [] and store.tokens(torch.tensor([10, 79])).tolist() == [0 if edit else 10, 79]  # noqa: E501


def test_a_read_only_medium_can_be_read(path, monkeypatch):
    real = os.open

    def read_only(name, flags, *rest):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    before = contents(path)
    with pytest.raises(UserError, match="cannot be written .Read-only file system.; .*mode='r'"):
        DiskStore.open(path)
    with DiskStore.open(path, "r") as store:
        assert store.tokens(torch.tensor([149, 0])).tolist() == [149, 0]
        for change in (lambda: fill(store, 1), store.commit, store.compact, lambda: store.truncate(0, 1)):
            with pytest.raises(UserError, match="open for reading only"):
                change()
    assert contents(path) == before


def test_ids_and_vectors_that_do_not_fit_are_refused(path):
    with DiskStore.open(path) as store:
        for bad in (lambda: store.append_tokens(torch.tensor([-2])), lambda: store.append_tokens(torch.tensor([2**31])),
                    lambda: store.append_nodes(1, vectors(1, D + 1), vectors(1, P, C)),
                    lambda: store.append_nodes(1, vectors(1, D), vectors(2, P, C))):
            with pytest.raises(ValueError):
                bad()
        store.append_tokens(torch.tensor([2**31 - 1, VOID]))
        assert store.tokens(torch.tensor([150, 151])).tolist() == [2**31 - 1, VOID]
        for index in ([152], [-1], [0, 2**40]):
            with pytest.raises(IndexError, match="there are 152"):
                store.tokens(torch.tensor(index))


# ---------------------------------------------------------------------------------------------------------------------
# One writer, many readers


def test_one_writer(path):
    hold = (f"import sys, mc.store.disk.store as d; s = d.DiskStore.open({str(path)!r}); print('held', flush=True); "
            "sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"is being written by process {other.pid}; .*mode='r'"):
        DiskStore.open(path)
    with DiskStore.open(path, "r") as store:
        assert store.n_tokens == 150
    other.kill()
    other.wait()
    assert (path / "lock").read_text() == str(other.pid), "the file stays, and locks nothing"
    with DiskStore.open(path) as store:
        fill(store, 1)
        with pytest.raises(UserError, match=f"is being written by process {os.getpid()}"):
            DiskStore.open(path)


def test_a_reader_sees_commits_when_it_asks(path):
    with DiskStore.open(path, durability="block") as writer, DiskStore.open(path, "r") as reader:
        assert not reader.refresh()
        writer.append_tokens(torch.arange(9))
        assert not reader.refresh() and reader.n_tokens == 150
        writer.commit()
        assert reader.n_tokens == 150
        assert reader.refresh() and reader.n_tokens == 159
        assert reader.tokens(torch.tensor([150, 158, 3])).tolist() == [0, 8, 3]
        writer.rewrite_tokens(3, torch.tensor([77]))
        writer.commit()
        assert reader.tokens(torch.tensor([3])).tolist() == [3]
        assert reader.refresh() and reader.tokens(torch.tensor([3])).tolist() == [77]


def test_batch_shows_readers_what_was_synced(path):
    with DiskStore.open(path, durability="none") as writer, DiskStore.open(path, "r") as reader:
        fill(writer, 10)
        assert not reader.refresh()
        writer.sync()
        assert reader.refresh() and reader.n_tokens == 160


# ---------------------------------------------------------------------------------------------------------------------
# Versions, repair, room


def test_older_versions_stay_until_compaction(path):
    with DiskStore.open(path) as store:
        store.rewrite_tokens(10, torch.tensor([1000]))
        fill(store, 5)
        store.truncate(0, 20)
        store.commit()
        assert store.versions() == [0, 1, 2]
        olds = [DiskStore.open(path, "r", version=v) for v in range(3)]
        assert [old.n_tokens for old in olds] == [150, 155, 20]
        assert [old.tokens(torch.tensor([10])).item() for old in olds] == [10, 1000, 1000]
        assert olds[0].gists(1, torch.tensor([36])).equal(vectors(37, D)[36:])
        with pytest.raises(UserError, match="version 3 is not there.*newest is 2"):
            DiskStore.open(path, "r", version=3)
        room = store.disk_bytes()
        assert store.compact() == room - store.disk_bytes() > 0
        assert store.versions() == [2] and len(partition_files(path)) == sum(len(level.versions)
                                                                             for level in store.levels.values())
        assert olds[0].tokens(torch.tensor([10])).item() == 10, "what is mapped stays readable"
        with pytest.raises(UserError, match="missing .removed by a compaction"):
            olds[0].tokens(torch.tensor([149]))
        with pytest.raises(UserError, match="version 0 is not there"):
            DiskStore.open(path, "r", version=0)


def test_an_edit_copies_only_its_partitions(path):
    with DiskStore.open(path) as store:
        before = set(partition_files(path))
        store.rewrite_tokens(70, torch.arange(3))
        store.rewrite_nodes(1, 17, vectors(1, D), vectors(1, P, C))
        store.commit()
        assert sorted(p.relative_to(path).as_posix() for p in set(partition_files(path)) - before) == [
            "K1/000008.v0001.ctx", "L0/000004.v0001.ctx", "L1/000008.v0001.ctx"]


def test_compaction_gives_back_the_room_of_pruned_tokens(tmp_path):
    with DiskStore.create(tmp_path / "s", StoreFormat(32, 4, 1, 2), partition_bytes=1 << 18) as store:
        store.append_tokens(torch.arange(200_000) + 1)
        store.append_nodes(1, vectors(6250, 4), vectors(6250, 1, 2))
        store.commit()
        full = store.disk_bytes()
        cold = torch.arange(1000, 5000)
        store.set_detail(cold, DROPPED)
        store.commit()
        assert store.disk_bytes() >= full and store.tokens(torch.tensor([32_000])).item() == 32_001
        freed = store.compact()
        assert freed > 0.9 * 4000 * 32 * 4, "all but the pages at the ends of partitions"
        assert store.disk_bytes() == pytest.approx(full - freed, abs=20_000)
        assert store.detail(cold).eq(ERASED).all()
        assert store.tokens(torch.tensor([32_000, 31_999, 160_000])).tolist() == [VOID, 32_000, 160_001]
        assert store.verify() == []
        store.append_tokens(torch.arange(10))
        store.rewrite_tokens(31_000, torch.arange(5))
    with DiskStore.open(tmp_path / "s") as store:
        assert store.verify() == [] and store.tokens(torch.tensor([31_000, 40_000, 200_009])).tolist() == [0, VOID, 9]
        copied = 32_000 * 4 + 20_000
        assert store.disk_bytes() < full - freed + copied, "holes stay holes when a partition is copied"


def test_a_compaction_that_finds_nothing_new_makes_no_version(path):
    with DiskStore.open(path) as store:
        store.set_detail(torch.tensor([2, 3, 20]), DROPPED)
        store.commit()
        store.compact()
        version, tokens = store.version, store.tokens(torch.arange(150))
        before = contents(path)
        assert store.compact() == 0 and store.version == version and contents(path) == before
        # an edit that moves erased blocks leaves void ids there, which take room
        store.truncate(0, 76)
        store.append_tokens(torch.full((16,), VOID))
        store.append_nodes(1, vectors(4, D), vectors(4, P, C))
        store.set_detail(torch.tensor([20]), ERASED)
        store.commit()
        version = store.version
        store.compact()
        assert store.version == version + 1 and store.tokens(torch.arange(80, 84)).eq(VOID).all()
        store.set_detail(torch.tensor([1]), DROPPED)
        store.commit()
        store.compact()
        assert store.version == version + 3 and store.tokens(torch.arange(4, 8)).eq(VOID).all()
        assert torch.equal(store.tokens(torch.arange(16, 76)), tokens[16:76]) and store.verify() == []


def test_adopted_levels_take_the_place_of_files_that_were_open(path, tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with DiskStore.open(path) as store:
        for i in range(4):
            model = StoreFormat(K, D, P, C, model=f"m{i}")
            with DiskStore.create(tmp_path / f"beside{i}", model, partition_bytes=64) as beside:
                beside.append_tokens(store.tokens(torch.arange(store.n_tokens)))
                count = store.n_tokens // K
                beside.append_nodes(1, vectors(count, D), vectors(count, P, C))
            store.adopt(beside)
            store.commit()
            fill(store, 6)  # into the last partitions, which stay open
            # manifest, lock, and the last partition of each level
            assert len(os.listdir("/proc/self/fd")) <= before + 5
        assert store.verify() == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_name_that_no_version_has_is_none(path):
    """A stray file of digits is left alone, and hides no version."""
    with DiskStore.open(path) as store:
        store.rewrite_tokens(10, torch.tensor([1000]))
        store.commit()
        store.compact()
    for name in ("0.ctx", "00000.ctx", "0000000.ctx", "1.ctx"):
        (path / "versions" / name).write_bytes(b"")
    for mode in ("r", "rw"):
        with DiskStore.open(path, mode) as store:
            assert store.versions() == [1] and store.repairs == []
    with DiskStore.open(path) as store:
        store.compact()
    assert len(list((path / "versions").iterdir())) == 5


@pytest.mark.parametrize("claimed", [[[DROPPED, 10**6]], [[KEPT, 38]]])
@pytest.mark.parametrize("mode", ["r", "rw"])
def test_a_note_that_tells_of_more_blocks_than_there_are(path, mode, claimed, monkeypatch):
    file = path / "versions" / "000000.ctx"
    note = read_note(file.read_bytes(), file)
    file.write_bytes(2 * note_bytes(note | {"detail": claimed}))
    before = contents(path)
    monkeypatch.setattr(np, "repeat", lambda values, counts: repeat(values, counts) if sum(counts) < 1000
                        else pytest.fail(f"written out: {sum(counts)} numbers"))
    with pytest.raises(UserError, match=f"version 0 tells what became of {claimed[0][1]} blocks, and there are 37"):
        DiskStore.open(path, mode)
    assert contents(path) == before


def tiny_history(path: Path, n: int = 333) -> History:
    gpt = tiny_base()
    model = tiny_mc(gpt).model
    store = DiskStore.create(path, store_format(gpt, model), partition_bytes=512)
    history = History(gpt, model, store)
    history.append(torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(0)))
    return history


def test_damaged_gists_are_made_again_from_the_tokens(tmp_path):
    history = tiny_history(tmp_path / "s")
    gists = {lod: history.store.gists(lod, torch.arange(history.store.n_nodes(lod))) for lod in (1, 2)}
    keys = history.store.keys(torch.arange(history.store.n_nodes(1)))
    history.store.close()
    for name in ("L1/000002.v0000.ctx", "L2/000001.v0000.ctx", "K1/000000.v0000.ctx"):
        _write(name, 100, b"garbage")(tmp_path / "s")
    seen = []
    with DiskStore.open(tmp_path / "s", check=False) as store:
        damage = store.verify(lambda done, total: seen.append((done, total)))
        assert sorted((d.level, d.partition) for d in damage) == [("K1", 0), ("L1", 2), ("L2", 1)]
        assert seen[-1][0] == seen[-1][1] == sum(level.n * level.bytes for level in store.levels.values())
        assert store.repair(History(history.gpt, history.mc, store).nodes) == []
    with DiskStore.open(tmp_path / "s") as store:
        assert store.verify() == []
        for lod in (1, 2):
            torch.testing.assert_close(store.gists(lod, torch.arange(len(gists[lod]))), gists[lod], rtol=0, atol=1e-12)
        torch.testing.assert_close(store.keys(torch.arange(len(keys))), keys, rtol=0, atol=1e-12)


def test_damaged_tokens_are_named_and_never_copied(path):
    """Not into a new version either: it would get a checksum of its own."""
    _write("L0/000003.v0000.ctx", 70, b"\1\2")(path)
    with DiskStore.open(path) as store:
        (damage,) = store.repair(lambda lod, index_N: pytest.fail("nothing to make"))
        assert (damage.level, damage.first_token, damage.last_token) == ("L0", 48, 64)
        with pytest.raises(UserError, match="records damaged"):
            store.rewrite_tokens(50, torch.tensor([1]))
        with pytest.raises(UserError, match="records damaged"):
            store.truncate(0, 60)
        assert store.n_tokens == 150
        store.rewrite_tokens(48, torch.arange(48, 64))
        store.commit()
        assert store.verify() == []


def test_another_models_nodes_are_adopted_at_once(tmp_path):
    """A history made anew beside the old one, by other networks, becomes the next version;
    the one before stays readable."""
    history = tiny_history(tmp_path / "s")
    store, K = history.store, TINY_K
    other = tiny_mc(history.gpt, seed=7).model
    with torch.no_grad():
        other.gistnet.load_state_dict({k: v * 1.5 for k, v in other.gistnet.state_dict().items()})
    beside = DiskStore.create(tmp_path / "s" / "regist", store_format(history.gpt, other), partition_bytes=512)
    made = History(history.gpt, other, beside)
    made.append(store.tokens(torch.arange(200)))
    with pytest.raises(UserError, match="not the same history"):
        store.adopt(beside)
    made.append(store.tokens(torch.arange(200, 333)))
    expected = made.store.gists(1, torch.arange(333 // K))
    old = store.gists(1, torch.arange(333 // K))
    beside.close()
    store.adopt(DiskStore.open(tmp_path / "s" / "regist", "r"))
    store.roll_back()
    assert store.format == store_format(history.gpt, history.mc) and store.gists(1, torch.arange(83)).equal(old)
    store.adopt(DiskStore.open(tmp_path / "s" / "regist", "r"))
    store.commit()
    shutil.rmtree(tmp_path / "s" / "regist")
    store.close()
    with DiskStore.open(tmp_path / "s") as store:
        assert store.verify() == [] and store.versions() == [0, 1]
        history = History(history.gpt, other, store)
        assert store.gists(1, torch.arange(333 // K)).equal(expected) and not expected.equal(old)
        history.append(torch.arange(40))
        with DiskStore.open(tmp_path / "s", "r", version=0) as before:
            assert before.gists(1, torch.arange(333 // K)).equal(old) and before.format.model != store.format.model


def test_more_partitions_than_can_be_mapped(path, monkeypatch):
    monkeypatch.setattr(mc.store.disk.records, "MAX_MAPS", 3)
    before = len(os.listdir("/proc/self/fd"))  # other tests of the process may have left some
    with DiskStore.open(path, "r") as store:
        for seed in range(20):
            index = torch.randint(150, (1 + seed % 5,), generator=torch.Generator().manual_seed(seed))
            assert torch.equal(store.tokens(index), index)
        assert torch.equal(store.tokens(torch.arange(150).flip(0)), torch.arange(150).flip(0))
        assert len(os.listdir("/proc/self/fd")) < before + 50
