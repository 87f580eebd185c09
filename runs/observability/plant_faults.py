"""Train with a fault planted, for the alert rules to find: `python
runs/observability/plant_faults.py thrashing --out=DIR`.

    healthy        recall as in runs/quickstart.sh, with probes: minutes
    frozen_lens    LensNet's rate is nothing: it stays as it began
    thrashing      an allocator without cooldown, margin and thresholds
    nan            a weight is not a number after 12 steps

Each leaves DIR/<fault>.jsonl, the metrics of the run. tests/fixtures/data/telemetry holds what this wrote.
"""

import math
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from mc.focus_allocator import FocusConfig
from mc.model import MegaContext
from nanochat.common import FlagParser, UserError, base_dir, run_main
from nanochat.optim import MuonAdamW
from scripts import base_train

RECALL = ["--data=recall", "--depth=2", "--aspect_ratio=64", "--head_dim=32", "--max_seq_len=1088", "--value_embeds=0",
          "--smear=0", "--resid_scalars=0",
          "--backout=0", "--key_shift=1", "--tie_qk=1", "--rope_fraction=0.5", "--recall_grow=0.75",
          "--device_batch_size=4", "--total_batch_size=4352",
          "--grad_clip=1", "--eval_tokens=17408", "--eval_every=0", "--device=cpu", "--mc_enabled=1", "--mc_max_lod=2",
          "--mc_far_tokens=0",
          "--mc_budget=128", "--mc_horizon=32", "--mc_gist=transformer", "--mc_lens_row_stride=2", "--mc_row_stride=4",
          "--mc_wc_weight=0.5", "--mc_teacher=attention",
          "--mc_lens_queries=384", "--mc_lens_horizon=2"]  # fmt: skip
SHORT = ["--num_iterations=32", "--log_every=2", "--probe_every=4", "--mc_start=0"]
FAULTS = {
    "healthy": ["--num_iterations=400", "--log_every=10", "--probe_every=20", "--mc_start=0.25"],
    "frozen_lens": [*SHORT, "--mc_lens_lr=1e-12"],
    # scores jump once recall has formed
    "thrashing": ["--num_iterations=160", "--log_every=4", "--probe_every=8", "--mc_start=0.5"],
    "nan": ["--num_iterations=16", "--log_every=2", "--mc_start=0"],
}


def restless(self: MegaContext) -> FocusConfig:
    """What `MegaContext.focus_config` returns, without anything that keeps an allocator calm."""
    return replace(calm(self), cooldown=0, margin=0.0, tau_expand=0.0, tau_collapse=0.0, max_edits=16)


def poisoned(self: MuonAdamW) -> None:
    """`MuonAdamW.step`, whose 12th leaves NaN behind."""
    sound(self)
    self.count = getattr(self, "count", 0) + 1
    if self.count == 12:
        self.param_groups[0]["params"][0].data.fill_(math.nan)


calm, sound = MegaContext.focus_config, MuonAdamW.step


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python runs/observability/plant_faults.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("fault", choices=tuple(FAULTS), help="what to plant; healthy: nothing")
    parser.add_argument("--out", type=Path, required=True, help="folder for the run's metrics")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    tokenizer = base_dir() / "tokenizer" / "tokenizer.json"
    if not tokenizer.exists():
        raise UserError(f"{tokenizer} is not there: train one with python -m scripts.tok_train")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        shutil.copytree(tokenizer.parent, Path(base) / "tokenizer")
        os.environ["NANOCHAT_BASE_DIR"] = base
        if args.fault == "thrashing":
            MegaContext.focus_config = restless
        if args.fault == "nan":
            MuonAdamW.step = poisoned
        sys.argv = ["base_train", *RECALL, *FAULTS[args.fault], f"--model_tag={args.fault}"]
        try:
            base_train.main()
        except UserError as e:
            if args.fault != "nan":
                raise
            print(f"the run stopped, as it should: {e}")
        shutil.copy(Path(base) / "runs" / args.fault / "metrics.jsonl", args.out / f"{args.fault}.jsonl")
    print(f"wrote {args.out / args.fault}.jsonl")


if __name__ == "__main__":
    run_main(main)
