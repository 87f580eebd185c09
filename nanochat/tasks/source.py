"""Training rows of the tasks: one context, then one question and answer after another to the end of the row.

Recall forms only where a row has many answers, and sooner on short contexts: the length of the context follows a
curriculum, what it leaves is filled with questions, which repeat themselves only behind short contexts. Answers count
as targets (not the names that they repeat from their question); of contexts whose words are distributed in a way that
is the row's own, a share of the words as well.
"""

import numpy as np

from nanochat.common import UserError, key_seed
from nanochat.tasks.generated import TASKS, task_named
from nanochat.tasks.recall import CurriculumSchedule
from nanochat.tasks.words import Words

BLOCK = 32  # tokens in which the curriculum counts, and across which questions are grouped
TAIL = 64  # tokens of a row that every context leaves for questions
# share of the rows with long contexts that end with one question, as in use: what was asked before it misleads a lens
ALONE = 0.5


def parse_mix(text: str) -> dict[str, float]:
    """ "" (all tasks alike) or "mqar,alias=2,…": task -> its share of the rows. UserError for an unknown
    task or a share that is none."""
    mix: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, share = part.partition("=")
        try:
            mix[name] = float(share or 1)
        except ValueError:
            raise UserError(f"--data=tasks:…{part}: the share {share!r} is no number") from None
        if name not in TASKS or not 0 < mix[name] < np.inf:
            raise UserError(f"--data=tasks:…{part}: a task and a share above 0; tasks are {', '.join(TASKS)}")
    mix = mix or dict.fromkeys(TASKS, 1.0)
    return {name: share / sum(mix.values()) for name, share in mix.items()}


def most_blocks(T: int) -> int:
    """Blocks of the longest context of a row of T tokens."""
    return max(2, (T - TAIL) // BLOCK)


class TaskSource:
    """Rows of T + 1 tokens of a mix of tasks. With `total_rows` (all rows of the run) contexts grow by
    `schedule`, else all are full."""

    def __init__(
        self,
        mix: dict[str, float],
        words: Words,
        T: int,
        split: str,
        seed: int,
        schedule: CurriculumSchedule | None = None,
        total_rows: int | None = None,
    ):
        if (schedule is None) != (total_rows is None):
            raise ValueError("a curriculum needs the number of rows of the run, and the reverse")
        self.T, self._words, self._split, self._seed, self._schedule, self._total = T, words, split, seed, schedule, total_rows  # noqa: E501
        self._names, self._ends = list(mix), np.cumsum(list(mix.values()))
        for name in mix:
            self._row(0, name)  # refuses a T that is too short
        tasks = repr([(name, TASKS[name], share) for name, share in mix.items()])
        self.fingerprint = f"tasks-{key_seed(tasks, T, split, seed, len(words.text), repr(schedule), total_rows):016x}"
        self.summary = (
            f"{split}: rows of {T} tokens of {len(mix)} tasks ({', '.join(mix)}), contexts of up to {most_blocks(T)} "
            f"blocks of {BLOCK}"
        )

    def task_of(self, row: int) -> str:
        draw = np.random.default_rng(key_seed(self._seed, "task of row", self._split, int(row))).random()
        return self._names[min(int(np.searchsorted(self._ends, draw, side="right")), len(self._names) - 1)]

    def _row(self, row: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 [T + 1] and which of them count, bool [T + 1]."""
        blocks = most_blocks(self.T)
        if self._schedule is not None:
            blocks = int(self._schedule.num_blocks(min(row / self._total, 1.0), row)[0])
        rng = np.random.default_rng(key_seed(self._seed, "task rows", name, self._split, int(row)))
        task, most = task_named(name).for_training(rng, self._words, blocks * BLOCK)
        each = task.question_tokens + task.answer_tokens
        asks = (self.T + 1 - blocks * BLOCK) // each
        # asked again, a question is easy: good for a beginning only
        if 2 * blocks > most_blocks(self.T) or task.one_question:
            asks = 1 if rng.random() < ALONE else min(asks, most)
        if asks < 1:
            raise UserError(
                f"rows of {self.T} tokens: a context of {blocks * BLOCK} and one question of {name}, {each}, do not "
                "fit; use longer rows"
            )
        made = task.make(rng, self._words, self.T + 1 - asks * each, asks, BLOCK)
        questions = np.concatenate([made.asked, made.prefix, made.answers], axis=1)
        counted = np.concatenate([np.zeros((asks, task.question_tokens), dtype=bool), made.counted], axis=1)
        return np.concatenate([made.tokens, questions.ravel()]), np.concatenate([made.learnable, counted.ravel()])

    def row_tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        made = [self._row(int(row), self.task_of(row)) for row in rows]
        return np.stack([tokens for tokens, _ in made]), np.stack([counted for _, counted in made])

    def count_rows(self, limit: int) -> int:
        return limit
