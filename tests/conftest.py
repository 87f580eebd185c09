import signal

# A shell starts what it runs in the background with Ctrl-C ignored, and commands keep to that: the tests of
# Ctrl-C need it as at a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
