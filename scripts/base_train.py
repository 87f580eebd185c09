"""Train a GPT, with MegaContext beside it when asked.

    python -m scripts.base_train --depth=4 …                     one process, CPU or one GPU
    torchrun --nproc_per_node=8 scripts/base_train.py --depth=20 …   a node
    … --mc_enabled=1                                             gists, lens and working contexts trained along

One dial, `--depth`, sets width, heads, batch size, learning rates and horizon; any other flag overrides. The same seed and total
batch give the same losses on any number of ranks. With `--mc_enabled=0` nothing of `mc` is imported.
"""

import contextlib
import dataclasses
import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # torchrun scripts/base_train.py, not installed

from nanochat.checkpoint import complete_steps, load_checkpoint, load_mc_state, load_model_state, save_checkpoint, set_rng_state
from nanochat.common import FlagParser, Ranks, UserError, base_dir, import_optional, init_distributed, parse_optional, print0, run_main, seed_everything
from nanochat.dataloader import Loader, Source, eval_rows, is_synthetic, is_tasks, make_source
from nanochat.evaluation import evaluate
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, assert_finite, check_groups, global_grad_norm, gpt_param_groups, relative_change
from nanochat.recall import CurriculumSchedule
from nanochat.recorder import Recorder, open_recorder
from nanochat.schedule import batch_lr_scale, lr_multiplier, muon_momentum, weight_decay_multiplier
from nanochat.tasks.source import most_blocks
from nanochat.tokenizer import Tokenizer
from nanochat.tracing import Reading, Trace

# ---------------------------------------------------------------------------------------------------------------------
# Flags


def make_parser(with_mc: bool = True, argv: Sequence[str] | None = None) -> FlagParser:
    """argv: the command line that may name arms of MegaContext, whose settings are flags then; by default this process's."""
    parser = FlagParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    flag = dict(type=int, choices=(0, 1))
    # model
    add("--depth", type=int, default=6, help="layers; the dial that sets all that is not given")
    add("--vocab_size", type=int, default=0, help="ids the tokenizer must have; 0: as many as it has. Given, a dry run needs no tokenizer")
    add("--aspect_ratio", type=int, default=64, help="width per layer")
    add("--head_dim", type=int, default=64, help="width of a head; the model's width is rounded up to a multiple")
    add("--n_kv_head", type=int, default=0, help="heads of keys and values; 0: as many as heads")
    add("--max_seq_len", type=int, default=1024, help="T: tokens per row")
    add("--window_pattern", default="L", help="attention windows tiled over layers: L full, S a quarter; the last layer is L")
    add("--value_embeds", default=1, help="1: value embeddings on every other layer", **flag)
    add("--smear", default=1, help="1: each embedding takes a learned share of the one before it", **flag)
    add("--resid_scalars", default=1, help="1: learned scalars on the residual stream and the embedding's re-entry", **flag)
    add("--backout", default=1, help="1: a share of the middle layer is taken out again at the end", **flag)
    add("--key_shift", default=0, help="1: keys mix with the token before them (recall forms much sooner)", **flag)
    add("--tie_qk", default=0, help="1: key projections start equal to query projections", **flag)
    add("--rope_fraction", type=float, default=1.0, help="share of each head's dims that is rotated")
    # data
    add("--data", default="stdlib", help="stdlib (embedded), recall, hops, needle, random, tasks or tasks:NAME,NAME=SHARE,… (generated tasks), or a directory of parquet, jsonl or text files")
    add("--needles", type=int, default=4, help="blocks of facts hidden in the text of each row of --data=needle")
    add("--rows", default="long", choices=("long", "packed"), help="rows within one long document, or packed from several")
    add("--text_column", default="text", help="column of parquet and jsonl files that holds the text")
    add("--recall_blocks", type=int, default=32, help="most blocks of facts that a row of --data=recall or hops stores")
    add("--recall_grow", type=float, default=0.5, help="share of a run on recall, hops or tasks over which rows grow to their full number of blocks")
    # horizon
    add("--total_batch_size", type=int, default=0, help="tokens per optimizer step over all ranks; 0: by depth")
    add("--device_batch_size", type=int, default=8, help="rows per micro-batch of a rank")
    add("--num_iterations", type=int, default=0, help="optimizer steps; 0: by --target_tokens_per_param")
    add("--target_tokens_per_param", type=float, default=10.0, help="tokens per weight of the matrix products")
    add("--stop_at", type=int, default=0, help="stop after this step, with a checkpoint; schedules still run to the end; 0: never")
    # start
    add("--init_from", default="", help="checkpoint directory of a run of the same shape and tokenizer, whose newest weights this one starts from")
    add("--freeze_base", default=0, help="1: with --mc_enabled=1, the base keeps its weights and only MegaContext learns", **flag)
    # optimization
    add("--matrix_lr", type=float, default=0.02, help="Muon's learning rate, for matrices")
    add("--embedding_lr", type=float, default=0.3, help="learning rate of the embeddings, for width 768")
    add("--unembedding_lr", type=float, default=0.004, help="learning rate of the head, for width 768")
    add("--scalar_lr", type=float, default=0.1, help="learning rate of scalars and gates")
    add("--weight_decay", type=float, default=0.0, help="of matrices, falling to 0 over the run")
    add("--warmup_steps", type=int, default=20, help="steps over which learning rates rise")
    add("--warmdown_ratio", type=float, default=0.5, help="share of the run over which they fall")
    add("--final_lr_frac", type=float, default=0.05, help="share of the learning rate that is left at the end")
    add("--grad_clip", type=float, default=0.0, help="largest norm of the base model's gradients together; 0: no clipping")
    # run
    add("--eval_every", type=int, default=100, help="steps between evaluations; 0: at the end only")
    add("--eval_tokens", type=int, default=32768, help="held-out tokens per evaluation")
    add("--probe_every", type=int, default=0, help="with --mc_enabled=1: steps between probes of lens and focus on held-out rows, on top of one at every evaluation; 0: no more than those")
    add("--save_every", type=int, default=0, help="steps between checkpoints; 0: at the end only")
    add("--keep_last", type=int, default=3, help="complete checkpoints that are kept")
    add("--log_every", type=int, default=10, help="steps between log lines")
    add("--trace_every", type=int, default=100, help="steps between traces (the time line of a step's parts), sent where OTLP is set up; 0: none")
    add("--resume", default=0, help="1: go on from the newest intact checkpoint of --model_tag, if there is one", **flag)
    add("--model_tag", default="", help="name of the checkpoint and log directories; default d<depth>, with _mc for MegaContext")
    add("--run", default="dummy", help="name of a Weights & Biases run (WANDB_MODE=offline needs no network); dummy: none")
    add("--seed", type=int, default=42, help="of everything random")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to train")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of matrix products; auto: bfloat16 on CUDA")
    add("--compile", default=0, help="1: torch.compile the layers", **flag)
    add("--dry_run", default=0, help="1: print the plan (model, tokens, FLOPs, memory) and stop", **flag)
    add("--mc_enabled", default=0, help="1: train MegaContext beside the model", **flag)
    if with_mc:
        import_optional("mc", "config").add_flags(parser, argv)
    return parser


def parse_flags():
    parser, args = parse_optional(make_parser, "mc")
    check_ranges(args, {name: parser.get_default(name) for name in vars(args)})
    return args


def check_ranges(args, defaults: dict) -> None:
    """UserError for a number that no run can use, or a flag of data that is not trained on."""
    least = dict.fromkeys(("depth", "aspect_ratio", "head_dim", "max_seq_len", "device_batch_size", "log_every", "keep_last", "eval_tokens"), 1)
    least |= dict.fromkeys(("vocab_size", "n_kv_head", "total_batch_size", "num_iterations", "stop_at", "warmup_steps", "eval_every", "probe_every", "save_every", "trace_every", "matrix_lr",
                            "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay", "grad_clip", "seed"), 0)
    least["recall_blocks"] = 2
    for name, low in least.items():
        if not low <= getattr(args, name) < math.inf:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {low}")
    for name in ("recall_grow", "warmdown_ratio", "final_lr_frac"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name}={getattr(args, name)} must be in [0, 1]")
    if args.probe_every and not args.mc_enabled:
        raise UserError(f"--probe_every={args.probe_every} has no effect with --mc_enabled=0: there is no lens to probe")
    if args.freeze_base and not (args.mc_enabled and args.init_from and args.mc_start == 0):
        raise UserError("--freeze_base=1 trains MegaContext alone, on a base that has learned: it needs --mc_enabled=1, --init_from=DIR and --mc_start=0")
    for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay", "grad_clip"):
        if args.freeze_base and getattr(args, name) != defaults[name]:
            raise UserError(f"--{name}={getattr(args, name)} has no effect with --freeze_base=1: it is for training the base")
    for name, data in (("recall_blocks", ("recall", "hops")), ("recall_grow", ("recall", "hops", "tasks")), ("needles", ("needle",))):
        if getattr(args, name) != defaults[name] and args.data.partition(":")[0] not in data:
            raise UserError(f"--{name}={getattr(args, name)} has no effect with --data={args.data}: it is for --data={' or '.join(data)}")
    if args.rows == "packed" and is_synthetic(args.data):
        raise UserError(f"--rows=packed has no effect with --data={args.data}: it packs documents")
    if args.text_column != defaults["text_column"] and (args.data == "stdlib" or is_synthetic(args.data)):
        raise UserError(f"--text_column={args.text_column} has no effect with --data={args.data}: it is for directories of parquet or jsonl files")
    if not 0 < args.target_tokens_per_param < math.inf:
        raise UserError(f"--target_tokens_per_param={args.target_tokens_per_param} must be positive")


# ---------------------------------------------------------------------------------------------------------------------
# The plan: everything that follows from the flags


@dataclasses.dataclass(frozen=True)
class Plan:
    model: GPTConfig
    T: int
    rows_per_step: int
    micro_batch: int
    accumulation: int
    num_iterations: int
    lr_scale: float

    @property
    def tokens_per_step(self) -> int:
        return self.rows_per_step * self.T


def make_plan(args, vocab_size: int, world_size: int) -> Plan:
    width = math.ceil(args.depth * args.aspect_ratio / args.head_dim) * args.head_dim
    heads = width // args.head_dim
    config = GPTConfig(
        args.max_seq_len, vocab_size, args.depth, heads, args.n_kv_head or heads, width, args.window_pattern,
        bool(args.value_embeds), bool(args.smear), bool(args.resid_scalars), bool(args.backout), bool(args.key_shift),
        bool(args.tie_qk), args.rope_fraction)
    T, smallest = args.max_seq_len, args.device_batch_size * args.max_seq_len * world_size
    total = args.total_batch_size or max(smallest, int(2 ** round(19 + math.log2(args.depth / 12))) // smallest * smallest)
    if total % smallest:
        raise UserError(f"--total_batch_size={total} is not a multiple of {world_size} ranks x {args.device_batch_size} rows x {T} tokens = {smallest}")
    with torch.device("meta"):
        weights = sum(m.weight.numel() for m in GPT(config).modules() if isinstance(m, torch.nn.Linear))
    iterations = args.num_iterations or max(1, round(args.target_tokens_per_param * weights / total))
    return Plan(config, T, total // T, args.device_batch_size, total // smallest, iterations, batch_lr_scale(total))


def describe(plan: Plan, model: GPT, world_size: int, mc) -> dict:
    """The plan in numbers. Memory per rank: weights, gradients, sharded optimizer state, activations of one micro-batch."""
    parameters = model.num_parameters() + (sum(p.numel() for p in mc.model.parameters()) if mc else 0)
    flops = lm_flops(model, plan.T) + (mc.flops_per_token(model) * (1 - mc.config.start) if mc else 0)
    c = plan.model
    activations = plan.micro_batch * plan.T * (c.n_layer * 24 * c.n_embd + 4 * c.vocab_size) * 4
    activations += mc.activation_bytes(model, plan.micro_batch) if mc else 0
    return {
        "layers": c.n_layer, "width": c.n_embd, "heads": c.n_head, "vocabulary": c.vocab_size, "parameters": parameters,
        "sequence": plan.T, "rows_per_step": plan.rows_per_step, "tokens_per_step": plan.tokens_per_step, "ranks": world_size,
        "accumulation": plan.accumulation, "iterations": plan.num_iterations, "tokens": plan.tokens_per_step * plan.num_iterations,
        "flops_per_token": round(flops), "flops": flops * plan.tokens_per_step * plan.num_iterations, "lr_scale": round(plan.lr_scale, 4),
        "memory_bytes_per_rank": int(4 * parameters * (2 + 2 / world_size) + activations), "mc": bool(mc),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training


def vanilla_step(model: GPT, batch):
    loss = model.loss(model.hidden(batch.inputs), batch.targets, batch.num_targets)
    return loss, {"train.loss": loss.detach()}


def main() -> None:
    args = parse_flags()
    begin = time.time()
    if args.dry_run:
        ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), torch.device("meta"))  # shapes, no memory
    else:
        ranks = init_distributed(args.device)
    device = ranks.device
    if args.mc_enabled and args.rows == "packed":
        raise UserError("--rows=packed mixes documents in a row, which a working context must not cross; use --rows=long with --mc_enabled=1")
    if args.mc_enabled and args.compile:
        raise UserError("--compile=1 hides the attention that teaches the lens; use --compile=0 with --mc_enabled=1")
    tokenizer = None if args.dry_run and args.vocab_size else Tokenizer.load()
    if tokenizer and args.vocab_size not in (0, tokenizer.vocab_size):
        raise UserError(f"--vocab_size={args.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids; leave the flag out, or train another")
    plan = make_plan(args, tokenizer.vocab_size if tokenizer else args.vocab_size, ranks.world_size)

    # Model, MegaContext, optimizer. The base is built first, from the seed: the same weights with and without mc.
    seed_everything(args.seed)
    with device if args.dry_run else contextlib.nullcontext():
        model = GPT(plan.model)
    model = model.to(device)
    mc = build_controller(args, plan, model) if args.mc_enabled else None
    model.requires_grad_(not args.freeze_base)
    if args.dry_run:
        return print0(json.dumps(describe(plan, model, ranks.world_size, mc), indent=1))
    if args.init_from:
        start_from(args.init_from, plan, model, mc, tokenizer)
    rates = {name: getattr(args, name) * plan.lr_scale for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")}
    groups = [] if args.freeze_base else gpt_param_groups(model.named_parameters(), plan.model.n_embd, weight_decay=args.weight_decay, **rates)
    optimizer = MuonAdamW(groups + (mc.param_groups(plan.lr_scale) if mc else []))
    check_groups({"gpt": model} | ({"mc": mc.model} if mc else {}), optimizer.param_groups)
    if args.compile:
        model.hidden = torch.compile(model.hidden, dynamic=False)

    # Data
    make = dict(T=plan.T, seed=args.seed, tokenizer=tokenizer, rows=args.rows, text_column=args.text_column, needles=args.needles,
                recall_blocks=args.recall_blocks)
    curriculum = {}
    if args.data in ("recall", "hops") or is_tasks(args.data):
        blocks = most_blocks(plan.T) if is_tasks(args.data) else args.recall_blocks
        curriculum = dict(schedule=CurriculumSchedule(blocks, grow=args.recall_grow, seed=args.seed), total_rows=plan.rows_per_step * plan.num_iterations)
    source = make_source(args.data, "train", **make, **curriculum)
    loader = Loader(source, plan.rows_per_step, plan.micro_batch, plan.T, ranks.rank, ranks.world_size, device)
    held_out = make_source(args.data, "val", **make)
    eval_steps = eval_rows(held_out, args.eval_tokens, plan.micro_batch * ranks.world_size) // (plan.micro_batch * ranks.world_size)
    token_bytes = tokenizer.token_bytes() if not is_synthetic(args.data) else None
    print0(source.summary)

    # Resume
    directory = base_dir() / "checkpoints" / (args.model_tag or f"d{args.depth}" + "_mc" * args.mc_enabled)
    step, flops, trained_s = 0, 0.0, 0.0
    if args.resume and complete_steps(directory):
        saved = load_checkpoint(directory, device=device, rank=ranks.rank, world_size=ranks.world_size)
        check_resumable(saved.meta, args, plan, tokenizer, directory)
        model.load_state_dict(saved.model)
        if mc:
            mc.load_state_dict(saved.mc)
        optimizer.load_state_dict(saved.optimizer)
        loader.load_state_dict(saved.loader)
        set_rng_state(saved.rng)
        step, flops, trained_s = saved.step, saved.meta["flops"], saved.meta.get("trained_s", 0.0)
        print0(f"resumed {directory} at step {step} of {plan.num_iterations}")
    elif steps := complete_steps(directory):
        raise UserError(f"{directory} holds checkpoints of another run, up to step {steps[-1]}; use --resume=1, another --model_tag, or remove it")

    facts = describe(plan, model, ranks.world_size, mc)
    print0(f"{facts['parameters']:,} parameters, {plan.num_iterations} steps of {plan.tokens_per_step:,} tokens, {facts['flops']:.3g} FLOPs, {ranks.world_size} rank(s) on {device}")
    recorder = open_recorder(base_dir() / "runs" / directory.name, run=args.run, config=vars(args), total_steps=plan.num_iterations, first_step=step, rank=ranks.rank,
                             labels={"mc.stage": "train", "mc.variant": "mc" if mc else "vanilla"})
    peak = peak_flops(device) * ranks.world_size
    half = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext()
    last = min(args.stop_at or plan.num_iterations, plan.num_iterations)
    unlogged: list[dict[str, torch.Tensor | Reading]] = []  # metrics of the micro-steps since the last log line
    val = None
    clock, logged_step, logged_flops = time.perf_counter(), step, flops  # at the last log line: speed is measured from line to line

    def save() -> None:
        meta = {"model_config": dataclasses.asdict(plan.model), "num_iterations": plan.num_iterations, "tokenizer": tokenizer.fingerprint,
                "flops": flops, "tokens": plan.tokens_per_step * step, "trained_s": trained_s,
                "val": val and val._asdict(), "flags": vars(args), "mc": mc and mc.meta()}
        begin_save = time.perf_counter()
        save_checkpoint(directory, step, model=model.state_dict(), optimizer_shard=optimizer.state_dict(), meta=meta,
                        mc=mc and mc.state_dict(), loader=loader.state_dict(), rank=ranks.rank, world_size=ranks.world_size, keep_last=args.keep_last)
        recorder.record("checkpoint.save_time", time.perf_counter() - begin_save)

    with recorder:
        while step < last:
            waited, losses = 0.0, 0.0
            trace = Trace("train.step", device, keep=bool(args.trace_every) and step % args.trace_every == 0, step=step)
            for _ in range(plan.accumulation):
                asked = time.perf_counter()
                with trace.span("train.data"):
                    batch = loader.next()
                waited += time.perf_counter() - asked
                with autocast, trace.span("train.forward"):
                    loss, metrics = mc.training_step(model, batch, step, trace)[:2] if mc else vanilla_step(model, batch)
                with trace.span("train.backward"):
                    (loss / plan.accumulation).backward()
                if mc:
                    metrics |= mc.after_backward(plan.accumulation, trace)
                losses = losses + loss.detach() + metrics.get("mc.loss.lens", 0.0)
                unlogged.append(metrics)
                flops += step_flops(model, mc, plan, step, batch.num_targets) / plan.accumulation
            evaluating, saving = (step + 1 == last or (every and (step + 1) % every == 0) for every in (args.eval_every, args.save_every))
            logging = (step + 1) % args.log_every == 0 or evaluating or saving  # a saved step's loss was looked at
            probing = bool(mc and mc.active(step) and (evaluating or (args.probe_every and (step + 1) % args.probe_every == 0)))
            logging = logging or probing
            if logging:
                recorder.step = step + 1
                check_finite(losses, step, recorder)  # fetched from the device, so the clock is read when its work is done
                elapsed = time.perf_counter() - clock
                trained_s += elapsed
                step_time, flops_per_second = elapsed / (step + 1 - logged_step), (flops - logged_flops) / elapsed
                clock, logged_step, logged_flops = clock + elapsed, step + 1, flops
                for metrics in mean_over_ranks(unlogged, ranks):
                    for name, value in metrics.items():
                        recorder.record(name, value)
                unlogged.clear()
            if (args.grad_clip or logging) and not args.freeze_base:
                recorder.record("train.grad_norm", global_grad_norm(model.parameters(), ranks.world_size, args.grad_clip or None))
            networks = mc.networks() if logging and mc and mc.active(step) else {}
            for name, params in networks.items():
                recorder.record("mc.grad_norm", global_grad_norm(params, ranks.world_size), network=name)
            before = {name: [p.detach().clone() for p in params] for name, params in networks.items()}
            multiplier = lr_multiplier(step, plan.num_iterations, warmup_steps=args.warmup_steps, warmdown_ratio=args.warmdown_ratio, final_lr_frac=args.final_lr_frac)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier
                if group["kind"] == "muon":
                    group["momentum"] = muon_momentum(step, plan.num_iterations)
                    group["weight_decay"] = args.weight_decay * weight_decay_multiplier(step, plan.num_iterations)
            updating = time.perf_counter()
            with trace.span("train.optimizer"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            recorder.trace(trace)

            recorder.record("train.data_wait", waited)
            if device.type == "cpu":  # elsewhere it has only been launched
                recorder.record("train.optimizer_time", time.perf_counter() - updating)
            for name, params in networks.items():
                recorder.record("mc.update", relative_change(params, before[name]), network=name)
            if logging:
                recorder.record("telemetry.overhead", recorder.take_spent() / elapsed)
                recorder.record("train.step_time", step_time)
                recorder.record("train.tokens_per_second", plan.tokens_per_step / step_time)
                recorder.record("train.mfu", flops_per_second / peak)
                recorder.record("train.elapsed", trained_s)
                record_state(recorder, multiplier, flops, plan, step, device)
            paused = time.perf_counter()
            if evaluating:
                with autocast:
                    val = evaluate(model, batches(held_out, plan, ranks), eval_steps, token_bytes)
                recorder.record("val.loss", val.loss)
                if val.bpb is not None:
                    recorder.record("val.bpb", val.bpb)
            if probing:
                begin_probe = time.perf_counter()
                with autocast:
                    found = import_optional("mc", "diagnostics").probe_batch(mc, model, next(batches(held_out, plan, ranks)))
                for name, value in mean_over_ranks([found], ranks)[0].items():
                    recorder.record(name, value)
                recorder.record("mc.time.probe", time.perf_counter() - begin_probe)
            if logging:
                recorder.flush(step)
            if saving:
                save()
            clock += time.perf_counter() - paused  # evaluating and saving is no training
    summary = {"step": step, "val_loss": val and val.loss, "val_bpb": val and val.bpb, "tokens": step * plan.tokens_per_step,
               "flops": flops, "seconds": round(time.time() - begin, 1), "checkpoint": str(directory)}
    print0(f"done: {step} steps, checkpoint in {directory}")
    print0(json.dumps(summary))


def check_finite(losses: torch.Tensor, step: int, recorder: Recorder) -> None:
    """`assert_finite`, and on record: closing the recorder hands the sinks what an alert can see."""
    try:
        assert_finite(losses, step)
    except UserError:
        recorder.record("train.nonfinite", 1)
        raise
    recorder.record("train.nonfinite", 0)


def lm_flops(model: GPT, T: int, num_targets: int | None = None) -> float:
    """FLOPs of the LM pass per token. Through a frozen base it is a forward pass; its backward pass for gate gradients is not counted."""
    return model.flops_per_token(T, num_targets) * (1.0 if model.lm_head.weight.requires_grad else 1 / 3)


def step_flops(model: GPT, mc, plan: Plan, step: int, num_targets: int) -> float:
    """FLOPs of one optimizer step over all ranks, from shapes."""
    per_token = lm_flops(model, plan.T, num_targets) + (mc.flops_per_token(model) if mc and mc.active(step) else 0)
    return per_token * plan.tokens_per_step


MAY_CHANGE = {"data", "device_batch_size", "stop_at", "eval_every", "eval_tokens", "probe_every", "save_every", "keep_last", "log_every", "trace_every", "resume", "model_tag",
              "run", "device", "compile", "vocab_size"}  # flags of a resumed run; the loader compares the data itself, not its path


def check_resumable(meta: dict, args, plan: Plan, tokenizer: Tokenizer, directory: Path) -> None:
    """UserError when a run would go on with other flags than it began with: state that is restored would silently win over them."""
    saved = meta["flags"]
    if meta.get("mc") and args.mc_enabled:  # as this version reads it: settings that came or went since make no difference
        config = import_optional("mc", "config")
        saved = {k: v for k, v in saved.items() if not k.startswith("mc_") or k == "mc_enabled"}
        saved |= {f"mc_{k}": v for k, v in config.to_dict(config.from_dict(meta["mc"]["config"])).items()}
    changed = [f"--{k}={v} (was {saved.get(k, 'not there')})" for k, v in vars(args).items() if k not in MAY_CHANGE and saved.get(k) != v]
    changed += [f"--{k} (was {saved[k]})" for k in saved if k not in vars(args) and k not in MAY_CHANGE]
    if meta["tokenizer"] != tokenizer.fingerprint:
        changed.append(f"tokenizer {tokenizer.fingerprint} (was {meta['tokenizer']})")
    if not changed and (meta["model_config"] != dataclasses.asdict(plan.model) or meta["num_iterations"] != plan.num_iterations):
        changed.append(f"model or horizon (was {meta['model_config']}, {meta['num_iterations']} steps)")
    if changed:
        raise UserError(f"cannot resume {directory} with other settings: {', '.join(changed)}; use its flags, another --model_tag, or --resume=0")


def start_from(directory: str, plan: Plan, model: GPT, mc, tokenizer: Tokenizer | None) -> None:
    """The newest weights of another run of the same shape; MegaContext's where both runs have a tensor of that name and shape."""
    state, meta = load_model_state(directory, device=model.lm_head.weight.device)
    here, there = dataclasses.asdict(plan.model), meta["model_config"]
    different = [f"{name} {there.get(name)} there, {value} here" for name, value in here.items() if name != "sequence_len" and there.get(name) != value]
    if tokenizer and meta["tokenizer"] != tokenizer.fingerprint:
        different.append(f"tokenizer {meta['tokenizer']} there, {tokenizer.fingerprint} here")
    if different:
        raise UserError(f"--init_from={directory} is another model: {'; '.join(different)}")
    model.load_state_dict(state)
    print0(f"starting from {directory}, step {meta['step']}")
    theirs = mc and load_mc_state(directory, meta["step"], model.lm_head.weight.device)
    if theirs:
        own = mc.state_dict()
        taken = {name: tensor for name, tensor in theirs.items() if name in own and own[name].shape == tensor.shape}
        mc.load_state_dict(own | taken)
        print0(f"{len(taken)} of {len(own)} tensors of MegaContext as well" + "".join(f", not {name}" for name in own if name not in taken))


def build_controller(args, plan: Plan, model: GPT):
    settings = import_optional("mc", "config").from_flags(args)
    return import_optional("mc", "runtime").MCController(settings, model, T=plan.T, micro_batch=plan.micro_batch, num_iterations=plan.num_iterations, seed=args.seed)


def mean_over_ranks(metrics: list[dict[str, torch.Tensor | Reading]], ranks: Ranks) -> list[dict[str, torch.Tensor | Reading]]:
    """Each value's mean over ranks, which record the same names in the same order: a curve must not be one rank's."""
    if ranks.world_size == 1:
        return metrics
    values = torch.stack([torch.as_tensor(float(v) if isinstance(v, Reading) else v.detach().reshape(())).to(ranks.device, torch.float32) for m in metrics for v in m.values()])
    dist.all_reduce(values)
    means = iter(values / ranks.world_size)
    return [{name: next(means) for name in m} for m in metrics]


def batches(source: Source, plan: Plan, ranks: Ranks):
    """Held-out batches, from the first row on."""
    per_step = plan.micro_batch * ranks.world_size
    loader = Loader(source, per_step, plan.micro_batch, plan.T, ranks.rank, ranks.world_size, ranks.device)
    while True:
        yield loader.next()


def record_state(recorder: Recorder, multiplier: float, flops: float, plan: Plan, step: int, device: torch.device) -> None:
    recorder.record("train.tokens", step * plan.tokens_per_step)
    recorder.record("train.flops", flops)
    recorder.record("train.memory", torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    recorder.record("optim.lr", multiplier)
    recorder.record("optim.momentum", muon_momentum(step - 1, plan.num_iterations))


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}  # dense bf16, data sheets


def peak_flops(device: torch.device) -> float:
    """FLOP/s that MFU is a share of: the data sheet's dense bf16 figure, or on other devices what a matrix product reaches now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAK_FLOPS.items():
            if known in name:
                return peak
    a, best = torch.full((512, 512), 0.5, device=device), math.inf  # no draw: the generators' state is part of a checkpoint
    until = time.perf_counter() + 0.5
    while (begin := time.perf_counter()) < until:
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * 512**3 / best


if __name__ == "__main__":
    run_main(main)
