"""Studies and suites: many models trained and judged alike, and what they are trained on.
The last line printed is JSON.

    python -m scripts.mc_study ablate STUDY.yaml                       arms that each change one thing,
                                                                       times seeds, with paired tests
    python -m scripts.mc_study suite quick | paper | SUITE.yaml        methods × tasks × lengths ×
                                                                       budgets × seeds at equal entries
    python -m scripts.mc_study finetune --method=… --checkpoint_dir=DIR --out=DIR      a base that
                                                                                       learns to read what one method
                                                                                       shows
    python -m scripts.mc_study importance --checkpoint_dir=DIR --labels=DIR            what
                                                                                       every token is worth, as labels
    python -m scripts.mc_study classifier --checkpoint_dir=DIR --labels=DIR            the
                                                                                       classifier of tokens
                                                                                       that learns them
    python -m scripts.mc_study labels --checkpoint_dir=DIR --out=DIR                   what
                                                                                       showing a block is worth, as
                                                                                       labels
    python -m scripts.mc_study train_lensnet --checkpoint_dir=DIR --labels=DIR
    --out_tag=NAME      a lens alone, from them
"""

from nanochat.common import run_main
from scripts.eval.subcommands import Subcommands

NAMES = ("ablate", "suite", "finetune", "importance", "classifier", "labels", "train_lensnet")
COMMANDS = Subcommands("scripts.mc_study", __doc__, {name: f"scripts.studies.run_{name}" for name in NAMES})
make_parser, main = COMMANDS.make_parser, COMMANDS.main

if __name__ == "__main__":
    run_main(main)
