"""How well gists replace a whole history: networks of several kinds and ratios, trained side by side and judged alike.

Every arm has a GistNet of its own and, unless `frozen=1`, a copy of the base that learns to read it. All arms see the
same rows in the same order, and the base as it was gives them one full pass to learn from, so arms differ in what they
name and nothing else. A working context is the whole history as gists of the highest level, a few recent tokens and the
continuation; no budget, no lens.

An arm is settings, comma-separated: any --mc_ flag without its prefix, `frozen` (1: the base stands still), and
`window`: instead of gists the last so many raw tokens, read by a copy of the base that is trained like the others. E.g.
`gist=slots,block_size=8`, `gist=slots,block_size=16,gists_per_block=2,kl_weight=0,frozen=1`, `window=156`.

    ΔNLL    NLL(gists, the arm's base) − NLL(full history, the base as it was) on the next --horizon
            held-out tokens, mean over rows;
            beside it the windows of the base as it was: the recent tokens alone, and as many
            raw tokens as an arm has entries

What gists carry is the lead over the arm `window=RECENT`; what they are worth, the lead over
the `window` of as many entries.

Shapes: B rows, T tokens, P positions read.
"""

import argparse
import copy
import math
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mc.arm import SETTINGS
from mc.arms.contrast import contrast_loss
from mc.config import MCConfig, core_settings, from_dict
from mc.focus_allocator import FocusConfig, entries_needed
from mc.losses import distillation, row_mean
from mc.mega_context import Tree, tiling
from mc.model import MegaContext, Rows, read_rows, run_entries, take, with_continuation
from nanochat.common import FlagParser, UserError
from nanochat.dataloader import Loader, source_of
from nanochat.dataset import Progress
from nanochat.gpt import GPT, token_losses
from nanochat.loading import load_model
from nanochat.tokenizer import Tokenizer
from scripts.bench.base import print_json
from scripts.eval.comparison import FocusComparison, plain_outcomes
from scripts.eval.measures import held_out
from scripts.eval.statistics import bootstrap_interval

BASE_LR = 5e-4  # AdamW, for the arm's copy of the base: enough to learn to read gists in a hundred steps
WARMUP = 10


class Student(NamedTuple):
    name: str
    window: int  # raw tokens that are shown instead of gists; 0: gists
    gpt: GPT
    mc: MegaContext
    optimizer: torch.optim.Optimizer


def parse(text: str, recent: int, horizon: int, n: int) -> tuple[MCConfig, bool, int]:
    """Settings, whether the base is frozen, and the window. UserError for what is no setting, or has no effect here."""
    kinds = {f.name: type(f.default) for f in core_settings()} | {name: type(value)
                                                                  for name, (_, value) in SETTINGS.items()} | {"frozen": int, "window": int}  # noqa: E501
    values: dict = {"max_lod": 1, "wc_weight": 1.0, "kl_weight": 1.0}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            values[name] = kinds[name](value)
        except (KeyError, ValueError):
            raise UserError(f"--arms {text}: {part!r} is no setting=value of MegaContext") from None
    frozen, window = bool(values.pop("frozen", 0)), values.pop("window", 0)
    if window:
        if window < recent or window > n or frozen or set(values) - {"max_lod", "wc_weight", "kl_weight"}:
            raise UserError(f"--arms {text}: a window is of {recent} (--recent) to {n} tokens, is read by a base that "
                            "learns, and has no gists to set")
        values["block_size"] = math.gcd(recent, n)
    c = from_dict(values | dict(recent=recent, horizon=horizon))
    if n % c.block_size or c.of("horizon_gist_weight") or "bands" in c.named_arms() or c.far_tokens:
        raise UserError(f"--arms {text}: blocks must divide {n} tokens; the horizon loss, bands and far histories are "
                        "for base_train")
    # `judge` asks for that
    one_raw = sum(entries_needed(n, FocusConfig(n, c.block_size, c.max_lod, recent=recent, n_gists=c.gists_per_block)))
    entries = recent + c.block_size * c.max_lod * c.gists_per_block + tiling(n, c.block_size, c.max_lod,
                                                                             c.gists_per_block)
    return replace(c, budget=max(entries, one_raw)), frozen, window


def gist_arm(text: str, base: GPT, seed: int, recent: int, horizon: int, n: int) -> Student:
    config, frozen, window = parse(text, recent, horizon, n)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mc = MegaContext(config, base.config.n_embd).to(base.lm_head.weight.device)
    gpt = base if frozen else copy.deepcopy(base).requires_grad_()
    # as base_train has it for small batches
    groups = [dict(params=[*mc.gistnet.parameters(), mc.gist_bias], lr=config.gist_lr / 2)]
    if not frozen:
        body = [p for name, p in gpt.named_parameters()
                if not name.startswith(("transformer.wte", "lm_head", "value_embeds"))]
        groups.append(dict(params=body, lr=BASE_LR))
    return Student(text, window, gpt, mc, torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0))


def read_gists(arm: Student, tokens_BT: Tensor, middle_BTD: Tensor, n: int) -> tuple[Tensor, Rows, Tree]:
    """Hidden states [B, M, D] of a working context of gists, the recent tokens and the continuation, where the
    raw ones are, and the gists."""
    c, (B, T) = arm.mc.config, tokens_BT.shape
    n_B = torch.full((B,), n, device=tokens_BT.device)
    tree = arm.mc.build_tree(arm.gpt.embed(tokens_BT), middle_BTD)
    nothing_BN = torch.full((B, n // c.block_size), -torch.inf, device=tokens_BT.device)
    cut, _ = arm.mc.allocator.cut(arm.mc.allocator.allocate(nothing_BN, n_B))
    entries = with_continuation(cut, n_B, T - n - 1)
    hidden = run_entries(arm.gpt, arm.mc, tree, tokens_BT, entries)
    return hidden, read_rows(entries, c.block_size, c.protected + T - n - 1, c.protected, c.gists_per_block), tree


def read_window(arm: Student, tokens_BT: Tensor, n: int) -> tuple[Tensor, Rows, None]:
    """As `read_gists`, of the last raw tokens: there are no gists."""
    (B, T), begin = tokens_BT.shape, n - arm.window
    hidden = arm.gpt.hidden(tokens_BT[:, begin:T - 1], positions=torch.arange(begin, T - 1, device=tokens_BT.device))
    token_BP = torch.arange(n - arm.mc.config.protected, T - 1, device=tokens_BT.device).expand(B, -1)
    return hidden, Rows(token_BP - begin, token_BP, torch.ones_like(token_BP, dtype=torch.bool)), None


def loss_of(arm: Student, tokens_BT: Tensor, targets_BT: Tensor, teacher_BPV: Tensor, middle_BTD: Tensor,
            n: int) -> Tensor:
    """[] the arm's loss on the recent tokens and the continuation of rows with n tokens of history."""
    c = arm.mc.config
    hidden, read, tree = read_window(arm, tokens_BT, n) if arm.window else read_gists(arm, tokens_BT, middle_BTD, n)
    wanted = targets_BT.gather(1, read.token_BP)
    counted = read.valid_BP & (wanted >= 0)
    logits = arm.gpt.logits(take(hidden, read.slot_BP))
    loss = c.wc_weight * row_mean(token_losses(logits, wanted.masked_fill(~counted, -1)), counted).mean()
    if c.kl_weight:
        loss = loss + c.kl_weight * row_mean(distillation(logits, teacher_BPV), counted).mean()
    return loss + c.of("contrast_weight") * contrast_loss(tree) if c.of("contrast_weight") else loss


def train_arms(arms: list[Student], base: GPT, source, steps: int, rows: int, T: int, n: int, recent: int) -> None:
    loader, progress = Loader(source, rows, rows, T, 0, 1, base.lm_head.weight.device), Progress("steps", steps,
                                                                                                 "steps", every_s=30)
    for step in range(steps):
        batch = loader.next()
        tokens, targets = batch.inputs, batch.targets
        middle: list[Tensor] = []
        with torch.autocast(tokens.device.type, torch.bfloat16):
            with torch.no_grad():
                teacher = base.logits(base.hidden(tokens, middle=middle)[:, n - recent:-1])
            for arm in arms:
                for group in arm.optimizer.param_groups:
                    group.setdefault("initial_lr", group["lr"])
                    group["lr"] = group["initial_lr"] * min(1, (step + 1) / WARMUP, 2 * (steps - step) / steps)
                loss_of(arm, tokens, targets, teacher, middle[0], n).backward()
                torch.nn.utils.clip_grad_norm_([p for group in arm.optimizer.param_groups for p in group["params"]],
                                               1.0)
                arm.optimizer.step()
                arm.optimizer.zero_grad(set_to_none=True)
        progress.update(step + 1)


@torch.no_grad()
def judge_arms(arms: list[Student], base: GPT, meta: dict, contexts: int, T: int, n: int, recent: int,
               seed: int) -> dict[str, np.ndarray]:
    """NLL of every row by arm; of "full"; of "window W", the last W tokens, for the recent ones and for as
    many as an arm has entries."""
    found: dict[str, list[Tensor]] = {}
    for rows, tokens, targets in held_out(meta, T, contexts, 16):
        with torch.autocast(tokens.device.type, torch.bfloat16):
            nll, sizes = {}, {recent}
            for arm in arms:
                if arm.window:
                    nll[arm.name] = plain_outcomes(arm.gpt, tokens, targets, n, arm.window)["window"].nll_B
                    sizes.add(arm.window)
                    continue
                outcome = FocusComparison(arm.gpt, arm.mc, tokens, targets, n, seed, rows).at_lod(arm.mc.config.max_lod)
                nll[arm.name] = outcome.nll_B
                sizes.add(int(outcome.entries_B[0]))
            for size in sorted(sizes):
                plain = plain_outcomes(base, tokens, targets, n, size)
                nll |= {"full": plain["full"].nll_B, f"window {size}": plain["window"].nll_B}
        for name, value in nll.items():
            found.setdefault(name, []).append(value)
    return {name: torch.cat(values).double().numpy() for name, values in found.items()}


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint("of a base model, with or without MegaContext")
    parser.add_argument("--arms", nargs="+", required=True,
                        help="settings of each arm, comma-separated, e.g. gist=slots,block_size=8")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of every arm")
    parser.add_argument("--rows", type=int, default=4, help="rows per step")
    parser.add_argument("--horizon", type=int, default=64, help="H: tokens of the continuation")
    parser.add_argument("--recent", type=int, default=32, help="last tokens of the history that are shown raw")
    parser.add_argument("--contexts", type=int, default=96, help="held-out rows that are judged")
    parser.add_seed("the networks and of the order of the rows", default=42)


def run(args: argparse.Namespace) -> None:
    base, meta = load_model(args.checkpoint_dir)
    base.requires_grad_(False)
    T = base.config.sequence_len
    n = (T - args.horizon) // 32 * 32
    if min(args.steps, args.rows, args.contexts, args.horizon) < 1 or not 0 < args.recent < n:
        raise UserError(f"--steps, --rows, --contexts and --horizon must be at least 1, "
                        f"and --recent={args.recent} below the history of {n} tokens")
    T = n + args.horizon
    arms = [gist_arm(text, base, args.seed, args.recent, args.horizon, n) for text in args.arms]
    source = source_of(meta, "train", tokenizer=Tokenizer.load(), T=T, seed=args.seed)
    begin = time.perf_counter()
    train_arms(arms, base, source, args.steps, args.rows, T, n, args.recent)
    nll = judge_arms(arms, base, meta, args.contexts, T, n, args.recent, args.seed)
    out = {}
    for name, value in nll.items():
        delta = value - nll["full"]
        interval = [round(x, 4) for x in bootstrap_interval(lambda i: delta[i].mean(), len(delta))]
        out[name] = {"nll": round(value.mean(), 4), "delta": round(delta.mean(), 4), "interval": interval}
        print(f"  {name:60s} NLL {value.mean():.3f}  Δ {delta.mean():+.3f} {interval}")
    settings = {name: getattr(args, name) for name in ("checkpoint_dir", "steps", "rows", "horizon", "recent",
                                                       "contexts", "seed")}
    print_json({**settings, "history": n, "seconds": round(time.perf_counter() - begin), "arms": out})
