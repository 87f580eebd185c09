import signal

# A shell starts what it runs in the background with Ctrl-C ignored, nohup with SIGHUP ignored, and commands keep to
# that: the tests of signals need them as at a terminal.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)
