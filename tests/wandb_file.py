"""Reads back what Weights & Biases keeps of an offline run."""

import json
import struct
import time
from pathlib import Path

BLOCK = 32_768  # bytes


def wandb_history(directory: Path, timeout_s: float = 20) -> list[dict]:
    """The rows that the one offline run below `directory` was given. Its writer ends a moment after the run: waited for."""
    (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + timeout_s
    while True:
        records = list(_records(path.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            break
        assert time.monotonic() < deadline, f"{path} is not finished after {timeout_s} s"
        time.sleep(0.05)
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in history]


def _records(data: bytes):
    """A LevelDB log: after 7 bytes of header, blocks filled with fragments, each led by checksum (4 bytes), length (2) and kind
    (1: whole, 2: first, 3: middle, 4: last)."""
    from wandb.proto import wandb_internal_pb2

    at, message = 7, b""
    while at + 7 <= len(data):
        in_block = BLOCK - at % BLOCK
        if in_block < 7:  # no room for a fragment's head: padding
            at += in_block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        fragment = data[at + 7 : at + 7 + size]
        if len(fragment) < size:  # not all there yet
            return
        message = fragment if kind in (1, 2) else message + fragment
        at += 7 + size
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(message)
