"""The report of a suite: tables with intervals and paired tests, plots. `scripts.studies.cells` names the statistics.

Shapes: S seeds, C documents, D draws of the bootstrap.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.outputs import write_file
from nanochat.telemetry.sinks import read_metrics
from scripts.bench.decode import plot_decoding
from scripts.eval.figures import COLOURS, GREY, MARKERS, legend_below, new_figure, save_figure
from scripts.eval.methods.registry import INTERVALS
from scripts.eval.statistics import LEAST_GAP, bootstrap, bootstrap_p, false_discovery, interval
from scripts.eval.tables import cell, table
from scripts.studies.study import plot_study
from scripts.studies.study import study_report
from scripts.studies.suite import UNBOUNDED, Suite

MC = "gists_lens"  # the system that the others are compared with
LABELS = {
    "full": "full context", "window": "sliding window", "window_again": "sliding window, every token",
    "sinks": "window + sinks", "random_blocks": "random blocks", "bm25": "BM25 blocks",
    "bm25_again": "BM25 blocks, every token", "dense_mean": "dense retrieval, mean embeddings",
    "dense_learned": "dense retrieval, learned",
    "dense_learned_again": "dense retrieval, learned, every token", "drop_surprisal": "token dropping, surprisal",
    "drop_learned": "token dropping, learned", "mean_gists": "mean-pool gists + recency",
    "gists_even": "gists, no focus", "gists_recency": "gists + recency",
    "gists_random": "gists + random", "gists_lens": "gists + LensNet (MC)",
    "gists_lens_again": "gists + LensNet, every token",
    **{f"gists_lens_again_{i}": f"gists + LensNet, every {i} tokens" for i in INTERVALS[1:]},
    "gists_oracle": "gists + oracle", "snapkv": "SnapKV", "quest": "Quest"}
COLOUR = dict(zip(("gists_lens", "window", "gists_oracle", "full", "dense_learned", "gists_recency", "bm25", "snapkv"),
                  COLOURS))

DRAWN = [system for system in LABELS if system.removesuffix("_again") in COLOUR]


def look_of(system: str) -> dict:
    """How plots draw it; what looks at every token as its namesake, open and dashed."""
    once = system.removesuffix("_again")
    return dict(color=COLOUR[once], marker=MARKERS[list(COLOUR).index(once)], markerfacecolor=COLOUR[once]
                if system == once else "white",
                linestyle="-" if system == once else "--", label=LABELS[system])


@dataclass(frozen=True)
class Condition:
    model: str
    length: int
    budget: int


class Results:
    """Records by what they are of."""

    def __init__(self, records: list[dict]):
        self.by_cell: dict[tuple, dict[int, dict]] = {}
        for record in records:
            key = record["model"]["name"], record["length"], record["budget"], record["task"], record["system"]
            self.by_cell.setdefault(key, {})[record["seed"]] = record
        self.records = records

    def conditions(self) -> list[Condition]:
        """Those with a budget, the one with most cells first."""
        counts: dict[Condition, int] = {}
        for model, length, budget, _, system in self.by_cell:
            if system not in UNBOUNDED:
                counts[Condition(model, length, budget)] = counts.get(Condition(model, length, budget), 0) + 1
        return sorted(counts, key=lambda s: (-counts[s], s.model, s.length, s.budget))

    def of(self, condition: Condition, task: str, system: str) -> dict[int, dict]:
        """seed -> record."""
        budget = condition.length if system in UNBOUNDED else condition.budget
        return self.by_cell.get((condition.model, condition.length, budget, task, system), {})

    def systems(self, condition: Condition) -> list[str]:
        there = {system for model, length, budget, _, system in self.by_cell
                 if (model, length) == (condition.model, condition.length)
                 and (budget == condition.budget or system in UNBOUNDED)}
        return [name for name in LABELS if name in there]

    def tasks(self, condition: Condition) -> list[str]:
        return list(dict.fromkeys(task for model, length, budget, task, _ in self.by_cell
                                  if (model, length, budget) == (condition.model, condition.length, condition.budget)))

    def judged_by(self, condition: Condition, task: str) -> str:
        """"nll" for language modelling, else "acc"."""
        record = next(iter(next(found for system in self.systems(condition)
                                if (found := self.of(condition, task, system))).values()))
        return "nll" if record["text"] or task == "topic_lm" else "acc"


def together(*sides: dict[int, dict], measure: str) -> list[np.ndarray] | None:
    """[S, C] of each side on the seeds and documents that all have; None if there is none. measure: nll, acc, or a
    distance bucket of text, whose NLL is NaN where a document has no such token."""
    seeds = sorted(set.intersection(*(set(side) for side in sides)))
    if not seeds:
        return None
    values = [[(side[seed]["results"]["buckets"] | side[seed]["results"])[measure] for seed in seeds] for side in sides]
    documents = min(len(own) for side in values for own in side)  # the first ones are the same
    return [np.array([own[:documents] for own in side], dtype=float) for side in values]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def mean_interval(x_SC: np.ndarray, measure: str) -> tuple[float, float]:
    """95 % of a mean; of an accuracy, what of it lies in [0, 1]."""
    draws = bootstrap(*x_SC.shape).means(x_SC)
    return interval(draws.clip(0, 1) if measure == "acc" else draws)


def score_table(results: Results, condition: Condition) -> tuple[list[str], dict[str, list[int]]]:
    """Lines of Markdown: systems × tasks, mean and interval, with the sign of a difference to MC whose q over the
    systems is below 0.05; and system -> tasks on which MC is better, worse, neither."""
    systems, tasks = results.systems(condition), results.tasks(condition)
    text = {system: [] for system in systems}
    counts = {system: [0, 0, 0] for system in systems if system != MC}
    for task in tasks:
        measure = results.judged_by(condition, task)
        better, p = {}, {}
        for system in systems:
            own = together(results.of(condition, task, system), measure=measure)
            if own is None:
                text[system].append("")
                continue
            text[system].append(mean_cell(own[0], measure))
            both = together(results.of(condition, task, system), results.of(condition, task, MC),
                            measure=measure) if system != MC else None
            if both is not None:
                difference = bootstrap(*both[0].shape).means(both[0] - both[1])
                p[system], better[system] = bootstrap_p(difference), (both[0] - both[1]).mean() * (1 if measure
                                                                                                   == "acc" else -1)
        for system, corrected in zip(p, false_discovery(list(p.values()))):
            verdict = 2 if corrected >= 0.05 else int(better[system] > 0)
            counts[system][verdict] += 1
            text[system][-1] += (" −", " +", "")[verdict]
    head = ("system", *(f"{task} ({results.judged_by(condition, task)})" for task in tasks))
    return table(head, ((LABELS[system], *text[system]) for system in systems)), counts


def gap_closed(results: Results, condition: Condition, tasks: list[str], system: str,
               measure: str = "nll") -> tuple[float, tuple[float, float]] | None:
    """(window − system) / (window − full) on the mean over tasks, and its interval; None where the
    gap of NLL is below 0.1 nat."""
    parts = [together(*(results.of(condition, task, name) for name in ("window", system, "full")), measure=measure)
             for task in tasks]
    if any(part is None for part in parts) or len({part[0].shape for part in parts}) > 1:
        return None
    window, own, full = (np.mean([part[i] for part in parts], axis=0) for i in range(3))
    counted = ~np.isnan(window).any(0)
    window, own, full = (x[:, counted] for x in (window, own, full))
    if not counted.any() or (window - full).mean() < LEAST_GAP:
        return None
    draws = bootstrap(*window.shape)
    drawn_window, drawn_own, drawn_full = (draws.means(x) for x in (window, own, full))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float((window - own).mean() / (window - full).mean()), interval((drawn_window
                                                                                - drawn_own) / (drawn_window
                                                                                                - drawn_full))


def gap_table(results: Results, condition: Condition) -> list[str]:
    """Lines of Markdown: the share of the gap between sliding window and full context that
    each system closes, on NLL."""
    tasks = [task for task in results.tasks(condition) if gap_closed(results, condition, [task], "window") is not None]
    if not tasks:
        return ["No task with a gap of 0.1 nat between sliding window and full context: the share that is closed is "
                "not measurable.", ""]
    systems = [system for system in results.systems(condition) if system not in ("full", "window")]
    return [*table(("system", *tasks),
                   (share_row(system, [gap_closed(results, condition, [task], system) for task in tasks])
                    for system in systems)), ""]


def pair_table(results: Results, condition: Condition, system: str) -> list[str]:
    """Lines of Markdown: NLL of `system` minus that of each other one, its interval, and q over the systems."""
    tasks = [task for task in results.tasks(condition) if results.of(condition, task, system)]
    if not tasks:
        return []
    cells: dict[str, dict[str, str]] = {}
    for task in tasks:
        found = {}
        for other in (name for name in results.systems(condition) if name != system):
            if pair := together(results.of(condition, task, system), results.of(condition, task, other), measure="nll"):
                difference = pair[0] - pair[1]
                found[other] = float(difference.mean()), bootstrap(*difference.shape).means(difference)
        q = false_discovery([bootstrap_p(drawn) for _, drawn in found.values()])
        for (other, (mean, drawn)), value in zip(found.items(), q):
            cells.setdefault(other, {})[task] = f"{cell(mean, interval(drawn), '+.3f')}, q {value:.3f}"
    rows = ((LABELS[other], *(own.get(task, "") for task in tasks)) for other, own in cells.items())
    return [f"NLL of {LABELS[system]} minus that of each system, q over the systems:", "",
            *table(("system", *tasks), rows), ""]


def mean_cell(x_SC: np.ndarray, measure: str) -> str:
    return cell(x_SC.mean(), mean_interval(x_SC, measure), ".2f")


def share_row(system: str, found: list[tuple[float, tuple[float, float]] | None]) -> list[str]:
    """Shares of gaps with their intervals, nothing where there is none."""
    return [LABELS[system], *("" if f is None else cell(*f, ".2f") for f in found)]


def bucket_table(results: Results, condition: Condition) -> list[str]:
    """Lines of Markdown: for each text the same share by how far back the judged token last
    occurred, for buckets with a gap."""
    lines = []
    for task in results.tasks(condition):
        buckets = next(iter(results.of(condition, task, "window").values()),
                       {"results": {"buckets": {}}})["results"]["buckets"]
        names = [name for name in buckets if gap_closed(results, condition, [task], "window", name) is not None]
        if names:
            shares = {system: [gap_closed(results, condition, [task], system, name) for name in names]
                      for system in results.systems(condition) if system not in ("full", "window")}
            rows = (share_row(system, found) for system, found in shares.items() if any(found))
            lines += [f"The same on {task}, by how far back the judged token last occurred:", "",
                      *table(("system", *(f"{name} tokens" for name in names)), rows), ""]
    return lines


def cost_table(results: Results, condition: Condition) -> list[str]:
    rows = []
    for system in results.systems(condition):
        found = [record["results"] for task in results.tasks(condition)
                 for record in results.of(condition, task, system).values()]
        entries, flops, size, seconds = (np.median([f[name] for f in found])
                                         for name in ("entries", "flops", "bytes", "seconds"))
        rows.append((LABELS[system], f"{entries:.0f}", f"{flops:.3g}", f"{size:,.0f}", f"{seconds:.4f}"))
    return [*table(("system", "entries", "FLOPs", "KV bytes", "seconds"), rows), ""]


def beyond_table(results: Results, conditions: list[Condition], trained: int) -> list[str]:
    """Lines of Markdown: full context, window and MC at histories longer than the rows that were trained on."""
    rows = []
    for condition in sorted(conditions, key=lambda s: s.length):
        for task in results.tasks(condition):
            for system in results.systems(condition):
                of = {measure: together(results.of(condition, task, system), measure=measure)
                      for measure in ("nll", "acc")}
                if of["nll"] is not None:
                    rows.append((f"{condition.length:,}", f"{condition.length / trained:.0f}", task, LABELS[system],
                                 *(mean_cell(own[0], measure) for measure, own in of.items())))
    return [*table(("history", "× training", "task", "system", "NLL", "accuracy"), rows), ""]


# ---------------------------------------------------------------------------------------------------------------------
# Plots


def plot_depth(results: Results, model: str, path: Path, bins: int = 5) -> bool:
    """Accuracy by where the fact lies and how long the history is, one panel per system, over the tasks that were
    judged at the most lengths."""
    placed: dict[str, set[int]] = {}
    for (name, length, _, task, _), seeds in results.by_cell.items():
        if name == model and any(depth is not None for record in seeds.values()
                                 for depth in record["results"]["depth"]):
            placed.setdefault(task, set()).add(length)
    if not placed:
        return False
    most = max(map(len, placed.values()))
    tasks = {task for task, there in placed.items() if len(there) == most}
    lengths = sorted(set.union(*(placed[task] for task in tasks)))
    main = next(condition.budget for condition in results.conditions() if condition.model == model)
    sums: dict[str, np.ndarray] = {}
    for (name, length, budget, task, system), seeds in results.by_cell.items():
        if budget != main and system not in UNBOUNDED:
            continue
        for record in seeds.values():
            depth = np.array(record["results"]["depth"], dtype=float)
            if name == model and task in tasks:
                grid = sums.setdefault(system, np.zeros((2, len(lengths), bins)))
                place = np.minimum((np.nan_to_num(depth) * bins).astype(int), bins - 1)
                for i, values in enumerate((np.array(record["results"]["acc"]), np.ones(len(depth)))):
                    np.add.at(grid[i, lengths.index(length)], place[~np.isnan(depth)], values[~np.isnan(depth)])
    systems = [system for system in ("full", "window", "bm25", "dense_learned", "gists_recency", MC) if system in sums]
    columns = min(len(systems), 3)
    figure, axes = new_figure(math.ceil(len(systems) / columns), columns, width=3.6, height=1.3 + 0.35 * len(lengths))
    for axis, system in zip(axes.flat, systems):
        with np.errstate(invalid="ignore"):
            accuracy = sums[system][0] / sums[system][1]
        axis.imshow(accuracy, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (row, column), value in np.ndenumerate(accuracy):
            if not np.isnan(value):
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.5
                          else "white", fontsize=8)
        axis.set_xticks(range(bins), [f"{(i + 0.5) / bins:.0%}" for i in range(bins)])
        axis.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set(title=LABELS[system], xlabel="depth of the fact", ylabel="history [tokens]")
    for axis in list(axes.flat)[len(systems):]:
        axis.remove()
    figure.suptitle(f"{', '.join(sorted(tasks))}, W = {main}", fontsize=10)
    save_figure(figure, path)
    return True


def plot_buckets(results: Results, path: Path) -> bool:
    """NLL of text by how far back the judged token last occurred, one panel per text and condition; the
    points are means over documents."""
    panels = [(condition, task) for condition in results.conditions() for task in results.tasks(condition)
              if any(record["results"]["buckets"] for record in results.of(condition, task, MC).values())]
    if not panels:
        return False
    columns = min(len(panels), 2)
    figure, axes = new_figure(math.ceil(len(panels) / columns), columns, width=5.0, height=3.4)
    for axis, (condition, task) in zip(axes.flat, panels):
        systems = [system for system in results.systems(condition) if system in DRAWN]
        every = [record["results"]["buckets"] for system in systems
                 for record in results.of(condition, task, system).values()]
        names = [name for name in every[0] if any(value is not None for buckets in every for value in buckets[name])]
        for i, system in enumerate(systems):
            if not (found := results.of(condition, task, system)):
                continue
            x_SCN = np.array([[record["results"]["buckets"][name] for name in names] for record in found.values()],
                             dtype=float).transpose(0, 2, 1)
            draws = bootstrap(*x_SCN.shape[:2])
            drawn = [draws.means(x_SCN[..., k]) for k in range(len(names))]
            middle = np.array([np.nanmean(x_SCN[..., k]) if not np.isnan(x_SCN[..., k]).all() else np.nan
                               for k in range(len(names))])
            errors = np.array([np.abs(np.nanquantile(d, [0.025, 0.975]) - m) if not np.isnan(d).all() else [0, 0]
                               for d, m in zip(drawn, middle)]).T
            axis.errorbar(np.arange(len(names)) + 0.8 / len(systems) * (i - (len(systems) - 1) / 2), middle,
                          yerr=errors,
                          **look_of(system) | {"linestyle": "none"}, markersize=4, elinewidth=1.0, capsize=1.5)
        axis.set_xticks(range(len(names)), names)
        axis.set(title=f"{task}, n = {condition.length:,}, W = {condition.budget} ({condition.model})",
                 xlabel="distance to the last occurrence [tokens]", ylabel="NLL [nats per token]")
    legend_below(figure)
    for axis in list(axes.flat)[len(panels):]:
        axis.remove()
    save_figure(figure, path)
    return True


def plot_gap(results: Results, trained: dict[str, int], path: Path) -> bool:
    """Share of the gap that is closed against the budget, one panel per model, length up to the training's
    and task with several budgets."""
    panels: dict[tuple, list[int]] = {}
    for condition in (condition for condition in results.conditions() if condition.length <= trained[condition.model]):
        for task in results.tasks(condition):
            panels.setdefault((condition.model, condition.length, task), []).append(condition.budget)
    closed = {key: {(system, budget): found for budget in sorted(budgets)
                    for system in DRAWN if system not in ("full", "window")
                    if (found := gap_closed(results, Condition(key[0], key[1], budget), [key[2]], system))}
              for key, budgets in panels.items() if len(budgets) > 1}
    panels = {key: sorted(panels[key]) for key, found in closed.items() if len({budget for _, budget in found}) > 1}
    if not panels:
        return False
    columns = min(len(panels), 3)
    figure, axes = new_figure(math.ceil(len(panels) / columns), columns, width=4.0, height=3.0)
    for axis, ((model, length, task), budgets) in zip(axes.flat, panels.items()):
        for system in DRAWN:
            points = [(budget, found)
                      for budget in budgets if (found := closed[model, length, task].get((system, budget)))]
            if points:
                x, middle = [length / budget for budget, _ in points], np.array([f[0] for _, f in points])
                errors = np.abs(np.array([f[1] for _, f in points]) - middle[:, None]).T
                axis.errorbar(x, middle, yerr=errors, **look_of(system), markersize=4, linewidth=1.2, capsize=2)
        axis.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
        axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
        ratios = [length / budget for budget in budgets]
        axis.set_xscale("log", base=2)
        axis.set_xticks(ratios, [f"1/{ratio:.0f}" for ratio in ratios])
        axis.minorticks_off()
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, -2), min(high, 2.5))  # a gap that is hardly one has intervals that would hide all others
        axis.set(title=f"{task}, n = {length:,} ({model})", xlabel="budget, as a share of the history",
                 ylabel="gap closed (window 0, full 1)")
    legend_below(figure)
    for axis in list(axes.flat)[len(panels):]:
        axis.remove()
    save_figure(figure, path)
    return True


def plot_intervals(results: Results, path: Path) -> bool:
    """Share of the gap that MC closes against the tokens between two looks, one panel per task,
    a line per model and budget."""
    looks = {f"{MC}_again" + (f"_{tokens}" if tokens > 1 else ""): f"{tokens}" for tokens in INTERVALS} | {MC: "once"}
    lines: dict[str, list[tuple[Condition, dict]]] = {}
    for condition in sorted(results.conditions(), key=lambda s: (s.budget, s.model)):
        for task in results.tasks(condition):
            found = {system: gap for system in looks if (gap := gap_closed(results, condition, [task], system))}
            if len(found) > 2:
                lines.setdefault(task, []).append((condition, found))
    if not lines:
        return False
    figure, axes = new_figure(1, len(lines), width=4.4, height=3.2)
    for axis, (task, own) in zip(axes.flat, lines.items()):
        for i, (condition, found) in enumerate(own):
            place = [list(looks).index(system) for system in found]
            middle = np.array([gap for gap, _ in found.values()])
            errors = np.abs(np.array([around for _, around in found.values()]) - middle[:, None]).T
            axis.errorbar(np.array(place) + 0.08 * (i - (len(own) - 1) / 2), middle, yerr=errors,
                          color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=4,
                          linewidth=1.2, capsize=2,
                          label=f"{condition.model}, W = {condition.budget}")
        axis.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
        axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(looks)), list(looks.values()))
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, -2), min(high, 2.5))
        axis.set(title=task, xlabel="tokens between two looks", ylabel="gap closed (window 0, full 1)")
    legend_below(figure)
    save_figure(figure, path)
    return True


def plot_beyond(results: Results, model: str, budget: int, trained: int, path: Path) -> bool:
    """NLL and accuracy against the length of the history, up to far beyond the training length."""
    lengths = sorted({s.length for s in results.conditions() if (s.model, s.budget) == (model, budget)})
    tasks = [task for task in dict.fromkeys(t for n in lengths for t in results.tasks(Condition(model, n, budget)))
             if sum(task in results.tasks(Condition(model, n, budget)) for n in lengths) > 1]
    if not tasks or max(lengths) <= trained:
        return False
    figure, axes = new_figure(2, len(tasks), width=3.8, height=2.8)
    for column, task in enumerate(tasks):
        own_lengths = [n for n in lengths if task in results.tasks(Condition(model, n, budget))]
        for axis, measure, label in zip(axes[:, column], ("nll", "acc"), ("NLL [nats per token]", "accuracy")):
            for system in DRAWN:
                points = [(n, own[0]) for n in own_lengths
                          if (own := together(results.of(Condition(model, n, budget), task, system),
                                              measure=measure)) is not None]
                if len(points) > 1:
                    middle = np.array([x.mean() for _, x in points])
                    errors = np.abs(np.array([mean_interval(x, measure) for _, x in points]) - middle[:, None]).T
                    axis.errorbar([n for n, _ in points], middle, yerr=errors, **look_of(system), markersize=4,
                                  linewidth=1.2, capsize=2)
            axis.axvline(trained, color=GREY, linewidth=0.8, linestyle="--")
            axis.set_xscale("log", base=2)
            axis.set_xticks(own_lengths, [f"{n:,}" for n in own_lengths], rotation=20, ha="right")
            axis.minorticks_off()
            axis.set(xlabel="history [tokens]", ylabel=label, title=task)
    legend_below(figure)
    save_figure(figure, path)
    return True


def plot_overlay(pairs: dict[str, tuple[Path, Path]], path: Path) -> None:
    """Training loss of MegaContext and its vanilla twin by tokens, FLOPs and seconds."""
    figure, axes = new_figure(len(pairs), 3, width=3.8, height=2.9)
    for row, (name, (mega, vanilla)) in zip(axes, pairs.items()):
        for axis, metric, unit in zip(row, ("train.tokens", "train.flops", "train.elapsed"),
                                      ("tokens", "FLOPs", "seconds of training")):
            for label, log, colour in (("MC", mega, COLOURS[0]), ("vanilla", vanilla, COLOURS[1])):
                points = [(line[metric], line["train.loss"]) for line in read_metrics(log) if "train.loss" in line
                          and metric in line]
                if points:  # logs of older runs lack the seconds
                    axis.plot(*zip(*points), color=colour, label=label, linewidth=1.2, linestyle="-" if label == "MC"
                              else "--")
            axis.set(xlabel=unit, ylabel="LM loss [nats per token]", title=name, yscale="log")
            low, high = axis.get_ylim()
            if high < 10 * low:  # no power of ten in between
                axis.yaxis.set_minor_formatter("{x:g}")
        row[0].legend(fontsize=8)
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def write_report(suite: Suite, records: list[dict], out: Path, *, costs: dict[str, dict], trained: dict[str, int],
                 overlay: dict[str, tuple[Path, Path]],
                 studies: list[tuple]) -> str:
    """report.md and plots under `out`; returns the Markdown.

    costs: name -> what mc_bench printed; trained: model -> tokens of a training row; overlay:
    name -> logs of MC and of vanilla;
    studies: (study, its records, its step times).
    """
    results = Results(records)
    seeds = sorted({record["seed"] for record in records})
    lines = [f"# {suite.name}: {suite.title}", "",
             f"Seeds {', '.join(map(str, seeds))}: a model each, trained and fine-tuned alike; the same documents for "
             "every system and seed. Intervals are 95 %, by the "
             "t-distribution over seeds and bootstrap over documents, together. acc: share of the answer's tokens "
             "predicted right; nll: nats per token. "
             f"\"−\" behind a number: significantly worse than {LABELS[MC]} on the same documents, \"+\": better "
             "(paired, q < 0.05: of the marks "
             "in a column one in twenty is expected to be none, Benjamini and Hochberg); nothing: undecided.", ""]
    if len(seeds) < 3:
        lines += [f"**{len(seeds)} seed{'s' * (len(seeds) > 1)} only: these numbers show that everything runs, and "
                  "support no claim.**", ""]
    for i, condition in enumerate(results.conditions()):
        if condition.length > trained[condition.model]:
            continue
        table_lines, counts = score_table(results, condition)
        documents = max(record["documents"] for record in records if record["length"] == condition.length)
        lines += [f"## {condition.model}: n = {condition.length:,}, W = {condition.budget} "
                  f"(1/{condition.length / condition.budget:.0f}), up to {documents} documents per task and seed", "",
                  *table_lines, ""]
        if counts:
            lines += [f"{LABELS[MC]} against each system, in tasks:", "",
                      *table(("system", "MC better", "MC worse", "undecided"),
                             ((LABELS[system], *own) for system, own in counts.items())), ""]
        lines += ["Share of the gap between sliding window and full context that is closed (NLL; 1: as good as full "
                  "context):", "", *gap_table(results, condition), *bucket_table(results, condition),
                  *pair_table(results, condition, f"{MC}_again")]
        if not i:
            lines += ["Cost of one document (medians over tasks; entries are what the model sees before the answer, "
                      "FLOPs and bytes from shapes, seconds on a shared machine):", "",
                      *cost_table(results, condition)]
    lines += _beyond(results, trained, out)
    plots = {"buckets": plot_buckets(results, out / "buckets.png"), "gap": plot_gap(results, trained, out / "gap.png"),
             "intervals": plot_intervals(results, out / "intervals.png")}
    for model in trained:
        plots[f"depth_{model}"] = plot_depth(results, model, out / f"depth_{model}.png")
    captions = {"buckets": "NLL by distance to the last occurrence of the token; a system that was judged on fewer "
                           "documents, on those", "gap": "Gap closed against the budget",
                "intervals": "Gap closed against the tokens between two looks"}
    for name in (name for name, drawn in plots.items() if drawn):
        lines += [f"![{captions.get(name, 'Accuracy by depth of the fact and length of the history')}]({name}.png)", ""]
    if overlay:
        plot_overlay(overlay, out / "overlay.png")
        lines += ["## Training: MC and vanilla at equal tokens, FLOPs and seconds", "",
                  "![Loss by tokens, FLOPs and seconds](overlay.png)", ""]
    lines += _costs(costs, out)
    for study, study_records, times in studies:
        text, found = study_report(study, study_records, times)
        plot_study(found, out / f"ablation_{study.name}.png")
        lines += ["#" + text.replace("\n#", "\n##"), f"![{study.name}](ablation_{study.name}.png)", ""]
    commits, machines = sorted({record["commit"] for record in records}), {str(record["environment"])
                                                                           for record in records}
    lines += ["## Where this comes from", "", f"Commits {', '.join(commits)}. {' '.join(sorted(machines))}", ""]
    text = "\n".join(lines)
    write_file(out / "report.md", text)
    return text


def _beyond(results: Results, trained: dict[str, int], out: Path) -> list[str]:
    lines = []
    for model, rows in trained.items():
        beyond = [condition for condition in results.conditions() if condition.model == model
                  and condition.length > rows]
        for budget in sorted({condition.budget for condition in beyond}):
            own = [condition for condition in results.conditions() if condition.model == model
                   and condition.budget == budget]
            name = f"beyond_{model}_{budget}.png"
            drawn = plot_beyond(results, model, budget, rows, out / name)
            lines += [f"## {model}: beyond the training length of {rows:,} tokens, W = {budget}", "",
                      "Full context has its windows lifted; NLL, not ΔNLL: the full model is no reference there.", "",
                      *beyond_table(results, [condition for condition in own if condition.length > rows], rows),
                      *([f"![NLL and accuracy against length]({name})", ""] if drawn else [])]
    return lines


def _costs(costs: dict[str, dict], out: Path) -> list[str]:
    """What `mc_bench train` and `mc_bench decode` measured."""
    lines = ["## Cost: MC beside vanilla", ""] if costs else []
    for name, found in costs.items():
        if "curve" in found:
            plot_decoding(found, out / f"{name}.png")
            lines += [f"Decoding ({name}), W = {found['budget']}, {found['threads']} thread(s); ratios are medians "
                      f"over {found['rounds']} rounds in alternation:", "",
                      *table(("history", "MC ms / token", "vanilla ms / token", "vanilla / MC", "MC bytes",
                              "vanilla bytes"), map(_decoding, found["curve"])),
                      "", f"![Time per token and device memory against history]({name}.png)", ""]
        else:
            parts = ", ".join(f"{part} {seconds / found['vanilla_s']:.1%}" for part, seconds in found["parts"].items())
            lines += [f"* Training step ({name}): MC takes {cell(found['ratio'], (found['low'], found['high']))} times "
                      f"a vanilla step. In shares of a vanilla step: {parts}.", ""]
    return lines


def _decoding(c: dict) -> tuple[str, ...]:
    """A row: one length of history."""
    vanilla, speedup = c.get("vanilla"), c.get("speedup")
    return (f"{c['history']:,}", f"{c['mc']['mean_ms']:.2f}", f"{vanilla['mean_ms']:.2f}" if vanilla else "",
            cell(speedup["ratio"], (speedup["low"], speedup["high"]), ".2f") if speedup else "",
            f"{c['mc']['bytes']:,}",
            f"{vanilla['bytes']:,}" if vanilla else "")
