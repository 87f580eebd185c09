"""How well scores of blocks name what is worth showing: regret, hits, rank correlation, and
the scores that need no training.

    utility    of a block: NLL of the continuation when no block is shown − when this block
               alone is, in the working context
    regret     NLL under the cut that the scores choose − under the oracle's; never negative,
               for the oracle tries that cut too
    hit@k      share of the blocks that matter among the k best-scored (of k, where more matter than k)
    Spearman   of the scores with the utilities, over the blocks that focus may show or not

Shapes: B rows, N blocks, T tokens.
"""

from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mc.teachers import attention_mass
from nanochat.dataloader import RowSource
from nanochat.gpt import Captured
from nanochat.tasks.recall import RecallTask
from scripts.eval.agreement import hit_at, spearman
from scripts.eval.bm25 import bm25_scores
from scripts.eval.comparison import FocusComparison, Outcome

SCORES = ("lens", "random", "recency", "bm25", "tail_attention")  # what inference may use
CHEATS = ("next_attention", "next_gate")  # these have read the continuation


class Contexts(NamedTuple):
    """Held-out rows of n tokens of history and H of continuation."""

    tokens_BT: Tensor  # int64, T = n + H
    targets_BT: Tensor  # int64, next tokens, −1 where none counts
    matter_BN: Tensor | None  # bool: blocks that hold the answers, where that is known


def recall_contexts(task: RecallTask, blocks: int, rows: np.ndarray, block: int) -> Contexts:
    """Histories of `blocks` stored blocks of the task and an announce part, then the ask part,
    about task.episode_blocks of them.

    As in training where the keys suffice for all blocks to be different. Longer histories have the asked blocks among
    others made of the keys that nobody asks for, which repeat with other values. block: tokens of a block of the model,
    of which those matter that hold an answer.
    """
    if blocks <= task.blocks:
        made = task.rows("val", rows, blocks, blocks * task.block + task.episode)
        tokens, mask = made.tokens, made.mask
    else:
        places = np.stack([np.random.default_rng((task.seed, blocks, row)).permutation(blocks)[:task.episode_blocks]
                           for row in rows.tolist()])
        stream = task.stream_rows("val", rows, blocks * task.block, places[:, None])
        tokens = np.concatenate([stream.tokens, stream.questions[:, 0], np.zeros((len(rows), 1), dtype=np.int64)], 1)
        mask = np.arange(tokens.shape[1]) % 2 == 1
    n = blocks * task.block + task.announce
    # no other block has these keys
    asked = task.keys.start + np.argsort(task.alias_of_key)[tokens[:, n:n + task.ask:2] - task.aliases.start]
    held = np.zeros((len(rows), -(-n // block) * block), dtype=bool)
    held[:, :n] = (tokens[:, :n, None] == asked[:, None]).any(2)
    matter = held.reshape(len(rows), -1, block).any(2)
    return Contexts(torch.from_numpy(tokens[:, :-1]), torch.from_numpy(np.where(mask, tokens, -1)[:, 1:]),
                    torch.from_numpy(matter))


def text_contexts(source: RowSource, length: int, rows: np.ndarray) -> Contexts:
    """The first `length` tokens of a source's rows, all of them targets."""
    tokens, mask = source.row_tokens(rows)
    targets = tokens if mask is None else np.where(mask, tokens, -1)
    return Contexts(torch.from_numpy(tokens[:, :length]), torch.from_numpy(targets[:, 1:length + 1]), None)


@torch.no_grad()
def tail_attention(focus: FocusComparison) -> Tensor:
    """[B, N] attention mass of the protected tail's queries in a full pass over the history."""
    captured: list[Captured] = []
    focus.gpt.hidden(focus.tokens[:, :focus.n], inputs_embeds=focus.embeds[:, :focus.n], capture=captured,
                     lift_windows=True)
    queries = slice(focus.n - focus.mc.config.protected, focus.n)
    return attention_mass(captured, slice(None), queries, focus.n_blocks, focus.K).sum(1)


def all_scores(focus: FocusComparison) -> dict[str, Tensor]:
    """[B, N] of everything in SCORES and CHEATS."""
    teachers, history = focus.teacher_scores(), focus.tokens[:, :focus.n]
    return {**{name: focus.scores(name) for name in ("lens", "random", "recency")},
            "bm25": bm25_scores(history, focus.K, history[:, -focus.mc.config.protected:]),
            "tail_attention": tail_attention(focus),
            "next_attention": teachers["attention"], "next_gate": teachers["gate"]}


def utilities(focus: FocusComparison, alone: list[Outcome]) -> Tensor:
    """[B, F] nats per target of showing each of the F blocks that are not protected; alone: what
    `FocusComparison.alone` gave."""
    nothing = focus.nothing()
    return torch.stack([nothing.nll_B - one.nll_B for one in alone], 1)


def most_useful(utility_BF: Tensor, count: int) -> Tensor:
    """bool [B, F]: the `count` blocks of greatest utility, where it is positive."""
    best = utility_BF.topk(min(count, utility_BF.shape[1]), 1).indices
    return torch.zeros_like(utility_BF, dtype=torch.bool).scatter(1, best, True) & (utility_BF > 0)


def measure_scores(focus: FocusComparison, matter_BN: Tensor | None, progress: Callable[[], None] = lambda: None,
            candidates: int | None = None) -> dict[str, dict[str, Tensor]]:
    """system -> measure -> [B], for every score of `all_scores` and for "oracle".

    matter: bool, the blocks that are known to matter; None: those of greatest utility, as many as the budget can show.
    candidates: of the oracle's search.
    """
    scores, F = all_scores(focus), focus.free_blocks
    outcomes = {name: focus.outcome(x) for name, x in scores.items()}
    alone = focus.alone(progress)
    utility = utilities(focus, alone)
    matter = most_useful(utility, focus.most_shown) if matter_BN is None else matter_BN[:, :F]
    oracle = focus.oracle(outcomes, progress, alone=alone, candidates=candidates)
    found = {name: {**_facts(outcomes[name], oracle), "spearman": spearman(x[:, :F], utility),
                    "hit_at_1": hit_at(x[:, :F], matter, 1),
                    "hit_at_most": hit_at(x[:, :F], matter, focus.most_shown)} for name, x in scores.items()}
    return {**found, "oracle": _facts(oracle, oracle)}


def _facts(outcome: Outcome, oracle: Outcome) -> dict[str, Tensor]:
    return {"nll": outcome.nll_B, "acc": outcome.acc_B, "entries": outcome.entries_B,
            "regret": outcome.nll_B - oracle.nll_B}
