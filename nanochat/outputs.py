"""Where results go: looked at before the work, written whole or not at all, one run to a directory, and a run
that ends when it is asked to.

    out = output_folder(args.out, "report.json")   # before the work: parents can be made, a byte
                                                   really written, nothing in the way
    with replacing(out / "report.json") as part:   # after it: the old file or the new one, never a half
        part.write_text(text)

    with holding(directory), StopRequest(ranks) as stop:
        while …:
            if stop.agreed():                      # SIGTERM came, here or at another rank:
                                                   all ranks see it at the same step
                save()

Locks are the system's (`flock`): one that a killed process held is free at once, and a file left behind locks nothing.
A file system that has no locks is named on stderr once, and used without.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.common import Ranks, UserError, base_dir, print0

BASE_DIR = "NANOCHAT_BASE_DIR"  # the "flag" of what goes where no flag says
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
NAME_BYTES = 200  # of a folder that a tag names: file systems take 255, and suffixes come on top


# ---------------------------------------------------------------------------------------------------------------------
# Before the work


def output_folder(path: Path | str, *files: str, flag: str = "--out") -> Path:
    """A folder that will take `files`. flag: what named it, for the message.

    It is made with its parents, written to, and what was made is taken away again: work that fails leaves no empty
    folders. UserError when that does not go, or when a folder is in the place of a file.
    """
    path = Path(path)
    missing: list[Path] = []
    try:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as f:
            f.write(bytes(4096))
            f.flush()
            os.fsync(f.fileno())
    except (OSError, ValueError) as e:  # ValueError: a null byte
        raise _refused(path, "is a file" if isinstance(e, FileExistsError) else reason(e), flag) from None
    finally:
        for folder in missing:
            with contextlib.suppress(OSError, ValueError):  # another command may have begun to use it
                folder.rmdir()
    for name in files:
        if (path / name).is_dir():
            raise _refused(path / name, "is a folder", flag)
    return path


def output_file(path: Path | str, flag: str = "--out") -> Path:
    """A file to be written later, in a folder as `output_folder` wants it. UserError too
    where it is a folder itself."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{flag}={path} is a folder; name a file")
    if not _is_stream(path):
        output_folder(path.parent, flag=flag)
    return path


def _refused(path: Path, why: str, flag: str) -> UserError:
    remedy = f"set {flag} to a folder that can be written" if flag == BASE_DIR else f"give another {flag}"
    return UserError(f"cannot write {path} ({why}); {remedy}")


def reason(e: Exception) -> str:
    """An exception's words on one line: those of the system where it is the system's."""
    return (isinstance(e, OSError) and e.strerror) or " ".join(str(e).split()) or type(e).__name__


def check_tag(tag: str, flag: str = "--model_tag") -> str:
    """A run's name, `d6` or in folders `small/seed1`: its place below checkpoints/ and runs/. UserError
    for one that leads elsewhere."""
    parts = tag.split("/")
    if why := (
        "is empty" if not tag.strip()
        else "leads out of the folder of checkpoints" if tag.startswith("/") or ".." in parts
        else "has a part without a name" if any(not part.strip(" .") for part in parts)
        else "holds characters that cannot be printed" if not tag.isprintable()
        else f"has a part of more than {NAME_BYTES} bytes" if any(len(part.encode(errors="replace")) > NAME_BYTES
                                                                  for part in parts)
        else "is in more than 8 folders" if len(parts) > 9
        else ""
    ):  # fmt: skip
        raise UserError(f"{flag}={tag[:80]!r} {why}; give a name like d6 or small/seed1")
    return tag


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def replacing(path: Path | str, *failures: type[Exception]) -> Iterator[Path]:
    """A path beside `path` to write to. After a clean end it is flushed to the medium and is `path`; else it
    is gone and `path` is as before.

    Parents are made. A link stays a link; a device or a pipe is written itself. failures: what a library raises besides
    OSError when it cannot write. UserError for these.
    """
    path = Path(path)
    if _is_stream(path):
        with _one_line(path, failures):
            yield path
        return
    path = Path(os.path.realpath(path))
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with _one_line(path, failures):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            _flush(part)
            os.replace(part, path)
            _flush(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def _one_line(path: Path, failures: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except (OSError, *failures) as e:
        raise UserError(f"cannot write {path} ({reason(e)}); what was there before is as it was") from None


def write_file(path: Path | str, content: str | bytes) -> None:
    """`replacing`, for what is in memory."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def _is_stream(path: Path) -> bool:
    """/dev/stdout, /dev/null, a named pipe: nothing that another file could take the place of."""
    return str(path).startswith(("/dev/", "/proc/")) or (path.exists() and not path.is_file() and not path.is_dir())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# One at a time


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`, waiting for it: of several processes one builds, and
    the others then find it built."""
    with _open_lock(path) as lock:
        _lock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def holding(directory: Path) -> Iterator[None]:
    """Be the one run that writes to a directory. UserError, naming the process, while another is;
    nothing is written there for it."""
    name = hashlib.sha256(os.path.realpath(directory).encode(errors="surrogateescape")).hexdigest()[:12]
    with _open_lock(base_dir() / ".locks" / f"run-{name}") as lock:
        try:
            _lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(f"{directory} is being written by another run ({lock.read().strip() or 'starting'}); "
                            "wait for it or end it, or use another --model_tag") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _open_lock(path: Path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+")
    except OSError as e:
        raise _refused(path.parent, reason(e), BASE_DIR) from None


_said: set[str] = set()


def _lock(lock, operation: int) -> None:
    try:
        fcntl.flock(lock, operation)
    except OSError as e:
        if e.errno not in NO_LOCKS:
            raise
        folder = str(Path(lock.name).parent)
        if folder not in _said:
            _said.add(folder)
            print0(f"warning: {folder} is on a file system without locks ({reason(e)}): nothing hinders a second run "
                   "from writing to the "
                   "same place; see to it that there is none", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Asked to stop


class StopRequest:
    """Notes SIGTERM, SIGINT, SIGHUP and SIGUSR1 instead of dying of them, so that a run can save and
    end; use as a context manager.

    What job schedulers send minutes before the end, and Ctrl-C. A second Ctrl-C, a second or more after the first,
    interrupts at once. A signal that the process was started to ignore (nohup) stays ignored.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, ranks: Ranks):
        self.ranks, self.signal, self._since = ranks, "", 0.0
        self._answer: Callable[[], bool] | None = None  # of the question that was asked last
        self._before: dict = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in self.SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if exception[0] is None and self._answer:
            self._answer()  # no collective is left under way

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.signal and now - self._since > 1:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._since = signal.Signals(number).name, now
            if self.ranks.rank == 0:  # not by print: a signal may come in the middle of one
                os.write(2, f"{self.signal}: the run is saved after this step and ends; Ctrl-C ends it at once\n".encode())  # noqa: E501

    def agreed(self) -> bool:
        """Whether to stop here: the same answer on all ranks, which call it equally often.

        One rank: at once. Several: what was true at the call before, so that nobody waits: a number
        goes around while the step runs.
        """
        if self.ranks.world_size == 1:
            return bool(self.signal)
        answer, self._answer = self._answer, _ask_all(bool(self.signal), self.ranks.device)
        return answer is not None and answer()


def _ask_all(mine: bool, device: torch.device) -> Callable[[], bool]:
    """Begin to find out whether it is true anywhere; the answer is to be called for later."""
    flag = torch.full((1,), float(mine), device=device)
    work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
    if device.type != "cuda":
        return lambda: bool(work.wait()) and flag.item() > 0
    work.wait()  # the stream does, not this thread
    found, ready = torch.empty(1, pin_memory=True).copy_(flag, non_blocking=True), torch.cuda.Event()
    ready.record()
    return lambda: ready.synchronize() or found.item() > 0
