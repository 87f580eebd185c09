"""A study: one default, arms that each change one thing, seeds; and what is reported of it.

A study is a YAML file:

    question: Which GistNet carries most?      heads the report
    base: {data: recall, depth: 2, …}          flags of base_train that every arm has; values may hold {seed} and $VARIABLES
    seeds: [1, 2, 3]
    factors: {mc_gist: [mean, slots]}          one at a time from the base: each value is an arm, "mc_gist=mean"
    arms: {wide: {mc_lens_keys: 8, …}}         arms that change several flags at once, by name
    evaluate: {function: "scripts.eval.measures:focus"}  function(checkpoint directory, **other keys) -> measure -> one number per held-out context,
                                               or {command: …}, with {checkpoint} in it, whose last line is a JSON object of numbers
    report: {regret: nll_lens - nll_oracle}    what the tables show, arithmetic on the means of measures; without it, the measures
    step_time: {pairs: 6, steps: 2}            each arm's training step against the default's, in alternation, as a ratio

A key "evaluate.NAME" among factors and arms changes an option of the evaluation. Cells that differ in nothing else share one training.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.common import UserError
from scripts.studies.cells import Formula, bootstrap, bootstrap_p, digest, false_discovery, interval, read_yaml, t_test

DEFAULT = "default"
KEYS = ("question", "base", "seeds", "factors", "arms", "evaluate", "report", "step_time")
OPTION = "evaluate."


@dataclass(frozen=True)
class Study:
    name: str
    question: str
    arms: dict[str, dict]  # name -> what it changes; the first is the default, and changes nothing
    base: dict
    seeds: list[int]
    evaluate: dict
    report: dict[str, Formula]
    step_time: dict | None

    def flags(self, arm: str, seed: int) -> dict[str, str]:
        """base_train's, but for the seed."""
        changed = {name: value for name, value in self.arms[arm].items() if not name.startswith(OPTION)}
        return {name: os.path.expandvars(filled(value, seed)) for name, value in (self.base | changed).items()}

    def options(self, arm: str, seed: int) -> dict:
        changed = {name.removeprefix(OPTION): value for name, value in self.arms[arm].items() if name.startswith(OPTION)}
        return {name: os.path.expandvars(filled(value, seed)) if isinstance(value, str) and name != "command" else value for name, value in (self.evaluate | changed).items()}

    def cell(self, arm: str, seed: int) -> dict:
        """What its numbers depend on, and the key of that."""
        flags, options = self.flags(arm, seed), self.options(arm, seed)
        trained = digest({"flags": flags, "seed": seed})
        return {"key": f"{trained}-{digest(options)}", "name": f"{arm}, seed {seed}", "study": self.name, "arm": arm, "seed": seed, "flags": flags,
                "evaluate": options, "model_tag": f"ablate_{self.name}_{trained}"}


def filled(value, seed: int) -> str:
    """A flag's value as text: {seed} put in, true and false as 1 and 0."""
    return str(int(value) if isinstance(value, bool) else value).replace("{seed}", str(seed))


def read_study(path: Path) -> Study:
    """UserError for a file that is no study."""
    found = read_yaml(path, KEYS, ("question", "base", "seeds", "evaluate"))
    factors, arms, seeds, evaluate = found.get("factors") or {}, found.get("arms") or {}, found["seeds"], found["evaluate"]
    for name, value in (("base", found["base"]), ("factors", factors), ("arms", arms), ("evaluate", evaluate), ("report", found.get("report", {}))):
        if not isinstance(value, dict):
            raise UserError(f"{path}: {name} is not a mapping")
    if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds) and len(set(seeds)) == len(seeds)):
        raise UserError(f"{path}: seeds must be a list of different whole numbers")
    if bad := [name for name, values in factors.items() if not isinstance(values, list)] + [name for name, change in arms.items() if not isinstance(change, dict)]:
        raise UserError(f"{path}: {bad[0]}: a factor is a list of values, an arm a mapping of flags")
    if ("function" in evaluate) == ("command" in evaluate):
        raise UserError(f"{path}: evaluate names a function or a command")
    changes = {f"{name.removeprefix(OPTION)}={value}": {name: value} for name, values in factors.items() for value in values} | arms
    if DEFAULT in changes or "seed" in found["base"] or any("seed" in change for change in changes.values()):
        raise UserError(f"{path}: {DEFAULT!r} names the arm that changes nothing, and seeds belong into `seeds`")
    report = {str(name): Formula(str(text)) for name, text in (found.get("report") or {}).items()}
    return Study(path.stem, found["question"], {DEFAULT: {}} | changes, found["base"], seeds, evaluate, report, found.get("step_time"))


def step_time_cells(study: Study, arms: list[str], seed: int) -> list[dict]:
    """One per arm whose training differs from the default's. seed: one that was trained; a step's time does not depend on it."""
    timing = {"pairs": 6, "steps": 2} | (study.step_time or {})
    against = study.cell(DEFAULT, seed)["model_tag"]
    cells = [study.cell(arm, seed) | timing | {"against": against} for arm in arms]
    return [cell | {"key": f"time-{digest({k: cell[k] for k in ('model_tag', 'against', 'pairs', 'steps')})}", "name": f"{cell['arm']}, step time"}
            for cell in cells if cell["model_tag"] != against]


def study_results(study: Study, done: dict[str, dict], seeds: list[int]) -> tuple[dict[tuple[str, int], dict], dict[str, dict]]:
    """((arm, seed) -> record, arm -> step time on the first seed that has one) of what was run. done: key -> record."""
    records = {(arm, seed): done[key] for arm in study.arms for seed in seeds if (key := study.cell(arm, seed)["key"]) in done}
    timed = [cell for seed in reversed(seeds) for cell in step_time_cells(study, list(study.arms), seed) if cell["key"] in done]
    return records, {cell["arm"]: done[cell["key"]]["results"] for cell in timed}


# ---------------------------------------------------------------------------------------------------------------------
# The report


@dataclass(frozen=True)
class Estimate:
    """Of one quantity in one arm. Intervals are 95 %; NaN where there is none."""

    mean: float
    interval: tuple[float, float]
    difference: float  # to the default, on the seeds that both have
    difference_interval: tuple[float, float]
    p: float


def quantities(study: Study, records: dict[tuple[str, int], dict]) -> dict[str, Formula]:
    return study.report or {name: Formula(name) for name in next(iter(records.values()))["results"]}


def estimates(formula: Formula, records: dict[tuple[str, int], dict], arms: list[str]) -> dict[str, Estimate]:
    """arm -> its estimate. records: (arm, seed) -> record. Documents are paired by their place in the lists.

    With one number per seed the paired t-test over seeds, else draws of seeds and documents. No p-value from one seed.
    """
    seeds = {arm: sorted(seed for a, seed in records if a == arm) for arm in arms}
    found = {}
    for arm in arms:
        if not seeds[arm]:
            continue
        both = [seed for seed in seeds[arm] if seed in seeds[DEFAULT]]
        mean, own_interval, _ = _estimate(formula, [[records[arm, seed] for seed in seeds[arm]]])
        nothing = math.nan, (math.nan, math.nan), math.nan
        difference = nothing if arm == DEFAULT or not both else _estimate(formula, [[records[a, seed] for seed in both] for a in (arm, DEFAULT)])
        found[arm] = Estimate(mean, own_interval, *difference)
    return found


def _estimate(formula: Formula, sides: list[list[dict]]) -> tuple[float, tuple[float, float], float]:
    """(value, interval, p that it is 0) of a formula on one side's records, or of the difference between two sides'."""
    measures = [{name: _matrix(name, records) for name in formula.names} for records in sides]
    whole = [formula({name: np.nanmean(x) for name, x in side.items()}) for side in measures]
    value = float(whole[0] - (whole[1] if len(sides) == 2 else 0))
    shapes = {x.shape for side in measures for x in side.values()}
    if len(shapes) > 1:
        raise UserError(f"{formula.text}: its measures have different numbers of contexts ({', '.join(str(shape[1]) for shape in sorted(shapes))})")
    S, C = shapes.pop()
    if C == 1:
        per_seed = [formula({name: x[:, 0] for name, x in side.items()}) for side in measures]
        return value, *t_test(per_seed[0] - (per_seed[1] if len(sides) == 2 else 0))
    draws = bootstrap(S, C)
    drawn = [formula({name: draws.means(x) for name, x in side.items()}) for side in measures]
    difference = drawn[0] - (drawn[1] if len(sides) == 2 else 0)
    return value, interval(difference), bootstrap_p(difference) if S > 1 else math.nan


def _matrix(name: str, records: list[dict]) -> np.ndarray:
    """[S, C] of a measure."""
    try:
        rows = [np.atleast_1d(np.asarray(record["results"][name], dtype=float)) for record in records]
    except KeyError:
        raise UserError(f"report: there is no measure {name}; there are {', '.join(sorted(records[0]['results']))}") from None
    if len({len(row) for row in rows}) > 1:
        raise UserError(f"report: {name} has different numbers of contexts in different cells; evaluate all with the same options")
    return np.stack(rows)


def table(study: Study, records: dict[tuple[str, int], dict], times: dict[str, dict]) -> tuple[str, dict[str, dict[str, Estimate]]]:
    """The report in Markdown, and quantity -> arm -> estimate. times: arm -> {"ratio", "low", "high"} of its step to the default's."""
    arms = [arm for arm in study.arms if any(a == arm for a, _ in records)]
    contexts = max(len(np.atleast_1d(x)) for record in records.values() for x in record["results"].values())
    test = (f"t-distribution over seeds and bootstrap over {contexts} contexts" if contexts > 1 else "t-test over seeds")
    lines = [f"# {study.name}: {study.question}", "",
             f"Intervals are 95 %. Each arm against the default on the same seeds and contexts, paired: {test}; q: share of false discoveries (Benjamini and Hochberg) among {len(arms) - 1} arms.", ""]
    found = {}
    for name, formula in quantities(study, records).items():
        found[name] = estimates(formula, records, arms)
        corrected = dict(zip(found[name], false_discovery([e.p for e in found[name].values()])))
        lines += [f"## {name}", "", "" if name == formula.text else f"`{formula.text}`", "", "| arm | seeds | mean | difference to the default | q |", "|---|---|---|---|---|"]
        for arm, e in found[name].items():
            count = sum(a == arm for a, _ in records)
            difference = "" if math.isnan(e.difference) else f"{e.difference:+.3f} {_range(e.difference_interval)}"
            lines.append(f"| {arm} | {count} | {e.mean:.3f} {_range(e.interval)} | {difference} | {'' if math.isnan(corrected[arm]) else f'{corrected[arm]:.4f}'} |")
        lines.append("")
    if times:
        lines += ["## Step time", "", "A training step against the default's, blocks in alternation in one process; median over pairs of blocks.", "",
                  "| arm | ratio |", "|---|---|", *(f"| {arm} | {t['ratio']:.3f} {_range((t['low'], t['high']))} |" for arm, t in times.items()), ""]
    commits = sorted({record["commit"] for record in records.values()})
    lines += [f"Commits: {', '.join(commits)}. Seeds: {', '.join(map(str, sorted({seed for _, seed in records})))}.", ""]
    return "\n".join(lines), found


def _range(bounds: tuple[float, float]) -> str:
    return "" if math.isnan(bounds[0]) else f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def plot_study(found: dict[str, dict[str, Estimate]], path: Path) -> None:
    """Bars with intervals, one panel per quantity; the default's value as a line. PNG at `path`, PDF beside it."""
    from scripts.eval.figures import BLUE, GREY, ORANGE, new_figure, save_figure
    count = len(found)
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    arms = max(len(of_arm) for of_arm in found.values())
    figure, axes = new_figure(rows, columns, width=4.6, height=1.2 + 0.32 * arms)
    for axis, (name, of_arm) in zip(axes.flat, found.items()):
        labels, values = list(of_arm), list(of_arm.values())
        place = np.arange(len(labels))[::-1]
        low, high = ([abs(e.mean - e.interval[end]) if not math.isnan(e.interval[end]) else 0 for e in values] for end in (0, 1))
        axis.barh(place, [e.mean for e in values], color=[ORANGE if arm == DEFAULT else BLUE for arm in labels], height=0.7)
        axis.errorbar([e.mean for e in values], place, xerr=[low, high], fmt="none", ecolor="black", capsize=3, linewidth=1)
        axis.axvline(of_arm[DEFAULT].mean if DEFAULT in of_arm else 0, color=GREY, linewidth=1, linestyle="--")
        axis.set_yticks(place, labels)
        axis.set_xlabel(name)
        axis.locator_params(axis="x", nbins=5)
    for axis in list(axes.flat)[count:]:
        axis.remove()
    save_figure(figure, path)
