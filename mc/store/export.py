"""A history for other tools: Arrow files or one safetensors file, written in pieces.

    arrow         tokens.arrow (slot, token, source), sources.arrow, nodes_1.arrow … (index,
                  start, tokens, gist, keys of LOD1)
    safetensors   history.safetensors: tokens [slots] int32 (−1: void), L1 [n, D], L2, …, K1 [n, P, C]

Vectors are as the store gives them back; bfloat16 becomes float32 in Arrow, which has no such type.

Shapes: N records of a piece, D width, P lens keys, C width of a key.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mc.store.catalog import Catalog
from mc.store.ram import Store
from nanochat.common import UserError
from nanochat.outputs import replacing

PIECE = 1 << 16  # records
SAFE_DTYPES = {torch.int32: "I32", torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16",
               torch.float16: "F16"}


def export(store: Store, catalog: Catalog, folder: Path, format: str,
           progress: Callable[[int], None] = lambda done: None) -> list[Path]:
    """Write into a folder that is not there or empty; returns the files. progress: called
    with tokens and nodes written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out={folder} is there already and not an empty folder; name another")
    lods = [lod for lod in range(1, 64) if store.n_nodes(lod)]
    done = 0

    def count(records: int) -> None:
        nonlocal done
        done += records
        progress(done)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (_arrow if format == "arrow" else _safetensors)(store, catalog, folder, lods, count)
    except OSError as e:
        raise UserError(f"cannot write {folder}: {e.strerror or e}") from None


def _pieces(n: int) -> Iterator[Tensor]:
    return (torch.arange(start, min(start + PIECE, n)) for start in range(0, n, PIECE))


def _arrow(store: Store, catalog: Catalog, folder: Path, lods: list[int], count: Callable[[int], None]) -> list[Path]:
    f, sources = store.format, catalog.sources()
    starts = np.array([s.start for s in sources] or [0])
    stops, ids = np.array([s.start + s.tokens for s in sources] or [0]), np.array([s.id for s in sources] or [0])

    def token_rows(index_N: Tensor) -> pa.RecordBatch:
        slot, token = index_N.numpy(), store.tokens(index_N).numpy()
        at = (np.searchsorted(starts, slot, "right") - 1).clip(0)
        known = (slot >= starts[at]) & (slot < stops[at])
        return pa.record_batch(
            {"slot": slot, "token": pa.array(token.astype(np.int32), mask=token < 0),
             "source": pa.array(ids[at], mask=~known)}
        )

    def node_rows(lod: int) -> Callable[[Tensor], pa.RecordBatch]:
        def rows(index_N: Tensor) -> pa.RecordBatch:
            span = f.block_size**lod
            columns = {
                "index": index_N.numpy(),
                "start": index_N.numpy() * span,
                "tokens": np.full(len(index_N), span),
                "gist": _vectors(store.gists(lod, index_N)),
            }
            return pa.record_batch(columns | ({"keys": _vectors(store.keys(index_N).flatten(1))} if lod == 1 else {}))

        return rows

    about = {"block_size": f.block_size, "n_keys": f.n_keys, "key_dim": f.key_dim, "model": f.model}
    files = {folder / "tokens.arrow": (store.n_tokens, token_rows)}
    files |= {folder / f"nodes_{lod}.arrow": (store.n_nodes(lod), node_rows(lod)) for lod in lods}
    for path, (n, rows) in files.items():
        schema = rows(torch.arange(0 if not n else 1)).schema.with_metadata({"megacontext": json.dumps(about)})
        with replacing(path) as part, pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for index_N in _pieces(n):
                writer.write(rows(index_N).cast(schema))
                count(len(index_N))
    table = pa.Table.from_pylist([asdict(s) for s in sources])
    path = folder / "sources.arrow"
    with replacing(path) as part, pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write(table)
    return [*files, path]


def _vectors(x_ND: Tensor) -> pa.FixedSizeListArray:
    x_ND = x_ND.float() if x_ND.dtype == torch.bfloat16 else x_ND
    return pa.FixedSizeListArray.from_arrays(pa.array(x_ND.numpy().reshape(-1)), x_ND.shape[1])


def _safetensors(store: Store, catalog: Catalog, folder: Path, lods: list[int],
                 count: Callable[[int], None]) -> list[Path]:
    """The format is a length (8 bytes), that much JSON, then the tensors: written piece by piece, as
    a library would hold it all."""
    f = store.format
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
        "tokens": (torch.int32, (store.n_tokens,), lambda index_N: store.tokens(index_N).int())
    }
    for lod in lods:
        tensors[f"L{lod}"] = (f.read_dtype,
                              (store.n_nodes(lod), f.d_model), lambda index_N, lod=lod: store.gists(lod, index_N))
    if lods:
        tensors["K1"] = (f.read_dtype, (store.n_nodes(1), f.n_keys, f.key_dim), store.keys)
    about = {"block_size": f.block_size, "model": f.model,
             "sources": json.dumps([asdict(s) for s in catalog.sources()])}
    header, offset = {"__metadata__": {name: str(value) for name, value in about.items()}}, 0
    for name, (dtype, shape, _) in tensors.items():
        end = offset + dtype.itemsize * int(np.prod(shape))
        header[name] = {"dtype": SAFE_DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    # readers map the tensors, which so begin at a multiple of eight
    text += b" " * (-len(text) % 8)
    path = folder / "history.safetensors"
    with replacing(path) as part, open(part, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, (_, shape, read) in tensors.items():
            for index_N in _pieces(shape[0]):
                out.write(read(index_N).contiguous().view(torch.uint8).numpy().data)
                # keys belong to nodes that are counted already
                if name != "K1":
                    count(len(index_N))
    return [path]
