"""The commands: `python -m scripts.NAME --help`."""

import sys

# as Python has it while it looks for the command to start: nothing is imported, nothing opened yet
if sys.argv[0] == "-m":
    from nanochat.streams import leave_at_once, on_interrupt, prepare_streams

    prepare_streams()
    on_interrupt(leave_at_once)  # until run_main, which has something to put in order
