"""What a task makes of one random generator: a context and questions about it."""

from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from nanochat.common import UserError
from nanochat.tasks.words import Words

EPISODE = 12  # questions in a row that are about the same blocks


class Context(NamedTuple):
    """A context of m tokens and A questions about it, all int64 but where noted; a task's
    questions are equally long."""

    tokens: np.ndarray  # [m]
    asked: np.ndarray  # [A, q] question
    prefix: np.ndarray  # [A, p] answer prefix
    answers: np.ndarray  # [A, h]
    counted: np.ndarray  # bool [A, h]: answer tokens that are judged (a name repeated from the question is not)
    evidence: np.ndarray  # [A, e] places in the context of the tokens that the answer depends on; e = 0: on all of it
    learnable: np.ndarray  # bool [m]: tokens of the context that are worth predicting in training


class Task(Protocol):
    """A kind of context with its questions. Everything random comes from the generator that `make` is given."""

    one_question: ClassVar[bool]  # a context has one question only, about all of it

    @property
    def question_tokens(self) -> int:
        """Tokens of question and answer prefix together."""

    @property
    def answer_tokens(self) -> int: ...

    def make(self, rng: np.random.Generator, words: Words, m: int, asks: int, block_size: int,
             depth: float | None = None) -> Context:
        """A context of m tokens that begins with bos, and `asks` different questions about
        it, the last one the one to keep.

        depth in [0, 1]: where in the context the answer to the last question lies (of several facts: one), as nearly as
        the task's layout allows. UserError when they do not fit, or the task knows no such place.
        """

    def for_training(self, rng: np.random.Generator, words: Words, m: int) -> tuple["Task", int]:
        """A variant of the task for a training row with a context of about m tokens, and how many
        questions it can be asked at most."""


def place_statements(rng: np.random.Generator, m: int, count: int, size: int, block_size: int, depth: float | None,
                     edge: int | None) -> np.ndarray:
    """int64 [count]: where `count` statements of `size` tokens begin in a context of m
    tokens, without overlap, behind bos.

    depth: place of the first one; the others are random. edge: each statement's token `edge` is the first of a block.
    UserError when they do not fit.
    """
    if edge is not None:
        first, stride = -(-(1 + edge) // block_size), -(-size // block_size)
        edges = np.arange(first, (m - size + edge) // block_size + 1)[int(rng.integers(stride)) :: stride] * block_size
        if len(edges) < count:
            raise UserError(f"{count} statements of {size} tokens that straddle edges of blocks of {block_size} do not "
                            f"fit {m} tokens")
        order = rng.permutation(len(edges))
        if depth is not None:
            nearest = int(np.abs(edges - depth * m).argmin())
            order = np.concatenate([[nearest], order[order != nearest]])
        return edges[order[:count]] - edge
    free = m - 1 - count * size
    if free < 0:
        raise UserError(
            f"{count} statements of {size} tokens do not fit a context of {m}; ask for fewer or for longer rows")
    cuts = rng.integers(0, free + 1, count)
    if depth is not None:
        cuts[0] = round(depth * free)
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(cuts, kind="stable")] = np.arange(count)
    return 1 + cuts + rank * size


def draw_questions(
    rng: np.random.Generator, places: np.ndarray, block_size: int, asks: int, queries: int, spread: int | None,
    depth: float | None, m: int
) -> np.ndarray:
    """int64 [asks, queries]: which facts each question is about; fact f stands at places[f]. None is asked
    for twice before each was once.

    `spread`: the facts of EPISODE questions in a row lie in at most so many blocks (None: anywhere). depth: the last
    question is about the facts nearest to that place. UserError when not even one question can be asked.
    """
    rounds, total = [], 0
    while total < asks:
        rounds.append(_round(rng, places, block_size, queries, spread, None if rounds else depth, m))
        total += len(rounds[-1])
        if not len(rounds[-1]):
            raise UserError(f"{len(places)} facts in a context of {m} tokens allow no question about {queries} of them "
                            f"in {spread} blocks")
    return np.concatenate(rounds)[:asks][::-1]


def _round(
    rng: np.random.Generator, places: np.ndarray, block_size: int, queries: int, spread: int | None,
    depth: float | None, m: int
) -> np.ndarray:
    """int64 [most questions, queries]: every fact at most once, the first question first; see `draw_questions`."""
    facts = len(places)
    far = np.abs(places - depth * m) if depth is not None else rng.random(facts)
    key_of_block = np.full(int(places.max()) // block_size + 1, np.inf)
    np.minimum.at(key_of_block, places // block_size, far)
    key = key_of_block[places // block_size]
    group = np.zeros(facts, dtype=np.int64) if spread is None else np.unique(key, return_inverse=True)[1] // spread
    order = np.lexsort((far, group))
    group = group[order]
    within = np.arange(facts) - np.searchsorted(group, group)
    episode, inside = np.divmod(within, queries * EPISODE)
    left = np.bincount(group)[group] - episode * queries * EPISODE
    kept = inside < np.minimum(left, queries * EPISODE) // queries * queries  # whole questions only
    picked = order[kept][np.lexsort((inside[kept], group[kept], episode[kept]))]
    return picked.reshape(-1, queries)
