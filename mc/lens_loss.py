"""What the lens learns: where the attention of the full pass went, and what arms add to that.

The core's teacher is dense: for hundreds of queries a row a distribution over the visible blocks, read off the full
pass (`mc.teachers`), and a cross-entropy against it, twice: of the token's own vote, and of the logits of its tail.
Arms bring other teachers (`--mc_teacher=kind:weight,…`) and terms (`--mc_arms`). All of it reaches the lens alone,
whose inputs are detached.

Shapes: B rows, T tokens, D width, Q queries, N blocks.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.keyed_random import gumbel
from mc.lensnet import CURSORS, LensNet
from mc.losses import lens_loss, lens_targets, row_mean
from mc.mega_context import Tree
from mc.model import MegaContext, take
from mc.teachers import attention_mass, beyond_average, over_horizon
from mc.telemetry import spread
from nanochat.gpt import Captured
from nanochat.telemetry.metrics import Labelled

Target = tuple[Tensor, Tensor]  # distribution over the visible blocks [B, Q, N], weight of each query [B, Q]


class Lesson(NamedTuple):
    """What a micro-batch leaves for the lens."""

    captured: Sequence[Captured]
    embeds_BTD: Tensor  # detached
    targets_BT: Tensor
    rows_B: Tensor  # global row numbers
    tree: Tree  # of every `row_stride`-th row, detached
    key: tuple[int, int]  # seed and step
    watched: dict[str, Any] = {}  # arm -> what it has seen of the working contexts of these rows


class Asked(NamedTuple):
    """What the lens says at a row's last positions; with a reader at few of them, after it."""

    last: Tensor  # [B, Q, N] logits
    seen: Tensor  # [B, Q, N] bool, visible
    cursor_BQ: Tensor
    taught: dict[str, Target]  # dense teacher -> what it says there, the one of most weight last
    again: Callable[[LensNet], Tensor]  # another lens's `last`


def visible_blocks(cursor: Tensor, count: int, block_size: int, protected: int) -> Tensor:
    """[…, N] blocks that end at least `protected` tokens before the cursor […]: nearer ones are raw and need no
    lens."""
    end_N = (torch.arange(count, device=cursor.device) + 1) * block_size
    return end_N <= (cursor - protected).unsqueeze(-1)


def cursor_logits(model: MegaContext, tree: Tree, n_B: Tensor) -> tuple[Tensor, ...]:
    """The lens's logits [B, N] for histories of n_B tokens: bilinear and, where the lens has one, after its reader.
    Each learns by itself."""
    bilinear_BN = model.bilinear_logits(tree.levels[0], n_B)
    if model.lensnet.reader is None:
        return (bilinear_BN,)
    return bilinear_BN, model.reread(model.lensnet, bilinear_BN[:, None], tree.levels[0], n_B[:, None], tree)[:, 0]


def lens_objective(model: MegaContext, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
    """The lens's loss, nats, with its metrics."""
    parts, metrics, asked = [], {}, None
    if signals := _dense_teachers(model):
        parts, metrics, asked = dense_parts(model, lesson, signals)
    elif any(arm.every_query for arm in model.arms.values()):
        _, metrics, asked = dense_parts(model, lesson, {})
    for arm in model.arms.values():
        parts += arm.lens_parts(model, lesson, asked)
    loss = sum(weight * part for _, weight, part in parts)
    metrics["mc.loss.lens"] = loss.detach()
    metrics |= {Labelled("mc.loss.lens_part", part=name): part.detach() for name, _, part in parts}
    return loss, metrics


def _dense_teachers(model: MegaContext) -> dict[str, Callable[..., Tensor]]:
    """Teacher -> its signal, as `attention_mass` gives it; the one of most weight last."""
    weights = model.config.teacher_weights()
    found = {"attention": attention_mass} | {name: arm.signal for name, arm in model.arms.items() if arm.dense}
    return {kind: found[kind] for kind in sorted((k for k in found if weights[k]), key=weights.get)}


def dense_parts(
    model: MegaContext, lesson: Lesson, signals: dict[str, Callable[..., Tensor]]
) -> tuple[list, dict[str, Tensor], Asked]:
    """The cross-entropies to dense teachers at every one of the row's last positions, metrics, and what the lens said.

    With a reader they teach it too, at few of the positions.
    """
    c, lens, T = model.config, model.lensnet, lesson.embeds_BTD.shape[1]
    embeds = lesson.embeds_BTD[:: c.lens_row_stride]
    count = (T if any(arm.protected_too for arm in model.arms.values()) else T - c.protected) // c.block_size
    positions = slice(T - c.lens_queries, T - c.lens_horizon + 1)
    cursor = torch.arange(positions.start + 1, positions.stop + 1, device=embeds.device).expand(len(embeds), -1)
    visible = visible_blocks(cursor, count, c.block_size, c.protected)

    def votes_and_logits(of: LensNet) -> tuple[Tensor, Tensor]:
        return of.logits(embeds, of.keys(embeds[:, : count * c.block_size]), positions)

    own, logits = votes_and_logits(lens)
    taught = {kind: _target(model, lesson, signal, kind, visible) for kind, signal in signals.items()}
    asked = Asked(logits, visible, cursor, taught, lambda of: votes_and_logits(of)[1])
    if lens.reader is not None:
        asked = _reread(model, lesson, asked, embeds)
    weights, parts, metrics = c.teacher_weights(), [], {"mc.lens.spread": spread(asked.last.detach(), asked.seen)}
    for kind, (target, weight) in taught.items():
        loss = sum(row_mean(lens_loss(x, target, visible), weight).mean() for x in (own, logits))
        target, weight = asked.taught[kind]
        if lens.reader is not None:
            loss = loss + row_mean(lens_loss(asked.last, target, asked.seen), weight).mean()
        parts.append((kind, weights[kind], loss))
        with torch.no_grad():  # of the teacher of most weight, which comes last
            hit = asked.last.masked_fill(~asked.seen, -torch.inf).argmax(-1) == target.argmax(-1)
            metrics["mc.lens.hit"] = row_mean(hit, weight).mean()
            entropy = row_mean(-(target * target.clamp_min(1e-9).log()).sum(-1), weight)
            metrics["mc.lens.teacher_entropy"] = entropy.mean()
    return parts, metrics, asked


def _reread(model: MegaContext, lesson: Lesson, asked: Asked, embeds: Tensor) -> Asked:
    """After the lens's reader, at few of the queries of each row, drawn by their weight."""
    taught = list(asked.taught.values())
    drawn_by = taught[-1][1] if taught else asked.seen.any(-1).to(asked.last.dtype)
    seed, step = lesson.key
    noise = gumbel(lesson.rows_B[:: model.config.lens_row_stride], drawn_by.shape[1], seed, "cursors", step)
    picked = (drawn_by.log() + noise).topk(min(CURSORS, drawn_by.shape[1]), dim=1).indices
    with torch.no_grad():
        tree = model.build_tree(embeds)

    def few(x: Tensor) -> Tensor:
        return x.gather(1, picked) if x.ndim == 2 else take(x, picked)

    def read(lens: LensNet, logits_BQN: Tensor) -> Tensor:
        every_block = F.pad(
            logits_BQN, (0, tree.shape.counts[1] - logits_BQN.shape[-1])
        )  # the last are read, not rated
        return model.reread(lens, every_block, embeds, few(asked.cursor_BQ), tree)[..., : logits_BQN.shape[-1]]

    return Asked(
        read(model.lensnet, few(asked.last)),
        few(asked.seen),
        few(asked.cursor_BQ),
        {
            kind: (few(target), few(weight) > 0) for kind, (target, weight) in asked.taught.items()
        },  # drawn by weight, they count alike
        lambda of: read(of, few(asked.again(of))),
    )


def _target(
    model: MegaContext, lesson: Lesson, signal: Callable[..., Tensor], kind: str, visible_BQN: Tensor
) -> Target:
    """What a dense teacher says."""
    c, T = model.config, lesson.embeds_BTD.shape[1]
    rows, queries = slice(None, None, c.lens_row_stride), slice(T - c.lens_queries, T)
    per_query = signal(lesson.captured, rows, queries, visible_BQN.shape[-1], c.block_size)
    per_query = over_horizon(per_query * (lesson.targets_BT[rows, queries] >= 0).unsqueeze(-1), c.lens_horizon)
    return lens_targets(beyond_average(per_query, visible_BQN) if kind == "attention" else per_query, visible_BQN)
