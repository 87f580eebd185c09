"""What a study's cells are judged by: functions from a checkpoint directory to measures, one
number per held-out context each."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mc.config import MCConfig
from mc.focus_allocator import FocusState
from mc.losses import lens_loss, lens_targets, row_mean
from mc.model import MegaContext, load_mega_context, recency_scores
from mc.teachers import gate_utility, keep_gradients, over_horizon
from nanochat.common import UserError
from nanochat.dataloader import judged_rows, source_of
from nanochat.gpt import GPT, Captured, token_losses
from nanochat.loading import load_model
from nanochat.tokenizer import Tokenizer
from scripts.eval.comparison import FocusComparison, plain_outcomes
from scripts.eval.methods.gists import LensGists, RecencyGists
from scripts.eval.methods.interface import Models, again
from scripts.eval.methods.raw import FullContext, SlidingWindow
from scripts.eval.probe import replay

CANDIDATES = 8  # blocks that the oracle goes on with after it has tried each alone


def load_with_mc(checkpoint_dir: Path) -> tuple[GPT, MegaContext, dict]:
    gpt, meta = load_model(checkpoint_dir)
    return gpt, load_mega_context(checkpoint_dir, meta["step"], meta, gpt.config.n_embd), meta


def held_out(meta: dict, T: int, contexts: int, batch: int, data: str = "",
             begin: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of held-out rows, from number `begin` on: their numbers [B], tokens and targets (−1 where none counts)
    [B, T]. data: other than the training's."""
    source = source_of(meta, "val", tokenizer=Tokenizer.load(), data=data, T=T)
    if (have := source.count_rows(begin + contexts)) < begin + contexts:
        raise UserError(f"contexts: {contexts}: the held-out split has {have - begin} rows of {T} tokens"
                        + f" behind the first {begin}" * (begin > 0))
    for first in range(begin, begin + contexts, batch):
        rows = np.arange(first, min(first + batch, begin + contexts))
        yield torch.from_numpy(rows), *judged_rows(source, rows)


def focus(checkpoint_dir: Path, contexts: int = 64, batch: int = 32, oracle: int = 1,
          data: str = "") -> dict[str, list[float]]:
    """NLL and accuracy of every way to show a history, the last `horizon` tokens of held-out rows judged.

    nll_, acc_ of full, window, random, recency, lens and gist (no block raw), of oracle if asked for (it tries every
    block), and hit: whether the lens's first choice is the block that the continuation's gate gradient names. data:
    other text than the training's.
    """
    gpt, mc, meta = load_with_mc(checkpoint_dir)
    c, T = mc.config, gpt.config.sequence_len
    n = (T - c.horizon) // c.block_size * c.block_size
    found: dict[str, list] = {}
    for rows, tokens, targets in held_out(meta, T, contexts, batch, data):
        tokens, targets = tokens[:, :n + c.horizon], targets[:, :n + c.horizon]
        comparison = FocusComparison(gpt, mc, tokens, targets, n, meta["flags"]["seed"], rows)
        scores = {policy: comparison.scores(policy) for policy in ("random", "recency", "lens")}
        shown = {policy: comparison.outcome(s) for policy, s in scores.items()}
        outcomes = plain_outcomes(gpt, tokens, targets, n, c.budget) | shown | {"gist": comparison.at_lod(1)}
        if oracle:
            outcomes["oracle"] = comparison.oracle(shown)
        for name, outcome in outcomes.items():
            found.setdefault(f"nll_{name}", []).append(outcome.nll_B)
            found.setdefault(f"acc_{name}", []).append(outcome.acc_B)
        choosable = slice(0, (n - c.protected) // c.block_size)
        first_choice = scores["lens"][:, choosable].argmax(1)
        found.setdefault("hit",
                         []).append((first_choice
                                     == comparison.teacher_scores()["gate"][:, choosable].argmax(1)).float())
    return {name: torch.cat(parts).double().tolist() for name, parts in found.items()}


def in_use(checkpoint_dir: Path, contexts: int = 64, batch: int = 32, data: str = "",
           span: int = 1) -> dict[str, list[float]]:
    """`lenses_in_use` of a checkpoint's own lens, "lens", on its held-out rows. data: other text than the
    training's."""
    gpt, mc, meta = load_with_mc(checkpoint_dir)
    return lenses_in_use(gpt, {"lens": mc}, meta, contexts, batch=batch, data=data, span=span)


def lenses_in_use(gpt: GPT, lenses: dict[str, MegaContext], meta: dict, contexts: int, *, batch: int = 32,
                  data: str = "", span: int = 1, first: int = 0) -> dict[str, list[float]]:
    """What lenses choose, and what edits make of it, on held-out rows from `first` on; they differ in nothing but their
    lens.

    nll_, acc_ of full, window, random, recency, the lenses by name, and oracle, as `focus`. Of each lens also
    nll_, acc_NAME_edited: the history has grown block by block, and each refocus was a few edits of the one before, of
    up to `span` adjacent blocks; swap_NAME: nodes that these flipped over blocks shown, per refocus; hit_NAME: whether
    its first choice is the block whose showing alone gains most.
    """
    mc = next(iter(lenses.values()))
    c, T = mc.config, gpt.config.sequence_len
    n = (T - c.horizon) // c.block_size * c.block_size
    found: dict[str, list] = {}
    for rows, tokens, targets in held_out(meta, n + c.horizon, contexts, batch, data, first):
        comparison = FocusComparison(gpt, mc, tokens, targets, n, meta["flags"]["seed"], rows)
        scores = {policy: comparison.scores(policy) for policy in ("random", "recency")}
        with torch.no_grad():
            scores |= {name: of.lens_logits(comparison.embeds[:, :n], comparison.n_B, tree=comparison.tree)
                       for name, of in lenses.items()}
        shown, alone = {name: comparison.outcome(x) for name, x in scores.items()}, comparison.alone()
        best_B = torch.stack([outcome.nll_B for outcome in alone]).argmin(0)
        for name, of in lenses.items():
            grown = replay(of, comparison.embeds, n, span=span)
            shown[f"{name}_edited"] = comparison.outcome_of(FocusState(grown.state.expanded, grown.state.n_tokens_B))
            found.setdefault(f"swap_{name}", []).append(grown.swap_rates())
            found.setdefault(f"hit_{name}", []).append((scores[name][:, :len(alone)].argmax(1) == best_B).float())
        outcomes = plain_outcomes(gpt, tokens, targets, n, c.budget) | shown
        outcomes["oracle"] = comparison.oracle(shown, alone=alone, candidates=CANDIDATES)
        for name, outcome in outcomes.items():
            found.setdefault(f"nll_{name}", []).append(outcome.nll_B)
            found.setdefault(f"acc_{name}", []).append(outcome.acc_B)
    return {name: torch.cat(parts).double().tolist() for name, parts in found.items()}


def compression(checkpoint_dir: Path, contexts: int = 48, batch: int = 16, ratios: tuple[int, ...] = (4, 8, 12),
                data: str = "") -> dict[str, list[float]]:
    """NLL of the last `horizon` tokens of held-out rows, the farther the history the more
    compressed; the lens has no say.

    nll_ full, window, recent (the protected tail alone), lod1 … (the whole history as gists of that level, as far as it
    has them, and the tail), and ratio_4 …: n / 4 entries …, gists and the last blocks raw. data:
    other text than the training's.
    """
    gpt, mc, meta = load_with_mc(checkpoint_dir)
    c, T = mc.config, gpt.config.sequence_len
    n = (T - c.horizon) // c.block_size * c.block_size
    found: dict[str, list] = {}
    for rows, tokens, targets in held_out(meta, n + c.horizon, contexts, batch, data):
        at = partial(FocusComparison, gpt, mc, tokens, targets, n, meta["flags"]["seed"], rows)  # budget ->
        usual = at(c.budget)
        outcomes = plain_outcomes(gpt, tokens, targets, n,
                                  c.budget) | {"recent": plain_outcomes(gpt, tokens, targets, n, c.protected)["window"]}
        outcomes |= {f"lod{lod}": usual.at_lod(lod) for lod in range(1, c.max_lod + 1)}
        outcomes |= {f"ratio_{ratio}": (focus := at(n // ratio)).outcome(focus.scores("recency")) for ratio in ratios}
        for name, outcome in outcomes.items():
            found.setdefault(f"nll_{name}", []).append(outcome.nll_B)
    return {name: torch.cat(parts).double().tolist() for name, parts in found.items()}


def intervals(checkpoint_dir: Path, texts: dict[str, str], every: list[int], contexts: int = 24, horizon: int = 64,
              batch: int = 12, budget: int = 0) -> dict[str, list[float]]:
    """NLL of the last `horizon` tokens of held-out rows when the lens chooses anew every so
    many tokens, by name of the text.

    nll_TEXT_full, _window, _recency (gists, the last blocks raw) and _every_1 …: gists and the blocks that the lens
    names. texts: name -> data. budget: W in entries; 0: as trained.
    """
    gpt, mc, meta = load_with_mc(checkpoint_dir)
    T = gpt.config.sequence_len
    n, models = (T - horizon) // mc.config.block_size * mc.config.block_size, Models(gpt, mc)
    kinds = {"full": FullContext, "window": SlidingWindow,
             "recency": RecencyGists} | {f"every_{interval}": again(LensGists, interval) for interval in every}
    systems = {name: kind(models, budget or mc.config.budget) for name, kind in kinds.items()}
    found: dict[str, list] = {}
    for text, data in texts.items():
        for rows, tokens, targets in held_out(meta, n + horizon, contexts, batch, os.path.expandvars(data)):
            for name, system in systems.items():
                found.setdefault(f"nll_{text}_{name}", []).append(system.judge(tokens, targets, n, rows).outcome.nll_B)
    return {name: torch.cat(parts).double().tolist() for name, parts in found.items()}


def lens(checkpoint_dir: Path, contexts: int = 64, batch: int = 16, queries: int = 256, cursors: int = 16,
         horizon: int = 8, data: str = "") -> dict[str, list[float]]:
    """`taught` on held-out rows: at `cursors` positions spread over their last `queries`. data:
    other text than the training's."""
    gpt, mc, meta = load_with_mc(checkpoint_dir)
    T = gpt.config.sequence_len
    cursor_Q = T - queries + 1 + torch.linspace(0, queries - horizon, cursors).long()
    found: dict[str, list] = {}
    for _, tokens, targets in held_out(meta, T, contexts, batch, data):
        for name, values_B in taught(gpt, mc, tokens, targets, cursor_Q, horizon).items():
            found.setdefault(name, []).append(values_B)
    return {name: torch.cat(parts).double().tolist() for name, parts in found.items()}


def taught(gpt: GPT, mc: MegaContext, tokens_BT: Tensor, targets_BT: Tensor, cursor_Q: Tensor,
           horizon: int) -> dict[str, Tensor]:
    """`lens_measures` against the gate gradients of the `horizon` tokens that follow each
    cursor (tokens of history)."""
    return lens_measures(gpt, mc, tokens_BT, cursor_Q, gate_utilities(gpt, mc.config, tokens_BT, targets_BT, cursor_Q,
                                                                      horizon))


def rated(c: MCConfig, T: int, cursor_Q: Tensor) -> Tensor:
    """bool [Q, N]: of the blocks that rows of T tokens may rate, those that a cursor does."""
    return (torch.arange((T - c.protected) // c.block_size) + 1) * c.block_size <= cursor_Q[:, None] - c.protected


def gate_utilities(gpt: GPT, c: MCConfig, tokens_BT: Tensor, targets_BT: Tensor, cursor_Q: Tensor,
                   horizon: int) -> Tensor:
    """[B, Q, N] gate utility of blocks [nats] for the `horizon` tokens after each cursor; 0
    for those it does not rate."""
    visible_QN = rated(c, tokens_BT.shape[1], cursor_Q)
    asked = slice(int(cursor_Q.min()) - 1, tokens_BT.shape[1])
    captured: list[Captured] = []
    embeds_BTD = gpt.embed(tokens_BT).detach().requires_grad_()
    hidden_BTD = gpt.hidden(tokens_BT, inputs_embeds=embeds_BTD, capture=captured, lift_windows=True)
    keep_gradients(captured)
    # leaves the gradient at every attention output
    torch.autograd.grad(token_losses(gpt.logits(hidden_BTD), targets_BT).sum(), embeds_BTD)
    utility = gate_utility(captured, slice(None), asked, visible_QN.shape[1],
                           c.block_size) * (targets_BT[:, asked] >= 0)[..., None]
    return over_horizon(utility, horizon)[:, cursor_Q - 1 - asked.start].masked_fill(~visible_QN, 0)


@torch.no_grad()
def lens_measures(gpt: GPT, mc: MegaContext, tokens_BT: Tensor, cursor_Q: Tensor,
                  utility_BQN: Tensor) -> dict[str, Tensor]:
    """Measures [B] of a lens at cursors, given what blocks are worth there.

    nats_lens: cross-entropy of its distribution over the blocks to the share that each has of what there is to win,
    nats_even and nats_least those of an even one and of the best possible; hit_lens: whether its first choice wins
    most. Means over cursors, weighted by what there is to win. won_lens, _best, _recency, _even: first-order gain [nats
    in the horizon] of showing as many blocks as the budget holds, chosen so; mean over cursors.
    """
    c, count = mc.config, utility_BQN.shape[-1]
    most, visible_QN = (c.budget - c.protected) // c.block_size, rated(c, tokens_BT.shape[1], cursor_Q)
    embeds_BTD = gpt.embed(tokens_BT)
    tree, keys = mc.build_tree(embeds_BTD), mc.lensnet.keys(embeds_BTD)
    at = [cursor.expand(len(tokens_BT)) for cursor in cursor_Q]
    logits_BQN = torch.stack([mc.lens_logits(embeds_BTD, n_B, keys, tree)[:, :count] for n_B in at], 1)
    visible_BQN = visible_QN.expand_as(utility_BQN)
    target_BQN, weight_BQ = lens_targets(utility_BQN, visible_BQN)
    even_BQN, recent_BQN = torch.zeros_like(logits_BQN), recency_scores(at[0], count)[:, None].expand_as(logits_BQN)
    seen_BQN, recent_BQN = (x.masked_fill(~visible_BQN, -torch.inf) for x in (logits_BQN, recent_BQN))
    of_cursors = {
        "nats_lens": lens_loss(logits_BQN, target_BQN, visible_BQN),
        "nats_even": lens_loss(even_BQN, target_BQN, visible_BQN),
        "nats_least": -(target_BQN * target_BQN.clamp_min(1e-12).log()).sum(-1),
        "hit_lens": (seen_BQN.argmax(-1) == target_BQN.argmax(-1)).float(),
    }  # fmt: skip
    won = {name: utility_BQN.gather(-1, scores.topk(most, -1).indices)
           for name, scores in dict(lens=seen_BQN, best=utility_BQN, recency=recent_BQN).items()}
    won["best"] = won["best"].clamp_min(0)
    even_B = (most * utility_BQN.sum(-1) / visible_QN.sum(-1)).mean(1)
    return ({name: row_mean(x_BQ, weight_BQ) for name, x_BQ in of_cursors.items()}
            | {f"won_{name}": x_BQk.sum(-1).mean(1) for name, x_BQk in won.items()} | {"won_even": even_B})
