"""Standard streams that are not a UTF-8 terminal, and Ctrl-C, as every command meets them in `run_main`:
each in a process of its own."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError, run_main
from nanochat.engine import decode_stream
from nanochat.streams import interrupt_noted
from nanochat.tokenizer import Reserved, Tokenizer

ROOT = Path(__file__).resolve().parents[2]


def ended(main: Callable[[], None], folder: Path, *, out: int | None = 0, err: int | None = 0, encoding: str = "utf-8",
          unbuffered: bool = False) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command. out, err: a file descriptor; None: closed; 0: a file."""
    files = [folder / "out", folder / "err"]
    for path in files:
        path.write_text("")
    if (child := os.fork()) == 0:
        try:
            for number, path, wanted in ((1, files[0], out), (2, files[1], err)):
                if wanted is None:
                    os.close(number)
                else:
                    os.dup2(wanted or os.open(path, os.O_WRONLY), number)
            for number, name, wanted in ((1, "stdout", out), (2, "stderr", err)):
                buffer = open(number, "wb", 0 if unbuffered else -1, closefd=False) if wanted is not None else None
                stream = buffer and io.TextIOWrapper(buffer, encoding, "strict", line_buffering=number == 2,
                                                     write_through=unbuffered)
                setattr(sys, name, stream), setattr(sys, f"__{name}__", stream)
            code = 0
            try:
                run_main(main)
                sys.stdout.flush()
            except SystemExit as e:
                code = e.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return (os.waitstatus_to_exitcode(status), *(path.read_text(encoding) for path in files))


def nobody_reads() -> int:
    read, write = os.pipe()
    os.close(read)
    return write


def talk() -> None:
    for _ in range(3):
        print("naïve " * 10_000)


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("broken, code, message", [
    (nobody_reads, 141, ""),
    (lambda: os.open("/dev/full", os.O_WRONLY), 2,
     "error: cannot write to standard output: No space left on device\n")])
def test_an_output_that_takes_no_more(broken, code, message, unbuffered, tmp_path):
    assert ended(talk, tmp_path, out=broken(), unbuffered=unbuffered) == (code, "", message)
    assert ended(lambda: print("short"), tmp_path, out=broken(), unbuffered=unbuffered) == (code, "",
                                                                                            message), "found when it is flushed"  # noqa: E501
    assert ended(lambda: print("note", file=sys.stderr), tmp_path, err=broken(),
                 unbuffered=unbuffered) == (code, "", "")


def test_what_is_open_is_closed_in_order_when_nobody_reads(tmp_path):
    def main() -> None:
        try:
            talk()
        finally:
            print("bye")  # must not fail a second time
            (tmp_path / "kept").write_text("whole")

    assert ended(main, tmp_path, out=nobody_reads()) == (141, "", "") and (tmp_path / "kept").read_text() == "whole"


def test_a_broken_pipe_of_ones_own_is_no_quiet_end(tmp_path):
    def main() -> None:
        os.write(nobody_reads(), b"x")

    code, _, err = ended(main, tmp_path)
    assert code == 1 and "BrokenPipeError" in err


@pytest.mark.parametrize("broken", [nobody_reads, lambda: os.open("/dev/full", os.O_WRONLY)])
def test_a_mistake_that_cannot_be_told_still_ends_with_2(broken, tmp_path):
    def main() -> None:
        raise UserError("no such thing")

    assert ended(main, tmp_path, err=broken()) == (2, "", "")
    assert ended(main, tmp_path) == (2, "", "error: no such thing\n")


def test_closed_streams_and_files_that_must_not_get_their_numbers(tmp_path):
    def main() -> None:
        with open(tmp_path / "data", "w") as f:
            print("to stdout", flush=True), print("to stderr", file=sys.stderr), os.write(1, b"from a library")
            f.write("data")

    assert ended(main, tmp_path, out=None, err=None)[0] == 0 and (tmp_path / "data").read_text() == "data"


def test_what_an_encoding_lacks_is_written_as_an_escape(tmp_path):
    print_all = lambda: print("naïve €", "\udce9")
    assert ended(print_all, tmp_path, encoding="ascii") == (0, "na\\xefve \\u20ac \\udce9\n", "")
    assert ended(print_all, tmp_path, encoding="latin-1")[1] == "naïve \\u20ac \\udce9\n"
    assert ended(print_all, tmp_path)[1] == "naïve € \\udce9\n"


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


def test_interrupted(tmp_path):
    assert ended(lambda: signal.raise_signal(signal.SIGINT), tmp_path) == (130, "", "interrupted\n")


def test_ctrl_c_before_the_command_has_begun():
    """While torch is imported; a traceback of the import is of no use to anybody."""
    process = subprocess.Popen([sys.executable, "-c",
                                "import sys; sys.argv[0] = '-m'; import scripts; print('in', flush=True); import time; "
                                "time.sleep(60)"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "interrupted\n") and process.returncode == 130


def test_a_noted_interrupt():
    with interrupt_noted() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with interrupt_noted() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGINT, before)


# -- pieces of text ---------------------------------------------------------------------------------------------------

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)] + ["né".encode()[:2], "€".encode()[1:], "😀".encode()[:3],
                                                          b"\xbf\xbd", b"ab"], reserved=Reserved(2, 0, 0))


@given(st.lists(st.one_of(st.integers(0, TOKENIZER.vocab_size - 1),
                          st.sampled_from([*"é€😀\ufffd".encode(), 256, 257, 258, 259])), max_size=40))
def test_pieces_put_together_are_the_text(ids):
    """Half characters, lone continuation bytes, an end in the middle of one: the pieces
    are what all tokens decode to."""
    pieces = list(decode_stream(TOKENIZER, iter(ids)))
    assert "".join(pieces) == TOKENIZER.decode(ids) and all(pieces)


@given(st.text(max_size=20))
def test_pieces_hold_no_half_characters(text):
    assert "".join(pieces := list(decode_stream(TOKENIZER, text.encode()))) == text and len(pieces) == len(text)
