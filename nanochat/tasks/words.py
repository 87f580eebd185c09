"""The vocabulary that generated tasks are written in.

Names, their aliases and the values that are asked for are the tokenizer's reserved ids; marks are single punctuation
bytes; text that facts are hidden in consists of words that are one token each. So any sequence of these tokens, written
out as text and encoded again, gives the same tokens. Which alias means which key is part of the language: one
map for all seeds, to be learned.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nanochat.common import UserError, key_seed
from nanochat.tokenizer import Tokenizer

WORD = re.compile(rb" [a-z]{2,}")


@dataclass(frozen=True)
class Words:
    """text, phrase: int64 ids of whole words; `phrase` is what a repeated haystack repeats."""

    tokenizer: Tokenizer
    text: np.ndarray
    phrase: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer, corpus: np.ndarray) -> "Words":
        """corpus: int [N] ids of running text; only its whole words are used, in their order.
        UserError if there are too few."""
        whole = np.zeros(tokenizer.vocab_size, dtype=bool)
        words = [i for i in range(tokenizer.bos_id) if WORD.fullmatch(tokenizer.decode_bytes([i]))]
        whole[words] = True
        text = np.asarray(corpus, dtype=np.int64)
        text = text[whole[text]]
        if len(words) < 8 or len(text) < 8:
            raise UserError(
                f"tasks need text of whole words: the tokenizer has {len(words)} that are one token, the text "
                f"{len(text)}; at least 8 each"
            )
        if not (len(tokenizer.key_ids) >= 64 and len(tokenizer.alias_ids) == len(tokenizer.key_ids)
                and len(tokenizer.value_ids) >= 16):
            raise UserError(
                "tasks need at least 64 reserved keys, as many aliases, and 16 values; the tokenizer has "
                f"{len(tokenizer.key_ids)}, "
                f"{len(tokenizer.alias_ids)} and {len(tokenizer.value_ids)}"
            )
        return cls(tokenizer, text, np.array(words[:16], dtype=np.int64))

    @property
    def bos(self) -> int:
        return self.tokenizer.bos_id

    @cached_property
    def keys(self) -> np.ndarray:
        return np.array(self.tokenizer.key_ids, dtype=np.int64)

    @cached_property
    def aliases(self) -> np.ndarray:
        """int64: `aliases[i]` is another name of `keys[i]`."""
        rng = np.random.default_rng(key_seed("tasks", "aliases", len(self.keys)))
        return self.tokenizer.alias_ids.start + rng.permutation(len(self.keys))

    @cached_property
    def values(self) -> np.ndarray:
        return np.array(self.tokenizer.value_ids, dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """int64 ids of a mark, or of words that each begin with a space."""
        return np.array(self.tokenizer.encode(text), dtype=np.int64)

    def running(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count] words of the text from a random place on, which goes on at its beginning when it ends."""
        return self.text[(rng.integers(len(self.text)) + np.arange(count)) % len(self.text)]

    def repeated(self, count: int) -> np.ndarray:
        """int64 [count]: the phrase, over and over."""
        return np.resize(self.phrase, count)
