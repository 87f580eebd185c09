"""Training step of MegaContext against vanilla's.

Same model, data, optimizer and batch, alternating blocks of steps in one process.

Machines are shared and noisy, so only ratios are reported: of each pair of neighbouring blocks, with the median over
pairs and an interval from a bootstrap over them.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from mc.config import from_dict
from mc.runtime import MCController
from nanochat.common import FlagParser, UserError, seed_everything
from nanochat.dataloader import Loader, source_of
from nanochat.gpt import GPT, config_from_dict
from nanochat.loading import check_tokenizer
from nanochat.optim import MuonAdamW, gpt_param_groups
from nanochat.schedule import batch_lr_scale
from nanochat.tasks.recall import CurriculumSchedule
from nanochat.telemetry.tracing import Trace
from nanochat.tokenizer import Tokenizer
from scripts.bench.base import Ratio, add_block_flags, print_json, ratio_of, synchronize, timed_meta


class StepTimes(NamedTuple):
    ratio: float  # MC / vanilla, median over pairs of blocks
    low: float  # 95 % interval
    high: float
    vanilla_s: float  # seconds per step
    mc_s: float
    parts: dict[str, float]  # seconds per step of MC's parts; "backward and optimizer" is what is left beyond vanilla's


# one optimizer step: hands every micro-step's metrics over, times its parts in the trace
Step = Callable[[Callable[[dict], None], Trace], None]


def training_step(meta: dict, tokenizer: Tokenizer, *, with_mc: bool, device: str = "cpu") -> Step:
    """A step at the settings of a MegaContext checkpoint's `meta`, on a model of its own, MegaContext
    active throughout if it is on.

    Rows come from the last third of that run, so that a curriculum is where MegaContext trained. UserError without
    MegaContext or its tokenizer.
    """
    if not meta.get("mc"):
        raise UserError("the checkpoint was trained with --mc_enabled=0: it has no MegaContext settings to time")
    check_tokenizer(meta, tokenizer, "the checkpoint")
    flags, config = meta["flags"], config_from_dict(meta["model_config"])
    T, total = config.sequence_len, flags["total_batch_size"] or meta["tokens"] // meta["step"]
    rows = total // T
    recall = {}
    if flags["data"] == "recall":
        recall = dict(schedule=CurriculumSchedule(flags["recall_blocks"], grow=flags["recall_grow"],
                                                  seed=flags["seed"]), total_rows=rows * meta["num_iterations"])
    source = source_of(meta, "train", tokenizer=tokenizer, **recall)
    scale = batch_lr_scale(total)
    half = flags["dtype"] == "bfloat16" or (flags["dtype"] == "auto" and device != "cpu")
    seed_everything(flags["seed"])
    gpt = GPT(config).to(device)
    mc = None
    if with_mc:
        settings = replace(from_dict(meta["mc"]["config"]), start=0.0, ramp=0)
        mc = MCController(settings, gpt, T=T, micro_batch=flags["device_batch_size"], num_iterations=1,
                          seed=flags["seed"])
    rates = {name: flags[name] * scale for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")}
    groups = gpt_param_groups(gpt.named_parameters(), config.n_embd, weight_decay=flags["weight_decay"], **rates)
    optimizer = MuonAdamW(groups + (mc.param_groups(scale) if mc else []))
    loader = Loader(source, rows, flags["device_batch_size"], T, device=device)
    loader.load_state_dict({**loader.state_dict(), "next_row": rows * (2 * meta["num_iterations"] // 3)})

    def step(note: Callable[[dict], None], trace: Trace) -> None:
        for _ in range(loader.micro_steps):
            batch = loader.next()
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
                if mc:
                    loss, metrics = mc.training_step(gpt, batch, 0, trace)[:2]
                else:
                    loss, metrics = gpt.loss(gpt.hidden(batch.inputs), batch.targets, batch.num_targets), {}
            (loss / loader.micro_steps).backward()
            if mc:
                metrics |= mc.after_backward(loader.micro_steps, trace)[1]
            note(metrics)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_step_times(meta: dict, tokenizer: Tokenizer, *, pairs: int = 8, steps: int = 3,
                        device: str = "cpu") -> StepTimes:
    """Both kinds of step, as `training_step` makes them."""
    vanilla, mega = (training_step(meta, tokenizer, with_mc=with_mc, device=device) for with_mc in (False, True))
    parts: dict[str, list] = defaultdict(list)

    def note(metrics: dict) -> None:
        for name, value in metrics.items():
            if name.startswith("mc.time."):
                parts[name.removeprefix("mc.time.")].append(value)

    seconds = alternate(vanilla, mega, pairs, steps, device, note, warmed=parts.clear)
    shares = {name: sum(map(float, values)) / (pairs * steps) for name, values in parts.items() if name != "lm"}
    vanilla_s, mc_s = np.median(seconds, axis=0)
    if shares:
        shares["backward and optimizer"] = mc_s - vanilla_s - sum(shares.values())
    return StepTimes(*ratio_of(seconds), float(vanilla_s), float(mc_s), shares)


def alternate(first: Step, second: Step, pairs: int, steps: int, device: str,
              note: Callable[[dict], None] = lambda metrics: None,
              warmed: Callable[[], None] = lambda: None) -> np.ndarray:
    """Seconds per step, [pairs, 2], of blocks of steps in turn, after one block of each to warm
    up (then `warmed` is called)."""
    def timed(step: Step) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            step(note, Trace("train.step", torch.device(device)))
        synchronize(device)
        return (time.perf_counter() - begin) / steps

    timed(first), timed(second)
    warmed()
    return np.array([[timed(first), timed(second)] for _ in range(pairs)])


def step_time_ratio(arm: dict, default: dict, tokenizer: Tokenizer, *, pairs: int = 6, steps: int = 2,
                    device: str = "cpu") -> Ratio:
    """Step of one checkpoint's settings against another's; both are metas of MegaContext checkpoints."""
    seconds = alternate(*(training_step(meta, tokenizer, with_mc=True, device=device) for meta in (default, arm)),
                        pairs, steps, device)
    return ratio_of(seconds)


def add_flags(parser: FlagParser) -> None:
    add_block_flags(parser, pairs=8, steps=3, about="vanilla and MegaContext")


def run(args: argparse.Namespace) -> None:
    meta = timed_meta(args)
    times = training_step_times(meta, Tokenizer.load(), pairs=args.pairs, steps=args.steps, device=args.device)
    print(f"step time MC / vanilla {times.ratio:.3f} [{times.low:.3f}, {times.high:.3f}]: {times.mc_s:.3f} s against "
          f"{times.vanilla_s:.3f} s, "
          f"{args.pairs} pairs of {args.steps} steps")
    for name, seconds in times.parts.items():
        print(f"  {name:24s} {seconds / times.vanilla_s:6.1%} of a vanilla step")
    print_json(times._asdict())
