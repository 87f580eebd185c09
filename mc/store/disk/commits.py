"""The commit point of a store: a manifest of two slots, and a note for each version.

A note is JSON with a checksum, read whole or not at all. The manifest's slots hold the last
commit: {sequence, version, durable,
levels: {"L0": [records, checksum of the last partition], …}}. One slot is written when everything that the commit names
is on the medium; the other keeps the commit before until this one is on the medium too, and then becomes its copy. So
one whole commit is safe at any moment, and between commits there are two copies of it. A commit that is not synced
("durable": false) is written to the slot that does not hold the last synced one.

The note of a version (`versions/000003.ctx`, twice in the file) holds what only edits change:
{version, format, partition_bytes,
files: {"L0": runs of the versions that made the partitions' files, …}, detail: runs of the blocks' states,
text_version: the last version that rewrote or cut off tokens, before: the last commit of the version before}.
"""

import itertools
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from mc.store.disk.files import DTYPES, FORMAT_VERSION, FileSystem, check_version
from mc.store.ram import ERASED, StoreFormat
from nanochat.common import UserError, parse_json

# sectors of its own, so that a torn write of one slot leaves the other; a commit of all the levels that a name may
# tell of (two digits) takes 3,728 bytes at most
SLOT_BYTES = 4096
# of a level, of a store: what a note may claim, as a few bytes can tell of runs of any length, and reading the note
# writes them out in memory
MAX_PARTITIONS, MAX_BLOCKS = 1 << 22, 1 << 31
_NOTE_MAGIC = b"MCTXnote"
# magic, version of the format, length of the text; then CRC-32 of all but itself, and the text
_NOTE = struct.Struct("<8sII")


class Commits:
    """The manifest and the version notes of a store's folder. `last`: the commit that is in force for who opened it."""

    def __init__(self, fs: FileSystem, folder: Path):
        self.fs, self.folder, self.versions_folder = fs, folder, folder / "versions"
        self.last: dict = {}
        self._fd = -1
        self._durable_slot = 0  # holds the last synced commit

    def create(self, note: dict) -> None:
        """The first version, and a commit of nothing."""
        if not self.versions_folder.exists():
            self.fs.mkdir(self.versions_folder)
        self.write_version(note)
        self.last = dict(sequence=1, version=note["version"], durable=True, levels={})
        new = self.folder / "manifest.new"
        # under another name until both slots are on the medium: a store whose creation was cut short has no
        # manifest at all, and says so, rather than half of one
        self._fd = self.fs.create(new)
        self.fs.write(self._fd, 2 * _slot_bytes(self.last), 0)
        self.fs.fsync(self._fd, "the first commit")
        self.fs.rename(new, self.folder / "manifest")
        # a rename is on the medium when its folder is
        self.fs.fsync_folder(self.folder, "the manifest's name")

    def open(self, writable: bool) -> None:
        path = self.folder / "manifest"
        if not path.is_file():
            raise UserError(f"{self.folder} is not a MegaContext store (it has no manifest); create one, or name "
                            "another folder")
        # a reader asks for no right to write: the medium may be read-only
        self._fd = self.fs.open(path) if writable else os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def slots(self) -> list[dict | None]:
        """The two commits, None where a slot is damaged or half written. UserError where this is no manifest."""
        data = os.pread(self._fd, 2 * SLOT_BYTES, 0)
        halves = [data[:SLOT_BYTES], data[SLOT_BYTES:]]
        # one magic that is left tells a damaged manifest from a file of something else
        if not any(half.startswith(_NOTE_MAGIC) for half in halves):
            raise UserError(f"{self.folder}/manifest is not that of a MegaContext store; name another folder")
        notes = [read_note(half, self.folder / "manifest") for half in halves]
        return [note if is_commit(note) else None for note in notes]

    def resume(self, slot: int) -> None:
        """A writer goes on with `last`; the next commit is not written to this slot."""
        # it may be the copy that a process now dead had no time to sync: then the safe one was the other, which the
        # next commit overwrites
        self.fs.fsync(self._fd, "the slot to keep")
        self._durable_slot = slot

    def write(self, version: int, levels: dict[str, list[int]], durable: bool) -> None:
        """The next commit; durable: everything it names is on the medium, and when this returns so is it."""
        commit = dict(sequence=self.last["sequence"] + 1, version=version, durable=durable, levels=levels)
        # never over the last synced commit: until the new one is whole, that is the only one to come back to
        slot, data = 1 - self._durable_slot, _slot_bytes(commit)
        self.fs.write(self._fd, data, slot * SLOT_BYTES)
        if durable:
            self.fs.fsync(self._fd, "the commit")
            # only now may the older commit go. This copy need not be synced: torn, it fails its checksum, and the slot
            # that was just synced stands
            self.fs.write(self._fd, data, self._durable_slot * SLOT_BYTES)
            self._durable_slot = slot
        # last of all: where something above failed, what is in force for this process is still the commit before
        self.last = commit

    # -- versions

    def versions(self) -> list[int]:
        """Those that can be read: the last, and each before it whose end the next one tells."""
        found = sorted(self._version_files())
        last = self.last["version"]
        # a number above the last one is the note of an edit that never came to its commit
        return [v for v in found if v == last or (v < last and v + 1 in found)]

    def end_of(self, version: int) -> dict:
        """The last commit of a version."""
        return self.last if version == self.last["version"] else {**self.last,
                                                                  **self.read_version(version + 1)["before"]}

    def write_version(self, note: dict) -> None:
        """Twice in one file: either copy will do."""
        path = self._path(note["version"])
        new = path.with_suffix(".new")
        fd = self.fs.create(new)
        try:
            self.fs.write(fd, 2 * note_bytes(note), 0)
            self.fs.fsync(fd, "a version")
        finally:
            self.fs.close(fd)
        # whole before it has its name: whoever finds a note under a version's number may trust that it was written
        self.fs.rename(new, path)
        self.fs.fsync_folder(self.versions_folder, "a version's name")

    def read_version(self, version: int) -> dict:
        path = self._path(version)
        if not path.is_file():
            raise UserError(f"{self.folder}: version {version} is not there")
        # two halves of equal length: where the first is damaged, the second begins in the middle
        data = path.read_bytes()
        note = next((n for n in (read_note(data, path), read_note(data[len(data) // 2:], path)) if is_version(n)
                     and n["version"] == version), None)
        if note is None:
            raise UserError(f"{path} is damaged, both copies; restore it from a backup")
        return note

    def mend_version(self, version: int) -> bool:
        """Write a note anew where one of its copies is damaged. Whether there was need."""
        note = self.read_version(version)
        # JSON keeps the order of the keys, so an intact note written again is the same bytes
        if self._path(version).read_bytes() == 2 * note_bytes(note):
            return False
        self.write_version(note)
        return True

    def forget_versions(self) -> None:
        """All but the last."""
        for version, path in self._version_files().items():
            if version != self.last["version"]:
                self.fs.unlink(path)
        # before their partitions are removed: a note that a power cut brings back would name files that are gone
        self.fs.fsync_folder(self.versions_folder, "that older versions are gone")

    def _version_files(self) -> dict[int, Path]:
        """Version -> its file; what else lies in the folder is somebody else's, and stays."""
        names = ((path, path.stem) for path in self.versions_folder.glob("*.ctx"))
        # `int` reads the digits of other scripts too, and fewer of them: no such name was made by `_path`
        return {int(stem): path for path, stem in names
                if stem.isascii() and stem.isdecimal() and path == self._path(int(stem))}

    def _path(self, version: int) -> Path:
        return self.versions_folder / f"{version:06d}.ctx"


# ---------------------------------------------------------------------------------------------------------------------
# Notes


def note_bytes(value: dict) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    start = _NOTE.pack(_NOTE_MAGIC, FORMAT_VERSION, len(text))
    # the start is under the checksum too: of a damaged length or version the text alone would tell nothing
    return start + zlib.crc32(text, zlib.crc32(start)).to_bytes(4, "little") + text


def read_note(data: bytes, path: Path) -> dict | None:
    """What `note_bytes` made, at the start of data; None where it is damaged. UserError for a newer version's."""
    if len(data) < _NOTE.size or not data.startswith(_NOTE_MAGIC):
        return None
    _, version, length = _NOTE.unpack_from(data)
    text = data[_NOTE.size + 4:_NOTE.size + 4 + length]
    if zlib.crc32(text, zlib.crc32(data[:_NOTE.size])) != int.from_bytes(data[_NOTE.size:_NOTE.size + 4], "little"):
        return None
    # only now: a flipped bit in the version is damage, which the other copy mends, and not a newer program's file
    check_version(version, path)
    try:
        return parse_json(text)
    except ValueError:
        return None


def is_commit(note: object) -> bool:
    """Whether a slot's note is a commit, by its types and bounds: a checksum that fits does
    not say that a store wrote it."""
    return isinstance(note,
                      dict) and _is_count(note.get("sequence")) and type(note.get("durable")) is bool and _is_end(note)


def is_version(note: object) -> bool:
    """Whether a note is a version's, as `is_commit`."""
    try:
        f = format_of(note["format"])
        sizes = (f.block_size, f.d_model, f.n_keys, f.key_dim, note["partition_bytes"])
        return (_is_count(note["version"]) and all(type(x) is int and 0 < x < 2**31 for x in sizes)
                and f.block_size > 1 and isinstance(f.model, str) and f.dtype in DTYPES
                # what the header of a partition has fields for
                and f.n_keys < 2**16 and max(f.d_model, f.n_keys * f.key_dim) < 2**24
                and isinstance(note["files"], dict) and all(_are_runs(x, MAX_PARTITIONS)
                                                            for x in note["files"].values())
                and _are_runs(note["detail"], MAX_BLOCKS) and all(state <= ERASED for state, _ in note["detail"])
                and _is_count(text := note.get("text_version", 0)) and text <= note["version"]
                and (note["before"] is None or _is_end(note["before"])))
    except (KeyError, TypeError, AttributeError):
        return False


def _is_count(x: object) -> bool:
    # `isinstance` would take True for a number; up to 2^53 every reader of JSON keeps one exactly
    return type(x) is int and 0 <= x < 2**53


def _is_end(note: object) -> bool:
    """Of a commit: its version, and what it says of each level."""
    levels = note.get("levels") if isinstance(note, dict) and _is_count(note.get("version")) else None
    records = lambda name: levels[name][0] if name in levels else 0
    return isinstance(levels, dict) and all(
        re.fullmatch(r"[LK]\d{1,2}", name) and isinstance(level, list) and len(level) == 2
        and all(map(_is_count, level)) for name, level in levels.items()) \
        and records("K1") == records("L1")  # a block has its gist and its keys in one commit


def _are_runs(runs: object, most: int) -> bool:
    pairs = isinstance(runs, list) and all(isinstance(run, list) and len(run) == 2 and all(map(_is_count, run))
                                           for run in runs)
    return pairs and sum(count for _, count in runs) <= most


def _slot_bytes(commit: dict) -> bytes:
    return note_bytes(commit).ljust(SLOT_BYTES, b"\0")


def plain_format(f: StoreFormat) -> dict:
    return {**vars(f), "dtype": str(f.dtype).removeprefix("torch.")}


def format_of(plain: dict) -> StoreFormat:
    return StoreFormat(**{**plain, "dtype": getattr(torch, plain["dtype"])})


def run_lengths(values: Iterable[int]) -> list[list[int]]:
    """[[value, how many times in a row], …]."""
    # neighbours are mostly of one version, or all kept: a note stays short however long the history
    return [[value, sum(1 for _ in group)] for value, group in itertools.groupby(values)]


def from_run_lengths(runs: list[list[int]], dtype: type = np.int64) -> np.ndarray:
    """[N] of N in all, which is the caller's to bound: a few bytes can tell of billions."""
    values, counts = np.array(runs, np.int64).reshape(-1, 2).T
    return np.repeat(values.astype(dtype), counts)
