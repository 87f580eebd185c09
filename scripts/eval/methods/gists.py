"""Systems that show a cut through the gist tree: the same entries, chosen in different ways.

Shapes: B rows, n tokens of history, T tokens of the row, C complete blocks, L levels.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from mc.config import MCConfig
from mc.focus_allocator import check_feasible
from mc.keyed_random import gumbel
from mc.model import MegaContext, read_rows, recency_scores, run_entries, take, with_continuation
from mc.working_context import Cut, from_expanded
from scripts.eval.comparison import FocusComparison
from scripts.eval.methods.interface import Judged, Models, Method, lens_flops


def at_budget(mc: MegaContext, budget: int) -> MegaContext:
    """The same networks with another budget; weights are shared."""
    other = copy.copy(mc)
    other.config = replace(mc.config, budget=budget)
    other.allocator = type(mc.allocator)(other.focus_config())
    return other


class Gists(Method):
    """Gists everywhere, and the raw tokens of as many blocks as fit, the best by `scores`."""

    needs = ("mc",)

    def __init__(self, models: Models, budget: int, seed: int = 0):
        super().__init__(models, budget, seed)
        self.mc = at_budget(self.models.mc, budget)

    def scores(self, history_BN: Tensor, rows_B: Tensor, n_B: Tensor) -> Tensor:
        """[B, C], −inf: never."""
        raise NotImplementedError

    def show(self, history_BN: Tensor, rows_B: Tensor) -> Cut:
        n = history_BN.shape[1]
        check_feasible(n, self.mc.focus_config(), deep_blocks=0)
        n_B = torch.full((len(history_BN),), n, device=history_BN.device)
        cut, fits = self.mc.allocator.cut(self.mc.allocator.allocate(self.scores(history_BN, rows_B, n_B), n_B))
        assert bool(fits.all()), "the allocator exceeded the budget"
        return cut

    def read(self, tokens_BT: Tensor, n: int, shown: Cut) -> tuple[Tensor, Tensor]:
        n_B, H = torch.full((len(tokens_BT),), n, device=tokens_BT.device), tokens_BT.shape[1] - n
        # the continuation is looked up here; cuts lie within [0, n)
        tree = self.mc.build_tree(self.gpt.embed(tokens_BT))
        entries = with_continuation(shown, n_B, H - 1)
        hidden = run_entries(self.gpt, self.mc, tree, tokens_BT, entries)
        return take(hidden,
                    read_rows(entries, self.block_size, H, 1, self.mc.config.gists_per_block).slot_BP), entries.used_B

    def choosing_flops(self, n: int) -> float:
        return self.mc.gistnet.flops_per_token() * n


class EvenGists(Gists):
    """No focus: the whole history at one level, the finest that fits, and the recent tokens. It
    may use less than the budget."""

    name = "gists_even"

    def show(self, history_BN: Tensor, rows_B: Tensor) -> Cut:
        c, n = self.mc.config, history_BN.shape[1]
        check_feasible(n, self.mc.focus_config(), deep_blocks=0)
        n_B = torch.full((len(history_BN),), n, device=history_BN.device)
        nothing = torch.full((len(history_BN), n // c.block_size), -torch.inf, device=history_BN.device)
        coarsest = self.mc.allocator.allocate(nothing, n_B).expanded
        for lod in range(c.max_lod + 1):
            expanded = [open_BN | (level > lod) for level, open_BN in enumerate(coarsest, 1)]
            cut, fits = from_expanded(expanded, n_B, c.block_size, self.budget, c.gists_per_block)
            if bool(fits.all()):  # all rows have n tokens: it fits in all or in none
                return cut
        raise AssertionError("the coarsest cut is feasible")


class RecencyGists(Gists):
    """Gists, and the raw tokens of the last blocks."""

    name = "gists_recency"

    def scores(self, history_BN: Tensor, rows_B: Tensor, n_B: Tensor) -> Tensor:
        return recency_scores(n_B, history_BN.shape[1] // self.block_size)


class MeanGists(RecencyGists):
    """As `gists_recency`, each gist the mean of its block: no GistNet. Of a checkpoint whose GistNet is
    another, only the rest is used."""

    name = "mean_gists"
    needs = ()

    @classmethod
    def prepare(cls, models: Models) -> Models:
        if models.mc is not None and models.mc.config.gist == "mean":
            return models
        base = models.mc.config if models.mc else MCConfig()
        mean = MegaContext(replace(base, gist="mean", gist_width=MCConfig.gist_width),
                           models.gpt.config.n_embd).to(models.gpt.lm_head.weight)
        return replace(models, mc=mean.eval())


class RandomGists(Gists):
    name = "gists_random"

    def scores(self, history_BN: Tensor, rows_B: Tensor, n_B: Tensor) -> Tensor:
        return gumbel(rows_B, history_BN.shape[1] // self.block_size, self.seed, "random focus")


class LensGists(Gists):
    """Gists, and the raw tokens of the blocks that LensNet wants to see: MegaContext."""

    name = "gists_lens"
    looks = True

    def scores(self, history_BN: Tensor, rows_B: Tensor, n_B: Tensor) -> Tensor:
        return self.mc.lens_logits(self.gpt.embed(history_BN), n_B)

    def choosing_flops(self, n: int) -> float:
        return super().choosing_flops(n) + lens_flops(self.mc, n)


class OracleGists(LensGists):
    """The best cut on true NLL that is known (`scripts.eval.comparison`): what focus could reach. It
    alone sees the continuation."""

    name = "gists_oracle"
    arm = "gists_lens"

    def judge(self, tokens_BT: Tensor, targets_BT: Tensor, n: int, rows_B: Tensor) -> Judged:
        if n <= self.budget:  # nothing to choose
            return super().judge(tokens_BT, targets_BT, n, rows_B)
        focus = FocusComparison(self.gpt, self.mc, tokens_BT, targets_BT, n, self.seed, rows_B)
        tested = {policy: focus.outcome(focus.scores(policy)) for policy in ("random", "recency", "lens")}
        return Judged(focus.oracle(tested), self.cost(n, tokens_BT.shape[1] - n))
