"""Texts: text files, jsonl, parquet and sets of tasks, as corpora, ingest, --history and the tokenizer take them.

What is read must be the same for all of them and come back from its tokens; what is refused must be refused alike.
"""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import Intact, changes, command, dumped, fuzzed, json_changes, tried
from hypothesis import strategies as st

from mc.store.ingest import texts_of
from nanochat.common import UserError
from nanochat.documents import count_rows, read_documents
from nanochat.tasks.external import FORMATS, load_examples
from nanochat.tokenizer import Tokenizer
from scripts import chat_cli, tok_eval, tok_train

SHARE = 0.2  # of FUZZ_EXAMPLES' reciprocal: reading is cheap, so each test tries five times as many


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words, and more of them: \t\n  \n" * 20], 270)


ANY = st.text(st.characters(), max_size=60)  # halves of surrogate pairs and NULs among them
ODD = st.sampled_from(["", " ", "\0", "\ufeff", "\ud83d", "\ude00\ud83d", "\ud83d\ude00", "<|bos|>", "\x1c\x85\u2028",
                       "\r", "\r\n\r", "e\u0301", "\u202e", "x" * 3000,
                       " " * 140_000, "\u3000" * 140_000 + "x"])  # fmt: skip
TEXT = st.lists(st.one_of(ANY, ODD), max_size=4).map("".join)


def outcome(read):
    """What `read` gives, or the line in which it refuses."""
    try:
        return read(), ""
    except UserError as e:
        return None, str(e)


def alike(kind: str, path: Path, tokenizer: Tokenizer) -> None:
    """Every reader's documents, or refusal, are the same; texts come back from their tokens."""
    documents = tried(kind, lambda: list(read_documents(path, path.parent, "text")))
    same, line = outcome(lambda: list(read_documents(path, path.parent, "text")))
    assert same == documents
    found, other = outcome(lambda: list(texts_of(path)))
    assert other == line, (other, line)
    if documents is None:
        return
    assert count_rows(path) == len(documents)
    texts = [document.text for document in documents if document.text.strip()]
    assert ["".join(text.pieces()) for text in found] == texts
    for document in documents:
        ids = tokenizer.encode(document.text)
        assert tokenizer.decode(ids) == document.text
        assert f"{document.source}{document.kind}".encode()
    for text, source in zip(texts, found):
        assert [i for piece in source.pieces() for i in tokenizer.encode(piece)] == tokenizer.encode(text)
        source.uri.encode(), source.kind.encode()


@fuzzed(text=TEXT,
        codec=st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be", "latin-1",
                               "cp1252"]), change=st.none() | changes(), cost=SHARE)
def test_text_files(work, tokenizer, text, codec, change):
    path = work / "a.txt"
    data = text.encode(codec, "surrogatepass" if codec.startswith("utf") else "replace")
    path.write_bytes(change(data) if change else data)
    alike("text files", path, tokenizer)
    history, _ = outcome(lambda: "".join(chat_cli.history_pieces(chat_cli.open_text(path, prompted=True), path)))
    assert history == outcome(lambda: next(read_documents(path, work, "text")).text)[0]


ROW = st.one_of(
    st.fixed_dictionaries({"text": TEXT},
                          optional={"source": TEXT, "kind": st.one_of(TEXT, st.integers(), st.lists(ANY))}),
    st.builds(lambda change, text: change({"text": text, "more": [1, {"x": None}]}), json_changes(), TEXT),
)


@fuzzed(rows=st.lists(ROW, max_size=4), change=st.none() | st.none() | changes(),
        suffix=st.sampled_from(["jsonl", "jsonl", "jsonl.gz", "jsonl.zst"]),
        end=st.sampled_from(["\n", "\r\n", "\n\n"]),
        cost=SHARE)  # fmt: skip
def test_jsonl(work, tokenizer, rows, change, suffix, end):
    data = "".join(json.dumps(row) + end for row in rows).encode()
    packed = {"jsonl": lambda: data, "jsonl.gz": lambda: gzip.compress(data),
              "jsonl.zst": lambda: pa.compress(data, codec="zstd", asbytes=True)}[suffix]()
    path = work / f"a.{suffix}"
    path.write_bytes(change(packed) if change else packed)
    alike("jsonl", path, tokenizer)


UTF8 = TEXT.map(lambda text: text.encode("utf-8", "replace").decode())
TYPES = {
    "string": pa.string(), "large_string": pa.large_string(), "string_view": pa.string_view(), "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()), "null": pa.null(), "int64": pa.int64(),
    "float64": pa.float64(), "bool": pa.bool_(), "date": pa.date32(),
    "timestamp": pa.timestamp("ns"), "list": pa.list_(pa.string()), "struct": pa.struct([("text", pa.string())]),
    "bytes": pa.binary(3),
}  # fmt: skip
VALUES = {"int64": st.integers(-(2**63), 2**63 - 1), "float64": st.floats(), "bool": st.booleans(), "date": st.dates(),
          "timestamp": st.integers(-(2**63), 2**63 - 1),
          "list": st.lists(UTF8, max_size=3), "struct": st.fixed_dictionaries({"text": UTF8}),
          "binary": st.binary() | UTF8.map(str.encode),
          "large_binary": st.binary() | UTF8.map(str.encode),
          "bytes": st.binary(min_size=3, max_size=3) | st.just(b"abc"), "null": st.none()}  # fmt: skip


def columns() -> st.SearchStrategy[pa.Array]:
    def of(kind: str) -> st.SearchStrategy[pa.Array]:
        values = st.lists(st.none() | VALUES.get(kind, UTF8), min_size=3, max_size=3)
        make = ((lambda v: pa.array(v, pa.string()).dictionary_encode()) if kind == "dictionary"
                else lambda v: pa.array(v, TYPES[kind]))
        return values.map(make)

    return st.sampled_from(["string", *TYPES]).flatmap(of)


def broken(column: pa.Array) -> pa.Array:
    """A column of bytes that claims to be one of strings."""
    return pa.Array.from_buffers(pa.string(), len(column), column.buffers(),
                                 null_count=column.null_count) if column.type == pa.binary() else column


@fuzzed(text=columns(), more=st.dictionaries(st.sampled_from(["source", "kind", "other.name", "text\n"]), columns(),
                                             max_size=2), size=st.integers(1, 3),
        name=st.sampled_from(["text", "text", "text", "text", "body"]), lies=st.booleans(), cost=SHARE)  # fmt: skip
def test_parquet(work, tokenizer, text, more, size, name, lies):
    table = pa.table({name: broken(text) if lies else text, **more})
    pq.write_table(table, work / "a.parquet", row_group_size=size)
    alike("parquet", work / "a.parquet", tokenizer)


@pytest.fixture(scope="module")
def intact() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": ["one text", None, "another text of it"] * 20, "source": ["a", "b", "c"] * 20}),
                   out, row_group_size=16)
    return Intact(out.getvalue())


@fuzzed(change=changes(), cost=SHARE)
def test_bytes_of_parquet(work, tokenizer, intact, change):
    path = work / "b.parquet"
    path.write_bytes(change(intact))
    alike("bytes of parquet", path, tokenizer)


TASK = {"context": "some words", "question": "which?", "answer_prefix": "A:", "answer": "more", "answers": ["more"],
        "references": ["more"], "outputs": ["more"], "input": "some words",
        "max_new_tokens": 3, "task": "qa_1", "document_text": "some words", "question_text": "which?",
        "prompt": "def f():", "canonical_solution": "pass"}  # fmt: skip


@fuzzed(change=json_changes(), damage=st.none() | changes(), format=st.sampled_from(sorted(FORMATS)),
        suffix=st.sampled_from(["json", "jsonl", "jsonl.gz"]), rows=st.integers(1, 3), cost=SHARE)
def test_sets_of_tasks(work, tokenizer, change, damage, format, suffix, rows):
    row = TASK | ({"answer": {"value": "more", "aliases": ["m"]}} if format == "triviaqa" else {})
    changed = dumped(change(row))
    data = b"[" + b",".join([changed] * rows) + b"]" if suffix == "json" else (changed + b"\n") * rows
    data = gzip.compress(damage(data) if damage else data) if suffix == "jsonl.gz" else damage(data) if damage else data
    path = work / f"set.{suffix}"
    path.write_bytes(data)
    for example in tried("sets of tasks", lambda: load_examples(path, format)) or []:
        for text in (example.context, example.question, example.answer, *example.references):
            assert tokenizer.decode(tokenizer.encode(text, special=True)) == text and text.encode() is not None


@fuzzed(rows=st.lists(ROW, min_size=2, max_size=4), change=st.none() | changes(), cost=2)
def test_commands(work, tokenizer, monkeypatch, rows, change):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(work / "base"))
    tokenizer.save()
    folder = work / "corpus"
    folder.mkdir(exist_ok=True)
    data = b"".join(dumped(row) + b"\n" for row in rows)
    (folder / "a.jsonl").write_bytes(change(data) if change else data)
    (folder / "b.txt").write_text("some words, and more of them. " * 30)
    command("tok_eval", tok_eval.main, f"--data={folder}")
    command("tok_train", tok_train.main, f"--data={folder}", "--vocab_size=257")
