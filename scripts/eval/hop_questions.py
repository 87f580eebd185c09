"""Questions of two hops put to a session: what is gained by looking again once the first answer is written.

A chain is three tokens: an alias, the alias that stands at its key, the value that stands at the key of that one
(`nanochat.tasks.hops`). The session is told the first, and writes the other two itself; right is who writes both.

    refocused    the session chooses anew what it shows before each token
    once         it chooses when it has read the question, and not again
    oracle       it is told which two blocks hold the chain
    window       the base alone on the last W tokens
    full         the base on everything

Shapes: N tokens, B rows.
"""

import numpy as np
import torch
from torch import Tensor

from mc.session.session import SessionPool
from mc.store.ram import Store
from nanochat.gpt import GPT
from nanochat.tasks.hops import CHAIN, HopTask
from scripts.eval.stream import KnownBlocks, store_of

SYSTEMS = ("refocused", "once", "oracle", "window", "full")


def write_chain(pool: SessionPool, store: Store, said_N: Tensor, known: list[int] | None = None) -> list[int]:
    """The two tokens that a session on a copy of the store writes after `said`. known: blocks it is told to show."""
    session = pool.open(store.snapshot())
    try:
        if known is not None:
            session.search = KnownBlocks(session.search, known)
        session.append(said_N)
        return list(session.generate(CHAIN - 1, temperature=0))
    finally:
        session.close()


@torch.inference_mode()
def base_writes(gpt: GPT, context_N: Tensor, chain_N: Tensor, first: int) -> bool:
    """Whether the base, on the tokens from place `first` on, writes the rest of the chain
    that begins after `context`."""
    tokens = torch.cat([context_N, chain_N[:-1]])
    hidden = gpt.hidden(tokens[None, first:], positions=torch.arange(first, len(tokens)),
                        lift_windows=True)[0, 1 - CHAIN:]
    return bool((gpt.logits(hidden).argmax(-1) == chain_N[1:]).all())


def ask_chains(pools: dict[str, SessionPool], task: HopTask, blocks: int, count: int,
               announced: int) -> dict[str, np.ndarray]:
    """System -> float64 [count], 1 where both tokens were right. Each history stores `blocks` blocks;
    `announced` chains of the same two
    blocks are read before the question: 0, and nothing but the first answer tells where the second is.

    pools: "refocused" and "once", sessions of the same model that refocus before each token,
    and not again after a question.
    """
    n = blocks * task.block
    made = task.rows("val", np.arange(count), blocks, n + task.episode)
    right = {system: np.zeros(count) for system in SYSTEMS}
    for i, (row, where) in enumerate(zip(torch.from_numpy(made.tokens), made.episode_blocks.tolist())):
        history, said = row[:n], row[n:n + CHAIN * announced + 1]
        chain = row[n + CHAIN * announced:][:CHAIN]
        store, context = store_of(pools["once"], history), row[:n + CHAIN * announced]
        for system, known in (("refocused", None), ("once", None), ("oracle", where)):
            pool = pools["refocused" if system == "refocused" else "once"]
            right[system][i] = write_chain(pool, store, said, known) == chain[1:].tolist()
        gpt, window = pools["once"].gpt, pools["once"].focus_config.budget
        right["window"][i] = base_writes(gpt, context, chain, max(len(context) + 1 - window, 0))
        right["full"][i] = base_writes(gpt, context, chain, 0)
    return right
