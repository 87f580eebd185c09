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
    "ruler": {"index": 0, "input": "A number for fox: 12. And 34. Numbers for fox?", "outputs": ["12", "34"],
              "length": 20},
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
            {"yes_no_answer": "NONE", "short_answers": [{"start_token": 1, "end_token": 4}],
             "long_answer": {"start_token": 0}},
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
    assert bytes(judged.tolist()) == example.answer.encode() and len(np.flatnonzero(batch.targets[0] >= 0)) == len(example.answer.encode())  # noqa: E501


def test_partial_credit_but_any_of_several_for_questions(tmp_path):
    folder = tmp_path / "qa_1"
    folder.mkdir()
    needle = load_examples(write(tmp_path / "niah_multivalue.jsonl", [ROWS["ruler"]]), "ruler")[0]
    answer = load_examples(write(folder / "validation.jsonl", [ROWS["ruler"]]), "ruler")[0]
    assert (needle.task, answer.task) == ("niah_multivalue", "qa_1")
    assert needle.score("12 only") == 0.5 and answer.score(
        "12 only") == 1 and answer.answer == " 12" and needle.answer == " 12, 34"


def test_natural_questions_with_passages(tmp_path):
    rows = [
        {"question": "who ran", "answers": ["fox"],
         "ctxs": [{"title": "Fox", "text": "It ran."}, {"title": "Dog", "text": "It sat."}]},
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


def one(tmp_path, format: str, row: dict, name: str = "made.jsonl"):
    (example,) = load_examples(write(tmp_path / name, [row]), format)
    return example


KVPRESS = {"context": "Gates: 4410, 9921. ", "question": "Which?", "answer_prefix": " They are", "max_new_tokens": 20}
BOTH = {"answer": "Lena Ford", "references": ["Lena Ford", "Ford"]}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "task, columns, answer, said, score",
    [
        ("niah_multivalue", {"answer": ["4410", "9921"]}, " 4410, 9921", "4410 only", 0.5),
        ("niah_single_1", {"answer": ["4410"]}, " 4410", "it is 4410", 1),
        ("vt", {"answer": ["VAR", "ABC"]}, " VAR, ABC", "abc", 0.5),
        ("cwe", {"answer": ["one", "one", "two"]}, " one, one, two", "one", 2 / 3),
        ("qa_1", {"answer": ["Lena Ford", "Ford"]}, " Lena Ford", "that was Ford", 1),
        ("qa_2", {"answers": ["Lena Ford", "Ford"]}, " Lena Ford", "that was ford", 1),
        ("signed", BOTH | {"any_reference": True}, "Lena Ford", "Ford", 1),
        ("signed", BOTH | {"any_reference": False}, "Lena Ford", "Ford", 0.5),
        ("qa_1", {"answer": ["Lena Ford", "Ford"], "any_reference": False}, " Lena Ford, Ford", "Ford", 0.5),
        ("hotpotqa", {"answers": ["Lena Ford", "Ford"]}, " Lena Ford", "Ford", 1),
        ("hotpotqa-e", {"answers": ["Lena Ford", "Ford"]}, " Lena Ford", "Ford", 1),
        ("longbook_choice_eng", {"answer": ["Lena Ford", "B"]}, " Lena Ford", "B", 1),
        ("niah_multivalue", {"answer": "['4410', '9921']"}, " 4410, 9921", "4410", 0.5),
        ("niah_multivalue", {"answer": '["4410", "9921"]'}, " 4410, 9921", "4410", 0.5),
        ("niah_multivalue", {"answer": "['4410' '9921']"}, " 4410, 9921", "4410", 0.5),
        ("printed", {"answer": "['4410', '9921']"}, "['4410', '9921']", "4410", 0),
        ("made", {"answers": '["red", "blue"]'}, " red, blue", "blue", 0.5),
        ("niah_multivalue", {"answer": [4410, 9921]}, " 4410, 9921", "4410", 0.5),
        ("niah_single_1", {"answer": 4410}, " 4410", "4410.", 1),
        ("made", {"answer": 2.5}, " 2.5", "2.5", 1),
        ("made", {"references": [], "answer": " red"}, " red", "red", 1),
        ("made", {"answer": [" Zoe\u0308 "]}, " Zoe\u0308", "it was ZO\u00cb", 1),
        ("made", {"answer": ["red", None, " "]}, " red", "red", 1),
    ],
)
def test_answers_of_kvpress_rows_as_their_suites_mean_them(tmp_path, suffix, task, columns, answer, said, score):
    example = one(tmp_path, "kvpress", KVPRESS | {"task": task} | columns, f"x{suffix}")
    assert (example.answer, example.score(said), example.score("I do not know")) == (answer, score, 0)


def test_a_right_answer_is_told_behind_a_blank_where_there_is_none(tmp_path):
    for prefix, answer in (("Answer: ", "4410"), ("Answer:", " 4410"), ("", " 4410")):
        assert one(tmp_path, "kvpress", KVPRESS | {"answer": ["4410"], "answer_prefix": prefix}).answer == answer
    assert one(tmp_path, "ruler", {"input": "Which? ", "outputs": ["4410"]}).answer == "4410"


@pytest.mark.parametrize(
    "format, row, kept",
    [
        ("ruler", {"outputs": ["12", ""]}, ("12",)),
        ("longbench", {"answers": ["", "the fox", " \n"]}, ("the fox",)),
        ("nq", {"question": "q", "context": "c", "answers": ["", "fox"], "annotations": None}, ("fox",)),
        ("triviaqa", {"answer": {"value": "Fox", "aliases": ["", "Fox", None, "red fox"]}}, ("Fox", "red fox")),
        ("kvpress", {"answer": ["", "red"]}, ("red",)),
    ],
)
def test_a_reference_without_text_is_none(tmp_path, format, row, kept):
    row = {k: v for k, v in (ROWS[format] | row).items() if v is not None}
    example = one(tmp_path, format, row)
    assert example.references == kept and example.score("I do not know") == 0 and example.score(f"a {kept[0]} b") == 1


@pytest.mark.parametrize(
    "format, row, says",
    [
        ("ruler", {"outputs": ["", " "]}, "answer is empty: 'outputs'"),
        ("longbench", {"answers": [""]}, "answer is empty: 'answers'"),
        ("triviaqa", {"answer": {"value": "", "aliases": []}}, "answer is empty"),
        ("kvpress", {"answer": None}, "'answer'; it has context, question, answer_prefix, max_new_tokens"),
        ("kvpress", {"answer": b"red"}, "'answer' holds bytes"),
        ("kvpress", {"answer": []}, "'answer' is not a text"),
        ("kvpress", {"answer": [["a"], ["b"]]}, "'answer' holds list"),
        ("kvpress", {"answer": {"text": ["a"]}}, "'answer' holds dict"),
        ("kvpress", {"answer": True}, "'answer' holds bool"),
        ("kvpress", {"answer": 4410.0}, "may stand for 4410"),
        ("kvpress", {"answer": "red", "any_reference": "yes"}, "any_reference is 'yes'"),
        ("kvpress", {"max_new_tokens": float("nan")}, "max_new_tokens is nan"),
        ("kvpress", {"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
    ],
)
def test_what_cannot_be_an_answer_is_named(tmp_path, format, row, says):
    with pytest.raises(UserError, match="made.parquet, row 1: ") as caught:
        one(tmp_path, format, ROWS[format] | row, "made.parquet")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_answers_are_as_long_as_their_suites_let_them_be(tmp_path):
    for name, most in (("niah_single_1", 128), ("vt", 30), ("cwe", 120), ("fwe", 50), ("qa_1", 32)):
        assert one(tmp_path, "ruler", ROWS["ruler"], f"{name}.jsonl").max_new_tokens == most
        row = {k: v for k, v in KVPRESS.items() if k != "max_new_tokens"} | {"task": name, "answer": ["x"]}
        assert one(tmp_path, "kvpress", row).max_new_tokens == most
    for name, most in (("gov_report", 512), ("hotpotqa_e", 32), ("made", 64)):
        assert one(tmp_path, "longbench", ROWS["longbench"] | {"dataset": name}).max_new_tokens == most
    assert one(tmp_path, "kvpress", KVPRESS | {"answer": "x", "max_new_tokens": 7.0}, "x.parquet").max_new_tokens == 7


def test_names_and_lines_that_other_tools_write(tmp_path):
    folder = tmp_path / "qa_1"
    folder.mkdir()
    (example,) = load_examples(write(folder / "validation-00000-of-00001.parquet", [ROWS["ruler"]]), "ruler")
    assert example.task == "qa_1" and example.any_reference
    assert one(tmp_path, "ruler", ROWS["ruler"] | {"gen_prefix": " They are"}).answer_prefix == " They are"
    lines = "".join(json.dumps(ROWS["ruler"]) + "\r\n" for _ in range(2))
    for name in ("lines.json", "marked.jsonl"):
        (tmp_path / name).write_text("\ufeff" + lines)
        assert len(load_examples(tmp_path / name, "ruler")) == 2
    (tmp_path / "broken.json").write_text(lines + "{")
    with pytest.raises(UserError, match="line 3: not JSON"):
        load_examples(tmp_path / "broken.json", "ruler")


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string(), 2), pa.list_(pa.int64())]
)
def test_lists_of_every_type_that_parquet_has(tmp_path, kind):
    value = [4410, 9921] if pa.types.is_integer(kind.value_type) else ["4410", "9921"]
    columns = {name: [value]
               for name, value in KVPRESS.items()} | {"task": pa.array(["niah_multivalue"]).dictionary_encode()}
    pq.write_table(pa.table(columns | {"answer": pa.array([value], kind)}), tmp_path / "x.parquet")
    (example,) = load_examples(tmp_path / "x.parquet", "kvpress")
    assert example.references == ("4410", "9921") and example.score("9921") == 0.5
