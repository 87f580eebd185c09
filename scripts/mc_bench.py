"""Cost of MegaContext. `python -m scripts.mc_bench train --checkpoint_dir=DIR`: its training step against vanilla's."""

import json

import torch

from mc.benchmark import training_step_times
from nanochat.checkpoint import load_model_state
from nanochat.common import FlagParser, UserError, run_main
from nanochat.tokenizer import Tokenizer


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m scripts.mc_bench", description=__doc__)
    parser.add_argument("what", choices=("train",), help="train: step time at the settings of a MegaContext checkpoint")
    parser.add_argument("--checkpoint_dir", required=True, help="checkpoint directory of a run with --mc_enabled=1")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of blocks, vanilla and MegaContext in turn")
    parser.add_argument("--steps", type=int, default=3, help="steps per block")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    if min(args.pairs, args.steps) < 1:
        raise UserError(f"--pairs={args.pairs} --steps={args.steps}: at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no CUDA device; use --device=cpu")
    _, meta = load_model_state(args.checkpoint_dir)
    times = training_step_times(meta, Tokenizer.load(), pairs=args.pairs, steps=args.steps, device=args.device)
    print(f"step time MC / vanilla {times.ratio:.3f} [{times.low:.3f}, {times.high:.3f}]: {times.mc_s:.3f} s against {times.vanilla_s:.3f} s, "
          f"{args.pairs} pairs of {args.steps} steps")
    for name, seconds in times.parts.items():
        print(f"  {name:24s} {seconds / times.vanilla_s:6.1%} of a vanilla step")
    print(json.dumps(times._asdict()))


if __name__ == "__main__":
    run_main(main)
