"""Byte-pair tokenizer: trained by rustbpe, served by tiktoken, kept on disk as one JSON file (never a pickle).

Token ids, in order: the BPE tokens (the 256 bytes, then the merges), `<|bos|>`, and three contiguous ranges of
reserved ids that no text ever encodes to: keys, aliases and values of the synthetic recall task.
"""

import base64
import binascii
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Iterable, Iterator, Sequence

import numpy as np
import tiktoken

from nanochat.common import UserError, base_dir, from_plain, one_line, parse_json, whole_characters
from nanochat.outputs import BASE_DIR, output_file, write_file

FORMAT = "megacontext-bpe-1"
# GPT-4's split, with numbers cut into pairs of digits: a small vocabulary has no room for triples.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TRAIN_HINT = "run: python -m scripts.tok_train"
MAX_PIECE = 1 << 24  # characters that are tokenized together at most, where a text offers no place to cut
LONG_RUN = 1 << 17  # blanks; the pattern engines' stacks overflow between 500,000 and 1,000,000
ENGINE_RUN = 1 << 20  # blanks that no engine takes at once, so that they may come apart: merging 10 million took 43 s
_PLACE = re.compile(r"\n(?=\S)")
# the pattern's \\s without CR, LF
BLANKS = "\t\v\f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"  # noqa: E501
_BLANKS = re.compile(f"[{BLANKS}]+")


def cut(pieces: Iterable[str], place: re.Pattern = _PLACE) -> Iterator[str]:
    """The same text in other pieces, which have the tokens of the whole: cut after a newline that no white space
    follows, where no token of the pattern reaches across. Where a text offers no such place for MAX_PIECE characters it
    is cut there, however it comes. place: where a tokenizer with another pattern lets a text be cut (at the match's
    end, which is known from two characters)."""
    rest = ""
    for piece in pieces:
        seen, rest = max(len(rest) - 1, 0), rest + piece
        start = end = 0  # of the next piece; the last place
        for match in place.finditer(rest, seen):
            if match.end() - start > MAX_PIECE and end > start:
                yield rest[start:end]
                start = end
            while match.end() - start > MAX_PIECE:
                yield rest[start : start + MAX_PIECE]
                start += MAX_PIECE
            end = match.end()
        if end > start:
            yield rest[start:end]
            start = end
        while len(rest) - start > MAX_PIECE:
            yield rest[start : start + MAX_PIECE]
            start += MAX_PIECE
        rest = rest[start:]
    if rest:
        yield rest


def long_runs(text: str) -> Iterator[range]:
    """The runs of LONG_RUN and more blanks that no line end follows. Looks at one
    character in LONG_RUN of other text."""
    begin, at = 0, LONG_RUN - 1
    while at < len(text):
        blanks = _BLANKS.match(text, at)
        if not blanks:
            at += LONG_RUN
            continue
        before = text[max(begin, at - LONG_RUN) : at]
        start = at - len(before) + len(before.rstrip(BLANKS))
        begin = blanks.end()
        if begin - start >= LONG_RUN and text[begin : begin + 1] not in ("\n", "\r"):
            yield range(start, begin)
        at = begin + LONG_RUN - 1


def trainable(text: str) -> Iterator[str]:
    """A text in pieces that the trainer's pattern engine can take: long runs of blanks come apart."""
    text, start = whole_characters(text), 0
    for run in long_runs(text):
        yield text[start : run.start]
        yield from (text[at : min(at + LONG_RUN, run.stop)] for at in range(run.start, run.stop, LONG_RUN))
        start = run.stop
    yield text[start:]


@dataclass(frozen=True)
class Reserved:
    """How many ids the recall task gets; an alias is another name of a key, so there are as many as keys."""

    keys: int = 512
    aliases: int = 512
    values: int = 32

    def __post_init__(self):
        if not all(0 <= count <= 1 << 20 for count in (self.keys, self.aliases, self.values)):
            raise UserError(f"reserved ids {self.keys}, {self.aliases}, {self.values}: from 0 to {1 << 20} of each")


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
        """Learn `vocab_size` BPE tokens (256 bytes included, special ids not). UserError if
        `texts` are too few for that."""
        if vocab_size < 257:
            raise UserError(f"--vocab_size={vocab_size}: at least 257 (the 256 bytes and one merge)")
        import rustbpe  # needed here only: a trained tokenizer runs without it

        bpe = rustbpe.Tokenizer()
        bpe.train_from_iterator((piece for text in texts for piece in trainable(text)), vocab_size,
                                pattern=SPLIT_PATTERN)
        tokens = [bytes(token) for token, _ in sorted(bpe.get_mergeable_ranks(), key=lambda item: item[1])]
        if len(tokens) != vocab_size:
            raise UserError(
                f"the text yields {len(tokens)} tokens, --vocab_size={vocab_size} asks for more; give more text or "
                "fewer tokens"
            )
        return cls(tokens, SPLIT_PATTERN, reserved)

    chats = False  # no chat template

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids at which an answer ends."""
        return (self.bos_id,)

    def cut(self, pieces: Iterable[str]) -> Iterator[str]:
        """The same text in pieces that have the tokens of the whole."""
        return cut(pieces)

    def prompt_ids(self, text: str) -> list[int]:
        """What a model is given to continue `text`."""
        return [self.bos_id, *self.encode(text)]

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
        write_file(output_file(path, flag=BASE_DIR), json.dumps(self._payload() | {"fingerprint": self.fingerprint},
                                                                indent=0))
        return path

    @classmethod
    def load(cls, directory: Path | str | None = None) -> "Tokenizer":
        """Read what `save` wrote. UserError when the file is missing or does not match its own fingerprint."""
        path = Path(directory or tokenizer_dir()) / "tokenizer.json"
        try:
            payload = parse_json(path.read_bytes())
            if payload["format"] != FORMAT:
                raise ValueError(f"format {payload['format']!r}, expected {FORMAT!r}")
            tokens = [base64.b64decode(token, validate=True) for token in payload["tokens"]]
            if len({*tokens}) < len(tokens) or not {*tokens} >= {bytes([i])
                                                                 for i in range(256)} or not (isinstance(payload["pattern"], str) and payload["pattern"]):  # noqa: E501
                # tiktoken would panic
                raise ValueError("its tokens are not different strings of bytes with every byte among them")
            tokenizer = cls(tokens, payload["pattern"], from_plain(Reserved, payload["reserved"], "reserved"))
            if tokenizer.fingerprint != payload["fingerprint"]:
                raise ValueError("contents do not match the fingerprint")
        except OSError as e:
            raise UserError(f"no tokenizer at {path} ({e.strerror}); {TRAIN_HINT}") from None
        except (ValueError, KeyError, TypeError, binascii.Error, UserError) as e:
            raise UserError(f"damaged tokenizer {path} ({type(e).__name__}: {one_line(e)}); {TRAIN_HINT}") from None
        return tokenizer

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, without bos. Names of special ids inside the text are plain text unless `special`.

        They are those of tiktoken, of a text that it can take (a run of some 500,000 blanks is too much for its pattern
        engine), and do not depend on how `cut` cut a text before; half of a surrogate pair is read as U+FFFD.
        """
        ids, pieces = [], [text := whole_characters(text)] if len(text) <= MAX_PIECE else cut([text])
        for piece in pieces:
            start = 0
            for run in long_runs(piece):
                # The pattern leaves a run's last blank to what follows, unless the text, or what lies
                # before a special name, ends there.
                last = run.stop == len(piece) or special and piece.startswith(self._special_names, run.stop)
                ids += self._encode(piece[start : run.start], special)
                start = run.stop if last else run.stop - 1
                size = LONG_RUN if len(run) > ENGINE_RUN else len(run)
                ids += [i for at in range(run.start, start, size)
                        for i in self._one_piece.encode_ordinary(piece[at : min(at + size, start)])]
            ids += self._encode(piece[start:], special)
        return ids

    def _encode(self, text: str, special: bool) -> list[int]:
        return self._encoding.encode(text, allowed_special="all") if special else self._encoding.encode_ordinary(text)

    @cached_property
    def _special_names(self) -> tuple[str, ...]:
        return tuple(self._encoding.special_tokens_set)

    @cached_property
    def _one_piece(self) -> tiktoken.Encoding:
        """The same tokens with a pattern that cuts nothing."""
        return tiktoken.Encoding(f"whole-{self.bos_id}", pat_str="(?s:.+)",
                                 mergeable_ranks={token: i for i, token in enumerate(self._tokens)}, special_tokens={})

    def encode_batch(self, texts: Sequence[str], num_threads: int = 2) -> list[list[int]]:
        with ThreadPoolExecutor(num_threads) as threads:  # tiktoken lets go of the interpreter's lock
            return list(threads.map(self.encode, texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special ids appear by name, broken UTF-8 as U+FFFD."""
        return self._encoding.decode(list(ids))

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of `ids`; special ids appear by name."""
        return self._encoding.decode_bytes(list(ids))

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes each id stands for, 0 for special ids (bits per
        byte = nats / ln 2 / bytes)."""
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        sizes[: self.bos_id] = [len(token) for token in self._tokens]
        return sizes
