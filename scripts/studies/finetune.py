"""Every system reads with weights that know its input: the same base, the same rows, the same number of steps, the same
number of learning rates tried, the same loss (NLL of the continuation's targets), each in its own form.

What is trained: the base; with gists GistNet and their logit bias. A system that looks with the lens, for gists or for
raw blocks alike, goes on teaching it by the labels it was trained with. The classifier of `drop_learned` has its own
labels and stays. Selection has no gradient.

Shapes: B rows, T tokens.
"""

import copy
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from mc.lens_loss import Lesson, lens_objective
from mc.teachers import continuation_pass
from nanochat.common import UserError
from nanochat.gpt import mean_loss, token_losses
from nanochat.optim import MuonAdamW, assert_finite, gpt_param_groups
from nanochat.schedule import lr_multiplier, muon_momentum
from scripts.eval.methods.gists import Gists
from scripts.eval.methods.interface import Models, Method
from scripts.eval.methods.registry import method_named
from scripts.eval.rows import Batches, RowBatch

WARMUP, WARMDOWN = 5, 0.7  # steps; share of the steps
TEACHING = 4  # every how many rows teach the lens: a full pass costs as much as many working contexts
RATES = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")


@dataclass(frozen=True)
class Recipe:
    """Equal for all systems. rates: of the base's own training; they are multiplied by each of lr_scales in turn."""

    budgets: tuple[int, ...]  # W: step i trains at the i-th, round and round
    steps: int
    lr_scales: tuple[float, ...]
    rates: dict[str, float]
    # factor on them, and on those of MegaContext, for the size of a batch (nanochat.schedule.batch_lr_scale)
    batch_scale: float
    dev: int  # batches on which the learning rate is chosen: they follow those of training
    seed: int = 0

    def __post_init__(self):
        if min(self.steps, self.dev, len(self.budgets), len(self.lr_scales)) < 1 or min(self.lr_scales) <= 0:
            raise UserError(f"fine-tuning needs steps, dev batches, a budget and a learning rate above 0, not {self}")


@dataclass(frozen=True)
class Tuned:
    models: Models
    lr_scale: float
    dev_nll: dict[float, float]  # of each lr_scale
    losses: list[float]  # of the one that was chosen


def finetune(name: str, models: Models, batches: Batches, recipe: Recipe,
             progress: Callable[[int], None] = lambda done: None) -> Tuned:
    """The best of the learning rates, by NLL on batches that none was trained on. `models` stays as it is.

    UserError for a system that reads with another's weights (`System.arm`).
    """
    kind = method_named(name)
    if kind.arm:
        raise UserError(f"the system {name} reads with the weights of {kind.arm}: fine-tune that one")
    chosen: Tuned | None = None
    found = {}
    for i, scale in enumerate(recipe.lr_scales):
        mine = kind.prepare(copy.deepcopy(models))
        systems = [kind(mine, budget, recipe.seed) for budget in recipe.budgets]
        losses = train_reader(systems, batches, recipe, scale, lambda step: progress(i * recipe.steps + step))
        dev = [nll(system, batches(recipe.steps + j)) for j in range(recipe.dev) for system in systems]
        found[scale] = float(torch.cat(dev).mean())
        if found[scale] == min(found.values()):
            chosen = Tuned(mine, scale, found, losses)
    return chosen


def nll(system: Method, rows: RowBatch) -> Tensor:
    """[B] nats."""
    return system.judge(*rows).outcome.nll_B


def train_reader(systems: list[Method], batches: Batches, recipe: Recipe, lr_scale: float,
                 progress: Callable[[int], None]) -> list[float]:
    """Fine-tune the models that the systems (one for each budget) share, in place; returns the losses."""
    system = systems[0]
    gpt, lr_scale = system.gpt, lr_scale * recipe.batch_scale
    rates = {name: recipe.rates[name] * lr_scale for name in RATES}
    groups = gpt_param_groups(gpt.named_parameters(), gpt.config.n_embd, weight_decay=0.0, **rates)
    if isinstance(system, Gists) or system.looks:
        gists, *lens = system.models.mc.param_groups(lr_scale)
        groups += [gists] * isinstance(system, Gists) + lens * system.looks
    optimizer = MuonAdamW(groups)
    losses = []
    for step in range(recipe.steps):
        rows, system = batches(step), systems[step % len(systems)]
        hidden, _ = system.hidden(rows.tokens_BT, rows.n, rows.rows_B)
        targets = rows.targets_BT[:, rows.n - 1:-1]
        loss = mean_loss(token_losses(gpt.logits(hidden), targets), targets)
        assert_finite(loss, step)
        loss.backward()
        if system.looks:
            teach_lens(system, rows, step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_multiplier(step, recipe.steps, warmup_steps=WARMUP,
                                                              warmdown_ratio=WARMDOWN)
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step, recipe.steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        progress(step + 1)
    return losses


def teach_lens(system: Method, rows: RowBatch, step: int) -> None:
    """Adds to the lens's gradients: its labels, from the full pass over some of the rows, for the
    queries whose targets count."""
    tokens, targets, numbers = (x[::TEACHING] for x in (rows.tokens_BT, rows.targets_BT, rows.rows_B))
    n, mc, T = rows.n, system.models.mc, tokens.shape[1]
    if mc.config.lens_queries > T - mc.config.protected - mc.config.block_size:
        raise UserError(f"rows of {T} tokens leave no history before the {mc.config.lens_queries} queries that teach "
                        "this lens; "
                        f"use a longer history")
    captured = continuation_pass(system.gpt, tokens, targets, n)
    asked = targets.masked_fill(torch.arange(T, device=tokens.device) < n - 1, -1)
    with torch.no_grad():
        embeds = system.gpt.embed(tokens)
        tree = mc.build_tree(embeds[::mc.config.row_stride])
    lens_objective(mc, Lesson(captured, embeds, asked, numbers, tree, (system.seed, step)))[0].backward()
