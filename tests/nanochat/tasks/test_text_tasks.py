"""Real text by the distance of its repetitions, and by layout."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from nanochat.common import UserError
from nanochat.tasks.text import BUCKETS, LAYOUT, TextRows, bucket_of, judged_buckets, layout, layout_of_tokens, repeat_distance  # noqa: E501
from nanochat.tokenizer import Reserved, Tokenizer

BYTES = Tokenizer([bytes([i]) for i in range(256)], reserved=Reserved(0, 0, 0))


@given(st.lists(st.lists(st.integers(0, 4), min_size=17, max_size=17), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_distance_is_to_the_last_time(rows):
    tokens = np.array(rows)
    slow = [[next((d for d in range(1, t + 1) if row[t - d] == row[t]), 0) for t in range(len(row))] for row in rows]
    assert repeat_distance(tokens).tolist() == slow


def test_buckets_have_the_edges_they_are_named_for():
    distance = np.array([0, 1, 127, 128, 511, 512, 2047, 2048, 10**7])
    assert [BUCKETS[i] for i in bucket_of(distance)] == [
        "never",
        "<128",
        "<128",
        "128-511",
        "128-511",
        "512-2047",
        "512-2047",
        ">=2048",
        ">=2048",
    ]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split, name in (("a-train", "t"), ("b-val", "v")):
        rows = [
            {
                "text": f"{name}{i} " + " ".join(f"word{j * j % 97}{name}{i}" for j in range(50)),
                "source": f"{name}{i}",
                "kind": "dialogue" if i % 2 else "narrative",
            }
            for i in range(6)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


def test_rows_of_text_are_pieces_of_one_document_with_its_kind(corpus):
    rows = TextRows(str(corpus), "val", BYTES, 64, 9)
    batch = rows.batch(np.arange(rows.num_rows))
    assert batch.tokens.shape == batch.targets.shape == (rows.num_rows, 73) and batch.n == 64
    assert len({row.tobytes() for row in batch.tokens}) == rows.num_rows
    assert (batch.targets[:, :63] == -1).all() and (batch.targets[:, 63:-1] == batch.tokens[:, 64:]).all()
    for row, e in zip(batch.tokens, batch.examples):
        kind, source = e.tags
        assert (
            e.context + e.answer == BYTES.decode(row) and kind == ("dialogue" if int(source[1:]) % 2 else "narrative")
            and source[0] == "v"
        )
    again = TextRows(str(corpus), "val", BYTES, 64, 9).batch([3])
    assert (again.tokens[0] == batch.tokens[3]).all()
    buckets = judged_buckets(batch)
    assert buckets.shape == (rows.num_rows, 9) and (buckets >= 0).all()
    row, j = 1, 4
    earlier = [d for d in range(1, 68) if batch.tokens[row, 68 - d] == batch.tokens[row, 68]]
    assert buckets[row, j] == (1 if earlier else 0)
    batch.targets[row, 63 + j] = -1
    assert judged_buckets(batch)[row, j] == -1
    train = {row.tobytes() for row in TextRows(str(corpus), "train", BYTES, 64, 9).batch(np.arange(9)).tokens}
    assert not train & {row.tobytes() for row in batch.tokens}
    with pytest.raises(UserError, match="no val document has"):
        TextRows(str(corpus), "val", BYTES, 6400, 9)


TEXT = """# Title
Some running words, with “quotes” inside.

- one thing
12. another
| a | b |
<div class="x">
“Who is there?” he said.
MARY: It is me.
> he wrote
```
anything at all
```
def f(x):
    return x
"""


def test_layout_is_told_line_by_line():
    expected = [
        "heading",
        "running",
        "blank",
        "list",
        "list",
        "table",
        "markup",
        "speech",
        "speech",
        "quote",
        "fence",
        "code",
        "fence",
        "code",
        "code",
        "blank",
    ]
    data = TEXT.encode()
    found = layout(data)
    assert [tag for _, tag in found] == expected and set(expected) == set(LAYOUT)
    assert all(place == 0 or data[place - 1 : place] == b"\n" for place, _ in found)
    tokens = np.array(BYTES.encode(TEXT))
    tags = layout_of_tokens(tokens, BYTES)
    slow = [expected[bytes(tokens[:i].tolist()).count(b"\n")] for i in range(len(tokens))]
    assert [LAYOUT[i] for i in tags] == slow
