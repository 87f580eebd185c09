"""Every kind of LensNet taught side by side on one base, and judged on held-out rows.

The base stands still. Each micro-batch's LM pass and its backward run once, as a vanilla step runs them, and teach all
lenses, which start alike but for what is theirs. Gists are those of an untrained GistNet, masked means. Times are
ratios within the run: what teaching a lens takes, over the pass. Settings: those of the checkpoint's MegaContext, or
the defaults where it has none.
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import torch

from mc.arm import KINDS as ARM_KINDS
from mc.config import MCConfig, from_dict
from mc.lens_loss import Lesson, lens_objective
from mc.model import MegaContext
from mc.teachers import keep_gradients
from nanochat.common import FlagParser, print0, seed_everything
from nanochat.dataloader import Loader, source_of
from nanochat.dataset import Progress
from nanochat.gpt import GPT, Captured
from nanochat.loading import check_tokenizer, load_model
from nanochat.optim import MuonAdamW
from nanochat.schedule import batch_lr_scale, lr_multiplier
from nanochat.tasks.recall import CurriculumSchedule
from nanochat.tokenizer import Tokenizer
from scripts.bench.base import print_json
from scripts.eval.measures import held_out, lens_measures, gate_utilities
from scripts.eval.statistics import bootstrap_interval
from scripts.eval.subcommands import check_least

KINDS = ("bilinear", *ARM_KINDS["lens"])


def add_flags(parser: FlagParser) -> None:
    parser.add_checkpoint("of the base")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--teacher", default="gate", choices=("gate", "attention"),
                        help="what teaches the lenses, as --mc_teacher")
    parser.add_argument("--horizon", type=int, default=8,
                        help="tokens ahead whose need for a block is taught and judged, as --mc_lens_horizon")
    parser.add_argument("--contexts", type=int, default=64, help="held-out rows")


def training_loader(meta: dict) -> Loader:
    """The training's own rows from the first one on; for recall of the size that its curriculum ends with."""
    flags, T = meta["flags"], meta["model_config"]["sequence_len"]
    recall = {}
    if flags["data"] == "recall":
        recall = dict(schedule=CurriculumSchedule(flags["recall_blocks"], grow=0, seed=flags["seed"]), total_rows=1)
    source = source_of(meta, "train", tokenizer=Tokenizer.load(), **recall)
    return Loader(source, flags["device_batch_size"], flags["device_batch_size"], T)


class TaughtLens:
    """A MegaContext of which only the lens learns."""

    def __init__(self, config: MCConfig, gpt: GPT, seed: int):
        seed_everything(seed)
        self.model, self.seconds = MegaContext(config, gpt.config.n_embd), 0.0
        self.groups = [g for g in self.model.param_groups() if g["name"].startswith("lensnet")]
        self.rates = [g["lr"] for g in self.groups]
        self.optimizer = MuonAdamW(self.groups)

    def learn(self, lesson: Lesson, rate: float) -> None:
        begin = time.perf_counter()
        lens_objective(self.model, lesson)[0].backward()
        for group, lr in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = lr * rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds += time.perf_counter() - begin


def run(args: argparse.Namespace) -> None:
    check_least(args, steps=1, horizon=1, contexts=1)
    gpt, meta = load_model(args.checkpoint_dir)
    flags, T = meta["flags"], gpt.config.sequence_len
    check_tokenizer(meta, Tokenizer.load(), args.checkpoint_dir)
    loader = training_loader(meta)
    scale = batch_lr_scale(flags["device_batch_size"] * T)
    settings = from_dict(meta["mc"]["config"]) if meta.get("mc") else MCConfig()
    settings = replace(settings, teacher=args.teacher, lens_horizon=args.horizon)
    pupils = {kind: TaughtLens(replace(settings, lens=kind), gpt, flags["seed"]) for kind in KINDS}
    pass_seconds, progress = 0.0, Progress("teaching", args.steps, "steps", every_s=15)
    for step in range(args.steps):
        batch, captured, begin = loader.next(), list[Captured](), time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=flags["dtype"] == "bfloat16"):
            embeds = gpt.embed(batch.inputs)
            hidden = gpt.hidden(batch.inputs, inputs_embeds=embeds, capture=captured)
            keep_gradients(captured)
            gpt.loss(hidden, batch.targets, batch.num_targets).backward()
        gpt.zero_grad(set_to_none=True)
        pass_seconds += time.perf_counter() - begin
        for kind, pupil in pupils.items():
            tree = pupil.model.build_tree(embeds.detach())
            lesson = Lesson(captured, embeds.detach(), batch.targets, batch.rows, tree, (flags["seed"], step))
            pupil.learn(lesson, scale * lr_multiplier(step, args.steps))
        progress.update(step + 1)
    found = judge_lenses(gpt, {kind: pupil.model for kind, pupil in pupils.items()}, meta, args)
    report = {"steps": args.steps, "contexts": args.contexts, "lenses": {}}
    for kind, pupil in pupils.items():
        row = {"of_the_pass": pupil.seconds / pass_seconds} | {name: float(np.mean(x))
                                                               for name, x in found[kind].items()}
        for name in ("nats_lens", "hit_lens", "won_lens"):
            difference = np.array(found[kind][name]) - np.array(found["bilinear"][name])
            row[f"{name}_gain"] = [float(difference.mean()),
                                   *bootstrap_interval(lambda i: difference[i].mean(), len(difference))]
        report["lenses"][kind] = row
        print0(f"{kind:12s} {row['nats_lens']:.4f} nats (even {row['nats_even']:.4f}, least {row['nats_least']:.4f}), "
               f"hit@1 {row['hit_lens']:.3f}, won {row['won_lens']:.4f} of {row['won_best']:.4f} nats (recency "
               f"{row['won_recency']:.4f}); "
               f"teaching it takes {row['of_the_pass']:.1%} of the pass")
    print_json(report)


def judge_lenses(gpt: GPT, models: dict[str, MegaContext], meta: dict,
                 args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """kind -> measure -> one number per held-out row."""
    c, T = next(iter(models.values())).config, gpt.config.sequence_len
    cursor_Q = T - c.lens_queries + 1 + torch.linspace(0, c.lens_queries - args.horizon, 16).long()
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in models}
    for _, tokens, targets in held_out(meta, T, args.contexts, 8):
        utility_BQN = gate_utilities(gpt, c, tokens, targets, cursor_Q, args.horizon)
        for kind, model in models.items():
            for name, values_B in lens_measures(gpt, model, tokens, cursor_Q, utility_BQN).items():
                found[kind].setdefault(name, []).extend(values_B.tolist())
    return found
