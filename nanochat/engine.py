"""Text out of a base: batched prompts of different lengths, chunked prefill, one token a row a step.

Prompts are padded on the right and read in chunks of `prefill_chunk` through the KV cache, whose per-row lengths make
padding invisible; a row's result depends neither on the chunk size nor on the rows beside it. The cache holds the
longest prompt and what is generated, so memory grows with both; how far back attention looks is the
model's own bound (`Engine.reach`).

Shapes: B rows, S entries, D width, V vocabulary.
"""

import codecs
from typing import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.base import Base
from nanochat.base_tokenizer import BaseTokenizer
from nanochat.kv_cache import KVCache
from nanochat.tokenizer import Tokenizer


def sample(
    logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator, top_p: float = 1.0
) -> Tensor:
    """[B] int64 token ids; temperature 0 takes the likeliest token, top_k the k likeliest before drawing, and top_p of
    those the fewest that hold this much of the probability."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    values, ids = logits_BV.topk(min(top_k or logits_BV.shape[-1], logits_BV.shape[-1]))
    chances = (values / temperature).softmax(-1)
    if top_p < 1:
        chances = chances.masked_fill(chances.cumsum(-1) - chances >= top_p, 0)
    drawn = torch.multinomial(chances, 1, generator=generator)
    return ids.gather(1, drawn).squeeze(1)


def check_sampling(
    vocab_size: int, max_tokens: int, temperature: float, top_k: int | None, ids: Sequence[int], top_p: float = 1.0
) -> None:
    """UserError for settings of generation that make no sense, or an id outside the vocabulary."""
    if bad := [t for t in ids if not 0 <= t < vocab_size]:
        raise UserError(f"token id {bad[0]} is outside the vocabulary of {vocab_size}: tokenize with the model's own "
                        "tokenizer")
    if max_tokens < 1:
        raise UserError(f"max_tokens {max_tokens}: at least 1")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature {temperature}: 0 (likeliest token) or a positive number")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k {top_k}: at least 1, or leave it out to draw from all tokens")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p}: above 0, and 1 to draw from all tokens")


class Engine:
    """Generation from one model. `tokenizer` is needed by `complete` only."""

    def __init__(self, model: Base, tokenizer: Tokenizer | BaseTokenizer | None = None, prefill_chunk: int = 512):
        if prefill_chunk < 1:
            raise UserError(f"prefill_chunk {prefill_chunk}: at least 1 token")
        if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}: they "
                            "do not belong together")
        self.model, self.tokenizer, self.prefill_chunk = model, tokenizer, prefill_chunk
        self.device, self.dtype = model.lm_head.weight.device, model.lm_head.weight.dtype

    @property
    def reach(self) -> int:
        """Tokens before the current one that a layer sees at most; what lies further back
        acts only through later tokens."""
        return self.model.config.sequence_len

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int, *, temperature: float = 1.0,
                 top_k: int | None = None,
                 top_p: float = 1.0, seed: int = 0, stop_ids: Sequence[int] = ()) -> Iterator[list[int | None]]:
        """Yields, per step, each row's new token; None in rows that have stopped. A stop token is still yielded.

        Ends after `max_tokens` steps or when every row has stopped. Draws come from an
        own generator seeded with `seed`.
        UserError, before anything runs: no or empty prompts, ids outside the vocabulary, negative temperature, top_k <
        1, top_p outside (0, 1].
        """
        if not prompts or not all(len(p) for p in prompts):
            raise UserError("a prompt is empty: give each at least one token (bos, for text from nothing)")
        given = [t for ids in (*prompts, stop_ids) for t in ids]
        check_sampling(self.model.config.vocab_size, max_tokens, temperature, top_k, given, top_p)
        return self._stream(prompts, max_tokens, temperature, top_k, top_p, seed, frozenset(stop_ids))

    @torch.inference_mode()
    def _stream(self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float, top_k: int | None,
                top_p: float, seed: int, stop_ids: frozenset[int]) -> Iterator[list[int | None]]:
        generator = torch.Generator(self.device).manual_seed(seed)
        cache = KVCache(self.model.config, len(prompts), max(map(len, prompts)) + max_tokens, self.device, self.dtype)
        hidden_BD = self._prefill(prompts, cache)
        stopped = [False] * len(prompts)
        for step in range(max_tokens):
            tokens_B = sample(self.model.logits(hidden_BD), temperature, top_k, generator, top_p)
            ids = tokens_B.tolist()
            yield [None if done else token for done, token in zip(stopped, ids)]
            stopped = [done or token in stop_ids for done, token in zip(stopped, ids)]
            if all(stopped) or step == max_tokens - 1:
                return
            hidden_BD = self.model.hidden(tokens_B[:, None], cache=cache)[:, 0]

    def _prefill(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Tensor:
        """[B, D] hidden state of each prompt's last token."""
        lengths_B = torch.tensor([len(p) for p in prompts], device=self.device)
        longest = max(map(len, prompts))
        tokens_BS = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=self.device)
        last_BD = torch.zeros(len(prompts), self.model.config.n_embd, device=self.device, dtype=self.dtype)
        for start in range(0, longest, self.prefill_chunk):
            piece_BS = tokens_BS[:, start:start + self.prefill_chunk]
            size = piece_BS.shape[1]
            hidden_BSD = self.model.hidden(piece_BS, cache=cache, counts=(lengths_B - start).clamp(0, size))
            ends = ((lengths_B > start) & (lengths_B <= start + size)).nonzero().squeeze(1)
            last_BD[ends] = hidden_BSD[ends, lengths_B[ends] - 1 - start]
        return last_BD

    def complete(self, prompt: str, max_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
                 seed: int = 0) -> Iterator[str]:
        """Pieces of text that continue `prompt`, or answer it where the tokenizer has a chat template; whole characters
        only; ends at the tokenizer's `stop_ids`. UserError as `generate`."""
        stops = self.tokenizer.stop_ids
        steps = self.generate([self.tokenizer.prompt_ids(prompt)], max_tokens, temperature=temperature, top_k=top_k,
                              seed=seed, stop_ids=stops)
        return decode_stream(self.tokenizer, (token for (token,) in steps if token not in stops))


def decode_stream(tokenizer: Tokenizer | BaseTokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Pieces of text, whole characters only; put together they are what `tokenizer.decode` makes of all the tokens."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if text := decoder.decode(tokenizer.decode_bytes([token])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
