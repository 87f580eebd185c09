"""Documents out of files: one reader for every command, so that a file means the same to each.

Text is UTF-8 and kept character by character: line ends, NULs and control characters as they are, names of special
tokens as plain text. Only a byte order mark at the beginning goes, and half of a surrogate pair, which jsonl can escape
and UTF-8 cannot hold, becomes U+FFFD. A row without text (null, or an empty line) is a blank document. What cannot be
read is refused in one line that names file and row: bytes that are no UTF-8, a column or field that holds no text, a
damaged file, a file that changes while it is read.
"""

import codecs
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, shown, whole_characters

SHARDS = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXTS = (".txt", ".md", ".py")
CODECS = {".gz": "gzip", ".zst": "zstd"}
OTHER_CODECS = (".bz2", ".xz", ".lz4", ".zip")
READ_BYTES = 1 << 20
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half of a surrogate pair


class Document(NamedTuple):
    text: str
    source: str  # path inside the corpus, with #row where a file holds several documents
    kind: str  # "code", "text" or what the corpus says in its column `kind`


# --- files -----------------------------------------------------------------------------------------------------------


def is_shard(path: Path) -> bool:
    """Whether a file holds a document per row."""
    return path.name.endswith(SHARDS)


def files_below(folder: Path, suffixes: tuple[str, ...] = ("",)) -> list[Path]:
    """All files whose names end so below a folder, in order; linked files and folders too,
    hidden ones not, no folder twice.

    UserError for a folder that cannot be read, a link to nowhere, and a file that would be
    wanted if it were not compressed.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in seen:  # a link back: it would go on for ever
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [path for name in names if not name.startswith(".")
                  and _is_wanted(path := Path(place, name), suffixes)]
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"cannot read the folder {shown(error.filename)}: {error.strerror}")


def _is_wanted(path: Path, suffixes: tuple[str, ...]) -> bool:
    stem, codec = os.path.splitext(path.name)
    if codec in (*CODECS, *OTHER_CODECS) and stem.endswith(suffixes) and not path.name.endswith(suffixes):
        raise UserError(f"{shown(path)} is compressed in a way that is not read; decompress it, or move it elsewhere")
    if not path.name.endswith(suffixes):
        return False
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{shown(path)} is a link to {shown(os.readlink(path))}, which is not there; mend or remove "
                        "the link")
    return os.path.isfile(path)


def file_key(status: os.stat_result) -> tuple[int, ...]:
    """What changes with a file's content: device, inode, size [bytes], and the times [ns] of its last change,
    also one that put mtime back."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def opened(path: Path, name: str = "") -> Iterator[BinaryIO]:
    """A file open for reading. UserError, in which it is called `name`, where it cannot be read, and at the end
    where it has changed meanwhile."""
    name = name or shown(path)
    try:
        with open(path, "rb") as f:
            before = file_key(os.fstat(f.fileno()))[:4]
            yield f
            if file_key(os.fstat(f.fileno()))[:4] != before:
                raise UserError(f"{name} changed while it was read; run again once nothing writes to it")
    except OSError as e:
        raise UserError(f"cannot read {name}: {e.strerror or e}") from None


# --- text ------------------------------------------------------------------------------------------------------------


def _without_mark(head: bytes, name: str) -> bytes:
    """The beginning of a file without the byte order mark of UTF-8. UserError for that of UTF-16 or UTF-32."""
    for mark, encoding in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
                           (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16")):
        if head.startswith(mark):
            raise UserError(f"{name} is not UTF-8 text (line 1 has the byte order mark of {encoding}); convert it: "
                            f"iconv -f {encoding} -t UTF-8")
    return head.removeprefix(codecs.BOM_UTF8)


def text_pieces(path: Path, name: str = "") -> Iterator[str]:
    """The text of a file in pieces of READ_BYTES. name: what the file is called in a UserError, by default its path."""
    name = name or shown(path)
    with opened(path, name) as f:
        yield from decoded(f, name)


def decoded(f: BinaryIO, name: str) -> Iterator[str]:
    """The text of an open file in pieces; `name` is what a UserError calls it."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    head = f.read(READ_BYTES)
    data = _without_mark(head, name)
    done = len(head) - len(data)
    while True:
        waiting = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(data, final=not data)
        except UnicodeDecodeError as e:
            line += e.object.count(b"\n", 0, e.start)
            raise UserError(f"{name} is not UTF-8 text ({e.reason} at byte {done - waiting + e.start}, line {line}); "
                            "convert or remove it") from None
        yield piece
        if not data:
            return
        line, done = line + piece.count("\n"), done + len(data)
        data = f.read(READ_BYTES)


def read_text(path: Path) -> str:
    """The text of a file, whole. UserError as `text_pieces`."""
    return "".join(text_pieces(path))


# --- json ------------------------------------------------------------------------------------------------------------


def _parse(data: bytes, where: str) -> object:
    """A JSON value without halves of surrogate pairs; of keys that are there twice the last counts, as everywhere."""
    try:
        value = json.loads(data.decode())
        return _whole(value) if _HALF.search(data) else value
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 text ({e.reason} at byte {e.start} of it); convert or remove it") from None
    except json.JSONDecodeError as e:
        raise UserError(f"{where}: not JSON ({e.msg}, column {e.colno}); mend or remove it") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply; mend or remove it") from None
    except ValueError as e:  # a number of more digits than Python converts
        raise UserError(f"{where}: {shown(str(e))[:80]}; mend or remove it") from None


def _whole(value: object) -> object:
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_whole(x) for x in value]
    return {whole_characters(name): _whole(x) for name, x in value.items()} if isinstance(value, dict) else value


def _lines(path: Path) -> Iterator[bytes]:
    with opened(path) as f:
        try:
            codec = CODECS.get(path.suffix)
            own = open(os.dup(f.fileno()), "rb") if codec else f  # the decompressor closes what it reads
            yield from io.BufferedReader(pa.CompressedInputStream(own, codec), READ_BYTES) if codec else f
        except (OSError, pa.ArrowException) as e:
            raise UserError(
                f"damaged file {shown(path)} ({shown(str(e))[:100]}); delete it or fetch it again") from None


def json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(number from 1, value) of every line of a jsonl file, None for an empty one. UserError for a
    line that is no JSON, or null."""
    for number, line in enumerate(_lines(path), 1):
        where = f"{shown(path)} line {number}"
        line = line if number > 1 else _without_mark(line, shown(path))
        if line.strip():
            value = _parse(line, where)
            if value is None:
                raise UserError(f"{where}: it is null, not an object with fields; remove the line")
            yield number, value
        else:
            yield number, None


def read_json(path: Path) -> object:
    """The value of a json file; a list of them where it holds an object a line, as Dataset.to_json writes them."""
    with opened(path) as f:
        data = _without_mark(f.read(), shown(path))
    if _a_line_each(data):
        return [value for _, value in json_rows(path) if value is not None]
    return _parse(data, shown(path))


def _a_line_each(data: bytes) -> bool:
    """Whether the first line is a value by itself and others follow."""
    first, _, rest = data.lstrip().partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


# --- parquet ---------------------------------------------------------------------------------------------------------


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A parquet file. UserError where it, or what is read of it, is damaged."""
    with opened(path) as f:
        with _damage(path):
            file = pq.ParquetFile(f)
        with file:
            yield file


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError) as e:
        raise UserError(
            f"damaged parquet file {shown(path)} ({shown(str(e))[:100]}); delete it or fetch it again") from None


def _plain(kind: pa.DataType) -> pa.DataType:
    """What a column's values are, under an extension or a dictionary."""
    while isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    """Strings of every layout, bytes (which may be text), and a column of nothing but null."""
    # pyarrow 16 on
    views = (getattr(pa.types, name, lambda kind: False) for name in ("is_string_view", "is_binary_view"))
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary,
             pa.types.is_fixed_size_binary, pa.types.is_null, *views)
    return any(test(_plain(kind)) for test in tests)


def _column_texts(column: pa.ChunkedArray, path: Path, row: int) -> list[str | None]:
    """The texts of a column whose first row is the row-th of its file."""
    while isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    texts = []
    for value in column.cast(_plain(column.type)).cast(pa.large_binary()).to_pylist():
        try:
            texts.append(value if value is None else value.decode())
        except UnicodeDecodeError as e:
            raise UserError(f"{shown(path)} row {row + len(texts)}: not UTF-8 text ({e.reason} at byte {e.start} of "
                            "it); convert or remove it") from None
    return texts


def parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(number from 1, fields) of every row of a parquet file."""
    with _parquet(path) as file:
        row = 0
        batches = file.iter_batches(256)
        while True:
            with _damage(path):
                batch = next(batches, None)
            if batch is None:
                return
            for i in range(len(batch)):
                row += 1
                try:
                    yield row, batch.slice(i, 1).to_pylist()[0]
                except (ValueError, OverflowError) as e:
                    raise UserError(f"{shown(path)} row {row}: {shown(str(e))[:100]}; convert or remove it") from None


# --- documents -------------------------------------------------------------------------------------------------------


def count_rows(path: Path) -> int:
    """How many documents `read_documents` gives, blank ones counted."""
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return file.metadata.num_rows
    return sum(1 for _ in _lines(path)) if is_shard(path) else 1


def read_documents(path: Path, root: Path, column: str) -> Iterator[Document]:
    """The documents of a file of a corpus, one per row of a shard; `column` holds their text, `source` and `kind`,
    where they are there, say more about them. UserError for what cannot be read."""
    name, kind = shown(path.relative_to(root).as_posix()), "code" if path.suffix == ".py" else "text"
    if not is_shard(path):
        yield Document(read_text(path), name, kind)
        return
    rows = _parquet_texts if path.suffix == ".parquet" else _json_texts
    for row, (text, own_source, own_kind) in enumerate(rows(path, column)):
        yield Document(text or "", str(own_source or f"{name}#{row}"), str(own_kind or kind))


def _parquet_texts(path: Path, column: str) -> Iterator[tuple]:
    """(text, source, kind) of every row, None where there is none."""
    with _parquet(path) as file:
        with _damage(path):
            schema = file.schema_arrow
        names = schema.names
        if column not in names:
            raise UserError(f"{shown(path)} has no text column {column!r}, its columns: "
                            f"{', '.join(map(shown, names))}; set --text_column")
        if names.count(column) > 1 or not _is_text(schema.field(column).type):
            what = ("there twice" if names.count(column) > 1
                    else f"{shown(str(schema.field(column).type))[:80]}, not text")
            raise UserError(f"{shown(path)}: its column {column!r} is {what}; set --text_column, or write that column "
                            "as text")
        more = [name for name in ("source", "kind") if names.count(name) == 1
                and (_is_text(schema.field(name).type) or pa.types.is_integer(schema.field(name).type))]
        row = 0
        for group in range(file.num_row_groups):
            with _damage(path):
                table = file.read_row_group(group, columns=list(dict.fromkeys([column, *more])))
                texts = _column_texts(table[column], path, row + 1)
                own = [_column_texts(table[name], path, row + 1) if _is_text(table[name].type)
                       else table[name].to_pylist() for name in more]
            by_name = dict(zip(more, own))
            nothing = [None] * len(texts)
            yield from zip(texts, by_name.get("source", nothing), by_name.get("kind", nothing))
            row += len(texts)


def _json_texts(path: Path, column: str) -> Iterator[tuple]:
    for number, record in json_rows(path):
        where = f"{shown(path)} line {number}"
        if record is None:
            yield None, None, None
            continue
        if not isinstance(record, dict):
            raise UserError(f"{where}: it is {type(record).__name__}, not an object with fields; mend or remove it")
        if column not in record:
            raise UserError(f"{where}: no field {column!r}; mend the line, or set --text_column")
        if not isinstance(record[column], str | None):
            raise UserError(f"{where}: {column!r} is {type(record[column]).__name__}, not text; mend the line, or set "
                            "--text_column")
        yield record[column], record.get("source"), record.get("kind")
