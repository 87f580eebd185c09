"""Documents become sources, once, in bounded memory; an ingest that was cut off goes on."""

import io
import json
import os
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mc.store.catalog import Catalog
from mc.store.history import History, store_format
from mc.store.ingest import Ingest, find_files, texts_of
from mc.store.ram import VOID, RamStore
from nanochat import documents, tokenizer
from nanochat.common import UserError
from nanochat.tokenizer import Reserved, Tokenizer, cut
from tiny_mc import K, tiny_base, tiny_mc

TOKENIZER = Tokenizer.train(
    ["def f(x):\n    return x + 1\n\n\nclass A:\n    pass\n" * 3, "a b  c\n\n  d e; f\r\n g" * 3] * 4, 280,
    Reserved(1, 1, 1)
)
GPT = tiny_base(dtype=torch.float32, vocab_size=TOKENIZER.vocab_size)
MC = tiny_mc(GPT, max_lod=3).model.eval()


@pytest.fixture
def opened() -> tuple[History, Catalog]:
    return History(GPT, MC, RamStore(store_format(GPT, MC))), Catalog(None, K)


@pytest.fixture
def folder(tmp_path):
    """Texts of many lengths, a binary, an empty and a hidden file, two that are alike, parquet and jsonl."""
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    for i in range(9):
        (root / "sub" / f"{i}.rst").write_text(f"Title {i}\n=======\n\n" + "some words, and more; (all)\n" * i * 3)
    (root / "alike.md").write_text((root / "sub" / "4.rst").read_text())
    (root / "code.py").write_text("def f():\n    return 1\n" * 40)
    (root / "binary.bin").write_bytes(b"\x89PNG\r\n\x1a\n\0\0" * 50)
    (root / "latin.rst").write_bytes("Käse".encode("latin-1"))
    (root / "zeros").write_bytes(b"text \0 with a zero")
    (root / "empty.txt").write_text(" \n")
    (root / ".hidden").write_text("hidden")
    pq.write_table(pa.table({"text": ["one row", "", "another row of it"], "kind": ["poem", "x", "prose"]}),
                   root / "rows.parquet")
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(3)))
    return root


def run(opened, folder, **options) -> Ingest:
    work = Ingest(*opened, TOKENIZER, **{"batch": 8, **options})
    for path in find_files([folder]):
        for text in texts_of(path):
            work.add(text)
    work.finish()
    return work


def contents(history: History, catalog: Catalog) -> dict[str, str]:
    """Text of every source by its uri, read back from the store; asserts that each is alone in its blocks."""
    found, end = {}, 0
    for source in catalog.sources():
        assert source.start == end and source.complete
        end = source.stop(K)
        ids = history.store.tokens(torch.arange(source.start, end))
        assert (ids[source.tokens :] == VOID).all() and ids[0] == TOKENIZER.bos_id
        found[source.uri.rpartition("/")[2]] = TOKENIZER.decode(ids[1 : source.tokens].tolist())
    assert history.n_tokens == end
    return found


def expected(folder) -> dict[str, str]:
    texts = {p.name: p.read_text() for p in [*(folder / "sub").rglob("*.rst"), folder / "code.py", folder / "alike.md"]}
    del texts["4.rst"]  # alike.md comes first
    rows = {"rows.parquet#0": "one row", "rows.parquet#2": "another row of it"} | {f"rows.jsonl#{i}": f"line {i}"
                                                                                   for i in range(3)}
    return texts | rows


def test_every_text_below_a_folder_once(opened, folder):
    work = run(opened, folder)
    assert contents(*opened) == expected(folder)
    assert (work.report.sources, work.report.known) == (15, 1)
    assert work.report.tokens == sum(s.tokens for s in opened[1].sources())
    assert {s.kind for s in opened[1].sources(uri="*rows.parquet*")} == {"poem",
                                                                         "prose"} and opened[1].sources(uri="*.py")[
        0
    ].kind == "code"
    again = run(opened, folder)
    assert (again.report.sources, again.report.tokens, again.report.known) == (0, 0, 16)
    assert contents(*opened) == expected(folder)
    (folder / "new.txt").write_text("something new")
    assert run(opened, folder, kind="note", retrieval_score=0.25).report.sources == 1
    assert [(s.uri[-7:], s.retrieval_score) for s in opened[1].sources(kind="note")] == [("new.txt", 0.25)]


def test_the_tree_is_that_of_one_append(opened, folder):
    run(opened, folder)
    history = opened[0]
    made = History(GPT, MC, RamStore(store_format(GPT, MC)))
    made.fill(history.store.tokens(torch.arange(history.n_tokens)))
    for lod in (1, 2, 3):
        count = made.store.n_nodes(lod)
        assert history.store.n_nodes(lod) == count > 0
        torch.testing.assert_close(history.store.gists(lod, torch.arange(count)),
                                   made.store.gists(lod, torch.arange(count)))


class Killed(BaseException):
    pass


class Dies(History):
    """Dies at the n-th commit: before the store's, so the catalog has announced what is not there."""

    left = 0

    def fill(self, ids_N):
        if self.left == 0:
            raise Killed
        self.left -= 1
        super().fill(ids_N)


@pytest.mark.parametrize("piece", [1 << 20, 100])
def test_cut_off_anywhere_it_goes_on(folder, piece, monkeypatch):
    """Killed at every commit in turn: what is there already is not made again, also inside a document."""
    monkeypatch.setattr(documents, "READ_BYTES", piece)
    store, catalog = RamStore(store_format(GPT, MC)), Catalog(None, K)
    whole = sum(len(TOKENIZER.encode(text)) + 1 for text in expected(folder).values())
    done, resumed = [], 0
    while True:
        history = Dies(GPT, MC, store)
        catalog.reconcile(store)
        history.left = 1
        work = Ingest(history, catalog, TOKENIZER, batch=4)
        try:
            for path in find_files([folder]):
                for text in texts_of(path):
                    work.add(text)
            work.finish()
            break
        except Killed:
            assert store.n_tokens > sum(done)
            done.append(store.n_tokens - sum(done))
            resumed += work.report.resumed
    assert len(done) > 20 and resumed > 3 and all(count <= 5 * 4 * K for count in done)
    assert contents(Dies(GPT, MC, store), catalog) == expected(folder)
    assert sum(s.tokens for s in catalog.sources()) == whole


def test_another_text_after_one_that_was_cut_off(opened, tmp_path):
    """The rest of the first is not glued behind the second: it is ingested again, as a source of its own."""
    history, catalog = opened
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} word\n" * 50)
    a, b = (next(texts_of(tmp_path / f"{name}.txt")) for name in "ab")
    ids = TOKENIZER.encode((tmp_path / "a.txt").read_text())[:9]
    catalog.add_source(a.uri, 0, hash=a.hash, tokens=10)
    history.append(torch.tensor([TOKENIZER.bos_id, *ids]))
    work = Ingest(history, catalog, TOKENIZER)
    work.add(b), work.add(a), work.finish()
    partial, second, first = catalog.sources()
    assert (partial.tokens, partial.complete, work.report.resumed) == (10, False, 0)
    assert [second.uri, first.uri] == [b.uri, a.uri] and first.complete and first.start == second.stop(K)


def test_paths_that_are_wrong(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        find_files([tmp_path / "nowhere"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="damaged parquet file .*bad.parquet"):
        list(texts_of(tmp_path / "bad.parquet"))
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="bad.jsonl line 1: no field 'text'"):
        list(texts_of(tmp_path / "bad.jsonl"))


@given(text=st.text(st.sampled_from("ab1 .;\n\r\t'é\u2003"), max_size=80),
       sizes=st.lists(st.integers(1, 9), min_size=1))
@example(text="a\n\nb\n \nc\n(\n\n)", sizes=[1])
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_pieces_have_the_tokens_of_the_whole(text, sizes):
    ends = list(accumulate(sizes * (len(text) + 1)))
    parts = [text[a:b] for a, b in zip([0, *ends], ends) if a < len(text)]
    pieces = list(cut(parts))
    assert "".join(pieces) == text
    assert [i for piece in pieces for i in TOKENIZER.encode(piece)] == TOKENIZER.encode(text)


def test_a_text_without_a_place_to_cut_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(tokenizer, "MAX_PIECE", 100)
    text = "word " * 1000
    pieces = list(cut(iter(lambda f=io.StringIO(text): f.read(30), "")))
    assert "".join(pieces) == text and max(map(len, pieces)) < 140


def test_a_pipe_is_named_as_what_it_is():
    read, write = os.pipe()
    try:
        with pytest.raises(UserError, match=f"/dev/fd/{read} is a pipe or a device; hand over what it holds on "
                                            "standard input"):
            find_files([Path(f"/dev/fd/{read}")])
    finally:
        os.close(read), os.close(write)
