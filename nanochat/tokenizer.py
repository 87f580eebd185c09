"""Byte-pair tokenizer: trained by rustbpe, served by tiktoken, kept on disk as one JSON file (never a pickle).

Token ids, in order: the BPE tokens (the 256 bytes, then the merges), `<|bos|>`, and three contiguous ranges of
reserved ids that no text ever encodes to: keys, aliases and values of the synthetic recall task.
"""

import base64
import binascii
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterable, Sequence

import numpy as np
import tiktoken

from nanochat.common import UserError, base_dir
from nanochat.outputs import BASE_DIR, output_file, write_file

FORMAT = "megacontext-bpe-1"
# GPT-4's split, with numbers cut into pairs of digits: a small vocabulary has no room for triples.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TRAIN_HINT = "run: python -m scripts.tok_train"


@dataclass(frozen=True)
class Reserved:
    """How many ids the recall task gets; an alias is another name of a key, so there are as many as keys."""

    keys: int = 512
    aliases: int = 512
    values: int = 32


def tokenizer_dir() -> Path:
    return base_dir() / "tokenizer"


class Tokenizer:
    """Text <-> ids. `tokens[i]` is the byte string of BPE id i; its rank in merging is i as well."""

    def __init__(self, tokens: Sequence[bytes], pattern: str = SPLIT_PATTERN, reserved: Reserved = Reserved()):
        self._tokens, self._pattern, self.reserved = list(tokens), pattern, reserved
        self.bos_id = len(self._tokens)
        self.key_ids = range(self.bos_id + 1, self.bos_id + 1 + reserved.keys)
        self.alias_ids = range(self.key_ids.stop, self.key_ids.stop + reserved.aliases)
        self.value_ids = range(self.alias_ids.stop, self.alias_ids.stop + reserved.values)
        self.vocab_size = self.value_ids.stop  # BPE tokens and special ids together
        specials = {"<|bos|>": self.bos_id}
        for name, ids in (("key", self.key_ids), ("alias", self.alias_ids), ("value", self.value_ids)):
            specials |= {f"<|{name}_{i}|>": token_id for i, token_id in enumerate(ids)}
        self._encoding = tiktoken.Encoding(
            name=f"bpe-{self.bos_id}",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self._tokens)},
            special_tokens=specials,
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 2048, reserved: Reserved = Reserved()) -> "Tokenizer":
        """Learn `vocab_size` BPE tokens (256 bytes included, special ids not). UserError if `texts` are too few for that."""
        if vocab_size < 257:
            raise UserError(f"--vocab_size={vocab_size}: at least 257 (the 256 bytes and one merge)")
        import rustbpe  # needed here only: a trained tokenizer runs without it

        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator(iter(texts), vocab_size, pattern=SPLIT_PATTERN)
        tokens = [bytes(token) for token, _ in sorted(bpe.get_mergeable_ranks(), key=lambda item: item[1])]
        if len(tokens) != vocab_size:
            raise UserError(
                f"the text yields {len(tokens)} tokens, --vocab_size={vocab_size} asks for more; give more text or fewer tokens"
            )
        return cls(tokens, SPLIT_PATTERN, reserved)

    def _payload(self) -> dict:
        return {
            "format": FORMAT,
            "pattern": self._pattern,
            "reserved": asdict(self.reserved),
            "tokens": [base64.b64encode(token).decode() for token in self._tokens],
        }

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change with any id's meaning."""
        return hashlib.sha256(json.dumps(self._payload(), sort_keys=True).encode()).hexdigest()[:12]

    def save(self, directory: Path | str | None = None) -> Path:
        """Write `tokenizer.json` atomically into `directory` (default: `tokenizer_dir()`) and return its path."""
        path = Path(directory or tokenizer_dir()) / "tokenizer.json"
        write_file(output_file(path, flag=BASE_DIR), json.dumps(self._payload() | {"fingerprint": self.fingerprint}, indent=0))
        return path

    @classmethod
    def load(cls, directory: Path | str | None = None) -> "Tokenizer":
        """Read what `save` wrote. UserError when the file is missing or does not match its own fingerprint."""
        path = Path(directory or tokenizer_dir()) / "tokenizer.json"
        try:
            payload = json.loads(path.read_text(encoding="utf-8"))
            if payload["format"] != FORMAT:
                raise ValueError(f"format {payload['format']!r}, expected {FORMAT!r}")
            tokens = [base64.b64decode(token, validate=True) for token in payload["tokens"]]
            tokenizer = cls(tokens, payload["pattern"], Reserved(**payload["reserved"]))
            if tokenizer.fingerprint != payload["fingerprint"]:
                raise ValueError("contents do not match the fingerprint")
        except OSError as e:
            raise UserError(f"no tokenizer at {path} ({e.strerror}); {TRAIN_HINT}") from None
        except (ValueError, KeyError, TypeError, binascii.Error) as e:
            raise UserError(f"damaged tokenizer {path} ({type(e).__name__}: {e}); {TRAIN_HINT}") from None
        return tokenizer

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without bos. Names of special ids inside the text are plain text unless `special`."""
        return self._encoding.encode(text, allowed_special="all") if special else self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 2) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special ids appear by name, broken UTF-8 as U+FFFD."""
        return self._encoding.decode(list(ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of `ids`; special ids appear by name."""
        return self._encoding.decode_bytes(list(ids))

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes each id stands for, 0 for special ids (bits per byte = nats / ln 2 / bytes)."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        sizes[: self.bos_id] = [len(token) for token in self._tokens]
        return sizes
