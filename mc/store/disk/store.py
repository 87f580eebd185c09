"""A history on disk: a `Store` that survives the process, a power cut and its own edits.

    manifest               two slots, each a checksummed commit (`mc.store.disk.commits`)
    versions/000003.ctx    what only edits change, once per edit: the format, the file of every partition, pruned blocks
    L0/000000.v0000.ctx    tokens; partition 0, in the file that version 0 made
                           (`mc.store.disk.files`: header, records, offsets)
    L1/… L2/… K1/…         gists of each level, lens keys of blocks
    lock                   held by the writer; its pid

A commit says how many records each level has, and is written when all that it names is on the medium (fsync): one
commit point for all files. What stands in files behind a commit's last record is nothing.

Appends write behind the last record. An edit (rewrite, truncation, pruning) never changes a record that a commit names:
it writes the partitions concerned anew, under the next version, and the commit switches to them. The files of the
versions before stay, and can be read (`open(version=…)`), until `compact` removes them.

Shapes: as in `mc.store.ram`.
"""

import errno
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mc.store.disk.commits import MAX_PARTITIONS, Commits, format_of, plain_format, run_lengths, from_run_lengths
from mc.store.disk.files import HEADER_BYTES, Damage, FileSystem, RecordKind, decode, encode, partition_files, partition_version  # noqa: E501
from mc.store.disk.records import Records
from mc.store.ram import DROPPED, ERASED, KEPT, VOID, Detail, StoreFormat, check_keys, check_not_erased
from nanochat.common import UserError

DURABILITY = ("block", "batch", "none")
# durability "batch": a commit syncs when this much, or this long ago, is not on the medium
SYNC_BYTES, SYNC_SECONDS = 64 << 20, 2.0
PARTITION_BYTES = 1 << 20  # what an edit of one record copies, per level; and what a checksum covers
REPAIR_RECORDS = 4096  # nodes remade at a time

log = logging.getLogger(__name__)


class DiskStore:
    """A `Store` in a folder. Make one with `create`, open one with `open`; one writer, any number of readers.

    durability: what a commit promises, to the writer, when it returns.
        "block"  It is on the medium. Nothing that a commit acknowledged is lost, whatever happens.
        "batch"  It survives the process (SIGKILL). A power cut may take the commits since the
                 last sync, whole commits, newest
                 first: at most 64 MiB, and at most those of 2 s while commits keep coming. `sync` and `close` sync.
        "none"   As "batch", but only `sync`, `close` and edits sync.
    In no case does a power cut leave half a commit, or a commit without the ones before
    it. Readers see what was synced.

    A failed write (full disk, read-only medium) raises UserError and undoes what was done since the last commit. After
    a failed commit the store is closed; opened again it holds that commit whole, or the one before.

    Attributes: `dropped`, level → records beyond the last commit that opening for writing
    removed; `repairs`, the same in words.
    """

    def __init__(self, path: Path, writable: bool, durability: str, fs: FileSystem):
        if durability not in DURABILITY:
            raise UserError(f"durability {durability!r}: use one of {', '.join(DURABILITY)}")
        self.path, self.writable, self.durability, self.fs = path, writable, durability, fs
        self.dropped: dict[str, int] = {}
        self.repairs: list[str] = []
        self._levels: dict[str, Records] = {}
        self._kept_levels: dict[str, Records] = {}  # as the last commit left them
        self._commits, self._lock = Commits(fs, path), -1
        self._closed, self._failure = False, None
        self._synced_at = time.monotonic()

    @classmethod
    def create(cls, path: Path | str, format: StoreFormat, *, durability: str = "batch",
               partition_bytes: int = PARTITION_BYTES,
               fs: FileSystem | None = None) -> "DiskStore":
        """An empty store in a folder that does not exist, or is empty, open for writing.

        partition_bytes: size of a partition file; what an edit copies, and a checksum covers.
        """
        store = cls(Path(path), True, durability, fs or FileSystem())
        with store._setting_up():
            for folder in reversed([store.path, *store.path.parents]):
                if not folder.exists():
                    store.fs.mkdir(folder)
                    # each one on the way: synced records in a folder whose own name is lost are lost too
                    store.fs.fsync_folder(folder.parent, "the store's name")
            store._refuse_contents()  # before the lock, whose file must not appear in a folder of something else
            store._take_lock()
            store._refuse_contents()  # and with it: another may have made its store, and closed it, since
            first = dict(version=0, format=plain_format(format), partition_bytes=partition_bytes, files={}, detail=[],
                         text_version=0, before=None)
            store._commits.create(first)
            store._load(first)
        return store

    @classmethod
    def open(cls, path: Path | str, mode: str = "rw", *, version: int | None = None, durability: str = "batch",
             check: bool = True,
             fs: FileSystem | None = None) -> "DiskStore":
        """A store that exists; mode "rw": the one writer, "r": a reader, which changes nothing and needs no lock.

        version: an older one, for reading. check=False: also a store with damaged
        partitions, for `verify` and `repair`.
        UserError: no store, a damaged or newer one, another writer.
        """
        if mode not in ("r", "rw"):
            raise UserError(f"mode {mode!r}: use 'r' or 'rw'")
        if version is not None and mode == "rw":
            raise UserError(f"version {version}: older versions are read-only; open with mode='r'")
        store = cls(Path(path), mode == "rw", durability, fs or FileSystem())
        with store._setting_up():
            # before the lock, whose file must not appear in a folder that is no store
            store._commits.open(store.writable)
            if store.writable:
                store._take_lock()
                store._recover(check)
            else:
                store._follow(version)
                if check:
                    store._refuse_damage(version)
        return store

    @contextmanager
    def _setting_up(self) -> Iterator[None]:
        """Locks and files are let go of where opening fails; a failure of the medium is one line."""
        try:
            yield
        except BaseException as e:
            self._let_go()
            if isinstance(e, OSError):
                raise UserError(f"{self.path}: {_reason(e)}") from e
            raise

    # -- the Store protocol

    @property
    def n_tokens(self) -> int:
        return self.n_records("L0")

    def n_nodes(self, lod: int) -> int:
        return self.n_records(f"L{lod}")

    def n_records(self, level: str) -> int:
        return self._levels[level].n if level in self._levels else 0

    def append_tokens(self, ids_N: Tensor) -> None:
        rows = _token_rows(ids_N)
        with self._changing():
            self._level("L", 0).append(rows, self._staged)

    def append_nodes(self, lod: int, gists_ND: Tensor, keys_NPC: Tensor | None = None) -> None:
        levels = self._node_rows(lod, gists_ND, keys_NPC)
        with self._changing():
            for level, rows in levels:
                level.append(rows, self._staged)

    def rewrite_tokens(self, start: int, ids_N: Tensor) -> None:
        rows = _token_rows(ids_N)
        check_not_erased(self, start, len(rows))
        self._rewrite([(self._level("L", 0), rows)], start)
        self._text_version = self._staged

    def rewrite_nodes(self, lod: int, start: int, gists_ND: Tensor, keys_NPC: Tensor | None = None) -> None:
        self._rewrite(self._node_rows(lod, gists_ND, keys_NPC), start)

    def truncate(self, lod: int, n: int) -> None:
        with self._changing():
            cuts_text = lod == 0 and n < self.n_tokens
            self._truncate("L", lod, n)
            if cuts_text:
                self._text_version = self._staged
            if lod <= 1:
                blocks = n if lod else n // self.format.block_size
                self._truncate("K", 1, blocks)
            if lod == 0:
                # the block that the cut goes through loses its state: its erased records, zeros, would be tokens
                if rest := n % self.format.block_size if self.detail(torch.tensor([blocks])) == ERASED else 0:
                    self._level("L", 0).rewrite(n - rest, _token_rows(torch.full((rest,), VOID)), self._staged)
                self._detail.truncate(blocks)
            while f"L{lod + 1}" in self._levels:
                lod, n = lod + 1, n // self.format.block_size
                self._truncate("L", lod, n)

    def detail(self, index_N: Tensor) -> Tensor:
        return self._detail.at(index_N)

    def set_detail(self, index_N: Tensor, state: int | Tensor) -> None:
        detail = Detail(self._detail.state_N)
        detail.set(index_N, state)
        with self._changing():
            self._edit()
            self._detail = detail

    def has_detail(self, index_N: Tensor) -> Tensor:
        return self.detail(index_N) == KEPT

    def tokens(self, index_N: Tensor) -> Tensor:
        ids_N = decode(self._read("L0", index_N), (), torch.int32).long()
        # what was erased reads as zeros, and 0 is a token
        if self._detail.any_erased:
            ids_N[self._detail.at(index_N // self.format.block_size) == ERASED] = VOID
        return ids_N

    def gists(self, lod: int, index_N: Tensor) -> Tensor:
        return decode(self._read(f"L{lod}", index_N), (self.format.d_model,), self.format.dtype)

    def keys(self, index_N: Tensor) -> Tensor:
        return decode(self._read("K1", index_N), (self.format.n_keys, self.format.key_dim), self.format.dtype)

    def commit(self) -> None:
        """As `durability` says."""
        with self._committing():
            if self._changed():
                unsynced = sum(level.unsynced_bytes for level in self._levels.values())
                overdue = unsynced >= SYNC_BYTES or time.monotonic() - self._synced_at >= SYNC_SECONDS
                # synced at any durability: of a commit that is not, opening checks only what was appended (`_whole`)
                edited = self._staged != self._commits.last["version"]
                self._write_commit(edited or self.durability == "block" or (overdue and self.durability == "batch"))

    def sync(self) -> None:
        """Commit, and wait until it is on the medium, whatever the durability."""
        with self._committing():
            if self._changed() or not self._commits.last["durable"]:
                self._write_commit(True)

    def close(self) -> None:
        """Commit and sync (a writer), and let go of files and the lock. Does nothing the second time."""
        if not self._closed:
            if self.writable:
                self.sync()
            self._let_go()

    def snapshot(self) -> "DiskStore":
        self.commit()
        view = DiskStore(self.path, False, self.durability, self.fs)
        view._commits.last, view.format, view.partition_bytes = self._commits.last, self.format, self.partition_bytes
        view._detail, view._kept_text_version = Detail(self._kept_detail), self._kept_text_version
        for name, level in self.levels.items():
            view._level(name[0], int(name[1:])).set_state(level.n, level.versions, level.tail_crc)
        return view

    def __enter__(self) -> "DiskStore":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        """Leaving by an exception drops what was not committed."""
        if kind is not None and not self._closed and self.writable:
            self.roll_back()
        self.close()

    # -- beyond the protocol

    @property
    def version(self) -> int:
        """Number of the version that is read: every commit with an edit makes the next.
        UserError after a failed commit."""
        if self._failure:
            raise self._failure
        return self._commits.last["version"]

    @property
    def text_version(self) -> int:
        """The last version that rewrote or cut off tokens; those of `repair`, `adopt`, `set_detail` and `compact`
        leave the text as it is."""
        return self._kept_text_version

    @property
    def sequence(self) -> int:
        """Number of the last commit: grows by one with each."""
        return self._commits.last["sequence"]

    @property
    def levels(self) -> dict[str, Records]:
        """L0, L1, …, K1, as far as there are records."""
        return {name: level for name, level in self._levels.items() if level.n}

    def versions(self) -> list[int]:
        """Those that can be read."""
        return self._commits.versions()

    def refresh(self) -> bool:
        """A reader: see what was committed since. Whether there was anything."""
        if self.writable:
            return False
        with self._setting_up():
            before = self.sequence
            self._follow(None)
            return self.sequence != before

    def roll_back(self) -> None:
        """Drop what was done since the last commit."""
        # `adopt` puts other objects in the place of the levels: both have something to undo
        for level in {*self._levels.values(), *self._kept_levels.values()}:
            level.roll_back()
        self._levels = dict(self._kept_levels)
        self.format, self._detail, self._staged = self._kept_format, Detail(self._kept_detail), self._commits.last["version"]  # noqa: E501
        self._text_version = self._kept_text_version

    def disk_bytes(self) -> int:
        """Room that the files take on the medium, all versions and pages of holes not counted."""
        return sum(p.stat().st_blocks * 512 for p in self.path.rglob("*") if p.is_file())

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[Damage]:
        """Every partition of this version whose file is not as it was committed; all records are read and checksummed.

        progress: called with bytes read and bytes in all. Open with check=False what would not open.
        """
        parts = [(level, p) for level in self._levels.values() for p in range(len(level.versions))]
        total, done, found = sum(level.count(p) * level.bytes for level, p in parts), 0, []
        for level, p in parts:
            if fault := level.fault(p):
                found.append(level.damage(p, fault))
            done += level.count(p) * level.bytes
            if progress:
                progress(done, total)
        return found

    def repair(self, nodes: Callable[[int, Tensor], tuple[Tensor, Tensor | None]]) -> list[Damage]:
        """Remake damaged partitions of gists and keys from what is below them, in a new
        version. The damage that is left.

        nodes: (lod, index_N) -> gists [N, D] and keys [N, P, C] of blocks, as `mc.store.history.History.nodes`. Tokens
        cannot be remade, nor gists whose tokens are damaged or erased: they are left as they are.
        """
        left: list[Damage] = []
        # from below: what is above is made of what was just mended
        for damage in sorted(self.verify(), key=lambda d: int(d.level[1:])):
            kind, lod, level = damage.level[0], int(damage.level[1:]), self._levels[damage.level]
            below = [d for d in left if int(d.level[1:]) < lod and d.first_token < damage.last_token
                     and damage.first_token < d.last_token]
            if lod == 0 or below or (lod == 1
                                     and (self.detail(torch.arange(damage.start, damage.end)) == ERASED).any()):
                left.append(damage)
                continue
            made = [nodes(lod, index_N) for index_N in torch.arange(damage.start, damage.end).split(REPAIR_RECORDS)]
            rows = np.concatenate([encode(gists if kind == "L" else keys, self.format.dtype) for gists, keys in made])
            # a whole partition, so that nothing damaged is read or copied
            self._rewrite([(level, rows)], damage.start)
        self.sync()
        return left

    def compact(self) -> int:
        """Commit, and give back the room of older versions and of dropped raw tokens, which are
        then erased. Bytes given back.

        Readers of an older version get a UserError when they touch what is gone. Erased tokens
        become holes in their files, in
        whole pages of 4,096 bytes: offsets stay as they are.
        """
        before = self.disk_bytes()
        pruned, tokens = torch.nonzero(self._detail.state_N != KEPT)[:, 0], self._level("L", 0)
        slot_N = (pruned[:, None] * self.format.block_size + torch.arange(self.format.block_size)).flatten().numpy()
        # a version is made where there is something to erase: newly pruned, or void since an edit moved erased blocks
        if (self._detail.state_N == DROPPED).any() or any(tokens.to_erase(slot_N)):
            with self._changing():
                self._edit()
                self._detail.set(pruned, ERASED)
                tokens.erase(slot_N, self._staged)
        # what replaces the old files is on the medium first; and notes go before the files that they name: files
        # without a note are removed at the next opening, a note without its files is a version that cannot be read
        self.sync()
        with self._changing():
            self._commits.forget_versions()
            self._remove_unnamed()
        return before - self.disk_bytes()

    def adopt(self, other: "DiskStore") -> None:
        """Take over another store's format, gists and keys, at the next commit: its files get a second name here.

        For making all nodes anew with other networks: fill a store beside this one, at leisure, adopt it, commit, and
        delete it. The other store is closed, on the same file system, and its tokens are these (the caller's promise).
        """
        if other.n_tokens != self.n_tokens or other.format.block_size != self.format.block_size:
            raise UserError(f"{other.path} has {other.n_tokens} tokens in blocks of {other.format.block_size}, "
                            f"{self.path} has {self.n_tokens} in blocks of {self.format.block_size}: they are not the "
                            "same history")
        if other.partition_bytes != self.partition_bytes:
            raise UserError(f"{other.path} has partitions of {other.partition_bytes} bytes, {self.path} of "
                            f"{self.partition_bytes}")
        with self._changing():
            self._edit()
            self.format = other.format
            # new objects for the others: the levels in force stay as they are, for a rollback
            self._levels = {"L0": self._levels["L0"]} if self.n_tokens else {}
            for name, level in other.levels.items():
                if name != "L0":
                    self._level(name[0], int(name[1:])).adopt(level, self._staged)

    # -- changing records

    def _level(self, kind: str, lod: int) -> Records:
        """The records of a level, none where it is new."""
        name = f"{kind}{lod}"
        if name not in self._levels:
            self._levels[name] = Records(self.fs, self.path / name,
                                         record_kind(name, self.format, self.partition_bytes))
        return self._levels[name]

    def _node_rows(self, lod: int, gists_ND: Tensor, keys_NPC: Tensor | None) -> list[tuple[Records, np.ndarray]]:
        """What to write where. ValueError for another shape."""
        check_keys(lod, keys_NPC)
        f = self.format
        if gists_ND.shape[1:] != (f.d_model,) or (keys_NPC is not None
                                                  and keys_NPC.shape != (len(gists_ND), f.n_keys, f.key_dim)):
            raise ValueError(f"gists {tuple(gists_ND.shape)}, keys "
                             f"{None if keys_NPC is None else tuple(keys_NPC.shape)}: "
                             f"this store holds gists of {f.d_model} and {f.n_keys} keys of {f.key_dim}")
        levels = [(self._level("L", lod), encode(gists_ND, f.dtype))]
        return levels if keys_NPC is None else [*levels, (self._level("K", 1), encode(keys_NPC, f.dtype))]

    def _rewrite(self, levels: list[tuple[Records, np.ndarray]], start: int) -> None:
        for level, rows in levels:
            if not 0 <= start <= start + len(rows) <= level.n:
                raise IndexError(f"{level.kind.name}: records [{start}, {start + len(rows)}) of {level.n}")
        with self._changing():
            self._edit()
            for level, rows in levels:
                level.rewrite(start, rows, self._staged)

    def _truncate(self, kind: str, lod: int, n: int) -> None:
        if n < self.n_records(f"{kind}{lod}"):
            self._edit()
            self._levels[f"{kind}{lod}"].truncate(n, self._staged)

    def _edit(self) -> None:
        """What follows, up to the commit, makes a new version. The old one stays: nothing of
        it is left to a later sync."""
        if self._staged == self._commits.last["version"]:
            for level in self._levels.values():
                level.sync()
            self._staged += 1

    def _read(self, name: str, index_N: Tensor) -> np.ndarray:
        return self._level(name[0], int(name[1:])).gather(index_N.numpy())

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """What fails half-way is undone, with all since the last commit."""
        self._check_writable()
        try:
            yield
        except BaseException as e:
            # whatever the failure, Ctrl-C included: half of an append must not become part of the next commit
            self.roll_back()
            if isinstance(e, OSError):
                raise UserError(f"{self.path}: {_reason(e)}; what was not committed is dropped") from e
            raise

    @contextmanager
    def _committing(self) -> Iterator[None]:
        """After a failed fsync nobody knows what is on the medium: only opening anew finds out."""
        self._check_writable()
        try:
            yield
        except BaseException as e:
            # not rolled back and tried again: after a failed fsync the system may drop the pages and report success at
            # the next one, so a second try would promise what is lost
            self._let_go()
            self._failure = UserError(f"{self.path}: {_reason(e) if isinstance(e, OSError) else repr(e)}; "
                                      "the commit failed and the store is closed, open it again")
            if isinstance(e, OSError):
                raise self._failure from e
            raise

    def _check_writable(self) -> None:
        if self._failure:
            raise self._failure
        if self._closed:
            raise UserError(f"{self.path} is closed; open it again")
        if not self.writable:
            raise UserError(f"{self.path} is open for reading only; open it with mode='rw'")

    # -- commits

    def _counts(self) -> dict[str, list[int]]:
        """Level → records and checksum of the last partition."""
        return {name: [level.n, level.tail_crc if level.n % level.R else 0] for name, level in self.levels.items()}

    def _changed(self) -> bool:
        return self._staged != self._commits.last["version"] or {n: c[0]
                                                                 for n, c in self._commits.last["levels"].items()} != {
            name: level.n for name, level in self.levels.items()}

    def _write_commit(self, durable: bool) -> None:
        for level in self._levels.values():
            level.finish()
            if durable:
                level.sync()
        if self._staged != self._commits.last["version"]:
            before = dict(version=self.version, levels=self._commits.last["levels"])
            files = {name: run_lengths(level.versions) for name, level in self.levels.items()}
            # before the commit that names it: a crash in between leaves a note that no commit knows, and opening
            # ignores it; the other order would leave a commit whose version cannot be read
            self._commits.write_version(dict(version=self._staged, format=plain_format(self.format),
                                             partition_bytes=self.partition_bytes,
                                             files=files, detail=run_lengths(self._detail.state_N.tolist()),
                                             text_version=self._text_version, before=before))
        # everything that it names stands by now: this one write is what makes it true
        self._commits.write(self._staged, self._counts(), durable)
        if durable:
            self._synced_at = time.monotonic()
        self._keep()

    def _keep(self) -> None:
        for level in self._levels.values():
            level.keep()
        for level in {*self._kept_levels.values()} - {*self._levels.values()}:
            level.close()  # another took its place (`adopt`), and nothing goes back to it
        self._kept_levels, self._kept_format, self._kept_detail = dict(self._levels), self.format, self._detail.state_N
        self._kept_text_version = self._text_version

    # -- opening

    def _refuse_contents(self) -> None:
        # these three are left by a making that was cut short: there is no manifest, so nothing was promised
        if others := sorted({p.name for p in self.path.iterdir()} - {"lock", "versions", "manifest.new"}):
            there = "already holds a store; open it instead" if "manifest" in others else f"is not empty ({others[0]})"
            raise UserError(f"{self.path} {there}")

    def _take_lock(self) -> None:
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # the system frees it with the process: a file left behind locks nothing
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            raise UserError(f"{self.path} is being written by process {pid or '(starting)'}; wait for it or end it, "
                            "or open the store with mode='r'") from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)

    def _load(self, note: dict) -> None:
        """Take the state of a version, at the current commit."""
        self.format, self.partition_bytes = format_of(note["format"]), note["partition_bytes"]
        self._levels = self._records(note, self._commits.last)
        told, blocks = sum(count for _, count in note["detail"]), self.n_tokens // self.format.block_size
        if told > blocks:
            raise UserError(f"{self.path} is damaged: version {note['version']} tells what became of {told} blocks, "
                            f"and there are {blocks}; restore it from a backup")
        self._detail = Detail(torch.from_numpy(from_run_lengths(note["detail"], np.uint8)))
        # a note of a program that did not write it: that of the version, by which its edits were told
        self._staged, self._text_version = note["version"], note.get("text_version", note["version"])
        self._keep()

    def _records(self, note: dict, commit: dict) -> dict[str, Records]:
        """The levels of a version, at one of its commits. Partitions begun since the version
        was made are in its own files."""
        levels = {}
        for name, (n, crc) in commit["levels"].items():
            level = levels[name] = Records(self.fs, self.path / name,
                                           record_kind(name, format_of(note["format"]), note["partition_bytes"]))
            versions, count = from_run_lengths(note["files"].get(name, [])).tolist(), -(-n // level.R)
            if count > MAX_PARTITIONS:
                raise UserError(
                    f"{self.path} is damaged: a commit tells of {n} records of {name}; restore it from a backup")
            level.set_state(n, (*versions[:count], *[note["version"]] * (count - len(versions))), crc)
        return levels

    def _follow(self, version: int | None) -> None:
        """A reader takes the newest synced commit, or the last one of an older version."""
        for attempt in range(100):  # the writer may be in the middle of a slot, or compacting
            durable = [slot for slot in self._commits.slots() if slot and slot["durable"]]
            if not durable:
                time.sleep(0.001)
                continue
            newest = max(durable, key=lambda slot: slot["sequence"])
            # no edit since: records were only added, so the note says nothing new and what is mapped stays mapped
            if self._levels and version is None and newest["version"] == self.version:
                self._commits.last = newest
                for name, (n, crc) in newest["levels"].items():
                    level = self._level(name[0], int(name[1:]))
                    more = -(-n // level.R) - len(level.versions)
                    level.set_state(n, level.versions + (newest["version"],) * more, crc)
                self._keep()
                return
            self._commits.last = newest
            try:
                self._commits.last = self._commits.end_of(newest["version"] if version is None else version)
                note = self._commits.read_version(self.version)
            except UserError:
                if version is not None:
                    raise UserError(f"{self.path}: version {version} is not there, or removed by a compaction; "
                                    f"the newest is {newest['version']}") from None
                # a compaction may have removed the note since the slot was read: the newer slot is there by now
                if attempt == 99:
                    raise
                time.sleep(0.001)
                continue
            self._load(note)
            return
        raise UserError(f"{self.path}/manifest is damaged; open the store with mode='rw' once, which repairs what can "
                        "be repaired")

    def _recover(self, check: bool) -> None:
        """A writer takes the newest commit that is whole, and removes what lies beyond it."""
        slots = self._commits.slots()
        commits = sorted((slot for slot in slots if slot), key=lambda slot: -slot["sequence"])
        durable = next((slot for slot in commits if slot["durable"]), None)
        # newest first; the loop sets what is in force, since loading and checking go by it
        for self._commits.last in commits:
            self._load(self._commits.read_version(self.version))
            if self._commits.last["durable"] or self._whole(since=durable):
                break
            self._say(f"commit {self.sequence} did not reach the medium whole: dropped")
        else:
            raise UserError(f"{self.path}/manifest is damaged, both slots; restore it from a backup")
        # before anything is cut off, removed or mended: a store that is refused stays as it was found
        if check:
            self._refuse_damage(None)
        for name, level in self.levels.items():
            if level.file_fault(len(level.versions) - 1) is None and (extra := level.cut_tail()):
                self.dropped[name] = -(-extra // level.bytes)
        self._remove_unnamed()
        if self.dropped:
            self._say("not committed, dropped: " + ", ".join(f"{count} records of {name}"
                                                             for name, count in sorted(self.dropped.items())))
        for version in self.versions():
            if self._commits.mend_version(version):
                self._say(f"one copy of version {version} was damaged: written anew")
        if None in slots:
            self._say(f"slot {slots.index(None)} of the manifest was damaged or half written: written anew")
        self._commits.resume(slots.index(durable or self._commits.last))
        if slots[0] != slots[1]:
            for name, level in self.levels.items():
                # what a dead process wrote since the last synced commit may be in the system's memory only, and the
                # commit below promises it
                level.touch(durable["levels"].get(name, [0])[0] if durable else 0)
            self._write_commit(True)

    def _whole(self, since: dict | None) -> bool:
        """Whether the partitions that a commit added to, since an earlier one, are as it says."""
        for name, level in self.levels.items():
            # partitions before it were on the medium with the earlier commit, and appends do not touch them
            first = since["levels"].get(name, [0])[0] // level.R if since else 0
            if any(level.fault(p) for p in range(first, len(level.versions))):
                return False
        return True

    def _refuse_damage(self, version: int | None) -> None:
        """Files that are missing, short or foreign, and the checksum of each level's last partition."""
        while found := list(self._glance()):
            sequence = self.sequence
            if not self.writable:
                self._follow(version)  # a compaction may have removed the files of what this reader was opening
            if self.sequence == sequence:
                raise UserError(f"{self.path} is damaged in {len(found)} files, the first is {found[0]}; "
                                f"run `python -m scripts.mc_store verify --store={self.path}`: it names all, and "
                                "--repair remakes gists")

    def _glance(self) -> Iterator[Damage]:
        for level in self._levels.values():
            last = len(level.versions) - 1
            for p in range(last + 1):
                # the checksums of the others are left to `verify`: here they would have the whole history read
                if fault := level.fault(p) if p == last else level.file_fault(p):
                    yield level.damage(p, fault)

    def _remove_unnamed(self) -> None:
        """Partition files that no version names: left by an edit or append that was not committed,
        or by versions that are gone."""
        named: set[Path] = set()
        for version in self.versions():
            for level in self._records(self._commits.read_version(version), self._commits.end_of(version)).values():
                named.update(level.paths())
        for path in partition_files(self.path):
            if path not in named:
                name, version = path.parent.name, partition_version(path)
                if version == self.version:  # appended, and not committed
                    count = (path.stat().st_size - HEADER_BYTES) // record_kind(name, self.format,
                                                                                self.partition_bytes).record_bytes
                    self.dropped[name] = self.dropped.get(name, 0) + max(count, 0)
                self.fs.unlink(path)

    def _say(self, repair: str) -> None:
        self.repairs.append(repair)
        log.warning("%s: %s", self.path, repair)

    def _let_go(self) -> None:
        for level in {*self._levels.values(), *self._kept_levels.values()}:
            level.close()
        self._commits.close()
        # last of all: who gets it begins to write these files
        if self._lock >= 0:
            os.close(self._lock)
        self._lock, self._closed = -1, True


def record_kind(name: str, f: StoreFormat, partition_bytes: int) -> RecordKind:
    """What the records of a level are: "L0", "L1", …, "K1"."""
    kind, lod = name[0], int(name[1:])
    if lod == 0:
        # of no model: when other networks make the nodes anew (`adopt`), the files of the tokens stay
        return RecordKind(kind, lod, f.block_size, 1, 1, torch.int32, "", partition_bytes)
    vectors, dim = (f.n_keys, f.key_dim) if kind == "K" else (1, f.d_model)
    return RecordKind(kind, lod, f.block_size, vectors, dim, f.dtype, f.model, partition_bytes)


def _token_rows(ids_N: Tensor) -> np.ndarray:
    """uint32 records of token ids; VOID becomes 0xFFFFFFFF. ValueError for other negative ids, and from 2^31 on."""
    if len(ids_N) and not (VOID <= int(ids_N.min()) and int(ids_N.max()) < 2**31):
        raise ValueError(
            f"token ids from {int(ids_N.min())} to {int(ids_N.max())}: a store holds 0 to 2^31 − 1, and VOID")
    return encode(ids_N.view(-1, 1), torch.int32)


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full, free some space"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot be written ({os.strerror(error.errno)}); change the rights, or open it with mode='r'"
    return f"{os.strerror(error.errno) if error.errno else error} ({error.filename})" if error.filename else str(error)
