"""Measure what showing blocks of history is worth to a checkpoint's base, as labels that train a lens.

    python -m scripts.mc_study labels --checkpoint_dir=DIR --out=DIR [--data=…] --contexts=512 --edits=16

An interrupted run goes on where it stopped; the labels of another base, or drawn otherwise, are refused.
"""

import json
import time
from argparse import Namespace

import numpy as np
import torch

from mc.arms.utility_labels import LabelFolder, cursors, label_fingerprint, measure
from mc.store.networks import load_networks
from nanochat.checkpoint import load_model_state
from nanochat.common import FlagParser, UserError, init_distributed, print0
from nanochat.dataloader import judged_rows, source_of
from nanochat.dataset import Progress
from nanochat.outputs import output_folder
from scripts.eval.provenance import commit
from scripts.eval.subcommands import check_least


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint("of a run with --mc_enabled=1")
    parser.add_argument("--data", default="",
                        help="recall, stdlib, …, or a directory, as for base_train; default what the checkpoint was "
                             "trained on")
    parser.add_argument("--split", default="train", choices=("train", "val"), help="rows to label")
    parser.add_out("folder of the labels")
    parser.add_argument("--contexts", type=int, default=512, help="rows to label")
    parser.add_argument("--cursors", type=int, default=1, help="ends of history per row at which edits are measured")
    parser.add_argument("--edits", type=int, default=16,
                        help="edits per end of history: half of blocks that the gate gradient wants, half random")
    parser.add_argument("--batch", type=int, default=4, help="rows at a time, and per file")
    parser.add_seed("the cuts and edits that are drawn")
    parser.add_device("where to measure")


def run(args: Namespace) -> None:
    check_least(args, contexts=1, cursors=1, edits=2, batch=1, seed=0)
    if args.contexts % args.batch:
        raise UserError(
            f"--contexts={args.contexts} is not a multiple of --batch={args.batch}: a file holds a whole batch")
    output_folder(args.out, "manifest.json")
    device = init_distributed(args.device).device
    found = load_networks(args.checkpoint_dir, device=device)
    gpt, mc, meta = found.gpt, found.mc, load_model_state(args.checkpoint_dir)[1]
    T = gpt.config.sequence_len
    at = cursors(mc, T, args.cursors)
    if args.edits > (most := (min(at) - mc.config.protected) // mc.config.block_size):
        raise UserError(f"--edits={args.edits}: a history of {min(at)} tokens has {most} blocks to edit")
    data = args.data or meta["flags"]["data"]
    source = source_of(meta, args.split, tokenizer=found.tokenizer, data=data)
    if (have := source.count_rows(args.contexts)) < args.contexts:
        raise UserError(f"--contexts={args.contexts}: {data} has {have} rows of {T} tokens in its {args.split} split")
    folder = LabelFolder(args.out)
    folder.begin(
        dict(model=label_fingerprint(gpt, mc), data=data, split=args.split, cursors=args.cursors, edits=args.edits,
             batch=args.batch, seed=args.seed),
        dict(checkpoint_dir=str(args.checkpoint_dir.resolve()), commit=commit()))

    files = args.contexts // args.batch
    waiting = [i for i in range(files) if not folder.path(i).exists()]
    print0(f"{args.contexts} contexts, {len(at)} ends of history, {args.edits} edits each; {files - len(waiting)} of "
           f"{files} files done before")
    progress, begin = Progress("labels", len(waiting), "files"), time.monotonic()
    for done, index in enumerate(waiting, 1):
        rows = np.arange(index * args.batch, (index + 1) * args.batch)
        tokens, targets = (x.to(device) for x in judged_rows(source, rows))
        folder.add(index, measure(gpt, mc, tokens, targets, torch.from_numpy(rows).to(device), at, args.edits,
                                  args.seed))
        progress.update(done)
    labels = folder.read()
    utility = labels.utility_CQE[labels.valid_CQE]
    assert utility.isfinite().all(), "an edit did not fit the budget"
    summary = {"labels": int(utility.numel()), "contexts": len(labels.row_C),
               "helpful": float((utility > 0).float().mean()), "spread": float(utility.std()),
               "seconds": round(time.monotonic() - begin, 1), "out": str(args.out)}
    print(f"{summary['labels']} labels in {args.out}, {summary['helpful']:.0%} of them of detail that helps")
    print(json.dumps(summary))
