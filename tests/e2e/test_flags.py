"""Trap 11: every flag of base_train changes something that can be observed, or is refused.

Each row of the tables runs two trainings of a few steps, with and without the flag, inside this
process. What is compared is what they
leave behind and print: metrics apart from times, checkpoints, directories, the plan of a
dry run, the line of a refusal.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from e2e_commands import ROOT

from nanochat import dataset, resume
from nanochat.common import UserError
from nanochat.controller import NullController
from nanochat.telemetry import meter
from nanochat.telemetry.recorder import Recorder
from scripts import base_train
from scripts.make_docs import EVERY_ARM

BASE = ["--depth=1", "--aspect_ratio=32", "--head_dim=16", "--max_seq_len=64", "--device_batch_size=2",
        "--total_batch_size=256",
        "--num_iterations=4", "--warmup_steps=1", "--eval_every=0", "--eval_tokens=128", "--log_every=1",
        "--device=cpu", "--dtype=float32"]  # fmt: skip
MC = ["--mc_enabled=1", "--mc_block_size=8", "--mc_budget=32", "--mc_horizon=8", "--mc_recent=8", "--mc_start=0",
      "--mc_ramp=1",
      "--mc_lens_queries=32", "--mc_lens_key_dim=8", "--mc_gist_width=16", "--mc_max_lod=1"]  # fmt: skip
PLAN = ["--dry_run=1"]

# flag -> its value, and what else both runs of the comparison get
TABLE: dict[str, tuple[str, list[str]]] = {
    "depth": ("2", []),
    "vocab_size": ("7", []),
    "aspect_ratio": ("48", []),
    "head_dim": ("32", []),
    "n_kv_head": ("1", []),
    "max_seq_len": ("32", []),
    "window_pattern": ("SL", ["--depth=2", "--max_seq_len=256", "--total_batch_size=512", "--eval_tokens=256"]),
    "value_embeds": ("0", []),
    "smear": ("0", []),
    "resid_scalars": ("0", []),
    "backout": ("0", []),
    "key_shift": ("1", []),
    "tie_qk": ("1", []),
    "rope_fraction": ("0.5", []),
    "data": ("random", []),
    "rows": ("packed", []),
    "text_column": ("body", ["--data={jsonl}"]),
    "recall_blocks": ("8", ["--data=recall", "--max_seq_len=1088", "--total_batch_size=2176", "--num_iterations=2"]),
    "recall_grow": ("0", ["--data=recall", "--max_seq_len=1088", "--total_batch_size=2176", "--num_iterations=2"]),
    "needles": ("2", ["--data=needle", "--max_seq_len=1088", "--total_batch_size=2176", "--num_iterations=2"]),
    "init_from": ("{earlier}", []),
    "freeze_base": ("1", [*MC, "--init_from={earlier}"]),
    "total_batch_size": ("512", []),
    "device_batch_size": ("4", PLAN),
    "num_iterations": ("3", []),
    "target_tokens_per_param": ("20", ["--num_iterations=0", *PLAN]),
    "stop_at": ("2", []),
    "matrix_lr": ("0.01", []),
    "embedding_lr": ("0.1", []),
    "unembedding_lr": ("0.01", []),
    "scalar_lr": ("0.3", []),
    "weight_decay": ("0.1", []),
    "warmup_steps": ("0", []),
    "warmdown_ratio": ("0.25", []),
    "final_lr_frac": ("0.5", []),
    "grad_clip": ("0.01", []),
    "eval_every": ("2", []),
    "eval_tokens": ("256", []),
    "probe_every": ("2", MC),
    "save_every": ("2", []),
    "keep_last": ("1", ["--save_every=1"]),
    "log_every": ("2", []),
    "trace_every": ("2", []),
    "resume": ("1", ["--model_tag=earlier"]),
    "model_tag": ("other", []),
    "run": ("trial", []),
    "seed": ("7", []),
    "device": ("cuda", []),
    "dtype": ("bfloat16", []),
    "compile": ("1", []),
    "dry_run": ("1", []),
    "mc_enabled": ("1", ["--max_seq_len=512", "--total_batch_size=1024", "--eval_tokens=512", "--num_iterations=2"]),
}
TABLE_MC: dict[str, tuple[str, list[str]]] = {
    "block_size": ("4", []),
    "max_lod": ("2", ["--max_seq_len=128", "--total_batch_size=256", "--mc_budget=40"]),
    "gist": ("slots", []),
    "arms": ("bands", []),
    "gists_per_block": ("1", ["--mc_arms=several"]),
    "gist_width": ("32", []),
    "contrast_weight": ("1", ["--mc_arms=contrast"]),
    "horizon_gist_weight": ("1", ["--mc_arms=horizon"]),
    "budget": ("40", []),
    "recent": ("16", []),
    "horizon": ("16", []),
    "positions": ("contiguous", []),
    "damping_floor": ("0.5", []),
    "far_tokens": ("400", []),
    "far_entries": ("64", ["--mc_far_tokens=400"]),
    "start": ("0.5", []),
    "ramp": ("3", []),
    "row_stride": ("2", []),
    "variants": ("2", []),
    "cuts": ("random:1", []),
    "wc_weight": ("0.5", []),
    "kl_weight": ("0", []),
    "lens": ("perceiver", []),
    "teacher": ("gate", []),
    "lens_edits": ("3", ["--mc_teacher=counterfactual"]),
    "lens_rank": ("1", ["--mc_arms=rank"]),
    "lens_zero_sum": ("1", ["--mc_arms=zero_sum"]),
    "lens_illegal": ("1", ["--mc_arms=illegal"]),
    "lens_kl": ("1", ["--mc_arms=kl"]),
    "placed_stride": ("2", ["--mc_arms=placed", "--mc_placed_stride=1"]),
    "lens_horizon": ("4", []),
    "lens_queries": ("24", []),
    "lens_row_stride": ("2", []),
    "preset": ("recall", []),
    "lens_key_dim": ("16", []),
    "lens_keys": ("2", []),
    "gist_lr": ("0.1", []),
    "lens_lr": ("0.1", []),
}


def flags(with_mc: bool) -> set[str]:
    """Every flag that base_train has, read off its parser."""
    found = {a.dest: a.help for a in base_train.make_parser(with_mc, EVERY_ARM)._actions}
    assert all(found.values())
    return set(found) - {"help"}


def test_every_flag_is_in_the_table():
    assert flags(False) == set(TABLE)
    assert flags(True) == set(TABLE) | {f"mc_{name}" for name in TABLE_MC}


@pytest.fixture(scope="module")
def observe(prepared, tmp_path_factory):
    """observe(flags): everything a run of base_train leaves and prints that does not depend on the clock."""
    folder = tmp_path_factory.mktemp("flags")
    (folder / "jsonl").mkdir()
    for i in range(2):
        lines = [json.dumps({"text": f"{i} {j} some words " * 100, "body": f"{j} {i} other texts " * 100})
                 for j in range(4)]
        (folder / "jsonl" / f"{i}.jsonl").write_text("\n".join(lines))
    (folder / "start" / "tokenizer").mkdir(parents=True)
    (folder / "start" / "tokenizer" / "tokenizer.json").symlink_to(prepared / "base" / "tokenizer" / "tokenizer.json")
    seen: dict[tuple, object] = {}
    threads = torch.get_num_threads()

    def observe(*flags: str):
        if flags not in seen:
            base = folder / f"base{len(seen)}"
            (base / "tokenizer").mkdir(parents=True)
            (base / "tokenizer" / "tokenizer.json").symlink_to(prepared / "base" / "tokenizer" / "tokenizer.json")
            argv = [f.format(jsonl=folder / "jsonl", earlier=folder / "start" / "checkpoints" / "d1")
                    for f in (*BASE, f"--data={prepared / 'texts'}", *flags)]
            if "--model_tag=earlier" in flags:
                attempt(base, [f for f in argv if not f.startswith("--resume")] + ["--stop_at=2"])
            if any("earlier}" in f for f in flags) and not (folder / "start" / "checkpoints").exists():
                attempt(folder / "start", [*BASE, f"--data={prepared / 'texts'}"])
            seen[flags] = attempt(base, argv)
        return seen[flags]

    def attempt(base: Path, argv: list[str]):
        printed, compiled, sinks, traces = [], [], [], []
        open_recorder, trace = meter.open_recorder, Recorder.trace

        def opened(*args, **kwargs):
            recorder = open_recorder(*args, **kwargs)
            sinks.extend(type(sink).__name__ for sink in recorder.sinks)
            return recorder

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["base_train", *argv])
            patch.setenv("NANOCHAT_BASE_DIR", str(base))
            patch.setenv("WANDB_MODE", "disabled")
            patch.setattr(base_train, "print0", lambda *values: printed.append(" ".join(map(str, values))))
            patch.setattr(meter, "open_recorder", opened)
            patch.setattr(Recorder, "trace", lambda self, it: (traces.append(it.keep), trace(self, it)))
            patch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
            dataset.build_stdlib(prepared / "texts")  # a small one
            try:
                torch.set_num_threads(1)
                base_train.main()
            except (UserError, SystemExit) as e:
                return "refused", str(e)
            finally:
                torch.set_num_threads(threads)
        metrics = {str(p.relative_to(base)): [timeless(json.loads(line)) for line in p.read_text().splitlines()]
                   for p in base.rglob("metrics.jsonl")}  # fmt: skip
        files = sorted(p.name for p in base.rglob("complete_*"))
        return metrics, files, sinks, traces, len(compiled), printed if "--dry_run=1" in argv else None

    yield observe


CLOCK = ("time", "telemetry.overhead", "train.elapsed", "train.step_time", "train.optimizer_time", "train.data_wait",
         "train.tokens_per_second", "train.mfu", "train.memory",
         "checkpoint.save_time")  # fmt: skip


def timeless(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in CLOCK and not k.startswith("mc.time.")}


def test_the_comparison_itself(observe):
    """The same flags give the same observation; and it holds losses."""
    again = observe("--seed=42")
    assert observe() == again and len(again[0]["runs/d1/metrics.jsonl"]) == 4
    assert observe(*MC, "--seed=42") == observe(*MC)


@pytest.mark.parametrize("flag", TABLE)
def test_flag(flag, observe):
    value, extra = TABLE[flag]
    with_flag = [*extra, f"--{flag}={value}"]
    assert observe(*with_flag) != observe(*extra)
    if flag not in ("vocab_size", "text_column", "device", "resume", "run"):
        assert observe(*extra)[0] != "refused" and observe(*with_flag)[0] != "refused", observe(*with_flag)


@pytest.mark.parametrize("flag", TABLE_MC)
def test_mc_flag(flag, observe):
    value, extra = TABLE_MC[flag]
    runs = observe(*MC, *extra), observe(*MC, *extra, f"--mc_{flag}={value}")
    assert runs[0] != runs[1] and "refused" not in (runs[0][0], runs[1][0]), runs


@pytest.mark.parametrize("flag", [*TABLE, *(f"mc_{name}" for name in TABLE_MC)])
def test_resume_refuses_or_honours(flag, monkeypatch):
    """A resumed run is told which flag differs, unless the flag is one that the rest of a run can honour."""
    monkeypatch.setattr(sys, "argv", ["base_train", *MC])
    args = base_train.parse_flags()
    plan = base_train.make_plan(args, 300, 1)
    meta = {"flags": vars(args), "tokenizer": "abc", "model_config": dataclasses.asdict(plan.model),
            "num_iterations": plan.num_iterations}
    tokenizer = SimpleNamespace(fingerprint="abc")
    resume.check_resumable(meta, args, plan, tokenizer, ROOT, NullController())
    changed = argparse.Namespace(**vars(args) | {flag: "changed"})
    if flag in resume.MAY_CHANGE:
        resume.check_resumable(meta, changed, plan, tokenizer, ROOT, NullController())
    elif flag != "dry_run":
        with pytest.raises(UserError, match=f"--{flag}=changed"):
            resume.check_resumable(meta, changed, plan, tokenizer, ROOT, NullController())
