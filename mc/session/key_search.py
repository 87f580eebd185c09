"""The lens's search over the keys of a whole history, on the host, once per refocus.

A block's score is `LensNet.focus_logits`: a sum over tail tokens of the maximum over its keys, plus a bias by distance.
Up to `flat_limit` blocks it is computed for all. Beyond, a scan in int8 of every block proposes `keep` candidates,
whose exact scores are computed from keys read from the store.

A code is a key in 63 of its dims (the leading principal directions of the keys so far, found again at every doubling of
the history), and the length of what they leave of it. A query's last coordinate is a share of what they leave of the
query: a block that is unlike the rest of the history, a fact in a long text say, is given the benefit of the doubt.
Without it such blocks were lost.

Exact scores are bounded in number; the scan touches 64 bytes per key. There is no index of sublinear cost: lens keys
are sums over a quarter of a block and what ranks high does so by many tokens at once, each a little, so there are no
clusters to probe. An inverted file had to visit half of a million tokens for what this finds
(obsidian/log/2026-11-22 Searching the keys.md).

Shapes: N blocks, P keys per block, C key width, T tail tokens, M of them that are scanned.
"""

from typing import Callable

import torch
from torch import Tensor

from mc.lensnet import LensNet

PAGE = 64  # blocks encoded at a time: a fixed shape, so that codes do not depend on how the history came
DIMS = 63
DOUBT = 0.25  # cosine that the unseen parts of a query and a key are taken to have
TRUSTED = 0.9  # share of the tail's trust that the scan must cover
CHUNK = 16384  # blocks scanned at a time: the products stay in the cache
TOKENS = 8  # it takes tokens in steps of this: what an int8 matrix product does at once


class KeySearch:
    """The best blocks of one history of any length. Same keys, same answers: whatever the
    pieces in which the history grew."""

    def __init__(self, lens: LensNet, read_keys: Callable[[Tensor], Tensor], *, flat_limit: int = 1024,
                 keep: int = 1024):
        """read_keys: unit keys [N, P, C] on the CPU of blocks int64 [N], any float dtype
        (`Store.keys`). Limits in blocks."""
        if flat_limit < 1 or flat_limit % PAGE:
            raise ValueError(f"flat_limit={flat_limit} must be a positive multiple of {PAGE}")
        self.lens, self.read_keys = lens, read_keys
        self.flat_limit, self.keep = flat_limit, keep
        self.n_blocks = 0
        self.n_exact = 0  # blocks that the last `top` scored exactly
        self._dtype = lens.distance_steps.dtype
        self._flat = torch.empty(flat_limit, lens.config.n_keys, lens.config.key_dim, dtype=self._dtype)
        self._fitted = 0  # blocks that the directions were found from: flat_limit · 2^i, or 0 while all is flat
        self._encoded = 0  # blocks in the codes: whole pages; the rest is always scored exactly

    @torch.inference_mode()
    def grow(self, n_blocks: int) -> None:
        """The history now has n_blocks ≥ before; what is new is read. Encoding costs a matrix
        product per page, and all over
        again at each doubling of the history: amortized a constant per block."""
        if n_blocks < self.n_blocks:
            raise ValueError(f"{n_blocks} blocks after {self.n_blocks}: a history only grows; make a new index")
        if self.n_blocks < self.flat_limit:
            # kept when codes have taken over: `truncate` may come back below the limit
            new = torch.arange(self.n_blocks, min(n_blocks, self.flat_limit))
            self._flat[new] = self.read_keys(new).to(self._dtype)
        self.n_blocks = n_blocks
        self._encode()

    @torch.inference_mode()
    def top(self, tail_BTD: Tensor, cursor: int, m: int, also_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The m best blocks (or all) and `also_I`: indices int64 [I], ascending, each once, and their focus logits [I].

        tail_BTD [1, T, D] and cursor: as `LensNet.focus_logits` takes them. ValueError unless the
        index holds the cursor's blocks.
        """
        if (blocks := cursor // self.lens.config.block_size) != self.n_blocks:
            raise ValueError(f"{cursor} tokens hold {blocks} blocks, the index has {self.n_blocks}: grow it first")
        tail = self.lens.config.tail
        queries, trust = (x[0, -tail:].cpu() for x in self.lens.queries(tail_BTD))
        weight_T = trust[:, 0] * (self.lens.log_gain.exp() * self.lens.age_weights(len(trust))).cpu()
        also_I = torch.empty(0, dtype=torch.int64) if also_I is None else also_I.cpu().long()
        if self._fitted:
            # codes rank roughly: more than m are found, for exact scores to choose among
            found = self._scan(queries, weight_T, max(self.keep, 2 * m))
            index_I = torch.cat([found, torch.arange(self._encoded, self.n_blocks), also_I]).unique()
            keys_NPC = self.read_keys(index_I).to(self._dtype)
        else:
            index_I = torch.arange(self.n_blocks)
            keys_NPC = self._flat[:self.n_blocks]
        self.n_exact = len(index_I)
        votes = (keys_NPC.flatten(0, 1) @ queries.T).unflatten(0, keys_NPC.shape[:2]).amax(1) @ weight_T
        logits_I = votes + self._distance(cursor, index_I)
        chosen = torch.zeros(len(index_I), dtype=torch.bool)
        chosen[logits_I.topk(min(m, len(index_I))).indices] = True
        chosen[torch.searchsorted(index_I, also_I)] = True
        return index_I[chosen], logits_I[chosen]

    # -- codes ------------------------------------------------------------------------------------------------------------  # noqa: E501

    def _encode(self) -> None:
        """Bring directions and codes up to date with n_blocks: both a function of the keys alone."""
        wanted = 0
        if self.n_blocks > self.flat_limit:
            # of the last doubling, not of now: the pieces in which the history grew make no difference
            wanted = self.flat_limit << ((self.n_blocks - 1) // self.flat_limit).bit_length() - 1
        if wanted != self._fitted:
            self._fitted, self._encoded = wanted, 0
            self._fit()
        for start in range(self._encoded, self.n_blocks // PAGE * PAGE if wanted else 0, PAGE):
            keys = self.read_keys(torch.arange(start, start + PAGE)).float()
            codes = coordinates(keys.flatten(0, 1), self._directions)
            self._codes[:, start:start
                        + PAGE] = (127 * codes).round().to(torch.int8).unflatten(0, keys.shape[:2]).transpose(0, 1)
            self._encoded = start + PAGE

    def _fit(self) -> None:
        """Principal directions of a sample of the first `_fitted` blocks, and room for
        codes until the next doubling."""
        if not self._fitted:
            self._directions = self._codes = self._bias = None
            return
        # as many blocks whatever the length, from all parts of it
        sample = self.read_keys(torch.arange(0, self._fitted, self._fitted // self.flat_limit)).double().flatten(0, 1)
        self._directions = torch.linalg.eigh(sample.T @ sample).eigenvectors.flip(1)[:, :DIMS].float().contiguous()
        capacity = 2 * self._fitted
        self._codes = torch.empty(self._flat.shape[1], capacity, self._directions.shape[1] + 1, dtype=torch.int8)
        # by distance, the farthest first
        self._bias = self._distance(capacity * self.lens.config.block_size, torch.arange(capacity)).float()

    def _distance(self, cursor: int, index_N: Tensor) -> Tensor:
        """[N] on the CPU: the lens's bias of blocks by their distance to the cursor."""
        return self.lens.distance(torch.tensor([cursor]), index_N)[0].cpu()

    # -- scanning ---------------------------------------------------------------------------------------------------------  # noqa: E501

    def _scan(self, queries_TC: Tensor, weight_T: Tensor, count: int) -> Tensor:
        """int64 [≤ count]: encoded blocks that look best."""
        weight, order = weight_T.float().sort(descending=True)
        enough = int((weight.cumsum(0) < TRUSTED * weight.sum()).sum()) + 1
        tokens = min(-(-enough // TOKENS) * TOKENS, len(order))
        queries = coordinates(queries_TC[order[:tokens]].float(), self._directions)
        queries[:, -1] *= DOUBT
        scale_M1 = queries.abs().amax(1, keepdim=True) / 127
        codes = (queries / scale_M1).round().to(torch.int8).T.contiguous()
        scale = weight[:tokens] * scale_M1[:, 0] / 127
        # the bias depends on the distance alone: one table serves every cursor
        n, begin = self._encoded, len(self._bias) - self.n_blocks
        bias_N, score_N = self._bias[begin:begin + n], torch.empty(n)
        products = torch.empty(2, CHUNK, tokens, dtype=torch.int32)
        for start in range(0, n, CHUNK):
            chunk = slice(start, min(start + CHUNK, n))
            best, other = products[:, :chunk.stop - start]
            # the maximum over a block's keys is that of integers: a token's scale is one for all of them
            torch._int_mm(self._codes[0, chunk], codes, out=best)
            for keys in self._codes[1:, chunk]:
                torch.maximum(best, torch._int_mm(keys, codes, out=other), out=best)
            torch.addmv(bias_N[chunk], best.float(), scale, out=score_N[chunk])
        return score_N.topk(min(count, n), sorted=False).indices


def coordinates(x_NC: Tensor, directions: Tensor) -> Tensor:
    """[N, d + 1] of unit vectors along d orthonormal directions [C, d], and the length of the rest."""
    along = x_NC @ directions
    return torch.cat([along, (1 - along.square().sum(1, keepdim=True)).clamp_min(0).sqrt()], 1)
