"""Trap 26: the path of somebody who changes no flag, walked with a long input of a kind that
the model has never seen (K4)."""

import re

from e2e_commands import run

FOREIGN = "Τὸ δ᾽ εὖ καὶ τὸ κακῶς 正しい答え ça va? λόγος ☃ 0x1F4A9\t"


def test_default_flags_and_a_long_foreign_history(base, prepared, tmp_path):
    """A training whose MegaContext flags are all defaults, a history of some 40,000 tokens, in memory and on disk."""
    done = run(base, "base_train", f"--data={prepared / 'texts'}", "--depth=1", "--max_seq_len=512",
               "--device_batch_size=2", "--total_batch_size=1024",
               "--num_iterations=3", "--eval_tokens=1024", "--device=cpu", "--model_tag=m", "--mc_enabled=1").ok()
    (outlook,) = [line for line in done.out.splitlines() if line.startswith("sessions: ")]
    assert "LOD1 to LOD4 are trained; of 1,048,576 tokens they show" in outlook and "left out and searched all the same" in outlook  # noqa: E501
    assert "note:" not in done.err
    (tmp_path / "foreign.txt").write_text(FOREIGN * 600)
    chat = ("--checkpoint_dir", str(base / "checkpoints" / "m"), "--mc_enabled=1", "--device=cpu")
    for flags in ([], ["--mc_tree=disk", f"--mc_store={tmp_path / 'store'}"]):
        talk = run(base, "chat_cli", *chat, *flags, f"--history={tmp_path / 'foreign.txt'}", "--prompt=go on",
                   "--mc_explain=1", "--max_tokens=40").ok()
        (status,) = [line for line in talk.err.splitlines() if line.startswith("[history")]
        history, entries = (int(re.search(what, status)[1].replace(",", ""))
                            for what in (r"history ([\d,]+)", r"entries (\d+)"))
        omitted = sum(int(x.replace(",", "")) for x in re.findall(r"([\d,]+) tokens left out", status))
        lines = [(*(int(x.replace(",", "")) for x in found[:2]), found[2])
                 for found in re.findall(r"^ +([\d,]+) \+ ([\d,]+) +(LOD\d|left out)", talk.err, re.M)]
        ends = [start + tokens for start, tokens, _ in lines]
        assert [start
                for start, *_ in lines] == [0, *ends[:-1]] and ends[-1] == history > 30_000, "every token in one line"
        assert sum(tokens for _, tokens, level in lines if level == "left out") == omitted and entries <= 128 + 32
    assert run(base, "chat_cli", *chat, *flags, "--prompt=and then?",
               "--max_tokens=40").ok().err.count("[history") == 1, "the stored history goes on"


def test_one_row_a_micro_batch_trains_what_it_can_and_says_what_not(base, prepared):
    """Far histories are made of other rows. With none the default is less, said in one line, and
    what was asked for is refused."""
    flags = [f"--data={prepared / 'texts'}", "--depth=1", "--max_seq_len=512", "--device_batch_size=1",
             "--total_batch_size=512", "--num_iterations=1", "--eval_tokens=512",
             "--device=cpu", "--mc_enabled=1"]  # fmt: skip
    done = run(base, "base_train", *flags).ok()
    (note,) = [line for line in done.err.splitlines() if line.startswith("note:")]
    assert "LOD 2, 3, 4 will not be trained" in note and "--device_batch_size=1" in note
    assert "LOD1 to LOD1 are trained" in done.out
    assert "has one row" in run(base, "base_train", *flags, "--mc_far_tokens=8388608", "--model_tag=far").error
