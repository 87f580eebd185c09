"""Standard streams as they come, and Ctrl-C: pipes whose reader has left, closed streams, full disks,
encodings that lack a character.

Python answers most of these with a traceback. Here a stream that takes no more raises `StreamLost` once and is silent
from then on, so that what is to be closed on the way out is closed; what an encoding lacks is written as an escape;
what it cannot read stays in the text as a surrogate, for whoever reads the line to refuse it. Imports nothing heavy:
`scripts` prepares the streams before torch is imported.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# exit codes, as of a process that such a signal has ended
INTERRUPTED, READER_LEFT = 128 + signal.SIGINT, 128 + signal.SIGPIPE


class StreamLost(OSError):
    """Standard output or standard error takes no more; `filename` says which."""


class _Output(io.FileIO):
    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as e:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            raise StreamLost(e.errno, e.strerror, {1: "standard output", 2: "standard error"}[self.fileno()]) from None


def prepare_streams() -> None:
    """Make stdin, stdout and stderr behave as the module says. A second call does nothing; streams that
    somebody has replaced stay."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would get its number, and messages with it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)
    elif sys.stdin is sys.__stdin__:
        sys.stdin.reconfigure(errors="surrogateescape")
    for number, name in ((1, "stdout"), (2, "stderr")):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(number, "w", closefd=False))
        elif stream is getattr(sys, f"__{name}__") and stream.fileno() == number:
            stream.flush()
            raw = _Output(number, "wb", closefd=False)
            setattr(sys, name, io.TextIOWrapper(
                raw if stream.write_through else io.BufferedWriter(raw), stream.encoding, "backslashreplace", "\n",
                stream.line_buffering,
                stream.write_through))


@contextmanager
def flushed_streams() -> Iterator[None]:
    """All that was printed within is out at the end, or StreamLost is raised: not by the interpreter, when
    nobody can catch it any more."""
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def reader_left(lost: StreamLost) -> bool:
    """Whether the stream is a pipe that nobody reads any more (`| head`), which is no error."""
    return lost.errno == errno.EPIPE


def leave_at_once(signum: int, frame: FrameType | None) -> None:
    """A handler of Ctrl-C for times at which there is nothing to be put in order."""
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def on_interrupt(handler: Callable) -> None:
    """What Ctrl-C does from now on, unless the process was started to ignore it (in the background, under nohup)."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Within, a first Ctrl-C raises nothing: the function that is given out says whether there was one, for a loop to
    stop between two steps and leave nothing half done. A second one raises KeyboardInterrupt wherever it comes."""
    noted, before = [], signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: FrameType | None) -> None:
        noted.append(signum)
        signal.signal(signal.SIGINT, before)

    on_interrupt(note)
    try:
        yield lambda: bool(noted)
    finally:
        on_interrupt(before)
