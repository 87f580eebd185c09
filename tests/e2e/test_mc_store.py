"""`mc_store`, as a user runs it: a history on disk from its first ingest to its last compaction."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from e2e_commands import ROOT, Result, real, run, start
from safetensors import safe_open

from mc.store.catalog import Catalog
from mc.store.disk.store import DiskStore
from nanochat.documents import read_text
from nanochat.tokenizer import Tokenizer


K = 8  # of the checkpoint in `reference`


@pytest.fixture(scope="module")
def base(reference, tmp_path_factory) -> Path:
    """A base directory with a tokenizer and the MegaContext checkpoint `t`. Not to be changed."""
    return Path(shutil.copytree(reference["mc"], tmp_path_factory.mktemp("store") / "base"))


@pytest.fixture(scope="module")
def made(base, prepared, tmp_path_factory) -> Path:
    """A store of the small corpus. Not to be changed."""
    store = tmp_path_factory.mktemp("made") / "store"
    done = last(run(base, "mc_store", "ingest", f"--store={store}", str(prepared / "texts")))
    assert done["sources"] == 8 and done["tokens"] > 50_000
    return store


@pytest.fixture
def store(made, tmp_path) -> Path:
    """A store of one's own."""
    return Path(shutil.copytree(made, tmp_path / "store"))


def last(result: Result) -> dict:
    return json.loads(result.ok().out.strip().splitlines()[-1])


def command(base: Path, name: str, store: Path, *flags: str) -> Result:
    return run(base, "mc_store", name, f"--store={store}", *flags)


def reader(store: Path):
    opened = DiskStore.open(store, "r")
    return opened, Catalog(store, opened.format.block_size, read_only=True)


def gists_by_text(base: Path, store: Path) -> dict[str, torch.Tensor]:
    """LOD1 gists of each source, by its text."""
    disk, catalog = reader(store)
    tokenizer = Tokenizer.load(base / "tokenizer")
    with disk, catalog:
        found = {}
        for s in catalog.sources():
            ids = disk.tokens(torch.arange(s.start, s.start + s.tokens))
            found[tokenizer.decode(ids[1:].tolist())] = disk.gists(1, torch.tensor(list(s.blocks(K))))
        return found


def assert_like_new(base: Path, store: Path, tmp_path: Path) -> None:
    """All gists are those of a store that the present texts are ingested into."""
    texts = tmp_path / "texts of today"
    texts.mkdir()
    for i, text in enumerate(gists_by_text(base, store)):
        (texts / f"{i}.py").write_bytes(text.encode())
    command(base, "ingest", tmp_path / "new", str(texts)).ok()
    mine, new = gists_by_text(base, store), gists_by_text(base, tmp_path / "new")
    assert mine.keys() == new.keys()
    for text, gists in new.items():
        torch.testing.assert_close(mine[text], gists, rtol=1e-5, atol=1e-5)


def test_info_and_verify_agree_with_what_was_ingested(base, made, prepared):
    info, verified = last(command(base, "info", made)), last(command(base, "verify", made))
    assert info["ok"] and verified["ok"] and info["dropped"] == verified["dropped"] == {} and verified["damage"] == []
    tokenizer = Tokenizer.load(base / "tokenizer")
    texts = [p.read_text() for p in (prepared / "texts").glob("*.py")]
    lengths = [1 + len(tokenizer.encode(text)) for text in texts]
    assert info["tokens"] == sum(lengths) and info["slots"] == sum(-(-n // K) * K for n in lengths)
    assert info["nodes"] == {str(lod): info["slots"] // K**lod for lod in range(1, 5)}
    assert verified["tokens"] == info["tokens"] and info["bytes"] > info["slots"] * 4
    assert {text.encode() for text in gists_by_text(base, made)} == {text.encode() for text in texts}


def test_ingest_is_idempotent_and_goes_on(base, made, store, prepared, tmp_path):
    again = last(command(base, "ingest", store, str(prepared / "texts")))
    assert (again["sources"], again["tokens"], again["known"]) == (0, 0, 8)
    (tmp_path / "note.txt").write_text("a note\n" * 100)
    added = last(command(base, "ingest", store, str(tmp_path / "note.txt"), "--kind=note"))
    assert added["sources"] == 1
    assert [s["uri"]
            for s in last(command(base, "query", store, "--kind=note"))["sources"]] == [str(tmp_path / "note.txt")]
    assert gists_by_text(base, store).keys() > gists_by_text(base, made).keys()


def test_ingest_from_a_pipe(base, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "scripts.mc_store", "ingest", f"--store={tmp_path / 's'}", "--uri=my notes"],
        cwd=ROOT, input="piped text\n" * 50, text=True, capture_output=True,
        env={**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["sources"] == 1
    query = command(base, "query", tmp_path / "s", "--show_text=1").ok()
    assert query.out.count("piped text\n") == 50 and last(query)["sources"][0]["uri"] == "my notes"


def test_killed_ingest_goes_on(base, made, prepared, tmp_path):
    """SIGKILL in the middle; the next run finishes, and the result is that of an undisturbed one."""
    store = tmp_path / "store"
    big = tmp_path / "big"
    shutil.copytree(prepared / "texts", big)
    (big / "long.txt").write_text("".join(f"line {i} of a long text, {i * 7919 % 1000}\n" for i in range(20_000)))
    running = start(base, "mc_store", "ingest", f"--store={store}", str(big))
    deadline = time.monotonic() + 60
    while not (list(store.glob("L1/*"))
               and sum(p.stat().st_size for p in store.glob("L0/*")) > 1_100_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.kill() == -signal.SIGKILL
    done = command(base, "ingest", store, str(big))
    report = last(done)
    assert report["known"] + report["sources"] == 9 and report["resumed"] == 1 and "was cut off at" in done.out
    whole = last(command(base, "ingest", tmp_path / "whole", str(big)))
    assert report["slots"] == whole["slots"] and report["tokens"] < whole["tokens"]
    mine, undisturbed = gists_by_text(base, store), gists_by_text(base, tmp_path / "whole")
    assert mine.keys() == undisturbed.keys()
    for text, gists in undisturbed.items():
        torch.testing.assert_close(mine[text], gists, rtol=1e-5, atol=1e-5)


def test_provenance(base, made):
    disk, catalog = reader(made)
    with disk, catalog:
        sources = catalog.sources()
    third = sources[2]
    found = last(command(base, "query", made, f"--span={third.start - 3 * K}:{third.start + 1}"))["sources"]
    assert [s["id"] for s in found] == [sources[1].id, third.id]
    assert [s["id"] for s in last(command(base, "query", made, "--uri=*/heapq.py"))["sources"]] == [
        s.id for s in sources if s.uri.endswith("heapq.py")
    ]
    assert last(command(base, "query", made, "--since=2999-01-01"))["sources"] == []
    assert len(last(command(base, "query", made, "--limit=3", "--kind=code"))["sources"]) == 3


def test_edits(base, store, tmp_path):
    """A text replaced by a longer one, tokens deleted, text inserted: like a store of the edited
    texts; the old version stays."""
    before = set(gists_by_text(base, store))
    disk, catalog = reader(store)
    with disk, catalog:
        source = next(s for s in catalog.sources() if s.uri.endswith("heapq.py"))
    old = "def heappush(heap, item):"
    done = last(
        command(
            base,
            "edit",
            store,
            f"--source={source.id}",
            f"--find={old}",
            "--text=def push(the_heap, é, item):  # renamed, and much longer than before",
        )
    )
    assert done["recomputed"]["1"] > 0 and done["moved"] > 0
    texts = gists_by_text(base, store)
    changed = next(t for t in texts if "# renamed, and much longer" in t)
    assert changed.replace("def push(the_heap, é, item):  # renamed, and much longer than before", old) in before
    command(base, "edit", store, f"--source={source.id}", "--start=20", "--remove=31").ok()
    command(base, "edit", store, f"--source={source.id}", "--start=9", "--text=something new").ok()
    assert_like_new(base, store, tmp_path)
    assert last(command(base, "verify", store))["ok"] and last(command(base, "info", store))["versions"][0] < 3
    with DiskStore.open(store, "r", version=0) as first:
        ids = first.tokens(torch.arange(source.start, source.start + source.tokens))
        assert Tokenizer.load(base / "tokenizer").decode(ids[1:].tolist()) in before


def test_prune_restore_compact(base, store):
    blocks = last(command(base, "info", store))["slots"] // K
    assert last(command(base, "prune", store, "--share=0.5", "--dry_run=1"))["blocks"] == blocks // 2
    done = command(base, "prune", store, "--share=0.5", "--keep_last=64")
    assert last(done)["blocks"] == blocks // 2 and "no access was ever counted" in done.out
    assert last(command(base, "restore", store, "--source=1"))["blocks"] > 0
    assert last(command(base, "restore", store))["detailed"] == blocks
    command(base, "prune", store, "--share=0.5").ok()
    before = last(command(base, "info", store))
    assert before["pruned"] == blocks // 2
    assert last(command(base, "compact", store))["given_back"] > 0
    after = last(command(base, "info", store))
    assert after["erased"] == blocks // 2 and after["pruned"] == 0 and after["bytes"] < before["bytes"] - 0.4 * 4 * before["slots"]  # noqa: E501
    assert last(command(base, "restore", store))["erased"] == blocks // 2
    assert "pruned and compacted away" in command(base, "query", store, "--source=1", "--show_text=1").error
    assert last(command(base, "verify", store))["ok"]


def test_regist(base, store, tmp_path):
    """All gists by the networks of another step, resumed after a kill; the store then opens with those."""
    before = gists_by_text(base, store)
    assert (
        "has the gists of these networks already" in command(base, "regist", store,
                                                             f"--checkpoint_dir={base / 'checkpoints' / 't'}").error
    )
    other = tmp_path / "base"
    shutil.copytree(base, other)
    checkpoint = other / "checkpoints" / "t"
    make_other_networks(checkpoint)
    old = last(command(other, "info", store))["model"]
    done = last(command(other, "regist", store, f"--checkpoint_dir={checkpoint}"))
    assert done["model"] != old and not list(store.glob("regist.*"))
    after = gists_by_text(base, store)
    assert after.keys() == before.keys() and all((after[t] - before[t]).abs().max() > 0.01 for t in after)
    assert_like_new(other, store, tmp_path)
    (tmp_path / "note.txt").write_text("one more\n" * 30)
    assert last(command(other, "ingest", store,
                        str(tmp_path / "note.txt")))["sources"] == 1, "found its new networks by itself"
    assert last(command(other, "verify", store))["ok"]


def make_other_networks(checkpoint: Path) -> None:
    """The checkpoint as it is, but for a GistNet whose last matrix is another."""
    from nanochat.checkpoint import load_checkpoint, save_checkpoint

    loaded = load_checkpoint(checkpoint)
    state = dict(loaded.mc)
    name = next(n for n in state if n.startswith("gistnet.") and n.endswith("weight") and state[n].ndim == 2)
    state[name] = state[name] + 0.5 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(1))
    shutil.rmtree(checkpoint)
    save_checkpoint(checkpoint, loaded.step, model=loaded.model, optimizer_shard=loaded.optimizer, meta=loaded.meta,
                    mc=state)


@pytest.mark.parametrize("format", ["arrow", "safetensors"])
def test_export(base, made, tmp_path, format):
    out = tmp_path / "out"
    files = [Path(f) for f in last(command(base, "export", made, f"--out={out}", f"--format={format}"))["files"]]
    disk, catalog = reader(made)
    with disk, catalog:
        n, blocks = disk.n_tokens, torch.arange(disk.n_nodes(1))
        ids = disk.tokens(torch.arange(n))
        gists, keys, sources = disk.gists(1, blocks), disk.keys(blocks), catalog.sources()
    if format == "safetensors":
        with safe_open(files[0], "pt") as f:
            assert set(f.keys()) == {"tokens", "L1", "L2", "L3", "L4", "K1"} and f.metadata()["block_size"] == str(K)
            assert (
                torch.equal(f.get_tensor("tokens").long(), ids)
                and torch.equal(f.get_tensor("L1"), gists)
                and torch.equal(f.get_tensor("K1"), keys)
            )
    else:
        tokens = pa.ipc.open_file(out / "tokens.arrow").read_all()
        assert [-1 if t is None else t for t in tokens["token"].to_pylist()] == ids.tolist()
        belongs = {s.id: (s.start, s.start + s.tokens) for s in sources}
        assert all((token is None) == (source is None)
                   for token, source in zip(tokens["token"].to_pylist(), tokens["source"].to_pylist()))
        assert all(
            belongs[source][0] <= slot < belongs[source][1]
            for slot, source in zip(tokens["slot"].to_pylist(), tokens["source"].to_pylist())
            if source
        )
        nodes = pa.ipc.open_file(out / "nodes_1.arrow").read_all()
        assert nodes["start"].to_pylist() == (blocks * K).tolist()
        assert torch.equal(torch.tensor(nodes["gist"].to_pylist()), gists) and torch.equal(
            torch.tensor(nodes["keys"].to_pylist()), keys.flatten(1)
        )
        assert pa.ipc.open_file(out / "sources.arrow").read_all()["uri"].to_pylist() == [s.uri for s in sources]


def test_without_a_checkpoint(prepared, tmp_path):
    """Mean pooling and single bytes, said clearly; the store remembers, also when there is a checkpoint later."""
    empty = tmp_path / "base"
    (tmp_path / "a.txt").write_text("text " * 200)
    done = run(empty, "mc_store", "ingest", f"--store={tmp_path / 's'}", str(tmp_path / "a.txt"))
    assert "no checkpoint: gists are means of random embeddings" in done.out and last(done)["tokens"] == 1001
    assert last(run(empty, "mc_store", "ingest", f"--store={tmp_path / 's'}", str(tmp_path / "a.txt")))["known"] == 1
    assert last(run(empty, "mc_store", "verify", f"--store={tmp_path / 's'}"))["nodes"] == {"1": 32, "2": 1}


def test_a_damaged_gist_is_found_and_made_again(base, store):
    path = next(p for p in sorted((store / "L1").iterdir()))
    data = bytearray(path.read_bytes())
    data[64 + 40] ^= 255
    path.write_bytes(data)
    found = command(base, "verify", store)
    values = json.loads(found.out.strip().splitlines()[-1])
    assert found.code == 1 and not values["ok"] and values["damage"][0]["path"] == str(path)
    assert "repaired 1 of 1" in command(base, "verify", store, "--repair=1").ok().out
    assert last(command(base, "verify", store))["ok"]


def test_readers_beside_a_writer(base, store):
    with DiskStore.open(store):
        assert last(command(base, "info", store))["ok"] and last(command(base, "query", store, "--limit=1"))["sources"]
        assert "is being written by process" in command(base, "verify", store).error
        assert "is being written by process" in command(base, "prune", store, "--share=0.1").error


def test_help_in_a_fresh_interpreter(base, made):
    done = real(base, "-m", "scripts.mc_store", "info", "--store", str(made))
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["ok"]


def test_benchmark(base, prepared, tmp_path):
    done = run(
        base,
        "mc_bench",
        "store",
        f"--checkpoint_dir={base / 'checkpoints' / 't'}",
        f"--texts={prepared / 'texts'}",
        "--tokens=200000",
        "--contexts=4",
        f"--dir={tmp_path}",
    )
    values = last(done)
    assert values["ingest"]["tokens"] >= 200_000 and values["ingest"]["pairs"] >= 2 and values["ingest"]["store_over_alone_wall"][0] > 0  # noqa: E501
    assert 1 <= values["sizes"]["records_over_theory"] < 1.1 and values["gathering"]["ratio"][0] > 0
    assert values["editing"]["insert"]["moved"] > 0 == values["editing"]["replace"]["moved"]
    assert abs(values["stored_dtypes"]["int8 LOD1"]["added"]) < 0.1 and list(tmp_path.iterdir()) == []
    too_few = ["--checkpoint_dir", str(base / "checkpoints" / "t"), "--texts", str(prepared / "texts"), "--contexts=0"]
    assert "--tokens=9: at least" in run(base, "mc_bench", "store", *too_few, "--tokens=9").error
    assert "holds 2" in run(base, "mc_bench", "store", *too_few, "--tokens=999999").error


WRONG = {
    "no command": ([], "required: command"),
    "unknown command": (["defragment"], "invalid choice: 'defragment'"),
    "no store": (["info"], "required: --store"),
    "flag of another command": (["info", "--store=x", "--share=1"], "unrecognized arguments: --share=1"),
    "not a store": (["info", "--store=nowhere"], "nowhere is not a MegaContext store"),
    "missing file": (["ingest", "--store={store}", "nowhere.txt"], "nowhere.txt: no such file or folder"),
    "binary file": (["ingest", "--store={store}", "{store}/manifest"], "manifest is not UTF-8 text"),
    "other dtype": (["ingest", "--store={store}", "--dtype=int8", "README.md"],
                    "keeps its vectors as torch.float32, not torch.int8"),
    "no such checkpoint": (["ingest", "--store={store}", "--checkpoint_dir=nowhere", "README.md"], "nowhere"),
    "no such source": (["edit", "--store={store}", "--source=99", "--start=0", "--remove=1"], "no source 99"),
    "range outside": (["edit", "--store={store}", "--source=1", "--start=0", "--remove=99999999"],
                      "tokens [0, 99999999) of source 1"),
    "nowhere to edit": (["edit", "--store={store}", "--source=1", "--text=x"], "say where: --find=TEXT, or --start=N"),
    "both places": (["edit", "--store={store}", "--source=1", "--find=x", "--start=1"], "say where"),
    "two texts": (["edit", "--store={store}", "--source=1", "--start=1", "--text=x", "--text_file=y"],
                  "give one of them"),
    "not found": (["edit", "--store={store}", "--source=1", "--find=surely not there", "--text=x"],
                  "occurs 0 times in source 1"),
    "found twice": (["edit", "--store={store}", "--source=1", "--find=import", "--text=x"], "(line "),
    "found often": (["edit", "--store={store}", "--source=1", "--find=e", "--text=x"], "give a text that occurs once"),
    "regist with nothing": (["regist", "--store={store}"], "give --checkpoint_dir"),
    "prune how much": (["prune", "--store={store}"], "give --share"),
    "share": (["prune", "--store={store}", "--share=2"], "--share=2.0: between 0 and 1"),
    "date": (["query", "--store={store}", "--since=yesterday"], "--since=yesterday: a date like"),
    "span": (["query", "--store={store}", "--span=9:1"], "--span=9:1: START:STOP"),
    "export over something": (["export", "--store={store}", "--out=mc"], "--out=mc is there already"),
}


def test_line_ends_of_a_new_text_are_kept(tmp_path):
    (tmp_path / "new.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_text(tmp_path / "new.txt") == "a\r\nb\rc\n"


@pytest.mark.parametrize("mistake", WRONG.values(), ids=WRONG)
def test_mistakes_are_one_line_and_change_nothing(mistake, base, made):
    arguments, message = mistake
    before = contents(made)
    assert message in run(base, "mc_store", *(a.format(store=made) for a in arguments)).error
    assert contents(made) == before


def contents(store: Path) -> dict[str, bytes]:
    """Bytes of every file, but for the lock's process number; the catalog as SQL."""
    with sqlite3.connect(store / "catalog.sqlite") as db:
        catalog = "\n".join(db.iterdump()).encode()
    return {p.name: p.read_bytes() for p in store.rglob("*.ctx")} | {"manifest": (store / "manifest").read_bytes(),
                                                                     "catalog": catalog}
