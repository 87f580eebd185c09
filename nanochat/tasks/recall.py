"""Synthetic long-range recall: key-value blocks, then questions that call each key by another name.

A row is `[stored blocks][episode]...[episode][one more alias]`. A stored block holds block/2 pairs (key, value); all
keys of a row are different. An episode is about a few stored blocks: its *announce* part and its *ask* part are pairs
(alias, value) of those blocks, no pair twice, so that what is announced tells where the answers to what is asked lie.
The map from alias to key is drawn once from the seed and must be learned by the model: no
lexical search finds the block.

Every row is a function of (seed, split, row number) alone. Draws come from a counter-based generator (splitmix64), so
that a whole batch is made of array operations.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from nanochat.common import UserError, key_seed
from nanochat.tokenizer import Tokenizer

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al., 2014) on uint64 arrays; overflow wraps around as it should."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_bits(key: int, rows: np.ndarray, *shape: int) -> np.ndarray:
    """uint64 [B, *shape] of random bits for rows int64 [B]; a row's draws depend on (key, row) and its place only.

    The place is counted in C order, so a longer first axis of `shape` prolongs the draws without changing them.
    """
    state = _mix(np.uint64(key) + _mix(np.asarray(rows, dtype=np.int64).astype(np.uint64) + GOLDEN))
    places = np.arange(1, 1 + int(np.prod(shape)), dtype=np.uint64) * GOLDEN
    return _mix(state[:, None] + places).reshape(len(state), *shape)


def _uniform(bits: np.ndarray) -> np.ndarray:
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)


class RecallRows(NamedTuple):
    tokens: np.ndarray  # int64 [B, T + 1]
    mask: np.ndarray  # bool [B, T + 1]: the values that are asked for, the only answerable targets
    num_blocks: np.ndarray  # int64 [B]: stored blocks
    episode_blocks: np.ndarray  # int64 [B, E]: which blocks the last episode is about, ascending (ground truth)


class StreamRows(NamedTuple):
    tokens: np.ndarray  # int64 [B, n]: history
    questions: np.ndarray  # int64 [B, Q, episode]: announce part and ask part; every second token is a value


@dataclass(frozen=True)
class RecallTask:
    """Lengths in tokens. `keys`, `aliases` and `values` are the reserved ids of the tokenizer."""

    keys: range
    aliases: range
    values: range
    block: int = 32
    blocks: int = 32  # the most that a row may store
    episode_blocks: int = 2
    announce: int = 32
    ask: int = 32
    seed: int = 0

    def __post_init__(self):
        if len(self.keys) != len(self.aliases) or not self.values:
            raise UserError(
                f"recall needs as many aliases as keys, and values: {len(self.keys)} keys, {len(self.aliases)} "
                f"aliases, {len(self.values)} values"
            )
        for name in ("block", "announce", "ask"):
            size = getattr(self, name)
            if size % 2 or size < (0 if name == "announce" else 2):
                raise UserError(f"recall {name}={size}: it holds pairs, so an even number of tokens")
        if self.blocks * self.pairs_per_block > len(self.keys):
            raise UserError(
                f"recall with {self.blocks} blocks of {self.pairs_per_block} pairs needs "
                f"{self.blocks * self.pairs_per_block} "
                f"different keys, there are {len(self.keys)}; fewer blocks, or needle rows for longer histories"
            )
        if not 1 <= self.episode_blocks <= self.blocks:
            raise UserError(f"recall episode_blocks={self.episode_blocks}: between 1 and the {self.blocks} blocks")
        if self.episode > self.episode_blocks * self.block:
            raise UserError(
                f"a recall episode of {self.announce} + {self.ask} tokens asks for {self.episode // 2} pairs, "
                f"its {self.episode_blocks} blocks hold {self.episode_blocks * self.pairs_per_block}"
            )

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, **kwargs) -> "RecallTask":
        return cls(tokenizer.key_ids, tokenizer.alias_ids, tokenizer.value_ids, **kwargs)

    @property
    def pairs_per_block(self) -> int:
        return self.block // 2

    @property
    def episode(self) -> int:
        """Tokens of a whole episode."""
        return self.announce + self.ask

    @cached_property
    def alias_of_key(self) -> np.ndarray:
        """int64 [keys]: the alias id of each key (by its number). A bijection, the same in every split."""
        rng = np.random.default_rng(key_seed(self.seed, "recall", "aliases"))
        return self.aliases.start + rng.permutation(len(self.keys))

    def _bits(self, split: str, purpose: str, indices: np.ndarray, *shape: int) -> np.ndarray:
        return random_bits(key_seed(self.seed, "recall", split, purpose), indices, *shape)

    def _pairs(self, split: str, indices: np.ndarray, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Key numbers and value ids, int64 [B, num_blocks, pairs_per_block] each; keys of a row are all different."""
        shape = (len(indices), num_blocks, self.pairs_per_block)
        count = num_blocks * self.pairs_per_block
        keys = np.argsort(self._bits(split, "keys", indices, len(self.keys)), axis=1)[:, :count]
        values = self._bits(split, "values", indices, count) % np.uint64(len(self.values))
        return keys.reshape(shape), self.values.start + values.astype(np.int64).reshape(shape)

    def _store(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """int64 [B, num_blocks, block]: (key, value) pairs as tokens."""
        return np.stack([self.keys.start + keys, values], axis=-1).reshape(*keys.shape[:2], self.block)

    def _episodes(self, split, indices, keys, values, num_blocks, episodes, width, announced, asked):
        """Query tokens int64 [B, episodes, 2 (announced + asked)] and the blocks int64 [B,
        episodes, width] they are about.

        Episode 0 is the *last* of the row, so that its draws do not depend on how many come before it.
        """
        draw = _uniform(self._bits(split, "blocks", indices, episodes, self.blocks))[:, :, : keys.shape[1]]
        draw = np.where(np.arange(keys.shape[1]) < num_blocks[:, None, None], draw, 2.0)
        chosen = np.sort(np.argsort(draw, axis=2)[:, :, :width], axis=2)
        return self._questions(split, indices, keys, values, chosen, announced, asked), chosen

    def _questions(self, split, indices, keys, values, chosen, announced, asked):
        """int64 [B, episodes, 2 (announced + asked)]: pairs spread evenly over the blocks `chosen` [B,
        episodes, width] of each episode."""
        B, episodes, width = chosen.shape
        rows = np.arange(B)[:, None, None]
        order = np.argsort(self._bits(split, "pairs", indices, episodes, width, self.pairs_per_block), axis=3)
        pairs = order.swapaxes(2, 3).reshape(B, episodes, -1)[:, :, : announced + asked]  # round robin over blocks
        blocks = np.tile(chosen, self.pairs_per_block)[:, :, : announced + asked]
        part = (np.arange(announced + asked) >= announced).astype(np.float64)
        mixed = np.argsort(part + _uniform(self._bits(split, "order", indices, episodes, announced + asked)), axis=2)
        blocks, pairs = np.take_along_axis(blocks, mixed, axis=2), np.take_along_axis(pairs, mixed, axis=2)
        asked_tokens = np.stack([self.alias_of_key[keys[rows, blocks, pairs]], values[rows, blocks, pairs]], axis=-1)
        return asked_tokens.reshape(B, episodes, -1)

    def _extra_alias(self, split: str, indices: np.ndarray) -> np.ndarray:
        """int64 [B, 1]: the token after the last one, the start of a question that is not answered."""
        bits = self._bits(split, "extra", indices, 1)
        return self.aliases.start + (bits % np.uint64(len(self.aliases))).astype(np.int64)

    def rows(self, split: str, indices: np.ndarray, num_blocks: np.ndarray | int, T: int) -> RecallRows:
        """Rows of T + 1 tokens. indices int64 [B]; num_blocks int or int64 [B], from episode_blocks to blocks.

        The last ask part is [T − ask, T); the first episode is cut at its start to fit. UserError when T is odd or too
        short, or num_blocks out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        num_blocks = np.broadcast_to(np.asarray(num_blocks, dtype=np.int64), indices.shape)
        if num_blocks.min() < self.episode_blocks or num_blocks.max() > self.blocks:
            raise UserError(
                f"recall rows store {self.episode_blocks} to {self.blocks} blocks, asked for {num_blocks.min()} to "
                f"{num_blocks.max()}"
            )
        most = int(num_blocks.max())
        if T % 2 or T < most * self.block + self.episode:
            raise UserError(
                f"recall rows need an even T of at least {most} x {self.block} stored + {self.episode} episode tokens "
                f"= {most * self.block + self.episode}, got T={T}"
            )
        episodes = -(-(T - int(num_blocks.min()) * self.block) // self.episode)
        keys, values = self._pairs(split, indices, most)
        stored = self._store(keys, values).reshape(len(indices), -1)
        queries, chosen = self._episodes(
            split, indices, keys, values, num_blocks, episodes, self.episode_blocks, self.announce // 2, self.ask // 2
        )
        tokens = np.zeros((len(indices), T + 1), dtype=np.int64)
        tokens[:, T:] = self._extra_alias(split, indices)
        room = min(T, episodes * self.episode)
        tokens[:, T - room : T] = queries[:, ::-1].reshape(len(indices), -1)[:, -room:]
        place, end = np.arange(T + 1), (num_blocks * self.block)[:, None]
        tokens[:, : stored.shape[1]] = np.where(place[: stored.shape[1]] < end, stored, tokens[:, : stored.shape[1]])
        mask = (place >= end) & (place % 2 == 1)  # T is even: the extra alias is not among them
        return RecallRows(tokens, mask, num_blocks.copy(), chosen[:, 0])

    def needle_rows(self, split: str, indices: np.ndarray, filler: np.ndarray, n: int, needles: int = 1) -> RecallRows:
        """Histories of any length: `needles` blocks of pairs hidden in text, then one episode about some of them.

        filler: 1-D text token ids, cut at a random place for each row and repeated when shorter than n; n: history in
        tokens, a multiple of the block. A needle is a whole block of pairs, as in `rows`, at a random block of the
        history; the episode is about min(needles, episode_blocks) of them, and as much shorter as
        they hold fewer pairs (one needle
        of 16 pairs: 8 announced, 8 asked). Rows are n + episode + 1 tokens; `episode_blocks`
        are block numbers in the history.
        """
        indices, filler = np.asarray(indices, dtype=np.int64), np.asarray(filler)
        if not 1 <= needles <= self.blocks:
            raise UserError(f"{needles} needles: between 1 and the {self.blocks} that {len(self.keys)} keys allow")
        if n % self.block or n < needles * self.block:
            raise UserError(f"needle history n={n}: a multiple of the block ({self.block}) with room for {needles} "
                            "needles")
        if not len(filler):
            raise UserError("needle rows need filler text, got no tokens")
        width = min(needles, self.episode_blocks)
        announced = min(self.announce // 2, width * self.pairs_per_block // 2)
        asked = min(self.ask // 2, width * self.pairs_per_block - announced)
        keys, values = self._pairs(split, indices, needles)
        count = np.full(len(indices), needles)
        queries, chosen = self._episodes(split, indices, keys, values, count, 1, width, announced, asked)
        places = np.sort(np.argsort(self._bits(split, "needles", indices, n // self.block), axis=1)[:, :needles],
                         axis=1)
        start = (self._bits(split, "filler", indices, 1) % np.uint64(len(filler))).astype(np.int64)
        history = filler[(start + np.arange(n)) % len(filler)].astype(np.int64).reshape(len(indices), -1, self.block)
        history[np.arange(len(indices))[:, None], places] = self._store(keys, values)
        tokens = np.concatenate([history.reshape(len(indices), n), queries[:, 0], self._extra_alias(split, indices)],
                                axis=1)
        place = np.arange(tokens.shape[1])
        mask = np.broadcast_to((place >= n) & ((place - n) % 2 == 1), tokens.shape).copy()
        return RecallRows(tokens, mask, count, np.take_along_axis(places, chosen[:, 0], axis=1))

    def stream_rows(self, split: str, indices: np.ndarray, n: int, places: np.ndarray,
                    filler: np.ndarray | None = None) -> StreamRows:
        """Histories of n tokens with facts in chosen blocks, and one episode about each group of facts.

        places int64 [B, Q, episode_blocks]: the block numbers of the facts of each question; all facts of a row have
        different keys. The rest is text as in `needle_rows`, or without filler blocks of the same kind: pairs of the
        keys that no question is about, each occurring again and again with other values. UserError
        when facts or history do not fit.
        """
        indices, places = np.asarray(indices, dtype=np.int64), np.asarray(places, dtype=np.int64)
        B, Q, width = places.shape
        facts, blocks = Q * width, n // self.block
        if n % self.block or n < facts * self.block or places.min() < 0 or places.max() >= blocks:
            raise UserError(f"stream of n={n} tokens: a multiple of the block ({self.block}) that holds the blocks "
                            f"{places.min()} to {places.max()}")
        if width != self.episode_blocks or len(self.keys) - facts * self.pairs_per_block < self.pairs_per_block:
            raise UserError(f"a stream of {Q} questions about {width} blocks each, of {self.pairs_per_block} facts: "
                            "episodes are about "
                            f"{self.episode_blocks} blocks, and {len(self.keys)} keys must leave "
                            f"{self.pairs_per_block} that are not asked for")
        if any(len(set(row)) < facts for row in places.reshape(B, -1).tolist()):
            raise UserError("two facts of a stream stand in one block; give each its own place")
        keys, values = self._pairs(split, indices, facts)
        if filler is None:
            history = np.stack([self._distractors(split, index, blocks, row)
                                for index, row in zip(indices, keys.reshape(B, -1))])
        else:
            start = (self._bits(split, "filler", indices, 1) % np.uint64(len(filler))).astype(np.int64)
            history = np.asarray(filler)[(start + np.arange(n)) % len(filler)].astype(np.int64).reshape(B, blocks,
                                                                                                        self.block)
        history[np.arange(B)[:, None], places.reshape(B, -1)] = self._store(keys, values)
        chosen = np.broadcast_to(np.arange(facts).reshape(Q, width), places.shape)
        questions = self._questions(split, indices, keys, values, chosen, self.announce // 2, self.ask // 2)
        return StreamRows(history.reshape(B, n), questions)

    def _distractors(self, split: str, index: int, blocks: int, taken: np.ndarray) -> np.ndarray:
        """int64 [blocks, block]: pairs of random keys other than `taken`, different within
        a block, and random values."""
        free, made = np.setdiff1d(np.arange(len(self.keys)), taken), []
        for first in range(0, blocks, 4096):  # in pieces: a sort of all keys per block
            place = int(index) * 2**24 + np.arange(first, min(first + 4096, blocks))
            order = np.argsort(self._bits(split, "distractors", place, len(free)), axis=1)[:, : self.pairs_per_block]
            values = self._bits(split, "distractor values", place, self.pairs_per_block) % np.uint64(len(self.values))
            made.append(self._store(free[order][None], self.values.start + values.astype(np.int64)[None])[0])
        return np.concatenate(made)


@dataclass(frozen=True)
class CurriculumSchedule:
    """How many blocks a training row stores: few at first, for recall forms sooner on short rows.

    In the first `grow` share of training the number doubles in equal stages from `start` to `blocks`; afterwards half
    of the rows have `blocks`, a quarter each blocks/2 and blocks/4 (never fewer than `start`), drawn per row.
    """

    blocks: int = 32
    grow: float = 0.5
    start: int = 2
    seed: int = 0

    def __post_init__(self):
        if not (0.0 <= self.grow <= 1.0 and 1 <= self.start <= self.blocks):
            raise UserError(f"recall curriculum from {self.start} to {self.blocks} blocks over {self.grow} of training")

    def num_blocks(self, progress: np.ndarray | float, rows: np.ndarray | int) -> np.ndarray:
        """int64 [B]: blocks of global rows [B] at progress (share of training done, 0 to 1)."""
        rows = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        progress = np.broadcast_to(np.asarray(progress, dtype=np.float64), rows.shape)
        doublings = int(np.ceil(np.log2(self.blocks / self.start)))
        stages = np.array([self.start << i for i in range(doublings)] + [self.blocks])
        stage = (progress / max(self.grow, 1e-12) * len(stages)).astype(np.int64).clip(0, len(stages) - 1)
        sizes = np.maximum(np.array([self.blocks // 4, self.blocks // 2, self.blocks, self.blocks]), self.start)
        draw = random_bits(key_seed(self.seed, "recall", "curriculum"), rows, 1)[:, 0] % np.uint64(4)
        late = sizes[draw.astype(np.int64)]
        return np.where(progress < self.grow, stages[stage], late)
