"""The commands: `python -m scripts.NAME --help`."""

import sys

if sys.argv[0] == "-m":  # as Python has it while it looks for the command to start: nothing is imported, nothing opened yet
    from nanochat.streams import leave_at_once, on_interrupt, prepare_streams

    prepare_streams()
    on_interrupt(leave_at_once)  # until run_main, which has something to put in order
