"""What is done to the medium, and what the files of a store are.

Every change of the medium goes through a `FileSystem`, so that a test can refuse it, or
lose what no fsync has made safe.

A partition file is a 64-byte header and packed records of one kind, `records_per_partition` of them at most:

    bytes  0– 8  magic "MCTXpart"             28–32  records per partition
           8–10  version of the file format   32–36  number of the partition
          10–11  kind: "L" or "K"             36–52  fingerprint of the model (zeros for tokens)
          11–12  LOD                          52–56  CRC-32 of bytes 0–52
          12–16  block size                   56–60  CRC-32 of the records, once the partition is full
          16–20  width of a vector            60–64  records that it covers: all, or 0 while the partition is not full
          20–22  vectors per record
          22–24  dtype (`DTYPES`)             record i of the level: partition i // R,
                 offset 64 + (i mod R) · record bytes
          24–28  bytes per record

Numbers are little-endian. Records never change once a commit names them: an edit writes the
partition anew, under another name.

Shapes: N records, rows [N, record bytes] of uint8.
"""

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

from mc.store.ram import int8_rows
from nanochat.common import UserError

FORMAT_VERSION = 1  # of the files; a reader refuses a newer one
HEADER_BYTES = 64
DTYPES = {torch.int32: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int8: 4, torch.float64: 5}
_HEADER = struct.Struct("<8sHBBIIHHIII16s")  # bytes 0–52
_MAGIC = b"MCTXpart"
_PARTITION_FILE = re.compile(r"[LK]\d+/(\d{6,})\.v(\d{4,})\.ctx")


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
            # the system may take less than it is given: the last room of a disk, and only the next call says it is full
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
        # `os.link` refuses a name that is taken, as by an edit before this one that is in no commit yet
        target.unlink(missing_ok=True)
        os.link(path, target)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)


def check_version(version: int, path: Path) -> None:
    if version > FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}: open it with "
                        "a newer MegaContext")


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
        # a power of two, so that the partitions of any number of records are one shift of their indices
        return 1 << max(self.partition_bytes // self.record_bytes, 1).bit_length() - 1

    def header(self, partition: int) -> bytes:
        """Bytes 0–56: all but the checksum of the records."""
        fields = _HEADER.pack(_MAGIC, FORMAT_VERSION, ord(self.kind), self.lod, self.block_size, self.dim, self.vectors,
                              DTYPES[self.dtype], self.record_bytes, self.records_per_partition, partition,
                              self.model.encode()[:16])
        return fields + zlib.crc32(fields).to_bytes(4, "little")

    def header_fault(self, data: bytes, partition: int, path: Path) -> str | None:
        """What is wrong with a file's first 64 bytes. UserError for a newer version's."""
        if len(data) < HEADER_BYTES:
            return "shorter than its header"
        if data[:8] != _MAGIC:
            return "not a partition of a MegaContext store"
        if zlib.crc32(data[:52]) != int.from_bytes(data[52:56], "little"):
            return "header damaged"
        # behind the checksum: a damaged byte must not pass for the version of a newer program
        check_version(int.from_bytes(data[8:10], "little"), path)
        if data[:56] == self.header(partition):
            return None
        found, expected = _HEADER.unpack_from(data), _HEADER.unpack_from(self.header(partition))
        if found[:-1] == expected[:-1]:
            return f"made by model {found[-1].decode(errors='replace')}, the store by {expected[-1].decode()}"
        return "belongs to another store, level or place"


@dataclass(frozen=True)
class Damage:
    """A partition that is not as it was committed: records [start, end) of a level, which
    cover tokens [first, last)."""

    level: str
    partition: int
    path: str
    start: int
    end: int
    first_token: int
    last_token: int
    what: str

    def __str__(self) -> str:
        return (f"{self.path}: {self.what} ({self.level} records {self.start}–{self.end}, tokens "
                f"{self.first_token}–{self.last_token})")


def partition_files(store: Path) -> list[Path]:
    """Every partition file below a store's folder, named by a commit or not."""
    # what no version names of these is deleted at the next opening: a file of somebody else must not be among them
    return sorted(path for path in store.glob("*/*.ctx")
                  if _PARTITION_FILE.fullmatch(path.relative_to(store).as_posix()))


def partition_version(path: Path) -> int:
    """The version that made a partition file."""
    return int(_PARTITION_FILE.fullmatch(f"{path.parent.name}/{path.name}")[2])


def partition_number(path: Path) -> int:
    return int(_PARTITION_FILE.fullmatch(f"{path.parent.name}/{path.name}")[1])


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
    # as integers of the same width: numpy has no bfloat16
    integers = x.detach().cpu().to(dtype).view({1: torch.int8, 2: torch.int16, 4: torch.int32,
                                                8: torch.int64}[dtype.itemsize])
    return np.frombuffer(integers.numpy().tobytes(), np.uint8).reshape(*x.shape[:-1], x.shape[-1] * dtype.itemsize)


def decode(rows: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Vectors [N, *shape] of records, uint8 [N · record bytes]; float32 of int8."""
    if dtype == torch.int8:
        vectors = rows.reshape(-1, *shape[:-1], 4 + shape[-1])
        scale = np.frombuffer(vectors[..., :4].tobytes(), np.float32).reshape(*vectors.shape[:-1], 1)
        return torch.from_numpy(vectors[..., 4:].view(np.int8) * scale)
    return torch.from_numpy(rows).view(dtype).view(-1, *shape) if len(rows) else torch.empty(0, *shape, dtype=dtype)
