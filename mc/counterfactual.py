"""What showing a block is worth, measured: the loss with the edit and without it, many edits of a row in one pass.

A path edit of a cut shows one block that it hides, or hides one that it shows. Either way

    utility = NLL(the block's detail hidden) − NLL(the same cut with the block shown), nats per token of the continuation

so positive means that detail helps. The R rows and the 1 + E cuts of each go through the base as R · (1 + E) rows of one batch; they share
the row's tokens, embeddings and tree.

Shapes: R rows, T tokens, N blocks, E edits of a row, C = 1 + E cuts.
"""

import torch
from torch import Tensor

from mc.focus_allocator import FocusConfig, entries_needed
from mc.keyed_random import gumbel, uniform
from mc.losses import row_mean
from mc.mega_context import Tree
from mc.model import MegaContext, read_rows, run_entries, take, with_continuation
from nanochat.gpt import GPT, token_losses


def room(n_tokens: int, cfg: FocusConfig) -> int:
    """Blocks that a budget surely shows besides the tail, of a history of n_tokens: at least 1 where it is feasible."""
    tiles, deep, tail = entries_needed(n_tokens, cfg)
    return max(cfg.soft_budget - tiles - tail, 0) // max(deep, 1)


def draw_edits(logits_RN: Tensor, editable_RN: Tensor, most: int, count: int, rows_R: Tensor, *key: int | str) -> tuple[Tensor, Tensor, Tensor]:
    """A cut and edits of it, drawn by global row number and key.

    The cut shows fewer than `most` random blocks, so that any other one still fits. Half of the edits, rounded up, are of blocks that the
    lens wants (logits + Gumbel noise), the others of random ones, no block twice.
    Returns shown [R, N] bool, block [R, E] int64, and valid [R, E] bool: False where there are fewer blocks to edit. E = min(count, N).
    """
    n_blocks = logits_RN.shape[1]
    count = min(count, n_blocks)
    wanted, anyhow, order = gumbel(rows_R, 3 * n_blocks, "edits", *key).chunk(3, 1)
    rank_RN = order.masked_fill(~editable_RN, -torch.inf).argsort(1, descending=True).argsort(1)
    shown_RN = editable_RN & (rank_RN < (uniform(rows_R, 1, "cut to edit", *key) * most).long())
    first = (logits_RN + wanted).masked_fill(~editable_RN, -torch.inf).topk((count + 1) // 2, 1).indices
    rest = anyhow.masked_fill(~editable_RN, -torch.inf).scatter(1, first, -torch.inf).topk(count // 2, 1)
    block_RE = torch.cat([first, rest.indices], 1)
    return shown_RN, block_RE, torch.cat([editable_RN.gather(1, first), rest.values > -torch.inf], 1)


@torch.no_grad()
def edit_utilities(gpt: GPT, mc: MegaContext, tree: Tree, tokens_RT: Tensor, targets_RT: Tensor, n_R: Tensor, shown_RN: Tensor,
                   block_RE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Utility [R, E] of each block, NLL [R] of the cut itself, and valid [R, E]: False where the budget could not show what an edit asks for.

    targets: next tokens, −1 where none counts. shown: blocks that the cut shows besides the protected tail.
    """
    c, (R, E), N = mc.config, block_RE.shape, shown_RN.shape[1]
    flip_REN = torch.zeros(R, E, N, dtype=torch.bool, device=n_R.device).scatter(2, block_RE[..., None], True)
    wanted = torch.cat([shown_RN[:, None], shown_RN[:, None] ^ flip_REN], 1).flatten(0, 1)

    def each(x: Tensor) -> Tensor:
        return x.repeat_interleave(1 + E, 0)

    n = each(n_R)
    state = mc.allocator.allocate(torch.where(wanted, 0.0, -torch.inf), n)
    entries = with_continuation(mc.allocator.cut(state)[0], n, c.horizon - 1)
    out = run_entries(gpt, mc, tree.with_table(each(tree.table_BND)), each(tokens_RT), entries)
    read = read_rows(entries, c.block_size, c.horizon, 1, c.gists_per_block)
    target = each(targets_RT).gather(1, read.token_BP)
    nll_RC = row_mean(token_losses(gpt.logits(take(out, read.slot_BP)), target), target >= 0).view(R, 1 + E)
    done_RC = (wanted <= state.expanded[0]).all(1).view(R, 1 + E)
    change_RE = nll_RC[:, :1] - nll_RC[:, 1:]
    return torch.where(shown_RN.gather(1, block_RE), -change_RE, change_RE), nll_RC[:, 0], done_RC[:, 1:] & done_RC[:, :1]
