"""chat_cli with MegaContext, and mc_bench decode, as a user runs them, on a checkpoint small enough to make here."""

import dataclasses
import io
import json
import os
import signal
import sys
import threading

import pytest
import torch

from mc import config as mc_config
from mc.model import MegaContext
from mc.session.session import Session
from mc.store.catalog import Catalog
from mc.store.disk.store import DiskStore
from nanochat import documents
from nanochat.checkpoint import save_checkpoint
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.telemetry.sinks import read_metrics
from nanochat.tokenizer import Reserved, Tokenizer
from scripts import chat_cli, mc_bench

torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(main, *flags) -> (stdout, stderr) lines; a tokenizer of bytes, and a checkpoint `ckpt` with MegaContext."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tokenizer = Tokenizer([bytes([i]) for i in range(256)], reserved=Reserved(64, 64, 64))
    tokenizer.save()
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=32,
                        value_embeds=False))
    torch.nn.init.normal_(gpt.transformer.h[0].attn.c_proj.weight)  # at zero nothing would be read
    torch.nn.init.normal_(gpt.lm_head.weight)
    mc = MegaContext(mc_config.MCConfig(block_size=8, max_lod=4, budget=80, recent=8, gist="mean", lens_key_dim=16), 32)
    flags = dict(data="recall", seed=1, rows="long", text_column="text", needles=1, recall_blocks=2)
    save_checkpoint(tmp_path / "ckpt", 3, model=gpt.state_dict(), optimizer_shard={}, mc=mc.state_dict(), meta={
        "model_config": dataclasses.asdict(gpt.config), "tokenizer": tokenizer.fingerprint, "flags": flags,
        "mc": {"config": mc_config.to_dict(mc.config), "trained_lods": [1, 2, 3]}})
    (tmp_path / "history.txt").write_text("So we beat on, boats against the current. " * 60)

    def call(main, *flags):
        monkeypatch.setattr(sys, "argv", ["x", *(flag.replace("@", f"{tmp_path}/") for flag in flags)])
        main()
        done = capsys.readouterr()
        return done.out.splitlines(), done.err.splitlines()

    return call


CHAT = ("--device=cpu", "--checkpoint_dir=@ckpt", "--mc_enabled=1", "--max_tokens=9")


def test_a_file_is_read_and_continued(run):
    out, err = run(chat_cli.main, *CHAT, "--history=@history.txt", "--prompt=abc", "--mc_explain=1")
    assert out[0].startswith("abc") and out == run(chat_cli.main, *CHAT, "--history=@history.txt", "--prompt=abc")[0]
    assert any("read 2,520 tokens" in line for line in err)
    (status,) = [line for line in err if line.startswith("[history")]
    assert "history 2,533 tokens" in status and "LOD0" in status and "tokens/s" in status
    table = err[err.index(status) + 1:]
    assert "LOD" in table[0] and "recent tokens" in table[-1]
    starts = [int(line.split("+")[0].replace(",", "")) for line in table]
    assert starts[0] == 0 and starts == sorted(starts)
    assert out != run(chat_cli.main, *CHAT, "--prompt=abc")[0], "the history did not matter"


def test_prompts_are_one_conversation(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nthree\n"))
    _, err = run(chat_cli.main, *CHAT)
    assert [line.split(" tokens")[0] for line in err if line.startswith("[history")] == ["[history 13", "[history 25"]


class Stdin(io.TextIOWrapper):
    """As `nanochat.streams.prepare_streams` leaves it."""

    def __init__(self, data: bytes, terminal: bool = False):
        super().__init__(io.BytesIO(data), "utf-8", "surrogateescape")
        self.isatty = lambda: terminal


@pytest.mark.parametrize("data, line", [(b"caf\xe9\n", 1), (b"one\ncaf\xe9\n", 2), (b"one\ntwo\ncaf\xc3", 3)])
def test_a_line_that_is_no_text_is_refused_after_those_before_it(run, monkeypatch, capsys, data, line):
    for flags in (CHAT, CHAT[:2] + CHAT[3:]):
        monkeypatch.setattr(sys, "stdin", Stdin(data))
        with pytest.raises(UserError, match=f"line {line} of standard input is not utf-8 text .byte 0x(e9|c3) after 3 "
                                            "characters"):
            run(chat_cli.main, *flags)
        assert capsys.readouterr().out.count("one") == (line > 1)


def test_lines_as_windows_ends_them_and_one_without_an_end(run, monkeypatch):
    answers = []
    for data in (b"one\ntwo\n", b"one\r\ntwo\r\n", b"one\ntwo", b"one\r\ntwo"):
        monkeypatch.setattr(sys, "stdin", Stdin(data))
        answers.append(run(chat_cli.main, *CHAT)[0])
    assert all(answer == answers[0] for answer in answers) and any(line.startswith("two") for line in answers[0])


def test_a_prompt_that_is_no_text(run):
    with pytest.raises(UserError, match="--prompt is not utf-8 text .byte 0xe9 after 3 characters"):
        run(chat_cli.main, *CHAT, "--prompt=caf\udce9")


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(n, m): Ctrl-C while the n-th and m-th token are generated; 9 are asked for."""
    whole, counted = Session.ingest, []

    def at(*tokens: int) -> None:
        def ingest(self, ids):
            whole(self, ids)
            counted.extend(ids)
            if ids and len(counted) in tokens:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(Session, "ingest", ingest)

    return at


DISK = ("--mc_tree=disk", "--mc_store=@store")


def stored(folder) -> int:
    with DiskStore.open(folder / "store", "r") as store:
        assert not store.verify()
        return store.n_tokens


def test_ctrl_c_ends_an_answer_and_the_typed_conversation_goes_on(run, interrupt, monkeypatch, tmp_path):
    interrupt(4)
    monkeypatch.setattr(sys, "stdin", Stdin(b"one\ntwo\n", terminal=True))
    _, err = run(chat_cli.main, *CHAT, *DISK)
    assert [line.split(" tokens")[0] for line in err if line.startswith("[history")] == ["[history 8",
                                                                                         "[history 20"], "1 + 3 + 4, 3 + 9"  # noqa: E501
    assert stored(tmp_path) == 20


@pytest.mark.parametrize("flags, stdin", [(("--prompt=one",), b""), ((), b"one\ntwo\n")])
def test_ctrl_c_with_nobody_to_type_ends_the_command_with_what_was_generated(run, interrupt, monkeypatch, tmp_path,
                                                                             flags, stdin):
    interrupt(4)
    monkeypatch.setattr(sys, "stdin", Stdin(stdin))
    with pytest.raises(KeyboardInterrupt):
        run(chat_cli.main, *CHAT, *DISK, *flags)
    assert stored(tmp_path) == 8


def test_a_second_ctrl_c_does_not_wait_for_the_next_step(run, interrupt, monkeypatch, tmp_path):
    interrupt(4)
    noting = Session.ingest

    def ingest(self, ids):
        noting(self, ids)
        if ids and self.n_tokens == 8:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Session, "ingest", ingest)
    monkeypatch.setattr(sys, "stdin", Stdin(b"one\ntwo\n", terminal=True))
    with pytest.raises(KeyboardInterrupt):
        run(chat_cli.main, *CHAT, *DISK)
    assert stored(tmp_path) <= 8


def test_ctrl_c_while_a_history_is_read_keeps_what_was_read(run, monkeypatch, tmp_path):
    monkeypatch.setattr(documents, "READ_BYTES", 100)
    (tmp_path / "history.txt").write_text("So we beat on, boats against the current.\n" * 60)
    whole = Session.append

    def append(self, ids):
        whole(self, ids)
        if self.n_tokens > 500:
            signal.raise_signal(signal.SIGINT) if not hasattr(self, "told") else None
            self.told = True

    monkeypatch.setattr(Session, "append", append)
    with pytest.raises(KeyboardInterrupt):
        run(chat_cli.main, *CHAT, *DISK, "--history=@history.txt", "--prompt=abc")
    assert 500 < stored(tmp_path) < 700


def test_ctrl_c_without_megacontext(run, monkeypatch, capsys):
    whole = chat_cli.say

    def say(prompt, answer):
        whole(prompt, (piece for i, piece in enumerate(answer) if i != 2 or signal.raise_signal(signal.SIGINT) is None))

    monkeypatch.setattr(chat_cli, "say", say)
    plain = CHAT[:2] + ("--max_tokens=60",)
    monkeypatch.setattr(sys, "stdin", Stdin(b"one\ntwo\n", terminal=True))
    out, _ = run(chat_cli.main, *plain)
    assert "".join(out).count("> ") >= 3 and "two" in "".join(out)
    with pytest.raises(KeyboardInterrupt):
        run(chat_cli.main, *plain, "--prompt=one")


# -- histories that are no files --------------------------------------------------------------------------------------


def test_a_history_from_a_pipe_is_read_as_that_of_a_file(run, tmp_path):
    flags = (*CHAT, "--prompt=abc", "--temperature=0")
    text = "So we beat on, bôats against the current.\r\n" * 60
    (tmp_path / "history.txt").write_bytes(text.encode())
    (want, err), said = run(chat_cli.main, *flags, "--history=@history.txt"), []
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "/dev/fd/{}"):
        if name == "fifo":
            path, write = tmp_path / "fifo", lambda: (tmp_path / "fifo").write_bytes(text.encode())
        else:
            read, end = os.pipe()
            path, write = f"/dev/fd/{read}", lambda: (os.write(end, text.encode()), os.close(end))
        writer = threading.Thread(target=write)
        writer.start()
        out, said = run(chat_cli.main, *flags, f"--history={path}")
        writer.join()
        assert out == want
        assert [line.split(" of ")[0] for line in said if line.startswith("read ")] == [line.split(" of ")[0]
                                                                                        for line in err
                                                                                        if line.startswith("read ")]


@pytest.mark.parametrize("content, message",
                         [(b"text \xff", "is not UTF-8 text .*byte 5"), (b"text \xc3", "is not UTF-8 text .*byte 5")])
def test_a_pipe_that_is_no_text_leaves_nothing_behind(run, tmp_path, content, message):
    read, end = os.pipe()
    os.write(end, content), os.close(end)
    with pytest.raises(UserError, match=message):
        run(chat_cli.main, *CHAT, *DISK, f"--history=/dev/fd/{read}", "--prompt=a")
    os.close(read)
    assert not (tmp_path / "store").exists()


def test_a_history_that_takes_the_prompts_is_refused(run):
    for path in ("/dev/fd/0", "/proc/self/fd/0"):
        with pytest.raises(UserError, match=f"--history={path} takes all of standard input"):
            run(chat_cli.main, *CHAT, f"--history={path}")


def test_an_empty_history_and_a_folder(run, tmp_path):
    (tmp_path / "empty").touch()
    assert any(line.startswith("read 0 tokens")
               for line in run(chat_cli.main, *CHAT, "--history=@empty", "--prompt=a")[1])
    with pytest.raises(UserError, match="cannot read --history=.*Is a directory"):
        run(chat_cli.main, *CHAT, "--history=@ckpt", "--prompt=a")


@pytest.mark.parametrize("flags, message", [
    (("--history=@none",), "cannot read --history"), (("--history=@binary",), "is not UTF-8 text"), 
    (("--mc_budget=22", "--history=@history.txt"), "a budget of 22 entries is too small for a session"),
    (("--mc_kv_policy=fast",), "invalid choice")])
def test_mistakes(run, flags, message, tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 10)
    with pytest.raises((UserError, SystemExit)) as error:
        run(chat_cli.main, *CHAT, *flags, "--prompt=a")
    assert message in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize("flags", [(), ("--mc_tree=disk", "--mc_store=@store"), ("--mc_budget=23",),
                                   ("--mc_kv_policy=approximate",)])
def test_a_conversation_that_its_budget_cannot_tile_goes_on(run, monkeypatch, flags, tmp_path):
    """12,000 tokens of history, then 40 turns, with a level that was not trained: all answered,
    and what is left out is said."""
    (tmp_path / "long.txt").write_text("\u0436\u00e9 foreign \u4e2d " * 800)
    monkeypatch.setattr(sys, "stdin", io.StringIO("and then?\n" * 40))
    _, err = run(chat_cli.main, *CHAT, "--mc_budget=40", *flags, "--history=@long.txt", "--mc_explain=1")
    turns = [line for line in err if line.startswith("[history")]
    assert len(turns) == 40 and all("tokens left out" in line for line in turns)
    table = err[err.index(turns[-1]) + 1:]
    assert any("left out: no entry" in line for line in table)
    covered = [tuple(int(x.replace(",", "")) for x in line.split("LOD")[0].split("left out")[0].split("+"))
               for line in table]
    assert all(a + b == c for (a, b), (c, _) in zip(covered, covered[1:])) and covered[0][0] == 0


def test_a_history_on_disk_goes_on(run, tmp_path):
    """Each run adds a source to it; what was read before is there, and counted."""
    disk = ("--mc_tree=disk", "--mc_store=@store", "--prompt=abc", "--temperature=0", "--mc_explain=1")
    first, _ = run(chat_cli.main, *CHAT, *disk, "--history=@history.txt")
    assert first == run(chat_cli.main, *CHAT, "--history=@history.txt", "--prompt=abc",
                        "--temperature=0")[0], "on disk as in memory"
    _, err = run(chat_cli.main, *CHAT, *disk)
    (status,) = [line for line in err if line.startswith("[history")]
    # 2,533 fill 317 blocks of 8 with void slots, then bos, the prompt and the answer
    assert "history 2,549 tokens" in status
    with Catalog(tmp_path / "store", 8, read_only=True) as catalog:
        assert [source.uri.rsplit("/", 1)[-1] for source in catalog.sources()] == ["history.txt", "chat"]
        assert catalog.statistics(), "what was shown was not counted"
    with DiskStore.open(tmp_path / "store", "r") as store:
        assert store.n_tokens == 2549
    (tmp_path / "binary").write_bytes(b"text " * 500_000 + b"\xff")
    for flag in ("--history=@none", "--history=@binary"):
        with pytest.raises(UserError, match="--history="):
            run(chat_cli.main, *CHAT, *disk, flag)
    with DiskStore.open(tmp_path / "store", "r") as store, Catalog(tmp_path / "store", 8, read_only=True) as catalog:
        assert store.n_tokens == 2549 and len(catalog.sources()) == 2, "a file that cannot be read left something behind"  # noqa: E501
    with pytest.raises(UserError, match="needs --mc_store=DIR"):
        run(chat_cli.main, *CHAT, "--mc_tree=disk", "--prompt=a")


def test_metrics_of_a_conversation(run, tmp_path):
    run(chat_cli.main, *CHAT, "--history=@history.txt", "--prompt=abc", "--log_dir=@log")
    (row,) = read_metrics(tmp_path / "log" / "metrics.jsonl")
    assert row["mc.session.history"] == 2524 and row["gen_ai.server.request.duration"] > row["gen_ai.server.time_to_first_token"] > 0  # noqa: E501


def test_history_needs_megacontext(run, capsys):
    with pytest.raises(SystemExit):
        run(chat_cli.main, "--checkpoint_dir=@ckpt", "--history=@history.txt", "--prompt=a")
    assert "needs --mc_enabled=1" in capsys.readouterr().err


def test_mc_bench_decode(run, tmp_path):
    out, _ = run(mc_bench.main, "decode", "--checkpoint_dir=@ckpt", "--longest=4096", "--rounds=2",
                 "--vanilla_prefill=1024", "--disk=1", "--out=@decode")
    found = json.loads(out[-1])
    assert found["memory_ratio_1m_over_4k"] == 1.0 and found["ratio_lengths"] == [4096,
                                                                                  4096] and 0 < found["controller_share"] < 1  # noqa: E501
    assert [c["history"] for c in found["curve"]] == [1024, 4096] and all(c["vanilla"]["bytes"] > 0
                                                                          for c in found["curve"])
    # keys and values, nothing else
    assert [c["vanilla"]["bytes"] for c in found["curve"]] == [2 * 32 * 4 * c["history"] for c in found["curve"]]
    assert found["disk_over_ram"]["ratio"] > 0
    for c in found["curve"]:
        assert set(c["mc"]["parts_ms"]) >= {"base", "lens", "allocator", "refill",
                                            "ingest"} and c["mc"]["tokens_per_second"] > 0
        assert c["mc"]["median_ms"] <= c["mc"]["p95_ms"]
    assert all((tmp_path / "decode" / name).stat().st_size > 0 for name in ("decode.json", "decode.png", "decode.pdf"))


def test_mc_bench_kv(run):
    out, _ = run(mc_bench.main, "kv", "--checkpoint_dir=@ckpt", "--rows=3", "--ahead=40", "--mc_interval=8",
                 "--mc_budget=60")
    found = json.loads(out[-1])
    assert found["rows"] == 3 and found["delta_nll"] == pytest.approx(found["nll"]["approximate"] - found["nll"]["exact"])  # noqa: E501
    assert 0 < found["computed_share"]["approximate"] <= found["computed_share"]["exact"] <= 1
    with pytest.raises(UserError, match="at least 2 rows"):
        run(mc_bench.main, "kv", "--checkpoint_dir=@ckpt", "--rows=1")


@pytest.mark.parametrize("flags, message", [(("--longest=10",), "at least 1024 tokens"), (("--rounds=1",), "2 rounds"),
                                            (("--mc_budget=22",), "too small")])
def test_mistakes_of_mc_bench_decode(run, flags, message):
    with pytest.raises(UserError, match=message):
        run(mc_bench.main, "decode", "--checkpoint_dir=@ckpt", "--longest=1024", *flags)


def test_mc_bench_search(run):
    out, _ = run(mc_bench.main, "search", "--checkpoint_dir=@ckpt", "--longest=65536", "--queries=5")
    found = json.loads(out[-1])
    assert [row["tokens"] for row in found["lengths"]] == [4096, 65536] and len(out) == 2 + 2 + 1
    assert [row["scored"] for row in found["lengths"]] == [512, 1024]
    for row in found["lengths"]:
        assert 0 < row["search_ms"] <= row["search_p95_ms"] and row["recall_1"] <= 1


@pytest.mark.parametrize("flags, message",
                         [(("--longest=10",), "at least 4096 tokens"), (("--queries=0",), "one tail")])
def test_mistakes_of_mc_bench_search(run, flags, message):
    with pytest.raises(UserError, match=message):
        run(mc_bench.main, "search", "--checkpoint_dir=@ckpt", *flags)
