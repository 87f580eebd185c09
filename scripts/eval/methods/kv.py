"""Systems that read the whole history once with full attention and then decode from a part of its keys and values.

They are given what no other system is: the full prefill (its cost is counted), so that what is kept has already been in touch with the
rest. Chosen per layer and per head, in the positions where they stood.

Shapes: B rows, n tokens of history, H heads, G kv heads, S queries, E head width, P pages.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.teachers import attention_weights
from nanochat.gpt import Captured, Select
from scripts.eval.methods.interface import Cost, KVChoice, Method, kv_bytes, pass_flops, read_chosen

POOL = 5  # neighbours that share the score of a key (SnapKV)
PAGE = 16  # tokens (Quest)


class KVMethod(Method):
    arm = "full"  # the prefill is that of full context

    def show(self, history_BN: Tensor, rows_B: Tensor) -> KVChoice:
        return KVChoice(self.choose)

    def choose(self, captured: list[Captured]) -> Select:
        raise NotImplementedError

    def read(self, tokens_BT: Tensor, n: int, shown: KVChoice) -> tuple[Tensor, Tensor]:
        used_B = torch.full((len(tokens_BT),), min(self.budget, n), device=tokens_BT.device)
        return read_chosen(self.gpt, tokens_BT, n, shown), used_B

    def cost(self, n: int, H: int) -> Cost:
        entries = min(self.budget, n)
        flops = pass_flops(self.gpt, n, 0) + pass_flops(self.gpt, H, H, before=entries - 1)
        return Cost(flops + 2.0 * self.gpt.config.n_embd * self.gpt.config.n_layer * self.products(n, H), kv_bytes(self.gpt, self.held(n)))

    def products(self, n: int, H: int) -> float:
        """Pairs of a query and a key (or bound of a page) that choosing multiplies, per layer."""
        raise NotImplementedError

    def held(self, n: int) -> float:
        """Entries whose keys and values must stay in memory while decoding."""
        raise NotImplementedError


class SnapKV(KVMethod):
    """Per layer and kv head the keys that the recent tokens attend to most, pooled over neighbours, and those tokens (Li et al. 2024)."""

    name = "snapkv"

    def choose(self, captured: list[Captured]) -> Select:
        kept = [self._kept(layer) for layer in captured]

        def select(layer: int, q: Tensor, k: Tensor) -> Tensor:
            return kept[layer][:, :, None, :k.shape[2]].repeat_interleave(q.shape[1] // k.shape[1], 1)

        return select

    def _kept(self, layer: Captured) -> Tensor:
        """bool [B, G, n]."""
        n, groups = layer.k.shape[2], layer.k.shape[1]
        window = min(self.recent, n)
        if n <= self.budget:
            return torch.ones(*layer.k.shape[:3], dtype=torch.bool, device=layer.k.device)
        weights = attention_weights(layer, slice(None), slice(n - window, n))
        mass = weights.sum(2)[..., :n - window].unflatten(1, (groups, -1)).mean(2)
        pooled = F.max_pool1d(mass, POOL, stride=1, padding=POOL // 2)
        top = pooled.topk(self.budget - window, dim=-1).indices
        return F.pad(torch.zeros_like(pooled, dtype=torch.bool).scatter(-1, top, True), (0, window), value=True)

    def products(self, n: int, H: int) -> float:
        return self.recent * n

    def held(self, n: int) -> float:
        return min(self.budget, n)


class Quest(KVMethod):
    """Per layer, head and query the pages whose keys could give the highest logit, by bounds from the page's minimum and maximum of
    every channel (Tang et al. 2024), and the recent tokens. All keys and values stay in memory.

    Pages are counted back from the tail, so that the first one may be short.
    """

    name = "quest"

    def choose(self, captured: list[Captured]) -> Select:
        n = captured[0].k.shape[2]
        count = (self.budget - self.recent) // PAGE
        paged = n - (self.budget - count * PAGE)  # tokens before the tail

        def select(layer: int, q: Tensor, k: Tensor) -> Tensor:
            if n <= self.budget:
                return torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=k.device)
            missing = -paged % PAGE
            chosen = self._bounds(q, k[:, :, :paged], missing).topk(count, dim=-1).indices
            pages = torch.zeros(*q.shape[:3], (paged + missing) // PAGE, dtype=torch.bool, device=k.device).scatter(-1, chosen, True)
            return F.pad(pages.repeat_interleave(PAGE, -1)[..., missing:], (0, k.shape[2] - paged), value=True)

        return select

    @staticmethod
    def _bounds(q_BHSE: Tensor, k_BGNE: Tensor, missing: int) -> Tensor:
        """[B, H, S, P] upper bound of each query's logits in each page."""
        def pages(fill: float) -> Tensor:
            return F.pad(k_BGNE, (0, 0, missing, 0), value=fill).unflatten(2, (-1, PAGE))

        share = q_BHSE.shape[1] // k_BGNE.shape[1]
        low, high = (x.repeat_interleave(share, 1).transpose(-1, -2) for x in (pages(math.inf).amin(3), pages(-math.inf).amax(3)))
        return q_BHSE.clamp_min(0) @ high + q_BHSE.clamp_max(0) @ low

    def products(self, n: int, H: int) -> float:
        return H * 2 * n / PAGE

    def held(self, n: int) -> float:
        return n + n / PAGE  # of each page a minimum and a maximum: as much as one key and one value
