"""What MegaContext costs, measured beside vanilla in one process. The last line printed is JSON.

    python -m scripts.mc_bench train --checkpoint_dir=DIR      a training step against vanilla's
    python -m scripts.mc_bench decode --checkpoint_dir=DIR     ingest, time per generated token and memory against history length
    python -m scripts.mc_bench kv --checkpoint_dir=DIR         the approximate KV policy against the exact one
    python -m scripts.mc_bench search --checkpoint_dir=DIR     the lens's search over the keys of long histories
    python -m scripts.mc_bench focus --checkpoint_dir=DIR      what refocusing does on long streams of text
    python -m scripts.mc_bench price --checkpoint_dir=DIR      the learned price of --mc_allocator=threshold, fitted and judged
    python -m scripts.mc_bench knapsack                        how far the greedy choice of detail is from the optimum
    python -m scripts.mc_bench lens --checkpoint_dir=DIR       every kind of lens, taught side by side
    python -m scripts.mc_bench gists --checkpoint_dir=DIR --arms …     how well gists of several kinds and ratios replace a whole history
    python -m scripts.mc_bench telemetry --checkpoint_dir=DIR  a training step with every sink against none
    python -m scripts.mc_bench store --checkpoint_dir=DIR --text=DIR   a history on disk: ingest, opening, gathering, sizes, edits

Each sub-command is a module of `mc` with `add_flags(parser)` and `run(args)`.
"""

from nanochat.common import FlagParser, run_main
from scripts.bench import train_step as benchmark
from scripts.bench import decode as decode_benchmark
from scripts.bench import focus as focus_benchmark
from scripts.bench import gists as gist_benchmark
from scripts.bench import knapsack
from scripts.bench import kv as kv_benchmark
from scripts.bench import lens as lens_benchmark
from scripts.bench import price as price_fit
from scripts.bench import search as search_benchmark
from scripts.bench import store as store_benchmark
from scripts.bench import telemetry as telemetry_benchmark

COMMANDS = {"train": benchmark, "decode": decode_benchmark, "kv": kv_benchmark, "search": search_benchmark, "focus": focus_benchmark,
            "price": price_fit, "knapsack": knapsack, "lens": lens_benchmark, "gists": gist_benchmark, "telemetry": telemetry_benchmark, "store": store_benchmark}


def make_parser() -> FlagParser:
    parser = FlagParser(prog="python -m scripts.mc_bench", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, module in COMMANDS.items():
        title = module.__doc__.split("\n\n")[0]
        module.add_flags(commands.add_parser(name, help=title, description=title))
    return parser


def main() -> None:
    args = make_parser().parse_args()
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    run_main(main)
