"""What a model makes of histories far longer than its rows, through the inference session:
the same code that serves users.

Recall: facts are hidden at chosen distances in a stream, a question is appended, and the answers are scored. Each
question is put to a session of its own on a copy of the stream's store, so no question is in the history of another.

    lens     the session as it is
    oracle   the same session, told which blocks hold the answers: what is lost here is not the lens's fault
    window   the base alone on the last W tokens

Shapes: N tokens, A answers, Q questions about a stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mc.session.key_search import KeySearch
from mc.session.session import Session, SessionPool
from mc.store.history import History, store_format
from mc.store.ram import RamStore, Store
from nanochat.gpt import token_losses

CERTAIN = 1e3  # logit of a block that is known to be needed


@dataclass(frozen=True)
class Answer:
    """How the scored tokens of one question went."""

    nll: float  # nats, mean over them
    acc: float  # share of them predicted right
    lods: dict[int, int]  # entries of the working context by level, {} for a window
    omitted: int = 0  # tokens of the history in no entry


class KnownBlocks(KeySearch):
    """A search that finds the blocks it was told about, whatever the lens thinks of them."""

    def __init__(self, search: KeySearch, blocks: Sequence[int]):
        super().__init__(search.lens, search.read_keys)
        self.blocks = torch.as_tensor(sorted(blocks))
        self.grow(search.n_blocks)

    def top(self, tail_BTD: Tensor, cursor: int, m: int, also_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
        also_I = self.blocks if also_I is None else torch.cat([also_I, self.blocks]).unique()
        index, logits = super().top(tail_BTD, cursor, m, also_I)
        return index, logits + CERTAIN * torch.isin(index, self.blocks)


def store_of(pool: SessionPool, tokens_N: Tensor) -> RamStore:
    """A history in memory."""
    store = RamStore(store_format(pool.gpt, pool.mc))
    History(pool.gpt, pool.mc, store).append(tokens_N)
    return store


def ask(pool: SessionPool, store: Store, said_N: Tensor, scored_N: Tensor, counted_N: Tensor,
        known: Sequence[int] | None = None) -> Answer:
    """A session on a copy of the store is told `said`, refocuses, and reads `scored`; the
    tokens `counted` (bool) are judged.

    known: blocks that hold the answers (oracle focus).
    """
    session = pool.open(store.snapshot())
    try:
        if known is not None:
            session.search = KnownBlocks(session.search, known)
        session.append(said_N)
        logits = session.score(scored_N)
        return replace(judged(logits, scored_N, counted_N, shown_levels(session)), omitted=session.omitted_tokens)
    finally:
        session.close()


def shown_levels(session: Session) -> dict[int, int]:
    lods, counts = np.unique(session.focus.cut()[0], return_counts=True)
    return dict(zip(lods.tolist(), counts.tolist()))


@torch.inference_mode()
def ask_window(pool: SessionPool, history_N: Tensor, said_N: Tensor, scored_N: Tensor, counted_N: Tensor) -> Answer:
    """The base on the last W tokens before `scored`, at their own positions."""
    gpt, W = pool.gpt, pool.focus_config.budget
    end = len(history_N) + len(said_N)
    context = torch.cat([history_N[-W:], said_N])[-W:]
    ids = torch.cat([context, scored_N])[None].to(pool.device)
    positions = torch.arange(end - len(context), end + len(scored_N), device=pool.device)
    hidden = gpt.hidden(ids, positions=positions, lift_windows=True)[0, len(context) - 1:-1]
    return judged(gpt.logits(hidden), scored_N, counted_N, {})


def judged(logits_NV: Tensor, scored_N: Tensor, counted_N: Tensor, lods: dict[int, int]) -> Answer:
    logits, targets = logits_NV[counted_N], scored_N[counted_N].to(logits_NV.device)
    nll = token_losses(logits[None], targets[None]).mean()
    return Answer(float(nll), float((logits.argmax(-1) == targets).float().mean()), lods)
