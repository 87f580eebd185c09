"""One history, one continuation, several ways to show the history: the comparison that everything is about.

Every system is judged on the same target tokens (the H tokens after a history of n), by the mean NLL a row, and for
recall by accuracy on the answers. From one checkpoint: full context, a sliding window of W tokens, and working contexts
of W entries whose detail is chosen at random, by recency, by the lens, or by an oracle that knows the continuation.

The oracle is, per row, the best on true NLL of: every tested system's cut, the cuts its teachers name (gate gradient
and attention mass of the continuation in the full pass), no block at all, every set of blocks where there are few, and
greedy search (each block alone, then each added to the best). It does not search finer gists for their own sake: LOD2
nodes are opened only on the way to a block.

Shapes: B rows, T tokens of a row = n + H, N blocks.
"""

from dataclasses import dataclass, fields, replace
from itertools import combinations
from math import comb
from typing import Callable

import torch
from torch import Tensor

from mc.focus_allocator import FocusState, GreedyAllocator, check_feasible
from mc.keyed_random import gumbel
from mc.losses import row_mean
from mc.model import MegaContext, read_rows, recency_scores, run_entries, take, with_continuation
from mc.teachers import attention_mass, continuation_pass, gate_utility
from mc.working_context import Cut, from_expanded
from nanochat.gpt import GPT, token_losses


@dataclass(frozen=True)
class Outcome:
    """Per row: mean NLL over the continuation's targets [nats], share of them predicted right, entries
    before it; per target its NLL."""

    nll_B: Tensor
    acc_B: Tensor
    entries_B: Tensor
    shown_BN: Tensor | None = None  # bool: blocks whose raw tokens are in the working context
    nll_BP: Tensor | None = None  # 0 where no target counts

    @staticmethod
    def cat(parts: list["Outcome"]) -> "Outcome":
        values = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Outcome)}
        return Outcome(**{name: None if v[0] is None else torch.cat(v) for name, v in values.items()})


def judge(gpt: GPT, hidden_BPD: Tensor, targets_BP: Tensor, entries: Tensor | int,
          shown: Tensor | None = None) -> Outcome:
    logits = gpt.logits(hidden_BPD)
    counted = targets_BP >= 0
    right = (logits.argmax(-1) == targets_BP).float()
    entries = torch.as_tensor(entries).expand(len(targets_BP))
    losses = token_losses(logits, targets_BP)
    return Outcome(row_mean(losses, counted), row_mean(right, counted), entries, shown, losses)


@torch.no_grad()
def plain_outcomes(gpt: GPT, tokens_BT: Tensor, targets_BT: Tensor, n: int, budget: int) -> dict[str, Outcome]:
    """"full": the whole history; "window": its last `budget` tokens. targets [B, T]: next
    tokens, −1 where none counts."""
    rows = slice(n - 1, tokens_BT.shape[1] - 1)
    full = gpt.hidden(tokens_BT, lift_windows=True)[:, rows]
    window = gpt.hidden(tokens_BT[:, n - budget:],
                        positions=torch.arange(n - budget, tokens_BT.shape[1], device=tokens_BT.device))
    targets = targets_BT[:, rows]
    return {"full": judge(gpt, full, targets, n), "window": judge(gpt, window[:, budget - 1:-1], targets, budget)}


FEW_SETS = 64  # sets of blocks that the oracle tries one and all


class FocusComparison:
    """Working contexts of one checkpoint on one batch of rows [B, T], T = n + H, n a multiple of the block size.

    budget: W in entries, None: as trained. UserError for one that cannot show one block of such a history.
    """

    def __init__(self, gpt: GPT, mc: MegaContext, tokens_BT: Tensor, targets_BT: Tensor, n: int, seed: int,
                 rows_B: Tensor,
                 budget: int | None = None):
        config = mc.focus_config()
        self.focus_config = config if budget is None else replace(config, budget=budget)
        check_feasible(n, self.focus_config)
        self.gpt, self.mc, self.tokens, self.targets, self.n = gpt, mc, tokens_BT, targets_BT, n
        self.seed, self.rows = seed, rows_B
        self.K, self.H = mc.config.block_size, tokens_BT.shape[1] - n
        with torch.no_grad():
            self.embeds = gpt.embed(tokens_BT)
            middle: list[Tensor] = []
            if mc.config.gist_source == "hidden":
                gpt.hidden(tokens_BT, inputs_embeds=self.embeds, lift_windows=True, middle=middle)
            # the continuation is looked up here; cuts lie within [0, n)
            self.tree = mc.build_tree(self.embeds, *middle)
        self.n_B = torch.full((len(tokens_BT),), n, device=tokens_BT.device)
        self.n_blocks = n // self.K
        self.free_blocks = self.n_blocks - mc.config.protected // self.K  # those that focus may show or not
        self.most_shown = min((self.focus_config.budget - mc.config.protected) // self.K, self.free_blocks)
        self.allocator = GreedyAllocator(self.focus_config)

    @torch.no_grad()
    def outcome(self, scores_BN: Tensor) -> Outcome:
        """What the base makes of the working context that shows the best-scored blocks (−inf: never)."""
        return self.outcome_of(self.allocator.allocate(scores_BN, self.n_B))

    @torch.no_grad()
    def outcome_of(self, state: FocusState) -> Outcome:
        """… of an allocator's state, which may have come about by edits."""
        cut, fits = self.allocator.cut(state)
        assert bool(fits.all()), "the allocator exceeded the budget"
        return self._judge(cut, state.expanded[0])

    @torch.no_grad()
    def at_lod(self, lod: int) -> Outcome:
        """The whole history at one LOD, as far as it has such nodes, but for the protected tail;
        whatever budget that takes."""
        nothing = torch.full((len(self.tokens), self.n_blocks), -torch.inf, device=self.tokens.device)
        coarsest = self.allocator.allocate(nothing, self.n_B).expanded
        expanded = [open_BN | (level > lod) for level, open_BN in enumerate(coarsest, 1)]
        c = self.mc.config
        capacity = (self.n // self.K**lod + self.K * c.max_lod) * c.gists_per_block + c.protected
        cut, fits = from_expanded(expanded, self.n_B, self.K, capacity, c.gists_per_block)
        assert bool(fits.all()), "capacity of an even cut"
        return self._judge(cut, expanded[0])

    def _judge(self, cut: Cut, shown_BN: Tensor) -> Outcome:
        entries = with_continuation(cut, self.n_B, self.H - 1)
        hidden = run_entries(self.gpt, self.mc, self.tree, self.tokens, entries)
        read = read_rows(entries, self.K, self.H, 1, self.mc.config.gists_per_block)
        return judge(self.gpt, take(hidden, read.slot_BP), self.targets.gather(1, read.token_BP), entries.used_B,
                     shown_BN)

    @torch.no_grad()
    def scores(self, policy: str) -> Tensor:
        """[B, N] of "random", "recency" or "lens"."""
        if policy == "random":
            return gumbel(self.rows, self.n_blocks, self.seed, "random focus")
        if policy == "recency":
            return recency_scores(self.n_B, self.n_blocks)
        return self.mc.lens_logits(self.embeds[:, :self.n], self.n_B, tree=self.tree)

    def teacher_scores(self) -> dict[str, Tensor]:
        """[B, N] gate gradient and attention mass of the continuation's queries in the full
        pass: they know the answer."""
        queries = slice(self.n - 1, self.n + self.H - 1)
        captured = continuation_pass(self.gpt, self.tokens, self.targets, self.n)
        counted = (self.targets[:, queries] >= 0).unsqueeze(-1)
        every = slice(None)
        return {"gate": (gate_utility(captured, every, queries, self.n_blocks, self.K) * counted).sum(1),
                "attention": (attention_mass(captured, every, queries, self.n_blocks, self.K) * counted).sum(1)}

    def nothing(self) -> Outcome:
        """What the coarsest gists beside the protected tail would give."""
        return self.outcome(torch.full((len(self.tokens), self.n_blocks), -torch.inf, device=self.tokens.device))

    def alone(self, progress: Callable[[], None] = lambda: None) -> list[Outcome]:
        """What showing each block that is not protected, and no other, would give."""
        return [self._shown(self._with(None, block), progress) for block in range(self.free_blocks)]

    def oracle(self, tested: dict[str, Outcome], progress: Callable[[], None] = lambda: None, *,
               alone: list[Outcome] | None = None,
               candidates: int | None = None) -> Outcome:
        """Per row the best on true NLL of everything that was or can be tried; see the module's docstring.

        alone: what `alone` gave, if it is at hand. candidates: how many blocks a row the greedy search tries after its
        first round, the best of that round; None: all.
        """
        best = _best([*tested.values(), *(self.outcome(s) for s in self.teacher_scores().values())])
        chosen, order, count = None, None, self.free_blocks
        # a row's search ends with its first block that does not
        gains_B = torch.ones(len(self.tokens), dtype=torch.bool, device=self.tokens.device)
        for done in range(self.most_shown):
            tried = [self._with(chosen, block if order is None else order[:, block]) for block in range(count)]
            outcomes = alone if alone and not done else [self._shown(blocks, progress) for blocks in tried]
            nll = torch.stack([o.nll_B for o in outcomes])
            round_best = _best(outcomes)
            if done:
                gains_B &= round_best.nll_B < best.nll_B
                if not gains_B.any():
                    break
            best = _best([best, replace(round_best, nll_B=round_best.nll_B.where(gains_B, torch.inf))])
            chosen = torch.stack(tried)[nll.argmin(0), torch.arange(len(self.tokens), device=nll.device)]
            if order is None and candidates is not None:
                order, count = nll.argsort(0).T, min(candidates, self.free_blocks)
        if sum(comb(self.free_blocks, size) for size in range(self.most_shown + 1)) <= FEW_SETS:
            sets = (blocks for size in range(1, self.most_shown + 1)
                    for blocks in combinations(range(self.free_blocks), size))
            best = _best([best, *(self._shown(self._with(None, list(blocks)), progress) for blocks in sets)])
        return _best([best, self.nothing()])  # last, for what it gives must not end a row's search

    def _with(self, chosen_BN: Tensor | None, block: Tensor | int | list[int]) -> Tensor:
        """bool [B, N]: the chosen blocks and one more, or several; a tensor names one of each row."""
        shown = torch.zeros(len(self.tokens), self.n_blocks, dtype=torch.bool,
                            device=self.tokens.device) if chosen_BN is None else chosen_BN.clone()
        if isinstance(block, Tensor):
            return shown.scatter(1, block[:, None], True)
        shown[:, block] = True
        return shown

    def _shown(self, blocks_BN: Tensor, progress: Callable[[], None]) -> Outcome:
        outcome = self.outcome(torch.where(blocks_BN, 0.0, -torch.inf))
        progress()
        return outcome


def _best(outcomes: list[Outcome]) -> Outcome:
    winner_B = torch.stack([o.nll_B for o in outcomes]).argmin(0)
    pick = torch.arange(len(winner_B), device=winner_B.device)
    return Outcome(*(torch.stack([getattr(o, f.name) for o in outcomes])[winner_B, pick] for f in fields(Outcome)))
