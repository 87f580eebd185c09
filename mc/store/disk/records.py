"""Records of one kind in partition files (`mc.store.disk.files`): appended, rewritten in new files,
gathered by index from memory maps.

Shapes: N records, rows [N, record bytes] of uint8.
"""

import ctypes
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mc.store.disk.files import HEADER_BYTES, Damage, FileSystem, RecordKind, partition_number
from nanochat.common import UserError

PAGE = 4096
_ANCHOR = 64  # an address below every mapping, a multiple of the header's size
_UNMAPPED = -2**62
MAX_MAPS = 4096  # partitions of a level that are mapped at a time; Linux allows a process 65,530 mappings


class Records:
    """Records of one kind in partition files, by index.

    State beside the files: how many records there are, which file holds each partition (`versions`), and the checksum
    of what the last partition holds. A commit keeps that state (`keep`), a failure returns to it (`roll_back`).
    """

    def __init__(self, fs: FileSystem, folder: Path, kind: RecordKind):
        self.fs, self.folder, self.kind = fs, folder, kind
        self.R, self.bytes = kind.records_per_partition, kind.record_bytes
        self.n = 0
        self.versions: tuple[int, ...] = ()  # of each partition's file
        self.tail_crc = 0  # of the records in the last partition, when it is not full
        self.unsynced_bytes = 0
        self._kept = (0, self.versions, 0)
        self._fds: dict[Path, int] = {}  # of files being written
        self._unsynced: set[Path] = set()
        self._created: set[Path] = set()  # since the state was kept
        self._stale: set[int] = set()  # partitions whose checksum is to be computed
        self._folder_changed = False
        # A record's address is `_ANCHOR + row · _grain`. One array over all addresses, read at rows
        # of mapped records only, gathers
        # from any number of partitions in one call; a loop over partitions took 10 µs for each.
        self._grain = math.gcd(HEADER_BYTES, self.bytes)
        anchor = np.frombuffer((ctypes.c_char * self.bytes).from_address(_ANCHOR), f"V{self.bytes}")
        self._memory = np.lib.stride_tricks.as_strided(anchor, (2**48 // self._grain,), (self._grain,), writeable=False)
        self._stride, self._shift = self.bytes // self._grain, self.R.bit_length() - 1
        self._row = np.full(0, _UNMAPPED)  # of record 0, if it stood before each partition's records
        self._maps: dict[int, torch.UntypedStorage] = {}
        self._tail_end = 0  # records up to which the last partition is mapped

    def set_state(self, n: int, versions: tuple[int, ...], tail_crc: int) -> None:
        """What a commit says."""
        # the last partition was mapped as far as it was filled, and of another version it is another file
        self._unmap([p for p in self._maps if p == self.n // self.R or versions[p:p + 1] != self.versions[p:p + 1]])
        self.n, self.versions, self.tail_crc = n, versions, tail_crc
        self.keep()

    def path(self, partition: int, version: int | None = None) -> Path:
        return self.folder / f"{partition:06d}.v{self.versions[partition] if version is None else version:04d}.ctx"

    def paths(self) -> list[Path]:
        """Of every partition."""
        return [self.path(p) for p in range(len(self.versions))]

    def count(self, partition: int) -> int:
        """Records in a partition."""
        return min(self.R, self.n - partition * self.R)

    # -- reading

    def gather(self, index_N: np.ndarray) -> np.ndarray:
        """The records of int64 indices, one behind the other: uint8 [N · record bytes]. IndexError
        where there is no such record."""
        if not len(index_N):
            return np.empty(0, np.uint8)
        last = int(index_N.view(np.uint64).max())  # a negative index is a huge one
        if last >= self.n:
            raise IndexError(f"{self.kind.name}: records {index_N.min()} to {index_N.max()} asked for, there are "
                             f"{self.n}")
        tail = self.n >> self._shift
        # this record was appended behind the end of the mapping
        if last >= self._tail_end and last >> self._shift == tail:
            self._unmap([tail])
        if len(self._row) < len(self.versions):
            self._row = np.append(self._row, np.full(len(self.versions), _UNMAPPED))
        partition_N = index_N >> self._shift
        row_N = self._row[partition_N] + index_N * self._stride
        if row_N.min() < 0:
            missing = np.unique(partition_N[row_N < 0])
            # all of them: a read counts nothing that would say which is cold; and what one call needs is mapped
            # together, be it more
            if len(self._maps) + len(missing) > MAX_MAPS:
                self._unmap(list(self._maps))
                missing = np.unique(partition_N)
            for partition in missing.tolist():
                self._map(partition)
            row_N = self._row[partition_N] + index_N * self._stride
        # a copy: what was read stays when its partition is unmapped
        return self._memory[row_N].view(np.uint8)

    def _map(self, partition: int) -> None:
        self._refuse(partition, self.file_fault(partition))
        size = HEADER_BYTES + self.count(partition) * self.bytes
        try:
            # closes its descriptor, unlike mmap.mmap
            mapped = torch.UntypedStorage.from_file(str(self.path(partition)), False, size)
        except RuntimeError:
            self._refuse(partition, self.file_fault(partition))  # removed by a compaction since it was looked at
            raise
        self._maps[partition] = mapped
        start = partition << self._shift
        self._row[partition] = (mapped.data_ptr() + HEADER_BYTES - _ANCHOR) // self._grain - start * self._stride
        if partition == self.n // self.R:
            self._tail_end = self.n

    def _unmap(self, partitions: list[int]) -> None:
        for partition in partitions:
            if self._maps.pop(partition, None) is not None:
                self._row[partition] = _UNMAPPED

    def _refuse(self, partition: int, fault: str | None) -> None:
        if fault:
            raise UserError(f"{self.path(partition)}: {fault}; `python -m scripts.mc_store verify` lists all damage")

    def rows(self, partition: int) -> np.ndarray:
        """uint8 [N, record bytes] of a whole partition, read and not mapped. UserError where it is damaged."""
        self._refuse(partition, self.fault(partition))
        return self._read(partition)

    def _read(self, partition: int) -> np.ndarray:
        count = self.count(partition)
        return np.fromfile(self.path(partition), np.uint8, count * self.bytes,
                           offset=HEADER_BYTES).reshape(count, self.bytes)

    def file_fault(self, partition: int) -> str | None:
        """What is wrong with a partition's file, its records not looked at."""
        path = self.path(partition)
        try:
            with open(path, "rb") as f:
                header, size = f.read(HEADER_BYTES), os.fstat(f.fileno()).st_size
        except FileNotFoundError:
            return "missing (removed by a compaction: a reader can refresh; or lost)"
        if fault := self.kind.header_fault(header, partition, path):
            return fault
        missing = HEADER_BYTES + self.count(partition) * self.bytes - size
        return f"truncated, {missing} bytes are missing" if missing > 0 else None

    def fault(self, partition: int) -> str | None:
        """What is wrong with a partition, its records looked at."""
        # rewritten since the last commit: the checksum is that of the records before, until `finish`
        if (fault := self.file_fault(partition)) or partition in self._stale:
            return fault
        count = self.count(partition)
        try:
            sealed, crc = np.fromfile(self.path(partition), "<u4", 2,
                                      offset=56).tolist(), zlib.crc32(self._read(partition))
        except FileNotFoundError:
            # a compaction took it between the two looks
            return self.file_fault(partition)
        return None if (crc == self.tail_crc if count < self.R else sealed == [crc, count]) else "records damaged"

    def damage(self, partition: int, what: str) -> Damage:
        start, span = partition * self.R, self.kind.block_size ** self.kind.lod
        end = start + self.count(partition)
        return Damage(self.kind.name, partition, str(self.path(partition)), start, end, start * span, end * span, what)

    # -- writing

    def append(self, rows: np.ndarray, version: int) -> None:
        """The next records, uint8 [N, record bytes]; version: of the files that begin."""
        while len(rows):
            partition, at = divmod(self.n, self.R)
            part, rows = rows[:self.R - at], rows[self.R - at:]
            if at == 0:
                self._create(partition, version)
            self._write(partition, HEADER_BYTES + at * self.bytes, part)
            # on from the records before, not read again; after a rewrite there is nothing to go on from (`finish`)
            if partition not in self._stale:
                self.tail_crc = zlib.crc32(part, self.tail_crc if at else 0)
            self.n += len(part)
            if self.n % self.R == 0:
                self._unmap([partition])  # it was mapped as far as it was filled
                if partition not in self._stale:
                    self._seal(partition, self.tail_crc)
                    # nothing more is appended to it: a long ingest would hold a descriptor for each until the next sync
                    self._close([self.path(partition)])

    def rewrite(self, start: int, rows: np.ndarray, version: int) -> None:
        """Replace records [start, start + N), which exist. Partitions of another version
        than this one are copied first."""
        while len(rows):
            partition, at = divmod(start, self.R)
            part, rows = rows[:self.R - at], rows[self.R - at:]
            # a file of this version is in no commit yet and is written in place; another is copied, its records
            # checked: damage that is copied would get a checksum of its own. Where all records are replaced none is
            # read, so that a damaged partition can be mended
            if self.versions[partition] != version:
                self._copy(partition, version, None if len(part) == self.count(partition) else self.rows(partition))
            self._write(partition, HEADER_BYTES + at * self.bytes, part)
            self._stale.add(partition)
            start += len(part)

    def truncate(self, n: int, version: int) -> None:
        """Keep the first n records."""
        last, kept = divmod(n, self.R)
        # before `n` changes, which says what the checksum covers
        rows = self.rows(last)[:kept] if kept else None
        self._unmap([p for p in self._maps if p >= last])
        self._stale = {p for p in self._stale if p < last}
        self.n, self.versions = n, self.versions[:-(-n // self.R)]
        if rows is not None:
            # not cut off in its file: the commit in force, a version before this one, counts what stands behind
            self._copy(last, version, rows)

    def erase(self, index_N: np.ndarray, version: int) -> None:
        """Records become zeros, and whole pages of zeros take no room."""
        for partition, rows, at in self.to_erase(index_N):
            rows[at] = 0
            self._copy(partition, version, rows)

    def to_erase(self, index_N: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Partitions where one of these records is not zeros yet, their rows, and where in them these stand."""
        partition_N = index_N // self.R
        for partition in np.unique(partition_N).tolist():
            rows, at = self.rows(partition), index_N[partition_N == partition] % self.R
            # what an earlier compaction erased is not copied again
            if rows[at].any():
                yield partition, rows, at

    def adopt(self, other: "Records", version: int) -> None:
        """Become the records of another store of the same kind, whose files get a second name."""
        self._make_folder()
        self._unmap(list(self._maps))
        self.n, self.versions, self.tail_crc = other.n, (version,) * len(other.versions), other.tail_crc
        for path, target in zip(other.paths(), self.paths()):
            # noted first: whatever fails from here on, the rollback removes it. The records are on the medium since
            # the other store was closed, only their new names are not
            self._created.add(target)
            self.fs.link(path, target)
        self._folder_changed = True

    def _make_folder(self) -> None:
        if not self.folder.exists():
            self.fs.mkdir(self.folder)
            self.fs.fsync_folder(self.folder.parent, "a level's name")

    def _create(self, partition: int, version: int) -> None:
        self._make_folder()
        self.versions = (*self.versions[:partition], version, *self.versions[partition + 1:])
        path = self.path(partition)
        # begun anew within one edit: the dictionary would forget the open descriptor
        self._close([path] if path in self._fds else [])
        self._fds[path] = self.fs.create(path)
        self._created.add(path)
        self._folder_changed = True
        self._write(partition, 0, np.frombuffer(self.kind.header(partition) + bytes(8), np.uint8))

    def _copy(self, partition: int, version: int, rows: np.ndarray | None) -> None:
        """A partition's new file, with these records; None: as many zeros, to be written over."""
        self._unmap([partition])
        self._create(partition, version)
        # its whole size at once: the pages of zeros that are not written are holes
        self.fs.truncate(self._fd(self.path(partition)), HEADER_BYTES + self.count(partition) * self.bytes)
        if rows is not None:
            data = rows.reshape(-1)
            for start, end in _runs_of_data(data):
                self._write(partition, HEADER_BYTES + start, data[start:end])
        self._stale.add(partition)

    def _write(self, partition: int, offset: int, data: np.ndarray) -> None:
        path = self.path(partition)
        self._unsynced.add(path)
        self.fs.write(self._fd(path), data.data, offset)
        self.unsynced_bytes += data.nbytes

    def _fd(self, path: Path) -> int:
        if path not in self._fds:
            self._fds[path] = self.fs.open(path)
        return self._fds[path]

    def _seal(self, partition: int, crc: int) -> None:
        # an append that is rolled back leaves this in a partition that is not full: nobody reads it there, and it is
        # written anew when the partition is full again
        self._write(partition, 56, np.array([crc, self.R], "<u4"))

    def finish(self) -> None:
        """Checksums of what was rewritten, before a commit."""
        for partition in sorted(self._stale):
            crc = zlib.crc32(self._read(partition))
            if self.count(partition) < self.R:
                self.tail_crc = crc
            else:
                self._seal(partition, crc)
        self._stale.clear()

    def touch(self, first: int) -> None:
        """Partitions from record `first` on may not be on the medium."""
        # a store that lost one of them can be opened (check=False), and what is not there cannot be synced
        self._unsynced.update(path for path in self.paths()[first // self.R:] if path.exists())
        self._folder_changed = True

    def sync(self) -> None:
        """Everything written is on the medium."""
        for path in sorted(self._unsynced):
            self.fs.fsync(self._fd(path), "records")
        if self._folder_changed:
            self.fs.fsync_folder(self.folder, "a partition's name")
        if len(self._unsynced) > 1:  # a long ingest does not keep resident what it has read
            self._unmap(list(self._maps))
        self._unsynced.clear()
        self._folder_changed, self.unsynced_bytes = False, 0
        tail = self.path(len(self.versions) - 1) if self.versions else None
        # only to the last one is more appended
        self._close([path for path in self._fds if path != tail])

    def keep(self) -> None:
        """The state of now is the one to return to."""
        if self._created:
            now = {self.path(p) for p in {partition_number(path) for path in self._created} if p < len(self.versions)}
            for path in self._created - now:
                self.fs.unlink(path)  # begun, then replaced or cut off, between two commits
            self._created.clear()
        self._kept = (self.n, self.versions, self.tail_crc)

    def roll_back(self) -> None:
        """Back to the state last kept; what was written since is removed."""
        self._unmap(list(self._maps))
        self._stale.clear()
        self.n, self.versions, self.tail_crc = self._kept
        # the next sync would open them, and they are about to go
        self._unsynced -= self._created
        self._close([path for path in self._created if path in self._fds])
        try:
            for path in self._created:
                self.fs.unlink(path)
            self.cut_tail()
        except OSError:
            # a medium that refuses this too: what is left behind has no name, and the next
            # opening for writing removes it
            pass
        self._created.clear()

    def cut_tail(self) -> int:
        """Remove what stands behind the last record in its file; how many bytes that was."""
        if not self.n % self.R:
            return 0
        path, size = self.path(len(self.versions) - 1), HEADER_BYTES + self.n % self.R * self.bytes
        extra = path.stat().st_size - size
        if extra > 0:
            fd = self.fs.open(path)
            self.fs.truncate(fd, size)
            self.fs.close(fd)
        return max(extra, 0)

    def close(self) -> None:
        self._close(list(self._fds))
        self._unmap(list(self._maps))

    def _close(self, paths: list[Path]) -> None:
        for path in paths:
            self.fs.close(self._fds.pop(path))


def _runs_of_data(data: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of the parts of bytes that are not whole pages of zeros, pages counted
    from the start of the file."""
    padded = np.zeros(-(-(HEADER_BYTES + len(data)) // PAGE) * PAGE, np.uint8)
    padded[HEADER_BYTES:HEADER_BYTES + len(data)] = data
    used = np.flatnonzero(np.diff(padded.reshape(-1, PAGE).any(1), prepend=False, append=False)).reshape(-1, 2)
    runs = used * PAGE - HEADER_BYTES
    return [(max(start, 0), min(end, len(data))) for start, end in runs.tolist()]
