"""What the raw tokens of a block are worth: ΔNLL sensitivity, measured with the model on the history itself.

Sensitivity of block b = NLL of the tokens of block b+1 with b shown as its gist − the same with b shown raw [nats per
token], both after the gists of the CONTEXT blocks before. A measure of what stands nearby, and cheap: two short
passes for many blocks at once.

Shapes: N blocks, K block size, D width, C gists in front, S entries of a pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.gaussian_rope import entry_rotary
from mc.store.catalog import Catalog
from mc.store.history import History
from mc.store.ram import VOID

CONTEXT = 8  # gists in front
TOGETHER = 128  # blocks per pass


@torch.no_grad()
def following_nll(history: History, block_N: Tensor, raw: bool) -> Tensor:
    """[N] NLL of the block after each, in nats per token, with the block itself raw or as its gist. The blocks, and the
    CONTEXT before and the one after each, are there and have no void slots."""
    gpt, mc, K, c = history.gpt, history.mc, history.block_size, history.mc.config
    before_NC = block_N[:, None] + torch.arange(-CONTEXT, 0)
    after_NK = (block_N[:, None] + 1) * K + torch.arange(K)
    middle = (block_N[:, None] * K + torch.arange(K), 0) if raw else (block_N[:, None], 1)
    index_NS = torch.cat([before_NC, middle[0], after_NK], 1)
    lod_NS = torch.cat([torch.ones_like(before_NC), torch.full_like(middle[0], middle[1]), torch.zeros_like(after_NK)],
                       1)
    is_gist_NS = lod_NS == 1
    ids_NS = torch.full_like(index_NS, VOID)
    ids_NS[~is_gist_NS] = history.store.tokens(index_NS[~is_gist_NS])
    gists_GD = history.store.gists(1, index_NS[is_gist_NS])
    lod_NS, index_NS, ids_NS, is_gist_NS = (x.to(history.device) for x in (lod_NS, index_NS, ids_NS, is_gist_NS))
    embeds_NSD = gpt.embed(ids_NS.clamp_min(0))
    embeds_NSD[is_gist_NS] = gists_GD.to(embeds_NSD)
    length_NS = K ** lod_NS
    rotary = entry_rotary(gpt, index_NS * length_NS, length_NS, scheme=c.positions, floor=c.damping_floor)
    linked_NS = F.pad(~is_gist_NS[:, 1:] & ~is_gist_NS[:, :-1], (1, 0))
    hidden_NSD = gpt.hidden(ids_NS, inputs_embeds=embeds_NSD, rotary=rotary, linked=linked_NS,
                            key_bias=mc.key_bias(lod_NS), lift_windows=True)
    # the first of its tokens is predicted by the entry before: the last raw token, or the gist
    logits_NKV = gpt.logits(hidden_NSD[:, -K - 1:-1])
    return F.cross_entropy(logits_NKV.flatten(0, 1), ids_NS[:, -K:].flatten(),
                           reduction="none").view(-1, K).mean(1).cpu()


def measure_sensitivity(history: History, catalog: Catalog) -> int:
    """Measure every counted block that has not been: one with whole blocks around it, and raw tokens in it and
    after it. Returns how many."""
    store, K = history.store, history.block_size
    block_N = catalog.without_sensitivity()
    block_N = block_N[(block_N >= CONTEXT) & (block_N + 1 < store.n_nodes(1))]
    pair_N2 = block_N[:, None] + torch.arange(2)
    whole_N = (store.tokens((pair_N2[..., None] * K + torch.arange(K)).flatten()) != VOID).view(-1, 2 * K).all(1)
    block_N = block_N[whole_N & store.has_detail(pair_N2.flatten()).view(-1, 2).all(1)]
    for some_N in block_N.split(TOGETHER):
        worth_N = following_nll(history, some_N, raw=False) - following_nll(history, some_N, raw=True)
        for block, worth in zip(some_N.tolist(), worth_N.tolist()):
            catalog.count_sensitivity(0, block, worth)
    catalog.flush()
    return len(block_N)
