"""Judge models: what they make of a history, beside other ways to show it. The last line printed is JSON.

    python -m scripts.mc_eval compare --recall_mc=DIR …     MegaContext and its vanilla twin on the same held-out tokens
    python -m scripts.mc_eval focus --recall_mc=DIR …       the lens, and scores without training, against an oracle
    python -m scripts.mc_eval stream --checkpoint_dir=DIR   facts and loss in histories far longer than a training row
    python -m scripts.mc_eval text --text_mc=DIR …          what focus wins on real text,
                                                            and how much of it can be known
"""

from nanochat.common import run_main
from scripts.eval.subcommands import Subcommands

MODULES = {"compare": "scripts.studies.run_compare"} | {name: f"scripts.eval.run_{name}"
                                                        for name in ("focus", "stream", "text")}
COMMANDS = Subcommands("scripts.mc_eval", __doc__, MODULES)
make_parser, main = COMMANDS.make_parser, COMMANDS.main

if __name__ == "__main__":
    run_main(main)
