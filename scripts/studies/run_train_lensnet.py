"""Train the lens of a checkpoint alone, from measured utilities: base and gists stay as they are, and
no token goes through the base.

    python -m scripts.mc_study train_lensnet --checkpoint_dir=DIR --labels=DIR --out_tag=NAME

Writes $NANOCHAT_BASE_DIR/checkpoints/NAME, a checkpoint like any other. With --steps=0 it has a new
lens that has learned nothing.

The loss is the order of the measured utilities and, with --terms, what the arms of those names add to a lens's loss
in training: rank (the most useful measured block leads the others), zero_sum and illegal (what a budget asks of scores:
they balance, and nothing is spent on blocks that are raw anyway). Curriculum: at first only blocks near the end of
history compete, later all of them, in every part.

Reported, of held-out contexts: how well the measured edits are ordered; and of held-out rows, beside random, recency
and oracle: ΔNLL of what the lens chooses, its regret, and the swap rate of a history that grows.
"""

import copy
import json
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mc.arms.counterfactual import MeasuredEdits, edit_loss
from mc.arms.illegal import illegal_term
from mc.arms.rank import rank_term
from mc.arms.utility_labels import LabelFolder, Labels, label_fingerprint
from mc.arms.zero_sum import zero_sum_term
from mc.lens_loss import cursor_logits, visible_blocks
from mc.mega_context import Tree, TreeShape
from mc.model import MegaContext
from mc.store.networks import load_networks
from nanochat.checkpoint import complete_steps, load_model_state, save_checkpoint
from nanochat.common import FlagParser, UserError, base_dir, init_distributed, print0, seed_everything
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, assert_finite
from nanochat.outputs import BASE_DIR, check_tag, holding, output_folder
from nanochat.schedule import lr_multiplier, muon_momentum
from scripts.eval.measures import held_out, lenses_in_use
from scripts.eval.statistics import bootstrap_interval
from scripts.eval.subcommands import check_least
from scripts.eval.tables import cell, table

HELD_OUT = 8  # one context in so many is kept for the report
WARMUP = 10  # steps
TERMS = ("rank", "zero_sum", "illegal")


def near(step: int, steps: int, first: int, last: int, grow: float) -> int:
    """How many blocks from the end of history compete at a step: from `first` up to `last`, a straight
    line over a share of the steps."""
    share = min(step / (grow * steps), 1.0) if grow else 1.0
    return round(first + share * (last - first))


def edits_of(labels: Labels, pick: Tensor, reach: int | None, block_size: int) -> tuple[Tensor, MeasuredEdits]:
    """(tokens, edits) of chosen contexts, one row per end of history; with `reach`, of its last so many blocks."""
    Q = labels.n_CQ.shape[1]
    n, block, utility, valid = (x[pick].flatten(0, 1) for x in (labels.n_CQ, labels.block_CQE, labels.utility_CQE,
                                                                labels.valid_CQE))
    if reach is not None:
        valid = valid & (n[:, None] // block_size - block <= reach)
    return labels.tokens_CT[pick].repeat_interleave(Q, 0), MeasuredEdits(n, block, utility, valid)


def term_weights(text: str) -> dict[str, float]:
    """`rank:0.5,zero_sum:0.01` by name. UserError for anything else."""
    found: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, weight = part.partition(":")
        try:
            found[name.strip()] = float(weight)
        except ValueError:
            found[name.strip()] = -1.0
    if wrong := [name for name, weight in found.items() if name not in TERMS or not 0 <= weight < float("inf")]:
        raise UserError(f"--terms={text}: {', '.join(wrong)} is no NAME:WEIGHT with a weight of at least 0 and a name "
                        f"of {', '.join(TERMS)}")
    return found


def label_terms(mc: MegaContext, tree: Tree, edits: MeasuredEdits, reach: int) -> dict[str, Tensor]:
    """Each [B], at the ends of history: rank between measured blocks where one of them helps, zero_sum and illegal over
    all blocks. Only the last `reach` blocks of a history compete."""
    c, (n_B, block_BE, utility_BE, valid_BE) = mc.config, edits
    logits_BN = cursor_logits(mc, tree, n_B)[-1]
    N = logits_BN.shape[1]
    place_BE = torch.where(valid_BE, block_BE, N)  # edits that are none go behind the last
    utility_BN = F.pad(torch.zeros_like(logits_BN), (0, 1)).scatter(1, place_BE, utility_BE.to(logits_BN.dtype))[:, :N]
    measured_BN = F.pad(torch.zeros_like(logits_BN, dtype=torch.bool), (0, 1)).scatter(1, place_BE, True)[:, :N]
    near_BN = n_B[:, None] // c.block_size - torch.arange(N, device=n_B.device) <= reach
    visible_BN = visible_blocks(n_B, N, c.block_size, c.protected)
    protected_BN = visible_blocks(n_B, N, c.block_size, 0) & ~visible_BN
    logits, utility, measured, visible, protected = (x[:, None] for x in (
        logits_BN, utility_BN, measured_BN & near_BN, visible_BN & near_BN, protected_BN))
    useful_B1 = (utility * measured).amax(-1) > 0
    return {"rank": (rank_term(logits, utility, measured) * useful_B1)[:, 0],
            "zero_sum": zero_sum_term(logits, visible)[:, 0],
            "illegal": illegal_term(logits, visible, protected)[:, 0]}


@torch.no_grad()
def lens_tree(gpt: GPT, mc: MegaContext, tokens_BT: Tensor) -> Tree:
    """What the lens reads: token embeddings, and the gists where it has a reader for them."""
    embeds = gpt.embed(tokens_BT)
    return mc.build_tree(embeds) if mc.lensnet.reader is not None else Tree(embeds,
                                                                            TreeShape(embeds.shape[1],
                                                                                      mc.config.block_size, 0))


@torch.no_grad()
def judge_labels(gpt: GPT, mc: MegaContext, labels: Labels, batch: int) -> dict[str, float]:
    """hit_at_1: share of ends of history whose most useful edit the lens puts first. order: of any two, the share put
    in order, weighted by their difference; 0.5 is chance. Ends of history where nothing
    helps are left out of the first."""
    hits, there, right, stake = (0.0, 0, 0.0, 0.0)
    for first in range(0, len(labels.row_C), batch):
        tokens, (n, block, utility, valid) = edits_of(labels,
                                                      torch.arange(first, min(first + batch, len(labels.row_C)),
                                                                   device=labels.row_C.device), None, 1)
        tree = lens_tree(gpt, mc, tokens)
        logits = mc.lens_logits(tree.levels[0], n, tree=tree).gather(1, block).masked_fill(~valid, -torch.inf)
        useful = utility.masked_fill(~valid, -torch.inf)
        asked = useful.amax(1) > 0
        hits, there = hits + float(((logits.argmax(1) == useful.argmax(1)) & asked).sum()), there + int(asked.sum())
        gain = (utility[:, :, None] - utility[:, None]).clamp_min(0) * (valid[:, :, None] & valid[:, None])
        right, stake = right + float((gain * (logits[:, :, None] > logits[:, None])).sum()), stake + float(gain.sum())
    return {"hit_at_1": hits / max(there, 1), "order": right / max(stake, 1e-12)}


def judge_in_use(gpt: GPT, lenses: dict[str, MegaContext], meta: dict, contexts: int, rows: dict) -> dict:
    """What is shown -> delta_nll, regret [nats], accuracy and, of lenses, swap_rate and delta_nll_edited, each [mean,
    low, high] over held-out rows; as a table on stdout, too. rows: data, and the first row that may be judged."""
    found = {name: np.array(x) for name, x in lenses_in_use(gpt, lenses, meta, contexts, **rows).items()}
    report: dict[str, dict[str, list[float]]] = {}
    for name in ("window", "random", "recency", *lenses, "oracle"):
        nll = found[f"nll_{name}"]
        values = {"delta_nll": nll - found["nll_full"], "regret": nll - found["nll_oracle"],
                  "accuracy": found[f"acc_{name}"]}
        if name in lenses:
            values |= {"delta_nll_edited": found[f"nll_{name}_edited"] - found["nll_full"],
                       "swap_rate": found[f"swap_{name}"]}
        report[name] = {what: [float(x.mean()), *bootstrap_interval(lambda i: x[i].mean(), len(x))]
                        for what, x in values.items()}
    heads = {"delta_nll": "ΔNLL [nats]", "regret": "regret [nats]", "accuracy": "accuracy",
             "delta_nll_edited": "ΔNLL after edits [nats]", "swap_rate": "swap rate"}
    shown = lambda values: [cell(values[what][0], values[what][1:]) if what in values else "" for what in heads]
    words = {name: f"lens, {name}" if name in lenses else name for name in report}
    print0("\n".join(table(["shown", *heads.values()], ([words[name], *shown(of)] for name, of in report.items()))))
    return report


def train_lens(gpt: GPT, mc: MegaContext, labels: Labels, args) -> None:
    """`args.steps` steps on the lens of mc."""
    weights = term_weights(args.terms)
    groups = [g for g in mc.param_groups(args.lr / mc.config.lens_lr) if g["name"].startswith("lensnet")
              and g["params"]]
    optimizer = MuonAdamW(groups)
    generator = torch.Generator().manual_seed(args.seed)
    blocks, begin = labels.tokens_CT.shape[1] // mc.config.block_size, time.monotonic()
    for step in range(args.steps):
        pick = torch.randint(len(labels.row_C), (args.batch,), generator=generator).to(labels.row_C.device)
        reach = near(step, args.steps, args.near, blocks, args.grow)
        tokens, edits = edits_of(labels, pick, reach, mc.config.block_size)
        tree = lens_tree(gpt, mc, tokens)
        loss = edit_loss(mc, tree, edits, args.normalize).mean()
        if weights:
            terms = label_terms(mc, tree, edits, reach)
            loss = loss + sum(weight * terms[name].mean() for name, weight in weights.items())
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier(step, args.steps,
                                                              warmup_steps=min(WARMUP, args.steps // 2),
                                                              warmdown_ratio=0.5, final_lr_frac=0.05)
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step, args.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            assert_finite(loss.detach(), step)
            print0(f"step {step + 1}/{args.steps}: loss {float(loss.detach()):.5f}, blocks up to {reach} back, ETA "
                   f"{(time.monotonic() - begin) / (step + 1) * (args.steps - step - 1):.0f} s")


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint("of a run with --mc_enabled=1: its base and gists are kept")
    parser.add_argument("--labels", type=Path, default=None,
                        help="folder that scripts.mc_study labels wrote for this base; needed unless --steps=0")
    parser.add_argument("--out_tag", required=True, help="name of the checkpoint directory that is written")
    parser.add_switch("--new_lens", True, "1: from a new lens; 0: from the checkpoint's")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="contexts per step")
    parser.add_argument("--lr", type=float, default=0.03, help="learning rate of the lens (Muon; half for its scalars)")
    parser.add_argument("--near", type=int, default=8, help="blocks back from the end of history that compete at first")
    parser.add_argument("--grow", type=float, default=0.5,
                        help="share of the steps over which that grows to all blocks; 0: all from the start")
    parser.add_switch("--normalize", True,
                      "1: utilities in standard deviations over the edits of an end of history; 0: in nats")
    parser.add_argument("--terms", default="",
                        help="what is added to the order of utilities, NAME:WEIGHT with commas between them, of "
                             f"{', '.join(TERMS)}: rank:0.5,zero_sum:0.01,illegal:0.5; default nothing")
    parser.add_argument("--contexts", type=int, default=32,
                        help="held-out rows on which what the lens chooses is judged; 0: none")
    parser.add_argument("--log_every", type=int, default=50, help="steps between log lines")
    parser.add_seed("the new lens and the order of contexts", default=42)
    parser.add_device("where to train")


def run(args: Namespace) -> None:
    check_least(args, steps=0, batch=1, near=2, log_every=1, seed=0, contexts=0)
    term_weights(args.terms)
    if not 0 <= args.grow <= 1:
        raise UserError(f"--grow={args.grow} must be in [0, 1]")
    if not 0 < args.lr < float("inf"):
        raise UserError(f"--lr={args.lr} must be above 0")
    if (args.labels is None) != (args.steps == 0):
        raise UserError("--labels=DIR is what the lens learns from; without it, --steps=0 writes a checkpoint with a "
                        "new lens")
    if not args.steps and not args.new_lens:
        raise UserError("--steps=0 with --new_lens=0 changes nothing")
    directory = base_dir() / "checkpoints" / check_tag(args.out_tag, "--out_tag")
    if complete_steps(directory):
        raise UserError(f"{directory} holds a checkpoint; use another --out_tag, or remove it")
    output_folder(directory, flag=BASE_DIR)
    with holding(directory):
        make_lens(args, directory)


def make_lens(args, directory: Path) -> None:
    """Learn, and write the checkpoint."""
    device = init_distributed(args.device).device
    found = load_networks(args.checkpoint_dir, device=device)
    gpt, mc = found.gpt.requires_grad_(False), found.mc
    state, meta = load_model_state(args.checkpoint_dir)
    if args.new_lens:
        seed_everything(args.seed)
        new = MegaContext(mc.config, gpt.config.n_embd).to(device)
        mc.load_state_dict(mc.state_dict() | {name: x for name, x in new.state_dict().items()
                                              if name.startswith(("lensnet.", "earlier_lens."))})

    report: dict = {}
    if args.labels is not None:
        folder = LabelFolder(args.labels)
        settings = folder.manifest()["settings"]
        if (theirs := settings.get("model")) != (ours := label_fingerprint(gpt, mc)):
            raise UserError(f"the labels in {args.labels} were measured on another base ({theirs}, this one is "
                            f"{ours}): label {args.checkpoint_dir} anew")
        labels = folder.read()
        held = torch.arange(len(labels.row_C)) % HELD_OUT == HELD_OUT - 1
        if not held.any():
            raise UserError(f"{len(labels.row_C)} contexts in {args.labels} are too few: at least {HELD_OUT}")
        learned, judged = (Labels(**{name: x[which].to(device) for name, x in vars(labels).items()})
                           for which in (~held, held))
        # rows that were labelled have been seen
        rows = dict(data=settings["data"], first=int(labels.row_C.max()) + 1 if settings["split"] == "val" else 0)
        if args.contexts:  # too few of them are found before anything is trained
            next(held_out(meta, gpt.config.sequence_len, args.contexts, 1, rows["data"], rows["first"]))
        new = copy.deepcopy(mc)
        report["before"] = judge_labels(gpt, mc, judged, args.batch)
        train_lens(gpt, mc, learned, args)
        report["after"] = judge_labels(gpt, mc, judged, args.batch)
        print0(f"of {len(judged.row_C)} held-out contexts: "
               + ", ".join(f"{name} {report['before'][name]:.3f} → {value:.3f}"
                           for name, value in report["after"].items()))
        if args.contexts:
            report["in_use"] = judge_in_use(gpt, {"before": new, "after": mc}, meta, args.contexts, rows)
    meta["lens"] = {"from": found.origin, "labels": args.labels and str(args.labels.resolve()), "steps": args.steps,
                    "seed": args.seed, "new_lens": args.new_lens} | report
    save_checkpoint(directory, meta["step"], model=state, optimizer_shard={}, meta=meta, mc=mc.state_dict())
    print0(f"checkpoint in {directory}")
    in_use = {"in_use": report.pop("in_use")} if "in_use" in report else {}
    print(json.dumps({"checkpoint": str(directory)} | {f"{name}_{when}": value for when, values in report.items()
                                                       for name, value in values.items()} | in_use))
