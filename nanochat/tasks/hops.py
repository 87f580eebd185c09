"""Questions of two hops: a block of facts names keys of another block, and only there stand the values.

A row is `[stored blocks][episode]...[episode][one more alias]`. Half of the stored blocks hold links, pairs (key, alias
of a key of one other block, its partner), the others pairs (key, value) as in plain recall. A question is a chain of
three tokens: an alias that names a key of a link block; the alias that stands there; the value that stands at the key
which that one names. Who answers has written the middle token before knowing which block holds the last: unless an
earlier chain of the same blocks was read, the second block can be looked for only then.

An episode asks for every link of one block, in random order. Middle and last tokens are targets.
"""

from dataclasses import dataclass

import numpy as np

from nanochat.common import UserError
from nanochat.tasks.recall import RecallRows, RecallTask

CHAIN = 3  # tokens


@dataclass(frozen=True)
class HopTask(RecallTask):
    """Keys, aliases, values and blocks as in RecallTask; `announce`, `ask` and `episode_blocks` are not used."""

    def __post_init__(self):
        super().__post_init__()
        if self.blocks < 2:
            raise UserError(f"two hops need two blocks, not {self.blocks}")

    @property
    def episode(self) -> int:
        return CHAIN * self.pairs_per_block

    def rows(self, split: str, indices: np.ndarray, num_blocks: np.ndarray | int, T: int) -> RecallRows:
        """Rows of T + 1 tokens; indices int64 [B], num_blocks int or int64 [B], 2 to blocks.

        The last episode is [T − episode, T); the first is cut at its start to fit, and what it lacks is
        no target. `episode_blocks` of
        the result: the last episode's block of links, then of values. UserError when T is too
        short or num_blocks out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        num_blocks = np.broadcast_to(np.asarray(num_blocks, dtype=np.int64), indices.shape)
        if num_blocks.min() < 2 or num_blocks.max() > self.blocks:
            raise UserError(f"rows of two hops store 2 to {self.blocks} blocks, asked for {num_blocks.min()} to "
                            f"{num_blocks.max()}")
        B, most, P = len(indices), int(num_blocks.max()), self.pairs_per_block
        if T < most * self.block + self.episode:
            raise UserError(f"rows of two hops need T of at least {most} x {self.block} stored + {self.episode} "
                            "episode tokens "
                            f"= {most * self.block + self.episode}, got T={T}")
        rows, half = np.arange(B)[:, None], num_blocks[:, None] // 2
        keys, values = self._pairs(split, indices, most)
        draw = self._bits(split, "hop blocks", indices, self.blocks)[:, :most] >> np.uint64(1)
        draw[np.arange(most) >= num_blocks[:, None]] = np.iinfo(np.int64).max  # blocks that a row lacks come last
        order = np.argsort(draw, axis=1, kind="stable")  # the first half of them link to the second half, one to one
        rank = np.argsort(order, axis=1)
        partner = np.take_along_axis(order, np.minimum(rank + half, most - 1), axis=1)
        # of each link's key in the partner
        place = np.argsort(self._bits(split, "hop places", indices, most, P), axis=2)
        linked_keys, linked_values = (x[rows[..., None], partner[..., None], place] for x in (keys, values))
        second = np.where((rank < half)[..., None], self.alias_of_key[linked_keys], values)
        stored = self._store(keys, second).reshape(B, -1)

        episodes = -(-(T - int(num_blocks.min()) * self.block) // self.episode)
        asked = np.take_along_axis(order,
                                   (self._bits(split, "hops", indices,
                                               episodes) % half.astype(np.uint64)).astype(np.int64), axis=1)
        pairs = np.argsort(self._bits(split, "hop pairs", indices, episodes, P), axis=2)
        at = rows[..., None], asked[..., None], pairs
        chains = np.stack([self.alias_of_key[keys[at]], second[at], linked_values[at]],
                          axis=-1).reshape(B, episodes, -1)

        tokens, room = np.zeros((B, T + 1), dtype=np.int64), min(T, episodes * self.episode)
        tokens[:, T:] = self._extra_alias(split, indices)
        tokens[:, T - room:T] = chains[:, ::-1].reshape(B, -1)[:, -room:]
        place, end = np.arange(T + 1), (num_blocks * self.block)[:, None]
        tokens[:, :stored.shape[1]] = np.where(place[:stored.shape[1]] < end, stored, tokens[:, :stored.shape[1]])
        # the token that a target follows is a question's, too
        mask = (place > end) & (place < T) & ((T - place) % CHAIN > 0)
        return RecallRows(tokens, mask, num_blocks.copy(),
                          np.stack([asked[:, 0], partner[np.arange(B), asked[:, 0]]], 1))
