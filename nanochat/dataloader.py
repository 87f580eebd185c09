"""Batches as a pure function of the global row number.

Optimizer step i covers the global rows [i G, (i + 1) G), G = `rows_per_step` over all ranks and micro-steps. Micro-step
m of rank r takes its own slice of `micro_batch` rows, so any number of ranks and micro-steps sees the same rows in a
step, and the state of a loader is one number. A *source* turns row numbers into tokens:

  LongRows     each row is a piece of one long document, whose pieces follow one another: long context stays whole
  PackedRows   rows start with bos, short documents packed to fill them (nanochat's manner)
  RecallSource synthetic key-value recall, of one hop or two; NeedleSource its facts hidden in text
  FactSource   notes of facts between the lines of embedded code and prose, which are learned, too
  RandomSource uniform random tokens (a floor that no loss may go below)
  TaskSource   (nanochat.tasks.source) the generated tasks of the evaluation, with many answers per row
"""

from bisect import bisect_right
from typing import NamedTuple, Protocol

import numpy as np
import torch

from nanochat.common import UserError, key_seed
from nanochat.dataset import EMBEDDED, open_corpus
from nanochat.tasks.facts import FactRows, FactTask
from nanochat.tasks.hops import HopTask
from nanochat.tasks.recall import CurriculumSchedule, RecallTask, random_bits
from nanochat.tasks.source import TaskSource, parse_mix
from nanochat.tasks.words import Words
from nanochat.token_cache import TokenCache, open_token_cache
from nanochat.tokenizer import Tokenizer


def is_synthetic(data: str) -> bool:
    """Whether a value of --data is no text: no bits per byte, nothing to pack."""
    return data in ("recall", "hops", "needle", "facts", "random") or is_tasks(data)


def is_tasks(data: str) -> bool:
    """Whether a value of --data names generated tasks: "tasks" or "tasks:name,name=share,…"."""
    return data.partition(":")[0] == "tasks"


class Batch(NamedTuple):
    inputs: torch.Tensor  # int64 [B, T]
    targets: torch.Tensor  # int64 [B, T]: the next token, -1 where it does not count
    rows: torch.Tensor  # int64 [B]: global row numbers
    num_targets: int  # the most targets that any row has: the head need not run on more positions of a row


class RowSource(Protocol):
    T: int  # tokens per row, not counting the last target
    fingerprint: str  # two sources with the same one give the same rows
    summary: str  # one line for the log

    def row_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """rows int64 [B] -> tokens int64 [B, T + 1] in fresh memory, and bool [B, T + 1]: tokens that
        count as targets (None: all)."""

    def count_rows(self, limit: int) -> int:
        """Different rows of the first epoch, counted up to `limit`."""


class LongRows:
    """Contiguous windows of T + 1 tokens of one document each; shorter documents are left out.

    In every epoch a document of L tokens gives floor((L - 1) / T) consecutive windows (each begins with the last
    target of the one before) from a random phase on, and the windows of all documents are shuffled.
    """

    def __init__(self, cache: TokenCache, T: int, seed: int, split: str):
        self.T, self._seed, self._tokens = T, key_seed(seed, "long rows", split), cache.tokens
        long = cache.lengths >= T + 1
        if not long.any():
            raise UserError(
                f"no {split} document has {T + 1} tokens (the longest of {len(long)} has {cache.lengths.max()}); "
                f"use shorter rows or --rows=packed"
            )
        self._starts, spans = cache.docs[:-1][long], cache.lengths[long] - 1
        windows = spans // T
        self._slack = spans - windows * T
        self._ends = np.cumsum(windows)
        self.num_rows = int(self._ends[-1])
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.fingerprint = f"long-{cache.fingerprint}-{T}-{seed}"
        self.summary = (
            f"{split}: {self.num_rows:,} rows of {T} tokens from {long.sum():,} of {len(long):,} documents, "
            f"{self.num_rows * T:,} of {len(cache.tokens):,} tokens"
        )

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the windows, int64 [num_rows], and each document's phase, int64 [documents];
        the last two epochs are kept."""
        if epoch not in self._epochs:
            rng = np.random.default_rng((self._seed, epoch))
            self._epochs = dict(list(self._epochs.items())[-1:])
            self._epochs[epoch] = rng.permutation(self.num_rows), rng.integers(0, self._slack + 1)
        return self._epochs[epoch]

    def starts(self, rows: np.ndarray) -> np.ndarray:
        """int64 [B]: where in the token file each row begins."""
        starts = np.empty(len(rows), dtype=np.int64)
        for i, (epoch, place) in enumerate(zip(*np.divmod(rows, self.num_rows))):
            order, phase = self._epoch(int(epoch))
            window = order[place]
            document = np.searchsorted(self._ends, window, side="right")
            first = self._ends[document - 1] if document else 0
            starts[i] = self._starts[document] + phase[document] + (window - first) * self.T
        return starts

    def row_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
        return np.stack([self._tokens[s : s + self.T + 1] for s in self.starts(rows)]).astype(np.int64), None

    def count_rows(self, limit: int) -> int:
        return min(limit, self.num_rows)


class PackedRows:
    """Rows of T + 1 tokens that start with bos, packed best-fit from documents; a document
    is cropped only to fill a row.

    A document longer than a row is first cut into pieces of T tokens, each behind a bos. The order of documents is
    drawn per epoch; every `CHUNK` of them are packed together: the longest piece that fits goes in, and when none does,
    the shortest is cropped. A chunk's rows depend on (seed, epoch, chunk) only; where they begin among all rows is
    found by packing the chunks before it once.
    """

    CHUNK = 1024  # documents

    def __init__(self, cache: TokenCache, T: int, seed: int, split: str):
        self.T, self._cache, self._seed = T, cache, key_seed(seed, "packed rows", split)
        self._chunks = -(-len(cache.lengths) // self.CHUNK)  # per epoch
        self._first_rows = [0]  # of every chunk packed so far, and of the next
        self._plans: dict[int, list[list[tuple[int, int]]]] = {}
        self._order = -1, np.empty(0, dtype=np.int64)  # (epoch, its order of documents)
        self.fingerprint = f"packed-{cache.fingerprint}-{T}-{seed}"
        self.summary = (f"{split}: rows of {T} tokens packed from {len(cache.lengths):,} documents, "
                        f"{len(cache.tokens):,} tokens")
        if not self.count_rows(1):
            raise UserError(f"the {split} split has {len(cache.tokens)} tokens, a row needs {T + 1}; use shorter rows "
                            "or more data")

    def _pieces(self, chunk: int) -> list[tuple[int, int]]:
        """(length with its bos, place of the first token after it) of each piece of a chunk's documents."""
        epoch, place = divmod(chunk, self._chunks)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._cache.lengths))
        pieces = []
        for document in self._order[1][place * self.CHUNK : (place + 1) * self.CHUNK]:
            begin, end = self._cache.docs[document : document + 2]
            pieces += [(int(min(self.T, end - s)) + 1, int(s)) for s in range(begin + 1, end, self.T)]
        return pieces

    def _plan(self, chunk: int) -> list[list[tuple[int, int]]]:
        """The rows of a chunk, each a list of (length with bos, place); the two latest plans are kept."""
        if chunk in self._plans:
            return self._plans[chunk]
        pieces = self._pieces(chunk)
        rows = [[piece] for piece in pieces if piece[0] == self.T + 1]
        left = sorted(piece for piece in pieces if piece[0] <= self.T)
        total = sum(length for length, _ in left)
        while total > self.T:
            row, room = [], self.T + 1
            while room:
                fits = bisect_right(left, (room, 1 << 62)) - 1
                length, place = left.pop(max(fits, 0))
                row.append((min(length, room), place))
                room -= min(length, room)
                total -= length
            rows.append(row)
        np.random.default_rng((self._seed, chunk, 1)).shuffle(rows)
        self._plans = dict(list(self._plans.items())[-1:]) | {chunk: rows}
        return rows

    def _extend(self) -> None:
        self._first_rows.append(self._first_rows[-1] + len(self._plan(len(self._first_rows) - 1)))
        if len(self._first_rows) > 2 * self._chunks and self._first_rows[-1] == self._first_rows[-1 - 2 * self._chunks]:
            raise UserError(f"two epochs of packing gave no row of {self.T + 1} tokens; use shorter rows or more data")

    def _row(self, row: int) -> np.ndarray:
        while self._first_rows[-1] <= row:
            self._extend()
        chunk = bisect_right(self._first_rows, row) - 1
        tokens, bos = [], np.array([self._cache.bos_id], dtype=np.int64)
        for length, place in self._plan(chunk)[row - self._first_rows[chunk]]:
            tokens += [bos, self._cache.tokens[place : place + length - 1]]
        return np.concatenate(tokens, dtype=np.int64)

    def row_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
        return np.stack([self._row(int(row)) for row in rows]), None

    def count_rows(self, limit: int) -> int:
        while self._first_rows[-1] < limit and len(self._first_rows) <= self._chunks:
            self._extend()
        return min(limit, self._first_rows[: self._chunks + 1][-1])


class RecallSource:
    """Recall rows; only the values asked for count as targets. With `total_rows` (all rows of the training run) the
    number of stored blocks follows `schedule`, without it every row stores task.blocks."""

    def __init__(self, task: RecallTask, T: int, split: str, schedule: CurriculumSchedule | None = None,
                 total_rows: int | None = None):
        self.T, self.task, self._split, self._schedule, self._total = T, task, split, schedule, total_rows
        if (schedule is None) != (total_rows is None):
            raise ValueError("a curriculum needs the number of rows of the run, and the reverse")
        blocks = schedule.blocks if schedule else task.blocks
        task.rows(split, np.zeros(1), blocks, T)  # refuses a T that is too short
        if schedule and schedule.start < task.episode_blocks:
            raise UserError(f"the recall curriculum starts at {schedule.start} blocks, an episode needs "
                            f"{task.episode_blocks}")
        self.fingerprint = f"recall-{key_seed(repr(task), T, split, repr(schedule), total_rows):016x}"
        self.summary = f"{split}: recall rows of {T} tokens, up to {blocks} stored blocks of {task.block}"

    def num_blocks(self, rows: np.ndarray) -> np.ndarray:
        """int64 [B]: how many blocks each row stores."""
        if self._schedule is None:
            return np.full(len(rows), self.task.blocks)
        return self._schedule.num_blocks(np.minimum(rows / self._total, 1.0), rows)

    def row_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        made = self.task.rows(self._split, rows, self.num_blocks(rows), self.T)
        return made.tokens, made.mask

    def count_rows(self, limit: int) -> int:
        return limit


class NeedleSource:
    """Recall facts hidden in text of the same split: `needles` blocks of pairs in filler, then questions about them."""

    def __init__(self, task: RecallTask, filler: np.ndarray, T: int, split: str, needles: int):
        self.T, self.task, self._filler, self._split, self._needles = T, task, filler, split, needles
        questions = 2 * min(task.announce // 2 + task.ask // 2,
                            min(needles, task.episode_blocks) * task.pairs_per_block)
        self._history = T - questions
        # refuses a T or a number of needles that does not fit
        task.needle_rows(split, np.zeros(1), filler, self._history, needles)
        self.fingerprint = f"needle-{key_seed(repr(task), T, split, needles, len(filler)):016x}"
        self.summary = (f"{split}: {needles} needle(s) of {task.pairs_per_block} facts in {self._history} tokens of "
                        f"text, rows of {T} tokens")

    def row_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        made = self.task.needle_rows(self._split, rows, self._filler, self._history, self._needles)
        return made.tokens, made.mask

    def count_rows(self, limit: int) -> int:
        return limit


class FactSource:
    """Notes of facts in real text, of the embedded code and prose in turn, then questions about them."""

    KINDS = tuple(EMBEDDED)

    def __init__(self, task: FactTask, tokenizer: Tokenizer, T: int, split: str, seed: int):
        self.T, self.task, self._split, N = T, task, split, task.text_tokens(T)
        caches = [open_token_cache(open_corpus(data), split, tokenizer) for data in self.KINDS]
        self._text = [LongRows(cache, N - 1, seed, split) for cache in caches]
        self._ends_line = np.array([tokenizer.decode_bytes([i]).endswith(b"\n") for i in range(tokenizer.vocab_size)])
        texts = [text.fingerprint for text in self._text]
        self.fingerprint = f"facts-{key_seed(repr(task), T, split, *texts):016x}"
        self.summary = (f"{split}: {task.notes} notes of {task.facts} facts in {N} tokens of "
                        f"{' or '.join(self.KINDS)}, rows of {T} tokens")

    def made(self, rows: np.ndarray) -> FactRows:
        """Row r is of kind r mod 2."""
        place, kind = np.divmod(np.asarray(rows, dtype=np.int64), len(self._text))
        text = np.empty((len(rows), self.task.text_tokens(self.T)), dtype=np.int64)
        for k, source in enumerate(self._text):
            if (of_kind := kind == k).any():
                text[of_kind] = source.row_tokens(place[of_kind])[0]
        return self.task.rows(self._split, rows, text, self._ends_line, self.T)

    def row_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.made(rows)[:2]

    def count_rows(self, limit: int) -> int:
        return min(limit, len(self._text) * min(text.num_rows for text in self._text))


class RandomSource:
    """Uniform random tokens: the entropy is ln(vocab) and nothing can be learned."""

    def __init__(self, vocab: int, T: int, seed: int, split: str):
        self.T, self._vocab, self._key = T, vocab, key_seed(seed, "random rows", split)
        self.fingerprint = f"random-{vocab}-{T}-{seed}-{split}"
        self.summary = f"{split}: uniform random rows of {T} tokens, ln({vocab}) = {np.log(vocab):.4f} nats"

    def row_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, None]:
        return (random_bits(self._key, rows, self.T + 1) % np.uint64(self._vocab)).astype(np.int64), None

    def count_rows(self, limit: int) -> int:
        return limit


def make_source(
    data: str,
    split: str,
    *,
    T: int,
    seed: int,
    tokenizer: Tokenizer,
    rows: str = "long",
    text_column: str = "text",
    recall_task: RecallTask | None = None,
    recall_blocks: int = 32,
    schedule: CurriculumSchedule | None = None,
    total_rows: int | None = None,
    needles: int = 4,
) -> RowSource:
    """The source that the flags name. data: "stdlib", "docstrings", "recall", "hops", "needle", "facts", "random",
    "tasks[:mix]", or a directory; rows: "long" or "packed".

    recall_task, recall_blocks (without a task) are for "recall" and "hops": by default the tokenizer's
    ids; schedule and total_rows for
    those and for tasks: by default no curriculum.
    """
    if data in ("recall", "hops"):
        kind = RecallTask if data == "recall" else HopTask
        task = recall_task or kind.for_tokenizer(tokenizer, seed=seed, blocks=recall_blocks)
        return RecallSource(task, T, split, schedule, total_rows)
    if data == "needle":
        filler = open_token_cache(open_corpus("stdlib"), split, tokenizer).tokens
        return NeedleSource(RecallTask.for_tokenizer(tokenizer, seed=seed), filler, T, split, needles)
    if data == "facts":
        return FactSource(FactTask.for_tokenizer(tokenizer, seed, needles), tokenizer, T, split, seed)
    if is_tasks(data):
        words = Words.of(tokenizer, open_token_cache(open_corpus("stdlib"), split, tokenizer).tokens)
        return TaskSource(parse_mix(data.partition(":")[2]), words, T, split, seed, schedule, total_rows)
    if data == "random":
        return RandomSource(tokenizer.vocab_size, T, seed, split)
    if rows not in ("long", "packed"):
        raise UserError(f"--rows={rows}: 'long' or 'packed'")
    cache = open_token_cache(open_corpus(data, text_column), split, tokenizer)
    return (LongRows if rows == "long" else PackedRows)(cache, T, seed, split)


def source_of(meta: dict, split: str, *, tokenizer: Tokenizer, data: str = "", T: int = 0, seed: int | None = None,
              **options) -> RowSource:
    """The rows that a checkpoint's training read, or others read alike. UserError if its
    `meta` names no flags of base_train.

    data, T, seed: other than the training's; options: of `make_source`, instead of the training's or beside them.
    """
    try:
        flags = meta["flags"]
        own = {name: flags[name] for name in ("rows", "text_column", "needles", "recall_blocks") if name not in options}
        data, seed = data or flags["data"], flags["seed"] if seed is None else seed
    except KeyError as e:
        raise UserError(f"the checkpoint names no --{e.args[0]}: it is not one of base_train") from None
    return make_source(data, split, T=T or meta["model_config"]["sequence_len"], seed=seed, tokenizer=tokenizer, **own,
                       **options)


def judged_rows(source: RowSource, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows int64 [B]: tokens int64 [B, T], and the token after each, −1 where none is judged."""
    tokens, mask = source.row_tokens(rows)
    targets = tokens[:, 1:] if mask is None else np.where(mask[:, 1:], tokens[:, 1:], -1)
    return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets.copy())


def eval_rows(source: RowSource, tokens: int, multiple: int = 1) -> int:
    """How many rows, a multiple of `multiple`, cover `tokens` eval tokens. UserError if the
    source has fewer different rows."""
    if tokens < 1:
        raise UserError(f"{tokens} eval tokens: at least 1")
    wanted = -(-tokens // (source.T * multiple)) * multiple
    if (have := source.count_rows(wanted)) < wanted:
        raise UserError(
            f"evaluation asks for {tokens} tokens, {wanted} rows of {source.T}; the held-out split has {have} rows "
            f"({have * source.T} tokens). Ask for fewer tokens or use shorter rows"
        )
    return wanted


class Loader:
    """Endless batches of one rank. UserError if the rows do not divide among ranks and
    micro-steps, or an epoch is too short."""

    def __init__(
        self,
        source: RowSource,
        rows_per_step: int,
        micro_batch: int,
        T: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ):
        if source.T != T:
            raise ValueError(f"source of rows of {source.T} tokens, loader of {T}")
        if min(rows_per_step, micro_batch) < 1 or rows_per_step % (micro_batch * world_size):
            raise UserError(
                f"{rows_per_step} rows per step do not divide into {world_size} ranks x micro-batches of "
                f"{micro_batch}; "
                f"make the total batch a multiple of {micro_batch * world_size} rows ({micro_batch * world_size * T} "
                "tokens)"
            )
        if (have := source.count_rows(rows_per_step)) < rows_per_step:
            raise UserError(f"a step takes {rows_per_step} rows, the data has {have} rows of {T} tokens; shorter rows "
                            "or more data")
        self.source, self.rows_per_step, self.micro_batch, self.T = source, rows_per_step, micro_batch, T
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.micro_steps = rows_per_step // (micro_batch * world_size)
        self._next_row = 0  # rows that all ranks together have been given

    @property
    def step(self) -> int:
        """The optimizer step that the next batch belongs to."""
        return self._next_row // self.rows_per_step

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def next(self) -> Batch:
        """The next micro-batch of this rank, in memory that is never written again."""
        first = self._next_row + self.rank * self.micro_batch
        rows = np.arange(first, first + self.micro_batch, dtype=np.int64)
        tokens, mask = self.source.row_tokens(rows)
        targets = tokens[:, 1:].copy() if mask is None else np.where(mask[:, 1:], tokens[:, 1:], -1)
        self._next_row += self.micro_batch * self.world_size
        num_targets = self.T if mask is None else int((targets >= 0).sum(1).max())
        return Batch(*map(self._to_device, (tokens[:, :-1].copy(), targets, rows)), num_targets)

    def state_dict(self) -> dict:
        """Position and what it is a position in; independent of ranks and micro-batches at a step's end."""
        return {"next_row": self._next_row, "rows_per_step": self.rows_per_step, "T": self.T,
                "source": self.source.fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken. UserError if it was taken from other data or another batch size."""
        own = self.state_dict()
        for name in ("rows_per_step", "T", "source"):
            if state.get(name) != own[name]:
                raise UserError(f"cannot resume: the checkpoint's data has {name}={state.get(name)}, this run "
                                f"{own[name]}; use the same flags")
        if state["next_row"] % self.rows_per_step % (self.micro_batch * self.world_size):
            raise UserError(
                f"cannot resume: row {state['next_row']} lies inside a step that {self.world_size} ranks x "
                "micro-batches of "
                f"{self.micro_batch} cut elsewhere; use the ranks and micro-batch of the checkpoint"
            )
        self._next_row = state["next_row"]
