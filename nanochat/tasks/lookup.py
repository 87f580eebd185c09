"""Tasks whose answers stand somewhere in the context: `name value` facts among others, in
text, or in a repeated phrase.

Names are keys. In a fact the value follows its name directly, and so it does in a question: `?name …
=name` is continued by the value.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from nanochat.common import UserError
from nanochat.tasks.context import Context, draw_questions, place_statements
from nanochat.tasks.words import Words


def _background(haystack: str, rng: np.random.Generator, words: Words, m: int) -> np.ndarray:
    text = words.repeated(m - 1) if haystack == "phrase" else words.running(rng, m - 1)
    return np.concatenate([[words.bos], text])


def _write(tokens: np.ndarray, starts: np.ndarray, before: np.ndarray, bodies: np.ndarray,
           after: np.ndarray) -> np.ndarray:
    """Write statements `before body after` into tokens [m]: bodies int64 [count, b] at starts [count];
    the bodies' places, [count]."""
    statements = np.concatenate([np.tile(before, (len(starts), 1)), bodies, np.tile(after, (len(starts), 1))], axis=1)
    tokens[starts[:, None] + np.arange(statements.shape[1])] = statements
    return starts + len(before)


@dataclass(frozen=True)
class Lookup:
    """Facts of a name and `length` values. With `pairs` the context is all facts, else `facts` of
    them stand in text or a phrase.

    updates: each name gets a value so many times and the last one counts; values: each name has so many, and all are
    asked for, in the order of their numbers. queries: names in a question, whose facts
    stand in at most `spread` blocks.
    """

    one_question: ClassVar[bool] = False
    haystack: str = "pairs"  # "pairs", "text" or "phrase"
    facts: int = 0
    statement: str = ""  # words before a fact in text
    queries: int = 1
    spread: int | None = 2
    length: int = 1
    updates: int = 1
    values: int = 1
    alias: bool = False  # questions call each key by its alias
    copied: bool = False  # what is asked for are aliases, of which there are many, not values
    # in text: a fact's name ends a block and its value begins the next; in pairs: only such facts are asked for
    straddle: bool = False
    mark: str = "?"

    def __post_init__(self):
        if self.haystack not in ("pairs", "text", "phrase") or min(self.queries, self.length, self.updates,
                                                                   self.values) < 1:
            raise UserError(
                f"a lookup in {self.haystack!r} with queries={self.queries}, length={self.length}, "
                f"updates={self.updates}, "
                f"values={self.values}"
            )
        if (self.length > 1) + (self.updates > 1) + (self.values > 1) > 1 or (self.haystack
                                                                              == "pairs") != (self.facts == 0):
            raise UserError(
                "a lookup has long values, or updates, or several values of a name, not two of these; facts are "
                "counted in text only"
            )
        if self.haystack == "pairs" and self.length > 1:
            raise UserError("facts that make up the whole context are pairs: length=1")

    @property
    def question_tokens(self) -> int:
        return 1 + self.queries + 2

    @property
    def answer_tokens(self) -> int:
        return self.queries * self.length * self.values + self.queries - 1

    def for_training(self, rng: np.random.Generator, words: Words, m: int) -> tuple["Lookup", int]:
        copies = self.updates * self.values
        if self.haystack == "pairs":
            facts = min((m - 2) // 2 // copies, len(words.keys) // 2)
            return replace(self, straddle=False), max(1, facts // self.queries)
        size = len(words.encode(self.statement)) + 2 + self.length
        facts = max(self.queries, min((m - 1) // (2 * size * copies), 32) >> int(rng.integers(3)))
        return replace(self, facts=facts, spread=None, straddle=False), facts // self.queries

    def make(self, rng: np.random.Generator, words: Words, m: int, asks: int, block_size: int,
             depth: float | None = None) -> Context:
        starts, at = self._places(rng, words, m, block_size, depth)
        if len(at) > len(words.keys) or not len(at):
            raise UserError(f"a context of {m} tokens with {len(at)} facts: at least one, and at most the "
                            f"{len(words.keys)} names")
        names = rng.permutation(len(words.keys))
        given = self._given(rng, words, len(at))
        tokens, fact_at = self._written(rng, words, m, starts, at, names, given)
        askable = np.arange(len(at))
        if self.straddle:
            askable = askable[(fact_at[:, -1] + 1) % block_size == 0]
            if not len(askable):
                raise UserError(f"no fact straddles an edge of a block in a context of {m} tokens")
        needed = fact_at[:, -1] if self.updates > 1 else fact_at[:, 0]
        if self.values > 1 and depth is not None:  # whichever of its values is nearest
            needed = np.take_along_axis(fact_at, np.abs(fact_at - depth * m).argmin(1)[:, None], axis=1)[:, 0]
        spread = None if self.straddle else self.spread  # at most one fact straddles an edge
        picked = askable[draw_questions(rng, needed[askable], block_size, asks, self.queries, spread, depth, m)]
        return self._ask(words, names, given, fact_at, picked, tokens)

    def _places(
        self, rng: np.random.Generator, words: Words, m: int, block_size: int, depth: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where statements begin, int64 [S] (pairs: in order), and which of them are each fact's, int64
        [facts, copies] in their order."""
        copies = self.updates * self.values
        if self.haystack == "pairs":
            starts = np.arange(1 if self.straddle else 2, m - 1, 2)
            count = min(len(starts) // copies, len(words.keys))
            if count * copies < len(starts) and count > len(words.keys) // 2:
                count = len(words.keys) // 2  # the other names fill the rest of the context, again and again
            return starts, np.sort(rng.permutation(len(starts))[: count * copies].reshape(count, copies), axis=1)
        before = len(words.encode(self.statement))
        size = before + 1 + self.length + len(words.encode("."))
        starts = place_statements(rng, m, self.facts * copies, size, block_size, depth, before + 1 if self.straddle
                                  else None)
        # the first statement, at `depth`, is one of the first fact's
        at = np.arange(self.facts * copies).reshape(self.facts, copies)
        return starts, np.take_along_axis(at, np.argsort(starts[at], axis=1), axis=1)

    def _given(self, rng: np.random.Generator, words: Words, count: int) -> np.ndarray:
        """int64 [facts, copies, length]: what is said of each fact's name, all of it different but for updates."""
        pool, need = words.aliases if self.copied else words.values, self.length * self.values
        if need > len(pool):
            raise UserError(f"{need} different values of a name, there are {len(pool)}")
        copies = self.updates * self.values
        drawn = rng.random((count, len(pool))).argsort(axis=1)[:, :need] if need > 1 else rng.integers(len(pool),
                                                                                                       size=(count,
                                                                                                             copies))
        return pool[drawn].reshape(count, copies, self.length)

    def _written(
        self, rng: np.random.Generator, words: Words, m: int, starts: np.ndarray, at: np.ndarray, names: np.ndarray,
        given: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The context, int64 [m], and where each fact's name stands in it, int64 [facts, copies]."""
        called = np.broadcast_to(words.keys[names[: len(at)], None, None], (*at.shape, 1))
        bodies = np.concatenate([called, given], axis=2).reshape(at.size, -1)
        if self.haystack == "pairs":
            tokens = np.full(m, words.bos, dtype=np.int64)
            if starts[-1] + 2 < m:
                tokens[-1] = words.encode(".")[0]
            spare = names[len(at) :] if len(at) < len(names) else names
            pairs = np.stack([words.keys[rng.choice(spare, len(starts))], rng.choice(words.values, len(starts))],
                             axis=1)
            pairs[at.ravel()] = bodies
            tokens[starts[0] : starts[-1] + 2] = pairs.ravel()
            return tokens, starts[at]
        tokens, ordered = _background(self.haystack, rng, words, m), np.empty_like(bodies)
        ordered[at.ravel()] = bodies
        return tokens, _write(tokens, starts, words.encode(self.statement), ordered, words.encode("."))[at]

    def _ask(
        self, words: Words, names: np.ndarray, given: np.ndarray, fact_at: np.ndarray, picked: np.ndarray,
        tokens: np.ndarray
    ) -> Context:
        called = (words.aliases if self.alias else words.keys)[names[picked]]  # [A, queries]
        if self.updates > 1:
            right, at = given[picked, -1:], fact_at[picked, -1:]
        else:
            right, at = given[picked], fact_at[picked]  # [A, queries, values, length], [A, queries, values]
        if self.values > 1:
            right = np.sort(right, axis=2)
        A, right = len(picked), right.reshape(len(picked), self.queries, -1)
        answers = np.concatenate([called[:, :, None], right], axis=2).reshape(A, -1)[:, 1:]
        counted = np.tile(np.arange(right.shape[2] + 1) > 0, self.queries)[1:]
        asked = np.concatenate([np.broadcast_to(words.encode(self.mark), (A, 1)), called], axis=1)
        prefix = np.stack([np.broadcast_to(words.encode("=")[0], A), called[:, 0]], axis=1)
        evidence = (at[..., None] + np.arange(1 + self.length)).reshape(A, -1)
        return Context(tokens, asked, prefix, answers, np.broadcast_to(counted, answers.shape), evidence,
                       np.zeros(len(tokens), dtype=bool))


@dataclass(frozen=True)
class Chain:
    """Variable tracking: `name value.`, `name₁ name.`, `name₂ name₁.` …; asked for the last name, the
    answer walks back to the value.

    With updates > 1 the value is given anew later and the last one counts, and a link comes before all of them:
    somebody takes an object, then moves. `objects`: the last name is an alias, the others are keys.
    """

    one_question: ClassVar[bool] = False
    hops: int = 1
    chains: int = 4
    updates: int = 1
    objects: bool = False
    statement: str = ""
    haystack: str = "text"
    mark: str = "@"

    @property
    def question_tokens(self) -> int:
        return 4

    @property
    def answer_tokens(self) -> int:
        return self.hops + 1

    @property
    def statements(self) -> int:
        return self.hops + self.updates

    def for_training(self, rng: np.random.Generator, words: Words, m: int) -> tuple["Chain", int]:
        chains = max(1, min((m - 1) // (2 * self.statements * (len(words.encode(self.statement)) + 3)),
                            16) >> int(rng.integers(3)))
        return replace(self, chains=chains), chains

    def make(self, rng: np.random.Generator, words: Words, m: int, asks: int, block_size: int,
             depth: float | None = None) -> Context:
        if depth is not None:
            raise UserError(f"the {self.hops + 1} statements of a chain stand in different places: it has no one depth")
        if self.chains * (self.hops + 1) > len(words.keys):
            raise UserError(f"{self.chains} chains of {self.hops + 1} names each: there are {len(words.keys)} names")
        before, after = words.encode(self.statement), words.encode(".")
        starts = place_statements(rng, m, self.chains * self.statements, len(before) + 2 + len(after), block_size,
                                  None, None)
        starts = np.sort(starts.reshape(self.chains, -1), axis=1)
        links, told = (
            (slice(self.updates, None), slice(0, self.updates)) if self.updates == 1
            else (slice(0, self.hops), slice(self.hops, None))
        )
        names = words.keys[rng.permutation(len(words.keys))[: self.chains * (self.hops + 1)]].reshape(self.chains, -1)
        if self.objects:
            names[:, -1] = words.aliases[rng.permutation(len(words.aliases))[: self.chains]]
        values = rng.choice(words.values, (self.chains, self.updates))
        bodies = np.empty((self.chains, self.statements, 2), dtype=np.int64)
        bodies[:, told, 0], bodies[:, told, 1] = names[:, :1], values
        bodies[:, links, 0], bodies[:, links, 1] = names[:, 1:], names[:, :-1]
        tokens = _background(self.haystack, rng, words, m)
        at = _write(tokens, starts.ravel(), before, bodies.reshape(-1, 2), after).reshape(self.chains, -1)
        needed = np.concatenate([at[:, links], at[:, told][:, -1:]], axis=1)

        picked = draw_questions(rng, needed[:, 0], block_size, asks, 1, None, None, m)[:, 0]
        top, mark = names[picked, -1:], np.broadcast_to(words.encode(self.mark), (asks, 1))
        answers = np.concatenate([names[picked, -2::-1], values[picked, -1:]], axis=1)
        prefix = np.concatenate([np.broadcast_to(words.encode("="), (asks, 1)), top], axis=1)
        evidence = (needed[picked][..., None] + np.arange(2)).reshape(asks, -1)
        return Context(
            tokens,
            np.concatenate([mark, top], axis=1),
            prefix,
            answers,
            np.ones_like(answers, dtype=bool),
            evidence,
            np.zeros(m, dtype=bool),
        )
