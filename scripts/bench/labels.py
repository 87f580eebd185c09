"""What labelling costs with keys and values reused, and without.

The passes of `scripts.mc_study labels` over the same contexts and edits, in alternation in one process; labels per
second of each, the ratio of neighbours (from scratch / reused) with its median over pairs and a bootstrap interval, and
the largest difference between the labels themselves.
"""

import argparse
import time

import numpy as np
import torch

from mc.arms.utility_labels import Labels, cursors, measure
from mc.store.networks import load_networks
from nanochat.checkpoint import load_model_state
from nanochat.common import FlagParser, UserError, pick_device
from nanochat.dataloader import judged_rows, source_of
from scripts.bench.base import TRAINED_WITH_MC, print_json, ratio_of, synchronize
from scripts.eval.subcommands import check_least


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint(TRAINED_WITH_MC)
    parser.add_argument("--pairs", type=int, default=12, help="pairs of blocks, from scratch and reused in turn")
    parser.add_argument("--contexts", type=int, default=4, help="held-out rows of a block")
    parser.add_argument("--edits", type=int, default=16, help="edits per row, as for scripts.mc_study labels")
    parser.add_device()


def run(args: argparse.Namespace) -> None:
    check_least(args, pairs=1, contexts=1, edits=2)
    args.device = pick_device(args.device)
    found, meta = load_networks(args.checkpoint_dir, device=args.device), load_model_state(args.checkpoint_dir)[1]
    gpt, mc, source = found.gpt, found.mc, source_of(meta, "val", tokenizer=found.tokenizer)
    at, rows = cursors(mc, gpt.config.sequence_len, 1), np.arange(args.contexts)
    if (have := source.count_rows(args.contexts)) < args.contexts:
        raise UserError(f"--contexts={args.contexts}: the held-out split has {have} rows")
    tokens, targets = (x.to(args.device) for x in judged_rows(source, rows))

    def timed(reuse: bool) -> tuple[float, Labels]:
        synchronize(args.device)
        begin = time.perf_counter()
        labels = measure(gpt, mc, tokens, targets, torch.from_numpy(rows).to(args.device), at, args.edits, 0, reuse)
        synchronize(args.device)
        return time.perf_counter() - begin, labels

    timed(True)  # what is only slow at first is not measured
    pairs = [(timed(True), timed(False)) for _ in range(args.pairs)]
    seconds = np.array([[reused[0], scratch[0]] for reused, scratch in pairs])
    reused, scratch = pairs[-1][0][1], pairs[-1][1][1]
    count = int(reused.valid_CQE.sum())
    rate, ratio = count / np.median(seconds, axis=0), ratio_of(seconds)
    differ = float((reused.utility_CQE - scratch.utility_CQE).abs().max())
    print(f"{rate[0]:.0f} labels per second with keys and values reused, {rate[1]:.0f} without, ratio {ratio} "
          f"({count} labels a block, {args.pairs} pairs); they differ by at most {differ:.1e} nats")
    print_json({"labels_per_second": float(rate[0]), "from_scratch": float(rate[1]), **ratio._asdict(),
                "labels": count, "pairs": args.pairs, "largest_difference": differ})
