"""Run a suite of benchmarks: systems × tasks × lengths × budgets × seeds at equal
entries, with tables, tests and plots.

    python -m scripts.mc_study suite quick | paper | SUITE.yaml
    python -m scripts.mc_study suite --rerun=RESULTS.jsonl:LINE      one cell again, from its record alone

What a suite is: `scripts/studies/suite.py`. It trains what it needs, then judges cell after cell; a run that was
stopped goes on. Under $NANOCHAT_BASE_DIR/evals/DATE/SUITE it writes results.jsonl (a record per cell: configuration,
commit, environment, one number per document, cost), report.md and plots.
"""

import json
import os
import shlex
import time
from argparse import Namespace
from datetime import date
from functools import cache, lru_cache, partial
from pathlib import Path

import numpy as np

from nanochat.checkpoint import complete_steps, load_model_state
from nanochat.common import FlagParser, UserError, base_dir, parse_json, print0, whole_number
from nanochat.dataset import Progress, open_corpus
from nanochat.outputs import output_folder
from nanochat.tasks.external import load_examples
from nanochat.tasks.generated import task_rows
from nanochat.tasks.schema import Example, TaskBatch, batch_of
from nanochat.tasks.text import TextRows
from nanochat.tasks.words import Words
from nanochat.token_cache import open_token_cache
from nanochat.tokenizer import Tokenizer
from scripts.eval.methods.interface import Models
from scripts.eval.methods.registry import METHODS, load_models
from scripts.eval.methods.token_classifier import FILE
from scripts.eval.provenance import ROOT, commit, digest, environment
from scripts.eval.subcommands import call, check_least
from scripts.studies import run_classifier, run_finetune, run_importance
from scripts.studies.cells import CellRecords, run_cells, whole_numbers
from scripts.studies.run_ablate import run_command, run_script, trained_model
from scripts.studies.study import read_study, study_results
from scripts.studies.suite import Suite, judge_cell, read_suite
from scripts.studies.suite_report import write_report

SUITES = ROOT / "runs" / "benchmarks"
NEEDS_CLASSIFIER = "drop_learned"
TEXT_HORIZON = 64  # tokens of text that are judged

# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints: of a model and a seed, and of each system fine-tuned from it


def base_folder(model: dict) -> Path:
    return base_dir() / "checkpoints" / model["tag"]


def classifier_folder(model: dict) -> Path:
    return base_dir() / "checkpoints" / f"{model['tag']}_keep_drop_{digest(model)}"


def arm_folder(model: dict, system: str) -> Path:
    """The checkpoint that a system reads with."""
    if not model["finetune"]:
        return base_folder(model)
    recipe = {"base": digest(model), "finetune": model["finetune"], "keep_drop": model["keep_drop"]
              if system == NEEDS_CLASSIFIER else None}
    return base_dir() / "checkpoints" / f"{model['tag']}_{METHODS[system].arm or system}_{digest(recipe)}"


def same_value(a: object, b: object) -> bool:
    """Whether two values of a flag, parsed or as a suite writes them, are the same: 1 is 1.0 and "1"."""
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return str(a) == str(b)


def is_trained(model: dict) -> bool:
    """Whether its checkpoint is there and finished. UserError for one of that name which was trained with
    other flags (folders aside)."""
    folder = base_folder(model)
    if not (folder.is_dir() and complete_steps(folder)):
        return False
    meta = load_model_state(folder)[1]
    for name, value in model["flags"].items():
        was = meta["flags"].get(name)
        if "$" not in str(value) and not same_value(was, value):
            raise UserError(f"{folder} was trained with --{name}={was}, the suite asks for {value}: remove or rename "
                            "it, and what was fine-tuned from it")
    return meta["step"] == meta["num_iterations"]


def make_base(model: dict) -> None:
    if not is_trained(model):
        if model["after"]:
            make_base(model["after"])
        trained_model({name: os.path.expandvars(value) for name, value in model["flags"].items()}, model["seed"],
                      model["tag"])


def make_classifier(model: dict) -> None:
    base, labels = base_folder(model), classifier_folder(model)
    if not (labels / FILE).exists():
        call(run_importance, {"checkpoint_dir": base, "labels": labels, **model["keep_drop"].get("label", {})})
        call(run_classifier, {"checkpoint_dir": base, "labels": labels, **model["keep_drop"].get("train", {})})


def make_arm(model: dict, system: str) -> None:
    system = METHODS[system].arm or system
    folder, classifier = arm_folder(model,
                                    system), {"classifier": classifier_folder(model) / FILE} if system == NEEDS_CLASSIFIER else {}  # noqa: E501
    if not complete_steps(folder):
        call(run_finetune, {"method": system, "checkpoint_dir": base_folder(model), "out": folder, **classifier,
                            **model["finetune"]})


def prepare(cell: dict) -> dict:
    """A cell of preparation: what its checkpoint needs, each only where it is not there yet."""
    model, system = cell["model"], cell["system"]
    make_base(model)
    if system == NEEDS_CLASSIFIER:
        make_classifier(model)
    if system and model["finetune"]:
        make_arm(model, system)
    return {"checkpoint": str(arm_folder(model, system) if system else base_folder(model))}


def preparations(cells: list[dict]) -> list[list[dict]]:
    """Bases, then fine-tuned arms: each once, and only where it is not there."""
    bases, arms = {}, {}
    for cell in cells:
        model, system = cell["model"], cell["system"]
        bases[model["tag"]] = {"key": f"base-{digest(model)}", "name": f"training {model['tag']}", "model": model,
                               "system": "", "seed": model["seed"]}
        if model["finetune"]:
            arm = METHODS[system].arm or system
            arms[arm_folder(model, system)] = {"key": f"arm-{digest({'model': model, 'arm': arm})}",
                                               "name": f"fine-tuning {model['tag']} for {arm}", "model": model,
                                               "system": arm, "seed": model["seed"]}
    return [[cell for cell in bases.values() if not is_trained(cell["model"])],
            [cell for folder, cell in arms.items() if not complete_steps(folder)]]


# ---------------------------------------------------------------------------------------------------------------------
# Cells


@cache
def words() -> Words:
    tokenizer = Tokenizer.load()
    return Words.of(tokenizer, open_token_cache(open_corpus("stdlib"), "val", tokenizer).tokens)


@cache
def texts(data: str, n: int) -> TextRows:
    return TextRows(os.path.expandvars(data), "val", Tokenizer.load(), n, TEXT_HORIZON)


@cache
def long_examples(path: str, format: str, n: int) -> list[Example]:
    """Those of a file whose context holds n tokens. UserError if there are none."""
    found = [example for example in load_examples(os.path.expandvars(path), format)
             if len(Tokenizer.load().encode(example.context)) >= n]
    if not found:
        raise UserError(f"{path} has no example with a context of {n} tokens; ask for shorter histories")
    return found


@lru_cache(maxsize=256)
def make_batch(task: str, text: str | None, file: tuple[str, str] | None, length: int, block_size: int, first: int,
               last: int) -> TaskBatch:
    """Documents first … last − 1 of a task: every system's, so they are made once."""
    if file:
        found = long_examples(*file, length)
        if last > len(found):
            raise UserError(f"{file[0]} has {len(found)} examples with a context of {length} tokens; lower documents "
                            f"of {task}")
        return batch_of(found[first:last], Tokenizer.load(), block_size, length)
    rows = np.arange(first, last)
    return texts(text, length).batch(rows) if text else task_rows(task, words(), "val", rows, length,
                                                                  block_size=block_size)


@lru_cache(maxsize=1)
def models_of(folder: Path) -> Models:
    return load_models(folder)[0]


def judge_record(cell: dict) -> dict:
    """A cell's record."""
    begin = time.time()
    own = models_of(arm_folder(cell["model"], cell["system"]))
    file = (cell["file"]["path"], cell["file"]["format"]) if "file" in cell else None
    results = judge_cell(cell, own, partial(make_batch, cell["task"], cell["text"], file, cell["length"],
                                            own.mc.config.block_size))
    return {**cell, "results": results, "total_seconds": round(time.time() - begin, 2), "commit": commit(),
            "environment": environment(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S")}


def is_cell(cell: dict) -> bool:
    """Whether what a record says of its cell has the types that `scripts.studies.suite` gives it."""

    def is_model(model: object) -> bool:
        return (isinstance(model, dict) and all(isinstance(model[name], str) for name in ("name", "tag"))
                and type(model["seed"]) is int and Path(model["tag"]).name == model["tag"] != ""
                and all(isinstance(x, str) for x in (model["flags"] | {"": ""}).values())
                and all(model[name] is None or isinstance(model[name], dict) for name in ("finetune", "keep_drop"))
                and (model["after"] is None or is_model(model["after"])))

    counts, words, file = ("length", "budget", "documents", "batch"), ("key", "name",
                                                                       "task"), cell.get("file",
                                                                                         {"path": "", "format": ""})
    return (is_model(cell["model"]) and cell["system"] in METHODS
            and all(type(cell[name]) is int and 0 < cell[name] < 2**31 for name in counts) and type(cell["seed"]) is int
            and all(isinstance(cell[name], str) for name in words) and isinstance(cell["text"], str | None)
            and all(isinstance(file[name], str) for name in ("path", "format")))


def rerun(where: str) -> None:
    """One cell again, from its record alone; exit code 1 unless every number is the same."""
    path, _, line = where.rpartition(":")
    try:
        recorded = parse_json(Path(path).read_bytes().splitlines()[(whole_number(line)
                                                                    or 0) - 1]) if whole_number(line) else None
        cell = {name: recorded[name] for name in ("key", "name", "model", "system", "task", "length", "budget", "seed",
                                                  "documents", "batch", "text")}
        cell |= {"file": recorded["file"]} if "file" in recorded else {}
        if not is_cell(cell) or not all(isinstance(recorded["results"][name], list) for name in ("nll", "acc")):
            raise ValueError("a record of something else")
    except (OSError, ValueError, IndexError, KeyError, TypeError) as e:
        raise UserError(f"--rerun={where}: no record of a cell there ({type(e).__name__}: {e}); name "
                        "RESULTS.jsonl:LINE") from None
    prepare(cell)
    found, was = judge_record(cell)["results"], recorded["results"]
    same = all(found[name] == was[name] for name in found if name != "seconds")
    summary = {"cell": cell["name"], "nll": float(np.mean(found["nll"])), "recorded_nll": float(np.mean(was["nll"])),
               "acc": float(np.mean(found["acc"])),
               "recorded_acc": float(np.mean(was["acc"])),
               "largest_difference_nll": float(np.abs(np.subtract(found["nll"], was["nll"])).max()), "same": same}
    print(json.dumps(summary), flush=True)
    if not same:
        raise SystemExit(1)


def make_tokenizer(cell: dict) -> dict:
    run_script("scripts.tok_train", {"data": cell["data"]})
    return {}


def run_suite(suite: Suite, seeds: list[int], records: CellRecords, jobs: int) -> None:
    cells, made = suite.cells(seeds), CellRecords(records.path.with_name("checkpoints.jsonl"))
    if not (base_dir() / "tokenizer" / "tokenizer.json").exists():
        print0(f"{suite.name}: no tokenizer in {base_dir()}: one is trained on the embedded corpus, as the quickstart does")  # noqa: E501
        run_cells([{"key": "tokenizer", "name": "tokenizer", "data": "stdlib"}],
                  "scripts.studies.run_suite:make_tokenizer", made, what=suite.name, again=True)
    for preparation in preparations(cells):
        if preparation:
            run_cells(preparation, "scripts.studies.run_suite:prepare", made, what=suite.name, jobs=jobs, again=True)
    done = records.read()
    waiting = [cell for cell in cells if cell["key"] not in done]
    print0(f"{suite.name}: {len(cells)} cells, {len(cells) - len(waiting)} of them done before")
    # each checkpoint is loaded once
    waiting.sort(key=lambda cell: (cell["seed"], str(arm_folder(cell["model"], cell["system"]))))
    progress = Progress(suite.name, len(waiting), "cells", every_s=10)
    for i, cell in enumerate(waiting, 1):
        records.append(judge_record(cell))
        progress.update(i)


def measure_cost(cell: dict) -> dict:
    return run_command(cell["command"].format(checkpoint=shlex.quote(str(base_folder(cell["model"])))))


def cost_cells(suite: Suite) -> dict[str, dict]:
    """name -> cell: what the suite has measured by mc_bench, on the first seed's checkpoints."""
    found = {}
    for name, entry in suite.cost.items():
        model = suite.model(entry["model"], suite.seeds[0])
        cell = {"model": model, "command": entry["command"], "seed": model["seed"]}
        found[name] = {"key": f"cost-{digest(cell)}", "name": f"cost: {name}", **cell}
    return found


def report_of_suite(suite: Suite, seeds: list[int], records: CellRecords) -> str:
    done, out = records.read(), records.path.parent
    own = [done[cell["key"]] for cell in suite.cells(seeds) if cell["key"] in done]
    costs = {name: done[cell["key"]]["results"] for name, cell in cost_cells(suite).items() if cell["key"] in done}
    trained = {name: load_model_state(base_folder(suite.model(name, seeds[0])))[1]["model_config"]["sequence_len"]
               for name in sorted({record["model"]["name"] for record in own})}
    logs = {name: tuple(base_dir() / "runs" / run / "metrics.jsonl" for run in pair)
            for name, pair in suite.overlay.items()}
    for name in [name for name, pair in logs.items() if not all(path.exists() for path in pair)]:
        print0(f"note: no training logs {' and '.join(map(str, logs.pop(name)))}: the overlay of {name} is left out "
               "(the quickstart makes them)")
    studies = []
    for name in suite.ablations:
        study = read_study(ROOT / name)
        path = base_dir() / "ablations" / study.name / "results.jsonl"
        found = study_results(study, CellRecords(path).read(), study.seeds)
        if found[0]:
            studies.append((study, *found))
        else:
            print0(f"note: no results of {name} in {path}: it is left out (python -m scripts.mc_study ablate {name})")
    return write_report(suite, own, out, costs=costs, trained=trained, overlay=logs, studies=studies)


def results_folder(suite: Suite) -> Path:
    """The newest of the suite's folders under evals/DATE, today's if there is none."""
    there = sorted((base_dir() / "evals").glob(f"????-??-??/{suite.name}"))
    return there[-1] if there else base_dir() / "evals" / date.today().isoformat() / suite.name


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("suite", nargs="?", default="", help="quick, paper, or the YAML file of a suite")
    parser.add_argument("--rerun", default="",
                        help="instead: RESULTS.jsonl:LINE, one cell again from its record, exit code 1 if a number "
                             "differs")
    parser.add_argument("--seeds", default="", help="seeds to run, like 1,2; default the suite's")
    parser.add_argument("--jobs", type=int, default=1,
                        help="trainings and fine-tunings at a time, each a process; cells are judged one after the other")  # noqa: E501
    parser.add_switch("--report", False, "1: only write the report on the cells that were run")
    parser.add_argument("--out", type=Path, default=None,
                        help="folder of the results; default the newest $NANOCHAT_BASE_DIR/evals/DATE/SUITE, today's "
                             "if there is none")


def run(args: Namespace) -> None:
    os.environ["NANOCHAT_BASE_DIR"] = str(base_dir())  # suites name it
    if bool(args.suite) == bool(args.rerun):
        raise UserError("name one of: a suite (quick, paper, or a YAML file), or --rerun=RESULTS.jsonl:LINE")
    check_least(args, jobs=1)
    if args.rerun:
        return rerun(args.rerun)
    path = SUITES / f"{args.suite}.yaml"
    suite = read_suite(path if path.exists() else Path(args.suite))
    seeds = whole_numbers(args.seeds, "--seeds") if args.seeds else suite.seeds
    out = args.out or results_folder(suite)
    if args.report and not (out / "results.jsonl").exists():
        raise UserError(f"--report=1, but there are no results in {out}")
    records = CellRecords(output_folder(out, "results.jsonl", "report.md") / "results.jsonl")
    if not args.report:
        run_suite(suite, seeds, records, args.jobs)
        run_cells(list(cost_cells(suite).values()), "scripts.studies.run_suite:measure_cost", records,
                  what=f"{suite.name}: cost")
    text = report_of_suite(suite, seeds, records)
    print(text, flush=True)
    print(json.dumps({"report": str(out / "report.md"), "results": str(records.path), "cells": len(records.read())}))
