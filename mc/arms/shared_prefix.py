"""What many passes have in common from their start on is run once: keys and values depend on nothing that follows.

`sharing`: cuts of a row that differ in one place. The entries that an edited cut has in common with the cut it was made
from keep the keys and values of that cut's pass, and only what follows is run. Positions must be those of the tokens:
under `contiguous` the number of entries decides where each stands, and nothing is shared.
`continuation_from_cache`: a continuation that is differentiated behind a history that is not.

Shapes: R rows, C = R · each cuts, the one that the others were made from first, M entries, S of them run, A cuts of a
pass, D width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.model import Entries
from mc.teachers import keep_gradients
from nanochat.gpt import GPT, Captured, GPTConfig, token_losses
from nanochat.kv_cache import KVCache

PASSES = 8  # cuts are run in so many passes, those that share most first: a pass is as long as its longest


class BiasedCache(KVCache):
    """A KV cache that knows the logit bias of every slot beforehand. bias [B, slots]."""

    def __init__(self, config: GPTConfig, bias_BM: Tensor, dtype: torch.dtype):
        super().__init__(config, *bias_BM.shape, bias_BM.device, dtype)
        self.config, self.bias_BM, self.ragged = config, bias_BM, True

    def mask(self, slots_BS: Tensor, reach: float) -> Tensor:
        """Float [B, 1, S, used + S] to add to the logits: the key's bias, −inf for keys that an entry may not see."""
        seen = super().mask(slots_BS, reach)
        return torch.where(seen, self.visible(self.bias_BM, slots_BS.shape[1])[:, None, None], -torch.inf)

    def branch(self, rows_A: Tensor, first_A: Tensor, bias_AM: Tensor) -> "BiasedCache":
        """A cache of its own that begins with the first entries of some rows."""
        new, kept = BiasedCache(self.config, bias_AM, self.k.dtype), int(first_A.max())
        for name in ("k", "v", "k_unshifted", "x_unsmeared"):
            mine, theirs = getattr(self, name), getattr(new, name)
            if mine is not None:
                row = mine.ndim - 4 if name != "x_unsmeared" else 0
                theirs.narrow(row + 1, 0, kept).copy_(mine.narrow(row + 1, 0, kept).index_select(row, rows_A))
        new.lengths, new.used = first_A, kept
        return new


def shared_entries(entries: Entries, each: int) -> Tensor:
    """[C] how many entries of each cut, from its first on, are those of its row's first cut: at most all before its
    last one, from which on predictions are read."""
    same_CM = torch.ones_like(entries.valid_BM)
    for x_CM in entries[:3]:
        x_REM = x_CM.unflatten(0, (-1, each))
        same_CM = same_CM & (x_REM == x_REM[:, :1]).flatten(0, 1)
    return torch.minimum(same_CM.long().cumprod(1).sum(1), entries.used_B - 1).clamp_min(0)


def sharing(gpt: GPT, entries: Entries, each: int) -> Callable[..., Tensor]:
    """What `run_entries` may run these cuts with in place of `gpt.hidden`: R rows of `each` cuts, one after another."""

    def hidden(ids_CM: Tensor, *, inputs_embeds: Tensor, rotary: tuple[Tensor, Tensor], linked: Tensor,
               key_bias: Tensor) -> Tensor:
        end_C, first_C = entries.valid_BM.sum(1), shared_entries(entries, each)
        inputs = dict(idx=ids_CM, inputs_embeds=inputs_embeds, cos=rotary[0], sin=rotary[1], linked=linked)

        def run(cache: BiasedCache, cuts_A: Tensor, slot_AS: Tensor) -> Tensor:
            x = {name: value[cuts_A[:, None], slot_AS.clamp_max(value.shape[1] - 1)] for name, value in inputs.items()}
            return gpt.hidden(x.pop("idx"), rotary=(x.pop("cos"), x.pop("sin")), cache=cache, **x)

        C, M = ids_CM.shape
        slot_M, cut_C = torch.arange(M, device=ids_CM.device), torch.arange(C, device=ids_CM.device)
        trunk_R = cut_C[::each]
        trunk = BiasedCache(gpt.config, key_bias[::each], inputs_embeds.dtype)
        out_CMD = run(trunk, trunk_R, slot_M.expand(len(trunk_R), -1)).repeat_interleave(each, 0)
        edited = cut_C[cut_C % each > 0]
        for cuts_A in edited[first_C[edited].argsort(descending=True)].chunk(PASSES):
            first_A, end_A = first_C[cuts_A], end_C[cuts_A]
            slot_AS = first_A[:, None] + torch.arange(int((end_A - first_A).max()), device=ids_CM.device)
            room = max(int(first_A.max()) + slot_AS.shape[1] - M, 0)
            cache = trunk.branch(cuts_A // each, first_A, F.pad(key_bias[cuts_A], (0, room)))
            found_ASD, there_AS = run(cache, cuts_A, slot_AS), slot_AS < end_A[:, None]
            row_AS = cuts_A[:, None].expand_as(slot_AS)
            out_CMD[row_AS[there_AS], slot_AS[there_AS]] = found_ASD[there_AS].to(out_CMD.dtype)
        return out_CMD

    return hidden


class FrozenCache(KVCache):
    """Reads what a cache of equally long rows holds and keeps what is new beside it: its passes can be differentiated.
    One pass, behind one entry at least."""

    def __init__(self, cache: KVCache):
        self.__dict__.update(cache.__dict__)
        self.new: dict[int, Tensor] = {}  # by the address of the buffer that it would go into

    def slots_for(self, count: int) -> tuple[Tensor, Tensor]:
        slots = self.lengths[:, None] + torch.arange(count, device=self.lengths.device)
        return slots, slots - 1

    def put(self, buffer_BM: Tensor, slots_BS: Tensor, new_BS: Tensor) -> None:
        self.new[buffer_BM.data_ptr()] = new_BS

    def at(self, buffer_BM: Tensor, slots_BS: Tensor) -> Tensor:
        return self.visible(buffer_BM, slots_BS.shape[1])[:, self.used - 1:-1]

    def visible(self, buffer_BM: Tensor, count: int) -> Tensor:
        new_BS = self.new[buffer_BM.data_ptr()]
        return torch.cat([buffer_BM[:, :self.used].to(new_BS.dtype), new_BS], 1)


def continuation_from_cache(gpt: GPT, tokens_BT: Tensor, targets_BT: Tensor, n: int) -> list[Captured]:
    """As `mc.teachers.continuation_pass`, for queries from n − 1 on, at about half its cost: the tokens before are read
    without a graph, and no gradient is taken through them. n ≥ 2."""
    first, embeds = n - 1, gpt.embed(tokens_BT).detach()
    with torch.no_grad():
        cache = KVCache(gpt.config, len(tokens_BT), first, embeds.device, embeds.dtype)
        gpt.hidden(tokens_BT[:, :first], inputs_embeds=embeds[:, :first], cache=cache, lift_windows=True)
    captured: list[Captured] = []
    with torch.enable_grad():
        last = embeds[:, first:].clone().requires_grad_()
        hidden = gpt.hidden(tokens_BT[:, first:], inputs_embeds=last, cache=FrozenCache(cache), capture=captured,
                            lift_windows=True)[:, :-1]
        keep_gradients(captured)
        torch.autograd.grad(token_losses(gpt.logits(hidden), targets_BT[:, first:-1]).sum(), last)
    return [_from_the_start(layer, first) for layer in captured]


def _from_the_start(layer: Captured, first: int) -> Captured:
    """With zeros for the queries before, so that a query's number is its token's."""
    q, y, gradient = (F.pad(x.detach(), (0, 0, first, 0)) for x in (layer.q, layer.y, layer.y.grad))
    y.grad = gradient
    return Captured(q, layer.k.detach(), layer.v.detach(), y)
