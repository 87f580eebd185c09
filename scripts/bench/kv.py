"""What the approximate KV policy saves, and what it costs in NLL.

Held-out rows of the model's own data, read as a history and then token by token as if they were generated, with a
refocus every `--mc_interval` tokens; the same tokens under both policies, in turn.
"""

import argparse
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mc.session import config as session_config
from mc.session import session as sessions
from nanochat.common import FlagParser, UserError, pick_device
from nanochat.dataloader import eval_rows, judged_rows, source_of
from nanochat.loading import load_model
from nanochat.tokenizer import Tokenizer
from scripts.bench.base import TRAINED_WITH_MC, print_json
from scripts.eval.statistics import bootstrap_interval, median_interval


class Read(NamedTuple):
    """One row under one policy."""

    nll: float  # mean over the targets [nats]
    computed: int  # entries run after refocuses
    shown: int  # entries shown at those refocuses
    seconds: float


def read_row(pool: sessions.SessionPool, tokens_T: Tensor, targets_T: Tensor, ahead: int) -> Read:
    """The last `ahead` tokens of a row after the rest of it. targets: the next token of each,
    −1 where it does not count."""
    session = pool.open()
    try:
        session.begin(tokens_T[:-ahead])
        computed = shown = 0
        begin, logits = time.perf_counter(), []
        for piece in tokens_T[-ahead:].split(pool.interval):
            logits.append(session.score(piece))
            computed, shown = computed + session.computed, shown + session.computed + session.kept
        seconds = time.perf_counter() - begin
    finally:
        session.close()
    counted = targets_T[-ahead - 1:-1]
    nll = F.cross_entropy(torch.cat(logits).float(), counted, ignore_index=-1)
    return Read(float(nll), computed, shown, seconds)


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint(TRAINED_WITH_MC)
    parser.add_argument("--rows", type=int, default=64, help="held-out rows")
    parser.add_argument("--ahead", type=int, default=256, help="last tokens of each row that are read one by one")
    parser.add_device()
    session_config.add_flags(parser)


def run(args: argparse.Namespace) -> None:
    args.device = pick_device(args.device)
    gpt, meta = load_model(args.checkpoint_dir, device=args.device)
    T = gpt.config.sequence_len
    if args.rows < 2 or not 1 <= args.ahead < T:
        raise UserError(
            f"--rows={args.rows} --ahead={args.ahead}: at least 2 rows, and 1 to {T - 1} tokens of their {T}")
    source = source_of(meta, "val", tokenizer=Tokenizer.load())
    count = eval_rows(source, args.rows * T)
    config = session_config.from_flags(args)
    pools = {policy: sessions.open_pool(gpt, meta, args.checkpoint_dir, replace(config, kv_policy=policy))
             for policy in ("exact", "approximate")}
    found: dict[str, list[Read]] = {policy: [] for policy in pools}
    for tokens_T, targets_T in zip(*judged_rows(source, np.arange(count))):
        for policy, pool in pools.items():
            found[policy].append(read_row(pool, tokens_T, targets_T, args.ahead))
    cost = np.array([a.nll - e.nll for e, a in zip(found["exact"], found["approximate"])])
    speed = np.array([a.seconds / e.seconds for e, a in zip(found["exact"], found["approximate"])])
    out = {"rows": count, "history": T - args.ahead, "ahead": args.ahead, "interval": pools["exact"].interval,
           "budget": pools["exact"].focus_config.budget,
           "nll": {policy: float(np.mean([r.nll for r in reads])) for policy, reads in found.items()},
           "delta_nll": float(cost.mean()), "delta_nll_interval": bootstrap_interval(lambda i: cost[i].mean(), count),
           "computed_share": {policy: sum(r.computed for r in reads) / max(sum(r.shown for r in reads), 1)
                              for policy, reads in found.items()},
           "time_ratio": float(np.median(speed)), "time_ratio_interval": list(median_interval(speed))}
    low, high = out["delta_nll_interval"]
    print(f"NLL approximate − exact: {out['delta_nll']:+.4f} [{low:+.4f}, {high:+.4f}] nats per token, {count} rows, "
          f"{args.ahead} tokens each")
    for policy, share in out["computed_share"].items():
        print(f"  {policy:12s} runs {share:.1%} of the shown entries again after a refocus")
    print_json(out)
