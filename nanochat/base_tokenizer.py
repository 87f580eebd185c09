"""The tokenizer of a pretrained base, behind the calls of `nanochat.tokenizer.Tokenizer`, with its chat template.

Ids come from the `tokenizers` library, which reads the `tokenizer.json` that Hugging Face's models carry; bytes of an
id from its vocabulary, so that streamed text is whole characters. Chat templates run in jinja2's sandbox: they are
programs out of a file. Both libraries are imported here only.

Names of special tokens inside a text are plain text, inside a message of a chat too: nobody ends a turn by writing its
mark. (`transformers` lets them.)
"""

import datetime
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import numpy as np

from nanochat.common import UserError, one_line, optional_module, parse_json, whole_characters
from nanochat.tokenizer import MAX_PIECE, cut

Message = dict[str, str]  # role, content
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")  # what stands between the texts of a pretraining corpus
SPACE = "\u2581"  # of SentencePiece
# stands in a message for the name of a special token; private characters, which no template looks for
_MARK = "\ue0fe{}\ue0ff"
_MARKS = re.compile("\ue0fe(\\d+)\ue0ff")


def package(name: str) -> ModuleType:
    return optional_module(name, "--base", "pretrained")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a base says of its text: of a Hugging Face directory, or of the head of a GGUF file."""

    tokenizer: str  # text of a tokenizer.json
    template: str | None = None  # jinja
    names: tuple[tuple[str, str], ...] = ()  # bos_token, eos_token, … -> its text; what templates may name
    stop_ids: tuple[int, ...] = ()


def byte_of_character() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes: printable ones of Latin-1 stand for themselves, the others
    follow from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(moved)}


def place_to_cut(before: object) -> re.Pattern:
    """Where a text may come apart, by the `pre_tokenizer` of a tokenizer.json: no token reaches across, and none on
    either side is another for it. Nowhere, in a kind that is not known."""
    said = json.dumps(before)
    if json.dumps(r"\s*[\r\n]").strip('"') in said:  # a run of white space up to its last newline is one token
        return _AFTER_NEWLINE
    if '"ByteLevel"' in said and '"Split"' not in said:  # GPT-2: the last of a run stands alone, if no digit follows
        return _before_newline()
    return _NOWHERE


_AFTER_NEWLINE, _NOWHERE = re.compile(r"\n(?=\S)"), re.compile("(?!)")


@cache
def _before_newline() -> re.Pattern:
    """Numbers of any script are tokens before white space is looked at, where digits stand alone."""
    numbers = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if c.isnumeric())
    return re.compile(rf"(?=\n[^\s{numbers}])")


class BaseTokenizer:
    """Text <-> ids of a base. vocab_size: the model's, whose last ids may stand for nothing.

    UserError for what `tokenizers` cannot read, a kind of vocabulary whose bytes are not known, ids beyond the model's.
    """

    key_ids = alias_ids = value_ids = range(0)  # of the recall task, which these vocabularies have no ids for

    def __init__(self, files: TokenizerFiles, vocab_size: int, where: str):
        self.files, self.vocab_size, self.where = files, vocab_size, where
        try:
            plan = parse_json(files.tokenizer)
            self._added = {t["id"]: t for t in plan["added_tokens"]}
            self._kind = json.dumps(plan["decoder"], ensure_ascii=False)
            self._place = place_to_cut(plan["pre_tokenizer"])
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{where} is no tokenizer.json ({type(e).__name__}: {one_line(e)})") from None
        self._special, self._plain = self._read(), self._read()
        for tokenizer in (self._special, self._plain):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._plain.encode_special_tokens = True
        if (most := max(self._special.get_vocab(with_added_tokens=True).values(), default=0)) >= vocab_size:
            raise UserError(f"{where} has the id {most}, the model {vocab_size} ids: they do not belong together")
        if bad := [i for i in files.stop_ids if not 0 <= i < vocab_size]:
            raise UserError(f"{where} ends at id {bad[0]}, the model has {vocab_size} ids: they do not belong together")
        self.stop_ids = files.stop_ids or (self.bos_id,)
        self._bytes_of = self._decoder()

    def _read(self):
        try:
            return package("tokenizers").Tokenizer.from_str(self.files.tokenizer)
        except UserError:
            raise
        except Exception as e:  # the library has no type of its own
            raise UserError(f"{self.where} cannot be read ({one_line(e)})") from None

    @cached_property
    def bos_id(self) -> int:
        """What a text begins with: what the tokenizer itself puts first, or else what stood between the texts that the
        model was trained on, or else where it stops."""
        first = self._special.encode("a", add_special_tokens=True).ids[:1]
        if first and first[0] in self._added:
            return first[0]
        ends = [i for name in END_OF_TEXT if (i := self._special.token_to_id(name)) is not None]
        if not (ends or self.files.stop_ids):
            raise UserError(f"{self.where} names no token that a text begins or ends with")
        return (ends or list(self.files.stop_ids))[0]

    def _decoder(self) -> Callable[[str], bytes]:
        """What makes bytes of a token's name in the vocabulary."""
        if '"ByteLevel"' in self._kind:
            table = byte_of_character()
            return lambda token: bytes(table[c] for c in token) if all(c in table for c in token) else token.encode()
        if SPACE in self._kind:
            byte = re.compile("<0x([0-9A-F]{2})>")
            return lambda token: (bytes([int(m[1], 16)]) if (m := byte.fullmatch(token))
                                  else token.replace(SPACE, " ").encode())
        raise UserError(f"{self.where}: its decoder {one_line(self._kind, 60)} is not supported: byte-level BPE and "
                        "SentencePiece vocabularies are")

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change with any id's meaning."""
        return hashlib.sha256(self._special.to_str().encode()).hexdigest()[:12]

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`, nothing put before or behind. Names of special tokens inside the text are plain text unless
        `special`; half of a surrogate pair is read as U+FFFD."""
        tokenizer, text = self._special if special else self._plain, whole_characters(text)
        pieces = [text] if len(text) <= MAX_PIECE else self.cut([text])
        return [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]

    def cut(self, pieces: Iterable[str]) -> Iterator[str]:
        """The same text in pieces that have the tokens of the whole: cut where this tokenizer's pattern lets it. Where
        there is no such place for MAX_PIECE characters it is cut there, however it comes."""
        return cut(pieces, self._place)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 2) -> list[list[int]]:
        """The library takes its own threads (RAYON_NUM_THREADS)."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of `ids`; special ids appear by name, ids that stand for nothing as nothing."""
        return b"".join(self._id_bytes(i) for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, broken UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def _id_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]["content"].encode()
        token = self._special.id_to_token(token_id)
        return b"" if token is None else self._bytes_of(token)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes each id stands for, 0 for special ids."""
        return np.array([0 if self._added.get(i, {}).get("special") else len(self._id_bytes(i))
                         for i in range(self.vocab_size)], dtype=np.int32)

    # -- chat

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self.files.template is not None

    def prompt_ids(self, text: str) -> list[int]:
        """What a model is given to answer or to continue `text`: a chat of this one message, or without a chat template
        the text behind `bos_id`."""
        if self.chats:
            return self.chat_ids([{"role": "user", "content": text}])
        return [self.bos_id, *self.encode(text)]

    def chat_ids(self, messages: Sequence[Message], **values: object) -> list[int]:
        """Ids of a chat up to where the model's answer begins. values: what the template may read besides.

        UserError where the template refuses these messages.
        """
        names = sorted((t["content"] for t in self._added.values() if t["special"]), key=len, reverse=True)
        found, pattern = [], re.compile("|".join(map(re.escape, names)) or "(?!)")

        def hide(match: re.Match) -> str:
            found.append(match[0])
            return _MARK.format(len(found) - 1)

        hidden = [m | {"content": pattern.sub(hide, _MARKS.sub("\ufffd", m["content"]))} for m in messages]
        parts = _MARKS.split(self.chat_text(hidden, **values))
        return [i for at, part in enumerate(parts)
                for i in (self.encode(found[int(part)]) if at % 2 else self.encode(part, special=True))]

    def chat_text(self, messages: Sequence[Message], **values: object) -> str:
        """A chat as its template writes it, up to where the model's answer begins. UserError as `chat_ids`."""
        if self._template is None:
            raise UserError(f"{self.where} has no chat template")
        jinja2 = package("jinja2")
        try:
            return self._template.render(**{"messages": list(messages), "add_generation_prompt": True, "tools": None,
                                            "documents": None} | dict(self.files.names) | values)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError,
                RecursionError) as e:
            raise UserError(f"the chat template of {self.where} refuses these messages ({type(e).__name__}: "
                            f"{one_line(e)})") from None

    @cached_property
    def _template(self):
        if self.files.template is None:
            return None
        jinja2 = package("jinja2")
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: (
            json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys))
        environment.globals |= {"raise_exception": refuse,
                                "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
        try:
            return environment.from_string(self.files.template)
        except (jinja2.TemplateError, RecursionError) as e:
            raise UserError(f"the chat template of {self.where} is damaged ({one_line(e)})") from None
