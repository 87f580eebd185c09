"""Text: an embedded corpus that needs no network, corpora from a directory, a downloader,
and the cache of their tokens.

The embedded corpus is the source code of the running Python's standard library: a module is a document, a package is
one long document. `python -m nanochat.dataset --num_shards 8 --dir DIR` fetches nanochat's public pretraining shards;
any directory of parquet, jsonl or text files is a corpus as well.
"""

import ast
import hashlib
import http.client
import json
import os
import platform
import sysconfig
import time
import tokenize
import urllib.error
import urllib.parse
import urllib.request
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import FlagParser, UserError, base_dir, print0, run_main, shown
from nanochat.documents import SHARDS, TEXTS, Document, count_rows, file_key, files_below, is_shard, opened, read_documents  # noqa: E501
from nanochat.outputs import locked, replacing

SPLITS = ("train", "val")
BASE_URL = "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main"
LAST_SHARD = 1822  # of nanochat's public shards; held out
READER = 2  # of the rules by which files become text; what was tokenized under others is not used again


class Progress:
    """Prints done / total and the time left every few seconds; silent when the work is short."""

    def __init__(self, what: str, total: int, unit: str, every_s: float = 5.0):
        self.what, self.total, self.unit, self.every_s = what, total, unit, every_s
        self.start = self.last = time.monotonic()

    def update(self, done: int) -> None:
        now = time.monotonic()
        if now - self.last >= self.every_s:
            self.last = now
            eta = (now - self.start) * (self.total - done) / max(done, 1)
            print0(f"{self.what}: {done:,}/{self.total:,} {self.unit}, ETA {eta:.0f} s")


# --- the embedded corpus ---------------------------------------------------------------------------------------------

PROSE_CHARS = 200  # shorter docstrings say what a name says already
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data", "lib-dynload"}
HELD_OUT_PERCENT = 8
LONG_CHARS = 20_000
LONG_HELD_OUT = 6  # at least so many held-out documents are long
MAX_HELD_OUT_CHARS = 250_000  # a longer one would be most of the held-out text, so it stays in training


def _stdlib_documents(stdlib: Path) -> list[Document]:
    """One document per top-level module, one per package (its files in sorted order, each
    after a line with its name)."""
    parts: dict[str, list[str]] = {}
    for path in sorted(stdlib.rglob("*.py")):
        inside = path.relative_to(stdlib)
        if SKIPPED & set(inside.parts) or inside.name.startswith("_sysconfigdata") or inside.parts[0].startswith(
            "config-"):
            continue
        try:
            with tokenize.open(path) as f:  # honours the coding line
                text = f.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a file kept broken on purpose
        if text.strip():
            header = f"# file: {inside.as_posix()}\n" if len(inside.parts) > 1 else ""
            parts.setdefault(inside.parts[0], []).append(header + text)
    return [Document("\n".join(texts), source, "code") for source, texts in sorted(parts.items())]


def _order(source: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(source), digest_size=4).digest(), "little")


def _held_out(documents: list[Document]) -> set[str]:
    """Sources held out: by hash, so that the choice does not depend on the Python version,
    and several long ones always."""
    documents = [d for d in documents if len(d.text) <= MAX_HELD_OUT_CHARS]
    chosen = {d.source for d in documents if _order(d.source) % 100 < HELD_OUT_PERCENT}
    long = sorted((d.source not in chosen, _order(d.source), d.source) for d in documents if len(d.text) > LONG_CHARS)
    return chosen | {source for _, _, source in long[:LONG_HELD_OUT]}


def build_stdlib(stdlib: Path | None = None) -> Path:
    """Write the embedded corpus under `base_dir()/corpus/stdlib` unless it is there for
    this Python; return that path."""
    root = base_dir() / "corpus" / "stdlib"
    manifest, shards = root / "manifest.json", {split: root / f"{split}-00000.parquet" for split in SPLITS}
    python = f"{platform.python_implementation()} {platform.python_version()}"
    with locked(root / ".lock"):
        try:
            built = json.loads(manifest.read_text())["python"]
        except (OSError, ValueError, KeyError, TypeError):
            built = None
        if built == python and all(path.exists() for path in shards.values()):
            return root
        stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
        documents = _stdlib_documents(stdlib)
        held_out = _held_out(documents)
        if not held_out or len(held_out) == len(documents):
            raise UserError(f"this Python keeps too few sources in {stdlib} ({len(documents)} modules); use --data=DIR")
        manifest.unlink(missing_ok=True)
        for split, path in shards.items():
            chosen = [d._asdict() for d in documents if (d.source in held_out) == (split == "val")]
            tmp = path.with_suffix(".tmp")
            pq.write_table(pa.Table.from_pylist(chosen), tmp, compression="zstd", row_group_size=64)
            os.replace(tmp, path)
        chars = sum(len(d.text) for d in documents)
        tmp = manifest.with_suffix(".tmp")
        tmp.write_text(json.dumps({"python": python, "documents": len(documents), "held_out": len(held_out),
                                   "chars": chars}))
        os.replace(tmp, manifest)
        print0(f"embedded corpus: {len(documents)} documents ({len(held_out)} held out), {chars / 1e6:.1f} M "
               f"characters in {root}")
    return root


def docstrings(code: str) -> str:
    """The prose of Python code: its longer docstrings without examples, in their order; "" where it does not parse."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""  # a file kept broken on purpose, or of another version of the language
    owners = [node for node in ast.walk(tree)
              if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body]
    found = [ast.get_docstring(node) or "" for node in sorted(owners, key=lambda node: node.body[0].lineno)]
    return "\n\n".join(text for text in found if len(text) >= PROSE_CHARS and ">>>" not in text)


def build_docstrings() -> Path:
    """Write the prose in the embedded corpus under `base_dir()/corpus/docstrings`, held out
    where its code is, unless it is there for this Python; return that path."""
    code, root = build_stdlib(), base_dir() / "corpus" / "docstrings"
    manifest, built = root / "manifest.json", (code / "manifest.json").read_bytes()
    with locked(root / ".lock"):
        if manifest.exists() and manifest.read_bytes() == built:
            return root
        for split in SPLITS:
            rows = pq.read_table(code / f"{split}-00000.parquet").to_pylist()
            prose = [row | {"text": text, "kind": "prose"} for row in rows if (text := docstrings(row["text"]))]
            with replacing(root / f"{split}-00000.parquet") as part:
                pq.write_table(pa.Table.from_pylist(prose), part, compression="zstd", row_group_size=64)
        with replacing(manifest) as part:
            part.write_bytes(built)
    return root


EMBEDDED = {"stdlib": build_stdlib, "docstrings": build_docstrings}


# --- corpora from a directory ----------------------------------------------------------------------------------------

REMEMBERED_BYTES = 1 << 20  # smaller files are hashed as fast as their hashes are looked up
SETTLED_NS = 2_000_000_000  # a file that changed less than this ago can change again without its times showing it


def digests(root: Path, files: Iterable[Path]) -> dict[Path, str]:
    """sha256 of each file's content. A large file's is remembered under `base_dir()` by what else changes with it
    (`file_key`), so that it is read once; a filesystem whose clock runs seconds behind, or that writes no
    change times, defeats that."""
    status = {path: _stat(path) for path in files}
    memory = base_dir() / "digests" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"
    large = {path for path in status if status[path].st_size >= REMEMBERED_BYTES}
    with locked(memory.with_suffix(".lock")) if large else nullcontext():
        known = _remembered(memory) if large else {}
        new = [path for path in status if path not in large or _name(status[path]) not in known]
        progress, done = Progress(f"reading {root.name}", sum(status[path].st_size for path in new), "bytes"), 0
        found = {}
        for path in new:
            with opened(path) as f:
                found[path] = hashlib.file_digest(f, "sha256").hexdigest()
            progress.update(done := done + status[path].st_size)
        found |= {path: known[_name(status[path])] for path in status if path not in found}
        settled = time.time_ns() - SETTLED_NS
        if keep := {_name(status[path]): found[path]
                    for path in large if max(status[path].st_mtime_ns, status[path].st_ctime_ns) < settled}:
            tmp = memory.with_suffix(".tmp")
            tmp.write_text(json.dumps(keep))
            os.replace(tmp, memory)
    return {path: found[path] for path in status}


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as e:
        raise UserError(f"cannot read {shown(path)}: {e.strerror}") from None


def _name(status: os.stat_result) -> str:
    return ":".join(map(str, file_key(status)))


def _remembered(memory: Path) -> dict[str, str]:
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}  # all is read again
    return known if isinstance(known, dict) else {}


@dataclass(frozen=True)
class Corpus:
    """Files of one directory. With two or more shards (parquet, jsonl) the last is the held-out split, otherwise the
    5 % of documents with the smallest hashes (at least one) are."""

    name: str
    root: Path
    files: tuple[Path, ...]
    text_column: str = "text"

    @cached_property
    def _digests(self) -> dict[Path, str]:
        return digests(self.root, self.files)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits from every file's name and content, and the text column."""
        digest = hashlib.sha256(f"{READER} {self.text_column}".encode(errors="surrogateescape"))
        for path, content in self._digests.items():
            digest.update(os.fsencode(path.relative_to(self.root)) + f":{content}\n".encode())
        return digest.hexdigest()[:12]

    def require_unchanged(self) -> None:
        """UserError where a file's content is not what `fingerprint` stands for."""
        now = digests(self.root, self.files)
        for path, content in self._digests.items():
            if now[path] != content:
                raise UserError(f"{shown(path)} changed while it was tokenized; run again once nothing writes to it")

    @cached_property
    def _last_shard(self) -> Path | None:
        shards = [path for path in self.files if is_shard(path)]
        return shards[-1] if len(shards) > 1 else None

    @cached_property
    def _rows(self) -> dict[Path, int]:
        return {path: count_rows(path) for path in self.files}

    @cached_property
    def _held_out_rows(self) -> set[tuple[Path, int]]:
        order = sorted(
            (_order(f"{os.fspath(path.relative_to(self.root))}#{row}"), path, row) for path, n in self._rows.items()
            for row in range(n)
        )
        if len(order) < 2:
            raise UserError(f"corpus {self.root} holds {len(order)} documents: at least two, as one is held out")
        return {(path, row) for _, path, row in order[: max(1, len(order) // 20)]}

    def _in_split(self, path: Path, row: int, split: str) -> bool:
        held_out = path == self._last_shard if self._last_shard else (path, row) in self._held_out_rows
        return held_out == (split == "val")

    def num_documents(self, split: str) -> int:
        if self._last_shard:
            return sum(n for path, n in self._rows.items() if self._in_split(path, 0, split))
        held_out = len(self._held_out_rows)
        return held_out if split == "val" else sum(self._rows.values()) - held_out

    def documents(self, split: str) -> Iterator[Document]:
        """Documents of "train" or "val" in the files' order, blank ones left out. UserError on a
        damaged file, or if none is left."""
        found = False
        for path in self.files:
            if self._last_shard and not self._in_split(path, 0, split):
                continue
            for row, document in enumerate(read_documents(path, self.root, self.text_column)):
                if document.text.strip() and self._in_split(path, row, split):
                    found = True
                    yield document
        if not found:
            raise UserError(f"corpus {self.root} is empty: no text in its {split} split ({len(self.files)} files)")


def open_corpus(spec: str, text_column: str = "text") -> Corpus:
    """The corpus "stdlib" or "docstrings" (built on first use), or the one in directory `spec`. UserError
    if there is nothing to read."""
    if spec in EMBEDDED:
        root, text_column = EMBEDDED[spec](), "text"
    else:
        root = Path(spec).expanduser()
    if not root.is_dir():
        raise UserError(f"--data={spec}: no such directory; give 'stdlib', 'docstrings' or a directory of "
                        f"{' '.join(SHARDS + TEXTS)} files")
    files = files_below(root, SHARDS + TEXTS)
    if not files:
        raise UserError(f"--data={spec}: no {' '.join(SHARDS + TEXTS)} files in it")
    return Corpus(spec if spec in EMBEDDED else root.name, root, tuple(files), text_column)


# --- nanochat's public shards ----------------------------------------------------------------------------------------

CHUNK = 1 << 20
TRANSIENT = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args, **kwargs):
        return None


def _remote_facts(url: str, timeout_s: float) -> tuple[int, str | None]:
    """Size in bytes and sha256 (None if the server gives none) of a remote file.

    The hub answers with a redirect whose own headers carry both (X-Linked-Size,
    X-Linked-ETag: the sha256 of an LFS file).
    """
    opener = urllib.request.build_opener(_NoRedirect)
    for _ in range(5):
        try:
            with opener.open(urllib.request.Request(url, method="HEAD"), timeout=timeout_s) as response:
                headers, target = response.headers, None
        except urllib.error.HTTPError as e:
            if e.code not in (301, 302, 303, 307, 308):
                raise
            headers, target = e.headers, e.headers["Location"]
        size = headers["X-Linked-Size"] or (headers["Content-Length"] if target is None else None)
        if size is not None:
            etag = (headers["X-Linked-ETag"] or headers["ETag"] or "").removeprefix("W/").strip('"').lower()
            return int(size), etag if len(etag) == 64 and not set(etag) - set("0123456789abcdef") else None
        if target is None:
            raise UserError(f"{url}: the server does not tell its size, so a cut download could not be noticed")
        url = urllib.parse.urljoin(url, target)
    raise UserError(f"{url}: more than 5 redirects")


def _fetch(url: str, part: Path, size: int, timeout_s: float) -> None:
    """Append to `part` what it lacks of the `size` bytes at `url`; from the start if the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    if have > size:
        part.unlink()
        have = 0
    if have == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        with open(part, "ab" if response.status == 206 else "wb") as f:
            while chunk := response.read(CHUNK):
                f.write(chunk)


def download(url: str, path: Path, attempts: int = 5, wait_s: float = 1.0, timeout_s: float = 30.0) -> None:
    """Fetch `url` to `path`, which appears only once its size and sha256 are right. Nothing is done if it exists.

    An interrupted download goes on from `path`.part; attempts wait wait_s, 2 wait_s, 4 wait_s,
    … UserError when none succeeds.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part, problem = path.with_name(path.name + ".part"), ""
    for attempt in range(attempts):
        if attempt:
            time.sleep(wait_s * 2 ** (attempt - 1))
        try:
            size, sha256 = _remote_facts(url, timeout_s)
            _fetch(url, part, size, timeout_s)
        except TRANSIENT as e:
            if isinstance(e, urllib.error.HTTPError) and 400 <= e.code < 500 and e.code not in (408, 429):
                raise UserError(f"{url}: HTTP {e.code} {e.reason}; check the address") from None
            problem = str(e) or type(e).__name__
            continue
        if (got := part.stat().st_size) != size:
            problem = f"{got} of {size} bytes"
            continue
        if sha256:
            with open(part, "rb") as f:
                digest = hashlib.file_digest(f, "sha256").hexdigest()
            if digest != sha256:
                part.unlink()
                problem = f"sha256 is {digest}, the server announced {sha256}"
                continue
        os.replace(part, path)
        return
    raise UserError(f"{url} could not be fetched in {attempts} attempts ({problem}); run again to resume")


def download_shards(num_shards: int, directory: Path, base_url: str = BASE_URL, **kwargs) -> None:
    """The first `num_shards` shards for training and the last of all, which is the held-out one."""
    if not 1 <= num_shards <= LAST_SHARD:
        raise UserError(f"--num_shards={num_shards}: between 1 and {LAST_SHARD}")
    shards, start = [*range(num_shards), LAST_SHARD], time.monotonic()
    for done, shard in enumerate(shards, 1):
        name = f"shard_{shard:05d}.parquet"
        download(f"{base_url}/{name}", directory / name, **kwargs)
        eta = (time.monotonic() - start) / done * (len(shards) - done)
        print0(f"{done}/{len(shards)} {name}, ETA {eta:.0f} s")


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m nanochat.dataset", description="Download nanochat's public pretraining shards.")
    parser.add_argument("--num_shards", type=int, required=True,
                        help="training shards of about 100 MB; one more is held out")
    parser.add_argument("--dir", type=Path, default=base_dir() / "fineweb-edu",
                        help="where to; then train with --data=DIR")
    parser.add_argument("--base_url", default=BASE_URL, help="folder that serves shard_00000.parquet and so on")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    download_shards(args.num_shards, args.dir, args.base_url)
    print0(json.dumps({"dir": str(args.dir), "shards": args.num_shards + 1}))


if __name__ == "__main__":
    run_main(main)
