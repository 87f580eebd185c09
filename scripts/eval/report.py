"""The comparison as a report: a table in Markdown, the same numbers as JSON, plots. Intervals are 95 % bootstraps over rows."""

import json
from pathlib import Path

import numpy as np

from mc.evaluation import Outcome
from nanochat.outputs import write_file
from nanochat.recorder import read_metrics

SYSTEMS = {  # name in report.json -> (label, which checkpoint)
    "full": ("full context", "MC"), "sliding_window": ("sliding window", "MC"), "mc_random": ("MC, random focus", "MC"),
    "mc_recency": ("MC, recency focus", "MC"), "mc_lens": ("MC, LensNet focus", "MC"), "mc_oracle": ("MC, oracle focus", "MC"),
    "vanilla_full": ("full context", "vanilla"), "vanilla_window": ("sliding window", "vanilla")}
LEAST_GAP = 0.1  # nat: below it, the share of the gap that is closed means nothing


def task_report(outcomes: dict[str, Outcome], *, history: int, budget: int, with_accuracy: bool, facts: dict) -> dict:
    """One task's part of report.json. ΔNLL is against the full context of the same checkpoint, row by row."""
    rows = []
    for system, outcome in outcomes.items():
        full = outcomes["vanilla_full" if system.startswith("vanilla") else "full"]
        delta = (outcome.nll_B - full.nll_B).double().numpy()
        rows.append({
            "system": system, "nll": float(outcome.nll_B.double().mean()), "delta_nll": float(delta.mean()),
            "delta_nll_interval": bootstrap(lambda i: delta[i].mean(), len(delta)),
            "acc": float(outcome.acc_B.double().mean()) if with_accuracy else None,
            "entries": round(float(outcome.entries_B.double().mean()))})
    return {"history": history, "budget": budget, "rows": rows, "contexts": len(outcomes["full"].nll_B),
            "gap_closed": {name: compared_gap_closed(outcomes, name) for name in outcomes if name.startswith("mc_")}, **facts}


def bootstrap(statistic, count: int, draws: int = 2000, seeds: int = 1) -> list[float]:
    """95 % interval of statistic(indices) over `count` values. Of several seeds, one behind the other, a context is drawn with all of its seeds:
    the interval is then of these models, not of others trained alike."""
    rng, contexts = np.random.default_rng(0), count // seeds
    values = [statistic((rng.integers(0, contexts, contexts) + contexts * np.arange(seeds)[:, None]).ravel()) for _ in range(draws)]
    return [float(np.quantile(values, q)) for q in (0.025, 0.975)]


def compared_gap_closed(outcomes: dict[str, Outcome], system: str) -> dict | None:
    """(window − system) / (window − full) on mean NLL, with its interval; None where the gap is too small to be measured."""
    window, full, mine = (outcomes[name].nll_B.double().numpy() for name in ("sliding_window", "full", system))
    if (gap := (window - full).mean()) < LEAST_GAP:
        return None
    share = lambda i: (window[i] - mine[i]).mean() / max((window[i] - full[i]).mean(), 1e-9)
    return {"share": float((window - mine).mean() / gap), "interval": bootstrap(share, len(window))}


def comparison_markdown(report: dict) -> str:
    lines = ["# Vanilla and MegaContext on the same history", ""]
    for name, task in report["tasks"].items():
        lines += [
            f"## {name}", "",
            f"History n = {task['history']} tokens, budget W = {task['budget']} entries ({task['history'] / task['budget']:.1f}:1), "
            f"R = {task['recent']} recent tokens protected, H = {task['horizon']} tokens judged, block size {task['block_size']}, "
            f"{task['contexts']} held-out contexts. Both models were trained on {task['tokens']:,} tokens: "
            f"{task['flops']['mc']:.3g} FLOPs with MC, {task['flops']['vanilla']:.3g} without.", "",
            "| model | system | NLL | ΔNLL@H (95 %) | accuracy | entries |", "|---|---|---|---|---|---|"]
        for row in task["rows"]:
            label, checkpoint = SYSTEMS[row["system"]]
            accuracy = "" if row["acc"] is None else f"{row['acc']:.3f}"
            low, high = row["delta_nll_interval"]
            lines.append(f"| {checkpoint} | {label} | {row['nll']:.3f} | {row['delta_nll']:+.3f} [{low:+.3f}, {high:+.3f}] | {accuracy} | {row['entries']} |")
        lens = task["gap_closed"]["mc_lens"]
        if lens is None:
            closed = f"Window and full context differ by less than {LEAST_GAP} nat: the share of the gap that MC closes is not measurable."
        else:
            low, high = lens["interval"]
            closed = f"LensNet focus closes {lens['share']:.2f} [{low:.2f}, {high:.2f}] of the gap between sliding window and full context."
        lines += ["", closed, ""]
    lines += ["## Cost", ""]
    for name, cost in report["step_times"].items():
        parts = ", ".join(f"{part} {share:.1%}" for part, share in cost["shares"].items())
        lines.append(f"* {name}: a training step with MC takes {cost['ratio']:.3f} [{cost['low']:.3f}, {cost['high']:.3f}] times a vanilla step. "
                     f"In shares of a vanilla step: {parts}.")
    lines += ["", f"Seed {report['seed']}, commit {report['commit']}.", ""]
    return "\n".join(lines)


def write_comparison(report: dict, runs: dict[str, dict[str, Path]], out: Path) -> str:
    """report.json, report.md and plots under `out`; returns the Markdown. runs: task -> {"mc", "vanilla"} -> metrics.jsonl."""
    write_file(out / "report.json", json.dumps(report, indent=1) + "\n")
    text = comparison_markdown(report)
    write_file(out / "report.md", text)
    import matplotlib
    matplotlib.use("Agg")
    plot_systems(report, out / "systems.png")
    plot_training(runs, out / "training.png")
    return text


COLOURS = {"MC": "#0072B2", "vanilla": "#D55E00"}  # Okabe-Ito, told apart by the colour-blind


def plot_systems(report: dict, path: Path) -> None:
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(report["tasks"]), figsize=(5.2 * len(report["tasks"]), 3.6), squeeze=False)
    for axis, (name, task) in zip(axes[0], report["tasks"].items()):
        rows = task["rows"][::-1]
        labels = [f"{SYSTEMS[r['system']][0]} ({SYSTEMS[r['system']][1]})" for r in rows]
        axis.barh(labels, [r["nll"] for r in rows], color=[COLOURS[SYSTEMS[r["system"]][1]] for r in rows])
        for place, row in enumerate(rows):
            accuracy = "" if row["acc"] is None else f"  acc {row['acc']:.2f}"
            axis.text(row["nll"], place, f" {row['nll']:.2f}{accuracy}", va="center", fontsize=8)
        axis.set_xlim(0, max(r["nll"] for r in rows) * 1.35)
        axis.set_xlabel("NLL of the continuation (nats per token)")
        axis.set_title(f"{name}: n = {task['history']}, W = {task['budget']}", fontsize=10)
        axis.tick_params(labelsize=8)
    save_figure(figure, path)


def plot_training(runs: dict[str, dict[str, Path]], path: Path) -> None:
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 3.2), squeeze=False)
    for axis, (name, kinds) in zip(axes[0], runs.items()):
        for kind, label in (("mc", "MC"), ("vanilla", "vanilla")):
            lines = read_metrics(kinds[kind])
            points = [(line["train.tokens"], line["train.loss"]) for line in lines if "train.loss" in line and "train.tokens" in line]
            axis.plot(*zip(*points), color=COLOURS[label], label=f"{label}: LM loss", linewidth=1.2)
            working = [(line["train.tokens"], line["mc.loss.wc"]) for line in lines if "mc.loss.wc" in line]
            if working:
                axis.plot(*zip(*working), color="#009E73", label="MC: working-context loss", linewidth=1.2)
        axis.set_xlabel("tokens")
        axis.set_ylabel("nats per token")
        axis.set_title(f"{name}: training", fontsize=10)
        axis.legend(fontsize=8, frameon=False)
        axis.tick_params(labelsize=8)
    save_figure(figure, path)


def save_figure(figure, path: Path) -> None:
    """As PNG, at `path`, and beside it as PDF."""
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".pdf"))
