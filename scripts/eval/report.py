"""The comparison as a report: a table in Markdown, the same numbers as JSON, plots. Intervals
are 95 % bootstraps over rows."""

import json
from pathlib import Path


from nanochat.outputs import write_file
from nanochat.telemetry.sinks import read_metrics
from scripts.eval.comparison import Outcome
from scripts.eval.figures import BLUE, GREEN, VERMILION, new_figure, save_figure
from scripts.eval.statistics import LEAST_GAP, bootstrap, bootstrap_interval, bootstrap_p, interval, share_of_gap
from scripts.eval.tables import cell, table

SYSTEMS = {  # name in report.json -> (label, which checkpoint)
    "full": ("full context", "MC"), "sliding_window": ("sliding window", "MC"), "mc_random": ("MC, random focus", "MC"),
    "mc_recency": ("MC, recency focus", "MC"), "mc_lens": ("MC, LensNet focus", "MC"),
    "mc_bm25": ("MC, BM25 focus", "MC"), "mc_lens_exchanged": ("MC, LensNet asked another question", "MC"),
    "mc_oracle": ("MC, oracle focus", "MC"),
    "vanilla_full": ("full context", "vanilla"), "vanilla_window": ("sliding window", "vanilla")}


def task_report(outcomes: dict[str, Outcome], *, history: int, budget: int, with_accuracy: bool, facts: dict) -> dict:
    """One task's part of report.json. ΔNLL is against the full context of the same checkpoint, row by row."""
    rows = []
    for system, outcome in outcomes.items():
        full = outcomes["vanilla_full" if system.startswith("vanilla") else "full"]
        delta = (outcome.nll_B - full.nll_B).double().numpy()
        rows.append({
            "system": system, "nll": float(outcome.nll_B.double().mean()), "delta_nll": float(delta.mean()),
            "delta_nll_interval": bootstrap_interval(lambda i: delta[i].mean(), len(delta)),
            "acc": float(outcome.acc_B.double().mean()) if with_accuracy else None,
            "entries": round(float(outcome.entries_B.double().mean()))})
    return {"history": history, "budget": budget, "rows": rows, "contexts": len(outcomes["full"].nll_B),
            "gap_closed": {name: compared_gap_closed(outcomes, name) for name in outcomes if name.startswith("mc_")},
            "lens_ahead": {name: accuracy_difference(outcomes["mc_lens"], outcomes[name])
                           for name in ("sliding_window", "mc_bm25") if with_accuracy and name in outcomes},
            **facts}


def accuracy_difference(own: Outcome, other: Outcome) -> dict:
    """Paired over contexts; p of its being 0, by bootstrap."""
    delta = (own.acc_B - other.acc_B).double().numpy()
    draws = bootstrap(1, len(delta)).means(delta[None])
    return {"accuracy": float(delta.mean()), "interval": list(interval(draws)), "p": bootstrap_p(draws)}


def compared_gap_closed(outcomes: dict[str, Outcome], system: str) -> dict | None:
    """(window − system) / (window − full) on mean NLL, with its interval; None where the gap
    is too small to be measured."""
    found = share_of_gap(*(outcomes[name].nll_B.double().numpy() for name in ("sliding_window", system, "full")))
    return found and {"share": found[0], "interval": found[1]}


def comparison_markdown(report: dict) -> str:
    lines = ["# Vanilla and MegaContext on the same history", ""]
    for name, task in report["tasks"].items():
        lines += [
            f"## {name}", "",
            f"History n = {task['history']} tokens, budget W = {task['budget']} entries "
            f"({task['history'] / task['budget']:.1f}:1), "
            f"R = {task['recent']} recent tokens protected, H = {task['horizon']} tokens judged, block size "
            f"{task['block_size']}, "
            f"{task['contexts']} held-out contexts. {trained(task)}", "",
            *table(("model", "system", "NLL", "ΔNLL@H (95 %)", "accuracy", "entries"), (
                (*SYSTEMS[row["system"]][::-1], cell(row["nll"]),
                 cell(row["delta_nll"], row["delta_nll_interval"], "+.3f"), cell(row["acc"]), row["entries"])
                for row in task["rows"]))]
        lens = task["gap_closed"]["mc_lens"]
        if lens is None:
            closed = (f"Window and full context differ by less than {LEAST_GAP} nat: the share of the gap that MC "
                      "closes is not measurable.")
        else:
            closed = (f"LensNet focus closes {cell(lens['share'], lens['interval'], '.2f')} of the gap between sliding "
                      "window and full context.")
        lines += ["", closed, *ahead(task), *text_kept(task), ""]
    lines += ["## Cost", ""]
    for name, cost in report["step_times"].items():
        parts = ", ".join(f"{part} {share:.1%}" for part, share in cost["shares"].items())
        lines.append(f"* {name}: a training step with MC takes {cell(cost['ratio'], (cost['low'], cost['high']))} "
                     "times a vanilla step. "
                     f"In shares of a vanilla step: {parts}.")
    lines += ["", f"Seed {report['seed']}, commit {report['commit']}.", ""]
    return "\n".join(lines)


def trained(task: dict) -> str:
    flops = task["flops"]
    if "vanilla" not in flops:
        return f"Trained on {task['tokens']:,} tokens: {flops['mc']:.3g} FLOPs."
    return (f"Both models were trained on {task['tokens']:,} tokens: {flops['mc']:.3g} FLOPs with MC, "
            f"{flops['vanilla']:.3g} without.")


def ahead(task: dict) -> list[str]:
    """How much more often than others the lens's working context answers right."""
    return [f"LensNet focus minus {SYSTEMS[name][0].removeprefix('MC, ')}, accuracy: "
            f"{cell(found['accuracy'], found['interval'], '+.3f')}, p = {found['p']:.2g}."
            for name, found in task["lens_ahead"].items()]


def text_kept(task: dict) -> list[str]:
    """What focus does to text that asks for nothing."""
    if (text := task.get("text")) is None:
        return []
    return [f"Plain held-out code and prose, the next {text['tokens']} tokens of {text['contexts']} contexts: "
            f"{cell(text['lens_to_window'], text['lens_to_window_interval'], '+.3f')} nat to the sliding window "
            f"({cell(text['window'])}; full context {cell(text['full'])})."]


def write_comparison(report: dict, runs: dict[str, dict[str, Path]], out: Path) -> str:
    """report.json, report.md and plots under `out`; returns the Markdown. runs: task -> {"mc",
    "vanilla"} -> metrics.jsonl."""
    write_file(out / "report.json", json.dumps(report, indent=1) + "\n")
    text = comparison_markdown(report)
    write_file(out / "report.md", text)
    plot_systems(report, out / "systems.png")
    plot_training(runs, out / "training.png")
    return text


COLOUR_OF = {"MC": BLUE, "vanilla": VERMILION}


def plot_systems(report: dict, path: Path) -> None:
    figure, axes = new_figure(1, len(report["tasks"]), width=5.2, height=3.6)
    for axis, (name, task) in zip(axes[0], report["tasks"].items()):
        rows = task["rows"][::-1]
        labels = [f"{SYSTEMS[r['system']][0]} ({SYSTEMS[r['system']][1]})" for r in rows]
        axis.barh(labels, [r["nll"] for r in rows], color=[COLOUR_OF[SYSTEMS[r["system"]][1]] for r in rows])
        for place, row in enumerate(rows):
            accuracy = "" if row["acc"] is None else f"  acc {row['acc']:.2f}"
            axis.text(row["nll"], place, f" {row['nll']:.2f}{accuracy}", va="center", fontsize=8)
        axis.set_xlim(0, max(r["nll"] for r in rows) * 1.35)
        axis.set_xlabel("NLL of the continuation (nats per token)")
        axis.set_title(f"{name}: n = {task['history']}, W = {task['budget']}", fontsize=10)
        axis.tick_params(labelsize=8)
    save_figure(figure, path)


def plot_training(runs: dict[str, dict[str, Path]], path: Path) -> None:
    figure, axes = new_figure(1, len(runs), width=5.2, height=3.2)
    for axis, (name, kinds) in zip(axes[0], runs.items()):
        for kind, path_of_kind in kinds.items():
            label, lines = {"mc": "MC"}.get(kind, kind), read_metrics(path_of_kind)
            points = [(line["train.tokens"], line["train.loss"]) for line in lines if "train.loss" in line
                      and "train.tokens" in line]
            axis.plot(*zip(*points), color=COLOUR_OF[label], label=f"{label}: LM loss", linewidth=1.2)
            working = [(line["train.tokens"], line["mc.loss.wc"]) for line in lines if "mc.loss.wc" in line]
            if working:
                axis.plot(*zip(*working), color=GREEN, label="MC: working-context loss", linewidth=1.2)
        axis.set_xlabel("tokens")
        axis.set_ylabel("nats per token")
        axis.set_title(f"{name}: training", fontsize=10)
        axis.legend(fontsize=8, frameon=False)
        axis.tick_params(labelsize=8)
    save_figure(figure, path)
