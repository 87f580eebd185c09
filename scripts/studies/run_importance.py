"""Label every token of some rows with what it is worth to what follows, in shards; a run that was
cut off goes on where it stopped.

    python -m scripts.mc_study importance --checkpoint_dir=DIR --labels=DIR

The classifier of tokens learns them (`python -m scripts.mc_study classifier`).
"""

import json
import time
from argparse import Namespace
from pathlib import Path

import torch

from mc.config import MCConfig
from nanochat.common import FlagParser, init_distributed
from nanochat.dataset import Progress
from nanochat.outputs import output_folder
from nanochat.tokenizer import Tokenizer
from scripts.eval.importance import TEACHERS, importance, write_labels
from scripts.eval.methods.registry import load_models
from scripts.eval.rows import add_row_flags, batches_from_flags
from scripts.eval.subcommands import check_least


def base_of(checkpoint_dir: str, meta: dict) -> dict:
    """Which base labels are of."""
    return {"base": str(Path(checkpoint_dir).resolve()), "base_step": meta["step"]}


def add_label_flags(parser: FlagParser) -> None:
    """Of the base and its labels' folder."""
    add = parser.add_argument
    parser.add_checkpoint("of the base")
    parser.add_step()
    add("--labels", required=True, type=Path, help="folder of the labels")
    parser.add_device("where to compute")


def add_flags(parser: FlagParser) -> None:
    add_label_flags(parser)
    parser.add_seed("the rows that are labelled")
    parser.add_argument("--batches", type=int, default=64, help="shards, each of --rows rows")
    parser.add_argument("--teacher", default="gate", choices=TEACHERS,
                        help="gate gradients or attention of the continuation, full pass")
    add_row_flags(parser)


def run(args: Namespace) -> None:
    check_least(args, batches=1)
    begin = time.time()
    output_folder(args.labels, "manifest.json", flag="--labels")
    models, meta = load_models(args.checkpoint_dir, args.step, init_distributed(args.device).device)
    batches, facts = batches_from_flags(args, models.mc.config if models.mc else MCConfig(), meta, Tokenizer.load())

    def shard(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = batches(i)
        return rows.tokens_BT[:, :rows.n], importance(models.gpt, rows.tokens_BT, rows.targets_BT, rows.n, args.teacher)

    progress = Progress("labels", args.batches, "shards", every_s=15)
    made = write_labels(args.labels, {**base_of(args.checkpoint_dir, meta), "teacher": args.teacher, **facts}, shard,
                        args.batches, progress.update)
    print(f"{made} shards of {args.rows} rows made, {args.batches} in {args.labels}")
    print(json.dumps({"labels": str(args.labels), "shards": args.batches, "made": made,
                      "seconds": round(time.time() - begin, 1)}))
