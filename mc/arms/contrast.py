"""`--mc_arms=contrast`: of all nodes of a row and level, the gist names its own content, the mean of what it was made
of (D5).

Gists that are all alike, or that drop what tells blocks apart, pay. Teaches GistNet and what gists are made of.

Shapes: B rows, N nodes of a level, D width.
"""

import torch
from torch import Tensor

from mc.arm import Arm, Part, Setting
from mc.arms.naming import naming, nodes_of
from mc.config import MCConfig
from mc.mega_context import Tree
from mc.model import MegaContext
from nanochat.common import UserError


def contrast_loss(tree: Tree) -> Tensor:
    """[] nats, mean over the levels with two nodes or more; 0 where there is none. What a gist is to name gets no
    gradient."""
    losses = []
    for lod in range(1, tree.shape.max_lod + 1):
        count = tree.shape.counts[lod]
        if count > 1:
            children = (tree.levels[0] if lod == 1 else nodes_of(tree, lod - 1))[
                :, : count * tree.shape.block_size
            ].detach()
            content_BND = children.unflatten(1, (count, -1)).mean(2)
            losses.append(naming(nodes_of(tree, lod), content_BND, torch.arange(count, device=content_BND.device)))
    return torch.stack(losses).mean() if losses else tree.table_BND.new_zeros(())


class Contrast(Arm):
    SETTINGS = {
        "contrast_weight": Setting(
            0.1, "weight of the gists' contrast: each names its own block's content among the row's"
        )
    }

    @classmethod
    def check(cls, config: MCConfig) -> None:
        if config.gist == "mean":
            raise UserError("--mc_contrast_weight has no effect with --mc_gist=mean, which has no weights")

    def gist_part(self, model: MegaContext, tree: Tree, hidden_RTD: Tensor) -> Part:
        return "contrast", self.config.of("contrast_weight"), contrast_loss(tree)


ARM = Contrast
