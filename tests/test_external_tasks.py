"""Files that users have, read as examples; made-up rows in the layouts that the sets are published in."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.tasks.external import FORMATS, load_examples
from nanochat.tasks.schema import batch_of
from nanochat.tokenizer import Reserved, Tokenizer

BYTES = Tokenizer([bytes([i]) for i in range(256)], reserved=Reserved(0, 0, 0))
ROWS = {
    "kvpress": {
        "context": "The fox is red. ",
        "question": "Which colour?",
        "answer_prefix": " It is",
        "answer": " red",
        "max_new_tokens": 3,
    },
    "ruler": {"index": 0, "input": "A number for fox: 12. And 34. Numbers for fox?", "outputs": ["12", "34"], "length": 20},
    "longbench": {
        "input": "Who ran?",
        "context": "The fox ran.",
        "answers": ["the fox", "a fox"],
        "length": 3,
        "dataset": "made",
        "language": "en",
        "_id": "1",
    },
    "nq": {
        "question_text": "who ran",
        "document_text": "<P> The red fox ran </P>",
        "example_id": 1,
        "annotations": [
            {"yes_no_answer": "NONE", "short_answers": [{"start_token": 1, "end_token": 4}], "long_answer": {"start_token": 0}},
            {"yes_no_answer": "YES", "short_answers": [], "long_answer": {"start_token": 0}},
        ],
    },
    "triviaqa": {
        "question": "Who ran?",
        "question_id": "q",
        "answer": {"value": "Fox", "aliases": ["Fox", "red fox"]},
        "entity_pages": {"title": ["Fox"], "wiki_context": ["The fox ran."]},
        "search_results": {"search_context": ["It was red."]},
    },
    "humaneval": {
        "task_id": "Made/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "assert one() == 1",
        "entry_point": "one",
    },
}
REFERENCES = {
    "kvpress": (" red",),
    "ruler": ("12", "34"),
    "longbench": ("the fox", "a fox"),
    "nq": ("The red fox", "yes"),
    "triviaqa": ("Fox", "red fox"),
    "humaneval": ("    return 1\n",),
}


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps({"Data": rows}))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_from_every_kind_of_file(tmp_path, format, suffix):
    (example, again), row = load_examples(write(tmp_path / f"made{suffix}", [ROWS[format]] * 2), format), ROWS[format]
    assert example == again and example.references == REFERENCES[format]
    assert example.score(f"well,{example.answer}") == 1 and example.score("nothing") == 0
    whole = example.context + example.question
    assert all(
        row[field].strip() in whole
        for field in ("input", "prompt", "question_text", "document_text", "question", "context")
        if isinstance(row.get(field), str)
    )
    batch = batch_of([example], BYTES, 32)
    history = (example.context + example.question + example.answer_prefix).encode()
    assert bytes(batch.tokens[0, batch.n - len(history) : batch.n].tolist()) == history
    judged = batch.targets[0][batch.targets[0] >= 0]
    assert bytes(judged.tolist()) == example.answer.encode() and len(np.flatnonzero(batch.targets[0] >= 0)) == len(example.answer.encode())


def test_partial_credit_but_any_of_several_for_questions(tmp_path):
    folder = tmp_path / "qa_1"
    folder.mkdir()
    needle = load_examples(write(tmp_path / "niah_multivalue.jsonl", [ROWS["ruler"]]), "ruler")[0]
    answer = load_examples(write(folder / "validation.jsonl", [ROWS["ruler"]]), "ruler")[0]
    assert (needle.task, answer.task) == ("niah_multivalue", "qa_1")
    assert needle.score("12 only") == 0.5 and answer.score("12 only") == 1 and answer.answer == " 12" and needle.answer == " 12, 34"


def test_natural_questions_with_passages(tmp_path):
    rows = [
        {"question": "who ran", "answers": ["fox"], "ctxs": [{"title": "Fox", "text": "It ran."}, {"title": "Dog", "text": "It sat."}]},
        {"question": "who sat", "answer": "dog", "context": "The dog sat."},
    ]
    first, second = load_examples(write(tmp_path / "nq.jsonl", rows), "nq")
    assert "Fox\nIt ran.\n\nDog\nIt sat." in first.context and second.references == ("dog",)


def test_folders_are_read_in_order_up_to_a_limit(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", [ROWS["ruler"] | {"input": f"{name}{i}"} for i in range(3)])
    (tmp_path / "README.txt").write_text("not an example")
    assert [e.context for e in load_examples(tmp_path, "ruler", limit=4)] == ["a0", "a1", "a2", "b0"]


@pytest.mark.parametrize(
    "format, row, says",
    [
        ("kvpress", {"context": "x"}, "lacks 'references' or 'answers' or 'answer'"),
        ("ruler", {"input": "x", "outputs": []}, "'outputs' is not a text"),
        ("ruler", {"input": 3, "outputs": ["1"]}, "'input' is int, not text"),
        ("longbench", {"input": "x", "answers": ["y"]}, "lacks 'context'"),
        ("nq", ROWS["nq"] | {"annotations": [{"short_answers": []}]}, "no short answer"),
        ("nq", ROWS["nq"] | {"annotations": [{}]}, "not those of simplified"),
        ("nq", {"question": "x", "answer": "y"}, "lacks 'context'"),
        ("triviaqa", {"question": "x", "answer": {"value": "y"}}, "no evidence"),
        ("triviaqa", {"question": "x", "answer": "y"}, "'value' and 'aliases'"),
        ("humaneval", {"prompt": "x"}, "lacks 'canonical_solution'"),
        ("kvpress", ROWS["kvpress"] | {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("kvpress", ROWS["kvpress"] | {"answer": ""}, "answer is empty"),
        ("ruler", ["x"], "it is list"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path, format, row, says):
    path = write(tmp_path / "made.jsonl", [ROWS[format], row])
    with pytest.raises(UserError, match="made.jsonl, row 2: ") as caught:
        load_examples(path, format)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"input": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "nothing").mkdir()
    for name, says in (
        ("broken.jsonl", "broken.jsonl line 1: not JSON"),
        ("broken.parquet", "damaged parquet file .*broken.parquet"),
        ("empty.jsonl", "no example"),
        ("nothing", "file there"),
        ("missing.jsonl", "file there"),
    ):
        with pytest.raises(UserError, match=says):
            load_examples(tmp_path / name, "ruler")
    with pytest.raises(UserError, match="format 'squad'"):
        load_examples(tmp_path, "squad")
