"""What a history is made of and how it is used: a SQLite database beside the store's files (or in
memory, for a history in RAM).

Sources (where each span of slots comes from), layout tags, statistics of nodes, pruned detail, edits, versions of the
gists. The store holds the records and is always right: `reconcile` brings the catalog to what the store has
committed, and says what it changed.

A source stands at `[start, start + tokens)`, `start` a multiple of the block size; the void slots of its last block
follow. The catalog writes what will be true *before* the store commits it: after a crash in
between, `reconcile` cuts it back.

Statistics are counted in memory (`count_access`, `count_sensitivity`: a list append) and written in batches by `flush`:
call that when the user is waiting for nothing. What a crash loses of them is what was counted since.

Shapes: N entries of a working context.
"""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from mc.model import MegaContext
from mc.store.history import MAX_BLOCKS, History, store_format
from mc.store.ram import ERASED, VOID, RamStore, Store
from nanochat.common import UserError, from_plain, one_line, parse_json
from nanochat.gpt import GPT

FILE = "catalog.sqlite"
VERSION, APPLICATION_ID = 1, 0x4D435458  # "MCTX"
MAX_BUFFERED = 1 << 20  # entries counted before they are written
# a node is one int64, its level above its index: so accesses are counted by one `unique`
LOD_SHIFT = 48
NUMBER = int | float
FAR_FUTURE = 1e11  # seconds since 1970, in the year 5138
SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sources (
    id INTEGER PRIMARY KEY,
    uri TEXT NOT NULL,              -- path, address, or what the caller says
    hash TEXT NOT NULL,             -- sha256 of the content as it was ingested
    kind TEXT,
    time REAL NOT NULL,             -- when it was added, seconds since 1970
    retrieval_score REAL,           -- where a retriever chose it
    start INTEGER NOT NULL,         -- first slot
    tokens INTEGER NOT NULL,
    complete INTEGER NOT NULL,      -- 0: it is still growing, or its ingest was cut off
    edits INTEGER NOT NULL DEFAULT 0);
CREATE INDEX sources_by_start ON sources (start, id);
CREATE INDEX sources_by_hash ON sources (hash);
CREATE TABLE tags (                 -- layout: tokens [start, stop) of a source, counted from its first
    source INTEGER NOT NULL REFERENCES sources ON DELETE CASCADE,
    start INTEGER NOT NULL, stop INTEGER NOT NULL, tag TEXT NOT NULL);
CREATE INDEX tags_by_tag ON tags (tag, source);
CREATE INDEX tags_by_source ON tags (source, start);
CREATE TABLE nodes (                -- lod 0: the raw detail of block idx; from 1 on: the gist of node idx
    lod INTEGER NOT NULL, idx INTEGER NOT NULL,
    accesses INTEGER NOT NULL DEFAULT 0,   -- working contexts that showed it
    sensitivity REAL NOT NULL DEFAULT 0,   -- sum of the measured NLL without minus with it [nats]: positive means it helps
    measured INTEGER NOT NULL DEFAULT 0,   -- how many measurements that is
    variance REAL,                         -- of its children around their mean, mean over dimensions
    PRIMARY KEY (lod, idx)) WITHOUT ROWID;
CREATE TABLE tombstones (           -- runs of blocks whose raw detail was pruned; a run lies within one source
    first INTEGER PRIMARY KEY, count INTEGER NOT NULL, time REAL NOT NULL);
CREATE TABLE edits (
    id INTEGER PRIMARY KEY, source INTEGER NOT NULL, time REAL NOT NULL,
    start INTEGER NOT NULL, removed INTEGER NOT NULL, inserted INTEGER NOT NULL, report TEXT NOT NULL);
CREATE TABLE versions (             -- of the gists
    id INTEGER PRIMARY KEY, model TEXT NOT NULL, time REAL NOT NULL, origin TEXT NOT NULL);
CREATE TABLE intent (id INTEGER PRIMARY KEY CHECK (id = 1), edit TEXT NOT NULL);
CREATE VIEW spans AS SELECT start, start + tokens AS stop, id AS source, uri FROM sources WHERE tokens > 0;
"""  # noqa: E501


@dataclass(frozen=True)
class Source:
    """Where a span of slots comes from; the columns are those of the table."""

    id: int
    uri: str
    hash: str
    kind: str | None
    time: float
    retrieval_score: float | None
    start: int
    tokens: int
    complete: bool
    edits: int = 0

    def blocks(self, block_size: int) -> range:
        """Its LOD1 nodes."""
        first = self.start // block_size
        return range(first, first - -self.tokens // block_size)

    def stop(self, block_size: int) -> int:
        """First slot behind its last block."""
        return self.blocks(block_size).stop * block_size


@dataclass(frozen=True)
class Edit:
    """Tokens [start, start + removed) of a source, counted from its first, become `inserted` others."""

    source: int
    start: int
    removed: int
    inserted: int
    stop_block: int  # first block behind the source before the edit
    shift: int  # blocks by which what follows the source moves
    version: int  # of the store's text (`Store.text_version`), before the edit is committed


@dataclass(frozen=True)
class NodeStatistics:
    """Of one node; see the table `nodes`. `sensitivity` is the mean of the measurements [nats], None without any."""

    lod: int
    index: int
    accesses: int
    sensitivity: float | None
    variance: float | None


COPY_HINT = "restore it from a copy, or move it away: the history stays readable, what is known about its sources is lost"  # noqa: E501


@contextmanager
def _errors(where: str) -> Iterator[None]:
    try:
        yield
    except OverflowError:  # of a value that is looked for or written
        raise UserError(f"catalog {where}: a number beyond 64 bits") from None
    except UnicodeDecodeError as e:  # of a damaged page: SQLite hands its bytes, or its message with them, on as text
        raise UserError(f"catalog {where}: bytes that are no text ({e.reason}); {COPY_HINT}") from None
    except UnicodeEncodeError as e:
        raise UserError(f"catalog {where}: {e.object[e.start]!r} is no character of a text") from None
    except sqlite3.Error as e:
        what = str(e)
        if "locked" in what:
            hint = "another process is writing there; wait for it"
        elif "full" in what or "readonly" in what or "disk I/O" in what:
            hint = "make room, or make the folder writable"
        else:
            hint = COPY_HINT
        raise UserError(f"catalog {where}: {what}; {hint}") from None


class Catalog:
    """One connection. `path`: the store's folder, None for a catalog in memory;
    `read_only` for readers beside a writer.

    UserError for a file that is no catalog, one of a newer version, or one that cannot be written.
    """

    def __init__(self, folder: Path | str | None, block_size: int, *, read_only: bool = False):
        self.block_size, self.read_only = block_size, read_only
        self.path = None if folder is None else Path(folder) / FILE
        self._where = str(self.path or "in memory")
        self._accessed: list[Tensor] = []  # int64 [N]: lod · 2^48 + index
        self._buffered = 0
        self.notes: list[str] = []  # what `open_history` found to mend
        self._sensed: list[tuple[int, int, float]] = []
        with _errors(self._where):
            self.db = self._connect()
            self.db.execute("PRAGMA foreign_keys = ON")
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            tables = self.db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not tables and not read_only:
                # in one transaction with the tables: cut short, it leaves an empty file, which the next opening fills
                stamp = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"
                self.db.executescript(f"BEGIN; {SCHEMA} {stamp} COMMIT;")
            elif not tables:
                raise UserError(f"catalog {self._where} is empty, as a creation that was cut off leaves it; open the "
                                "store for writing once, as `python -m scripts.mc_store verify` does, which fills it")
            elif self.db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise UserError(f"{self._where} is a database of something else; move it away")
            elif version != VERSION:
                raise UserError(
                    f"catalog {self._where} has version {version}, this program reads version {VERSION}; use the "
                    "program that wrote it"
                )

    def _connect(self) -> sqlite3.Connection:
        if self.path is None:
            return sqlite3.connect(":memory:", isolation_level=None)
        if self.read_only:
            if not self.path.exists():
                raise UserError(f"no catalog at {self.path}: not a store of `python -m scripts.mc_store`")
            uri = f"{self.path.absolute().as_uri()}?mode=ro"
            db = sqlite3.connect(uri, uri=True, isolation_level=None)
            try:
                db.execute("SELECT count(*) FROM sqlite_master")
            except sqlite3.OperationalError:  # a read-only medium has no room for the shared memory of the log
                db = sqlite3.connect(uri + "&immutable=1", uri=True, isolation_level=None)
            return db
        db = sqlite3.connect(self.path, isolation_level=None, timeout=10)
        db.execute("PRAGMA journal_mode = WAL")
        # in WAL, NORMAL does not sync every commit: a power cut could take the source of slots that the store keeps
        db.execute("PRAGMA synchronous = FULL")
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _errors(self._where):
            # another writer is waited for here: who begins as a reader is refused at the first write if one wrote since
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    def _rows(self, sql: str, *values) -> list[tuple]:
        with _errors(self._where):
            return self.db.execute(sql, values).fetchall()

    def _checked(self, table: str, rows: list[tuple], *kinds: type | tuple) -> list[tuple]:
        """rows, whose cells are of these types: SQLite keeps in a column whatever it is given.
        UserError for another program's."""
        for row in rows:
            for cell, kind in zip(row, kinds):
                if not isinstance(cell, kind):
                    self._refuse(f"{table} hold {one_line(cell)}")
        return rows

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"catalog {self._where}: {what}; {COPY_HINT}")

    def _json(self, table: str, text: str) -> dict:
        try:
            found = parse_json(text)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else self._refuse(f"{table} hold {one_line(text)}")

    def close(self) -> None:
        """Write the statistics, and close."""
        if not self.read_only:
            self.flush()
        self.db.close()

    def __enter__(self) -> "Catalog":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- settings and versions ---------------------------------------------------------------------------------------

    def setting(self, name: str) -> str | None:
        """What `set` kept under a name."""
        found = self._rows("SELECT value FROM settings WHERE name = ?", name)
        return found[0][0] if found else None

    def set(self, name: str, value: str) -> None:
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    def add_version(self, model: str, origin: str) -> None:
        """The gists are those of `model` (its fingerprint) from now on; nothing when they were already."""
        versions = self.versions()
        if not versions or versions[-1]["model"] != model:
            with self._transaction() as db:
                db.execute("INSERT INTO versions (model, time, origin) VALUES (?, ?, ?)", (model, time.time(), origin))

    def versions(self) -> list[dict]:
        """Versions of the gists, the present one last."""
        rows = self._checked("versions", self._rows("SELECT id, model, time, origin FROM versions ORDER BY id"), int,
                             str, NUMBER, str)
        return [dict(zip(("id", "model", "time", "origin"), row)) for row in rows]

    def origins(self, model: str) -> list[dict]:
        """Where the networks of `model` came from, as `mc.store.networks.Networks.origin` says, each time
        that the gists became theirs."""
        return [self._json("versions", v["origin"]) for v in self.versions() if v["model"] == model]

    # --- sources -----------------------------------------------------------------------------------------------------

    def add_source(
        self,
        uri: str,
        start: int,
        *,
        hash: str = "",
        kind: str | None = None,
        retrieval_score: float | None = None,
        tokens: int = 0,
        complete: bool = False,
    ) -> int:
        """A source that begins at slot `start`, and grows to the end of the store unless it
        is complete. Returns its id."""
        return self.write_sources([Source(0, uri, hash, kind, time.time(), retrieval_score, start, tokens,
                                          complete)])[0]

    def write_sources(self, sources: Iterable[Source]) -> list[int]:
        """Insert (id 0) or overwrite sources, in one transaction. Returns their ids."""
        ids = []
        with self._transaction() as db:
            for source in sources:
                if source.start % self.block_size:
                    raise ValueError(f"source {source.uri} starts at slot {source.start}, not at a block of "
                                     f"{self.block_size}")
                values = [*asdict(source).values()][1:]
                if source.id:
                    columns = ", ".join(f"{name} = ?" for name in [*asdict(source)][1:])
                    db.execute(f"UPDATE sources SET {columns} WHERE id = ?", (*values, source.id))
                    ids.append(source.id)
                else:
                    names = ", ".join([*asdict(source)][1:])
                    ids.append(db.execute(f"INSERT INTO sources ({names}) VALUES ({', '.join('?' * len(values))})",
                                          values).lastrowid)
        return ids

    def source(self, id: int) -> Source:
        """UserError for an id that is not there."""
        found = self._sources("WHERE id = ?", id)
        if not found:
            raise UserError(f"no source {id} in {self._where}; `query` lists them")
        return found[0]

    def sources(
        self,
        *,
        uri: str | None = None,
        kind: str | None = None,
        tag: str | None = None,
        since: float | None = None,
        until: float | None = None,
        min_score: float | None = None,
        limit: int = -1,
    ) -> list[Source]:
        """Sources in the order of their spans; uri: a GLOB pattern; since, until: seconds since 1970."""
        conditions = {
            "uri GLOB ?": uri,
            "kind = ?": kind,
            "id IN (SELECT source FROM tags WHERE tag = ?)": tag,
            "time >= ?": since,
            "time <= ?": until,
            "retrieval_score >= ?": min_score,
        }
        given = {condition: value for condition, value in conditions.items() if value is not None}
        where = f"WHERE {' AND '.join(given)} " if given else ""
        return self._sources(f"{where}ORDER BY start, id LIMIT ?", *given.values(), limit)

    def sources_in(self, start: int, stop: int, store: Store) -> list[Source]:
        """Where the slots [start, stop) come from, in order: the sources that have a token there. One that is not
        complete has the tokens that the store holds of it."""
        # sources do not overlap: of those that begin before the span only the last can reach into it
        before = self._rows("SELECT max(start) FROM sources WHERE start <= ?", start)[0][0]
        found = self._sources("WHERE start >= ? AND start < ? ORDER BY start, id", before or 0, stop)
        found = [s if s.complete else replace(s, tokens=self._tokens_in(store, s)) for s in found]
        return [s for s in found if s.tokens and s.start + s.tokens > start]

    def complete_source(self, hash: str) -> Source | None:
        """The source that holds all of the content with this hash."""
        found = self._sources("WHERE hash = ? AND complete ORDER BY id LIMIT 1", hash)
        return found[0] if found else None

    def last_source(self) -> Source | None:
        found = self._sources("ORDER BY start DESC, id DESC LIMIT 1")
        return found[0] if found else None

    def count(self, table: str) -> int:
        """Rows of a table."""
        return self._rows(f"SELECT count(*) FROM {table}")[0][0]

    def totals(self, store: Store) -> tuple[int, int]:
        """Tokens of all sources, and how many sources; the last one may be growing."""
        tokens, sources = self._rows("SELECT coalesce(sum(tokens), 0), count(*) FROM sources")[0]
        last = self.last_source()
        return tokens + (self._tokens_in(store, last) - last.tokens if last and not last.complete else 0), sources

    def check(self) -> list[str]:
        """What SQLite finds wrong with the file."""
        return [f"catalog: {fault}" for (fault,) in self._rows("PRAGMA integrity_check") if fault != "ok"]

    def vacuum(self) -> None:
        """Give back the room of what was deleted."""
        self._rows("VACUUM")

    def _sources(self, condition: str, *values) -> list[Source]:
        names = "id, uri, hash, kind, time, retrieval_score, start, tokens, complete, edits"
        rows = self._rows(f"SELECT {names} FROM sources {condition}", *values)
        for row in self._checked("sources", rows, int, str, str, str | None, NUMBER, float | int | None, int, int, int,
                                 int):
            if not (0 <= row[4] < FAR_FUTURE and min(row[6], row[7]) >= 0 and row[6] % self.block_size == 0):
                self._refuse(f"source {row[0]} begins at {row[6]}, has {row[7]} tokens, and was added at {row[4]}")
        return [Source(*row[:8], bool(row[8]), row[9]) for row in rows]

    # --- layout tags -------------------------------------------------------------------------------------------------

    def add_tags(self, source: int, tags: Iterable[tuple[int, int, str]]) -> None:
        """Layout of a source: (start, stop, tag) in its tokens, e.g. (40, 72, "heading")."""
        with self._transaction() as db:
            db.executemany("INSERT INTO tags VALUES (?, ?, ?, ?)",
                           [(source, start, stop, tag) for start, stop, tag in tags])

    def tags(self, source: int) -> list[tuple[int, int, str]]:
        return self._rows("SELECT start, stop, tag FROM tags WHERE source = ? ORDER BY start, stop", source)

    # --- statistics --------------------------------------------------------------------------------------------------

    def count_access(self, lod_N: Tensor, index_N: Tensor) -> None:
        """A working context shows these entries, in their order. Raw tokens count for their block, once."""
        node_N = (lod_N << LOD_SHIFT) + torch.where(lod_N == 0, index_N // self.block_size, index_N)
        # entries are in order, so the tokens of a block stand together, and a refocus sorts nothing: 35 µs of processor
        # time for 128 entries
        self._accessed.append(torch.unique_consecutive(node_N.cpu()))
        self._buffered += len(self._accessed[-1])
        if self._buffered > MAX_BUFFERED:
            self.flush()

    def count_sensitivity(self, lod: int, index: int, delta_nll: float) -> None:
        """One measurement: NLL without the node (lod 0: the detail of block `index`) minus NLL with it [nats]."""
        self._sensed.append((lod, index, delta_nll))

    def flush(self) -> None:
        """Write the statistics counted so far, in one transaction."""
        if not self._accessed and not self._sensed:
            return
        # taken out first: counts whose writing fails are lost, and do not fail every later flush and `close` too
        accessed, sensed, self._accessed, self._sensed, self._buffered = self._accessed, self._sensed, [], [], 0
        with self._transaction() as db:
            if accessed:
                node_N, counts = torch.cat(accessed).unique(return_counts=True)
                rows = zip((node_N >> LOD_SHIFT).tolist(), (node_N & (1 << LOD_SHIFT) - 1).tolist(), counts.tolist())
                db.executemany(
                    "INSERT INTO nodes (lod, idx, accesses) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET "
                    "accesses = accesses + excluded.accesses",
                    rows,
                )
            db.executemany(
                "INSERT INTO nodes (lod, idx, sensitivity, measured) VALUES (?, ?, ?, 1) ON CONFLICT DO UPDATE SET "
                "sensitivity = sensitivity + excluded.sensitivity, measured = measured + 1",
                sensed,
            )

    def set_variance(self, lod: int, index_N: Tensor, variance_N: Tensor) -> None:
        """Gist variance of nodes of a level."""
        rows = ((lod, index, variance) for index, variance in zip(index_N.tolist(), variance_N.tolist()))
        with self._transaction() as db:
            db.executemany(
                "INSERT INTO nodes (lod, idx, variance) VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET variance = "
                "excluded.variance", rows
            )

    def without_variance(self, lod: int) -> Tensor:
        """Counted nodes of a level whose variance was not measured: int64 [N]."""
        return torch.tensor([i for (i,) in self._rows("SELECT idx FROM nodes WHERE lod = ? AND variance IS NULL",
                                                      lod)], dtype=torch.int64)

    def without_sensitivity(self) -> Tensor:
        """Blocks whose raw tokens were counted, and not measured: int64 [N]."""
        return torch.tensor([i for (i,) in self._rows("SELECT idx FROM nodes WHERE lod = 0 AND accesses > 0 AND "
                                                      "measured = 0")], dtype=torch.int64)

    def statistics(self, *, lod: int | None = None, limit: int = -1) -> list[NodeStatistics]:
        """Nodes by falling number of accesses."""
        where, values = ("", []) if lod is None else ("WHERE lod = ? ", [lod])
        sql = "SELECT lod, idx, accesses, CASE WHEN measured THEN sensitivity / measured END, variance FROM nodes "
        rows = self._rows(f"{sql}{where}ORDER BY accesses DESC, lod, idx LIMIT ?", *values, limit)
        return [NodeStatistics(*row) for row in self._checked("nodes", rows, int, int, int, float | int | None,
                                                              float | int | None)]

    def detail_utility(self, n_blocks: int) -> np.ndarray:
        """float64 [n_blocks]: what the raw detail of each block is worth: accesses × mean
        sensitivity [nats], at least 0.

        A block whose sensitivity was never measured counts with the mean of the measured ones, 1 where there are none.
        """
        found = self._rows("SELECT idx, accesses, CASE WHEN measured THEN sensitivity / measured END FROM nodes WHERE "
                           "lod = 0")
        rows = np.array(self._checked("nodes", found, int, int, float | int | None), dtype=np.float64).reshape(-1, 3)
        # blocks may have been cut off since they were counted
        rows = rows[(rows[:, 0] >= 0) & (rows[:, 0] < n_blocks)]
        measured = ~np.isnan(rows[:, 2])
        typical = rows[measured, 2].mean().clip(0) if measured.any() else 1.0
        utility = np.zeros(n_blocks)
        utility[rows[:, 0].astype(np.int64)] = rows[:, 1] * np.where(measured, rows[:, 2], typical).clip(0)
        return utility

    # --- pruned detail -----------------------------------------------------------------------------------------------

    def tombstones(self) -> list[tuple[int, int, float]]:
        """(first block, number of blocks, when) of pruned runs."""
        runs = self._checked("tombstones", self._rows("SELECT first, count, time FROM tombstones ORDER BY first"), int,
                             int, NUMBER)
        if bad := [run for run in runs if min(run[:2]) < 0]:
            self._refuse(f"tombstones hold {bad[0]}")
        return runs

    def set_tombstones(self, pruned_N: np.ndarray) -> None:
        """Make the tombstones say which blocks are pruned (bool [blocks]); those that were keep their time."""
        times = np.full(len(pruned_N), time.time())
        for first, count, when in self.tombstones():
            times[first : first + count] = when
        starts = np.zeros(len(pruned_N) + 1, dtype=bool)
        first = np.array([s.start // self.block_size for s in self._sources("WHERE tokens > 0")], dtype=np.int64)
        # a run ends with its source: an edit moves runs by where they begin (`finish_edit`), and one that reached into
        # the next source would stay behind
        starts[first[first < len(pruned_N)]] = True
        blocks = np.flatnonzero(pruned_N)
        cut = (np.flatnonzero((np.diff(blocks) != 1) | (np.diff(times[blocks]) != 0) | starts[blocks[1:]]) + 1
               if len(blocks) else [])
        runs = np.split(blocks, cut) if len(blocks) else []
        with self._transaction() as db:
            db.execute("DELETE FROM tombstones")
            db.executemany("INSERT INTO tombstones VALUES (?, ?, ?)",
                           [(int(run[0]), len(run), float(times[run[0]])) for run in runs])

    # --- edits -------------------------------------------------------------------------------------------------------

    def begin_edit(self, edit: Edit) -> None:
        """Announce an edit, before the store commits it."""
        with self._transaction() as db:
            db.execute("INSERT INTO intent VALUES (1, ?)", (json.dumps(asdict(edit)),))

    def abandon_edit(self) -> None:
        """The announced edit was not committed."""
        with self._transaction() as db:
            db.execute("DELETE FROM intent")

    def finish_edit(self, report: dict) -> None:
        """The announced edit is committed. Everything that is known moves with what it is known about."""
        edit = self._intended()
        grown, K = edit.inserted - edit.removed, self.block_size
        first_block = self.source(edit.source).start // K + edit.start // K
        with self._transaction() as db:
            db.execute("UPDATE sources SET tokens = tokens + ?, edits = edits + 1 WHERE id = ?", (grown, edit.source))
            # in one statement: what one had shifted would look to a second like an end between the removed tokens
            moved = ", ".join(
                f"{end} = CASE WHEN {end} >= :start + :removed THEN {end} + :inserted - :removed "
                f"WHEN {end} > :start THEN min({end}, :start + :inserted) ELSE {end} END" for end in ("start", "stop"))
            db.execute(f"UPDATE tags SET {moved} WHERE source = :source", asdict(edit))
            db.execute("DELETE FROM tags WHERE source = ? AND start >= stop", (edit.source,))
            last = edit.stop_block if grown or edit.shift else first_block + (edit.start % K + edit.inserted + K
                                                                              - 1) // K
            # what was counted about the old content says nothing about the new one
            for (lod,) in self._checked("nodes", self._rows("SELECT DISTINCT lod FROM nodes"), int):
                span = K ** min(max(lod - 1, 0), 63)  # blocks of a node
                # above LOD1 all that follows is made of other blocks where these move
                stop = 2**63 - 1 if edit.shift and lod > 1 else -(-last // span)
                db.execute("DELETE FROM nodes WHERE lod = ? AND idx >= ? AND idx < ?", (lod, first_block // span, stop))
            if edit.shift:
                # the id decides between sources of one start: an empty one stands where the next begins
                db.execute(
                    "UPDATE sources SET start = start + ? WHERE id != ? AND (start, id) > (SELECT start, id FROM "
                    "sources WHERE id = ?)",
                    (edit.shift * K, edit.source, edit.source),
                )
                _move(db, "nodes", "idx", edit.shift, "lod <= 1 AND", edit.stop_block)
                _move(db, "tombstones", "first", edit.shift, "", edit.stop_block)
            db.execute(
                "INSERT INTO edits (source, time, start, removed, inserted, report) VALUES (?, ?, ?, ?, ?, ?)",
                (edit.source, time.time(), edit.start, edit.removed, edit.inserted, json.dumps(report)),
            )
            db.execute("DELETE FROM intent")

    def edits(self, source: int | None = None) -> list[dict]:
        """The log of edits, oldest first."""
        names = ("id", "source", "time", "start", "removed", "inserted", "report")
        rows = self._rows(f"SELECT {', '.join(names)} FROM edits WHERE ? IS NULL OR source = ? ORDER BY id", source,
                          source)
        return [dict(zip(names, row)) | {"report": self._json("edits", row[-1])}
                for row in self._checked("edits", rows, int, int, NUMBER, int, int, int, str)]

    # --- agreement with the store ------------------------------------------------------------------------------------

    def reconcile(self, store: Store) -> list[str]:
        """Make the catalog say what the store has committed. Returns one line for each thing that had to be changed."""
        # first: an edit that the store has committed moved the slots which the sources are compared with below
        notes = [self._settle_edit(store)] if self.count("intent") else []
        n, K = store.n_tokens, self.block_size
        # one without tokens right at the end is a conversation that has just begun: it stays
        if gone := self._sources("WHERE start >= ? AND (tokens > 0 OR start > ?)", n, n):
            with self._transaction() as db:
                db.executemany("DELETE FROM sources WHERE id = ?", [(s.id,) for s in gone])
            named = ", ".join(s.uri for s in gone[:3]) + "…" * (len(gone) > 3)
            notes.append(f"{len(gone)} sources were announced and never committed: removed ({named})")
        cut = [s for s in self._sources("WHERE start + tokens > ?", n)]
        growing = [s for s in self._sources("WHERE NOT complete AND start + tokens < ?", n)]
        for source in cut + growing:
            tokens = self._tokens_in(store, source)
            if tokens != source.tokens:
                self.write_sources([Source(**asdict(source) | {"tokens": tokens, "complete": False})])
                # a growing source is behind by what was appended since, which is no fault
                if source in cut:
                    notes.append(
                        f"source {source.id} ({source.uri}) was cut off at {tokens} of {source.tokens} tokens: ingest "
                        "it again to go on"
                    )
        last = self.last_source()
        if (end := min(last.stop(K), n) if last else 0) < n:
            notes.append(f"{n - end} slots at the end have no source")
        pruned = ~store.has_detail(torch.arange(n // K)).numpy()
        told = np.zeros(n // K + 1, dtype=np.int64)
        for first, count, _ in self.tombstones():
            told[min(first, n // K)] += 1
            told[min(first + count, n // K)] -= 1
        if differ := int((pruned != (told.cumsum()[:-1] > 0)).sum()):
            self.set_tombstones(pruned)
            notes.append(f"the pruned state of {differ} blocks was not known: taken from the store")
        return notes

    def _settle_edit(self, store: Store) -> str:
        edit = self._intended()
        # a repair, a pruning or a compaction since makes a version too, and leaves the text as the edit found it
        if store.text_version <= edit.version:
            self.abandon_edit()
            return f"an edit of source {edit.source} was interrupted before its commit: undone"
        self.finish_edit({"interrupted": True})
        return f"an edit of source {edit.source} was interrupted after its commit: finished"

    def _intended(self) -> Edit:
        return from_plain(Edit,
                          self._json("intents", self._checked("intents", self._rows("SELECT edit FROM intent"),
                                                              str)[0][0]), f"catalog {self._where}: the intent")

    def _tokens_in(self, store: Store, source: Source) -> int:
        """Tokens of a source by what the store holds: up to the next source or the end, void slots
        of its last block left out."""
        after = self._rows("SELECT min(start) FROM sources WHERE (start, id) > (?, ?)", source.start, source.id)[0][0]
        stop = store.n_tokens if after is None else min(after, store.n_tokens)
        if stop <= source.start:  # nothing of it was committed
            return 0
        # only its last block can have void slots
        block = (stop - 1) // self.block_size
        first = block * self.block_size
        if store.detail(torch.tensor([block])) == ERASED:
            # which of its slots were void went with its tokens: what was known of that block holds
            return source.tokens if first < source.start + source.tokens <= stop else stop - source.start
        return stop - source.start - int((store.tokens(torch.arange(first, stop)) == VOID).sum())


def _move(db: sqlite3.Connection, table: str, column: str, by: int, condition: str, first: int) -> None:
    """Add to a key that is unique row by row: through negative numbers."""
    db.execute(f"UPDATE {table} SET {column} = -1 - ({column} + ?) WHERE {condition} {column} >= ?", (by, first))
    db.execute(f"UPDATE {table} SET {column} = -1 - {column} WHERE {condition} {column} < 0")


@torch.no_grad()
def measure_variance(history: History, catalog: Catalog) -> int:
    """Measure the gist variance of every counted node that has none, erased blocks left out; returns how many.

    That of a node's children (token embeddings, or gists) around their mean, averaged over dimensions:
    how much one vector stands for.
    """
    store, K, count = history.store, history.block_size, 0
    for lod in range(1, history.max_lod + 1):
        for index_N in catalog.without_variance(lod).split(MAX_BLOCKS):
            index_N = index_N[index_N < store.n_nodes(lod)]
            if lod == 1:  # of tokens that are gone nothing can be measured
                index_N = index_N[store.detail(index_N) != ERASED]
            child_N = (index_N[:, None] * K + torch.arange(K)).flatten()
            if lod == 1:
                ids_N = store.tokens(child_N)
                vectors_NKD, valid_NK1 = history.gpt.embed(ids_N.clamp_min(0).to(history.device)), (ids_N != VOID).view(-1, K, 1)  # noqa: E501
            else:
                vectors_NKD, valid_NK1 = store.gists(lod - 1, child_N), torch.ones(len(index_N), K, 1, dtype=torch.bool)
            vectors_NKD = vectors_NKD.cpu().double().view(len(index_N), K, store.format.d_model) * valid_NK1
            size_N1 = valid_NK1.sum(1).clamp_min(1)
            mean_ND = vectors_NKD.sum(1) / size_N1
            variance_N = (((vectors_NKD - mean_ND[:, None]) * valid_NK1) ** 2).sum(1) / size_N1
            catalog.set_variance(lod, index_N, variance_N.mean(1))
            count += len(index_N)
    return count


def open_history(
    gpt: GPT,
    mc: MegaContext,
    tree: str = "ram",
    store_dir: Path | str | None = None,
    *,
    dtype: torch.dtype | None = None,
    durability: str = "batch",
    mode: str = "rw",
) -> tuple[History, Catalog]:
    """The history that `--mc_tree` and `--mc_store` name, with its catalog, in agreement with each other.

        history, catalog = open_history(gpt, mc, args.mc_tree, args.mc_store)
        print(*catalog.notes, sep="\\n")                       # what had to be mended, usually nothing
        session = pool.open(history.store)
        source = catalog.add_source("chat", history.n_tokens)  # what is appended now has a source;
                                                               `history.end_source` first, if need be
        catalog.count_access(lod_W, index_W)                   # at each refocus, if its statistics are wanted
        history.store.close(), catalog.close()                 # in this order

    tree: "ram", gone with the process, or "disk" in the folder store_dir, made if it is not there. dtype: of gists and
    keys of a new one; durability: as `DiskStore` says; mode "r": for reading, beside a writer. UserError for a folder
    that holds something else, another model's history, or one that another process writes.
    """
    if tree == "ram":
        if store_dir is not None:
            raise UserError(f"--mc_store={store_dir} needs --mc_tree=disk: a history in RAM has no folder")
        store, folder = RamStore(store_format(gpt, mc, dtype)), None
    elif tree == "disk":
        from mc.store.disk.store import DiskStore

        if store_dir is None:
            raise UserError("--mc_tree=disk needs --mc_store=DIR, the folder of the history")
        folder = Path(store_dir)
        # a reader makes nothing: where no store is, opening says so
        if (folder / "manifest").exists() or mode == "r":
            store = DiskStore.open(folder, mode, durability=durability)
            if dtype not in (None, store.format.dtype):
                store.close()
                raise UserError(f"{folder} keeps its vectors as {store.format.dtype}, not {dtype}: leave the dtype to "
                                "it, or regist")
        else:
            store = DiskStore.create(folder, store_format(gpt, mc, dtype), durability=durability)
    else:
        raise UserError(f"--mc_tree={tree}: use ram or disk")
    try:
        history = History(gpt, mc, store)
        catalog = Catalog(folder, history.block_size, read_only=mode == "r")
        catalog.notes = [] if mode == "r" else [*getattr(store, "repairs", []), *catalog.reconcile(store)]
    except BaseException:
        store.close()
        raise
    return history, catalog
