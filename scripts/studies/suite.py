"""A suite: systems × tasks × lengths × budgets × seeds, on checkpoints that it says how to make; one cell of it judged.

A suite is a YAML file:

    title: What does MegaContext keep?
    seeds: [1, 2, 3]
    models:                                     how checkpoints come about, one per model and seed
      tasks:
        tag: suite_{seed}                       name of the checkpoint directory; used as it
                                                is when the training is complete
        train: {data: tasks, mc_enabled: 1, …}  flags of base_train; values may hold {seed}, and $VARIABLES that
                                                are put in where they are used
        after: bases                            a model whose checkpoint must be there first (for init_from)
        finetune: {steps: 40, …}                flags of finetune_system: each system's own weights,
                                                trained alike on its own input;
                                                without it all read with the base's
        keep_drop: {label: {…}, train: {…}}     flags of importance and classifier, for drop_learned
    cells:                                      a list of products
      - {model: tasks, tasks: [alias, passkey], systems: [full, window, gists_lens], lengths: [1024],
      budgets: [128], documents: 48}
    cost: {step: {model: tasks, command: "python -m scripts.mc_bench train --checkpoint_dir={checkpoint}"},
    …}   by mc_bench train or decode
    overlay: {recall: [run of MC, run of vanilla]}             logs in $NANOCHAT_BASE_DIR/runs, drawn over each other
    texts: {prose: $TEXT/prose}                 folders of held-out text; their names are tasks, judged by
                                                the NLL of the 64 tokens after n
    files: {qasper: {path: $DATA/qasper.jsonl, format: longbench}}   examples of your own (`nanochat.tasks.external`),
                                                                     tasks under these names: those whose
                                                context holds n tokens, cut to n in its middle
    ablations: [runs/ablations/x.yaml]          studies that were run: their plots and tables go into the report

A system without a budget (full) is judged once per length. A cell's documents are rows 0, 1, … of its task: the same
for every system and every seed, so that all comparisons are paired.

Shapes: B documents of a batch, n tokens of history, H of continuation.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.tasks.external import FORMATS
from nanochat.tasks.generated import TASKS
from nanochat.tasks.schema import TaskBatch
from nanochat.tasks.text import BUCKETS, judged_buckets
from scripts.eval.methods.interface import Models
from scripts.eval.methods.registry import METHODS, make_method
from scripts.eval.provenance import digest
from scripts.studies.cells import read_yaml
from scripts.studies.study import filled

KEYS = ("title", "seeds", "models", "texts", "files", "cells", "cost", "overlay", "ablations")
MODEL_KEYS = ("tag", "train", "after", "finetune", "keep_drop")
CELL_KEYS = ("model", "tasks", "systems", "lengths", "budgets", "documents", "batch")
UNBOUNDED = ("full",)  # systems without a budget


@dataclass(frozen=True)
class Suite:
    name: str
    title: str
    seeds: list[int]
    models: dict[str, dict]
    texts: dict[str, str]
    files: dict[str, dict]
    groups: list[dict]
    cost: dict
    overlay: dict[str, list[str]]
    ablations: list[str]

    def model(self, name: str, seed: int) -> dict:
        """All that its checkpoints depend on."""
        found = self.models[name]
        flags = {flag: filled(value, seed) for flag, value in found["train"].items()}
        return {"name": name, "seed": seed, "tag": filled(found.get("tag", f"{self.name}_{name}_{{seed}}"), seed),
                "flags": flags,
                "finetune": found.get("finetune"), "keep_drop": found.get("keep_drop"),
                "after": self.model(found["after"], seed) if "after" in found else None}

    def cells(self, seeds: list[int]) -> list[dict]:
        """Every cell once, a seed after the other."""
        found = {}
        for seed in seeds:
            for group in self.groups:
                for system in group["systems"]:
                    for task in group["tasks"]:
                        for length in group["lengths"]:
                            for budget in [length] if system in UNBOUNDED else group["budgets"]:
                                cell = self._cell(group, seed, system, task, length, budget)
                                found[cell["key"]] = cell
        return list(found.values())

    def _cell(self, group: dict, seed: int, system: str, task: str, length: int, budget: int) -> dict:
        cell = {"model": self.model(group["model"], seed), "system": system, "task": task, "length": length,
                "budget": budget, "seed": seed,
                "documents": group.get("documents", 48), "batch": group.get("batch", 16),
                "text": filled(self.texts[task], seed) if task in self.texts else None}
        if task in self.files:
            cell["file"] = self.files[task]
        return {"key": digest(cell), "name": f"{system} on {task}, n {length}, W {budget}, seed {seed}", **cell}


def read_suite(path: Path) -> Suite:
    """UserError for a file that is no suite, with what it names that is not there."""
    found = read_yaml(path, KEYS, ("title", "seeds", "models", "cells"))
    seeds, models, groups, texts = found["seeds"], found["models"], found["cells"], found.get("texts") or {}
    files = found.get("files") or {}
    if not (isinstance(seeds, list) and seeds and all(isinstance(seed, int) for seed in seeds)
            and len(set(seeds)) == len(seeds)):
        raise UserError(f"{path}: seeds must be a list of different whole numbers")
    if not isinstance(models, dict) or not isinstance(groups, list):
        raise UserError(f"{path}: models is a mapping, cells a list")
    if not isinstance(texts, dict) or set(texts) & set(TASKS):
        raise UserError(f"{path}: texts is a mapping of names, other than those of tasks, to folders")
    if not all(isinstance(folder, str) for folder in texts.values()):
        raise UserError(f"{path}: texts is a mapping of names to folders")
    if not isinstance(files, dict) or set(files) & {*TASKS, *texts}:
        raise UserError(f"{path}: files is a mapping of names, other than those of tasks and texts, to path and format")
    for name, file in files.items():
        if not isinstance(file, dict) or set(file) != {"path", "format"} or not isinstance(file["path"],
                                                                                           str) or file["format"] not in list(FORMATS):  # noqa: E501
            raise UserError(f"{path}: files: {name} is a mapping of path and format, which is one of "
                            f"{', '.join(FORMATS)}")
    for name, model in models.items():
        if not (isinstance(model, dict) and set(model) <= set(MODEL_KEYS) and isinstance(model.get("train"), dict)
                and isinstance(model.get("tag", ""), str)
                and all(isinstance(model.get(key) or {}, dict) for key in ("finetune", "keep_drop"))):
            raise UserError(
                f"{path}: model {name} is a mapping of {', '.join(MODEL_KEYS)}, and train a mapping of flags")
        if "after" in model and model["after"] not in list(models)[:list(models).index(name)]:
            raise UserError(
                f"{path}: model {name} comes after {model['after']!r}, which is none of the models before it")
    for group in groups:
        _check_group(path, group, models, {*TASKS, *texts, *files})
    cost, overlay, ablations = found.get("cost") or {}, found.get("overlay") or {}, found.get("ablations") or []
    if not isinstance(cost, dict) or not all(isinstance(x, dict) and x.get("model") in list(models)
                                             and isinstance(x.get("command"), str) for x in cost.values()):
        raise UserError(f"{path}: cost is a mapping of names to a model of the suite and a command")
    if not isinstance(overlay, dict) or not all(isinstance(x, list) and len(x) == 2
                                                and all(isinstance(run, str) for run in x) for x in overlay.values()):
        raise UserError(f"{path}: overlay is a mapping of names to two runs")
    if not isinstance(ablations, list) or not all(isinstance(x, str) for x in ablations):
        raise UserError(f"{path}: ablations is a list of files")
    return Suite(path.stem, str(found["title"]), seeds, models, texts, files, groups, cost, overlay, ablations)


def _check_group(path: Path, group: dict, models: dict, tasks: set[str]) -> None:
    if not isinstance(group, dict) or set(group) - set(CELL_KEYS) or set(CELL_KEYS[:5]) - set(group):
        raise UserError(f"{path}: every entry of cells is a mapping with {', '.join(CELL_KEYS[:5])}, and may have "
                        f"{', '.join(CELL_KEYS[5:])}")
    if group["model"] not in list(models):
        raise UserError(f"{path}: there is no model {group['model']!r}; there are {', '.join(models)}")
    for key, known in (("systems", set(METHODS)), ("tasks", tasks)):
        if not isinstance(group[key],
                          list) or (unknown := [name for name in group[key] if not isinstance(name, str)
                                                or name not in known]):
            wrong = group[key] if not isinstance(group[key], list) else ", ".join(map(str, unknown))
            raise UserError(f"{path}: {key}: {wrong}: use a list of {', '.join(sorted(known))}")
    if "drop_learned" in group["systems"] and not (models[group["model"]].get("finetune")
                                                   and models[group["model"]].get("keep_drop")):
        raise UserError(f"{path}: drop_learned needs finetune and keep_drop of the model {group['model']}: its "
                        "classifier")
    for key in ("lengths", "budgets"):
        if not isinstance(group[key], list) or not all(isinstance(x, int) and x > 0 for x in group[key]):
            raise UserError(f"{path}: {key}: {group[key]}: use a list of whole numbers above 0")
    for key in ("documents", "batch"):
        if not (isinstance(group.get(key, 1), int) and group.get(key, 1) > 0):
            raise UserError(f"{path}: {key}: {group[key]}: use a whole number above 0")


# ---------------------------------------------------------------------------------------------------------------------
# One cell


def judge_cell(cell: dict, models: Models, make_batch: Callable[[int, int], TaskBatch]) -> dict:
    """A cell's results: per document mean NLL [nats] of the judged tokens, the share of them predicted right, and where
    the fact lies that was asked for (None: nowhere); for text the NLL by distance bucket. And the cost of a document.

    make_batch(first, last) -> documents first … last − 1. Seconds are those of `judge` alone: of the fastest batch,
    for the machine may be shared.
    """
    system = make_method(cell["system"], models, cell["budget"])
    found: dict[str, list] = {"nll": [], "acc": [], "depth": []}
    buckets: dict[str, list] = {}
    seconds, entries = [], 0.0
    for first in range(0, cell["documents"], cell["batch"]):
        rows = torch.arange(first, min(first + cell["batch"], cell["documents"]))
        made = make_batch(first, first + len(rows))
        tokens, targets = torch.from_numpy(made.tokens), torch.from_numpy(made.targets)
        begin = time.perf_counter()
        outcome, cost = system.judge(tokens, targets, made.n, rows)
        seconds.append((time.perf_counter() - begin) / len(rows))
        if not outcome.nll_B.isfinite().all():
            raise AssertionError(f"{cell['name']}: an NLL that is not finite")
        found["nll"] += outcome.nll_B.double().tolist()
        found["acc"] += outcome.acc_B.double().tolist()
        found["depth"] += [None if np.isnan(depth) else float(depth) for depth in made.depth]
        entries += float(outcome.entries_B.double().sum())
        if cell["text"]:
            for name, values in by_distance(made, outcome.nll_BP.double().numpy()).items():
                buckets.setdefault(name, []).extend(values)
    return {**found, "buckets": buckets, "entries": entries / cell["documents"], "flops": cost.flops,
            "bytes": cost.bytes, "seconds": min(seconds)}


def by_distance(made: TaskBatch, nll_BH: np.ndarray) -> dict[str, list[float | None]]:
    """Bucket of the distance to the last occurrence of the judged token -> per document its mean NLL, None
    where it has no such token."""
    buckets_BH = judged_buckets(made)
    return {name: [float(nll[bucket == i].mean()) if (bucket == i).any() else None
                   for nll, bucket in zip(nll_BH, buckets_BH)] for i, name in enumerate(BUCKETS)}
