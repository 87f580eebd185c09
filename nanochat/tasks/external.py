"""Examples from files that the user has: question answering, long-context suites, code, in the
layouts they are published in.

`kvpress`: the columns of the sets that kvpress is evaluated on, which are also ours; its answer is a text or a list of
them. `ruler`: jsonl of the RULER harness (input, outputs). `longbench`: input, context, answers. Whether a right
answer contains every reference or any of them is the row's `any_reference`, else what the suites score that task by;
one without text is left out.
`nq`: Natural Questions, simplified as published (question_text, document_text, annotations) or as question, answers,
context(s). `triviaqa`: the reading-comprehension rows (question, answer, entity_pages, search_results). `humaneval`:
prompt, canonical_solution. A path is a parquet, jsonl or json file, or a folder of such files. Nothing is downloaded.
"""

import ast
import json
import re
from pathlib import Path
from typing import Callable, Iterator

from nanochat.common import UserError, shown
from nanochat.documents import SHARDS, files_below, is_shard, json_rows, parquet_rows, read_json
from nanochat.tasks.schema import Example

SUFFIXES = (*SHARDS, ".json")
SPLIT_NAMES = ("train", "dev", "validation", "val", "test")
# Tokens that the suites let a model answer with: RULER's, by kind of task, whose score is the share of all references
# but for qa (scripts/data/synthetic/constants.py); LongBench's (config/dataset2maxlen.json), which counts the best
# reference.
RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
LONGBENCH_TOKENS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "multifieldqa_zh": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "dureader": 128,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "vcsum": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "lsht": 64,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "passage_retrieval_zh": 32,
    "lcc": 64,
    "repobench-p": 64,
}
INFINITEBENCH = {
    *("passkey", "number_string", "kv_retrieval", "math_find", "math_calc", "code_run", "code_debug"),
    *("longbook_choice_eng", "longbook_sum_eng", "longbook_qa_eng", "longbook_qa_chn", "longdialogue_qa_eng"),
}  # its rows hold the spellings of one answer
SHARD = re.compile(r"-\d{5}-of-\d{5}$")  # of the names that the hub gives parquet files


class _Unfit(Exception):
    """A row is not what its format says; the message says in what."""


def load_examples(path: Path | str, format: str, limit: int = 0) -> list[Example]:
    """Examples of a file, or of a folder's files in order; limit: at most so many (0: all).

    UserError for an unknown format, a path without such files, and, with file and line, a
    row that is not of the format.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} of external examples: use one of {', '.join(FORMATS)}")
    path = Path(path).expanduser()
    files = files_below(path, SUFFIXES) if path.is_dir() else [path]
    if not files or not files[0].is_file() or not files[0].name.endswith(SUFFIXES):
        raise UserError(f"{shown(path)}: no {', '.join(SUFFIXES)} file there; name a file of {format} examples or a "
                        "folder of them")
    examples: list[Example] = []
    for file in files:
        for place, row in _rows(file):
            if limit and len(examples) == limit:
                return examples
            try:
                if not isinstance(row, dict):
                    raise _Unfit(f"it is {type(row).__name__}, not an object with fields")
                stem = SHARD.sub("", file.stem)
                name = file.parent.name if stem in SPLIT_NAMES else stem  # RULER: qa_1/validation.jsonl
                example = FORMATS[format](row, name)
                if not example.answer:
                    raise _Unfit("its answer is empty")
            except _Unfit as e:
                raise UserError(f"{shown(file)}, row {place}: no {format} example: {shown(str(e))[:300]}") from None
            examples.append(example)
    if not examples:
        raise UserError(f"{shown(path)} holds no example")
    return examples


def _rows(file: Path) -> Iterator[tuple[int, object]]:
    """(row number from 1, row) of one file."""
    if file.suffix == ".parquet":
        yield from parquet_rows(file)
    elif is_shard(file):
        yield from ((place, row) for place, row in json_rows(file) if row is not None)
    else:
        data = read_json(file)
        data = data.get("Data", data.get("data", data)) if isinstance(data, dict) else data
        yield from enumerate(data if isinstance(data, list) else [data], 1)


def _lacking(row: dict, *names: str) -> _Unfit:
    there = [shown(str(name)) for name, value in row.items() if value is not None]
    return _Unfit(f"it lacks {' or '.join(map(repr, names))}; it has {', '.join(there) or 'no fields'}")


def _text(row: dict, *names: str, default: str | None = None) -> str:
    """The first of the fields that is there, which must be text. Missing: `default`, or _Unfit without one."""
    for name in names:
        if row.get(name) is not None:
            if not isinstance(row[name], str):
                raise _Unfit(f"{name!r} is {type(row[name]).__name__}, not text")
            return row[name]
    if default is None:
        raise _lacking(row, *names)
    return default


def _plain(value: object, name: str) -> str:
    """An answer as text; a number as it is written. "" for None."""
    if isinstance(value, float) and value.is_integer():
        raise _Unfit(f"{name!r} holds the number {value}, which may stand for {value:.0f}: write it as text")
    if isinstance(value, bool) or not isinstance(value, (str, int, float, type(None))):
        raise _Unfit(f"{name!r} holds {type(value).__name__} {str(value)[:40]}, not a text or a list of texts")
    return "" if value is None else str(value)


def _unpacked(text: str) -> object:
    """The list that a table without lists holds as text: JSON's, Python's or numpy's ['a' 'b']. Else the text
    itself."""
    if not (text.strip().startswith("[") and text.strip().endswith("]")):
        return text
    for read in (json.loads, lambda t: ast.literal_eval(re.sub(r"(?<=['\"])\s+(?=['\"])", ", ", t.strip()))):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError):
            continue
    return text


def _texts(row: dict, *names: str) -> tuple[str, ...]:
    """The first of the fields that has any: a text or a list of texts, those that say something. The text of a field
    for several (answers, outputs) may be a list written out. _Unfit without any."""
    empty = None
    for name in names:
        value = row.get(name)
        value = _unpacked(value) if isinstance(value, str) and name.endswith("s") else value
        values = value if isinstance(value, list) else [value]
        if found := tuple(text for v in values if (text := _plain(v, name)).strip()):
            return found
        empty = name if empty is None and value is not None else empty
    if empty is None:
        raise _lacking(row, *names)
    if row[empty] == []:
        raise _Unfit(f"{empty!r} is not a text or a list of texts: it is an empty list")
    raise _Unfit(f"its answer is empty: {empty!r} holds no text")


def _most(row: dict, default: int) -> int:
    most = row.get("max_new_tokens")
    most = default if most is None else most
    # the bounds first: they leave no NaN, no infinity, and no integer that float64 cannot hold
    if isinstance(most, bool) or not isinstance(most, (int, float)) or not 1 <= most < 2**31 or most != int(most):
        raise _Unfit(f"max_new_tokens is {most!r}, not a number above 0 and below 2**31")
    return int(most)


def _ruler_kind(task: str) -> str | None:
    """Which of RULER's kinds of task this is one of: niah_multikey_1, ruler_qa_squad, …"""
    words = re.split(r"[^a-z0-9]+", task.lower())
    return next((kind for kind in RULER_TOKENS if kind in words), None)


def _any_reference(row: dict, task: str) -> bool:
    """Whether one of several references makes an answer right: as the row says, else as the suite of that task has
    it."""
    said = row.get("any_reference")
    if said is not None:
        if not isinstance(said, (bool, int)) or said not in (0, 1):
            raise _Unfit(f"any_reference is {said!r}, not true or false")
        return bool(said)
    return _ruler_kind(task) == "qa" or _longbench_set(task) in LONGBENCH_TOKENS or task.lower() in INFINITEBENCH


def _longbench_set(task: str) -> str:
    """Its name in LongBench; that of LongBench-E, with as many rows of each length, for the same."""
    return re.sub(r"[-_]e$", "", task.lower())


def _told(references: tuple[str, ...], part: bool, before: str) -> str:
    """The text that answers with every reference, or with one that suffices, behind what is read before it."""
    return ("" if before[-1:].isspace() else " ") + (references[0] if part else ", ".join(references)).strip()


def _kvpress(row: dict, name: str) -> Example:
    task = _text(row, "task", default=name)
    kind, part = _ruler_kind(task), _any_reference(row, task)
    if kind and isinstance(row.get("answer"), str):  # elsewhere it may be the text of a list, as a program's output
        row = row | {"answer": _unpacked(row["answer"])}
    references = _texts(row, "references", "answers", "answer")
    context, question, prefix = _text(row, "context"), _text(row, "question"), _text(row, "answer_prefix", default="")
    own = row["answer"] if isinstance(row.get("answer"), str) and row["answer"].strip() else None
    return Example(
        context,
        question,
        prefix,
        own or _told(references, part, context + question + prefix),
        _most(row, RULER_TOKENS.get(kind, LONGBENCH_TOKENS.get(_longbench_set(task), 64))),
        task,
        references=references,
        any_reference=part,
    )


def _ruler(row: dict, name: str) -> Example:
    history, prefix = _text(row, "input"), _text(row, "answer_prefix", "gen_prefix", default="")
    task, references = _text(row, "task", default=name), _texts(row, "outputs")
    part = _any_reference(row, task)
    return Example(
        history,
        "",
        prefix,
        _told(references, part, history + prefix),
        _most(row, RULER_TOKENS.get(_ruler_kind(task), 128)),
        task,
        references=references,
        any_reference=part,
    )


def _longbench(row: dict, name: str) -> Example:
    references, task = _texts(row, "answers"), _text(row, "dataset", default=name)
    return Example(
        _text(row, "context"),
        "\n\n" + _text(row, "input"),
        "\n",
        references[0],
        _most(row, LONGBENCH_TOKENS.get(_longbench_set(task), 64)),
        task,
        references=references,
        any_reference=True,
        tags=(_text(row, "language", default=""),),
    )


def _passages(value: object) -> str:
    """Text of a passage, or of a list of them: texts, or objects with a title and a text."""
    parts = []
    for passage in value if isinstance(value, list) else [value]:
        if isinstance(passage, dict):
            passage = "\n".join(filter(None,
                                       (_text(passage, "title", default=""),
                                        _text(passage, "text", "passage", "context"))))
        if not isinstance(passage, str):
            raise _Unfit(f"a passage is {type(passage).__name__}, not text")
        parts.append(passage)
    return "\n\n".join(parts)


def _question(context: str, question: str, references: tuple[str, ...], row: dict, task: str) -> Example:
    return Example(
        context + "\n\n",
        f"Question: {question.strip()}\n",
        "Answer:",
        " " + references[0],
        _most(row, 32),
        task,
        references=references,
        any_reference=True,
    )


def _nq(row: dict, name: str) -> Example:
    if "annotations" not in row:
        found = next((row[field] for field in ("context", "contexts", "ctxs", "document_text")
                      if row.get(field) is not None), None)
        if found is None:
            raise _Unfit("it lacks 'context', 'contexts', 'ctxs' or 'document_text'; it has "
                         f"{', '.join(map(shown, row))}")
        return _question(_passages(found), _text(row, "question", "question_text"), _texts(row, "answers", "answer"),
                         row, "nq")
    document = _text(row, "document_text").split(" ")
    references = []
    try:
        for note in row["annotations"]:
            for span in note["short_answers"]:
                references.append(" ".join(document[span["start_token"] : span["end_token"]]))
            if note.get("yes_no_answer", "NONE") != "NONE":
                references.append(note["yes_no_answer"].lower())
    except (KeyError, TypeError, AttributeError) as e:
        raise _Unfit(
            f"its annotations are not those of simplified Natural Questions ({type(e).__name__}: {e})") from None
    if not any(reference.strip() for reference in references):
        raise _Unfit("it has no short answer; leave out rows without one")
    found = tuple(dict.fromkeys(_texts({"answers": references}, "answers")))
    return _question(" ".join(document), _text(row, "question_text"), found, row, "nq")


def _triviaqa(row: dict, name: str) -> Example:
    answer = row.get("answer", row.get("Answer"))
    if not isinstance(answer, dict):
        raise _Unfit("it lacks 'answer' with 'value' and 'aliases'")
    value, aliases = _text(answer, "value", "Value"), answer.get("aliases", answer.get("Aliases")) or []
    if not isinstance(aliases, list):
        raise _Unfit("'aliases' of its answer is not a list of texts")
    references = tuple(dict.fromkeys(_texts({"answer": [value, *aliases]}, "answer")))
    passages = [row["context"]] if isinstance(row.get("context"), str) else []
    for source, field in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        if isinstance(row.get(source), dict):
            passages += row[source].get(field) or []
    if not passages:
        raise _Unfit(
            "it has no evidence: 'context', 'entity_pages.wiki_context' or 'search_results.search_context'; "
            "join the evidence files into one of these"
        )
    return _question(_passages(passages), _text(row, "question", "Question"), references, row, "triviaqa")


def _humaneval(row: dict, name: str) -> Example:
    solution = _text(row, "canonical_solution")
    return Example(
        _text(row, "context", default=""),
        _text(row, "prompt"),
        "",
        solution,
        _most(row, 512),
        "humaneval",
        references=(solution,),
        tags=(_text(row, "task_id", default=""), _text(row, "entry_point", default="")),
    )


FORMATS: dict[str, Callable[[dict, str], Example]] = {
    "kvpress": _kvpress,
    "ruler": _ruler,
    "longbench": _longbench,
    "nq": _nq,
    "triviaqa": _triviaqa,
    "humaneval": _humaneval,
}
