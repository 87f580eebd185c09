"""What MegaContext costs, measured beside vanilla in one process. The last line printed is JSON.

    python -m scripts.mc_bench train --checkpoint_dir=DIR      a training step against vanilla's
    python -m scripts.mc_bench vanilla                         the harness's GPT against the same model as plain PyTorch
    python -m scripts.mc_bench decode --checkpoint_dir=DIR     ingest, time per generated token
                                                               and memory against history length
    python -m scripts.mc_bench kv --checkpoint_dir=DIR         the approximate KV policy against the exact one
    python -m scripts.mc_bench search --checkpoint_dir=DIR     the lens's search over the keys of long histories
    python -m scripts.mc_bench focus --checkpoint_dir=DIR      what refocusing does on long streams of text
    python -m scripts.mc_bench knapsack                        how far the greedy choice of detail is from the optimum
    python -m scripts.mc_bench lens --checkpoint_dir=DIR       every kind of lens, taught side by side
    python -m scripts.mc_bench gists --checkpoint_dir=DIR --arms …     how well gists of several kinds and
                                                                       ratios replace a whole history
    python -m scripts.mc_bench telemetry --checkpoint_dir=DIR  a training step with every sink against none
    python -m scripts.mc_bench labels --checkpoint_dir=DIR     labels of what detail is worth per second, keys and
                                                               values reused and not
    python -m scripts.mc_bench otlp                            is a collector there, and how soon does it accept
    python -m scripts.mc_bench store --checkpoint_dir=DIR --texts=DIR   a history on disk: ingest,
                                                                       opening, gathering, sizes, edits
"""

from nanochat.common import run_main
from scripts.eval.subcommands import Subcommands

NAMES = ("train", "vanilla", "decode", "kv", "search", "focus", "knapsack", "lens", "gists", "labels", "telemetry",
         "otlp", "store")
MODULES = {name: f"scripts.bench.{name}" for name in NAMES} | {"train": "scripts.bench.train_step"}
COMMANDS = Subcommands("scripts.mc_bench", __doc__, MODULES)
make_parser, main = COMMANDS.make_parser, COMMANDS.main

if __name__ == "__main__":
    run_main(main)
