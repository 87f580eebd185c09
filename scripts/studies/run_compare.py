"""Judge full context, sliding windows and MegaContext's working contexts on the same
held-out tokens, and write the report.

    python -m scripts.mc_eval compare --recall_mc=DIR [--recall_vanilla=DIR] [--facts_mc=DIR] [--text_mc=DIR …]

A task is judged whose MegaContext checkpoint is named, and beside it its vanilla twin if that is. Of facts in text,
BM25 chooses too, shown exactly as the lens is, and as a control the lens asked another context's question; the oracle
shows the blocks of the note that is asked for; and the text itself is judged, for what focus does to it.
"""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mc.model import MegaContext, load_mega_context
from nanochat.common import FlagParser, UserError, base_dir, print0
from nanochat.dataloader import FactSource, RowSource, eval_rows, judged_rows, source_of
from nanochat.dataset import Progress
from nanochat.gpt import GPT
from nanochat.loading import check_tokenizer, load_model
from nanochat.outputs import output_folder
from nanochat.resume import MAY_CHANGE
from nanochat.tokenizer import Tokenizer
from scripts.bench.train_step import training_step_times
from scripts.eval.bm25 import bm25_scores
from scripts.eval.comparison import FocusComparison, Outcome, plain_outcomes
from scripts.eval.provenance import commit
from scripts.eval.report import task_report, write_comparison
from scripts.eval.statistics import bootstrap_interval
from scripts.eval.subcommands import check_least

TASKS = ("recall", "facts", "text")
TEXT_JUDGED = 32  # tokens of text judged behind a history, beside the facts
MAY_DIFFER = MAY_CHANGE - {"data"}  # flags of twins: what a resumed run may change, but for the data


class Pair(NamedTuple):
    """An MC checkpoint, and its vanilla twin if there is one."""

    gpt: GPT
    mc: MegaContext
    meta: dict
    vanilla: GPT | None
    vanilla_meta: dict | None
    logs: dict[str, Path]  # "mc", "vanilla" -> metrics.jsonl


def load_pair(mc_dir: Path, vanilla_dir: Path | None, tokenizer: Tokenizer) -> Pair:
    """UserError unless they are twins, trained with this tokenizer, whose logs are there."""
    gpt, meta = load_model(mc_dir)
    mc = load_mega_context(mc_dir, meta["step"], meta, gpt.config.n_embd)
    check_tokenizer(meta, tokenizer, mc_dir)
    logs = {"mc": log_of(mc_dir)}
    vanilla = vanilla_meta = None
    if vanilla_dir is not None:
        vanilla, vanilla_meta = load_model(vanilla_dir)
        check_twins(mc_dir, meta, vanilla_dir, vanilla_meta)
        logs["vanilla"] = log_of(vanilla_dir)
    for path in logs.values():
        if not path.exists():
            raise UserError(f"no {path}: the training's log, for the plot; set NANOCHAT_BASE_DIR to where it was "
                            "trained")
    return Pair(gpt, mc, meta, vanilla, vanilla_meta, logs)


def check_twins(mc_dir: Path, meta: dict, vanilla_dir: Path, vanilla_meta: dict) -> None:
    if vanilla_meta["mc"]:
        raise UserError(f"the checkpoint in {vanilla_dir} was trained with --mc_enabled=1: it is no vanilla twin")
    different = [name for name in ("model_config", "tokens", "tokenizer") if meta[name] != vanilla_meta[name]]
    different += [f"--{name}" for name in sorted(meta["flags"].keys() | vanilla_meta["flags"].keys())
                  if not name.startswith("mc_") and name not in MAY_DIFFER
                  and meta["flags"].get(name) != vanilla_meta["flags"].get(name)]
    if different:
        raise UserError(f"{mc_dir} and {vanilla_dir} differ in {', '.join(different)}: only models of one shape, "
                        "trained alike on the same tokens, are compared")


def log_of(checkpoint_dir: Path) -> Path:
    """The metrics of the run that wrote a checkpoint: its tag is its folder's path below checkpoints/."""
    path, checkpoints = checkpoint_dir.resolve(), (base_dir() / "checkpoints").resolve()
    tag = path.relative_to(checkpoints) if path.is_relative_to(checkpoints) else path.name
    return base_dir() / "runs" / tag / "metrics.jsonl"


class JudgedRows(NamedTuple):
    """Held-out rows of a task."""

    tokens_BT: Tensor
    targets_BT: Tensor  # −1 where none is judged
    evidence_BN: Tensor | None  # bool: blocks that hold what is asked for, where the task says


def rows_of(source: RowSource, rows: np.ndarray, n: int, horizon: int, block_size: int) -> JudgedRows:
    if not isinstance(source, FactSource):
        tokens, targets = (x[:, :n + horizon] for x in judged_rows(source, rows))
        return JudgedRows(tokens, targets, None)
    made, K = source.made(rows), block_size
    targets = np.where(made.asked[:, 1:], made.tokens[:, 1:], -1)[:, :n + horizon]
    block = np.arange(n // K)
    last = made.note_at + source.task.note_tokens - 1
    evidence = (block >= made.note_at[:, None] // K) & (block <= last[:, None] // K)
    return JudgedRows(*map(torch.from_numpy, (made.tokens[:, :n + horizon], targets, evidence)))


def compare(pair: Pair, tokenizer: Tokenizer, args, task: str) -> dict:
    """One task's part of the report."""
    gpt, mc, meta, vanilla, vanilla_meta, _ = pair
    c, T = mc.config, gpt.config.sequence_len
    n = (T - c.horizon) // c.block_size * c.block_size
    source = source_of(meta, "val", tokenizer=tokenizer)

    def judge(rows: np.ndarray) -> dict[str, Outcome]:
        tokens, targets, evidence = rows_of(source, rows, n, c.horizon, c.block_size)
        plain = plain_outcomes(gpt, tokens, targets, n, c.budget)
        focus = FocusComparison(gpt, mc, tokens, targets, n, args.seed, torch.from_numpy(rows))
        tested = {f"mc_{policy}": focus.outcome(focus.scores(policy)) for policy in ("random", "recency", "lens")}
        if evidence is not None:
            announced = tokens[:, n - source.task.facts:n]  # the question alone: the text before it would only mislead
            tested["mc_bm25"] = focus.outcome(bm25_scores(tokens[:, :n], c.block_size, announced))
            # the control: whoever finds the notes of any question finds odd lines, and no answers
            exchanged = tokens.clone()
            exchanged[:, n - source.task.facts:n] = announced.roll(1, 0)
            other = FocusComparison(gpt, mc, exchanged, targets, n, args.seed, torch.from_numpy(rows))
            tested["mc_lens_exchanged"] = focus.outcome(other.scores("lens"))
            oracle = focus.outcome(torch.where(evidence, 1.0, -torch.inf))
        else:
            oracle = focus.oracle(tested)
        bare = plain_outcomes(vanilla, tokens, targets, n, c.budget) if vanilla is not None else {}
        return {"full": plain["full"], "sliding_window": plain["window"], **tested, "mc_oracle": oracle,
                **{f"vanilla_{name}": outcome for name, outcome in bare.items()}}

    outcomes = judged_in_batches(judge, task, eval_rows(source, args.contexts * T), args.batch)
    facts = {"horizon": c.horizon, "recent": c.protected, "block_size": c.block_size, "tokens": meta["tokens"],
             "flops": {"mc": meta["flops"]} | ({"vanilla": vanilla_meta["flops"]} if vanilla_meta else {}),
             "trained_lods": meta["mc"]["trained_lods"]}
    if isinstance(source, FactSource):
        facts["text"] = text_itself(pair, tokenizer, args)
    return task_report(outcomes, history=n, budget=c.budget, with_accuracy=task != "text", facts=facts)


def judged_in_batches(judge: Callable[[np.ndarray], dict[str, Outcome]], what: str, count: int,
                      batch: int) -> dict[str, Outcome]:
    """Outcomes of rows 0 to count, by name."""
    progress = Progress(f"{what}: contexts judged", count, "contexts", every_s=15)
    parts: dict[str, list[Outcome]] = {}
    for first in range(0, count, batch):
        for name, outcome in judge(np.arange(first, min(first + batch, count))).items():
            assert outcome.nll_B.isfinite().all(), "a working context gave a loss that is not finite"
            parts.setdefault(name, []).append(Outcome(outcome.nll_B, outcome.acc_B, outcome.entries_B))
        progress.update(min(first + batch, count))
    return {name: Outcome.cat(found) for name, found in parts.items()}


def text_itself(pair: Pair, tokenizer: Tokenizer, args) -> dict:
    """What focus does to plain held-out text, code and prose alike many: NLL of the tokens behind a history."""
    gpt, mc, meta = pair[:3]
    c = mc.config
    n = (gpt.config.sequence_len - c.horizon) // c.block_size * c.block_size
    sources = [source_of(meta, "val", tokenizer=tokenizer, data=data, T=n + TEXT_JUDGED) for data in FactSource.KINDS]
    count = min(args.contexts // 2 or 1, *(source.count_rows(args.contexts) for source in sources))

    def judge(rows: np.ndarray) -> dict[str, Outcome]:
        tokens, targets = (torch.cat(parts) for parts in zip(*(judged_rows(source, rows) for source in sources)))
        focus = FocusComparison(gpt, mc, tokens, targets, n, args.seed, torch.from_numpy(np.tile(rows, 2)))
        return plain_outcomes(gpt, tokens, targets, n, c.budget) | {"lens": focus.outcome(focus.scores("lens"))}

    found = {name: outcome.nll_B.double().numpy()
             for name, outcome in judged_in_batches(judge, "text", count, max(args.batch // 2, 1)).items()}
    delta = found["lens"] - found["window"]
    return {"tokens": TEXT_JUDGED, "contexts": len(delta), **{name: float(nll.mean()) for name, nll in found.items()},
            "lens_to_window": float(delta.mean()),
            "lens_to_window_interval": bootstrap_interval(lambda i: delta[i].mean(), len(delta))}


def add_flags(parser: FlagParser) -> None:
    for task in TASKS:
        parser.add_argument(f"--{task}_mc", type=Path,
                            help=f"checkpoint directory trained on {task} with --mc_enabled=1")
        parser.add_argument(f"--{task}_vanilla", type=Path, help="its vanilla twin: same flags but --mc_enabled=0")
    parser.add_argument("--contexts", type=int, default=64, help="held-out contexts per task")
    parser.add_argument("--batch", type=int, default=32, help="contexts at a time")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of blocks of steps timed per task")
    parser.add_seed("random focus")
    parser.add_out("where the report goes", "quickstart")


def run(args: Namespace) -> None:
    check_least(args, contexts=1, batch=1, pairs=1)
    named = {task: (getattr(args, f"{task}_mc"), getattr(args, f"{task}_vanilla")) for task in TASKS}
    for task, (mc_dir, vanilla_dir) in named.items():
        if vanilla_dir and not mc_dir:
            raise UserError(f"--{task}_vanilla={vanilla_dir} is compared with --{task}_mc=DIR, which is not given")
    if not any(mc_dir for mc_dir, _ in named.values()):
        raise UserError(f"nothing to compare: give {', '.join(f'--{task}_mc' for task in TASKS)}, one or several")
    out = output_folder(args.out or base_dir() / "quickstart", "report.json", "report.md")
    tokenizer = Tokenizer.load()
    pairs = {task: load_pair(*folders, tokenizer) for task, folders in named.items() if folders[0]}
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
