"""A corpus split as token ids on disk: tokenized once, memory-mapped afterwards, and once more
when a file's content has changed.

`tokens-{split}-{corpus}-{tokenizer}/` holds tokens.bin (uint16, or uint32 for vocabularies from 65,536 on), docs.npy
(int64 [documents + 1], where each document begins, and the end) and meta.json. Every document starts with bos.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np

from nanochat.common import UserError, base_dir
from nanochat.dataset import Corpus, Progress
from nanochat.documents import Document
from nanochat.outputs import BASE_DIR, locked, reason
from nanochat.tokenizer import Tokenizer

BATCH_CHARS = 1 << 20  # encoded at a time


@dataclass(frozen=True)
class TokenCache:
    """tokens: uint16 or uint32 [N], memory-mapped; docs: int64 [D + 1], document d is tokens[docs[d] : docs[d + 1]]."""

    path: Path
    tokens: np.ndarray
    docs: np.ndarray
    fingerprint: str

    @property
    def lengths(self) -> np.ndarray:
        """int64 [D]: tokens of each document, bos included."""
        return np.diff(self.docs)

    @property
    def bos_id(self) -> int:
        return int(self.tokens[0])


def _batches(documents: Iterator[Document]) -> Iterator[list[str]]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document.text)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _build(path: Path, corpus: Corpus, split: str, tokenizer: Tokenizer) -> None:
    progress = Progress(f"tokenizing {corpus.name} {split}", corpus.num_documents(split), "documents")
    dtype = np.uint16 if tokenizer.vocab_size < 1 << 16 else np.uint32
    tmp = path.with_name(f"{path.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # left by an interrupted run; we hold the lock
    tmp.mkdir(parents=True)
    lengths = []
    try:
        with open(tmp / "tokens.bin", "wb") as f:
            for texts in _batches(corpus.documents(split)):
                for ids in tokenizer.encode_batch(texts, num_threads=os.cpu_count() or 1):
                    f.write(np.array([tokenizer.bos_id, *ids], dtype=dtype).tobytes())
                    lengths.append(1 + len(ids))
                progress.update(len(lengths))
        corpus.require_unchanged()
        np.save(tmp / "docs.npy", np.cumsum([0, *lengths], dtype=np.int64))
        meta = {"tokens": sum(lengths), "documents": len(lengths), "dtype": np.dtype(dtype).name}
        (tmp / "meta.json").write_text(json.dumps(meta))
        os.replace(tmp, path)
    except (UserError, OSError) as e:
        shutil.rmtree(tmp, ignore_errors=True)  # a damaged corpus, or a full disk, leaves nothing behind
        if isinstance(e, UserError):
            raise
        raise UserError(f"cannot write the tokens of {corpus.name} to {path} ({reason(e)}); free some space, or set "
                        f"{BASE_DIR} to another folder") from None


def _open(path: Path, fingerprint: str) -> TokenCache:
    def damaged(file: str, what: object) -> UserError:
        return UserError(f"damaged token cache {path / file} ({what}); delete {path}, it will be made again")

    file = "meta.json"
    try:
        meta = json.loads((path / file).read_text())
        tokens, documents, dtype = int(meta["tokens"]), int(meta["documents"]), np.dtype(meta["dtype"])
        file = "docs.npy"
        docs = np.load(path / file, allow_pickle=False)
        file = "tokens.bin"
        size = (path / file).stat().st_size
    except (OSError, ValueError, KeyError, TypeError, EOFError) as e:
        raise damaged(file, e) from None
    if docs.shape != (documents + 1,) or docs[-1] != tokens:
        raise damaged("docs.npy", f"{len(docs) - 1} documents ending at {docs[-1]}, expected {documents} and {tokens}")
    if size != tokens * dtype.itemsize:
        raise damaged("tokens.bin", f"{size} bytes, expected {tokens * dtype.itemsize}")
    return TokenCache(path, np.memmap(path / "tokens.bin", dtype=dtype, mode="r"), docs, fingerprint)


def open_token_cache(corpus: Corpus, split: str, tokenizer: Tokenizer) -> TokenCache:
    """The tokens of a corpus split ("train" or "val"), made on first use. UserError on an
    empty corpus or a damaged cache."""
    fingerprint = f"{split}-{corpus.fingerprint}-{tokenizer.fingerprint}"
    path = base_dir() / f"tokens-{fingerprint}"
    with locked(base_dir() / ".locks" / path.name):
        if not path.exists():
            _build(path, corpus, split, tokenizer)
    return _open(path, fingerprint)
