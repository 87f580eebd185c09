"""The files of a store on disk: what is done to the medium, checksummed notes, and records in partition files.

Every change of the medium goes through a `FileSystem`, so that a test can refuse it, or lose what no fsync has made safe.

A partition file is a 64-byte header and packed records of one kind, `records_per_partition` of them at most:

    bytes  0– 8  magic "MCTXpart"             28–32  records per partition
           8–10  version of the file format   32–36  number of the partition
          10–11  kind: "L" or "K"             36–52  fingerprint of the model (zeros for tokens)
          11–12  LOD                          52–56  CRC-32 of bytes 0–52
          12–16  block size                   56–60  CRC-32 of the records, once the partition is full
          16–20  width of a vector            60–64  records that it covers: all, or 0 while the partition is not full
          20–22  vectors per record
          22–24  dtype (`DTYPES`)             record i of the level: partition i // R, offset 64 + (i mod R) · record bytes
          24–28  bytes per record

Numbers are little-endian. Records never change once a commit names them: an edit writes the partition anew, under another name.

Shapes: N records, rows [N, record bytes] of uint8.
"""

import ctypes
import json
import math
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mc.storage import int8_rows
from nanochat.common import UserError

FORMAT_VERSION = 1  # of the files; a reader refuses a newer one
HEADER_BYTES = 64
PAGE = 4096
DTYPES = {torch.int32: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4, torch.float64: 5}
_HEADER = struct.Struct("<8sHBBIIHHIII16s")  # bytes 0–52
_PART_MAGIC, _NOTE_MAGIC = b"MCTXpart", b"MCTXnote"
_NOTE = struct.Struct("<8sII")  # magic, version of the format, length of the text; then CRC-32 of all but itself, and the text


class FileSystem:
    """Every way in which a store changes the medium. Raises OSError."""

    def create(self, path: Path) -> int:
        """A new, empty file, in place of any that was there; its descriptor, for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def open(self, path: Path) -> int:
        """A file that exists, for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def close(self, fd: int) -> None:
        os.close(fd)

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        """All of data, at offset."""
        view = memoryview(data).cast("B")
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done

    def truncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fsync(self, fd: int, what: str) -> None:
        """What was written to the file is on the medium; what: which of the store's promises needs it."""
        os.fsync(fd)

    def fsync_folder(self, folder: Path, what: str) -> None:
        """The names of the files in a folder are on the medium."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def mkdir(self, path: Path) -> None:
        path.mkdir()

    def rename(self, path: Path, target: Path) -> None:
        path.replace(target)

    def link(self, path: Path, target: Path) -> None:
        """A second name for a file, in place of any file that had it."""
        target.unlink(missing_ok=True)
        os.link(path, target)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Checksummed notes: JSON that is read whole or not at all


def note_bytes(value: dict) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    start = _NOTE.pack(_NOTE_MAGIC, FORMAT_VERSION, len(text))
    return start + zlib.crc32(text, zlib.crc32(start)).to_bytes(4, "little") + text


def read_note(data: bytes, path: Path) -> dict | None:
    """What `note_bytes` made, at the start of data; None where it is damaged. UserError for a newer version's."""
    if len(data) < _NOTE.size or not is_note(data):
        return None
    _, version, length = _NOTE.unpack_from(data)
    text = data[_NOTE.size + 4:_NOTE.size + 4 + length]
    if zlib.crc32(text, zlib.crc32(data[:_NOTE.size])) != int.from_bytes(data[_NOTE.size:_NOTE.size + 4], "little"):
        return None
    check_version(version, path)
    return json.loads(text)


def is_note(data: bytes) -> bool:
    """Whether it begins like one, damaged or not."""
    return data.startswith(_NOTE_MAGIC)


def check_version(version: int, path: Path) -> None:
    if version > FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}: open it with a newer MegaContext")


# ---------------------------------------------------------------------------------------------------------------------
# Records


@dataclass(frozen=True)
class RecordKind:
    """What the records of a level are, and where they stand."""

    kind: str  # "L": tokens and gists, "K": lens keys
    lod: int
    block_size: int
    vectors: int  # per record
    dim: int  # of a vector
    dtype: torch.dtype
    model: str  # fingerprint; "" for tokens
    partition_bytes: int  # at most this many bytes of records in a partition, unless one record has more

    @property
    def name(self) -> str:
        return f"{self.kind}{self.lod}"

    @property
    def record_bytes(self) -> int:
        scale = 4 if self.dtype == torch.int8 else 0
        return self.vectors * (scale + self.dim * self.dtype.itemsize)

    @property
    def records_per_partition(self) -> int:
        """The largest power of two that fits."""
        return 1 << max(self.partition_bytes // self.record_bytes, 1).bit_length() - 1

    def header(self, partition: int) -> bytes:
        """Bytes 0–56: all but the checksum of the records."""
        fields = _HEADER.pack(_PART_MAGIC, FORMAT_VERSION, ord(self.kind), self.lod, self.block_size, self.dim, self.vectors,
                              DTYPES[self.dtype], self.record_bytes, self.records_per_partition, partition, self.model.encode()[:16])
        return fields + zlib.crc32(fields).to_bytes(4, "little")

    def header_fault(self, data: bytes, partition: int, path: Path) -> str | None:
        """What is wrong with a file's first 64 bytes. UserError for a newer version's."""
        if len(data) < HEADER_BYTES:
            return "shorter than its header"
        if data[:8] != _PART_MAGIC:
            return "not a partition of a MegaContext store"
        if zlib.crc32(data[:52]) != int.from_bytes(data[52:56], "little"):
            return "header damaged"
        check_version(int.from_bytes(data[8:10], "little"), path)
        if data[:56] == self.header(partition):
            return None
        found, expected = _HEADER.unpack_from(data), _HEADER.unpack_from(self.header(partition))
        if found[:-1] == expected[:-1]:
            return f"made by model {found[-1].decode(errors='replace')}, the store by {expected[-1].decode()}"
        return "belongs to another store, level or place"


@dataclass(frozen=True)
class Damage:
    """A partition that is not as it was committed: records [start, end) of a level, which cover tokens [first, last)."""

    level: str
    partition: int
    path: str
    start: int
    end: int
    first_token: int
    last_token: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what} ({self.level} records {self.start}–{self.end}, tokens {self.first_token}–{self.last_token})"


_PARTITION_FILE = re.compile(r"[LK]\d+/\d{6,}\.v(\d{4,})\.ctx")
_ANCHOR = 64  # an address below every mapping, a multiple of the header's size
_UNMAPPED = -2**62
MAX_MAPS = 4096  # partitions of a level that are mapped at a time; Linux allows a process 65,530 mappings


class Records:
    """Records of one kind in partition files, by index.

    State beside the files: how many records there are, which file holds each partition (`versions`), and the checksum of what
    the last partition holds. A commit keeps that state (`keep`), a failure returns to it (`roll_back`).
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
        # A record's address is `_ANCHOR + row · _grain`. One array over all addresses, read at rows of mapped records only, gathers
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
        """The records of int64 indices, one behind the other: uint8 [N · record bytes]. IndexError where there is no such record."""
        if not len(index_N):
            return np.empty(0, np.uint8)
        last = int(index_N.view(np.uint64).max())  # a negative index is a huge one
        if last >= self.n:
            raise IndexError(f"{self.kind.name}: records {index_N.min()} to {index_N.max()} asked for, there are {self.n}")
        tail = self.n >> self._shift
        if last >= self._tail_end and last >> self._shift == tail:
            self._unmap([tail])
        if len(self._row) < len(self.versions):
            self._row = np.append(self._row, np.full(len(self.versions), _UNMAPPED))
        partition_N = index_N >> self._shift
        row_N = self._row[partition_N] + index_N * self._stride
        if row_N.min() < 0:
            missing = np.unique(partition_N[row_N < 0])
            if len(self._maps) + len(missing) > MAX_MAPS:
                self._unmap(list(self._maps))
                missing = np.unique(partition_N)
            for partition in missing.tolist():
                self._map(partition)
            row_N = self._row[partition_N] + index_N * self._stride
        return self._memory[row_N].view(np.uint8)

    def _map(self, partition: int) -> None:
        self._refuse(partition, self.file_fault(partition))
        size = HEADER_BYTES + self.count(partition) * self.bytes
        mapped = torch.UntypedStorage.from_file(str(self.path(partition)), False, size)  # closes its descriptor, unlike mmap.mmap
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
            raise UserError(f"{self.path(partition)}: {fault}; `DiskStore.verify` lists all damage, `repair` mends gists")

    def rows(self, partition: int) -> np.ndarray:
        """uint8 [N, record bytes] of a whole partition, read and not mapped. UserError where it is damaged."""
        self._refuse(partition, self.fault(partition))
        return self._read(partition)

    def _read(self, partition: int) -> np.ndarray:
        count = self.count(partition)
        return np.fromfile(self.path(partition), np.uint8, count * self.bytes, offset=HEADER_BYTES).reshape(count, self.bytes)

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
        if (fault := self.file_fault(partition)) or partition in self._stale:
            return fault
        count, crc = self.count(partition), zlib.crc32(self._read(partition))
        if count < self.R:
            return None if crc == self.tail_crc else "records damaged"
        with open(self.path(partition), "rb") as f:
            sealed = struct.unpack_from("<II", f.read(HEADER_BYTES), 56)
        return None if sealed == (crc, count) else "records damaged"

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
            if partition not in self._stale:
                self.tail_crc = zlib.crc32(part, self.tail_crc if at else 0)
            self.n += len(part)
            if self.n % self.R == 0:
                self._unmap([partition])  # it was mapped as far as it was filled
                if partition not in self._stale:
                    self._seal(partition, self.tail_crc)
                    self._close([self.path(partition)])

    def rewrite(self, start: int, rows: np.ndarray, version: int) -> None:
        """Replace records [start, start + N), which exist. Partitions of another version than this one are copied first."""
        while len(rows):
            partition, at = divmod(start, self.R)
            part, rows = rows[:self.R - at], rows[self.R - at:]
            if self.versions[partition] != version:
                self._copy(partition, version, None if len(part) == self.count(partition) else self.rows(partition))
            self._write(partition, HEADER_BYTES + at * self.bytes, part)
            self._stale.add(partition)
            start += len(part)

    def truncate(self, n: int, version: int) -> None:
        """Keep the first n records."""
        last, kept = divmod(n, self.R)
        rows = self.rows(last)[:kept] if kept else None
        self._unmap([p for p in self._maps if p >= last])
        self._stale = {p for p in self._stale if p < last}
        self.n, self.versions = n, self.versions[:-(-n // self.R)]
        if rows is not None:
            self._copy(last, version, rows)

    def erase(self, index_N: np.ndarray, version: int) -> None:
        """Records become zeros, and whole pages of zeros take no room."""
        partition_N = index_N // self.R
        for partition in np.unique(partition_N).tolist():
            rows, at = self.rows(partition), index_N[partition_N == partition] % self.R
            if rows[at].any():
                rows[at] = 0
                self._copy(partition, version, rows)

    def adopt(self, other: "Records", version: int) -> None:
        """Become the records of another store of the same kind, whose files get a second name."""
        self._make_folder()
        self._unmap(list(self._maps))
        self.n, self.versions, self.tail_crc = other.n, (version,) * len(other.versions), other.tail_crc
        for path, target in zip(other.paths(), self.paths()):
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
        self._close([path] if path in self._fds else [])
        self._fds[path] = self.fs.create(path)
        self._created.add(path)
        self._folder_changed = True
        self._write(partition, 0, np.frombuffer(self.kind.header(partition) + bytes(8), np.uint8))

    def _copy(self, partition: int, version: int, rows: np.ndarray | None) -> None:
        """A partition's new file, with these records; None: as many zeros, to be written over."""
        self._unmap([partition])
        self._create(partition, version)
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
        self._close([path for path in self._fds if path != tail])

    def keep(self) -> None:
        """The state of now is the one to return to."""
        if self._created:
            for path in self._created.difference(self.paths()):
                self.fs.unlink(path)  # begun, then replaced or cut off, between two commits
            self._created.clear()
        self._kept = (self.n, self.versions, self.tail_crc)

    def roll_back(self) -> None:
        """Back to the state last kept; what was written since is removed."""
        self._unmap(list(self._maps))
        self._stale.clear()
        self.n, self.versions, self.tail_crc = self._kept
        self._unsynced -= self._created
        self._close([path for path in self._created if path in self._fds])
        try:
            for path in self._created:
                self.fs.unlink(path)
            self.cut_tail()
        except OSError:
            pass  # a medium that refuses this too: what is left behind has no name, and the next opening for writing removes it
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


def partition_files(store: Path) -> list[Path]:
    """Every partition file below a store's folder, named by a commit or not."""
    return sorted(path for path in store.glob("*/*.ctx") if _PARTITION_FILE.fullmatch(path.relative_to(store).as_posix()))


def partition_version(path: Path) -> int:
    """The version that made a partition file."""
    return int(_PARTITION_FILE.fullmatch(f"{path.parent.name}/{path.name}")[1])


def _runs_of_data(data: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of the parts of bytes that are not whole pages of zeros, pages counted from the start of the file."""
    padded = np.zeros(-(-(HEADER_BYTES + len(data)) // PAGE) * PAGE, np.uint8)
    padded[HEADER_BYTES:HEADER_BYTES + len(data)] = data
    used = np.flatnonzero(np.diff(padded.reshape(-1, PAGE).any(1), prepend=False, append=False)).reshape(-1, 2)
    runs = used * PAGE - HEADER_BYTES
    return [(max(start, 0), min(end, len(data))) for start, end in runs.tolist()]


def encode(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Vectors [N, …, D] as records, uint8 [N, record bytes]; in int8 each vector stands behind its float32 scale."""
    if dtype == torch.int8:
        rows, scale = int8_rows(x)
        rows = np.concatenate([_bytes(scale, torch.float32), _bytes(rows, torch.int8)], -1)
    else:
        rows = _bytes(x, dtype)
    return rows.reshape(len(x), math.prod(rows.shape[1:]))


def _bytes(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    """uint8 [N, …, bytes of D numbers]."""
    integers = x.detach().cpu().to(dtype).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    return np.frombuffer(integers.numpy().tobytes(), np.uint8).reshape(*x.shape[:-1], x.shape[-1] * dtype.itemsize)


def decode(rows: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Vectors [N, *shape] of records, uint8 [N · record bytes]; float32 of int8."""
    if dtype == torch.int8:
        vectors = rows.reshape(-1, *shape[:-1], 4 + shape[-1])
        scale = np.frombuffer(vectors[..., :4].tobytes(), np.float32).reshape(*vectors.shape[:-1], 1)
        return torch.from_numpy(vectors[..., 4:].view(np.int8) * scale)
    return torch.from_numpy(rows).view(dtype).view(-1, *shape) if len(rows) else torch.empty(0, *shape, dtype=dtype)
