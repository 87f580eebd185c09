"""Systems that show raw tokens: all, the last ones, or whole blocks that a retriever chose.

Positions. Text that is pasted together is read as one prompt, positions in order: sliding window and sinks (StreamingLLM numbers
positions within its cache, Xiao et al. 2023; here what is kept is read afresh), retrieved blocks (RAG). Blocks chosen by the lens keep
their global positions, as in a working context, so that this system differs from gists + lens by the gists alone.

Shapes: B rows, n tokens of history, C blocks that may be chosen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.keyed_random import gumbel
from scripts.eval.bm25 import bm25_scores
from scripts.eval.methods.interface import Cost, Method, View, best, kv_bytes, lens_flops, pack, pass_flops

SINKS = 4  # first tokens that StreamingLLM keeps


class FullContext(Method):
    """The whole history, windows lifted: the one system without a budget."""

    name = "full"

    def show(self, history_BN: Tensor, rows_B: Tensor) -> View:
        return pack(torch.ones_like(history_BN, dtype=torch.bool), history_BN.shape[1], prompt=True)

    def cost(self, n: int, H: int) -> Cost:
        return Cost(pass_flops(self.gpt, n + H - 1, H), kv_bytes(self.gpt, n))


class SlidingWindow(Method):
    name = "window"
    sinks = 0

    def show(self, history_BN: Tensor, rows_B: Tensor) -> View:
        place = torch.arange(history_BN.shape[1], device=history_BN.device)
        keep = (place < self.sinks) | (place >= history_BN.shape[1] - self.budget + self.sinks)
        return pack(keep.expand(history_BN.shape), self.budget, prompt=True)


class WindowAndSinks(SlidingWindow):
    """StreamingLLM: the first tokens and the last."""

    name = "sinks"
    sinks = SINKS


class Blocks(Method):
    """As many whole blocks as fit before the recent tokens, the best by `scores`; entries that are left over go to the tail."""

    prompt = True

    def scores(self, history_BN: Tensor, rows_B: Tensor) -> Tensor:
        """[B, C]: at least the blocks that lie before the tail."""
        raise NotImplementedError

    def show(self, history_BN: Tensor, rows_B: Tensor) -> View:
        n, K = history_BN.shape[1], self.block_size
        count = (self.budget - self.recent) // K
        tail = self.budget - count * K
        if n <= self.budget:
            return pack(torch.ones_like(history_BN, dtype=torch.bool), n, self.prompt)
        chosen = best(self.scores(history_BN, rows_B)[:, :(n - tail) // K], count)
        keep = F.pad(chosen.repeat_interleave(K, 1), (0, n - chosen.shape[1] * K))
        return pack(keep | (torch.arange(n, device=keep.device) >= n - tail), self.budget, self.prompt)


class RandomBlocks(Blocks):
    name = "random_blocks"

    def scores(self, history_BN: Tensor, rows_B: Tensor) -> Tensor:
        return gumbel(rows_B, history_BN.shape[1] // self.block_size, self.seed, "random blocks")


class BM25Blocks(Blocks):
    """Lexical retrieval with the recent tokens as the query."""

    name = "bm25"

    def scores(self, history_BN: Tensor, rows_B: Tensor) -> Tensor:
        return bm25_scores(history_BN, self.block_size, history_BN[:, -self.recent:])


class MeanEmbeddingBlocks(Blocks):
    """Dense retrieval without training: cosine of mean embeddings, of a block and of the recent tokens."""

    name = "dense_mean"

    def scores(self, history_BN: Tensor, rows_B: Tensor) -> Tensor:
        embeds, K = self.gpt.embed(history_BN), self.block_size
        blocks = embeds[:, :embeds.shape[1] // K * K].unflatten(1, (-1, K)).mean(2)
        return F.cosine_similarity(blocks, embeds[:, -self.recent:].mean(1, keepdim=True), dim=-1)

    def choosing_flops(self, n: int) -> float:
        return self.gpt.config.n_embd * (n + 2.0 * n / self.block_size)


class LearnedRetrieverBlocks(Blocks):
    """Dense retrieval by LensNet: taught by the same labels as the lens, the same blocks, no gists."""

    name = "dense_learned"
    needs = ("mc",)
    looks = True
    prompt = False

    def scores(self, history_BN: Tensor, rows_B: Tensor) -> Tensor:
        n_B = torch.full((len(history_BN),), history_BN.shape[1], device=history_BN.device)
        return self.models.mc.lens_logits(self.gpt.embed(history_BN), n_B)

    def choosing_flops(self, n: int) -> float:
        return lens_flops(self.models.mc, n)
