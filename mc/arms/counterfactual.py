"""What the detail of a block is worth, measured: the loss with its raw tokens and with its gist,
many blocks of a row in one pass.

A cut of the row is drawn, and in it blocks whose ancestors are open. Each edit flips one of them, raw to gist or gist
to raw, all else unchanged. Either way

    utility = NLL(the block as its gist) − NLL(the same cut with the block raw), nats per token of the continuation

so positive means that detail helps. (An edit that opens the block's ancestors too would mix in what they are worth: on
recall, with one LOD2 node above the whole history, opening it was worth 1 to 2 nats whichever block was shown.)

The 1 + E cuts of a row share its tokens, embeddings and tree, and the keys and values of what lies before the block
that an edit flips (`mc.arms.shared_prefix`).

Shapes: R rows, T tokens, N blocks, N_l nodes at level l, E edits of a row, C = 1 + E cuts.
"""

from collections.abc import Sequence

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.arm import Arm, Part, Setting
from mc.arms.shared_prefix import sharing
from mc.focus_allocator import GreedyAllocator
from mc.keyed_random import gumbel, uniform
from mc.lens_loss import Asked, Lesson, cursor_logits, visible_blocks
from mc.losses import row_mean
from mc.mega_context import Tree
from mc.model import MegaContext, read_rows, run_entries, take, with_continuation
from mc.runtime import MCController, Seen
from mc.teachers import beyond_average
from mc.working_context import from_expanded
from nanochat.gpt import GPT, token_losses


def draw_cut(allocator: GreedyAllocator, editable_RN: Tensor, n_R: Tensor, rows_R: Tensor,
             *key: int | str) -> list[Tensor]:
    """Which nodes a random cut expands, as `GreedyAllocator.allocate` says it, with room for one more
    of the blocks that `can_flip`.

    Shows up to as many of the editable blocks as the budget holds, then closes the one that was opened
    last: its ancestors stay open.
    """
    cfg, n_blocks = allocator.cfg, editable_RN.shape[1]
    most = max(cfg.budget // cfg.block_size, 1)
    rank_RN = gumbel(rows_R, n_blocks, "cut to edit", *key).masked_fill(~editable_RN,
                                                                        -torch.inf).argsort(1, descending=True).argsort(1)  # noqa: E501
    wanted_RN = editable_RN & (rank_RN <= (uniform(rows_R, 1, "size of the cut", *key) * most).long())
    expanded = list(allocator.allocate(torch.where(wanted_RN, -rank_RN.float(), -torch.inf), n_R).expanded)
    last_R1 = rank_RN.masked_fill(~(expanded[0] & editable_RN), -1).argmax(1, keepdim=True)
    expanded[0] = expanded[0] & ~(torch.zeros_like(editable_RN).scatter(1, last_R1, True) & editable_RN)
    return expanded


def can_flip(expanded: Sequence[Tensor], editable_RN: Tensor, n_R: Tensor, block_size: int) -> Tensor:
    """[R, N] editable blocks whose existing ancestors are all expanded: they stand in the cut, raw or as their gist."""
    open_RN = editable_RN
    block_N = torch.arange(editable_RN.shape[1], device=n_R.device)
    for lod, open_RM in enumerate(expanded[1:], 2):
        exists_RM = block_size**lod * torch.arange(1, open_RM.shape[1] + 1, device=n_R.device) <= n_R[:, None]
        closed_RM = F.pad(exists_RM & ~open_RM, (0, 1))  # the last: blocks that have no ancestor at this level
        open_RN = open_RN & ~closed_RM[:, (block_N // block_size ** (lod - 1)).clamp_max(open_RM.shape[1])]
    return open_RN


def draw_edits(logits_RN: Tensor, editable_RN: Tensor, count: int, rows_R: Tensor,
               *key: int | str) -> tuple[Tensor, Tensor]:
    """Blocks to flip, drawn by global row number and key: half of them, rounded up, by logits + Gumbel noise,
    the others anyhow, none twice.

    Returns block [R, E] int64 and valid [R, E] bool: False where there are fewer editable blocks. E = min(count, N).
    """
    n_blocks = logits_RN.shape[1]
    count = min(count, n_blocks)
    wanted, anyhow = gumbel(rows_R, 2 * n_blocks, "edits", *key).chunk(2, 1)
    first = (logits_RN + wanted).masked_fill(~editable_RN, -torch.inf).topk((count + 1) // 2, 1).indices
    rest = anyhow.masked_fill(~editable_RN, -torch.inf).scatter(1, first, -torch.inf).topk(count // 2, 1)
    return torch.cat([first, rest.indices], 1), torch.cat([editable_RN.gather(1, first), rest.values > -torch.inf], 1)


@torch.no_grad()
def edit_utilities(gpt: GPT, mc: MegaContext, tree: Tree, tokens_RT: Tensor, targets_RT: Tensor, n_R: Tensor,
                   expanded: Sequence[Tensor], block_RE: Tensor, reuse: bool = True) -> tuple[Tensor, Tensor]:
    """Utility [R, E] of the detail of each block, and NLL [R] of the cut itself; NaN where
    an edit does not fit the budget.

    targets: next tokens, −1 where none counts. expanded: the cut, one bool [R, N_l] per level;
    block: of those that `can_flip`. reuse: False runs every cut from scratch, to the same result.
    """
    c, (R, E), N = mc.config, block_RE.shape, expanded[0].shape[1]
    flip_REN = torch.zeros(R, E, N, dtype=torch.bool, device=n_R.device).scatter(2, block_RE[..., None], True)
    raw_CN = torch.cat([expanded[0][:, None], expanded[0][:, None] ^ flip_REN], 1).flatten(0, 1)

    def each(x: Tensor) -> Tensor:
        return x.repeat_interleave(1 + E, 0)

    n = each(n_R)
    cut, fits = from_expanded([raw_CN, *map(each, expanded[1:])], n, c.block_size, c.budget, c.gists_per_block)
    entries = with_continuation(cut, n, c.horizon - 1)
    run = sharing(gpt, entries, 1 + E) if reuse and c.positions != "contiguous" else None
    out = run_entries(gpt, mc, tree.with_table(each(tree.table_BND)), each(tokens_RT), entries, run=run)
    read = read_rows(entries, c.block_size, c.horizon, 1, c.gists_per_block)
    target = each(targets_RT).gather(1, read.token_BP)
    nll = row_mean(token_losses(gpt.logits(take(out, read.slot_BP)), target), target >= 0)
    nll_RC = nll.masked_fill(~fits, torch.nan).view(R, 1 + E)
    gain_RE = nll_RC[:, :1] - nll_RC[:, 1:]
    return torch.where(expanded[0].gather(1, block_RE), -gain_RE, gain_RE), nll_RC[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# What the lens learns from them


class MeasuredEdits(NamedTuple):
    """Path edits at the end of histories of n_B tokens, and what they are worth."""

    n_B: Tensor
    block_BE: Tensor
    utility_BE: Tensor  # nats per token: NLL without the block's detail − NLL with it
    valid_BE: Tensor


def standardized(x_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """Deviation from the mean of the visible, in standard deviations of theirs; 0 where they are all
    alike. For what only compares."""
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


def edit_loss(model: MegaContext, tree: Tree, edits: MeasuredEdits, normalize: bool) -> Tensor:
    """[B] `utility_order` of the lens's logits at the end of each row's history, and the mean of that of each tail
    token's own vote: the evidence that adds up to a logit is taught one by one too."""
    n_B, block_BE, utility_BE, valid_BE = edits
    utility_BE = standardized(utility_BE, valid_BE) if normalize else utility_BE
    loss_B = sum(utility_order(x.gather(1, block_BE), utility_BE, valid_BE) for x in cursor_logits(model, tree, n_B))
    own_BTN = model.tail_votes(tree.levels[0], n_B)
    each = own_BTN.shape[1]
    own_BTE = own_BTN.gather(2, block_BE[:, None].expand(-1, each, -1))
    own_BT = utility_order(own_BTE.flatten(0, 1),
                           *(x.repeat_interleave(each, 0) for x in (utility_BE, valid_BE))).view(-1, each)
    return loss_B + own_BT.mean(1)


class Counterfactual(Arm):
    """`--mc_teacher=counterfactual`: edits of a cut of every row that has a working context, measured; of any two, the
    more useful comes first, with as much weight as the difference is worth."""

    SETTINGS = {"lens_edits": Setting(8, "edits measured in every row that has a working context, for "
                                         "--mc_teacher=counterfactual", low=2)}

    @torch.no_grad()
    def watch(self, controller: MCController, seen: Seen) -> MeasuredEdits:
        c, model, n = self.config, controller.model, seen.n_R
        logits = model.lens_logits(seen.tree.levels[0], n, tree=seen.tree)
        editable = visible_blocks(n, logits.shape[1], c.block_size, c.protected)
        expanded = draw_cut(model.allocator, editable, n, seen.rows_R, *seen.key)
        block, drawn = draw_edits(logits, can_flip(expanded, editable, n, c.block_size), c.of("lens_edits"),
                                  seen.rows_R, *seen.key)
        # from scratch: how long a shared beginning is only the host could say, and a step waits for no device
        utility, _ = edit_utilities(seen.gpt, model, seen.tree, seen.tokens_RT, seen.targets_RT, n, expanded, block,
                                    reuse=False)
        return MeasuredEdits(n, block, utility.masked_fill(~drawn, 0), drawn)

    def lens_parts(self, model: MegaContext, lesson: Lesson, asked: Asked | None) -> list[Part]:
        if (edits := lesson.watched.get("counterfactual")) is None:
            return []
        return [("counterfactual", self.config.teacher_weights()["counterfactual"],
                 edit_loss(model, lesson.tree, edits, False).mean())]

    def more_passes(self) -> float:
        return (1 + self.config.of("lens_edits")) / 3  # forward only


ARM = Counterfactual
