"""Lexical relevance of the blocks of a history to a query: BM25 over token ids, by `bm25s` (the extra "eval").

Shapes: B rows, N tokens, C complete blocks, Q tokens of the query.
"""

import torch
from torch import Tensor

from nanochat.common import UserError


def bm25_scores(history_BN: Tensor, block_size: int, query_BQ: Tensor) -> Tensor:
    """float32 [B, C]: each row's blocks against its query, statistics from the row's own blocks. UserError without bm25s."""
    try:
        import bm25s
    except ImportError:
        raise UserError("BM25 needs the package bm25s: pip install 'megacontext[eval]'") from None
    scores = torch.zeros(len(history_BN), history_BN.shape[1] // block_size)
    for row, (history, query) in enumerate(zip(history_BN.tolist(), query_BQ.tolist())):
        blocks = [list(map(str, history[i:i + block_size])) for i in range(0, scores.shape[1] * block_size, block_size)]
        index = bm25s.BM25()
        index.index(blocks, show_progress=False)
        if known := [word for word in map(str, query) if word in index.vocab_dict]:
            scores[row] = torch.from_numpy(index.get_scores(known))
    return scores.to(history_BN.device)
