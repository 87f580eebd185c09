"""L1: text of any kind is read, or refused in one line that names file and row, and alike by every command."""

import contextlib
import gzip
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc.store.ingest import find_files, texts_of
from nanochat.common import UserError, run_main
from nanochat.dataset import digests, open_corpus
from nanochat.documents import files_below, opened, read_documents, read_text
from nanochat.tasks.external import load_examples
from nanochat.token_cache import open_token_cache
from nanochat.tokenizer import Tokenizer
from scripts import chat_cli, tok_eval, tok_train

PLAIN = "red blue green, a page of words; and so on. " * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([PLAIN], 280)


@pytest.fixture
def base(tmp_path, monkeypatch, tokenizer) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    tokenizer.save()
    return tmp_path / "base"


def from_history(path: Path) -> Iterator[str]:
    """The pieces of a file in which a chat reads it."""
    return chat_cli.history_pieces(chat_cli.open_text(path, prompted=True), path)


def parquet(column, **more) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": column, **more}), out)
    return out.getvalue()


def lines(*rows: str) -> bytes:
    return "".join(row + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as f:
        f.write(data)
    return out.getvalue().to_pybytes()


def binary_strings(*values: bytes) -> pa.Array:
    """A column that claims to be strings, whatever its bytes."""
    made = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(made), made.buffers())


ROW = '{"text": "%s"}'
WIDE = "wide" + " " * 1_000_000 + "gap"
HALF = "a pair cut \ufffd here"
TWO = ["one text", "another text"]
NESTED = pa.array([["a"], ["b"]])
# Name: (file, its bytes, the texts in it).
READ = {
    "blanks": ("a.txt", WIDE.encode(), [WIDE]),
    "blanks to the end": ("a.txt", WIDE[:-3].encode(), [WIDE[:-3]]),
    "only blanks": ("a.txt", b" " * 1_000_000, []),
    "blanks in jsonl": ("a.jsonl", lines(ROW % WIDE), [WIDE]),
    "half of a pair": ("a.jsonl", lines(ROW % r"a pair cut \ud83d here", ROW % r"a pair cut \uDE00 here"),
                       [HALF, HALF]),
    "both halves": ("a.jsonl", lines(ROW % r"\ud83d\ude00"), ["\U0001f600"]),
    "half in source and kind": ("a.jsonl", lines(r'{"text": "x", "source": "\ud83d", "kind": "\ud83d"}'), ["x"]),
    "NUL": ("a.txt", b"one\0two", ["one\0two"]),
    "NUL in jsonl": ("a.jsonl", lines(ROW % r"one\u0000two"), ["one\0two"]),
    "control characters": ("a.txt", b"\x01\x1c\x1f\x7f bell \x07", ["\x01\x1c\x1f\x7f bell \x07"]),
    "byte order mark": ("a.txt", b"\xef\xbb\xbfone\xef\xbb\xbftwo", ["one\ufefftwo"]),
    "byte order mark of jsonl": ("a.jsonl", b"\xef\xbb\xbf" + lines(*(ROW % t for t in TWO)), TWO),
    "line ends": ("a.txt", b"one\r\ntwo\rthree\n", ["one\r\ntwo\rthree\n"]),
    "line ends of jsonl": ("a.jsonl", (ROW % "one" + "\r\n" + ROW % "two").encode(), ["one", "two"]),
    "decomposed": ("a.txt", "e\u0301 \u00e9".encode(), ["e\u0301 \u00e9"]),
    "special names": ("a.txt", b"<|bos|> and <|key_1|>", ["<|bos|> and <|key_1|>"]),
    "nothing": ("a.txt", b"", []),
    "no rows": ("a.jsonl", b"", []),
    "empty lines": ("a.jsonl", lines("", ROW % "one", " ", ROW % "two"), ["one", "two"]),
    "null in jsonl": ("a.jsonl", lines('{"text": null}', ROW % "one"), ["one"]),
    "the same key twice": ("a.jsonl", lines('{"text": "first", "text": "last"}'), ["last"]),
    "NaN beside it": ("a.jsonl", lines('{"text": "one", "score": NaN}'), ["one"]),
    "gzip": ("a.jsonl.gz", gzip.compress(lines(*(ROW % t for t in TWO))), TWO),
    "zstd": ("a.jsonl.zst", zstd(lines(*(ROW % t for t in TWO))), TWO),
    "null in parquet": ("a.parquet", parquet(["one", None, "two"]), ["one", "two"]),
    "only null": ("a.parquet", parquet(pa.nulls(3)), []),
    "no rows of parquet": ("a.parquet", parquet(pa.array([], pa.string())), []),
    **{f"column of {kind}": ("a.parquet", parquet(pa.array(TWO).cast(kind)), TWO)
       for kind in (pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary())},
    "column of dictionary": ("a.parquet", parquet(pa.array(TWO + TWO).dictionary_encode()), TWO + TWO),
    "odd source and kind": ("a.parquet", parquet(TWO, source=[1, 2], kind=NESTED), TWO),
}
# Name: (file, its bytes, what the line says).
REFUSED = {
    "latin-1": ("a.txt", "one\nKäse".encode("latin-1"), "a.txt is not UTF-8 text .*at byte 5, line 2"),
    "a cut character": ("a.txt", b"ok \xe2\x82", "a.txt is not UTF-8 text .*at byte 3, line 1"),
    "a surrogate's bytes": ("a.txt", b"\xed\xa0\xbd", "a.txt is not UTF-8"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "a.txt is not UTF-8 .*UTF-16.*iconv"),
    "UTF-16 jsonl": ("a.jsonl", (ROW % "x" + "\n").encode("utf-16"), "a.jsonl is not UTF-8 .*UTF-16.*iconv"),
    "latin-1 in jsonl": ("a.jsonl", lines(ROW % "one") + (ROW % "Käse").encode("latin-1"), "a.jsonl line 2: not UTF-8"),
    "latin-1 in parquet": ("a.parquet", parquet(binary_strings(b"one", b"two", b"K\xe4se")),
                           "a.parquet row 3: not UTF-8"),
    "latin-1 in bytes": ("a.parquet", parquet(pa.array([b"one", b"K\xe4se"])), "a.parquet row 2: not UTF-8"),
    "a row that is a list": ("a.jsonl", lines(ROW % "one", '["text"]'), "a.jsonl line 2: it is list, not an object"),
    "a row that is null": ("a.jsonl", lines(ROW % "one", "null"), "a.jsonl line 2: it is null"),
    "a text that is an object": ("a.jsonl", lines('{"text": {"a": "b"}}'), "a.jsonl line 1: 'text' is dict, not text"),
    "a text that is NaN": ("a.jsonl", lines('{"text": NaN}'), "a.jsonl line 1: 'text' is float, not text"),
    "another field": ("a.jsonl", lines('{"body": "x"}'), "a.jsonl line 1: no field 'text'"),
    "a torn line": ("a.jsonl", lines(ROW % "one") + b'{"text": "cut', "a.jsonl line 2: not JSON"),
    "nested too deeply": ("a.jsonl", lines('{"text": ' + "[" * 100_000), "a.jsonl line 1: JSON nested too deeply"),
    "too many digits": ("a.jsonl", lines('{"text": "x", "n": ' + "9" * 5000 + "}"),
                        "a.jsonl line 1: Exceeds the limit"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(lines(ROW % "one"))[:-12], "damaged file .*a.jsonl.gz"),
    "no zstd": ("a.jsonl.zst", b"no such thing", "damaged file .*a.jsonl.zst"),
    "no parquet": ("a.parquet", b"PAR1 no", "damaged parquet file .*a.parquet"),
    "lists": ("a.parquet", parquet(NESTED), "a.parquet: its column 'text' is list<.*>, not text"),
    "numbers": ("a.parquet", parquet([1, 2]), "a.parquet: its column 'text' is int64, not text"),
    "a struct": ("a.parquet", parquet([{"text": "x"}]), "a.parquet: its column 'text' is struct<.*>, not text"),
}


def corpus(folder: Path, name: str, data: bytes, held_out: bool = False) -> Path:
    """A corpus of two shards, of which the last is held out: the odd one, or that of a plain
    text. A text file has no shards."""
    folder.mkdir()
    (folder / name).write_bytes(data)
    if not name.endswith(".txt"):
        (folder / ("0.jsonl" if held_out else "z.jsonl")).write_bytes(lines(json.dumps({"text": PLAIN * 3})))
    return folder


def all_documents(folder: Path) -> list[str]:
    found = [document.text for path in files_below(folder) for document in read_documents(path, folder, "text")]
    return [text for text in found if text.strip() and text != PLAIN * 3]


@pytest.mark.parametrize("case", READ)
def test_read_alike_by_all(case, base, tmp_path, tokenizer, monkeypatch):
    """The reader, the token cache of training and evaluation, ingest and --history give the same ids,
    from which the text comes back."""
    name, data, texts = READ[case]
    folder = corpus(tmp_path / "d", name, data)
    assert all_documents(folder) == texts
    wanted = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in wanted] == texts
    if name.endswith(".txt"):
        (folder / "plain.txt").write_text(PLAIN)
        wanted, texts = [*wanted, tokenizer.encode(PLAIN)], [*texts, PLAIN]
        assert "".join(from_history(folder / name)) == "".join(t for t in texts if t != PLAIN) or not texts[:-1]
        assert [i for piece in from_history(folder / name)
                for i in tokenizer.encode(piece)] == tokenizer.encode(read_text(folder / name))
    cached = []
    for split in ("train", "val"):
        with contextlib.suppress(UserError):  # a split without text
            cache = open_token_cache(open_corpus(str(folder)), split, tokenizer)
            cached += [cache.tokens[a + 1 : b].tolist() for a, b in zip(cache.docs, cache.docs[1:])]
    assert sorted(ids for ids in cached if ids != tokenizer.encode(PLAIN * 3)) == sorted(wanted)
    found = [text for path in find_files([folder]) for text in texts_of(path)]
    assert [[i for piece in text.pieces() for i in tokenizer.encode(piece)]
            for text in found if text.size != 3 * len(PLAIN)] == wanted
    for text in found:
        text.uri.encode(), text.kind.encode()
    for command, flags in ((tok_train, ["--vocab_size=257"]), (tok_eval, [])):
        monkeypatch.setattr(sys, "argv", ["x", f"--data={folder}", *flags])
        with contextlib.suppress(UserError) if len(texts) < 2 else contextlib.nullcontext():  # a split without text
            command.main()


@pytest.mark.parametrize("case", REFUSED)
def test_refused_alike_by_all(case, base, tmp_path, tokenizer, monkeypatch, capsys):
    name, data, says = REFUSED[case]
    folder = corpus(tmp_path / "d", name, data)
    (folder / "plain.txt").write_text(PLAIN)
    refusals = []

    def refused(what):
        with pytest.raises(UserError, match=says) as caught:
            what()
        refusals.append(str(caught.value))

    refused(lambda: all_documents(folder))
    refused(lambda: [open_token_cache(open_corpus(str(folder)), split, tokenizer) for split in ("train", "val")])
    refused(lambda: [text for path in find_files([folder]) for text in texts_of(path)])
    if name.endswith(".txt"):
        refused(lambda: list(from_history(folder / name)))
        refusals[-1] = refusals[-1].removeprefix("--history=")
    for command, held_out in ((tok_train, False), (tok_eval, True)):
        root = corpus(tmp_path / command.__name__, name, data, held_out)
        (root / "plain.txt").write_text(PLAIN)
        monkeypatch.setattr(sys, "argv",
                            ["x", f"--data={root}", *(["--vocab_size=257"] if command is tok_train else [])])
        if name.endswith(".txt"):  # which of the two is held out does not matter here
            (root / "plain.txt").unlink()
            (root / "b.txt").write_bytes(data)
            refused(command.main)
            refusals.pop()
        else:
            refused(command.main)
            refusals[-1] = refusals[-1].replace(str(root), str(folder))
    assert len(set(refusals)) == 1 and refusals[0].isprintable()
    assert not list(base.glob("tokens-*/*.tmp"))


ROW_OF_TASK = {"context": "c", "question": "q", "answers": ["a"]}


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_rows_of_tasks(tmp_path, suffix):
    def write(data: bytes) -> Path:
        path = tmp_path / f"set.{suffix}"
        path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
        return path

    wide, half = "x" + " " * 1_000_000, r"a pair cut \ud83d"
    if suffix == "parquet":
        out = io.BytesIO()
        pq.write_table(pa.table({name: pa.array([value] * 2).dictionary_encode() if name == "context" else [value] * 2
                                 for name, value in ROW_OF_TASK.items()}), out)
        assert [e.context for e in load_examples(write(out.getvalue()), "kvpress")] == ["c", "c"]
        pq.write_table(pa.table({"context": binary_strings(b"c", b"\xff")}), out := io.BytesIO())
        path = write(out.getvalue())
        with pytest.raises(UserError, match="set.parquet.* row 1: no kvpress example"):
            load_examples(path, "kvpress")
        pq.write_table(pa.table({"context": binary_strings(b"\xff")}), out := io.BytesIO())
        with pytest.raises(UserError, match="set.parquet row 1: .*can't decode"):
            load_examples(write(out.getvalue()), "kvpress")
        return
    row = json.dumps(ROW_OF_TASK | {"context": wide, "question": "HALF"}).replace("HALF", half)
    (example,) = load_examples(write(b"\xef\xbb\xbf" + row.encode()), "kvpress")
    assert (example.context, example.question) == (wide, "a pair cut \ufffd")
    for bad, says in ((b"\xff\xfe{", "UTF-16"), (b'{"context": "\xe4"}', "not UTF-8"),
                      (b"[" * 100_000, "nested too deeply"), (b'{"context": "', "not JSON"),
                      (b"null", "null|NoneType"), (b"", "holds no example|not JSON")):  # fmt: skip
        with pytest.raises(UserError, match=f"set.{suffix}.*({says})") as caught:
            load_examples(write(bad), "kvpress")
        assert str(caught.value).isprintable()


# --- folders


def test_links(tmp_path):
    """Linked files and folders are read, a folder that links back only once; a link to nowhere is named."""
    root, elsewhere = tmp_path / "d", tmp_path / "elsewhere"
    (root / "sub").mkdir(parents=True), (elsewhere / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("a"), (elsewhere / "deep" / "b.txt").write_text("b"), (tmp_path / "c").write_text("c")
    (root / "linked").symlink_to(elsewhere), (root / "c.txt").symlink_to(tmp_path / "c")
    (root / "sub" / "back").symlink_to(root), (elsewhere / "across").symlink_to(root)
    (root / ".hidden.txt").write_text("h"), (root / ".git").mkdir(), (root / ".git" / "x.txt").write_text("x")
    names = [path.relative_to(root).as_posix() for path in open_corpus(str(root)).files]
    assert names == ["a.txt", "c.txt", "linked/deep/b.txt"] == [p.relative_to(root).as_posix()
                                                                for p in find_files([root])]
    (root / "gone.txt").symlink_to("nowhere")
    for read in (lambda: open_corpus(str(root)), lambda: find_files([root])):
        with pytest.raises(UserError, match="gone.txt is a link to nowhere, which is not there"):
            read()
    (root / "gone.txt").unlink()
    (root / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(UserError, match="loop.txt is a link"):
        open_corpus(str(root))


@pytest.mark.parametrize("name", ["new\nline.txt", os.fsdecode(b"caf\xe9.txt"), "\x1b[31m.txt", "\u202e.txt"])
def test_names_of_files(base, tmp_path, tokenizer, name):
    root = tmp_path / "d"
    root.mkdir()
    (root / name).write_text("text of it"), (root / "b.txt").write_text("another text")
    found = [d for split in ("train", "val") for d in open_corpus(str(root)).documents(split)]
    assert all(d.source.isprintable() for d in found) and {d.text for d in found} == {"text of it", "another text"}
    assert open_token_cache(open_corpus(str(root)), "val", tokenizer).lengths.sum() > 1
    assert all(text.uri.isprintable() for path in find_files([root]) for text in texts_of(path))
    (root / name).write_bytes(b"\xff")
    with pytest.raises(UserError, match="is not UTF-8 text") as caught:
        list(texts_of(root / name))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "a.txt.gz", "a.parquet.xz"])
def test_other_compression_is_not_passed_over(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name} is compressed in a way that is not read"):
        open_corpus(str(tmp_path))


def test_a_folder_of_other_files(tmp_path):
    """Ingest passes over what is no text, but not over what corpora read; what is named itself must be text."""
    (tmp_path / "image.bin").write_bytes(b"\x89PNG\0"), (tmp_path / "a.rst").write_text("text")
    assert [text.uri.rpartition("/")[2] for path in find_files([tmp_path]) for text in texts_of(path)] == ["a.rst"]
    with pytest.raises(UserError, match="image.bin is not UTF-8 text"):
        list(texts_of(tmp_path / "image.bin", named=True))


# --- files that change


def test_a_text_edited_in_place_is_tokenized_again(base, tmp_path, tokenizer, monkeypatch):
    """Whatever its length and its time of change; also a large one whose hash is remembered."""
    monkeypatch.setattr("nanochat.dataset.REMEMBERED_BYTES", 1000)
    monkeypatch.setattr("nanochat.dataset.SETTLED_NS", 0)
    root = tmp_path / "d"
    root.mkdir()
    text = "word " * 100_000
    (root / "a.txt").write_text(text), (root / "b.txt").write_text("small")
    first = open_corpus(str(root)).fingerprint
    assert open_corpus(str(root)).fingerprint == first and json.loads(next((base / "digests").glob(
        "*.json")).read_text())
    for name, at in (("a.txt", 250_000), ("b.txt", 2)):
        status = (root / name).stat()
        with open(root / name, "r+b") as f:
            f.seek(at), f.write(b"X")
        os.utime(root / name, ns=(status.st_atime_ns, status.st_mtime_ns))
        before, first = first, open_corpus(str(root)).fingerprint
        assert first != before


def test_a_remembered_hash_is_not_made_again(base, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.dataset.SETTLED_NS", 0)
    big, small = tmp_path / "big.txt", tmp_path / "small.txt"
    big.write_bytes(b"x" * (1 << 20)), small.write_bytes(b"y")
    first = digests(tmp_path, [big, small])
    read = []

    @contextlib.contextmanager
    def watched(path, name=""):
        read.append(path)
        with opened(path, name) as f:
            yield f

    monkeypatch.setattr("nanochat.dataset.opened", watched)
    assert digests(tmp_path, [big, small]) == first and read == [small]
    for damage in ("{", "[]", ""):
        next((base_of(tmp_path)).glob("*.json")).write_text(damage)
        read.clear()
        assert digests(tmp_path, [big, small]) == first and read == [big, small]
    monkeypatch.setattr("nanochat.dataset.SETTLED_NS", 3600 * 10**9)
    next((base_of(tmp_path)).glob("*.json")).unlink()
    digests(tmp_path, [big, small])
    assert not list(base_of(tmp_path).glob("*.json")), "one that changed just now can change again unseen"


def base_of(tmp_path: Path) -> Path:
    return tmp_path / "base" / "digests"


def test_a_file_that_changes_while_it_is_read(base, tmp_path, tokenizer):
    root = tmp_path / "d"
    root.mkdir()
    path = root / "a.jsonl"
    path.write_bytes(lines(*[json.dumps({"text": PLAIN})] * 5000))
    reading = read_documents(path, root, "text")
    next(reading)
    with open(path, "ab") as f:
        f.write(lines(ROW % "more"))
    with pytest.raises(UserError, match="a.jsonl changed while it was read; run again"):
        list(reading)
    with pytest.raises(UserError, match="cannot read .*gone.jsonl: No such file"):
        list(read_documents(root / "gone.jsonl", root, "text"))


def test_a_corpus_that_changes_while_it_is_tokenized(base, tmp_path, tokenizer, monkeypatch):
    root = tmp_path / "d"
    root.mkdir()
    (root / "a.txt").write_text("one text"), (root / "b.txt").write_text("another text")
    corpus = open_corpus(str(root))
    assert corpus.fingerprint
    (root / "a.txt").write_text("ONE text")
    with pytest.raises(UserError, match="a.txt changed while it was tokenized; run again"):
        open_token_cache(corpus, "train", tokenizer)
    assert not list(base.glob("tokens-*"))


def test_a_text_that_changes_between_its_hash_and_its_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (text,) = texts_of(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("one\nTWO\n")
    with pytest.raises(UserError, match="a.txt changed while it was read"):
        list(text.pieces())


def test_the_error_is_one_line(base, tmp_path, monkeypatch, capsys):
    root = tmp_path / "odd\nname"
    root.mkdir()
    (root / "a\nb.txt").write_bytes(b"\xff"), (root / "b.txt").write_bytes(b"\xff")
    monkeypatch.setattr(sys, "argv", ["x", f"--data={root}", "--vocab_size=257"])
    with pytest.raises(SystemExit):
        run_main(tok_train.main)
    assert capsys.readouterr().err.count("\n") == 1
