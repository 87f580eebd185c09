"""`--mc_arms=placed`: every n-th of the rows that have a working context is read by the LM once more, at that working
context's positions (C9).

A token stands where the entry stands that holds it: the tokens under a gist all at its centre, damped by its width, the
older part of a row as far away as a far history pushes it. Of a row's variants the primary one's positions count (C15).
The pass runs on the embeddings that the LM pass ran on, and its loss counts as these rows do there.

Shapes: R rows with a working context, S of them that are read again, T tokens, M entries, D width.
"""

import torch
from torch import Tensor

from mc.arm import Arm, Part, Setting
from mc.config import MCConfig
from mc.far_history import FarHistory, place_far
from mc.gaussian_rope import entry_rotary
from mc.losses import row_mean
from mc.model import Entries
from mc.runtime import MCController, Seen
from mc.working_context import width
from nanochat.common import UserError
from nanochat.gpt import GPT, token_losses


def token_rotary(gpt: GPT, config: MCConfig, entries: Entries, T: int, start_SM: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [S, T, 1, F] of a row's tokens, at the places of the entries that hold them; tokens behind the last
    entry at their own.

    start_SM: where each entry stands, in tokens of the row; without a far history that is where it begins.
    """
    lod, index, valid, _ = entries
    length = width(lod, config.block_size, config.gists_per_block)
    token_ST = torch.arange(T, device=lod.device).expand(len(lod), T).contiguous()
    first_SM = torch.where(valid, index * length, T)
    slot_ST = torch.searchsorted(first_SM, token_ST, right=True) - 1
    held_ST = (token_ST < (first_SM + length).gather(1, slot_ST))[..., None, None]
    placed = entry_rotary(gpt, start_SM, length * valid, scheme=config.positions, floor=config.damping_floor)
    cos, sin = (
        torch.where(held_ST, x.gather(1, slot_ST[..., None, None].expand(-1, -1, *x.shape[2:])), own)
        for x, own in zip(placed, gpt.rotary(token_ST))
    )
    return cos, sin


class Placed(Arm):
    SETTINGS = {
        "placed_stride": Setting(
            4, "every how many of the rows with a working context the LM reads at its positions too", low=1
        )
    }

    def begin(self, controller: MCController) -> None:
        c = self.config
        rows = controller.micro_batch // c.row_stride
        if rows % c.of("placed_stride"):
            raise UserError(
                f"--mc_placed_stride={c.of('placed_stride')} does not divide the {rows} rows of a micro-batch that "
                f"have a working context"
            )
        self.length = controller.T / (c.budget + c.horizon - 1)

    def lm_part(self, seen: Seen, embeds_RTD: Tensor, primary: Entries, far: FarHistory | None) -> Part:
        c, chosen = self.config, slice(None, None, self.config.of("placed_stride"))
        entries = Entries(*(x[chosen] for x in primary))
        tokens, targets = seen.tokens_RT[chosen], seen.targets_RT[chosen]
        start = entries.index_BM * width(entries.lod_BM, c.block_size, c.gists_per_block)
        if far is not None:
            first = slice(0, len(embeds_RTD), c.of("placed_stride"))  # it is the same for each variant of a row
            cut = far.cut._replace(lod_BW=far.cut.lod_BW[first], index_BW=far.cut.index_BW[first],
                                   valid_BW=far.cut.valid_BW[first])
            start, *_ = place_far(start, FarHistory(cut, *(x[first] for x in far[1:])))
        rotary = token_rotary(seen.gpt, c, entries, tokens.shape[1], start)
        hidden = seen.gpt.hidden(tokens, inputs_embeds=embeds_RTD[chosen], rotary=rotary)
        loss_S = row_mean(token_losses(seen.gpt.logits(hidden), targets), targets >= 0)
        return "placed", 1 / (c.row_stride * c.of("placed_stride")), loss_S.mean()

    def more_passes(self) -> float:
        return self.length / self.config.of("placed_stride")  # its entries are the row's tokens


ARM = Placed
