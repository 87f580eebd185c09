"""What focus wins on real text, by horizon and number of blocks, and how much of it anything could have known.

    python -m scripts.mc_eval text --text_mc=DIR,DIR --text_data=DIR,DIR --out=DIR     models of one
                                                                                       shape, one per seed;
                                                                                       kinds of text

Every system is judged on the same continuations of 64 tokens; "horizon h" counts their first h, which is what a session
reads that refocuses every h tokens. The predictor is fitted on rows of the training split. What a model gave is kept in
--out, so that a command that was interrupted, or has another seed, goes on from there.
"""

import json
from argparse import Namespace
from pathlib import Path
from typing import Iterator

import numpy as np
import torch

from nanochat.common import FlagParser, UserError, base_dir, key_seed, print0
from nanochat.dataloader import eval_rows, source_of
from nanochat.dataset import Progress
from nanochat.outputs import output_folder, replacing, write_file
from nanochat.tokenizer import Tokenizer
from scripts.eval.agreement import spearman
from scripts.eval.bm25 import bm25_scores
from scripts.eval.comparison import FocusComparison
from scripts.eval.provenance import commit
from scripts.eval.run_focus import Model, load_checked, paths
from scripts.eval.scores import tail_attention, text_contexts
from scripts.eval.statistics import LEAST_GAP, bootstrap_interval
from scripts.eval.subcommands import check_least
from scripts.eval.tables import cell, table
from scripts.eval.text_focus import HORIZONS, Predictor, Tried, far_only, features, fit, judge_cuts, utilities_by_horizon  # noqa: E501

SYSTEMS = ("lens", "recency", "random", "bm25", "tail_attention", "predictor", "oracle")
FAR = {"words used again": 1, "pairs used again": 2}  # label -> length of what stood far back and not since


def comparisons(model: Model, source, count: int, budget: int, args, progress: Progress) -> Iterator[FocusComparison]:
    K, T = model.mc.config.block_size, source.T
    n = (T - HORIZONS[-1]) // K * K
    for first in range(0, count, args.batch):
        rows = np.arange(first, min(first + args.batch, count))
        tokens, targets, _ = text_contexts(source, n + HORIZONS[-1], rows)
        yield FocusComparison(model.gpt, model.mc, tokens, targets, n, args.seed, torch.from_numpy(rows), budget)
        progress.update(int(rows[-1]) + 1)


def predictors(model: Model, source, budget: int, args, what: str) -> dict[int, Predictor]:
    """One for each horizon, fitted to the true utilities on `train_contexts` rows."""
    found, progress = [], Progress(f"{what}: rows to fit on", args.train_contexts, "rows", every_s=15)
    for focus in comparisons(model, source, args.train_contexts, budget, args, progress):
        nothing = focus.outcome(torch.full((len(focus.tokens), focus.n_blocks), -torch.inf)).nll_BP
        found.append((features(focus), utilities_by_horizon(nothing, [Tried(1, one.nll_BP) for one in focus.alone()])))
    x = torch.cat([one for one, _ in found])
    return {horizon: fit(x, torch.cat([utility[i] for _, utility in found])) for i, horizon in enumerate(HORIZONS)}


def judge_text(model: Model, source, budget: int, counts: list[int], fitted: dict[int, Predictor], args,
               what: str) -> dict[str, np.ndarray]:
    """name -> [contexts, 64]: losses of every system as `judge_cuts` names them, "far …" masks of targets;
    "rho …" [contexts, horizons]."""
    parts: dict[str, list] = {}
    progress = Progress(f"{what}: contexts judged", args.contexts, "contexts", every_s=15)
    for focus in comparisons(model, source, args.contexts, budget, args, progress):
        history = focus.tokens[:, :focus.n]
        scores = {**{name: focus.scores(name) for name in ("lens", "recency", "random")},
                  "bm25": bm25_scores(history, focus.K, history[:, -model.mc.config.protected:]),
                  "tail_attention": tail_attention(focus),
                  "next_gate": focus.teacher_scores()["gate"]}
        if fitted:
            with torch.no_grad():
                x = features(focus)
                guesses = {f"predictor {horizon}": model_h(x) for horizon, model_h in fitted.items()}
            pad = torch.full((len(x), focus.n_blocks - focus.free_blocks), -torch.inf)
            scores |= {name: torch.cat([guess, pad], 1) for name, guess in guesses.items()}
        found, utility = judge_cuts(focus, scores, counts, args.candidates, args.rounds)
        for name, x in scores.items():
            found[f"rho {name}"] = torch.stack([spearman(x[:, :focus.free_blocks], one) for one in utility], 1)
        for label, length in FAR.items():
            found[f"far {label}"] = far_only(focus.tokens, focus.n, budget, length)
        for name, x in found.items():
            parts.setdefault(name, []).append(x.double())
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def judged_once(model: Model, directory: Path, data: Path, budget: int, counts: list[int], args, out: Path,
                tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """What `judge` gives, from --out if it was judged before with the same settings."""
    what = f"{directory.name}, {data.name}, W = {budget}"
    settings = (str(directory.resolve()), model.meta["step"], str(data), budget,
                *(getattr(args, name) for name in ("contexts", "train_contexts", "candidates", "rounds", "seed")))
    kept = out / f"{directory.name}-{data.name}-{budget}-{key_seed(*settings):016x}.npz"
    if kept.exists():
        with np.load(kept) as found:
            return dict(found)
    held, train = (source_of(model.meta, split, tokenizer=tokenizer, data=str(data), seed=args.seed)
                   for split in ("val", "train"))
    eval_rows(held, args.contexts * held.T)  # refuses more contexts than there are
    fitted = predictors(model, train, budget, args, what) if args.train_contexts else {}
    found = judge_text(model, held, budget, counts, fitted, args, what)
    with replacing(kept) as part, open(part, "wb") as f:
        np.savez(f, **found)
    return found


def of_horizon(system: str, horizon: int, count: int) -> str:
    return f"{system} {horizon}@{count}" if system in ("predictor", "oracle") else f"{system}@{count}"


def share(upper: np.ndarray, mine: np.ndarray, lower: np.ndarray, weight: np.ndarray, seeds: int,
          least: float = 0.0) -> dict | None:
    """(upper − mine) / (upper − lower) of weighted mean losses [contexts, P], with its 95 % bootstrap over contexts;
    None where the difference of the ends is below `least` nats, or its own interval reaches zero:
    such a share means nothing."""
    totals = np.stack([(x * weight).sum(1) for x in (upper - mine, upper - lower, np.ones_like(upper))], 1)
    part = lambda i: totals[i, 0].sum() / max(totals[i, 1].sum(), 1e-9)
    if totals[:, 1].sum() <= max(least * totals[:, 2].sum(), 1e-9) or bootstrap_interval(lambda i: totals[i, 1].sum(),
                                                                                         len(totals),
                                                                                         seeds=seeds)[0] <= 0:
        return None
    every = np.arange(len(totals))
    return {"mean": float(part(every)), "interval": bootstrap_interval(part, len(totals), seeds=seeds)}


def summarize(found: dict[str, np.ndarray], counts: list[int], with_predictor: bool, seeds: int) -> dict:
    """Of all contexts of all seeds."""
    systems = [s for s in SYSTEMS if with_predictor or s != "predictor"]
    most, summary = counts[-1], {"horizons": {}, "far": {}}
    masks = {horizon: np.broadcast_to(np.arange(HORIZONS[-1]) < horizon, found["full"].shape).astype(float)
             for horizon in HORIZONS}
    for horizon, mask in masks.items():
        mean = lambda name: float((found[name] * mask).sum() / mask.sum())
        row = summary["horizons"][horizon] = {"nll": {name: mean(name) for name in ("full", "window", "gists")},
                                              "gap_closed": {}, "spearman": {}}
        for system in ("gists", *systems):
            for count in counts if system != "gists" else [0]:
                name = of_horizon(system, horizon, count) if count else "gists"
                row["nll"][f"{system}@{count}"] = mean(name)
                row["gap_closed"][f"{system}@{count}"] = share(found["window"], found[name], found["full"], mask,
                                                               seeds, LEAST_GAP)
        chosen = lambda system: found[of_horizon(system, horizon, most)]
        row["share_of_oracle"] = {s: share(chosen("random"), chosen(s), chosen("oracle"), mask, seeds)
                                  for s in systems if s not in ("random", "oracle")}
        if with_predictor:
            row["share_of_predictor"] = share(chosen("random"), chosen("lens"), chosen("predictor"), mask, seeds)
        for system in ("lens", "bm25", "tail_attention", "next_gate",
                       *([f"predictor {horizon}"] if with_predictor else [])):
            rho = found[f"rho {system}"][:, HORIZONS.index(horizon)]
            row["spearman"][system.split()[0]] = {"mean": float(rho.mean()),
                                                  "interval": bootstrap_interval(lambda i: rho[i].mean(), len(rho),
                                                                                 seeds=seeds)}
    for label in FAR:
        mask = found[f"far {label}"]
        mean = lambda name: float((found[name] * mask).sum() / max(mask.sum(), 1))
        names = {s: of_horizon(s, HORIZONS[-1], most) for s in systems}
        summary["far"][label] = {"targets": int(mask.sum()), "share": float(mask.mean()),
                                 "nll": {name: mean(name) for name in ("full", "window", "gists")} | {s: mean(name)
                                                                                                      for s, name in names.items()},  # noqa: E501
                                 "gap_closed": {s: share(found["window"], found[name], found["full"], mask, seeds,
                                                         LEAST_GAP) for s, name in names.items()}}
    return summary


def share_cell(found: dict | None) -> str:
    return "–" if found is None else cell(found["mean"], found["interval"], "+.2f")


def text_markdown(report: dict) -> str:
    lines = ["# Focus on real text", ""]
    for s in report["settings"]:
        counts, most, by = s["counts"], s["counts"][-1], s["summary"]["horizons"]
        systems = [name for name in SYSTEMS if f"{name}@{most}" in by[HORIZONS[0]]["nll"]]
        head = ("", *(f"{h} tokens" for h in HORIZONS))
        row = lambda label, shown: (label, *(shown(by[h]) for h in HORIZONS))
        closed = [row("NLL full / window", lambda r: f"{r['nll']['full']:.3f} / {r['nll']['window']:.3f}"),
                  row("no block", lambda r: share_cell(r["gap_closed"]["gists@0"]))]
        closed += [row(name, lambda r: share_cell(r["gap_closed"][f"{name}@{most}"])) for name in systems]
        closed += [row(f"{name}, {count} block(s)", lambda r: share_cell(r["gap_closed"][f"{name}@{count}"]))
                   for count in counts[:-1] for name in ("recency", "lens", "predictor", "oracle") if name in systems]
        of_oracle = [row(f"{name}, share", lambda r: share_cell(r["share_of_oracle"][name]))
                     for name in systems if name not in ("random", "oracle")]
        of_oracle += [row(f"{name}, ρ", lambda r: share_cell(r["spearman"][name]))
                      for name in by[HORIZONS[0]]["spearman"]]
        far_rows = []
        for label, far in s["summary"]["far"].items():
            nll = [f"{far['nll'][name]:.3f}" for name in ("full", "window", "gists", *systems)]
            far_rows += [(f"{label}: NLL", f"{far['targets']} ({far['share']:.1%})", *nll),
                         ("gap closed", "", "", "", "", *(share_cell(far["gap_closed"][name]) for name in systems))]
        lines += [f"## {s['data']}, blocks of {s['block_size']}, W = {s['budget']}", "",
                  f"n = {s['n']:,} tokens; {s['contexts']} contexts × {s['seeds']} seed(s); at most {most} blocks "
                  "beside the tail.", "",
                  f"Gap between window and full context that is closed, {most} blocks shown:", "",
                  *table(head, closed), "",
                  "Share of what the oracle wins over random choice, and rank correlation with the true utilities:",
                  "", *table(head, of_oracle), "",
                  "Targets that stood far back and not in the window since, 64 tokens:", "",
                  *table(("", "targets", "full", "window", "no block", *systems), far_rows), ""]
    return "\n".join([*lines, "Intervals: 95 %, bootstrap over contexts, each with all seeds: of these models, not of "
                              "others trained alike; "
                      f"–: the gap is below {LEAST_GAP} nat or not sure to be one. Commit {report['commit']}.", ""])


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("--text_mc", type=paths, required=True,
                        help="checkpoint directories of text models with --mc_enabled=1, one per seed, comma-separated")
    parser.add_argument("--text_data", type=paths, default=[],
                        help="directories of text, comma-separated, judged apart; default: what the models were "
                             "trained on")
    parser.add_argument("--text_budgets", default="", help="budgets W [entries], comma-separated; default: as trained")
    parser.add_argument("--contexts", type=int, default=32, help="held-out contexts per kind of text, budget and seed")
    parser.add_argument("--train_contexts", type=int, default=64,
                        help="rows that the predictor is fitted on; 0: no predictor")
    parser.add_argument("--batch", type=int, default=16, help="contexts at a time")
    parser.add_argument("--candidates", type=int, default=4,
                        help="blocks a context that the oracle adds one of, each round after the first")
    parser.add_argument("--rounds", type=int, default=4, help="most blocks that the oracle's greedy search adds up")
    parser.add_seed("random focus, and of the choice of rows")
    parser.add_out("where the report goes", "text_focus")


def run(args: Namespace) -> None:
    check_least(args, contexts=1, train_contexts=0, batch=1, candidates=1, rounds=1)
    if bad := [part for part in args.text_budgets.split(",") if part and not part.isdecimal()]:
        raise UserError(f"--text_budgets: {bad[0]!r} is no number of entries")
    out = output_folder(args.out or base_dir() / "text_focus", "text_focus.json", "text_focus.md")
    tokenizer = Tokenizer.load()
    models = [load_checked(directory, tokenizer) for directory in args.text_mc]
    shapes = {(m.mc.config.block_size, m.mc.config.protected, m.mc.config.budget, m.gpt.config.sequence_len)
              for m in models}
    if len(shapes) > 1:
        raise UserError("--text_mc: models of one shape, block size and budget are judged together; give them to "
                        "separate commands")
    (K, R, trained, T), flags, settings = shapes.pop(), models[0].meta["flags"], []
    for data in args.text_data or [Path(flags["data"])]:
        for budget in map(int, args.text_budgets.split(",") if args.text_budgets else [trained]):
            most = min((budget - R) // K, (T - HORIZONS[-1]) // K - R // K)
            counts = sorted({c for c in (1, 2, 4) if c < most} | {most})
            found = [judged_once(model, directory, data, budget, counts, args, out, tokenizer)
                     for model, directory in zip(models, args.text_mc)]
            joined = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
            settings.append({"data": data.name, "block_size": K, "budget": budget, "n": (T - HORIZONS[-1]) // K * K,
                             "counts": counts, "contexts": args.contexts, "seeds": len(models),
                             "checkpoints": list(map(str, args.text_mc)),
                             "summary": summarize(joined, counts, bool(args.train_contexts), len(found)),
                             "by_seed": [summarize(one, counts, bool(args.train_contexts), 1)["horizons"]
                                         for one in found]})
    report = {"settings": settings, "seed": args.seed, "train_contexts": args.train_contexts, "commit": commit()}
    write_file(out / "text_focus.json", json.dumps(report, indent=1) + "\n")
    text = text_markdown(report)
    write_file(out / "text_focus.md", text)
    print(text)
    print0(f"report in {out}")
    print(json.dumps({"gap_closed": {f"{s['data']} W={s['budget']}": {h: (row["gap_closed"][f"lens@{s['counts'][-1]}"]
                                                                          or {}).get("mean")
                                                                      for h, row in s["summary"]["horizons"].items()}
                                     for s in settings},
                      "report": str(out / "text_focus.json")}))
