"""Held-out real text as rows: a history of n tokens of one document, and the next H, all judged.

What a token is worth depends on where it was seen before: `repeat_distance` says how far back in its row, `bucket_of`
in which class of distances. Examples are tagged with the kind of their document (what the corpus says in its column
`kind`; "code" or "text" without), and `layout` tells headings, lists, tables, code, quotes and speech
from running text, line by line.
"""

import re

import numpy as np

from nanochat.dataloader import LongRows
from nanochat.dataset import open_corpus
from nanochat.tasks.schema import Example, TaskBatch
from nanochat.token_cache import open_token_cache
from nanochat.tokenizer import Tokenizer

BUCKETS = ("never", "<128", "128-511", "512-2047", ">=2048")
_EDGES = np.array([1, 128, 512, 2048])
LAYOUT = ("blank", "fence", "heading", "list", "table", "markup", "quote", "speech", "code", "running")
_LINES = {
    "blank": r"\s*$",
    "fence": r"\s*(```|~~~)",
    "heading": r"#{1,6} |={3,}\s*$|-{3,}\s*$|<h[1-6]\b|(CHAPTER|PART|SECTION)\b",
    "list": r"\s*([-*•+]|\d{1,3}[.)])\s",
    "table": r"\s*\|.*\||.*\t.*\t|\s*<t[hrd]\b",
    "markup": r"\s*</?\w+[^>]*>",
    "quote": r"\s*>",
    "speech": r"\s*[\"“‘—]|[A-Z][\w .]{0,24}:\s",
    "code": r"( {4}|\t)\S|\s*(def|class|import|from|return|if|for|while|with|else|try|except|raise|@|//|#include)\b.*[:;(){}=]?\s*$",  # noqa: E501
}
_TAGS = [(tag, re.compile(_LINES[tag])) for tag in LAYOUT if tag in _LINES]


def repeat_distance(tokens: np.ndarray) -> np.ndarray:
    """int64 [B, T]: how many tokens before it the same token last stood in its row; 0 where it is
    the first. tokens int [B, T]."""
    order = np.argsort(tokens, axis=1, kind="stable")
    ordered = np.take_along_axis(tokens, order, axis=1)
    step = np.diff(order, axis=1, prepend=0)
    step[:, 1:][ordered[:, 1:] != ordered[:, :-1]] = 0
    step[:, 0] = 0
    distance = np.empty_like(step)
    np.put_along_axis(distance, order, step, axis=1)
    return distance


def bucket_of(distance: np.ndarray) -> np.ndarray:
    """int64, like `distance`: index into BUCKETS."""
    return np.where(distance == 0, 0, np.searchsorted(_EDGES, distance, side="right"))


def judged_buckets(batch: TaskBatch) -> np.ndarray:
    """int64 [B, H]: the bucket of each token after the history; −1 where it is not judged."""
    buckets = bucket_of(repeat_distance(batch.tokens))[:, batch.n :]
    return np.where(batch.targets[:, batch.n - 1 : -1] >= 0, buckets, -1)


def layout(text: bytes) -> list[tuple[int, str]]:
    """(byte at which it begins, what it is: one of LAYOUT) of every line of UTF-8 text. What
    stands between fences is code."""
    found, place, fenced = [], 0, False
    for line in text.split(b"\n"):
        readable = line.decode("utf-8", errors="replace")
        tag = next((tag for tag, pattern in _TAGS if pattern.match(readable)), "running")
        if tag == "fence":
            fenced = not fenced
        found.append((place, "code" if fenced and tag != "fence" else tag))
        place += len(line) + 1
    return found


def layout_of_tokens(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """int64 [T]: index into LAYOUT of the line in which each token begins, of a row that
    begins anywhere in a document."""
    pieces = [tokenizer.decode_bytes([int(t)]) for t in tokens]
    begins = np.cumsum([0] + [len(piece) for piece in pieces[:-1]])
    starts, tags = zip(*layout(b"".join(pieces)))
    return np.array([LAYOUT.index(tag) for tag in tags])[np.searchsorted(starts, begins, side="right") - 1]


class TextRows:
    """Rows of one split of a corpus ("stdlib" or a directory of parquet, jsonl or text files), drawn by `LongRows`.

    UserError when no document has n + horizon + 1 tokens.
    """

    def __init__(self, data: str, split: str, tokenizer: Tokenizer, n: int, horizon: int, seed: int = 0,
                 text_column: str = "text"):
        corpus = open_corpus(data, text_column)
        cache = open_token_cache(corpus, split, tokenizer)
        self._rows, self._docs, self._tokenizer, self.n = LongRows(cache, n + horizon, seed,
                                                                   split), cache.docs, tokenizer, n
        self._documents = [(document.source, document.kind) for document in corpus.documents(split)]
        self.name, self.num_rows = corpus.name, self._rows.num_rows

    def batch(self, rows: np.ndarray) -> TaskBatch:
        """rows: int [B] row numbers; every one below `num_rows` is another piece of text."""
        rows = np.asarray(rows, dtype=np.int64)
        tokens = self._rows.row_tokens(rows)[0][:, :-1]
        targets = np.full_like(tokens, -1)
        targets[:, self.n - 1 : -1] = tokens[:, self.n :]
        examples = []
        for row, start in zip(tokens, self._rows.starts(rows)):
            source, kind = self._documents[int(np.searchsorted(self._docs, start, side="right")) - 1]
            context, answer = (self._tokenizer.decode(part) for part in (row[: self.n], row[self.n :]))
            examples.append(Example(context, "", "", answer, len(row) - self.n, self.name, self.n, tags=(kind, source)))
        return TaskBatch(tokens, targets, self.n, examples)
