"""Train the lens of a checkpoint alone, from measured utilities: base and gists stay as they are, and
no token goes through the base.

    python -m scripts.mc_study train_lensnet --checkpoint_dir=DIR --labels=DIR --out_tag=NAME

Writes $NANOCHAT_BASE_DIR/checkpoints/NAME, a checkpoint like any other. With --steps=0 it has a new
lens that has learned nothing.

Curriculum: at first only blocks near the end of history compete, later all of them.
"""

import json
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from mc.arms.counterfactual import MeasuredEdits, edit_loss
from mc.arms.utility_labels import LabelFolder, Labels, label_fingerprint
from mc.mega_context import Tree, TreeShape
from mc.model import MegaContext
from mc.store.networks import load_networks
from nanochat.checkpoint import complete_steps, load_model_state, save_checkpoint
from nanochat.common import FlagParser, UserError, base_dir, init_distributed, print0, seed_everything
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, assert_finite
from nanochat.outputs import BASE_DIR, check_tag, holding, output_folder
from nanochat.schedule import lr_multiplier, muon_momentum
from scripts.eval.subcommands import check_least

HELD_OUT = 8  # one context in so many is kept for the report
WARMUP = 10  # steps


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


def train_lens(gpt: GPT, mc: MegaContext, labels: Labels, args) -> None:
    """`args.steps` steps on the lens of mc."""
    groups = [g for g in mc.param_groups(args.lr / mc.config.lens_lr) if g["name"].startswith("lensnet")
              and g["params"]]
    optimizer = MuonAdamW(groups)
    generator = torch.Generator().manual_seed(args.seed)
    blocks, begin = labels.tokens_CT.shape[1] // mc.config.block_size, time.monotonic()
    for step in range(args.steps):
        pick = torch.randint(len(labels.row_C), (args.batch,), generator=generator).to(labels.row_C.device)
        reach = near(step, args.steps, args.near, blocks, args.grow)
        tokens, edits = edits_of(labels, pick, reach, mc.config.block_size)
        loss = edit_loss(mc, lens_tree(gpt, mc, tokens), edits, args.normalize).mean()
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
            print0(f"step {step + 1}/{args.steps}: loss {float(loss):.5f}, blocks up to {reach} back, ETA "
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
    parser.add_argument("--log_every", type=int, default=50, help="steps between log lines")
    parser.add_seed("the new lens and the order of contexts", default=42)
    parser.add_device("where to train")


def run(args: Namespace) -> None:
    check_least(args, steps=0, batch=1, near=2, log_every=1, seed=0)
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
        if (theirs := folder.manifest()["settings"].get("model")) != (ours := label_fingerprint(gpt, mc)):
            raise UserError(f"the labels in {args.labels} were measured on another base ({theirs}, this one is "
                            f"{ours}): label {args.checkpoint_dir} anew")
        labels = folder.read()
        held = torch.arange(len(labels.row_C)) % HELD_OUT == HELD_OUT - 1
        if not held.any():
            raise UserError(f"{len(labels.row_C)} contexts in {args.labels} are too few: at least {HELD_OUT}")
        learned, judged = (Labels(**{name: x[which].to(device) for name, x in vars(labels).items()})
                           for which in (~held, held))
        report["before"] = judge_labels(gpt, mc, judged, args.batch)
        train_lens(gpt, mc, learned, args)
        report["after"] = judge_labels(gpt, mc, judged, args.batch)
        print0(f"of {len(judged.row_C)} held-out contexts: "
               + ", ".join(f"{name} {report['before'][name]:.3f} → {value:.3f}"
                           for name, value in report["after"].items()))
    meta["lens"] = {"from": found.origin, "labels": args.labels and str(args.labels.resolve()), "steps": args.steps,
                    "seed": args.seed, "new_lens": args.new_lens} | report
    save_checkpoint(directory, meta["step"], model=state, optimizer_shard={}, meta=meta, mc=mc.state_dict())
    print0(f"checkpoint in {directory}")
    print(json.dumps({"checkpoint": str(directory)} | {f"{name}_{when}": value for when, values in report.items()
                                                       for name, value in values.items()}))
