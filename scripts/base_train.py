"""Train a GPT, with MegaContext beside it when asked.

    python -m scripts.base_train --depth=4 …                     one process, CPU or one GPU
    torchrun --nproc_per_node=8 scripts/base_train.py --depth=20 …   a node
    … --mc_enabled=1                                             gists, lens and working contexts trained along

One dial, `--depth`, sets width, heads, batch size, learning rates and horizon; any other flag overrides. The same seed
and total batch give the same losses on any number of ranks. With `--mc_enabled=0` nothing of `mc` is imported.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # torchrun scripts/base_train.py, not installed

from nanochat.common import FlagParser, Ranks, UserError, import_optional, init_distributed, parse_optional, print0, run_main, seed_everything  # noqa: E501
from nanochat.controller import NullController
from nanochat.dataloader import Batch, Loader, RowSource, eval_rows, is_synthetic, is_tasks, make_source
from nanochat.evaluation import evaluate
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, check_groups, gpt_param_groups
from nanochat.outputs import StopRequest
from nanochat.plan import Plan, add_flags, check_flags, describe, make_plan
from nanochat.resume import Checkpoints, RunProgress, own_directory, start_from
from nanochat.schedule import lr_multiplier, muon_momentum, weight_decay_multiplier
from nanochat.tasks.recall import CurriculumSchedule
from nanochat.tasks.source import most_blocks
from nanochat.telemetry.meter import TrainingMeter, mean_over_ranks
from nanochat.tokenizer import Tokenizer


def main() -> None:
    args, begin = parse_flags(), time.time()
    ranks = shapes_only() if args.dry_run else init_distributed(args.device)
    tokenizer = load_tokenizer(args)
    plan = make_plan(args, tokenizer.vocab_size if tokenizer else args.vocab_size, ranks.world_size)

    # The base is built first, from the seed: the same weights with and without MegaContext.
    seed_everything(args.seed)
    with ranks.device if args.dry_run else contextlib.nullcontext():
        model = GPT(plan.model)
    model = model.to(ranks.device)
    controller = build_controller(args, plan, model)
    model.requires_grad_(not args.freeze_base)
    facts = describe(plan, model, controller, ranks.world_size)
    if args.dry_run:
        return print0(json.dumps(facts, indent=1))

    with own_directory(args) as directory:
        if args.init_from:
            start_from(args.init_from, plan, model, controller, tokenizer)
        optimizer = build_optimizer(args, plan, model, controller)
        data = open_data(args, plan, tokenizer, ranks)
        checkpoints = Checkpoints(directory, args, plan, ranks, tokenizer, model, controller, optimizer, data.loader)
        progress = checkpoints.resume()
        print0("{parameters:,} parameters, {iterations} steps of {tokens_per_step:,} tokens, {flops:.3g} FLOPs, "
               "{ranks} rank(s)".format(**facts)
               + f" on {ranks.device}")
        say_what_sessions_show(controller)
        last = min(args.stop_at or plan.num_iterations, plan.num_iterations)
        autocast = half_precision(args, ranks.device)

        with StopRequest(ranks) as stop, TrainingMeter(args, plan, model, controller, progress, ranks) as meter:
            held_out = HeldOut(args, model, controller, data, checkpoints, meter, stop)
            stopping = progress.unjudged(last) and not held_out.look(True, controller.active(last - 1))
            while progress.step < last and not stopping:
                meter.begin_step()
                for _ in range(plan.accumulation):
                    batch = meter.next(data.loader)
                    with autocast, meter.span("train.forward"):
                        result = controller.training_step(model, batch, progress.step, meter.trace)
                    with meter.span("train.backward"):
                        (result.loss / plan.accumulation).backward()
                    meter.micro_step(result, controller.after_backward(plan.accumulation, meter.trace),
                                     batch.num_targets)
                stopping = stop.agreed()
                due = what_is_due(args, progress.step + 1, last, stopping, controller.active(progress.step))
                if due.log:
                    meter.read_losses()
                meter.gradients(args.grad_clip)
                multiplier = set_rates(optimizer, args, progress.step, plan.num_iterations)
                with meter.updating():
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                progress.step += 1
                if due.log:
                    meter.log(multiplier)
                with meter.paused():
                    stopping |= not conclude(due, checkpoints, meter, held_out)
    report(progress, plan, stopping, stop, directory, begin)


# ---------------------------------------------------------------------------------------------------------------------
# What the run is made of


def make_parser(with_mc: bool = True, argv: Sequence[str] | None = None) -> FlagParser:
    """argv: the command line that may name arms of MegaContext, whose settings are flags
    then; by default this process's."""
    parser = FlagParser(description=__doc__.split("\n\n")[0])
    add_flags(parser)
    parser.add_switch("--mc_enabled", False, "1: train MegaContext beside the model")
    if with_mc:
        import_optional("mc", "config").add_flags(parser, argv)
    return parser


def parse_flags():
    parser, args = parse_optional(make_parser, "mc")
    check_flags(args, {name: parser.get_default(name) for name in vars(args)})
    if args.mc_enabled and args.rows == "packed":
        raise UserError("--rows=packed mixes documents in a row, which a working context must not cross; use "
                        "--rows=long with --mc_enabled=1")
    if args.mc_enabled and args.compile:
        raise UserError("--compile=1 hides the attention that teaches the lens; use --compile=0 with --mc_enabled=1")
    return args


def shapes_only() -> Ranks:
    """The ranks of a dry run, on a device that has shapes and no memory."""
    return Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), torch.device("meta"))


def load_tokenizer(args) -> Tokenizer | None:
    """None in a dry run that says how many ids there are. UserError where the flags mean another tokenizer."""
    if args.dry_run and args.vocab_size:
        return None
    tokenizer = Tokenizer.load()
    if args.vocab_size not in (0, tokenizer.vocab_size):
        raise UserError(f"--vocab_size={args.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids; leave the "
                        "flag out, or train another")
    return tokenizer


def build_controller(args, plan: Plan, model: GPT) -> NullController:
    """MegaContext where it is enabled, else what adds nothing."""
    if not args.mc_enabled:
        return NullController()
    settings, runtime = import_optional("mc", "config").from_flags(args), import_optional("mc", "runtime")
    return runtime.MCController(settings, model, T=plan.T, micro_batch=plan.micro_batch,
                                num_iterations=plan.num_iterations, seed=args.seed)


def say_what_sessions_show(controller: NullController) -> None:
    for mc in controller.modules.values():
        from scripts.eval.outlook import session_note  # imports mc

        print0(session_note(mc.focus_config(), controller.meta()["trained_lods"]))


def build_optimizer(args, plan: Plan, model: GPT, controller: NullController) -> MuonAdamW:
    rates = {name: getattr(args, name) * plan.lr_scale
             for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")}
    base = [] if args.freeze_base else gpt_param_groups(model.named_parameters(), plan.model.n_embd,
                                                        weight_decay=args.weight_decay, **rates)
    optimizer = MuonAdamW(base + controller.param_groups(plan.lr_scale))
    check_groups({"gpt": model} | controller.modules, optimizer.param_groups)
    if args.compile:
        model.hidden = torch.compile(model.hidden, dynamic=False)
    return optimizer


def set_rates(optimizer: MuonAdamW, args, step: int, num_iterations: int) -> float:
    """Learning rates, momentum and weight decay of a step; the multiplier of all rates."""
    multiplier = lr_multiplier(step, num_iterations, warmup_steps=args.warmup_steps,
                               warmdown_ratio=args.warmdown_ratio, final_lr_frac=args.final_lr_frac)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(step, num_iterations)
            group["weight_decay"] = args.weight_decay * weight_decay_multiplier(step, num_iterations)
    return multiplier


def half_precision(args, device: torch.device) -> contextlib.AbstractContextManager:
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()


class Data(NamedTuple):
    loader: Loader
    held_out: RowSource
    eval_steps: int  # batches of a rank in an evaluation
    token_bytes: torch.Tensor | None  # of each id; None where there is no text


def open_data(args, plan: Plan, tokenizer: Tokenizer, ranks: Ranks) -> Data:
    make = dict(T=plan.T, seed=args.seed, tokenizer=tokenizer, rows=args.rows, text_column=args.text_column,
                needles=args.needles,
                recall_blocks=args.recall_blocks)
    curriculum = {}
    if args.data in ("recall", "hops") or is_tasks(args.data):
        blocks = most_blocks(plan.T) if is_tasks(args.data) else args.recall_blocks
        schedule = CurriculumSchedule(blocks, grow=args.recall_grow, seed=args.seed)
        curriculum = dict(schedule=schedule, total_rows=plan.rows_per_step * plan.num_iterations)
    source = make_source(args.data, "train", **make, **curriculum)
    loader = Loader(source, plan.rows_per_step, plan.micro_batch, plan.T, ranks.rank, ranks.world_size, ranks.device)
    held_out = make_source(args.data, "val", **make)
    per_batch = plan.micro_batch * ranks.world_size
    print0(source.summary)
    return Data(loader, held_out, eval_rows(held_out, args.eval_tokens, per_batch) // per_batch,
                None if is_synthetic(args.data) else tokenizer.token_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# What happens once in a while


class Due(NamedTuple):
    evaluate: bool
    probe: bool
    save: bool
    log: bool

    @property
    def look(self) -> bool:
        return self.evaluate or self.probe


def what_is_due(args, step: int, last: int, stopping: bool, active: bool) -> Due:
    """At the end of the step that makes it `step` steps. A saved step's loss was looked at; a run that
    stops does no more than save."""
    evaluate, save = (step == last or bool(every and step % every == 0) for every in (args.eval_every, args.save_every))
    probe = active and (evaluate or bool(args.probe_every and step % args.probe_every == 0))
    log = step % args.log_every == 0 or evaluate or probe or save or stopping
    return Due(evaluate and not stopping, probe and not stopping, save or stopping, log)


class Stopped(Exception):
    """The run was asked to stop in an evaluation."""


class HeldOut:
    """Looks at held-out rows in the course of a run: the base's loss, and what MegaContext shows and costs there."""

    def __init__(self, args, model: GPT, controller: NullController, data: Data, checkpoints: Checkpoints,
                 meter: TrainingMeter, stop: StopRequest):
        self.model, self.controller, self.data, self.checkpoints, self.meter, self.stop = model, controller, data, checkpoints, meter, stop  # noqa: E501
        self.plan, self.ranks, self.autocast = checkpoints.plan, checkpoints.ranks, half_precision(args,
                                                                                                   checkpoints.ranks.device)

    def look(self, evaluate: bool, probe: bool) -> bool:
        """Whether it came to the end without being asked to stop."""
        self.meter.recorder.step = self.checkpoints.progress.step
        try:
            if evaluate:
                self.evaluate()
            if probe:
                self.probe()
        except Stopped:
            return False
        return True

    def evaluate(self) -> None:
        with self.autocast:
            found = evaluate(self.model, self.batches(), self.data.eval_steps, self.data.token_bytes)
        self.meter.recorder.record("val.loss", found.loss)
        if found.bpb is not None:
            self.meter.recorder.record("val.bpb", found.bpb)
        self.checkpoints.judged(found._asdict())

    def probe(self) -> None:
        from scripts.eval import probe  # imports mc

        with self.meter.timed("mc.time.probe"), self.autocast:
            found = probe.probe_batch(self.controller, self.model, next(self.batches()))
            self.meter.record(mean_over_ranks([found], self.ranks)[0])

    def batches(self) -> Iterator[Batch]:
        """Held-out batches, from the first row on. Stopped, on all ranks at the same
        batch, where the run is to stop."""
        plan, ranks = self.plan, self.ranks
        loader = Loader(self.data.held_out, plan.micro_batch * ranks.world_size, plan.micro_batch, plan.T, ranks.rank,
                        ranks.world_size, ranks.device)
        while not self.stop.agreed():
            yield loader.next()
        raise Stopped


def conclude(due: Due, checkpoints: Checkpoints, meter: TrainingMeter, held_out: HeldOut) -> bool:
    """Log, save and evaluate, as far as it is due; whether it came to the end without being asked to stop."""
    if due.log and not due.look:
        meter.flush()
    if due.save:  # before what can be stopped, or fail
        with meter.timed("checkpoint.save_time"):
            checkpoints.save()
    if not due.look:
        return True
    finished = held_out.look(due.evaluate, due.probe)
    if not finished and not due.save:
        checkpoints.save()
    meter.flush()
    return finished


def report(progress: RunProgress, plan: Plan, stopping: bool, stop: StopRequest, directory: Path, begin: float) -> None:
    """The last lines: for people, and as JSON. KeyboardInterrupt where Ctrl-C ended the run."""
    val = progress.val or {}
    summary = {"step": progress.step, "stopped": stopping, "val_loss": val.get("loss"), "val_bpb": val.get("bpb"),
               "tokens": progress.step * plan.tokens_per_step, "flops": progress.flops,
               "seconds": round(time.time() - begin, 1),
               "checkpoint": str(directory)}
    if stopping:
        print0(f"stopped by {stop.signal or 'a signal to another rank'} at step {progress.step} of "
               f"{plan.num_iterations}, saved in {directory}; "
               "--resume=1 goes on")
    else:
        print0(f"done: {progress.step} steps, checkpoint in {directory}")
    print0(json.dumps(summary))
    if stopping and stop.signal == "SIGINT":
        raise KeyboardInterrupt


if __name__ == "__main__":
    run_main(main)
