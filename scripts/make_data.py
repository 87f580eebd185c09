"""Data that is made, not fetched: rows of the generated tasks, and a corpus of code and prose.

    python -m scripts.make_data tasks --tasks=mqar,passkey --length=1056 --out=DIR
    python -m scripts.make_data corpus --prose=NOVELS --held_out=persuasion.txt --out=DIR
"""

from nanochat.common import run_main
from scripts.eval.subcommands import Subcommands

MODULES = {"tasks": "scripts.eval.task_files", "corpus": "scripts.eval.code_and_prose"}
COMMANDS = Subcommands("scripts.make_data", __doc__, MODULES)
make_parser, main = COMMANDS.make_parser, COMMANDS.main

if __name__ == "__main__":
    run_main(main)
