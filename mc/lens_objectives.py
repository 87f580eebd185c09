"""What the lens learns from: targets, which say what should come first, and terms, which say what else its logits must be.

Targets (`--mc_teacher=kind:weight,…`), all of one sign: what lowers the loss is to be shown.

    attention, gate   dense: a distribution over the visible blocks for hundreds of queries a row, read off the full pass (`mc.teachers`)
    counterfactual    measured utilities of path edits (`mc.counterfactual`): of any two, the more useful comes first,
                      with as much weight as the difference is worth
    preference        Bradley–Terry over the variants of a row: the best one beats each other; a variant's strength is the summed
                      logit of the blocks it shows. Best is the least next-token loss, unweighted, + price · path edits away from what recency
                      shows.

Terms, each with a weight:

    rank        the teacher's best block leads the lens's best others by a margin (dense teachers only)
    zero_sum    squared mean logit over the visible blocks: scores of a history balance
    illegal     −log of the probability that is left when blocks that cannot be expanded, being protected and so raw anyway, compete too
    kl          KL from the lens's own earlier distribution, that of an exponential mean of its weights

All of it reaches the lens alone, whose inputs are detached. With the gate it is computed after the backward pass, which leaves behind what
the gate reads, else before it, as a part of the one loss.

Shapes: B rows, T tokens, D width, Q queries, N blocks, E edits, V variants.
"""

from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.config import DENSE_TEACHERS, MCConfig
from mc.diagnostics import spread
from mc.keyed_random import gumbel
from mc.lens_networks import CURSORS
from mc.lensnet import LensNet
from mc.losses import lens_loss, lens_targets, row_mean
from mc.mega_context import Tree
from mc.model import MegaContext, take
from mc.teachers import attention_mass, beyond_average, gate_utility, over_horizon
from nanochat.gpt import Captured
from nanochat.recorder import Labelled

MARGIN = 1.0  # logits by which the best block is to lead
RIVALS = 8  # of the lens's best others that it is compared with
EDIT_PRICE = 1e-3  # nats per token of next-token loss, a path edit: among variants that are as good, the cheapest wins


class Edits(NamedTuple):
    """Path edits at the end of histories of n_B tokens, and what they are worth."""

    n_B: Tensor
    block_BE: Tensor
    utility_BE: Tensor  # nats per token: NLL without the block's detail − NLL with it
    valid_BE: Tensor


class Variants(NamedTuple):
    """Working contexts of histories of n_B tokens: which blocks each shows raw, and what it costs (`variant_cost`)."""

    n_B: Tensor
    shown_BVN: Tensor
    cost_BV: Tensor


class Lesson(NamedTuple):
    """What a micro-batch leaves for the lens."""

    captured: Sequence[Captured]
    embeds_BTD: Tensor  # detached
    targets_BT: Tensor
    rows_B: Tensor  # global row numbers
    tree: Tree  # of every `row_stride`-th row, detached; edits and variants are of these rows
    edits: Edits | None
    variants: Variants | None
    key: tuple[int, int]  # seed and step


# ---------------------------------------------------------------------------------------------------------------------
# Targets


def standardized(x_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """Deviation from the mean of the visible, in standard deviations of theirs; 0 where they are all alike. For what only compares."""
    x_BQN = beyond_average(x_BQN, visible_BQN) * visible_BQN
    square = x_BQN.square().sum(-1, keepdim=True) / visible_BQN.sum(-1, keepdim=True).clamp_min(1)
    return x_BQN / square.sqrt().clamp_min(1e-12)


def utility_order(logits_BE: Tensor, utility_BE: Tensor, valid_BE: Tensor) -> Tensor:
    """[B] logistic loss of every pair of candidates, times what the pair is worth, over the number of pairs: 0 at ties.

    utility: any unit, positive where detail helps.
    """
    gain_BEE = (utility_BE[:, :, None] - utility_BE[:, None]).clamp_min(0)
    lead_BEE = logits_BE[:, :, None] - logits_BE[:, None]
    pair_BEE = valid_BE[:, :, None] & valid_BE[:, None]
    pairs_B = valid_BE.sum(1) * (valid_BE.sum(1) - 1) / 2
    return (gain_BEE * F.softplus(-lead_BEE) * pair_BEE).sum((1, 2)) / pairs_B.clamp_min(1)


def variant_cost(nll_BV: Tensor, shown_BVN: Tensor, recency_BN: Tensor) -> Tensor:
    """[B, V] nats per token: next-token loss + price of the path edits from what recency shows; a block shown pays with a block hidden."""
    added_BV = (shown_BVN & ~recency_BN[:, None]).sum(-1)
    removed_BV = (recency_BN[:, None] & ~shown_BVN).sum(-1)
    return nll_BV + EDIT_PRICE * torch.maximum(added_BV, removed_BV)


def bradley_terry(logits_BN: Tensor, visible_BN: Tensor, shown_BVN: Tensor, cost_BV: Tensor) -> Tensor:
    """[B] −log probability that the cheapest variant beats another one, mean over the others; 0 with a single variant.

    A variant's strength is the sum, over the blocks that it shows, of logits beyond their mean.
    """
    strength_BV = (beyond_average(logits_BN, visible_BN)[:, None] * (shown_BVN & visible_BN[:, None])).sum(-1)
    best_B1 = cost_BV.argmin(1, keepdim=True)
    others_BV = torch.ones_like(cost_BV).scatter(1, best_B1, 0)
    lost_BV = F.softplus(strength_BV - strength_BV.gather(1, best_B1)) * others_BV
    return lost_BV.sum(1) / max(cost_BV.shape[1] - 1, 1)


def visible_blocks(cursor: Tensor, count: int, block_size: int, protected: int) -> Tensor:
    """[…, N] blocks that end at least `protected` tokens before the cursor […]: nearer ones are raw and need no lens."""
    end_N = (torch.arange(count, device=cursor.device) + 1) * block_size
    return end_N <= (cursor - protected).unsqueeze(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Terms


def rank_term(logits_BQN: Tensor, target_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """[B, Q] mean hinge of the target's best block against the lens's RIVALS best others; 0 where fewer than two are visible."""
    best_BQ1 = target_BQN.masked_fill(~visible_BQN, -torch.inf).argmax(-1, keepdim=True)
    rival_BQN = visible_BQN.scatter(-1, best_BQ1, False)
    top = logits_BQN.masked_fill(~rival_BQN, -torch.inf).topk(min(RIVALS, logits_BQN.shape[-1]), -1)
    counted = rival_BQN.gather(-1, top.indices)
    rivals = logits_BQN.gather(-1, top.indices)
    lost = (MARGIN - logits_BQN.gather(-1, best_BQ1) + rivals).clamp_min(0) * counted
    return lost.sum(-1) / counted.sum(-1).clamp_min(1)


def zero_sum_term(logits_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """[B, Q] squared mean logit over the visible blocks."""
    return ((logits_BQN * visible_BQN).sum(-1) / visible_BQN.sum(-1).clamp_min(1)).square()


def illegal_term(logits_BQN: Tensor, visible_BQN: Tensor, illegal_BQN: Tensor) -> Tensor:
    """[B, Q] nats: −log of the visible blocks' share when illegal ones compete; 0 where none is visible."""
    every = logits_BQN.masked_fill(~(visible_BQN | illegal_BQN), -torch.inf)
    legal = logits_BQN.masked_fill(~visible_BQN, -torch.inf)
    some = visible_BQN.any(-1)
    lost = every.masked_fill(~some[..., None], 0).logsumexp(-1) - legal.masked_fill(~some[..., None], 0).logsumexp(-1)
    return lost * some


def policy_term(logits_BQN: Tensor, earlier_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """[B, Q] nats: KL(earlier ‖ now) of the distributions over the visible blocks; 0 where none is visible."""
    now, earlier = (x.masked_fill(~visible_BQN, -torch.inf).log_softmax(-1).masked_fill(~visible_BQN, 0) for x in (logits_BQN, earlier_BQN))
    return (earlier.exp() * visible_BQN * (earlier - now)).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Together


def lens_objective(model: MegaContext, lesson: Lesson) -> tuple[Tensor, dict[str, Tensor]]:
    """The lens's loss, nats, with its metrics."""
    c, weights = model.config, model.config.teacher_weights()
    parts: list[tuple[str, float, Tensor]] = []
    metrics: dict[str, Tensor] = {}
    if any(weights[kind] for kind in DENSE_TEACHERS) or c.lens_zero_sum or c.lens_illegal or c.lens_kl:
        dense, metrics = dense_parts(model, lesson, weights)
        parts += dense
    if lesson.edits is not None:
        parts.append(("counterfactual", weights["counterfactual"], edit_loss(model, lesson.tree, lesson.edits, False).mean()))
    if lesson.variants is not None:
        parts.append(("preference", weights["preference"], variant_loss(model, lesson.tree, lesson.variants).mean()))
    loss = sum(weight * part for _, weight, part in parts)
    metrics["mc.loss.lens"] = loss.detach()
    metrics |= {Labelled("mc.loss.lens_part", part=name): part.detach() for name, _, part in parts}
    return loss, metrics


def cursor_logits(model: MegaContext, tree: Tree, n_B: Tensor) -> tuple[Tensor, ...]:
    """The lens's logits [B, N] for histories of n_B tokens: bilinear and, where the lens has one, after its reader. Each learns by itself."""
    bilinear_BN = model.bilinear_logits(tree.levels[0], n_B)
    if model.lensnet.reader is None:
        return (bilinear_BN,)
    return bilinear_BN, model.reread(model.lensnet, bilinear_BN[:, None], tree.levels[0], n_B[:, None], tree)[:, 0]


def edit_loss(model: MegaContext, tree: Tree, edits: Edits, normalize: bool) -> Tensor:
    """[B] `utility_order` of the lens's logits at the end of each row's history, and the mean of that of each tail token's own vote:
    the evidence that adds up to a logit is taught one by one too."""
    n_B, block_BE, utility_BE, valid_BE = edits
    utility_BE = standardized(utility_BE, valid_BE) if normalize else utility_BE
    loss_B = sum(utility_order(x.gather(1, block_BE), utility_BE, valid_BE) for x in cursor_logits(model, tree, n_B))
    own_BTN = model.tail_votes(tree.levels[0], n_B)
    each = own_BTN.shape[1]
    own_BTE = own_BTN.gather(2, block_BE[:, None].expand(-1, each, -1))
    own_BT = utility_order(own_BTE.flatten(0, 1), *(x.repeat_interleave(each, 0) for x in (utility_BE, valid_BE))).view(-1, each)
    return loss_B + own_BT.mean(1)


def variant_loss(model: MegaContext, tree: Tree, variants: Variants) -> Tensor:
    """[B] `bradley_terry` of the lens's logits at the end of each row's history."""
    n_B, shown_BVN, cost_BV = variants
    visible_BN = visible_blocks(n_B, shown_BVN.shape[2], model.config.block_size, model.config.protected)
    return sum(bradley_terry(x, visible_BN, shown_BVN, cost_BV) for x in cursor_logits(model, tree, n_B))


def dense_parts(model: MegaContext, lesson: Lesson, weights: dict[str, float]) -> tuple[list[tuple[str, float, Tensor]], dict[str, Tensor]]:
    """Targets and terms at every one of the row's last positions: (name, weight, loss) of each, and metrics.

    With a reader, targets teach it too, at few of the positions, and terms are of what it says there.
    """
    c, lens, T = model.config, model.lensnet, lesson.embeds_BTD.shape[1]
    embeds = lesson.embeds_BTD[::c.lens_row_stride]
    count = (T if c.lens_illegal else T - c.protected) // c.block_size
    asked = slice(T - c.lens_queries, T - c.lens_horizon + 1)
    cursor = torch.arange(asked.start + 1, asked.stop + 1, device=embeds.device).expand(len(embeds), -1)
    visible = visible_blocks(cursor, count, c.block_size, c.protected)
    own, logits = lens.logits(embeds, lens.keys(embeds[:, :count * c.block_size]), asked)
    kinds = sorted((k for k in DENSE_TEACHERS if weights[k]), key=weights.get)
    taught = {kind: _dense_target(kind, c, lesson, count, visible) for kind in kinds}
    each = lambda x: x  # noqa: E731
    last, seen, at = logits, visible, cursor
    if lens.reader is not None:
        each = _few(lesson, lesson.rows_B[::c.lens_row_stride], taught[kinds[-1]][1] if kinds else visible.any(-1).to(logits.dtype))
        last, seen, at = (each(x) for x in (logits, visible, cursor))
        with torch.no_grad():
            tree = model.build_tree(embeds)
        last = _reread(model, lens, last, embeds, at, tree)
    parts, metrics = [], {"mc.lens.spread": spread(last.detach(), seen)}
    for kind, (target, weight) in taught.items():
        loss = sum(row_mean(lens_loss(x, target, visible), weight).mean() for x in (own, logits))
        target, weight = each(target), each(weight)
        if lens.reader is not None:
            weight = weight > 0  # drawn by how much there is to win, they count alike
            loss = loss + row_mean(lens_loss(last, target, seen), weight).mean()
        parts.append((kind, weights[kind], loss))
        if c.lens_rank:
            parts.append(("rank", c.lens_rank * weights[kind], row_mean(rank_term(last, target, seen), weight).mean()))
        with torch.no_grad():  # of the teacher of most weight, which comes last
            hit = last.masked_fill(~seen, -torch.inf).argmax(-1) == target.argmax(-1)
            metrics["mc.lens.hit"] = row_mean(hit, weight).mean()
            entropy = row_mean(-(target * target.clamp_min(1e-9).log()).sum(-1), weight)
            metrics["mc.lens.teacher_entropy"] = entropy.mean()
    some = seen.any(-1)
    if c.lens_zero_sum:
        parts.append(("zero_sum", c.lens_zero_sum, row_mean(zero_sum_term(last, seen), some).mean()))
    if c.lens_illegal:
        illegal = visible_blocks(at, count, c.block_size, 0) & ~seen
        parts.append(("illegal", c.lens_illegal, row_mean(illegal_term(last, seen, illegal), some).mean()))
    if c.lens_kl:
        with torch.no_grad():
            before = model.earlier_lens
            earlier = each(before.logits(embeds, before.keys(embeds[:, :count * c.block_size]), asked)[1])
            earlier = earlier if lens.reader is None else _reread(model, before, earlier, embeds, at, tree)
        parts.append(("kl", c.lens_kl, row_mean(policy_term(last, earlier, seen), some).mean()))
    return parts, metrics


def _few(lesson: Lesson, rows_B: Tensor, weight_BQ: Tensor) -> Callable[[Tensor], Tensor]:
    """Chooses, of anything [B, Q, …], few of the queries of each row (global number `rows_B`), drawn by their weight."""
    seed, step = lesson.key
    noise = gumbel(rows_B, weight_BQ.shape[1], seed, "cursors", step)
    picked = (weight_BQ.log() + noise).topk(min(CURSORS, weight_BQ.shape[1]), dim=1).indices
    return lambda x: x.gather(1, picked) if x.ndim == 2 else take(x, picked)


def _reread(model: MegaContext, lens: LensNet, logits_BQN: Tensor, embeds_BTD: Tensor, cursor_BQ: Tensor, tree: Tree) -> Tensor:
    """[B, Q, N] after the reader of a lens."""
    every_block = F.pad(logits_BQN, (0, tree.shape.counts[1] - logits_BQN.shape[-1]))  # the last are read, not rated
    return model.reread(lens, every_block, embeds_BTD, cursor_BQ, tree)[..., :logits_BQN.shape[-1]]


def _dense_target(kind: str, c: MCConfig, lesson: Lesson, count: int, visible_BQN: Tensor) -> tuple[Tensor, Tensor]:
    """(distribution over the visible blocks [B, Q, N], weight of each query [B, Q]) by a dense teacher."""
    T = lesson.embeds_BTD.shape[1]
    rows, queries = slice(None, None, c.lens_row_stride), slice(T - c.lens_queries, T)
    teacher = gate_utility if kind == "gate" else attention_mass
    signal = teacher(lesson.captured, rows, queries, count, c.block_size)
    signal = over_horizon(signal * (lesson.targets_BT[rows, queries] >= 0).unsqueeze(-1), c.lens_horizon)
    if kind == "attention":
        signal = beyond_average(signal, visible_BQN)
    return lens_targets(signal, visible_BQN)
