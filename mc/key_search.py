"""The lens's search over the keys of a whole history, on the host, once per refocus.

A block's score is `LensNet.focus_logits`: a sum over tail tokens of the maximum over its keys, plus a bias by distance. Up to
`flat_limit` blocks it is computed for all. Beyond, three stages, each on what the one before it kept:

    coarse   all blocks: 32 dims of every key in int8, the tokens that carry 95 % of the trust    keeps `keep_coarse`
    fine     all dims in int8, all tokens: hardly an error is left                                keeps `keep_fine`
    exact    keys read from the store

The dims are the leading principal directions of the keys seen so far, found again at every doubling of the history. Exact scores
are computed for a bounded number of blocks; the coarse stage still touches every block, at 128 bytes each (4 keys).

Why no index with sublinear cost: lens keys are sums over a quarter of a block, and what ranks high does so by many tokens at once,
each a little. There are no clusters to probe: an inverted file had to visit a third of the history for recall 0.9 at 16
(obsidian/log/2026-11-22 Searching the keys.md).

Shapes: N blocks, P keys per block, C key width, T tail tokens, M of them that are scanned.
"""

from functools import reduce
from typing import Callable

import torch
from torch import Tensor

from mc.lensnet import LensNet

PAGE = 128  # blocks encoded at a time: a fixed shape, so that codes do not depend on how the history came
COARSE_DIMS = 32
TRUSTED = 0.95  # share of the tail's trust that the coarse stage must cover
CHUNK = 16384  # blocks scanned at a time: the products stay in the cache
TOKENS = 16  # it takes tokens in steps of this: what an int8 matrix product does at once


class KeySearch:
    """The best blocks of one history of any length. Same keys, same answers: whatever the pieces in which the history grew."""

    def __init__(self, lens: LensNet, read_keys: Callable[[Tensor], Tensor], *, flat_limit: int = 1024, keep_coarse: int = 4096,
                 keep_fine: int = 512):
        """read_keys: unit keys [N, P, C] on the CPU of blocks int64 [N], any float dtype (`Store.keys`). Limits in blocks."""
        if flat_limit < 1 or flat_limit % PAGE:
            raise ValueError(f"flat_limit={flat_limit} must be a positive multiple of {PAGE}")
        self.lens, self.read_keys = lens, read_keys
        self.flat_limit, self.keep_coarse, self.keep_fine = flat_limit, keep_coarse, keep_fine
        self.n_blocks = 0
        self.n_exact = 0  # blocks that the last `top` scored exactly
        self._dtype = lens.distance_steps.dtype
        self._flat = torch.empty(flat_limit, lens.config.n_keys, lens.config.key_dim, dtype=self._dtype)
        self._fitted = 0  # blocks that the directions were found from: flat_limit · 2^i, or 0 while all is flat
        self._encoded = 0  # blocks in the codes: whole pages; the rest is always scored exactly

    @torch.inference_mode()
    def grow(self, n_blocks: int) -> None:
        """The history now has n_blocks ≥ before; what is new is read. Encoding costs a matrix product per page, and all over
        again at each doubling of the history: amortized a constant per block."""
        if n_blocks < self.n_blocks:
            raise ValueError(f"{n_blocks} blocks after {self.n_blocks}: use truncate")
        if self.n_blocks < self.flat_limit:
            new = torch.arange(self.n_blocks, min(n_blocks, self.flat_limit))
            self._flat[new] = self.read_keys(new).to(self._dtype)
        self.n_blocks = n_blocks
        self._encode()

    @torch.inference_mode()
    def truncate(self, n_blocks: int) -> None:
        """Forget all blocks from n_blocks on: they are gone, or have changed and will be read by the next `grow`."""
        if not 0 <= n_blocks <= self.n_blocks:
            raise ValueError(f"cannot truncate {self.n_blocks} blocks to {n_blocks}")
        self.n_blocks, self._encoded = n_blocks, min(self._encoded, n_blocks // PAGE * PAGE)
        self._encode()

    @torch.inference_mode()
    def top(self, tail_BTD: Tensor, cursor: int, m: int, also_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The m best blocks (or all) and `also_I`: indices int64 [I], ascending, each once, and their focus logits [I].

        tail_BTD [1, T, D] and cursor: as `LensNet.focus_logits` takes them. ValueError unless the index holds the cursor's blocks.
        """
        if (blocks := cursor // self.lens.config.block_size) != self.n_blocks:
            raise ValueError(f"{cursor} tokens hold {blocks} blocks, the index has {self.n_blocks}: grow it first")
        tail = self.lens.config.tail
        queries, trust = (x[0, -tail:].cpu() for x in self.lens.queries(tail_BTD))
        weight_T = trust[:, 0] * self.lens.log_gain.exp().cpu()
        also_I = torch.empty(0, dtype=torch.int64) if also_I is None else also_I.cpu().long()
        if self._fitted:
            found = self._scan(queries, weight_T)
            index_I = torch.cat([found, torch.arange(self._encoded, self.n_blocks), also_I]).unique()
            keys_NPC = self.read_keys(index_I).to(self._dtype)
        else:
            index_I = torch.arange(self.n_blocks)
            keys_NPC = self._flat[:self.n_blocks]
        self.n_exact = len(index_I)
        votes = (keys_NPC.flatten(0, 1) @ queries.T).unflatten(0, keys_NPC.shape[:2]).amax(1) @ weight_T
        logits_I = votes + self.lens.distance(torch.tensor([cursor]), index_I)[0]
        chosen = torch.zeros(len(index_I), dtype=torch.bool)
        chosen[logits_I.topk(min(m, len(index_I))).indices] = True
        chosen[torch.searchsorted(index_I, also_I)] = True
        return index_I[chosen], logits_I[chosen]

    # -- codes ------------------------------------------------------------------------------------------------------------

    def _encode(self) -> None:
        """Bring directions and codes up to date with n_blocks: both a function of the keys alone."""
        wanted = 0
        if self.n_blocks > self.flat_limit:
            wanted = self.flat_limit << ((self.n_blocks - 1) // self.flat_limit).bit_length() - 1
        if wanted != self._fitted:
            self._fitted, self._encoded = wanted, 0
            self._fit()
        for start in range(self._encoded, self.n_blocks // PAGE * PAGE if wanted else 0, PAGE):
            keys = self.read_keys(torch.arange(start, start + PAGE)).float()
            codes = (127 * (keys.flatten(0, 1) @ self._directions)).round().to(torch.int8).unflatten(0, keys.shape[:2])
            self._coarse[:, start:start + PAGE] = codes[..., :COARSE_DIMS].transpose(0, 1)
            self._fine[start:start + PAGE] = codes
            self._encoded = start + PAGE

    def _fit(self) -> None:
        """Principal directions of a sample of the first `_fitted` blocks, and room for codes until the next doubling."""
        P, C = self._flat.shape[1:]
        capacity = 2 * self._fitted
        if not self._fitted:
            self._directions = self._coarse = self._fine = self._bias = None
            return
        sample = self.read_keys(torch.arange(0, self._fitted, self._fitted // self.flat_limit)).double().flatten(0, 1)
        self._directions = torch.linalg.eigh(sample.T @ sample).eigenvectors.flip(1).float().contiguous()
        self._coarse = torch.empty(P, capacity, min(COARSE_DIMS, C), dtype=torch.int8)
        self._fine = torch.empty(capacity, P, C, dtype=torch.int8)
        farthest = torch.tensor([capacity * self.lens.config.block_size])
        self._bias = self.lens.distance(farthest, torch.arange(capacity))[0].float()  # by distance, the farthest first

    # -- scanning ---------------------------------------------------------------------------------------------------------

    def _scan(self, queries_TC: Tensor, weight_T: Tensor) -> Tensor:
        """int64 [≤ keep_fine]: encoded blocks that look best."""
        weight, order = weight_T.float().sort(descending=True)
        enough = int((weight.cumsum(0) < TRUSTED * weight.sum()).sum()) + 1
        tokens = min(-(-enough // TOKENS) * TOKENS, len(order))
        queries = queries_TC[order].float() @ self._directions
        n, begin = self._encoded, len(self._bias) - self.n_blocks
        bias_N, score_N = self._bias[begin:begin + n], torch.empty(n)
        codes, scale = quantized(queries[:tokens, :self._coarse.shape[-1]], weight[:tokens])
        products = torch.empty(2, CHUNK, tokens, dtype=torch.int32)
        for start in range(0, n, CHUNK):
            chunk = slice(start, min(start + CHUNK, n))
            best, other = products[:, :chunk.stop - start]
            torch._int_mm(self._coarse[0, chunk], codes, out=best)
            for keys in self._coarse[1:, chunk]:
                torch.maximum(best, torch._int_mm(keys, codes, out=other), out=best)
            torch.addmv(bias_N[chunk], best.float(), scale, out=score_N[chunk])
        kept = score_N.topk(min(self.keep_coarse, n), sorted=False).indices
        codes, scale = quantized(queries, weight)
        fine = self._fine.index_select(0, kept)
        best = reduce(torch.maximum, torch._int_mm(fine.flatten(0, 1), codes).unflatten(0, fine.shape[:2]).unbind(1))
        return kept[torch.addmv(bias_N[kept], best.float(), scale).topk(min(self.keep_fine, len(kept)), sorted=False).indices]


def quantized(queries_MC: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor]:
    """Queries as int8 [C, M], and what their products with codes of unit keys times 127 must be multiplied with [M]."""
    scale_M1 = queries_MC.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (queries_MC / scale_M1).round().to(torch.int8).T.contiguous(), weight_M * scale_M1[:, 0] / 127
