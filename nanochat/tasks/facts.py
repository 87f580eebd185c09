"""Facts in real text: notes of key-value pairs stand between the lines of code and prose, and the row ends with
questions that call each key by another name.

A row is `[text with notes][episode][text][episode]...[text][episode][one more alias]`, its text a piece of one
document. A note is a line of `facts` pairs (key, value); all keys of a row are different, and all of its notes have the
same values in different orders. An episode is about one note: half of its facts are announced, the other half asked
for, as pairs (alias, value). So what is asked for is announced, no word of the announcement tells one note from the
others, and a note may straddle the edge of a block. The text is learned, too: every one of its tokens is a target.

Every row is a function of (seed, split, row number) and the text alone.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanochat.common import UserError
from nanochat.tasks.recall import RecallTask
from nanochat.tokenizer import Tokenizer

LEAD, END = "\n#", "\n"  # around the facts of a note
PAUSE = 32  # tokens of text before each episode but the first


class FactRows(NamedTuple):
    tokens: np.ndarray  # int64 [B, T + 1]
    mask: np.ndarray  # bool [B, T + 1]: tokens that count as targets: text, and values that are asked for
    asked: np.ndarray  # bool [B, T + 1]: of these the values
    note_at: np.ndarray  # int64 [B]: where the note of the last episode begins


@dataclass(frozen=True)
class FactTask:
    """`names`: the map from alias to key, and the draws, are those of recall with the same seed. Lengths in tokens."""

    names: RecallTask
    lead: tuple[int, ...]
    end: tuple[int, ...]
    notes: int = 12
    facts: int = 12
    episodes: int = 4

    def __post_init__(self):
        if self.facts < 2 or self.facts % 2:
            raise UserError(f"facts in text: a note of {self.facts} facts; half are announced, so an even number")
        if not 1 <= self.episodes <= self.notes or self.notes * self.facts > len(self.names.keys):
            raise UserError(f"facts in text: {self.notes} notes of {self.facts} facts need as many different keys; "
                            f"there are {len(self.names.keys)}")

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer, seed: int, notes: int) -> "FactTask":
        names = RecallTask.for_tokenizer(tokenizer, seed=seed)
        return cls(names, tuple(tokenizer.encode(LEAD)), tuple(tokenizer.encode(END)), notes)

    @property
    def note_tokens(self) -> int:
        return len(self.lead) + 2 * self.facts + len(self.end)

    @property
    def episode_tokens(self) -> int:
        return 2 * self.facts

    @property
    def ending(self) -> int:
        """Tokens from the first episode on."""
        return self.episodes * self.episode_tokens + (self.episodes - 1) * PAUSE

    def text_tokens(self, T: int) -> int:
        """Tokens of text in a row of T tokens. UserError when it is too short."""
        left = T - self.notes * self.note_tokens - self.ending
        if left <= self.notes:
            raise UserError(f"rows of {T} tokens: {self.notes} notes of {self.note_tokens} tokens and {self.ending} of "
                            f"questions leave {left} for text; use fewer or longer rows")
        return left + (self.episodes - 1) * PAUSE

    def rows(self, split: str, indices: np.ndarray, text: np.ndarray, ends_line: np.ndarray, T: int) -> FactRows:
        """Rows of T + 1 tokens. indices int64 [B]; text int64 [B, text_tokens(T)]; ends_line bool [vocabulary]: notes
        stand behind such tokens, as far as the text has them."""
        n, bits = self.names, self.names._bits
        B = len(indices)
        flat = np.argsort(bits(split, "fact keys", indices, len(n.keys)), axis=1)[:, :self.notes * self.facts]
        keys = flat.reshape(B, self.notes, self.facts)
        # every note of a row has the same values in another order: what is announced tells no note by its values
        pool = np.argsort(bits(split, "fact pool", indices, len(n.values)), axis=1)[:, :self.facts]
        order = np.argsort(bits(split, "fact values", indices, self.notes, self.facts), axis=2)
        values = n.values.start + np.take_along_axis(pool[:, None], order, axis=2)
        pairs = np.stack([n.keys.start + keys, values], axis=-1).reshape(B, self.notes, -1)
        around = [np.broadcast_to(np.array(part, dtype=np.int64), (B, self.notes, len(part)))
                  for part in (self.lead, self.end)]
        notes = np.concatenate([around[0], pairs, around[1]], axis=2)

        # behind which tokens of the text notes stand: line ends first, in random order
        N, rows = text.shape[1] - (self.episodes - 1) * PAUSE, np.arange(B)[:, None]
        draw = bits(split, "note places", indices, N) >> np.uint64(2)
        order = np.argsort(draw + np.where(ends_line[text[:, :N]], 0, 1 << 62).astype(np.uint64), axis=1)
        after = np.sort(order[:, :self.notes], axis=1)
        note_at = after + 1 + np.arange(self.notes) * self.note_tokens
        tokens, mask, asked = (np.zeros((B, T + 1), dtype) for dtype in (np.int64, bool, bool))
        before = (after[:, None, :] < np.arange(N)[:, None]).sum(2)  # notes before each token of text
        place = np.arange(N) + before * self.note_tokens
        tokens[rows, place], mask[rows, place] = text[:, :N], True
        spots = (note_at[:, :, None] + np.arange(self.note_tokens)).reshape(B, -1)
        tokens[rows, spots] = notes.reshape(B, -1)

        # each episode is about another note
        chosen = np.argsort(bits(split, "fact notes", indices, self.notes), axis=1)[:, :self.episodes]
        fact = np.argsort(bits(split, "fact order", indices, self.episodes, self.facts), axis=2)
        called = np.stack([n.alias_of_key[keys[rows[..., None], chosen[..., None], fact]],
                           values[rows[..., None], chosen[..., None], fact]], axis=-1)
        pauses = text[:, N:].reshape(B, self.episodes - 1, PAUSE)
        pauses = np.concatenate([pauses, np.empty((B, 1, PAUSE), dtype=np.int64)], axis=1)  # none behind the last
        ending = np.concatenate([called.reshape(B, self.episodes, -1), pauses], axis=2).reshape(B, -1)[:, :self.ending]
        inside = np.arange(self.ending) % (self.episode_tokens + PAUSE)
        is_value = (inside < self.episode_tokens) & (inside % 2 == 1)
        tokens[:, T - self.ending:T] = ending
        tokens[:, T:] = n._extra_alias(split, indices)
        # a value that was announced is a target like one that is asked for: both can be known from the note
        mask[:, T - self.ending:T] = is_value | (inside >= self.episode_tokens)
        asked[:, T - self.ending:T] = is_value & (inside >= self.facts)
        return FactRows(tokens, mask, asked, np.take_along_axis(note_at, chosen[:, -1:], axis=1)[:, 0])
