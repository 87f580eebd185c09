"""A model with MegaContext under the lm-evaluation-harness: every request is a session, whose history
has no limit and is not cut."""

from typing import Iterator, Sequence

from torch import Tensor

from mc.session.session import SessionPool
from nanochat.tokenizer import Tokenizer
from nanochat.harness import HarnessLM


class SessionLM(HarnessLM):
    """`pool`: with room for one session."""

    def __init__(self, pool: SessionPool, tokenizer: Tokenizer, seed: int = 0):
        super().__init__(tokenizer, seed)
        self.pool, self.left_out = pool, 0  # requests of whose context some span had no entry

    def _open(self, context: Sequence[int]):
        session = self.pool.open(seed=self.seed)
        session.begin(context)
        return session

    def _close(self, session) -> None:
        self.left_out += session.omitted_tokens > 0
        session.close()

    def score(self, context: Sequence[int], tokens: Sequence[int]) -> Tensor:
        session = self._open(context)
        try:
            return session.score(tokens)
        finally:
            self._close(session)

    def continuation(self, context: Sequence[int], max_tokens: int, seed: int, **sampling) -> Iterator[int]:
        session = self._open(context)
        try:
            yield from session.generate(max_tokens, seed=seed, **sampling)
        finally:
            self._close(session)
