"""Histories on disk: every file of a store damaged, replaced, taken away or signed anew, and the catalog beside it."""

import sqlite3
import zlib
from pathlib import Path

import pytest
import torch
from fuzzing import Image, changes, command, fuzzed, image, json_changes, put_image, tried
from hypothesis import strategies as st

from mc.store.catalog import FILE, Catalog
from mc.store.disk.commits import SLOT_BYTES, note_bytes, read_note
from mc.store.disk.files import HEADER_BYTES
from mc.store.disk.store import DiskStore
from mc.store.ram import DROPPED, VOID, StoreFormat
from scripts import mc_store

K, FORMAT = 4, StoreFormat(4, 6, 1, 3)


def nodes(lod: int, index_N: torch.Tensor):
    """Gists and keys that say where they stand."""
    gists = (100 * lod + index_N[:, None] + torch.arange(6) / 8).float()
    return gists, (index_N[:, None, None] + torch.arange(3) / 4).float() if lod == 1 else None


def append(store: DiskStore, ids_N: torch.Tensor) -> None:
    store.append_tokens(ids_N)
    for lod in (1, 2):
        at = torch.arange(store.n_nodes(lod), store.n_tokens // K**lod)
        if len(at):
            store.append_nodes(lod, *nodes(lod, at))
    store.commit()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Image:
    """77 tokens in several partitions, an edit, pruned blocks, and a catalog that knows all of it."""
    folder = tmp_path_factory.mktemp("store") / "s"
    with DiskStore.create(folder, FORMAT, partition_bytes=128) as store, Catalog(folder, K) as catalog:
        ids = torch.arange(80)
        ids[77:] = VOID
        for part in ids.split(31):
            append(store, part)
        store.rewrite_tokens(9, torch.tensor([1, 2]))
        store.rewrite_nodes(1, 2, *nodes(1, torch.tensor([2])))
        store.commit()
        store.set_detail(torch.tensor([3, 4]), DROPPED)
        store.commit()
        a = catalog.add_source("a.txt", 0, hash="aa", kind="text", tokens=40, complete=True)
        catalog.add_source("b.txt", 40, hash="bb", retrieval_score=0.5, tokens=37, complete=True)
        catalog.add_tags(a, [(0, 5, "heading")])
        catalog.add_version(FORMAT.model, "{}")
        catalog.count_access(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]))
        catalog.reconcile(store)
    return image(folder)


def everything(store: DiskStore) -> dict:
    """All that a store holds; reading it touches every record."""
    return {"tokens": store.tokens(torch.arange(store.n_tokens)).tolist(),
            **{f"L{lod}": store.gists(lod, torch.arange(store.n_nodes(lod))).tolist() for lod in (1, 2)},
            "K1": store.keys(torch.arange(store.n_nodes(1))).tolist(),
            "detail": store.detail(torch.arange(store.n_tokens // K)).tolist()}


@pytest.fixture(scope="module")
def held(files, tmp_path_factory) -> dict:
    with DiskStore.open(put_image(tmp_path_factory.mktemp("held") / "s", files), "r") as store:
        return everything(store)


def read(folder: Path) -> tuple[dict, list]:
    with DiskStore.open(folder, "r") as store:
        return everything(store), store.verify()


def go_on(folder: Path) -> tuple[dict, list]:
    """Open for writing, append, close, and read all of it again."""
    with DiskStore.open(folder) as store:
        append(store, torch.arange(7))
    return read(folder)


def both_ways(folder: Path, files: dict, held: dict | None, kind: str) -> None:
    """A reader changes nothing; what verify passes is what was written; a writer ends with a store that can be read."""
    put_image(folder, files)
    seen = tried(f"{kind}, read", lambda: read(folder))
    assert image(folder) == files
    if seen and held and not seen[1]:
        assert seen[0] == held
    seen = tried(f"{kind}, appended to", lambda: go_on(folder))
    if seen and held and not seen[1]:
        assert seen[0]["tokens"] == [*held["tokens"], *range(7)]


SAMPLED = st.floats(0, 1, exclude_max=True)


def one_of(files: dict, place: float) -> str:
    names = [name for name, data in files.items() if data is not None and not name.startswith(FILE)]
    return names[int(place * len(names))]


@fuzzed(SAMPLED, changes(steps=("flip", "byte", "cut", "zero", "drop", "twice", "insert", "whole")))
def test_bytes_of_a_file(files, held, work, place, change):
    name = one_of(files, place)
    both_ways(work / "s", {**files, name: change(files[name])}, held, "store, bytes")


@fuzzed(SAMPLED, SAMPLED,
        st.sampled_from(["gone", "folder", "swapped", "copied", "foreign", "empty", "its folder gone"]), cost=2)
def test_files_that_are_gone_or_foreign(files, held, work, place, other, what):
    name, second = one_of(files, place), one_of(files, other)
    made = dict(files)
    match what:
        case "gone":
            del made[name]
        case "folder":
            made[name] = None
        case "swapped":
            made[name], made[second] = made[second], made[name]
        case "copied":
            made[name] = made[second]
        case "foreign":
            parent = name.rpartition("/")[0]
            made |= {f"{parent}/notes.txt".lstrip("/"): b"mine", f"{parent}/x.ctx".lstrip("/"): b"",
                     "L0/999999.v0000.ctx": b"short", "L77": None, "L77/000000.v0000.ctx": b""}
        case "empty":
            made[name] = b""
        case "its folder gone":
            made = {n: data for n, data in made.items() if n.partition("/")[0] != name.partition("/")[0]}
    both_ways(work / "s", made, held, "store, files")


@fuzzed(st.sampled_from(["manifest", "versions"]), SAMPLED, json_changes(3))
def test_notes_that_another_program_signed(files, work, what, place, change):
    """Their checksums fit: only what they say can tell."""
    made = dict(files)
    if what == "manifest":
        slot = change(read_note(files["manifest"], Path("manifest")))
        made["manifest"] = 2 * note_bytes(slot).ljust(SLOT_BYTES, b"\0")[:SLOT_BYTES]
    else:
        names = [name for name in files if name.startswith("versions/")]
        name = names[int(place * len(names))]
        made[name] = 2 * note_bytes(change(read_note(files[name], Path(name))))
    both_ways(work / "s", made, None, "store, signed notes")


@fuzzed(SAMPLED,
        st.sampled_from([(8, 2), (10, 1), (11, 1), (12, 4), (16, 4), (20, 2), (22, 2), (24, 4), (28, 4), (32, 4),
                         (36, 16), (56, 4), (60, 4)]),
        st.binary(min_size=16, max_size=16))
def test_fields_of_headers(files, held, work, place, field, value):
    """Every field of a partition's header becomes another, its checksum fits."""
    names = [name for name in files if name.endswith(".ctx") and not name.startswith("versions")]
    name, (at, size) = names[int(place * len(names))], field
    header = bytearray(files[name][:HEADER_BYTES])
    header[at:at + size] = value[:size]
    header[52:56] = zlib.crc32(header[:52]).to_bytes(4, "little")
    both_ways(work / "s", {**files, name: bytes(header) + files[name][HEADER_BYTES:]}, held, "store, headers")


# ---------------------------------------------------------------------------------------------------------------------
# The catalog


def read_catalog(folder: Path) -> None:
    with Catalog(folder, K, read_only=True) as catalog, DiskStore.open(folder, "r") as store:
        for source in catalog.sources():
            catalog.tags(source.id), catalog.source(source.id)
        catalog.totals(store), catalog.sources_in(0, 99, store), catalog.statistics(limit=9), catalog.edits(), catalog.versions(), catalog.tombstones()  # noqa: E501
        catalog.detail_utility(20)


def mend_catalog(folder: Path) -> None:
    with Catalog(folder, K) as catalog, DiskStore.open(folder) as store:
        catalog.check(), catalog.reconcile(store)
        catalog.add_source("c", 80, tokens=0)
        assert store.verify() == []


@fuzzed(changes(steps=("flip", "byte", "cut", "zero", "drop", "twice", "insert", "whole")), cost=2)
def test_bytes_of_the_catalog(files, work, change):
    folder = put_image(work / "s", {**files, FILE: change(files[FILE])})
    for kind, use in (("catalog, bytes, read", read_catalog), ("catalog, bytes, mended", mend_catalog)):
        tried(kind, lambda: use(folder))


COLUMNS = [("sources", c) for c in ("id", "uri", "hash", "kind", "time", "retrieval_score", "start", "tokens",
                                    "complete", "edits")]
COLUMNS += [("tags", c) for c in ("source", "start", "stop", "tag")] + [("nodes", c)
                                                                        for c in ("lod", "idx", "accesses",
                                                                                  "sensitivity", "measured",
                                                                                  "variance")]
COLUMNS += [("tombstones", c) for c in ("first", "count", "time")] + [("versions", c)
                                                                      for c in ("model", "time",
                                                                                "origin")] + [("settings", "value")]
CELLS = st.sampled_from([None, -1, 0, 1, 3, 4, 79, 10**6, 2**62, 2**63 - 1, -(2**63), 0.5, float("inf"), -float("inf"),
                         1e300, "", "x", "[]", "{", b"", b"\xff\0"])


@fuzzed(st.lists(st.tuples(st.sampled_from(COLUMNS), CELLS), min_size=1, max_size=2), cost=2)
def test_cells_of_the_catalog(files, work, cells):
    folder = put_image(work / "s", files)
    db = sqlite3.connect(folder / FILE, isolation_level=None)
    for (table, column), value in cells:
        try:
            db.execute(f"UPDATE OR IGNORE {table} SET {column} = ? WHERE rowid = (SELECT max(rowid) FROM {table})"
                       if table not in ("nodes", "settings")
                       else f"UPDATE OR IGNORE {table} SET {column} = ?", (value,))  # fmt: skip
        except sqlite3.IntegrityError:
            pass
    db.close()
    for kind, use in (("catalog, cells, read", read_catalog), ("catalog, cells, mended", mend_catalog)):
        tried(kind, lambda: use(folder))


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    """A store that `mc_store ingest` made with untrained networks, and its base directory."""
    base = tmp_path_factory.mktemp("base")
    (base / "a.py").write_text("def a():\n    return 'ż'\n" * 20)
    (base / "b.md").write_text("# Title\n\nSome words of text.\n" * 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        assert command("mc_store", mc_store.main, "ingest", f"--store={base / 's'}", str(base / "a.py"),
                       str(base / "b.md"))
        yield image(base / "s")


COMMANDS = (["info"], ["verify"], ["verify", "--repair=1"], ["query"], ["query", "--top_nodes=3"],
            ["query", "--span=0:9"], ["edit", "--source=1", "--start=3", "--remove=2", "--text=x"],
            ["prune", "--share=0.5"], ["restore"], ["compact"])  # fmt: skip


@fuzzed(SAMPLED, st.sampled_from(COMMANDS), changes(), st.booleans(), cost=3)
def test_commands_on_a_damaged_store(ingested, work, place, flags, change, gone):
    names = [name for name, data in ingested.items() if data is not None]
    name = names[int(place * len(names))]
    folder = put_image(work / "ingested", {n: d for n, d in ingested.items() if n != name} if gone
                       else {**ingested, name: change(ingested[name])})
    command("mc_store on a damaged store", mc_store.main, flags[0], f"--store={folder}", *flags[1:])


WORDS = st.one_of(st.text(max_size=12),
                  st.sampled_from(["*", "?", "[", "[]", "[a-", "a.py", "%", "_", "'", '"; DROP TABLE sources', "\0",
                                   "\ud800", "heading", "x" * 5000, "-1", "0", "1", "2", "9" * 40]))
TIMES = st.one_of(st.text(max_size=10), st.datetimes().map(str),
                  st.sampled_from(["2026-01-31", "0001-01-01", "9999-12-31T23:59:59.999999+14:00",
                                   "0001-01-01T00:00+14:00", "2026-W01", "now", "1e9", "2026-02-30"]))
SPANS = st.one_of(st.text(max_size=8),
                  st.tuples(st.integers(-2, 2**70), st.integers(-2, 2**70)).map(lambda t: f"{t[0]}:{t[1]}"),
                  st.sampled_from(["0:1", "²:³", "٣:٤", "1:", ":", "0:99"]))
NUMBERS = st.one_of(st.integers(-3, 600).map(str),
                    st.sampled_from(["nan", "inf", "-inf", "1e309", "1e-320", "9" * 30, str(2**63), str(-(2**63)), "",
                                     "0x1", "1_000", "٣"]))
QUERIES = {"--uri": WORDS, "--kind": WORDS, "--tag": WORDS, "--since": TIMES, "--until": TIMES, "--span": SPANS,
           "--min_score": NUMBERS, "--limit": NUMBERS, "--source": NUMBERS,
           "--top_nodes": NUMBERS, "--show_text": st.sampled_from("01")}  # fmt: skip
EDITS = {"--source": NUMBERS, "--find": WORDS, "--start": NUMBERS, "--remove": NUMBERS, "--text": WORDS}
PRUNES = {"--share": NUMBERS, "--max_utility": NUMBERS, "--keep_last": NUMBERS, "--source": NUMBERS,
          "--dry_run": st.sampled_from("01")}


def flags_of(values: dict) -> st.SearchStrategy:
    return st.lists(st.sampled_from(sorted(values)),
                    max_size=3).flatmap(lambda names: st.tuples(*(values[n].map(lambda v, n=n: f"{n}={v}")
                                                                  for n in names)))


@fuzzed(flags_of(QUERIES))
def test_queries(ingested, work, flags):
    folder = work / "queried"
    if not folder.exists():
        put_image(folder, ingested)
    command("mc_store query", mc_store.main, "query", f"--store={folder}", *flags)
    assert image(folder) == ingested


@fuzzed(st.sampled_from(["edit", "edit", "edit", "prune", "restore"]), st.data(), cost=2)
def test_edits_and_prunings(ingested, work, name, data):
    flags = data.draw(flags_of({"edit": EDITS, "prune": PRUNES, "restore": {"--source": NUMBERS}}[name]))
    folder = put_image(work / "edited", ingested)
    if command(f"mc_store {name}", mc_store.main, name, f"--store={folder}",
               *(["--source=1"] if name == "edit" else []), *flags) is None:
        with DiskStore.open(folder, "r") as store:
            assert store.version == 0
    assert command(f"mc_store {name}", mc_store.main, "verify", f"--store={folder}").endswith('"damage": []}\n')
