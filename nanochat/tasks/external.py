"""Examples from files that the user has: question answering, long-context suites, code, in the layouts they are published in.

`kvpress` has our own five columns. `ruler`: jsonl of the RULER harness (input, outputs). `longbench`: input, context, answers.
`nq`: Natural Questions, simplified as published (question_text, document_text, annotations) or as question, answers, context(s).
`triviaqa`: the reading-comprehension rows (question, answer, entity_pages, search_results). `humaneval`: prompt, canonical_solution.
A path is a parquet, jsonl or json file, or a folder of such files. Nothing is downloaded.
"""

from pathlib import Path
from typing import Callable, Iterator

from nanochat.common import UserError, shown
from nanochat.documents import SHARDS, files_below, is_shard, json_rows, parquet_rows, read_json
from nanochat.tasks.schema import Example

SUFFIXES = (*SHARDS, ".json")
SPLIT_NAMES = ("train", "dev", "validation", "val", "test")


class _Unfit(Exception):
    """A row is not what its format says; the message says in what."""


def load_examples(path: Path | str, format: str, limit: int = 0) -> list[Example]:
    """Examples of a file, or of a folder's files in order; limit: at most so many (0: all).

    UserError for an unknown format, a path without such files, and, with file and line, a row that is not of the format.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} of external examples: use one of {', '.join(FORMATS)}")
    path = Path(path).expanduser()
    files = files_below(path, SUFFIXES) if path.is_dir() else [path]
    if not files or not files[0].is_file() or not files[0].name.endswith(SUFFIXES):
        raise UserError(f"{shown(path)}: no {', '.join(SUFFIXES)} file there; name a file of {format} examples or a folder of them")
    examples: list[Example] = []
    for file in files:
        for place, row in _rows(file):
            if limit and len(examples) == limit:
                return examples
            try:
                if not isinstance(row, dict):
                    raise _Unfit(f"it is {type(row).__name__}, not an object with fields")
                name = file.parent.name if file.stem in SPLIT_NAMES else file.stem  # RULER: qa_1/validation.jsonl
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


def _text(row: dict, *names: str, default: str | None = None) -> str:
    """The first of the fields that is there, which must be text. Missing: `default`, or _Unfit without one."""
    for name in names:
        if row.get(name) is not None:
            if not isinstance(row[name], str):
                raise _Unfit(f"{name!r} is {type(row[name]).__name__}, not text")
            return row[name]
    if default is None:
        raise _Unfit(f"it lacks {' or '.join(map(repr, names))}; it has {', '.join(map(shown, row)) or 'no fields'}")
    return default


def _texts(row: dict, *names: str) -> tuple[str, ...]:
    """The first of the fields that is there: text, or a list of texts."""
    for name in names:
        value = row.get(name)
        if value is not None:
            values = [value] if isinstance(value, str) else value
            if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
                raise _Unfit(f"{name!r} is not a text or a list of texts")
            return tuple(values)
    raise _Unfit(f"it lacks {' or '.join(map(repr, names))}; it has {', '.join(map(shown, row)) or 'no fields'}")


def _most(row: dict, default: int) -> int:
    most = row.get("max_new_tokens", default)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise _Unfit(f"max_new_tokens is {most!r}, not a number above 0")
    return most


def _kvpress(row: dict, name: str) -> Example:
    references = _texts(row, "references", "answers", "answer")
    return Example(
        _text(row, "context"),
        _text(row, "question"),
        _text(row, "answer_prefix", default=""),
        _text(row, "answer", default=references[0]),
        _most(row, 64),
        _text(row, "task", default=name),
        references=references,
    )


def _ruler(row: dict, name: str) -> Example:
    task = _text(row, "task", default=name)
    references = _texts(row, "outputs")
    part = "qa" in task.lower().replace("-", "_").split("_")
    prefix = _text(row, "answer_prefix", default="")
    return Example(
        _text(row, "input"),
        "",
        prefix,
        " " + (references[0] if part else ", ".join(references)),
        _most(row, 128),
        task,
        references=references,
        any_reference=part,
    )


def _longbench(row: dict, name: str) -> Example:
    references = _texts(row, "answers")
    return Example(
        _text(row, "context"),
        "\n\n" + _text(row, "input"),
        "\n",
        references[0],
        _most(row, 64),
        _text(row, "dataset", default=name),
        references=references,
        any_reference=True,
        tags=(_text(row, "language", default=""),),
    )


def _passages(value: object) -> str:
    """Text of a passage, or of a list of them: texts, or objects with a title and a text."""
    parts = []
    for passage in value if isinstance(value, list) else [value]:
        if isinstance(passage, dict):
            passage = "\n".join(filter(None, (_text(passage, "title", default=""), _text(passage, "text", "passage", "context"))))
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
        found = next((row[field] for field in ("context", "contexts", "ctxs", "document_text") if row.get(field) is not None), None)
        if found is None:
            raise _Unfit(f"it lacks 'context', 'contexts', 'ctxs' or 'document_text'; it has {', '.join(map(shown, row))}")
        return _question(_passages(found), _text(row, "question", "question_text"), _texts(row, "answers", "answer"), row, "nq")
    document = _text(row, "document_text").split(" ")
    references = []
    try:
        for note in row["annotations"]:
            for span in note["short_answers"]:
                references.append(" ".join(document[span["start_token"] : span["end_token"]]))
            if note.get("yes_no_answer", "NONE") != "NONE":
                references.append(note["yes_no_answer"].lower())
    except (KeyError, TypeError, AttributeError) as e:
        raise _Unfit(f"its annotations are not those of simplified Natural Questions ({type(e).__name__}: {e})") from None
    if not any(references):
        raise _Unfit("it has no short answer; leave out rows without one")
    return _question(" ".join(document), _text(row, "question_text"), tuple(filter(None, dict.fromkeys(references))), row, "nq")


def _triviaqa(row: dict, name: str) -> Example:
    answer = row.get("answer", row.get("Answer"))
    if not isinstance(answer, dict):
        raise _Unfit("it lacks 'answer' with 'value' and 'aliases'")
    value = _text(answer, "value", "Value")
    aliases = answer.get("aliases", answer.get("Aliases")) or []
    if not isinstance(aliases, list) or not all(isinstance(a, str) for a in aliases):
        raise _Unfit("'aliases' of its answer is not a list of texts")
    passages = [row["context"]] if isinstance(row.get("context"), str) else []
    for source, field in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        if isinstance(row.get(source), dict):
            passages += row[source].get(field) or []
    if not passages:
        raise _Unfit(
            "it has no evidence: 'context', 'entity_pages.wiki_context' or 'search_results.search_context'; "
            "join the evidence files into one of these"
        )
    return _question(_passages(passages), _text(row, "question", "Question"), tuple(dict.fromkeys([value, *aliases])), row, "triviaqa")


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
