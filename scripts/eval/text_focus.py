"""What focus can win on real text: by horizon, by the number of blocks shown, against an oracle and
against what can be predicted at all.

Of one working context the loss of every target is kept, so that one search serves all horizons: the first h targets
after a refocus are what a session reads that refocuses every h tokens.

    oracle       for each horizon and number of blocks the best of all cuts tried: every block
                 alone, greedy additions to the best,
                 and every system's cut
    predictor    a small network on generous features of (tail, block), fitted to the true utilities of
                 blocks on other text: how much of
                 the oracle's gain can be known before the continuation is read. A lower bound of that ceiling,
                 for other features may do better

Shapes: B rows, N blocks, F blocks that focus may show or not, P targets, C features.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mc.losses import lens_loss, lens_targets
from mc.teachers import gate_utility, keep_gradients
from nanochat.gpt import Captured, norm, token_losses
from scripts.eval.bm25 import bm25_scores
from scripts.eval.comparison import FocusComparison, plain_outcomes
from scripts.eval.scores import tail_attention

HORIZONS = (1, 4, 8, 16, 32, 64)
GREEDY = (8, 64)  # horizons for which the search goes on beyond one block


class Tried(NamedTuple):
    """A cut of each row: how many blocks beside the protected tail it shows at most, and its losses."""

    blocks: int
    nll_BP: Tensor


def keep_best(scores_BN: Tensor, free: int, count: int) -> Tensor:
    """The scores of the `count` best of the first `free` blocks, −inf elsewhere."""
    best = scores_BN[:, :free].topk(min(count, free), 1).indices
    return torch.full_like(scores_BN, -torch.inf).scatter(1, best, scores_BN.gather(1, best))


def losses_showing(focus: FocusComparison, blocks: list[Tensor]) -> Tensor:
    """[B, P] losses when each row shows one block of each tensor [B] of the list."""
    scores = torch.full((len(focus.tokens), focus.n_blocks), -torch.inf)
    for block_B in blocks:
        scores.scatter_(1, block_B[:, None], 0.0)
    return focus.outcome(scores).nll_BP


def utilities_by_horizon(nothing_BP: Tensor, alone: list[Tried]) -> Tensor:
    """[len(HORIZONS), B, F] mean nats saved on the first h targets by showing each block alone."""
    saved_BFP = nothing_BP[:, None] - torch.stack([one.nll_BP for one in alone], 1)
    return torch.stack([saved_BFP[..., :h].mean(-1) for h in HORIZONS])


def search(focus: FocusComparison, alone: list[Tried], candidates: int, rounds: int) -> list[Tried]:
    """Greedy additions to the best block, for the horizons in GREEDY; a row's candidates are its best blocks alone."""
    losses, tried = torch.stack([one.nll_BP for one in alone], 1), []
    for horizon in GREEDY:
        order = losses[..., :horizon].mean(-1).argsort(1)[:, :candidates + 1]
        chosen = [order[:, 0]]
        for size in range(2, min(rounds, focus.most_shown) + 1):
            found = torch.stack([losses_showing(focus, [*chosen, order[:, c]]) for c in range(1, order.shape[1])], 1)
            tried += [Tried(size, one) for one in found.unbind(1)]
            best = found[..., :horizon].mean(-1)
            taken = torch.stack([(order[:, 1:] == one[:, None]) for one in chosen]).any(0)
            chosen.append(order[:, 1:].gather(1, best.masked_fill(taken, torch.inf).argmin(1, keepdim=True))[:, 0])
    return tried


def oracle(tried: list[Tried], blocks: int, horizon: int) -> Tensor:
    """[B, P] losses of each row's best cut on the first `horizon` targets, of those that show at most `blocks`."""
    losses = torch.stack([one.nll_BP for one in tried if one.blocks <= blocks])
    return losses[losses[..., :horizon].mean(-1).argmin(0), torch.arange(losses.shape[1])]


def judge_cuts(focus: FocusComparison, scores: dict[str, Tensor], counts: list[int], candidates: int,
               rounds: int) -> tuple[dict[str, Tensor], Tensor]:
    """name -> [B, P] losses, and [len(HORIZONS), B, F] true utilities.

    "full", "window"; "gists": no block but the tail; "lens@2": the two blocks that the lens scores best; "oracle 8@2":
    at most two, the best for the first 8 targets. scores: [B, N] by name.
    """
    plain = plain_outcomes(focus.gpt, focus.tokens, focus.targets, focus.n, focus.focus_config.budget)
    found = {name: outcome.nll_BP for name, outcome in plain.items()}
    found["gists"] = focus.outcome(torch.full((len(focus.tokens), focus.n_blocks), -torch.inf)).nll_BP
    alone = [Tried(1, one.nll_BP) for one in focus.alone()]
    tried = [Tried(0, found["gists"]), *alone, *search(focus, alone, candidates, rounds)]
    for name, x in scores.items():
        for count in counts:
            found[f"{name}@{count}"] = focus.outcome(keep_best(x, focus.free_blocks, count)).nll_BP
            tried.append(Tried(count, found[f"{name}@{count}"]))
    for horizon in HORIZONS:
        for count in counts:
            found[f"oracle {horizon}@{count}"] = oracle(tried, count, horizon)
    return found, utilities_by_horizon(found["gists"], alone)


# -- what can be predicted
# ------------------------------------------------------------------------------------------------


def past_gate(focus: FocusComparison, length: int) -> Tensor:
    """[B, N] gate gradient of the last `length` tokens of the history: what would have helped just now."""
    captured: list[Captured] = []
    tokens, queries = focus.tokens[:, :focus.n], slice(max(focus.n - 1 - length, 0), focus.n - 1)
    with torch.enable_grad():
        embeds = focus.embeds[:, :focus.n].clone().requires_grad_()
        hidden = focus.gpt.hidden(tokens, inputs_embeds=embeds, capture=captured, lift_windows=True)[:, queries]
        keep_gradients(captured)
        losses = token_losses(focus.gpt.logits(hidden), tokens[:, queries.start + 1:queries.stop + 1])
        torch.autograd.grad(losses.sum(), embeds)
    before = queries.start // focus.K  # blocks that lie before every query; those after are in the tail
    gate = gate_utility(captured, slice(None), queries, before, focus.K).sum(1)
    return F.pad(gate, (0, focus.n_blocks - before))


def features(focus: FocusComparison) -> Tensor:
    """[B, F, C] of everything we could think of that is known before the continuation, each
    standardized over the blocks of a row."""
    free, K, n = focus.free_blocks, focus.K, focus.n
    history = focus.tokens[:, :n]
    blocks_BNK = history.view(len(history), -1, K)
    embeds = focus.embeds[:, :n].unflatten(1, (-1, K)).mean(2)
    last = [(blocks_BNK[..., 1:] == history[:, -1, None, None]), (blocks_BNK[..., :-1] == history[:, -2, None, None])]
    found = [focus.scores("lens"), torch.log2(focus.n_blocks - torch.arange(focus.n_blocks)).expand(len(history), -1),
             *(bm25_scores(history, K, history[:, -tail:]) for tail in (4, 8, 32, 128)), tail_attention(focus),
             *(past_gate(focus, length) for length in (8, 32, 64)),
             last[0].sum(-1), (last[0] & last[1]).sum(-1),
             *(F.cosine_similarity(embeds, norm(focus.embeds[:, n - tail:n]).mean(1)[:, None], dim=-1)
               for tail in (4, 8, 32))]
    x = torch.stack([one[:, :free].float() for one in found], -1)
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True).clamp_min(1e-6)


class Predictor(nn.Module):
    """Logits of blocks from their features: a linear part and a small network."""

    def __init__(self, count: int, width: int = 16):
        super().__init__()
        self.linear, self.net = nn.Linear(count, 1), nn.Sequential(nn.Linear(count, width), nn.GELU(),
                                                                   nn.Linear(width, 1))
        nn.init.zeros_(self.net[2].weight)

    def forward(self, x_BFC: Tensor) -> Tensor:
        return (self.linear(x_BFC) + self.net(x_BFC))[..., 0]


def fit(x_BFC: Tensor, utility_BF: Tensor, seed: int = 0, steps: int = 300) -> Predictor:
    """A predictor taught like the lens, by cross-entropy with the positive utilities weighed by their sum; of all steps
    the one whose choices save most on every fourth row, which is not fitted."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Predictor(x_BFC.shape[-1])
    held = torch.arange(len(x_BFC)) % 4 == 0
    visible = torch.ones_like(utility_BF, dtype=torch.bool)
    target, weight = lens_targets(utility_BF[:, None], visible[:, None])
    optimizer, best, kept = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), -float("inf"), None
    for _ in range(steps):
        with torch.no_grad():
            saved = float(utility_BF[held].gather(1, model(x_BFC[held]).topk(min(2, x_BFC.shape[1]), 1).indices).mean())
        if saved > best:
            best, kept = saved, {name: value.clone() for name, value in model.state_dict().items()}
        loss = (lens_loss(model(x_BFC[~held])[:, None], target[~held],
                          visible[~held][:, None]) * weight[~held]).sum() / weight[~held].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.load_state_dict(kept)
    return model.eval()


# -- which targets refer back
# -----------------------------------------------------------------------------------------------


def far_only(tokens_BT: Tensor, n: int, window: int, length: int) -> Tensor:
    """bool [B, T − n]: the targets (tokens n, n+1, …) that end a sequence of `length` tokens which stands in the row
    more than `window` tokens before, and not since. length 1: words used again from afar; 2:
    pairs, as of names and calls."""
    grams = tokens_BT.unfold(1, length, 1)  # gram i covers tokens [i, i + length)
    wanted = grams[:, n - length + 1:]
    same = (wanted[:, :, None] == grams[:, None]).all(-1)  # [B, targets, grams]
    end = torch.arange(grams.shape[1]) + length - 1
    place = torch.arange(n, tokens_BT.shape[1])[:, None]
    near = (same & (end < place) & (end >= place - window)).any(-1)
    return (same & (end < place - window)).any(-1) & ~near
