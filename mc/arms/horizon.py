"""`--mc_arms=horizon`: of all nodes of a row and level, the base's hidden state at the end of node i names the gist of
node i + 1, through a small head (D3): gists hold what can be foreseen, and the base foresees it. Teaches the head, base
and GistNet.

Where the next node cannot be foreseen at all, nothing gets the loss below the logarithm of the nodes that the hidden
state has not seen yet.

Shapes: B rows, T tokens, N nodes of a level, D width.
"""

import sys

import torch
from torch import Tensor

from mc.arm import Arm, Part, Setting
from mc.arms.naming import naming, nodes_of
from mc.mega_context import Tree
from mc.model import MegaContext
from mc.runtime import MCController
from nanochat.common import print0

HORIZON_LODS = (1, 2)


class HorizonHead(torch.nn.Module):
    """Per level a matrix from hidden states to the gist of the node that follows."""

    def __init__(self, d_model: int, max_lod: int):
        super().__init__()
        self.levels = torch.nn.ModuleList(torch.nn.Linear(d_model, d_model, bias=False) for _ in HORIZON_LODS[:max_lod])

    def loss(self, hidden_BTD: Tensor, tree: Tree) -> Tensor:
        """[] nats, mean over LOD1 and LOD2 as far as a row has two nodes of them; 0 where it has not. hidden: of the LM
        pass."""
        losses = []
        for lod, head in zip(HORIZON_LODS, self.levels):
            count, width = tree.shape.counts[lod], tree.shape.block_size**lod
            if count > 1:
                ends_BND = hidden_BTD[:, width - 1 : (count - 1) * width : width]
                losses.append(
                    naming(head(ends_BND), nodes_of(tree, lod), torch.arange(1, count, device=ends_BND.device))
                )
        return torch.stack(losses).mean() if losses else hidden_BTD.new_zeros(())


class Horizon(Arm):
    SETTINGS = {
        "horizon_gist_weight": Setting(
            0.1,
            "weight of the horizon loss: the base's hidden state at a node's "
            "end names the next node's gist among the row's, at LOD1 and LOD2 "
            "as far as a row has two nodes of them",
        )
    }

    def build(self, model: MegaContext, d_model: int) -> None:
        model.horizon_head = HorizonHead(d_model, self.config.max_lod)

    def begin(self, controller: MCController) -> None:
        K, T = self.config.block_size, controller.T
        if few := [lod for lod in HORIZON_LODS[: self.config.max_lod] if T // K**lod < 2]:
            print0(
                f"note: --mc_horizon_gist_weight={self.config.of('horizon_gist_weight')} teaches nothing at "
                f"LOD{few[0]}, of which a row of {T} tokens has fewer "
                f"than two nodes; it would with a --max_seq_len of {2 * K ** few[0]}",
                file=sys.stderr,
            )

    def gist_part(self, model: MegaContext, tree: Tree, hidden_RTD: Tensor) -> Part:
        return "horizon_gist", self.config.of("horizon_gist_weight"), model.horizon_head.loss(hidden_RTD, tree)


ARM = Horizon
