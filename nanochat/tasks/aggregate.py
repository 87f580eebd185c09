"""Tasks whose answers stand nowhere: they follow from counts over the whole context, so that some blocks of it mislead.

One context has one question; in training, a share of the context's own tokens counts as targets, for their distribution
is the row's and what is asked for follows from it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from nanochat.common import UserError
from nanochat.tasks.context import Context
from nanochat.tasks.words import Words

def zipf_counts(total: int, kinds: int, power: float, top: int) -> np.ndarray:
    """int64 [kinds] counts ∝ (rank + 1)^−power that add up to `total`; the first top + 1 are all different.
    UserError if they cannot be."""
    weights = (np.arange(kinds) + 2.0) ** -power
    counts = np.floor(total * weights / weights.sum()).astype(np.int64)
    counts[: total - counts.sum()] += 1
    if not (np.diff(counts[: top + 1]) < 0).all() or (len(counts) > top + 1 and counts[top] < counts[top + 1 :].max()):
        raise UserError(f"{total} words are too few to tell the {top} most frequent of {kinds}; ask for longer rows")
    return counts


class _Aggregate:
    """What tasks with one question about the whole context have in common."""

    one_question: ClassVar[bool] = True
    question_tokens: ClassVar[int] = 2
    learnable: ClassVar[float]  # share of a context's tokens that count in training

    def _check(self, asks: int, depth: float | None) -> None:
        if asks != 1 or depth is not None:
            raise UserError(
                f"{type(self).__name__} asks one question about the whole context, which has no depth: asked for "
                f"{asks} at {depth}"
            )

    def _context(self, words: Words, tokens: np.ndarray, rng: np.random.Generator, mark: str,
                 answer: np.ndarray) -> Context:
        learnable = rng.random(len(tokens)) < self.learnable
        learnable[0] = False
        every, nowhere = np.ones((1, len(answer)), dtype=bool), np.zeros((1, 0), dtype=np.int64)
        return Context(tokens, words.encode(mark)[None], words.encode("=")[None], answer[None], every, nowhere,
                       learnable)


@dataclass(frozen=True)
class Frequent(_Aggregate):
    """RULER's frequent words: counts fall as a power of the rank; the answer is the most
    frequent ones, most frequent first."""

    learnable: ClassVar[float] = 1 / 4  # the words of a context are its counts: to predict them is to count
    top: int = 1
    power: float = 1.0

    @property
    def answer_tokens(self) -> int:
        return self.top

    def for_training(self, rng: np.random.Generator, words: Words, m: int) -> tuple["Frequent", int]:
        # where differences are large, to count is learned sooner
        return replace(self, power=self.power * 2 ** rng.uniform(0, 1.5)), 1

    def make(self, rng: np.random.Generator, words: Words, m: int, asks: int, block_size: int,
             depth: float | None = None) -> Context:
        self._check(asks, depth)
        kinds = min(len(words.values), (m - 1) // 8)
        counts = zipf_counts(m - 1, kinds, self.power, self.top) if kinds > self.top else None
        if counts is None:
            raise UserError(f"a context of {m} tokens is too short to tell the {self.top} most frequent words")
        ranked = words.values[rng.permutation(len(words.values))[:kinds]]
        tokens = np.concatenate([[words.bos], rng.permutation(np.repeat(ranked, counts))])
        return self._context(words, tokens, rng, "^", ranked[: self.top])


@dataclass(frozen=True)
class Common(_Aggregate):
    """RULER's common words: `top` words occur `ratio` times as often as any other; the answer is those, in
    the order of their numbers."""

    learnable: ClassVar[float] = 1 / 4
    top: int = 1
    ratio: float = 2.0

    @property
    def answer_tokens(self) -> int:
        return self.top

    def for_training(self, rng: np.random.Generator, words: Words, m: int) -> tuple["Common", int]:
        return replace(self, ratio=self.ratio * 2 ** rng.uniform(0, 2)), 1

    def make(self, rng: np.random.Generator, words: Words, m: int, asks: int, block_size: int,
             depth: float | None = None) -> Context:
        self._check(asks, depth)
        kinds = min(len(words.values), (m - 1) // 4)
        often = int((m - 1) * self.ratio / (kinds - self.top + self.top * self.ratio)) if kinds > self.top else 0
        rest = m - 1 - self.top * often
        seldom = -(-rest // max(1, kinds - self.top))  # of the others, the first few once less
        if often <= seldom:
            raise UserError(f"a context of {m} tokens is too short to tell the {self.top} common words")
        drawn = words.values[rng.permutation(len(words.values))[:kinds]]
        others = np.resize(drawn[self.top :], rest)
        tokens = np.concatenate([[words.bos],
                                 rng.permutation(np.concatenate([np.repeat(drawn[: self.top], often), others]))])
        return self._context(words, tokens, rng, "~", np.sort(drawn[: self.top]))


@dataclass(frozen=True)
class Topic(_Aggregate):
    """Latent topics: the words of a block belong to the block's topic, which one of `topics`
    most blocks share is asked for.

    Topic z is a range of the keys. With `words_ahead` the answer is so many words instead, each of a topic drawn as the
    blocks' are: what they are is chance, but how likely each topic is must be read off all blocks (language
    modelling: NLL is what counts).
    """

    learnable: ClassVar[float] = 1 / 32  # which word of a topic comes is chance: answers must not drown in it
    topics: int = 8
    power: float = 1.0
    words_ahead: int = 0

    @property
    def answer_tokens(self) -> int:
        return self.words_ahead or 1

    def for_training(self, rng: np.random.Generator, words: Words, m: int) -> tuple["Topic", int]:
        return replace(self, power=self.power * 2 ** rng.uniform(0, 1.5)), 1

    def make(self, rng: np.random.Generator, words: Words, m: int, asks: int, block_size: int,
             depth: float | None = None) -> Context:
        self._check(asks, depth)
        blocks = -(-m // block_size)
        each, kinds = len(words.keys) // self.topics, min(self.topics, max(2, blocks // 3))
        counts = zipf_counts(blocks, kinds, self.power, 1)
        ranked = rng.permutation(self.topics)[:kinds]
        # a block ahead, the first topic stays it where the last block is short
        topic_of_block = rng.permutation(np.repeat(ranked, counts))
        topic = np.repeat(topic_of_block, block_size)[:m]
        tokens = words.keys[topic * each + rng.integers(each, size=m)]
        tokens[0] = words.bos
        answer, mark = words.values[ranked[:1]], "&"
        if self.words_ahead:
            drawn = rng.choice(ranked, self.words_ahead, p=counts / counts.sum())
            answer, mark = words.keys[drawn * each + rng.integers(each, size=self.words_ahead)], "*"
        return self._context(words, tokens, rng, mark, answer)
