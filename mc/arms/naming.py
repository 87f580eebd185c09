"""A gist is named among its row's: the loss of the arms contrast and horizon, a cross-entropy over nodes, never over
the vocabulary.

Shapes: B rows, N nodes of a level, M gists to choose from, D width.
"""

import torch.nn.functional as F
from torch import Tensor

from mc.mega_context import Tree

TEMPERATURE = 0.1  # of cosines, the usual value of contrastive losses


def naming(query_BND: Tensor, gist_BMD: Tensor, own_N: Tensor) -> Tensor:
    """[] nats: how well query i names gist own[i] among the row's M, cross-entropy of cosines / TEMPERATURE, mean over
    all queries."""
    cosine_BNM = F.normalize(query_BND, dim=-1) @ F.normalize(gist_BMD, dim=-1).mT
    return F.cross_entropy((cosine_BNM / TEMPERATURE).flatten(0, 1), own_N.repeat(len(query_BND)))


def nodes_of(tree: Tree, lod: int) -> Tensor:
    """[B, N, D] one vector per node: the mean of its gists."""
    return tree.levels[lod].unflatten(1, (-1, tree.n_gists)).mean(2)
