"""Rows to label, train and judge systems on: of the generated tasks, or of what a checkpoint was trained on.

Shapes: B rows, n tokens of history, H of continuation, T = n + H.
"""

from argparse import Namespace
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mc.config import MCConfig
from nanochat.common import FlagParser, UserError
from nanochat.dataloader import judged_rows, source_of
from nanochat.dataset import open_corpus
from nanochat.tasks.generated import task_rows
from nanochat.tasks.source import parse_mix
from nanochat.tasks.words import Words
from nanochat.token_cache import open_token_cache
from nanochat.tokenizer import Tokenizer


class RowBatch(NamedTuple):
    tokens_BT: Tensor
    targets_BT: Tensor  # the token after each, −1 where none is judged
    n: int
    rows_B: Tensor  # row numbers


Batches = Callable[[int], RowBatch]  # number of a batch -> its rows, always the same


def make_batches(data: str, split: str, tokenizer: Tokenizer, flags: dict, *, history: int, horizon: int,
                 block_size: int, rows: int,
                 seed: int = 0) -> Batches:
    """data: as `--data` of base_train; flags: those of the run it goes with, for what else a source
    needs. Seeds have no row in common.

    "tasks", "tasks:a,b=2": batch i is of one task, drawn by share; its answer is the continuation. Else the last
    `horizon` tokens of a row of history + horizon, of which those count that counted in training.
    """
    def numbers(i: int) -> np.ndarray:
        return (seed << 24) + np.arange(i * rows, (i + 1) * rows)

    if data.partition(":")[0] == "tasks":
        mix = parse_mix(data.partition(":")[2])
        words = Words.of(tokenizer, open_token_cache(open_corpus("stdlib"), split, tokenizer).tokens)

        def of_tasks(i: int) -> RowBatch:
            name = list(mix)[int(np.random.default_rng((seed, i)).choice(len(mix), p=list(mix.values())))]
            made = task_rows(name, words, split, numbers(i), history, block_size=block_size)
            return RowBatch(torch.from_numpy(made.tokens), torch.from_numpy(made.targets), made.n,
                            torch.from_numpy(numbers(i)))

        return of_tasks
    T = history + horizon
    source = source_of({"flags": flags}, split, tokenizer=tokenizer, data=data, T=T, rows="long")

    def of_source(i: int) -> RowBatch:
        return RowBatch(*judged_rows(source, numbers(i)), history, torch.from_numpy(numbers(i)))

    return of_source


def add_row_flags(parser: FlagParser) -> None:
    """The flags that `batches_from_flags` reads, besides --seed."""
    add = parser.add_argument
    add("--data", default="", help="tasks, tasks:<name>=<share>,…, or as --data of base_train; default: what the "
                                   "checkpoint was trained on")
    add("--history", type=int, default=0,
        help="tokens of history; 0: the whole blocks that a row holds before the continuation")
    add("--horizon", type=int, default=0,
        help="tokens of the continuation, of data that is no task; 0: as MegaContext was trained, or 32")
    add("--rows", type=int, default=16, help="rows of a batch")


def batches_from_flags(args: Namespace, config: MCConfig, meta: dict, tokenizer: Tokenizer) -> tuple[Batches, dict]:
    """Batches of training rows, and what they are, in words. UserError for a number that no batch can have."""
    if min(args.history, args.horizon, args.seed) < 0 or args.rows < 1:
        raise UserError(f"--history={args.history} --horizon={args.horizon} --seed={args.seed} --rows={args.rows}: at "
                        "least 0, 0, 0 and 1")
    horizon, K = args.horizon or config.horizon, config.block_size
    history = args.history or (meta["model_config"]["sequence_len"] - horizon) // K * K
    facts = dict(data=args.data or meta["flags"]["data"], history=history, horizon=horizon, block_size=K,
                 rows=args.rows, seed=args.seed)
    return make_batches(split="train", tokenizer=tokenizer, flags=meta["flags"], **facts), facts
