"""One question about one context, as text (the schema of kvpress), and as the rows of
tokens on which systems are judged.

A row is `[context | question | answer_prefix]`, a history of exactly n tokens, and then the answer. The question stands
at the end of the history, where focus reads it and where every working context is raw.
"""

import unicodedata
from dataclasses import asdict, dataclass
from typing import NamedTuple, Sequence

import numpy as np

from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Example:
    """`references`: what a right answer contains, each worth the same; with `any_reference` one of
    them suffices (RULER's `part`)."""

    context: str
    question: str
    answer_prefix: str
    answer: str
    max_new_tokens: int
    task: str
    length: int | None = None  # tokens of the history
    # where in the context the first token that is needed stands, in [0, 1); None: no such place
    depth: float | None = None
    references: tuple[str, ...] = ()
    # places in the history of the tokens that the answer depends on; none: on all of it, or not known
    evidence: tuple[int, ...] = ()
    any_reference: bool = False
    tags: tuple[str, ...] = ()  # what else is known of it, e.g. the kind of document

    def evidence_blocks(self, block_size: int) -> tuple[int, ...]:
        """Numbers of the blocks that hold the evidence, ascending."""
        return tuple(sorted({place // block_size for place in self.evidence}))

    def score(self, prediction: str) -> float:
        """RULER's score of a generated answer, in [0, 1]."""
        return ruler_score(prediction, self.references or (self.answer,), self.any_reference)

    def kvpress(self) -> dict:
        """The row of a kvpress data set, with our extra columns behind its five."""
        return asdict(self)


class TaskBatch(NamedTuple):
    """Rows of n + H tokens. `targets` are next tokens, −1 where none counts: targets[:, n−1 : n+H−1] are judged."""

    tokens: np.ndarray  # int64 [B, n + H]
    targets: np.ndarray  # int64 [B, n + H]
    n: int
    examples: list[Example]

    @property
    def depth(self) -> np.ndarray:
        """float64 [B], NaN where no place is needed more than another."""
        return np.array([np.nan if e.depth is None else e.depth for e in self.examples])


def history_of(example: Example, tokenizer: Tokenizer, most: int = 0) -> list[int]:
    """Tokens of context, question and answer prefix. most: of a longer history the middle of the context is left out,
    as LongBench does. UserError where question and prefix alone are too long."""
    whole = tokenizer.encode(example.context + example.question + example.answer_prefix, special=True)
    if not most or len(whole) <= most:
        return whole
    context, asked = (tokenizer.encode(text, special=True)
                      for text in (example.context, example.question + example.answer_prefix))
    room = most - len(asked)
    if room < 2:
        raise UserError(f"an example of {example.task} asks in {len(asked)} tokens, which leaves no context in a "
                        f"history of {most}")
    return context[: room // 2] + context[-(room - room // 2) :] + asked


def batch_of(examples: Sequence[Example], tokenizer: Tokenizer, block_size: int, most: int = 0) -> TaskBatch:
    """Examples as one batch: encoded with special tokens, padded on the left with bos to a common multiple of
    `block_size`, on the right (where nothing counts) to the longest answer. Every token of an answer counts. Examples
    whose lengths differ much are better batched apart. most: see `history_of`. UserError without
    examples or for an empty answer."""
    histories = [history_of(e, tokenizer, most) for e in examples]
    answers = [tokenizer.encode(e.answer, special=True) for e in examples]
    for example, answer in zip(examples, answers):
        if not answer:
            raise UserError(f"an example of {example.task} has an empty answer: there is nothing to judge")
    if not examples:
        raise UserError("no examples to make a batch of")
    n, H = -(-max(map(len, histories)) // block_size) * block_size, max(map(len, answers))
    tokens = np.full((len(examples), n + H), tokenizer.bos_id, dtype=np.int64)
    targets = np.full_like(tokens, -1)
    for row, (history, answer) in enumerate(zip(histories, answers)):
        tokens[row, n - len(history) : n] = history
        tokens[row, n : n + len(answer)] = answer
        targets[row, n - 1 : n - 1 + len(answer)] = answer
    return TaskBatch(tokens, targets, n, list(examples))


def _compared(text: str) -> str:
    return unicodedata.normalize("NFC", text.lower())


def ruler_score(prediction: str, references: Sequence[str], part: bool = False) -> float:
    """Share of the references that the prediction contains, whatever the case, the blanks around them or the way
    Unicode composes their letters; with `part` (questions with several right answers) 1.0 if it contains any. A
    reference without text counts for nothing: every prediction contains it. UserError without any other."""
    references = [text for reference in references if (text := _compared(reference.strip()))]
    if not references:
        raise UserError("an answer without references cannot be scored: each is missing or empty")
    found = [reference in _compared(prediction) for reference in references]
    return float(any(found)) if part else sum(found) / len(found)
