"""What follows from the flags of a training run: the flags themselves, what is refused, and the plan in numbers.

One dial, `--depth`, sets width, heads, batch size, learning rates and horizon; any other flag overrides. FLOPs and
bytes are counted from shapes.
"""

import dataclasses
import math

import torch

from nanochat.common import FlagParser, UserError
from nanochat.controller import NullController
from nanochat.dataloader import is_synthetic
from nanochat.dataset import EMBEDDED
from nanochat.gpt import GPT, GPTConfig
from nanochat.outputs import check_tag
from nanochat.schedule import batch_lr_scale


def add_flags(parser: FlagParser) -> None:
    """All flags of a training run but those of an optional package."""
    add, switch = parser.add_argument, parser.add_switch
    # model
    add("--depth", type=int, default=6, help="layers; the dial that sets all that is not given")
    add("--vocab_size", type=int, default=0,
        help="ids the tokenizer must have; 0: as many as it has. Given, a dry run needs no tokenizer")
    add("--aspect_ratio", type=int, default=64, help="width per layer")
    add("--head_dim", type=int, default=64, help="width of a head; the model's width is rounded up to a multiple")
    add("--n_kv_head", type=int, default=0, help="heads of keys and values; 0: as many as heads")
    add("--max_seq_len", type=int, default=1024, help="T: tokens per row")
    add("--window_pattern", default="L",
        help="attention windows tiled over layers: L full, S a quarter; the last layer is L")
    switch("--value_embeds", True, "1: value embeddings on every other layer")
    switch("--smear", True, "1: each embedding takes a learned share of the one before it")
    switch("--resid_scalars", True, "1: learned scalars on the residual stream and the embedding's re-entry")
    switch("--backout", True, "1: a share of the middle layer is taken out again at the end")
    switch("--key_shift", False, "1: keys mix with the token before them (recall forms much sooner)")
    switch("--tie_qk", False, "1: key projections start equal to query projections")
    add("--rope_fraction", type=float, default=1.0, help="share of each head's dims that is rotated")
    # data
    add("--data", default="stdlib", help="stdlib or docstrings (embedded code and prose), recall, hops, needle, facts, "
                                         "random, tasks or tasks:NAME,NAME=SHARE,… (generated tasks), or a directory "
                                         "of parquet, jsonl or text files")
    add("--needles", type=int, default=4, help="blocks of facts hidden in the text of each row of --data=needle, "
                                               "notes of --data=facts")
    add("--rows", default="long", choices=("long", "packed"),
        help="rows within one long document, or packed from several")
    add("--text_column", default="text", help="column of parquet and jsonl files that holds the text")
    add("--recall_blocks", type=int, default=32, help="most blocks of facts that a row of --data=recall or hops stores")
    add("--recall_grow", type=float, default=0.5,
        help="share of a run on recall, hops or tasks over which rows grow to their full number of blocks")
    # horizon
    add("--total_batch_size", type=int, default=0, help="tokens per optimizer step over all ranks; 0: by depth")
    add("--device_batch_size", type=int, default=8, help="rows per micro-batch of a rank")
    add("--num_iterations", type=int, default=0, help="optimizer steps; 0: by --target_tokens_per_param")
    add("--target_tokens_per_param", type=float, default=10.0, help="tokens per weight of the matrix products")
    add("--stop_at", type=int, default=0,
        help="stop after this step, with a checkpoint; schedules still run to the end; 0: never")
    # start
    add("--init_from", default="", help="checkpoint directory of a run of the same shape and tokenizer, whose newest "
                                        "weights this one starts from")
    switch("--freeze_base", False, "1: with --mc_enabled=1, the base keeps its weights and only MegaContext learns")
    # optimization
    add("--matrix_lr", type=float, default=0.02, help="Muon's learning rate, for matrices")
    add("--embedding_lr", type=float, default=0.3, help="learning rate of the embeddings, for width 768")
    add("--unembedding_lr", type=float, default=0.004, help="learning rate of the head, for width 768")
    add("--scalar_lr", type=float, default=0.1, help="learning rate of scalars and gates")
    add("--weight_decay", type=float, default=0.0, help="of matrices, falling to 0 over the run")
    add("--warmup_steps", type=int, default=20, help="steps over which learning rates rise")
    add("--warmdown_ratio", type=float, default=0.5, help="share of the run over which they fall")
    add("--final_lr_frac", type=float, default=0.05, help="share of the learning rate that is left at the end")
    add("--grad_clip", type=float, default=0.0,
        help="largest norm of the base model's gradients together; 0: no clipping")
    # run
    add("--eval_every", type=int, default=100, help="steps between evaluations; 0: at the end only")
    add("--eval_tokens", type=int, default=32768, help="held-out tokens per evaluation")
    add("--probe_every", type=int, default=0,
        help="with --mc_enabled=1: steps between probes of lens and focus on held-out rows, on top of one at every "
             "evaluation; 0: no more than those")
    add("--save_every", type=int, default=0, help="steps between checkpoints; 0: at the end only")
    add("--keep_last", type=int, default=3, help="complete checkpoints that are kept")
    add("--log_every", type=int, default=10, help="steps between log lines")
    add("--trace_every", type=int, default=100,
        help="steps between traces (the time line of a step's parts), sent where OTLP is set up; 0: none")
    switch("--resume", False, "1: go on from the newest intact checkpoint of --model_tag, if there is one")
    add("--model_tag", default="", help="name of the checkpoint and log directories; default d<depth>, with _mc for "
                                        "MegaContext")
    add("--run", default="dummy",
        help="name of a Weights & Biases run (WANDB_MODE=offline needs no network); dummy: none")
    add("--seed", type=int, default=42, help="of everything random")
    parser.add_device("where to train")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="of matrix products; auto: bfloat16 on CUDA")
    switch("--compile", False, "1: torch.compile the layers")
    switch("--dry_run", False, "1: print the plan (model, tokens, FLOPs, memory) and stop")


MOST = 1 << 24  # of a size: sizes multiply, and the product must stay a number of bytes


def check_flags(args, defaults: dict) -> None:
    """UserError for a number that no run can use, or a flag of data that is not trained on."""
    least = dict.fromkeys(("depth", "aspect_ratio", "head_dim", "max_seq_len", "device_batch_size", "log_every",
                           "keep_last", "eval_tokens"), 1)
    least |= dict.fromkeys(("vocab_size", "n_kv_head", "total_batch_size", "num_iterations", "stop_at", "warmup_steps",
                            "eval_every", "probe_every", "save_every", "trace_every", "matrix_lr",
                            "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay", "grad_clip", "seed"), 0)
    least["recall_blocks"] = 2
    for name, low in least.items():
        if not low <= getattr(args, name) < math.inf:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {low}")
    for name in ("depth", "aspect_ratio", "head_dim", "max_seq_len", "device_batch_size"):
        if getattr(args, name) > MOST:
            raise UserError(f"--{name}={getattr(args, name)} must be at most {MOST}")
    if not args.data.strip():
        raise UserError(f"--data={args.data!r} names nothing; see --help for what can be trained on")
    for name in ("recall_grow", "warmdown_ratio", "final_lr_frac"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name}={getattr(args, name)} must be in [0, 1]")
    if args.probe_every and not args.mc_enabled:
        raise UserError(
            f"--probe_every={args.probe_every} has no effect with --mc_enabled=0: there is no lens to probe")
    if args.freeze_base and not (args.mc_enabled and args.init_from and args.mc_start == 0):
        raise UserError("--freeze_base=1 trains MegaContext alone, on a base that has learned: it needs "
                        "--mc_enabled=1, --init_from=DIR and --mc_start=0")
    for name in ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr", "weight_decay", "grad_clip"):
        if args.freeze_base and getattr(args, name) != defaults[name]:
            raise UserError(f"--{name}={getattr(args, name)} has no effect with --freeze_base=1: it is for training "
                            "the base")
    for name, data in (("recall_blocks", ("recall", "hops")), ("recall_grow", ("recall", "hops", "tasks")),
                       ("needles", ("needle", "facts"))):
        if getattr(args, name) != defaults[name] and args.data.partition(":")[0] not in data:
            raise UserError(f"--{name}={getattr(args, name)} has no effect with --data={args.data}: it is for "
                            f"--data={' or '.join(data)}")
    if args.rows == "packed" and is_synthetic(args.data):
        raise UserError(f"--rows=packed has no effect with --data={args.data}: it packs documents")
    if args.text_column != defaults["text_column"] and (args.data in EMBEDDED or is_synthetic(args.data)):
        raise UserError(f"--text_column={args.text_column} has no effect with --data={args.data}: it is for "
                        "directories of parquet or jsonl files")
    check_tag(run_tag(args))
    if not 0 < args.target_tokens_per_param < math.inf:
        raise UserError(f"--target_tokens_per_param={args.target_tokens_per_param} must be positive")


def run_tag(args) -> str:
    """Where the run is, below checkpoints/ and runs/."""
    return args.model_tag or f"d{args.depth}" + "_mc" * args.mc_enabled


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
    """UserError where the batch cannot be spread evenly."""
    width = math.ceil(args.depth * args.aspect_ratio / args.head_dim) * args.head_dim
    heads = width // args.head_dim
    config = GPTConfig(
        args.max_seq_len, vocab_size, args.depth, heads, args.n_kv_head or heads, width, args.window_pattern,
        args.value_embeds, args.smear, args.resid_scalars, args.backout, args.key_shift, args.tie_qk,
        args.rope_fraction)
    T, smallest = args.max_seq_len, args.device_batch_size * args.max_seq_len * world_size
    total = args.total_batch_size or max(smallest,
                                         int(2 ** round(19 + math.log2(args.depth / 12))) // smallest * smallest)
    if total % smallest:
        raise UserError(f"--total_batch_size={total} is not a multiple of {world_size} ranks x "
                        f"{args.device_batch_size} rows x {T} tokens = {smallest}")
    with torch.device("meta"):
        weights = sum(m.weight.numel() for m in GPT(config).modules() if isinstance(m, torch.nn.Linear))
    iterations = args.num_iterations or max(1, round(args.target_tokens_per_param * weights / total))
    return Plan(config, T, total // T, args.device_batch_size, total // smallest, iterations, batch_lr_scale(total))


def describe(plan: Plan, model: GPT, controller: NullController, world_size: int) -> dict:
    """The plan in numbers. Memory per rank: weights, gradients, sharded optimizer state,
    activations of one micro-batch."""
    parameters = model.num_parameters() + sum(p.numel() for module in controller.modules.values()
                                              for p in module.parameters())
    flops = lm_flops(model, plan.T) + controller.flops_per_token(model) * controller.share_active()
    c = plan.model
    activations = plan.micro_batch * plan.T * (c.n_layer * 24 * c.n_embd + 4 * c.vocab_size) * 4
    activations += controller.activation_bytes(model, plan.micro_batch)
    return {
        "layers": c.n_layer, "width": c.n_embd, "heads": c.n_head, "vocabulary": c.vocab_size, "parameters": parameters,
        "sequence": plan.T, "rows_per_step": plan.rows_per_step, "tokens_per_step": plan.tokens_per_step,
        "ranks": world_size, "accumulation": plan.accumulation, "iterations": plan.num_iterations,
        "tokens": plan.tokens_per_step * plan.num_iterations, "flops_per_token": round(flops),
        "flops": flops * plan.tokens_per_step * plan.num_iterations, "lr_scale": round(plan.lr_scale, 4),
        "memory_bytes_per_rank": int(4 * parameters * (2 + 2 / world_size) + activations),
        "mc": bool(controller.modules),
    }  # fmt: skip


def lm_flops(model: GPT, T: int, num_targets: int | None = None) -> float:
    """FLOPs of the LM pass per token. Through a frozen base it is a forward pass; a backward pass that
    an arm needs is not counted."""
    return model.flops_per_token(T, num_targets) * (1.0 if model.lm_head.weight.requires_grad else 1 / 3)


def step_flops(model: GPT, controller: NullController, plan: Plan, step: int, num_targets: int) -> float:
    """FLOPs of one optimizer step over all ranks, from shapes."""
    more = controller.flops_per_token(model) if controller.active(step) else 0
    return (lm_flops(model, plan.T, num_targets) + more) * plan.tokens_per_step
