"""Run a study: arms that each change one thing of a default, times seeds, compared with paired tests.

    python -m scripts.mc_study ablate runs/ablations/STUDY.yaml [--only=arm,…] [--seeds=1,2]

What a study is: `scripts/studies/study.py`. Under $NANOCHAT_BASE_DIR/ablations/STUDY it writes results.jsonl (a record
per cell: configuration, commit, environment, one number per context), report.md and plot.png, plot.pdf. A finished cell
is not run again; one that was interrupted goes on from its last checkpoint.
"""

import json
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from mc.config import from_flags
from nanochat.checkpoint import load_model_state
from nanochat.common import FlagParser, UserError, base_dir
from nanochat.outputs import BASE_DIR, locked, output_folder, write_file
from nanochat.tokenizer import Tokenizer
from scripts.bench.train_step import step_time_ratio
from scripts.eval.provenance import ROOT
from scripts.eval.subcommands import check_least
from scripts.studies.cells import CellRecords, find_function, run_cells, whole_numbers
from scripts.studies.study import DEFAULT, Study, plot_study, read_study, step_time_cells, study_report, study_results


def trained_model(flags: dict[str, str], seed: int, tag: str) -> Path:
    """The checkpoint directory of a finished training; what was begun goes on. In this process, while
    others wait that want the same."""
    directory = base_dir() / "checkpoints" / tag
    with locked(base_dir() / ".locks" / f"train-{tag}"):
        if directory.is_dir() and list(directory.glob("complete_*.json")):
            _, meta = load_model_state(directory)
            if meta["step"] == meta["num_iterations"]:
                return directory
        run_script("scripts.base_train",
                   {"save_every": "50", "keep_last": "1"} | flags | {"resume": "1", "model_tag": tag,
                                                                     "seed": str(seed)})
        if (meta := load_model_state(directory)[1])["step"] < meta["num_iterations"]:
            raise UserError(f"{directory} was stopped at step {meta['step']} of {meta['num_iterations']}; run the "
                            "command again, it goes on")
    return directory


def run_script(name: str, flags: dict) -> None:
    """A command's main in this process, with these flags. By name, as in a shell: a study stands below the commands."""
    sys.argv = [name, *(f"--{flag}={value}" for flag, value in flags.items())]
    find_function(f"{name}:main")()


def evaluate_checkpoint(directory: Path, options: dict) -> dict[str, list[float] | float]:
    """Measures of a checkpoint by the function or the command that the study names."""
    options = dict(options)
    if "function" in options:
        return find_function(options.pop("function"))(directory, **options)
    return run_command(options.pop("command").format(checkpoint=shlex.quote(str(directory)), **options))


def run_command(command: str) -> dict:
    """The JSON object that a command prints last, without what is no number or list or object."""
    program, *arguments = shlex.split(command)
    done = subprocess.run([sys.executable if program == "python" else program, *arguments], cwd=ROOT,
                          stdout=subprocess.PIPE, text=True)
    sys.stdout.write(done.stdout)
    if done.returncode:
        raise UserError(f"{command}: ended with code {done.returncode}")
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise UserError(f"{command}: its last line is no JSON object") from None
    return {name: value for name, value in found.items() if isinstance(value, int | float | list | dict)}


def run_cell(cell: dict) -> dict:
    return evaluate_checkpoint(trained_model(cell["flags"], cell["seed"], cell["model_tag"]), cell["evaluate"])


def run_step_time(cell: dict) -> dict:
    arm, default = (load_model_state(base_dir() / "checkpoints" / tag)[1]
                    for tag in (cell["model_tag"], cell["against"]))
    times = step_time_ratio(arm, default, Tokenizer.load(), pairs=cell["pairs"], steps=cell["steps"])
    return {"ratio": times.ratio, "low": times.low, "high": times.high}


def check_study(study: Study, path: Path) -> None:
    """UserError or base_train's own refusal for flags that it does not take, and for an evaluation that is not
    there: before anything is run."""
    make_parser = find_function("scripts.base_train:make_parser")
    for arm in study.arms:
        flags = [f"--{name}={value}" for name, value in study.flags(arm, study.seeds[0]).items()]
        args = make_parser(argv=flags).parse_args(flags)
        if args.mc_enabled:
            from_flags(args)
        if function := study.options(arm, study.seeds[0]).get("function"):
            find_function(function)
    if study.step_time is not None and not (isinstance(study.step_time, dict)
                                            and set(study.step_time) <= {"pairs", "steps"}):
        raise UserError(f"{path}: step_time is a mapping of pairs and steps")


def add_flags(parser: FlagParser) -> None:
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--only", default="",
                        help="arms to run beside the default, by name, with commas between them; default all")
    parser.add_argument("--seeds", default="", help="seeds to run, like 1,2; default the study's")
    parser.add_argument("--jobs", type=int, default=1,
                        help="cells at a time, each a process; step times are always taken alone")


def run(args: Namespace) -> None:
    check_least(args, jobs=1)
    study = read_study(args.study)
    check_study(study, args.study)
    wanted = [name for name in args.only.split(",") if name] or list(study.arms)
    if unknown := [name for name in wanted if name not in study.arms]:
        raise UserError(f"--only={args.only}: the study has no arm {', '.join(unknown)}; it has "
                        f"{', '.join(study.arms)}")
    seeds = whole_numbers(args.seeds, "--seeds") if args.seeds else study.seeds
    arms = [arm for arm in study.arms if arm == DEFAULT or arm in wanted]

    out = output_folder(base_dir() / "ablations" / study.name, "results.jsonl", "report.md", "plot.png", flag=BASE_DIR)
    records = CellRecords(out / "results.jsonl")
    cells = [study.cell(arm, seed) for seed in seeds for arm in arms]
    run_cells(cells, "scripts.studies.run_ablate:run_cell", records, what=study.name, jobs=args.jobs)
    timings = step_time_cells(study, arms, seeds[0]) if study.step_time is not None else []
    if timings:
        run_cells(timings, "scripts.studies.run_ablate:run_step_time", records, what=f"{study.name}: step times")

    everything, times = study_results(study, records.read(), sorted({*study.seeds, *seeds}))
    text, found = study_report(study, everything, times)
    write_file(out / "report.md", text)
    plot_study(found, out / "plot.png")
    print(text, flush=True)
    print(json.dumps({"report": str(out / "report.md"), "results": str(records.path), "cells": len(everything)}))
