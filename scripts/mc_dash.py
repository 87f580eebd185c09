"""A run's dashboards without Grafana: `python -m scripts.mc_dash RUN_DIR [RUN_DIR …]` writes
one HTML page from metrics.jsonl.

The panels and alerts are those of Grafana (`mc/observe/dashboards.py`). Several runs, vanilla and MegaContext
say, are drawn over each other.

With --wandb it writes the same panels as a workspace of Weights & Biases instead, for runs that were logged with --run;
--save puts it into a project.
"""

import json
import os
from pathlib import Path

from mc.observe.page import Run, page, standings
from mc.observe.wandb_workspace import save_workspace, workspace_file
from nanochat.common import FlagParser, UserError, run_main
from nanochat.outputs import output_file, write_file
from nanochat.telemetry.sinks import read_metrics


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m scripts.mc_dash", description=__doc__.split("\n\n")[0])
    parser.add_argument("run_dirs", nargs="*", type=Path, help="folders with a metrics.jsonl, or such files")
    parser.add_argument("--out", type=Path, default=None, help="the page; by default dash.html in the first folder")
    parser.add_argument("--wandb", type=Path, default=None,
                        help="file to write the panels to as a workspace of Weights & Biases, in place of a page")
    parser.add_argument("--save", default="",
                        help="with --wandb: ENTITY/PROJECT of Weights & Biases to save the workspace in as well")
    return parser


def load_run(path: Path) -> Run:
    """UserError where there are no metrics, or where they cannot be read."""
    file = path / "metrics.jsonl" if path.is_dir() else path
    try:
        rows = read_metrics(file)
    except OSError as e:
        raise UserError(f"no metrics in {file}: {e.strerror or e}; give the folder of a run, "
                        "$NANOCHAT_BASE_DIR/runs/TAG") from None
    if not rows:
        raise UserError(f"{file} is empty: the run has logged nothing yet")
    return Run(file.parent.name if file.name == "metrics.jsonl" else file.stem, rows)


def write_workspace(out: Path, save: str) -> None:
    """Into a file, and where `save` says so into a project. UserError for anything but ENTITY/PROJECT."""
    entity, slash, project = save.partition("/")
    if save and not (entity and project and slash and "/" not in project):
        raise UserError(f"--save={save} is not ENTITY/PROJECT, as in the address of a project")
    text = workspace_file(project or os.environ.get("WANDB_PROJECT", "megacontext"))
    write_file(output_file(out, flag="--wandb"), text)
    print(f"wrote {out}")
    found = {"workspace": str(out)}
    if save:
        found["url"] = save_workspace(entity, project)
        print(f"saved as {found['url']}")
    print(json.dumps(found))


def main() -> None:
    args = make_parser().parse_args()
    if args.save and not args.wandb:
        raise UserError(f"--save={args.save} saves what --wandb=FILE writes; add it")
    if bool(args.wandb) == bool(args.run_dirs):
        raise UserError("give the folders of the runs to draw, or --wandb=FILE, which needs none")
    if args.wandb:
        return write_workspace(args.wandb, args.save)
    first = args.run_dirs[0]
    out = args.out or (first if first.is_dir() else first.parent) / "dash.html"
    runs = [load_run(path) for path in args.run_dirs]
    write_file(output_file(out), page(runs))
    holding = {run.name: [s.alert.name for s in standings(run) if s.state == "holds"] for run in runs}
    for name, alerts in holding.items():
        print(f"{name}: {', '.join(alerts) or 'no alert holds'}")
    print(f"wrote {out}")
    print(json.dumps({"page": str(out), "alerts": holding}))


if __name__ == "__main__":
    run_main(main)
