"""Is MegaContext learning, thrashing or broken? What is measured to tell, and how.

What every step measures, from what it holds anyway, is in `mc.telemetry`.

Now and then, on held-out rows (`probe`): the NLL of every way to show the history on the same tokens, the measured
utility of blocks against the lens's opinion of them, and how the allocator behaves while a history grows.

    utility of a block   NLL(coarsest cut) − NLL(the same with that block shown raw), nats per token of the continuation
    agreement            Spearman's rank correlation of lens logits with utilities, over sampled
                         blocks; share of the k most useful
                         blocks among the k that the lens puts first, k being what the budget shows
    regret               NLL(lens focus) − the least NLL that any tried focus had, ≥ 0
    swap rate            (expands + collapses by edits) ÷ blocks shown raw or as LOD1, per refocus
    residency            refocuses that blocks shown by an edit stayed shown, together ÷
                         times one of them was hidden again
    thrash               share of the edits' flips of nodes that undo an edit's flip of at most 2 ×
                         cooldown refocuses ago (2 without)

Means are taken per row first. Shapes: B rows, N blocks, W entries, S sampled blocks, D width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import mc.observe.metrics  # noqa: F401  registers what is recorded here
from mc.focus_allocator import GreedyAllocator
from mc.keyed_random import uniform
from mc.lensnet import focus_scores
from mc.mega_context import tiling
from mc.model import MegaContext
from mc.runtime import MCController
from mc.telemetry import Metrics
from nanochat.gpt import GPT
from nanochat.telemetry.metrics import Labelled
from scripts.eval.agreement import best_of, hit_at, spearman
from scripts.eval.comparison import FocusComparison, Outcome, plain_outcomes
from scripts.eval.replay import FocusReport, ReplayAllocator, ReplayState

SAMPLED = 32  # blocks whose utility a probe measures: one pass over a working context each
REFOCUSES = 64  # that a probe replays at most
BANDS = {"to_5": 4, "to_10": 8, "over_10": 16}  # compression bands, and the tokens per entry at which each is measured


# ---------------------------------------------------------------------------------------------------------------------
# Focus over time


class Flips(NamedTuple):
    """What the edits of one refocus did to nodes that an edit had flipped before. Counts over all rows."""

    flipped: Tensor  # int64 [], by edits
    undone: Tensor  # int64 [], of those: edits of the last 2 × cooldown refocuses taken back
    stays: Tensor  # int64 [any], refocuses that each block hidden just now had stayed shown by an edit


class FocusDynamics:
    """Follows what refocuses do to the nodes of some rows, whose number of blocks may grow. Give
    it every refocus, in order."""

    def __init__(self, cooldown: int):
        self.within = 2 * max(cooldown, 1)
        self.reports: list[FocusReport] = []
        self.flips: list[Flips] = []
        self._set_to: list[Tensor] = []  # per level, bool [B, N_l]: what the last edit of a node made of it
        self.state: ReplayState | None = None  # after the last refocus, or before the first
        self._age_BN = torch.zeros(0)  # refocuses that a block shown by an edit has stayed shown; −1: not shown by one

    def update(self, before: ReplayState, after: ReplayState, report: FocusReport) -> Flips:
        """before: the state that `ReplayAllocator.refocus` was given; after, report: what it returned."""
        now_B1 = after.refocus_B[:, None]
        if not self._set_to:
            self._set_to, self._age_BN = list(before.expanded), torch.full_like(before.changed_at[0], -1)
        flipped = undone = torch.zeros((), dtype=torch.int64, device=now_B1.device)
        for level, open_BN in enumerate(after.expanded):
            then_BN = before.expanded[level]
            set_to_BN = _widen(self._set_to[level], then_BN.shape[1], False)
            edited_BN = (after.changed_at[level] == now_B1) & (open_BN != then_BN)
            recent_BN = now_B1 - before.changed_at[level] <= self.within
            flipped, undone = flipped + edited_BN.sum(), undone + (edited_BN & recent_BN & (set_to_BN == then_BN)).sum()
            self._set_to[level] = torch.where(edited_BN, open_BN, set_to_BN)
            if level == 0:
                age_BN = _widen(self._age_BN, then_BN.shape[1], -1)
                ended_BN = (age_BN >= 0) & ~open_BN
                stays = age_BN[ended_BN] + 1
                self._age_BN = torch.where(open_BN & (edited_BN | (age_BN >= 0)), age_BN + 1, -1)
        self.state = after
        self.reports.append(report)
        self.flips.append(Flips(flipped, undone, stays))
        return self.flips[-1]

    def swap_rates(self) -> Tensor:
        """[B] mean over the refocuses so far; 0 where there was none."""
        return sum(report.swap_rate_B for report in self.reports) / max(len(self.reports), 1) + torch.zeros(
            len(self.state.n_tokens_B), device=self.state.n_tokens_B.device)

    def metrics(self) -> Metrics:
        """`mc.focus.*`, over all rows and refocuses so far; none without any, as of a history just above the budget.
        Where no block was hidden, the residency is a lower bound: as if one had been."""
        if not self.reports:
            return {}
        mean = {name: torch.stack([getattr(r, f"{name}_B").double() for r in self.reports]).mean()
                for name in ("swap_rate", "expands", "collapses", "forced", "utilization")}  # fmt: skip
        ended = torch.cat([f.stays for f in self.flips])
        stays = torch.cat([ended, self._age_BN[self._age_BN > 0]]).double()  # those that last are cut short
        if not len(stays):  # no edit showed anything: what was there stayed all the while
            stays = stays.new_full((1,), len(self.reports))
        flipped, undone = (sum(getattr(f, name) for f in self.flips) for name in ("flipped", "undone"))
        return {f"mc.focus.{name}": value for name, value in mean.items() if name != "utilization"} | {
            "mc.focus.replay_utilization": mean["utilization"], "mc.focus.thrash": undone / flipped.clamp_min(1),
            "mc.focus.residency": stays.sum() / max(len(ended), 1), "mc.focus.residency_p95": stays.quantile(0.95),
        }  # fmt: skip


def _widen(x_BN: Tensor, n: int, value: float) -> Tensor:
    return torch.nn.functional.pad(x_BN, (0, n - x_BN.shape[1]), value=value)


def just_fitting_price(allocator: GreedyAllocator, logits_BN: Tensor, n_B: Tensor) -> Tensor:
    """[B, 1] λ: the price of an entry at which the budget is just used, half way between the lowest block that an
    allocation from scratch shows and the highest that it does not; recent blocks, which are shown anyway, left out."""
    K, recent = allocator.cfg.block_size, allocator.cfg.recent
    end_N = (torch.arange(logits_BN.shape[1], device=logits_BN.device) + 1) * K
    free_BN = end_N <= n_B[:, None] - recent
    shown_BN = allocator.allocate(logits_BN, n_B).expanded[0]
    low_B = logits_BN.masked_fill(~(shown_BN & free_BN), torch.inf).amin(1)
    high_B = logits_BN.masked_fill(shown_BN | ~free_BN, -torch.inf).amax(1)
    low_B, high_B = torch.where(low_B.isinf(), high_B, low_B), torch.where(high_B.isinf(), low_B, high_B)
    return ((low_B + high_B) / 2).nan_to_num(0, 0, 0)[:, None]


@torch.no_grad()
def replay(mc: MegaContext, embeds_BTD: Tensor, n: int, logits_of=None, span: int = 1) -> FocusDynamics:
    """The allocator as histories grow from just above the budget to n tokens, one refocus per block, by the lens's
    scores: tanh(logit − λ), λ the market price. logits_of(n_B) [B, N]: another scorer than the lens. span: adjacent
    blocks that an edit may show. At most REFOCUSES, the last ones."""
    K, allocator = mc.config.block_size, ReplayAllocator(replace(mc.focus_config(), span=span))
    n = n // K * K
    keys = mc.lensnet.keys(embeds_BTD[:, :n])
    tree = None if mc.lensnet.reader is None else mc.build_tree(embeds_BTD[:, :n])
    logits_of = logits_of or (lambda n_B: mc.lens_logits(embeds_BTD[:, :n], n_B, keys, tree))
    start = max((mc.config.budget // K + 1) * K, n - REFOCUSES * K)
    at = lambda tokens: torch.full((len(embeds_BTD),), tokens, device=embeds_BTD.device)  # noqa: E731
    state, dynamics = allocator.allocate(logits_of(at(start)), at(start)), FocusDynamics(allocator.cfg.cooldown)
    dynamics.state = state
    for tokens in range(start + K, n + 1, K):
        logits = logits_of(at(tokens))
        before = allocator.advance(state, at(tokens))
        state, report = allocator.refocus(before,
                                          focus_scores(logits, just_fitting_price(allocator, logits, at(tokens))))
        dynamics.update(before, state, report)
    return dynamics


# ---------------------------------------------------------------------------------------------------------------------
# The probe


def probe_batch(controller: MCController, gpt: GPT, batch) -> Metrics:
    """`probe` on a held-out micro-batch of training."""
    n, end = controller.history, controller.history + controller.config.horizon
    return probe(gpt, controller.model, batch.inputs[:, :end], batch.targets[:, :end], n, controller.seed, batch.rows,
                 [lod for lod in controller.meta()["trained_lods"] if controller.config.block_size ** lod <= n])


@torch.no_grad()
def probe(gpt: GPT, mc: MegaContext, tokens_BT: Tensor, targets_BT: Tensor, n: int, seed: int, rows_B: Tensor,
          lods: Sequence[int]) -> Metrics:
    """Everything of the module that takes passes of its own, on held-out rows [B, n + H].
    lods: levels that were trained.

    About 2 full passes, and one pass over a working context for each of SAMPLED blocks and a dozen more.
    """
    focus = FocusComparison(gpt, mc, tokens_BT, targets_BT, n, seed, rows_B)
    plain = plain_outcomes(gpt, tokens_BT, targets_BT, n, mc.config.budget)
    shown = plain | {policy: focus.outcome(focus.scores(policy)) for policy in ("random", "recency", "lens")}
    metrics: Metrics = {}
    for name, outcome in (shown | {f"lod{lod}": focus.at_lod(lod) for lod in lods}).items():
        metrics[Labelled("mc.val.nll", shown=name)] = outcome.nll_B.mean()
        if name != "full":
            metrics[Labelled("mc.val.delta_nll", shown=name)] = (outcome.nll_B - plain["full"].nll_B).mean()
    metrics |= _bands(focus, plain["full"])
    return metrics | _agreement(focus, shown) | replay(mc, focus.embeds, n).metrics()


def _bands(focus: FocusComparison, full: Outcome) -> Metrics:
    """ΔNLL@H of lens focus with n / 4, n / 8 and n / 16 entries, as far as these hold the coarsest
    cut and the protected tail."""
    metrics: Metrics = {}
    scores, usual, cfg = focus.scores("lens"), focus.allocator, focus.allocator.cfg
    for band, ratio in BANDS.items():
        budget = focus.n // ratio
        head = (focus.n - cfg.recent) // focus.K * focus.K
        if tiling(head, focus.K, cfg.max_lod, cfg.n_gists) + focus.n - head > budget:
            continue
        focus.allocator = GreedyAllocator(replace(cfg, budget=budget))
        metrics[Labelled("mc.val.band_delta_nll", band=band)] = (focus.outcome(scores).nll_B - full.nll_B).mean()
    focus.allocator = usual
    return metrics


def _agreement(focus: FocusComparison, shown: dict[str, Outcome]) -> Metrics:
    """The lens against measured utilities of sampled blocks, and its regret against the best focus that was tried."""
    count = focus.n_blocks - focus.mc.config.protected // focus.K  # blocks that are not shown anyway
    nothing_BN = torch.full((len(focus.tokens), focus.n_blocks), -torch.inf, device=focus.tokens.device)
    block_BS = uniform(focus.rows, count, focus.seed, "sampled blocks").argsort(1)[:, :SAMPLED]
    coarsest = focus.outcome(nothing_BN)
    alone = [focus.outcome(nothing_BN.scatter(1, block_B1, 0.0)) for block_B1 in block_BS.split(1, 1)]
    utility_BS = coarsest.nll_B[:, None] - torch.stack([o.nll_B for o in alone], 1)
    best = focus.outcome(nothing_BN.to(utility_BS.dtype).scatter(1, block_BS, utility_BS))
    tried = [coarsest, *alone, best, *(o for name, o in shown.items() if name not in ("full", "window")),
             *(focus.outcome(s) for s in focus.teacher_scores().values())]  # fmt: skip
    lens_BS = focus.scores("lens").gather(1, block_BS)
    k = min(max((focus.mc.config.budget - focus.mc.config.protected) // focus.K, 1), block_BS.shape[1])
    least_B = torch.stack([o.nll_B for o in tried]).amin(0)
    return {
        "mc.lens.rank_correlation": spearman(lens_BS, utility_BS).mean(),
        Labelled("mc.lens.hit_at", k="1"): hit_at(lens_BS, best_of(utility_BS, 1), 1).mean(),
        Labelled("mc.lens.hit_at", k="budget"): hit_at(lens_BS, best_of(utility_BS, k), k).mean(),
        "mc.lens.regret": (shown["lens"].nll_B - least_B).mean(),
        "mc.lens.utility_spread": utility_BS.std(1).mean(),
    }  # fmt: skip
