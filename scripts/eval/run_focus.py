"""Measure the lens, and scores that need no training, against an oracle that knows the continuation.

    python -m scripts.mc_eval focus --recall_mc=DIR,DIR --text_mc=DIR --out=DIR     directories of runs
                                                                                    with --mc_enabled=1, one per seed
    … --hops_mc=DIR,DIR                                                          and
                                                                                 questions of two hops, put to a session

Every setting (a length of history at a budget) is judged on held-out contexts: of text the same for all seeds, of
recall each seed's own. The last line is JSON, of the
lens: the worst over the settings of recall (of text, without any recall).
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch

from mc.model import MegaContext, load_mega_context
from mc.session.config import SessionConfig
from mc.session.session import SessionPool
from nanochat.common import FlagParser, UserError, base_dir, print0
from nanochat.dataloader import eval_rows, source_of
from nanochat.dataset import Progress
from nanochat.gpt import GPT
from nanochat.loading import check_tokenizer, load_model
from nanochat.outputs import output_folder, write_file
from nanochat.tasks.hops import HopTask
from nanochat.tasks.recall import RecallTask
from nanochat.tokenizer import Tokenizer
from scripts.eval.comparison import FocusComparison, plain_outcomes
from scripts.eval.hop_questions import SYSTEMS as HOP_SYSTEMS, ask_chains
from scripts.eval.provenance import commit
from scripts.eval.scores import Contexts, measure_scores, recall_contexts, text_contexts
from scripts.eval.statistics import bootstrap_interval, share_of_gap
from scripts.eval.subcommands import check_least
from scripts.eval.tables import cell, table

LABELS = {"lens": "LensNet", "random": "random", "recency": "recency", "bm25": "BM25 with the tail",
          "tail_attention": "attention mass of the tail",
          "next_attention": "attention mass of the continuation (cheats)",
          "next_gate": "gate gradient of the continuation (cheats)", "oracle": "oracle"}
MEASURES = ("nll", "acc", "regret", "hit_at_1", "hit_at_most", "spearman")


class Model(NamedTuple):
    gpt: GPT
    mc: MegaContext
    meta: dict


class FocusSetting(NamedTuple):
    """What is judged: `n` tokens of history at a budget of W entries."""

    task: str  # "recall" or "text"
    name: str
    n: int
    budget: int


def load_checked(directory: Path, tokenizer: Tokenizer) -> Model:
    gpt, meta = load_model(directory)
    check_tokenizer(meta, tokenizer, directory)
    return Model(gpt, load_mega_context(directory, meta["step"], meta, gpt.config.n_embd), meta)


def recall_setting(model: Model, tokenizer: Tokenizer, size: str) -> tuple[FocusSetting, RecallTask, int]:
    """A size is blocks:ratio, "64:8" being 64 stored blocks at a budget of an eighth of their tokens."""
    if model.meta["flags"]["data"] != "recall":
        raise UserError(f"--recall_mc: that model was trained on --data={model.meta['flags']['data']}, not on recall")
    blocks, _, ratio = size.partition(":")
    if not (blocks.isdecimal() and ratio.isdecimal() and int(blocks) and int(ratio)):
        raise UserError(f"--recall_sizes: {size!r} is not blocks:ratio, as in 64:8")
    task, K = RecallTask.for_tokenizer(tokenizer, seed=model.meta["flags"]["seed"]), model.mc.config.block_size
    stored = int(blocks) * task.block
    if (stored + task.announce) % K:
        raise UserError(f"--recall_sizes: {size} is a history of {stored + task.announce} tokens, the model's blocks "
                        f"have {K} (--mc_block_size={K}); choose a multiple")
    return FocusSetting("recall", f"recall, {blocks} blocks at 1/{ratio}", stored + task.announce,
                        stored // int(ratio)), task, int(blocks)


def judge_setting(model: Model, setting: FocusSetting, contexts: Iterator[tuple[np.ndarray, Contexts]], args,
                  progress: Callable[[int], None]) -> dict[str, dict[str, np.ndarray]]:
    """system -> measure -> float64 [contexts]."""
    parts: dict[str, dict[str, list]] = {}
    for rows, (tokens, targets, matter) in contexts:
        focus = FocusComparison(model.gpt, model.mc, tokens, targets, setting.n, args.seed, torch.from_numpy(rows),
                                setting.budget)
        found = measure_scores(focus, matter, candidates=args.candidates)
        for name, plain in plain_outcomes(model.gpt, tokens, targets, setting.n, setting.budget).items():
            found[name] = {"nll": plain.nll_B, "acc": plain.acc_B, "entries": plain.entries_B}
        for system, measures in found.items():
            for name, values in measures.items():
                parts.setdefault(system, {}).setdefault(name, []).append(values.double())
        progress(int(rows[-1]) + 1)
    return {system: {name: torch.cat(values).numpy() for name, values in measures.items()}
            for system, measures in parts.items()}


def setting_summary(found: list[dict[str, dict[str, np.ndarray]]], with_accuracy: bool) -> dict:
    """Means over contexts of all seeds with their 95 % bootstraps, and each seed's mean."""
    systems: dict[str, dict] = {}
    for system in found[0]:
        row = systems[system] = {"entries": round(float(np.mean([one[system]["entries"].mean() for one in found])))}
        for name in MEASURES:
            if name in found[0][system] and (name != "acc" or with_accuracy):
                each = [one[system][name] for one in found]
                row[name] = mean_of(each) if not all(np.isnan(x).all() for x in each) else None
        if "regret" in row:
            row["gap_closed"] = seeds_gap_closed(found, system)
    return systems


def mean_of(each: list[np.ndarray]) -> dict:
    """Of one array of contexts per seed. NaN is a context without such a value: where no
    block matters there are no hits."""
    some = ~np.isnan(each).all(0)  # a draw of contexts that are nothing but NaN has no mean
    values = np.concatenate([x[some] for x in each])
    return {"mean": float(np.nanmean(values)),
            "interval": bootstrap_interval(lambda i: np.nanmean(values[i]), len(values), seeds=len(each)),
            "seeds": [float(np.nanmean(x)) for x in each]}


ANNOUNCED = (0, 5)  # chains of the same two blocks that are read before the question


def judge_hops(models: list[Model], directories: list[Path], tokenizer: Tokenizer, args) -> list[dict]:
    """Accuracy of two-hop questions, by how many chains of the same blocks were read before."""
    if wrong := [d for model, d in zip(models, directories) if model.meta["flags"]["data"] != "hops"]:
        raise UserError(f"--hops_mc: {wrong[0]} was not trained on --data=hops")
    if wrong := [f"{d} was trained with --mc_block_size={model.mc.config.block_size}"
                 for model, d in zip(models, directories) if model.mc.config.block_size != HopTask.block]:
        raise UserError(f"--hops_mc: {wrong[0]}, --data=hops stores facts in blocks of {HopTask.block} tokens; only "
                        "models of that block size are judged")
    found: dict[int, list[dict[str, np.ndarray]]] = {announced: [] for announced in ANNOUNCED}
    progress = Progress("two hops", len(models) * len(ANNOUNCED) * args.contexts, "questions", every_s=15)
    for gpt, mc, meta in models:
        flags, lods = meta["flags"], meta["mc"]["trained_lods"]
        task = HopTask.for_tokenizer(tokenizer, seed=flags["seed"], blocks=flags["recall_blocks"])
        pools = {name: SessionPool(gpt, mc, SessionConfig(budget=args.hops_budget, interval=interval),
                                   trained_lods=lods) for name, interval in (("refocused", 1), ("once", 0))}
        for announced, parts in found.items():
            parts.append(ask_chains(pools, task, flags["recall_blocks"], args.contexts, announced))
            progress.update(sum(map(len, found.values())) * args.contexts)
    facts = {"blocks": flags["recall_blocks"], "budget": pools["once"].focus_config.budget, "contexts": args.contexts,
             "seeds": len(models), "checkpoints": list(map(str, directories))}
    return [{"announced": announced, **facts,
             "systems": {name: mean_of([one[name] for one in parts]) for name in HOP_SYSTEMS}}
            for announced, parts in found.items()]


def seeds_gap_closed(found: list[dict[str, dict[str, np.ndarray]]], system: str) -> dict | None:
    """(window − system) / (window − full) on mean NLL; None where the gap is below 0.1 nat."""
    closed = share_of_gap(*(np.concatenate([one[name]["nll"] for one in found])
                            for name in ("window", system, "full")), seeds=len(found))
    return closed and {"mean": closed[0], "interval": closed[1]}


def focus_markdown(report: dict) -> str:
    lines = ["# Focus against the oracle", ""]
    for s in report["settings"]:
        full, window = (s["systems"][name] for name in ("full", "window"))
        known = "those that hold the answers" if s["task"] == "recall" else f"the {s['shown']} of greatest utility"
        plain = "".join(f"{label} {row['nll']['mean']:.3f} "
                        f"nats{', accuracy %.3f' % row['acc']['mean'] if 'acc' in row else ''}; "
                        for label, row in (("Full context", full), ("window", window)))
        lines += [f"## {s['name']}", "", f"n = {s['n']:,} tokens, W = {s['budget']}, at most {s['shown']} blocks shown "
                                         f"beside the tail; {s['contexts']} contexts × {s['seeds']} seed(s). "
                  f"{plain}blocks that matter: {known}.", "",
                  *table(("scores", "NLL", "accuracy", "regret", "hit@1", "hit@most", "Spearman", "gap closed"), (
                      (label, *(estimate_cell(s["systems"][system].get(name)) for name in (*MEASURES, "gap_closed")))
                      for system, label in LABELS.items())), ""]
    if report["hops"]:
        facts = report["hops"][0]
        lines += [f"## Two hops, {facts['blocks']} blocks at W = {facts['budget']}", "",
                  f"Share of questions of which both tokens are written; {facts['contexts']} questions × "
                  f"{facts['seeds']} seed(s).", "",
                  *table(("chains of the same blocks read before", *HOP_SYSTEMS), (
                      (row["announced"], *(estimate_cell(row["systems"][name]) for name in HOP_SYSTEMS))
                      for row in report["hops"])), ""]
    return "\n".join([*lines, "Intervals: 95 %, bootstrap over contexts, each with all seeds: of these models, not of "
                              f"others trained alike. Commit {report['commit']}.", ""])


def estimate_cell(found: dict | None) -> str:
    """Of what `mean_of` gives."""
    return "" if found is None else cell(found["mean"], found["interval"])


def last_line(settings: list[dict]) -> dict:
    """The lens's figures at the setting where each is worst; None where not measured, or
    the gap too small to measure."""
    of = {task: [s["systems"]["lens"] for s in settings if s["task"] == task] for task in ("recall", "text")}
    main = of["recall"] or of["text"]
    worst = lambda rows, name, pick: pick((row[name]["mean"] for row in rows if row.get(name)), default=None)
    return {"regret": worst(main, "regret", max), "hit_at_1": worst(main, "hit_at_1", min),
            "spearman": worst(main, "spearman", min),
            "gap_closed_recall": worst(of["recall"], "gap_closed", min),
            "gap_closed_text": worst(of["text"], "gap_closed", min)}


def paths(value: str) -> list[Path]:
    return [Path(part) for part in value.split(",") if part]


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("--recall_mc", type=paths, default=[],
                        help="checkpoint directories trained on recall with --mc_enabled=1, one per seed, "
                             "comma-separated")
    parser.add_argument("--text_mc", type=paths, default=[],
                        help="checkpoint directories trained on text with --mc_enabled=1, one per seed, "
                             "comma-separated")
    parser.add_argument("--hops_mc", type=paths, default=[],
                        help="checkpoint directories trained on --data=hops with --mc_enabled=1, one per seed, "
                             "comma-separated")
    parser.add_argument("--recall_sizes", default="32:8,64:8,128:8,128:16",
                        help="blocks:ratio, …: stored blocks, and their tokens over the budget")
    parser.add_argument("--hops_budget", type=int, default=0,
                        help="budget W [entries] for two hops, whose second block needs room, too; 0: as trained")
    parser.add_argument("--text_data", type=paths, default=[],
                        help="directories of text, comma-separated, judged apart; default: what the models were "
                             "trained on")
    parser.add_argument("--text_budgets", default="",
                        help="budgets W [entries] for text, comma-separated; default: as trained")
    parser.add_argument("--contexts", type=int, default=64, help="held-out contexts per setting and seed")
    parser.add_argument("--batch", type=int, default=16, help="contexts at a time")
    parser.add_argument("--candidates", type=int, default=8,
                        help="blocks a context that the oracle's search tries after its first round")
    parser.add_seed("random focus")
    parser.add_out("where the report goes", "focus")


def text_settings(model: Model, args) -> list[tuple[FocusSetting, Path | str]]:
    c, T = model.mc.config, model.gpt.config.sequence_len
    n = (T - c.horizon) // c.block_size * c.block_size
    budgets = [part for part in args.text_budgets.split(",") if part] or [str(c.budget)]
    if bad := [part for part in budgets if not part.isdecimal()]:
        raise UserError(f"--text_budgets: {bad[0]!r} is no number of entries")
    named = args.text_data or [model.meta["flags"]["data"]]
    return [(FocusSetting("text", f"text ({Path(data).name}), blocks of {c.block_size}", n, int(budget)), data)
            for data in named for budget in budgets]


def settings_of(models: list[Model], tokenizer: Tokenizer, args, task: str):
    """(setting, what gives each model its contexts of rows), for every setting of a task."""
    if task == "recall":
        if len({model.mc.config.block_size for model in models}) > 1:
            raise UserError("--recall_mc: models of one block size are judged together; give them to separate commands")
        for size in args.recall_sizes.split(","):
            found = [recall_setting(model, tokenizer, size) for model in models]
            yield found[0][0], [lambda rows, t=t, blocks=blocks: recall_contexts(t, blocks, rows,
                                                                                 models[0].mc.config.block_size)
                                for _, t, blocks in found]
        return
    if len({(text_settings(model, args)[0][0], model.mc.config.block_size) for model in models}) > 1:
        raise UserError("--text_mc: models of one shape, block size and budget are judged together; give them to "
                        "separate commands")
    for setting, data in text_settings(models[0], args):
        H = models[0].mc.config.horizon
        source = source_of(models[0].meta, "val", tokenizer=tokenizer, data=str(data), seed=args.seed)
        eval_rows(source, args.contexts * source.T)  # refuses more contexts than there are
        yield setting, [lambda rows, s=source, n=setting.n + H: text_contexts(s, n, rows)] * len(models)


def run(args: Namespace) -> None:
    check_least(args, contexts=1, batch=1, candidates=1)
    if not (args.recall_mc or args.text_mc or args.hops_mc):
        raise UserError("nothing to judge: name checkpoints with --recall_mc=DIR, --text_mc=DIR or --hops_mc=DIR")
    out = output_folder(args.out or base_dir() / "focus", "focus.json", "focus.md")
    tokenizer, settings = Tokenizer.load(), []
    for task, directories in (("recall", args.recall_mc), ("text", args.text_mc)):
        models = [load_checked(directory, tokenizer) for directory in directories]
        for setting, makers in settings_of(models, tokenizer, args, task) if models else ():
            progress, found = Progress(setting.name, args.contexts * len(models), "contexts", every_s=15), []
            for i, (model, make) in enumerate(zip(models, makers)):
                batches = (np.arange(first, min(first + args.batch, args.contexts))
                           for first in range(0, args.contexts, args.batch))
                found.append(judge_setting(model, setting, ((rows, make(rows)) for rows in batches), args,
                                   lambda done, before=i * args.contexts: progress.update(before + done)))
            c = models[0].mc.config
            settings.append({**setting._asdict(), "shown": (setting.budget - c.protected) // c.block_size,
                             "contexts": args.contexts, "seeds": len(models),
                             "checkpoints": [str(d) for d in directories],
                             "systems": setting_summary(found, task == "recall")})
    hops = judge_hops([load_checked(directory, tokenizer) for directory in args.hops_mc], args.hops_mc, tokenizer,
                      args) if args.hops_mc else []
    report = {"settings": settings, "hops": hops, "seed": args.seed, "candidates": args.candidates, "commit": commit()}
    write_file(out / "focus.json", json.dumps(report, indent=1) + "\n")
    text = focus_markdown(report)
    write_file(out / "focus.md", text)
    print(text)
    print0(f"report in {out}")
    two_hops = {"accuracy_two_hops": hops[0]["systems"]["refocused"]["mean"]} if hops else {}
    print(json.dumps({**last_line(settings), **two_hops, "report": str(out / "focus.json")}))
