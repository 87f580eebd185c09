"""Where results go: refused before the work, whole or not at all, one run at a time, and
an end when it is asked for."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from mc.session.state import SessionState
from nanochat import outputs
from nanochat.checkpoint import annotate, damage, load_model_state, save_checkpoint
from nanochat.common import FlagParser, Ranks, UserError, run_main
from nanochat.dataset import open_corpus
from nanochat.outputs import StopRequest, check_tag, holding, locked, output_file, output_folder, replacing, write_file
from nanochat.telemetry.metrics import METRICS, Metric
from nanochat.telemetry.recorder import Recorder
from nanochat.telemetry.sinks import Sink, read_metrics, run_id
from nanochat.token_cache import open_token_cache
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------------------------------------------------------------
# Before the work


def test_missing_parents_are_made_by_the_write_and_not_by_the_check(tmp_path):
    (tmp_path / "there").mkdir()
    assert output_folder(tmp_path / "a" / "b", "x") == tmp_path / "a" / "b"
    assert output_folder(tmp_path / "there" / "b").parent.is_dir() and output_folder(tmp_path / "there").is_dir()
    path = output_file(tmp_path / "c" / "d.json")
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]
    write_file(path, "x")
    assert path.read_text() == "x"


@pytest.mark.parametrize("code, words", [(errno.EROFS, "Read-only file system"), (errno.ENOSPC, "No space left"),
                                         (errno.EACCES, "Permission denied")])
def test_a_folder_is_really_written_to(tmp_path, monkeypatch, code, words):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", refuse)
    for check in (output_folder, lambda path: output_file(path / "x")):
        with pytest.raises(UserError, match=f"{words}.*give another --out"):
            check(tmp_path)


def test_what_is_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "report.json").mkdir()
    for check in (
        lambda: output_folder(tmp_path / "file"), lambda: output_folder(tmp_path / "file"
                                                                        / "x"), lambda: output_folder(tmp_path,
                                                                                                      "report.json"),
        lambda: output_file(tmp_path), lambda: output_file(tmp_path / "file"
                                                           / "x.json"), lambda: output_folder(tmp_path / ("n" * 300)),
        lambda: output_folder(tmp_path / "a\0b"),
    ):  # fmt: skip
        with pytest.raises(UserError) as e:
            check()
        assert "\n" not in str(e.value)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("tag", ["d6", "small/seed1", "a.b", "größe", "x y", "a" * 200])
def test_tags_that_name_a_run(tag):
    assert check_tag(tag) == tag


@pytest.mark.parametrize("tag", ["", " ", "/a", "..", "a/../b", "../a", "a//b", "a/", ".", "a/./b", "a\nb", "a\0",
                                 "a" * 201, "é" * 101, "/".join("abcdefghij"), "\udcff"])
def test_tags_that_lead_elsewhere(tag):
    with pytest.raises(UserError, match="give a name like"):
        check_tag(tag)


@given(st.text(max_size=20))
def test_no_tag_leads_out(tag):
    root = Path("/r/checkpoints")
    try:
        check_tag(tag)
    except UserError:
        return
    place = Path(os.path.normpath(root / tag))
    assert place.is_relative_to(root) and place != root


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("where", ["write", "fsync", "replace", "library", "interrupted"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, where):
    path = tmp_path / "x.json"
    write_file(path, "old")
    if where in ("fsync", "replace"):
        monkeypatch.setattr(os, where, full)
    with pytest.raises(KeyboardInterrupt if where == "interrupted" else UserError) as e, replacing(path,
                                                                                                   SafetensorError) as part:  # noqa: E501
        part.write_text("half")
        if where == "write":
            full()
        if where == "interrupted":
            raise KeyboardInterrupt
        if where == "library":
            save_file({"a": torch.zeros(1)}, tmp_path / "no" / "where")
    assert where == "interrupted" or ("\n" not in str(e.value) and str(path) in str(e.value))
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_full_disk_refuses_a_session_state_and_keeps_the_last(tmp_path):
    path = tmp_path / "s.safetensors"
    SessionState({"n": 1}, {"x": torch.arange(4)}).save(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match="cannot write"):
            SessionState({"n": 2}, {"x": torch.zeros(10_000)}).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert SessionState.load(path).meta == {"n": 1} and [p.name for p in tmp_path.iterdir()
                                                         if p.is_file()] == [path.name]


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "x.json")
    write_file(output_file(tmp_path / "link.json"), "new")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real" / "x.json").read_text() == "new"
    write_file(output_file("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()
    with pytest.raises(UserError, match="/dev/full.*No space left"):
        write_file("/dev/full", "x")


def test_an_evaluation_is_noted_on_a_step_that_stays_intact(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 3, model={"w": torch.ones(2)}, optimizer_shard={}, meta={"val": None})
    with monkeypatch.context() as m:
        m.setattr(os, "replace", full)
        with pytest.raises(UserError):
            annotate(tmp_path, 3, val={"loss": 1.0})
    assert damage(tmp_path, 3) is None and load_model_state(tmp_path)[1]["val"] is None
    annotate(tmp_path, 3, val={"loss": 2.0})
    assert damage(tmp_path, 3) is None and load_model_state(tmp_path)[1]["val"] == {"loss": 2.0}


def test_an_empty_run_id_left_by_a_full_disk_is_made_again(tmp_path):
    (tmp_path / "run_id").write_text("")
    assert len(run_id(tmp_path)) == 8 == len((tmp_path / "run_id").read_text())


def test_a_full_disk_leaves_no_tokens_that_could_be_taken_for_whole(tmp_path, base):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text("alpha beta gamma " * 2000)
    corpus, tokenizer = open_corpus(str(tmp_path / "texts")), Tokenizer.train(iter(["alpha beta gamma"]), 257)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(UserError, match="cannot write the tokens of.*File too large"):
            open_token_cache(corpus, "train", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(base.glob("tokens-*")) and len(open_token_cache(corpus, "train", tokenizer).tokens) > 10_000


# ---------------------------------------------------------------------------------------------------------------------
# One at a time


def test_a_directory_has_one_run(tmp_path):
    with holding(tmp_path / "t"):
        with pytest.raises(UserError,
                           match=rf"being written by another run \(process {os.getpid()} on"), holding(tmp_path / "t"):
            pass
        with holding(tmp_path / "u"):
            pass
    with holding(tmp_path / "t"):
        assert not (tmp_path / "t").exists()  # nothing is written where it is not the run that does


def test_a_killed_runs_lock_is_free(tmp_path, base):
    code = ("from nanochat.outputs import holding; from pathlib import Path; import time\nwith "
            f"holding(Path({str(tmp_path / 't')!r})): print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {other.pid} on"), holding(tmp_path / "t"):
        pass
    other.kill()
    other.wait()
    with holding(tmp_path / "t"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(outputs, "_said", set())
    for _ in range(2):
        with holding(tmp_path / "t"), locked(tmp_path / "base" / ".locks" / "x"):
            pass
    assert capsys.readouterr().err.count("without locks") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Asked to stop


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_is_noted_and_its_handler_given_back(number, capfd):
    before = signal.getsignal(number)
    with StopRequest(ALONE) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed() and stop.signal == signal.Signals(number).name
    assert signal.getsignal(number) == before and capfd.readouterr().err.count("\n") == 1


def test_an_ignored_signal_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(ALONE) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_is_at_once(monkeypatch, capfd):
    with pytest.raises(KeyboardInterrupt), StopRequest(ALONE):
        for now in (0.0, 0.5, 2.0):  # the second within a second: the same key stroke, passed on by torchrun
            monkeypatch.setattr(outputs.time, "monotonic", lambda now=now: now)
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    with StopRequest(Ranks(rank, 2, torch.device("cpu"))) as stop:
        for step in range(10):
            if stop.agreed():
                break
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    Path(folder, f"stopped_{rank}").write_text(str(step))
    dist.destroy_process_group()


def test_all_ranks_stop_at_the_same_step(tmp_path):
    mp.spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
    assert [(tmp_path / f"stopped_{rank}").read_text() for rank in (0, 1)] == ["5", "5"]


# ---------------------------------------------------------------------------------------------------------------------
# Logs


WHOLE = json.dumps({"step": 1, "time": 1.0, "train.loss": 2.0})


@pytest.mark.parametrize(
    "strange", [WHOLE[:30], "{", "null", "3", '"x"', "[]", '{"time": 1}', '{"step": 2}', '{"step": "2", "time": 1}',
                '{"step": true, "time": "x"}',
                '{"step": 2, "time": 1, "train.loss": "high"}', "\udcff\udcfe", "[" * 5000]
)  # fmt: skip
@pytest.mark.parametrize("first", [False, True])
def test_lines_that_are_no_rows_cost_themselves_alone(tmp_path, capsys, strange, first):
    path = tmp_path / "metrics.jsonl"
    lines = [WHOLE, "", strange] if not first else [strange, "", WHOLE]
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    assert read_metrics(path) == [json.loads(WHOLE)]
    assert f"1 of 3 lines are no rows of metrics, the first is line {1 if first else 3}" in capsys.readouterr().err


def test_nothing_but_strange_lines_is_no_metrics_file(tmp_path):
    (tmp_path / "m").write_text("{torn")
    with pytest.raises(UserError, match="is no metrics file: line 1: "):
        read_metrics(tmp_path / "m")


def test_a_torn_line_is_dropped_once_and_said(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(WHOLE + "\n" + WHOLE[:20])
    for _ in range(2):
        Recorder(tmp_path).close()
    assert capsys.readouterr().err.count("was cut off and is removed") == 1 and path.read_text() == WHOLE + "\n"


def test_a_console_that_takes_nothing_ends_no_training(tmp_path, capsys, monkeypatch):
    class Full(Sink):
        write = close = full

    name = "test.outputs"
    monkeypatch.setitem(METRICS, name, Metric(name, "1", "gauge", "test"))
    with Recorder(tmp_path, Full()) as r:
        for step in (1, 2):
            r.record(name, step)
            r.flush(step)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert capsys.readouterr().err.splitlines() == ["warning: Full takes no metrics (No space left on device). "
                                                    "Training goes on"]


# ---------------------------------------------------------------------------------------------------------------------
# Flags and the end


@pytest.mark.parametrize("text", ["--n=9223372036854775808", "--n=-9223372036854775809", "--x=", "--out=", "--n=",
                                  "--n=1e3"])
def test_flags_at_the_edges_of_their_types(text, capsys):
    parser = FlagParser()
    for name, kind in (("n", int), ("x", float), ("out", Path)):
        parser.add_argument(f"--{name}", type=kind)
    with pytest.raises(SystemExit) as e:
        parser.parse_args([text])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_flags_just_within():
    parser = FlagParser()
    parser.add_argument("--n", type=int)
    parser.add_argument("--x", type=float)
    assert vars(parser.parse_args(["--n=9223372036854775807", "--x=1e308"])) == {"n": 2**63 - 1, "x": 1e308}


@pytest.mark.parametrize("e, words",
                         [(OSError(errno.ENOSPC, "No space left on device", "/a/b"), "cannot write /a/b: No space"),
                          (OSError(errno.EROFS, "Read-only file system"), "Read-only"),
                                      (MemoryError(), "out of memory"),
                          (RuntimeError("can't allocate memory: you tried"), "out of memory")])
def test_a_machine_that_has_no_more_is_one_line(e, words, capsys):
    def main():
        raise e

    with pytest.raises(SystemExit) as found:
        run_main(main)
    err = capsys.readouterr().err
    assert found.value.code == 2 and err.startswith("error: ") and words in err and err.count("\n") == 1
    with pytest.raises(SystemExit) as found:  # another one is a fault of ours, and told whole
        run_main(lambda: open("/nowhere/at/all"))
    assert found.value.code == 1 and "FileNotFoundError" in capsys.readouterr().err
