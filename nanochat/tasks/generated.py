"""The tasks by name, and their rows: each a function of (seed, split, task, row) alone."""

from dataclasses import replace
from typing import Sequence

import numpy as np

from nanochat.common import UserError, key_seed
from nanochat.tasks.aggregate import Common, Frequent, Topic
from nanochat.tasks.context import Context, Task
from nanochat.tasks.lookup import Chain, Lookup
from nanochat.tasks.schema import Example, TaskBatch
from nanochat.tasks.words import Words

MAGIC = " the magic value of"
TASKS: dict[str, Task] = {
    "mqar": Lookup(),
    "alias": Lookup(alias=True),
    "overwrite": Lookup(updates=2, mark="!"),
    "passkey": Lookup("phrase", facts=1, statement=" the pass key is", length=4),
    "niah_single": Lookup("text", facts=1, statement=MAGIC),
    "niah_multikey": Lookup("text", facts=8, statement=MAGIC),
    "niah_multivalue": Lookup("text", facts=4, statement=MAGIC, values=2, mark="+"),
    "niah_multiquery": Lookup("text", facts=8, statement=MAGIC, queries=2, spread=None),
    "vt1": Chain(hops=1, haystack="phrase"),
    "vt2": Chain(hops=2, haystack="phrase"),
    "frequent": Frequent(),
    "common": Common(),
    "copy": Lookup("text", facts=2, statement=" this is", length=16, copied=True),
    "topic": Topic(),
    "topic_lm": Topic(words_ahead=16, power=2.0),
    "qa1": Lookup("text", facts=4, statement=" now in the room", updates=3, mark="!"),
    "qa2": Chain(hops=1, updates=2, objects=True, statement=" now in the room"),
}


def task_named(name: str, **options) -> Task:
    """A task of the catalogue, with other values for some of its fields. UserError for a name
    or field that is not there."""
    if name not in TASKS:
        raise UserError(f"no task {name!r}; there are {', '.join(TASKS)}")
    task = TASKS[name]
    if unknown := sorted(set(options) - set(vars(task))):
        raise UserError(f"task {name} has no option {unknown[0]!r}; it has {', '.join(vars(task))}")
    return replace(task, **options)


def make_context(
    task: Task, name: str, words: Words, split: str, row: int, m: int, asks: int, seed: int, block_size: int,
    depth: float | None = None
) -> Context:
    rng = np.random.default_rng(key_seed(seed, "tasks", name, split, int(row)))
    return task.make(rng, words, m, asks, block_size, depth)


def task_rows(
    name: str,
    words: Words,
    split: str,
    rows: Sequence[int] | np.ndarray,
    n: int,
    *,
    seed: int = 0,
    block_size: int = 32,
    depth: float | None = None,
    horizon: int = 0,
    **options,
) -> TaskBatch:
    """Rows of one task with a history of exactly n tokens, one question each; `rows` are row numbers.

    depth in [0, 1] where the answer lies (None: anywhere); horizon: tokens after n, at least the answer's (0: as many);
    options: fields of the task. What is behind the answer is bos and never counts. UserError for what does not fit.
    """
    task = task_named(name, **options)
    horizon = horizon or task.answer_tokens
    if n % block_size or horizon < task.answer_tokens or (depth is not None and not 0 <= depth <= 1):
        raise UserError(
            f"rows of {name} with n={n}, horizon={horizon}, depth={depth}: n is a multiple of the block "
            f"({block_size}), the answer takes "
            f"{task.answer_tokens} tokens, depth is in [0, 1]"
        )
    m = n - task.question_tokens
    if m < 2:
        raise UserError(f"a history of n={n} tokens has no room for a question of {task.question_tokens} and a context")
    tokens = np.full((len(rows), n + horizon), words.bos, dtype=np.int64)
    targets, examples = np.full_like(tokens, -1), []
    for i, row in enumerate(rows):
        made = make_context(task, name, words, split, row, m, 1, seed, block_size, depth)
        answer, counted = made.answers[-1], made.counted[-1]
        tokens[i, : n + len(answer)] = np.concatenate([made.tokens, made.asked[-1], made.prefix[-1], answer])
        targets[i, n - 1 : n - 1 + len(answer)] = np.where(counted, answer, -1)
        text = words.tokenizer.decode
        evidence = tuple(sorted(made.evidence[-1].tolist()))
        examples.append(
            Example(
                text(made.tokens),
                text(made.asked[-1]),
                text(made.prefix[-1]),
                text(answer),
                len(answer),
                name,
                n,
                evidence[0] / m if evidence else None,
                tuple(text([t]) for t in answer[counted]),
                evidence,
            )
        )
    return TaskBatch(tokens, targets, n, examples)
