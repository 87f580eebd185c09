"""Text into a history: files, folders, parquet and jsonl, one source per document, found
again by the hash of its content.

Memory is bounded whatever the size of a file: text is read, tokenized and stored in pieces. A run that was cut off goes
on where the store's last commit is, also inside a document; documents that are there already are passed over.

Shapes: N tokens.
"""

import codecs
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mc.store.catalog import Catalog, Source
from mc.store.history import BATCH_BLOCKS, History
from mc.store.ram import VOID
from nanochat.common import UserError, shown
from nanochat.documents import READ_BYTES, TEXTS, files_below, is_shard, opened, read_documents, text_pieces
from nanochat.tokenizer import Tokenizer, cut


@dataclass(frozen=True)
class Text:
    """A document to ingest. `pieces` reads it again on each call; `size` in bytes."""

    uri: str
    kind: str
    hash: str  # sha256 of its UTF-8 bytes
    size: int
    pieces: Callable[[], Iterable[str]]


def find_files(paths: list[Path]) -> list[Path]:
    """The files that paths name: themselves, and all below folders but hidden ones, in order.
    UserError for one that is not there."""
    found = []
    for path in paths:
        if path.is_dir():
            found += files_below(path)
        elif path.is_file():
            found.append(path)
        elif path.exists():
            raise UserError(
                f"{path} is a pipe or a device; hand over what it holds on standard input, with - for the path")
        else:
            raise UserError(f"{shown(path)}: no such file or folder")
    return found


def texts_of(path: Path, text_column: str = "text", named: bool = False, name: str = "") -> Iterator[Text]:
    """The documents of a file, blank ones left out.

    named: the file was named itself, so it must be text. Of what was found in a folder that holds only for files that
    corpora read (`nanochat.documents`); another that is not UTF-8, or holds NULs, gives none. name: what the
    file is called in a UserError.
    """
    path = path.resolve()
    if is_shard(path):
        for document in read_documents(path, path.parent, text_column):
            if document.text.strip():
                data = document.text.encode()
                source = document.source if "#" in document.source else f"{path.name}#{document.source}"
                yield Text(
                    shown(path.parent / source),
                    document.kind,
                    hashlib.sha256(data).hexdigest(),
                    len(data),
                    lambda text=document.text: cut([text]),
                )
        return
    if not named and not path.name.endswith(TEXTS) and _is_binary(path):
        return
    digest, blank, size = hashlib.sha256(), True, 0
    for piece in text_pieces(path, name):
        data = piece.encode()
        digest.update(data)
        size += len(data)
        blank = blank and not piece.strip()
    if not blank:
        known = digest.hexdigest()
        yield Text(shown(path), "code" if path.suffix == ".py" else "text", known,
                   size, lambda: cut(_unchanged(path, known)))


def _is_binary(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    with opened(path) as f:
        try:
            while data := f.read(READ_BYTES):
                if "\0" in decoder.decode(data):
                    return True
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return True
    return False


def _unchanged(path: Path, known: str) -> Iterator[str]:
    """The text again. UserError at its end where it is not what was hashed: it is left as one that was cut off."""
    digest = hashlib.sha256()
    for piece in text_pieces(path):
        digest.update(piece.encode())
        yield piece
    if digest.hexdigest() != known:
        raise UserError(f"{shown(path)} changed while it was read; run again once nothing writes to it")


@dataclass
class IngestReport:
    """What an ingest did; tokens without void slots, bytes of text."""

    sources: int = 0
    tokens: int = 0
    bytes: int = 0
    known: int = 0  # documents that were there already
    resumed: int = 0


class Ingest:
    """Appends documents to a history in batches of `batch` blocks, each with one commit; `finish` writes the last one.

    progress: called with the characters of the present document that were read. A source is announced in the catalog
    before the commit that holds it, so what a crash leaves is found again.
    """

    def __init__(
        self,
        history: History,
        catalog: Catalog,
        tokenizer: Tokenizer,
        *,
        kind: str | None = None,
        retrieval_score: float | None = None,
        batch: int = BATCH_BLOCKS,
        progress: Callable[[int], None] = lambda characters: None,
    ):
        self.history, self.catalog, self.tokenizer = history, catalog, tokenizer
        self.kind, self.retrieval_score, self.limit = kind, retrieval_score, batch * history.block_size
        self.report, self.progress = IngestReport(), progress
        self._slots: list[Tensor] = []
        self._buffered = 0
        self._planned: list[Source] = []
        self._hashes: set[str] = set()  # of what is planned

    @property
    def _end(self) -> int:
        return self.history.n_tokens + self._buffered

    def add(self, text: Text) -> bool:
        """Append a document, unless all of it is there. Returns whether it was appended."""
        if text.hash in self._hashes or self.catalog.complete_source(text.hash):
            self.report.known += 1
            return False
        # once a document is planned, the last source of the catalog is not at the end any more
        cut_off = None if self._planned else self.catalog.last_source()
        if cut_off and cut_off.hash == text.hash and cut_off.start + cut_off.tokens == self._end:
            # right at the end, no void slots or other sources behind it: only there can its tokens go on
            source, skip = cut_off, cut_off.tokens
            self.report.resumed += 1
        else:
            self._pad()
            skip = 0
            source = Source(0, text.uri, text.hash, self.kind or text.kind, time.time(), self.retrieval_score,
                            self._end, 0, False)
        self._planned.append(source)
        self._hashes.add(text.hash)
        self.report.sources += 1
        self.report.bytes += text.size
        for ids_N in self._tokens(text, skip):
            # a piece may be longer than a batch: no more than about two batches are ever held
            for part in ids_N.split(self.limit):
                self._put(part)
        self._change(complete=True)
        self._pad()
        return True

    def _tokens(self, text: Text, skip: int) -> Iterator[Tensor]:
        """int64 [N] in pieces, the first `skip` left out; every source starts with bos."""
        head, characters = [self.tokenizer.bos_id], 0
        for piece in text.pieces():
            self.progress(characters := characters + len(piece))
            ids_N = torch.tensor(head + self.tokenizer.encode(piece))
            head, skipped = [], min(skip, len(ids_N))
            skip -= skipped
            if skipped < len(ids_N):
                yield ids_N[skipped:]

    def _put(self, ids_N: Tensor) -> None:
        self._change(tokens=self._planned[-1].tokens + len(ids_N))
        self._slots.append(ids_N)
        self._buffered += len(ids_N)
        self.report.tokens += len(ids_N)
        if self._buffered >= self.limit:
            self._write()

    def _change(self, **fields) -> None:
        self._planned[-1] = Source(**{**vars(self._planned[-1]), **fields})

    def _pad(self) -> None:
        if void := -self._end % self.history.block_size:
            self._slots.append(torch.full((void,), VOID))
            self._buffered += void

    def _write(self) -> None:
        """Commit what is buffered, its sources first; the last one may go on."""
        if self._planned:
            # the catalog first: sources of slots that never came are cut back at the next opening, slots without a
            # source would only be told of, and their document ingested once more
            *done, last = self.catalog.write_sources(self._planned)
            # under its id the next batch overwrites what is announced of it
            self._planned = [] if self._planned[-1].complete else [Source(**{**vars(self._planned[-1]), "id": last})]
            self._hashes = {source.hash for source in self._planned}
        if self._buffered:
            self.history.fill(torch.cat(self._slots))
        self._slots, self._buffered = [], 0

    def finish(self) -> IngestReport:
        self._write()
        return self.report
