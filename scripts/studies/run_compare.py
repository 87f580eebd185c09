"""Judge full context, sliding windows and MegaContext's working contexts on the same
held-out tokens, and write the report.

    python -m scripts.mc_eval compare --recall_mc=DIR --recall_vanilla=DIR --text_mc=DIR --text_vanilla=DIR --out=DIR
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mc.model import MegaContext, load_mega_context
from nanochat.common import FlagParser, UserError, base_dir, print0
from nanochat.dataloader import eval_rows, judged_rows, source_of
from nanochat.dataset import Progress
from nanochat.gpt import GPT
from nanochat.loading import check_tokenizer, load_model
from nanochat.outputs import output_folder
from nanochat.resume import MAY_CHANGE
from nanochat.tokenizer import Tokenizer
from scripts.bench.train_step import training_step_times
from scripts.eval.comparison import FocusComparison, Outcome, plain_outcomes
from scripts.eval.provenance import commit
from scripts.eval.report import task_report, write_comparison
from scripts.eval.subcommands import check_least

TASKS = ("recall", "text")
MAY_DIFFER = MAY_CHANGE - {"data"}  # flags of twins: what a resumed run may change, but for the data


class Pair(NamedTuple):
    """An MC checkpoint and its vanilla twin."""

    gpt: GPT
    mc: MegaContext
    meta: dict
    vanilla: GPT
    vanilla_meta: dict
    logs: dict[str, Path]  # "mc", "vanilla" -> metrics.jsonl


def load_pair(mc_dir: Path, vanilla_dir: Path, tokenizer: Tokenizer) -> Pair:
    """UserError unless they are twins, trained with this tokenizer, whose logs are there."""
    gpt, meta = load_model(mc_dir)
    vanilla, vanilla_meta = load_model(vanilla_dir)
    mc = load_mega_context(mc_dir, meta["step"], meta, gpt.config.n_embd)
    if vanilla_meta["mc"]:
        raise UserError(f"the checkpoint in {vanilla_dir} was trained with --mc_enabled=1: it is no vanilla twin")
    different = [name for name in ("model_config", "tokens", "tokenizer") if meta[name] != vanilla_meta[name]]
    different += [f"--{name}" for name in sorted(meta["flags"].keys() | vanilla_meta["flags"].keys())
                  if not name.startswith("mc_") and name not in MAY_DIFFER
                  and meta["flags"].get(name) != vanilla_meta["flags"].get(name)]
    if different:
        raise UserError(f"{mc_dir} and {vanilla_dir} differ in {', '.join(different)}: only models of one shape, "
                        "trained alike on the same tokens, are compared")
    check_tokenizer(meta, tokenizer, mc_dir)
    logs = {kind: log_of(directory) for kind, directory in (("mc", mc_dir), ("vanilla", vanilla_dir))}
    for path in logs.values():
        if not path.exists():
            raise UserError(f"no {path}: the training's log, for the plot; set NANOCHAT_BASE_DIR to where it was "
                            "trained")
    return Pair(gpt, mc, meta, vanilla, vanilla_meta, logs)


def log_of(checkpoint_dir: Path) -> Path:
    """The metrics of the run that wrote a checkpoint: its tag is its folder's path below checkpoints/."""
    path, checkpoints = checkpoint_dir.resolve(), (base_dir() / "checkpoints").resolve()
    tag = path.relative_to(checkpoints) if path.is_relative_to(checkpoints) else path.name
    return base_dir() / "runs" / tag / "metrics.jsonl"


def compare(pair: Pair, tokenizer: Tokenizer, args, task: str) -> dict:
    """One task's part of the report."""
    gpt, mc, meta, vanilla, vanilla_meta, _ = pair
    c = mc.config
    T = gpt.config.sequence_len
    n = (T - c.horizon) // c.block_size * c.block_size
    source = source_of(meta, "val", tokenizer=tokenizer)
    count = eval_rows(source, args.contexts * T)
    progress = Progress(f"{task}: contexts judged", count, "contexts", every_s=15)
    parts: dict[str, list[Outcome]] = {}
    for first in range(0, count, args.batch):
        rows = np.arange(first, min(first + args.batch, count))
        tokens, targets = (x[:, :n + c.horizon] for x in judged_rows(source, rows))
        plain = plain_outcomes(gpt, tokens, targets, n, c.budget)
        focus = FocusComparison(gpt, mc, tokens, targets, n, args.seed, torch.from_numpy(rows))
        tested = {f"mc_{policy}": focus.outcome(focus.scores(policy)) for policy in ("random", "recency", "lens")}
        bare = plain_outcomes(vanilla, tokens, targets, n, c.budget)
        found = {"full": plain["full"], "sliding_window": plain["window"], **tested, "mc_oracle": focus.oracle(tested),
                 "vanilla_full": bare["full"], "vanilla_window": bare["window"]}
        for name, outcome in found.items():
            parts.setdefault(name, []).append(outcome)
        progress.update(min(first + args.batch, count))
    for found in parts.values():
        for outcome in found:
            assert outcome.nll_B.isfinite().all(), "a working context gave a loss that is not finite"
    outcomes = {name: Outcome.cat([Outcome(o.nll_B, o.acc_B, o.entries_B) for o in found])
                for name, found in parts.items()}
    facts = {"horizon": c.horizon, "recent": c.protected, "block_size": c.block_size, "tokens": meta["tokens"],
             "flops": {"mc": meta["flops"], "vanilla": vanilla_meta["flops"]},
             "trained_lods": meta["mc"]["trained_lods"]}
    return task_report(outcomes, history=n, budget=c.budget, with_accuracy=task == "recall", facts=facts)


def add_flags(parser: FlagParser) -> None:
    for task in TASKS:
        parser.add_argument(f"--{task}_mc", required=True, type=Path,
                            help=f"checkpoint directory trained on {task} with --mc_enabled=1")
        parser.add_argument(f"--{task}_vanilla", required=True, type=Path,
                            help="its vanilla twin: same flags but --mc_enabled=0")
    parser.add_argument("--contexts", type=int, default=64, help="held-out contexts per task")
    parser.add_argument("--batch", type=int, default=32, help="contexts at a time")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of blocks of steps timed per task")
    parser.add_seed("random focus")
    parser.add_out("where the report goes", "quickstart")


def run(args: Namespace) -> None:
    check_least(args, contexts=1, batch=1, pairs=1)
    out = output_folder(args.out or base_dir() / "quickstart", "report.json", "report.md")
    tokenizer = Tokenizer.load()
    pairs = {task: load_pair(getattr(args, f"{task}_mc"), getattr(args, f"{task}_vanilla"), tokenizer)
             for task in TASKS}
    report: dict = {"tasks": {}, "step_times": {}}
    for task, pair in pairs.items():
        report["tasks"][task] = compare(pair, tokenizer, args, task)
        print0(f"{task}: timing steps")
        times = training_step_times(pair.meta, tokenizer, pairs=args.pairs)
        report["step_times"][task] = {"ratio": times.ratio, "low": times.low, "high": times.high,
                                      "shares": {name: seconds / times.vanilla_s
                                                 for name, seconds in times.parts.items()}}
    ratio = max(cost["ratio"] for cost in report["step_times"].values())
    report |= {"step_time_ratio": ratio, "seed": pair.meta["flags"]["seed"], "commit": commit()}
    print(write_comparison(report, {task: pair.logs for task, pair in pairs.items()}, out), flush=True)
    print(f"report in {out}")
    print(json.dumps({"report": str(out / "report.json"), "step_time_ratio": ratio}))
