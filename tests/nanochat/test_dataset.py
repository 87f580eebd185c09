"""B5: an embedded corpus, corpora from directories, a downloader that trusts nothing, and a token cache."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import build_stdlib, download, download_shards, open_corpus
from nanochat.token_cache import open_token_cache
from nanochat.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([Path(__file__).read_text()], 300)


def write_parquet(path: Path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), path, row_group_size=2)


def texts(corpus, split):
    return [document.text for document in corpus.documents(split)]


# --- embedded corpus


def test_embedded_corpus(base):
    corpus = open_corpus("stdlib")
    train, val = (list(corpus.documents(split)) for split in dataset.SPLITS)
    sources = [d.source for d in train + val]
    assert len(set(sources)) == len(sources) and {"argparse.py", "asyncio", "json"} <= set(sources)
    assert not dataset.SKIPPED & set(sources) and {d.kind for d in train + val} == {"code"}
    assert "# file: json/decoder.py\n" in next(d.text for d in train + val if d.source == "json")
    assert sum(len(d.text) > 20_000 for d in val) >= 6
    held_out = sum(len(d.text) for d in val) / sum(len(d.text) for d in train + val)
    assert 0.02 < held_out < 0.25
    assert not [path.name for path in (base / "corpus" / "stdlib").iterdir() if path.suffix == ".tmp"]

    shard = base / "corpus" / "stdlib" / "val-00000.parquet"
    made, fingerprint = shard.stat().st_mtime_ns, corpus.fingerprint
    assert open_corpus("stdlib").fingerprint == fingerprint and shard.stat().st_mtime_ns == made, "reused"
    shard.unlink()
    assert open_corpus("stdlib").fingerprint == fingerprint and shard.exists(), "made again when a shard is missing"
    (shard.parent / "manifest.json").write_text('{"python": "CPython 2.7"}')
    made = shard.stat().st_mtime_ns
    assert open_corpus(
        "stdlib").fingerprint == fingerprint and shard.stat().st_mtime_ns > made, "made again for another Python"


def test_python_without_sources_is_refused(tmp_path):
    (tmp_path / "lib").mkdir()
    with pytest.raises(UserError, match="too few sources .*--data=DIR"):
        build_stdlib(tmp_path / "lib")


def test_base_dir_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write .*NANOCHAT_BASE_DIR"):
        open_corpus("stdlib")


# --- directories


def test_last_shard_is_held_out(tmp_path):
    for i in range(3):
        write_parquet(tmp_path / "d" / f"shard_{i}.parquet", [f"text {i} {j}" for j in range(5)])
    corpus = open_corpus(str(tmp_path / "d"))
    assert texts(corpus, "val") == [f"text 2 {j}" for j in range(5)]
    assert texts(corpus, "train") == [f"text {i} {j}" for i in range(2) for j in range(5)]
    assert corpus.num_documents("train") == 10 and corpus.num_documents("val") == 5


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "files"])
def test_hashed_documents_are_held_out(tmp_path, kind):
    root, every = tmp_path / "d", [f"document {i}\n" for i in range(100)]
    root.mkdir()
    if kind == "parquet":
        write_parquet(root / "one.parquet", every, column="body")
    elif kind == "jsonl":
        (root / "one.jsonl").write_text("".join(json.dumps({"body": text, "kind": "dialogue"}) + "\n"
                                                for text in every) + "\n")
    else:
        for i, text in enumerate(every):
            path = root / f"sub{i % 3}" / f"{i}{('.txt', '.md', '.py')[i % 3]}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    corpus = open_corpus(str(root), "body")
    train, val = texts(corpus, "train"), texts(corpus, "val")
    assert sorted(train + val) == sorted(every) and len(val) == 5
    assert texts(open_corpus(str(root), "body"), "val") == val
    if kind == "jsonl":
        assert {d.kind for d in corpus.documents("val")} == {"dialogue"}


def test_fingerprint_follows_contents(tmp_path):
    write_parquet(tmp_path / "d" / "a.parquet", ["aaa", "bbb"])
    first = open_corpus(str(tmp_path / "d")).fingerprint
    write_parquet(tmp_path / "d" / "a.parquet", ["aaa", "bbc"])
    assert open_corpus(str(tmp_path / "d")).fingerprint != first


def test_bad_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        open_corpus(str(tmp_path / "nowhere"))
    root = tmp_path / "d"
    root.mkdir()
    (root / "x.bin").write_text("x")
    with pytest.raises(UserError, match="no .parquet .jsonl .jsonl.gz .jsonl.zst .txt .md .py files"):
        open_corpus(str(root))
    (root / "a.txt").write_text("only one")
    with pytest.raises(UserError, match="holds 1 documents"):
        texts(open_corpus(str(root)), "train")
    (root / "b.txt").write_text("  \n")
    (root / "a.txt").write_text("")
    with pytest.raises(UserError, match="is empty"):
        texts(open_corpus(str(root)), "train")


def test_damaged_files_are_named(tmp_path):
    root = tmp_path / "d"
    write_parquet(root / "a.parquet", [f"{i}" * 100 for i in range(10)])
    good = (root / "a.parquet").read_bytes()
    for damaged in (good[: len(good) // 2], b"", bytes(100)):
        (root / "a.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged parquet file .*a.parquet"):
            texts(open_corpus(str(root)), "train")
    page = bytearray(good)
    page[4:60] = b"\xff" * 56  # the first page; the footer is whole
    (root / "a.parquet").write_bytes(page)
    with pytest.raises(UserError, match="damaged parquet file .*a.parquet"):
        texts(open_corpus(str(root)), "train")
    (root / "a.parquet").write_bytes(good)
    with pytest.raises(UserError, match="no text column 'body', its columns: text"):
        texts(open_corpus(str(root), "body"), "train")
    (root / "a.parquet").unlink()

    for line, what in [('{"text": "cut', "line 2"), ('{"body": "x"}', "line 2: no field 'text'"),
                       ('{"text": 3}', "line 2: 'text' is int"), ("[]", "line 2"), ("\udcff", "line 2")]:
        (root / "b.jsonl").write_bytes(f'{{"text": "fine"}}\n{line}\n'.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=f"b.jsonl {what}"):
            texts(open_corpus(str(root)), "train")
    (root / "b.jsonl").unlink()
    (root / "c.txt").write_bytes(b"\xff\xfe latin")
    (root / "d.txt").write_text("fine")
    with pytest.raises(UserError, match="c.txt is not UTF-8"):
        texts(open_corpus(str(root)), "train"), texts(open_corpus(str(root)), "val")


# --- downloader


class Hub(BaseHTTPRequestHandler):
    """Serves `files` as the hub does: HEAD answers with a redirect that carries size and sha256, GET knows ranges."""

    files: dict[str, bytes] = {}
    sha256: dict[str, str] = {}  # lies
    cut: dict[str, int] = {}  # name -> how often the body is cut in half
    refuse = 0  # how many requests get a 503
    log: list[tuple[str, str, str | None]] = []

    def do_HEAD(self):
        name = self.path.split("/")[-1]
        self.log.append(("HEAD", name, None))
        if self._turned_away(name):
            return
        data = self.files[name]
        self.send_response(302)
        self.send_header("Location", f"/cdn/{name}")
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Linked-ETag", f'"{self.sha256.get(name, hashlib.sha256(data).hexdigest())}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        name, wanted = self.path.split("/")[-1], self.headers["Range"]
        self.log.append(("GET", name, wanted))
        if self._turned_away(name):
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        data = self.files[name][start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.cut.get(name, 0):
            self.cut[name] -= 1
            data = data[: len(data) // 2]
        self.wfile.write(data)

    def _turned_away(self, name) -> bool:
        if Hub.refuse or name not in self.files:
            self.send_error(503 if Hub.refuse else 404)
            Hub.refuse = max(0, Hub.refuse - 1)
            return True
        return False

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    Hub.files = {"a.bin": np.random.default_rng(0).bytes(100_000)}
    Hub.sha256, Hub.cut, Hub.refuse, Hub.log = {}, {}, 0, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/resolve"
    server.shutdown()
    server.server_close()


def test_download_and_again(hub, tmp_path):
    download(f"{hub}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == Hub.files["a.bin"]
    Hub.log.clear()
    download(f"{hub}/a.bin", tmp_path / "a.bin")
    assert not Hub.log, "what is there was checked before it got its name"


def test_cut_download_resumes(hub, tmp_path):
    Hub.cut["a.bin"], Hub.refuse = 2, 1
    download(f"{hub}/a.bin", tmp_path / "a.bin", wait_s=0)
    assert (tmp_path / "a.bin").read_bytes() == Hub.files["a.bin"]
    assert [wanted for method, _, wanted in Hub.log if method == "GET"] == [None, "bytes=50000-", "bytes=75000-"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a.bin"]


def test_cut_download_is_never_taken_for_whole(hub, tmp_path):
    Hub.cut["a.bin"] = 2
    with pytest.raises(UserError, match="75000 of 100000 bytes"):
        download(f"{hub}/a.bin", tmp_path / "a.bin", attempts=2, wait_s=0)
    assert not (tmp_path / "a.bin").exists()
    download(f"{hub}/a.bin", tmp_path / "a.bin", wait_s=0)  # a later run goes on
    assert Hub.log[-1][2] == "bytes=75000-" and (tmp_path / "a.bin").read_bytes() == Hub.files["a.bin"]


def test_wrong_contents_are_refused(hub, tmp_path):
    Hub.sha256["a.bin"] = "0" * 64
    with pytest.raises(UserError, match="sha256 is .*, the server announced 000"):
        download(f"{hub}/a.bin", tmp_path / "a.bin", attempts=2, wait_s=0)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_missing_file_and_dead_server(hub, tmp_path):
    with pytest.raises(UserError, match="HTTP 404"):
        download(f"{hub}/b.bin", tmp_path / "b.bin", wait_s=0)
    assert len(Hub.log) == 1, "no use in trying again"
    with pytest.raises(UserError, match="could not be fetched in 2 attempts"):
        download("http://127.0.0.1:9/b.bin", tmp_path / "b.bin", attempts=2, wait_s=0)


def test_shards(hub, tmp_path):
    for i in (0, 1, dataset.LAST_SHARD):
        write_parquet(tmp_path / "x.parquet", [f"shard {i}"])
        Hub.files[f"shard_{i:05d}.parquet"] = (tmp_path / "x.parquet").read_bytes()
    download_shards(2, tmp_path / "d", hub, wait_s=0)
    corpus = open_corpus(str(tmp_path / "d"))
    assert texts(corpus, "train") == ["shard 0", "shard 1"] and texts(corpus, "val") == [f"shard {dataset.LAST_SHARD}"]
    with pytest.raises(UserError, match="--num_shards=0"):
        download_shards(0, tmp_path / "e", hub)
    command = [sys.executable, "-m", "nanochat.dataset", "--num_shards=3", f"--dir={tmp_path / 'd'}",
               f"--base_url={hub}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "shard_00002.parquet: HTTP 404" in done.stderr


# --- token cache


def test_token_cache(base, tmp_path, tokenizer):
    for i in range(2):
        write_parquet(tmp_path / "d" / f"{i}.parquet", [f"some text {i} {j}" * (j + 1) for j in range(4)])
    corpus = open_corpus(str(tmp_path / "d"))
    cache = open_token_cache(corpus, "train", tokenizer)
    assert cache.tokens.dtype == np.uint16 and cache.bos_id == tokenizer.bos_id
    for d, text in enumerate(texts(corpus, "train")):
        ids = cache.tokens[cache.docs[d] : cache.docs[d + 1]].tolist()
        assert ids[0] == tokenizer.bos_id and tokenizer.decode(ids[1:]) == text
    assert cache.docs[-1] == len(cache.tokens) and (cache.lengths > 1).all()
    assert cache.path.parent == base and not list(base.glob("*.tmp"))
    made = (cache.path / "tokens.bin").stat().st_mtime_ns
    assert open_token_cache(corpus, "train", tokenizer).fingerprint == cache.fingerprint
    assert (cache.path / "tokens.bin").stat().st_mtime_ns == made
    assert open_token_cache(corpus, "val", tokenizer).path != cache.path

    for file, damage in [("tokens.bin", lambda b: b[:-1]), ("docs.npy", lambda b: b[:-8]),
                         ("meta.json", lambda b: b[:5]), ("tokens.bin", None)]:
        good = (cache.path / file).read_bytes()
        (cache.path / file).write_bytes(damage(good)) if damage else (cache.path / file).unlink()
        with pytest.raises(UserError, match=f"damaged token cache .*{file} .*delete .*tokens-train"):
            open_token_cache(corpus, "train", tokenizer)
        (cache.path / file).write_bytes(good)


def test_damaged_corpus_leaves_no_cache(base, tmp_path, tokenizer):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"text": "fine"}\n' * 50 + "broken\n")
    corpus = open_corpus(str(tmp_path / "d"))
    with pytest.raises(UserError, match="line 51"):
        open_token_cache(corpus, "train", tokenizer)
    assert not list(base.glob("tokens-*"))


def test_large_vocabulary_takes_four_bytes(tmp_path, tokenizer, monkeypatch):
    write_parquet(tmp_path / "d" / "a.parquet", ["one", "two", "three"])
    monkeypatch.setattr(tokenizer, "vocab_size", 1 << 16)
    cache = open_token_cache(open_corpus(str(tmp_path / "d")), "train", tokenizer)
    assert cache.tokens.dtype == np.uint32 and cache.tokens[0] == tokenizer.bos_id


def test_two_processes_build_one_cache(base, tmp_path, tokenizer):
    """Ranks of one run start together: one builds, the others wait and find it."""
    tokenizer.save()
    code = (
        "from nanochat.dataset import open_corpus; from nanochat.token_cache import open_token_cache\n"
        "from nanochat.tokenizer import Tokenizer\n"
        f"print(len(open_token_cache(open_corpus({str(tmp_path / 'd')!r}), 'train', Tokenizer.load()).tokens))"
    )
    write_parquet(tmp_path / "d" / "a.parquet", ["word " * 20_000] * 8)
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [run.communicate()[0] for run in runs]
    assert counts[0] == counts[1] and int(counts[0]) > 8 and [run.returncode for run in runs] == [0, 0]
