"""MCController: all of MegaContext that a training loop sees.

    result = mc.training_step(model, batch, step)        # every micro-step afresh: one loss, one backward
    (result.loss / accumulation).backward()
    loss, metrics = mc.after_backward(accumulation)      # of what needs the gradients of that pass: nothing by default

One micro-batch: the ordinary LM pass; a tree of gists on the same embeddings; per row one or more cuts of its history
at the budget, chosen by a random, recency, lens or teacher policy; one packed pass [cut ‖ continuation]; next-token
loss and KL from the LM pass. The lens learns, on detached inputs, which blocks the LM pass attended to.

Every random draw is keyed by (seed, step, global row), so it does not depend on ranks or micro-steps. Nothing is
carried over between micro-batches. Before `start` a step is the vanilla step.

Shapes: B rows, R rows with a working context (V variants of each: RV), T tokens, D width, N
blocks, P positions read, Q queries.
"""

import sys
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mc.arm import Part
from mc.config import POLICIES, MCConfig, from_dict, to_dict
from mc.far_history import draw_far_history, most_entries, with_far_tokens
from mc.focus_allocator import check_feasible, utilization
from mc.keyed_random import gumbel, uniform
from mc.lens_loss import Lesson, lens_objective
from mc.lensnet import CURSORS
from mc.losses import distillation, row_mean
from mc.mega_context import Tree, TreeShape
from mc.model import Entries, MegaContext, read_rows, recency_scores, run_entries, take, with_continuation
from mc.teachers import attention_mass
from mc.telemetry import gist_statistics, shares_by_lod
from mc.working_context import entries_used
from nanochat.common import UserError, print0
from nanochat.controller import Metrics, StepResult
from nanochat.gpt import GPT, Captured, token_losses
from nanochat.schedule import ramp
from nanochat.telemetry.tracing import Trace

class Seen(NamedTuple):
    """The working contexts of a micro-batch as an arm sees them, nothing with gradients."""

    gpt: GPT
    tree: Tree
    tokens_RT: Tensor
    targets_RT: Tensor
    rows_R: Tensor  # global row numbers
    n_R: Tensor  # tokens of history
    shown_VRN: Tensor  # bool, blocks that each variant shows raw
    nll_VR: Tensor  # nats per token
    key: tuple[int, int]  # seed and step


class _Pending(NamedTuple):
    """What the lens learns only once the backward pass has run."""

    lesson: Lesson
    weight: float


class MCController:
    def __init__(self, config: MCConfig, gpt: GPT, *, T: int, micro_batch: int, num_iterations: int, seed: int):
        """gpt: the base, already on its device. T: tokens per row. UserError for settings that cannot work together."""
        config, nothing_far = with_far_tokens(config, micro_batch)
        K, R, H = config.block_size, config.protected, config.horizon
        history = (T - H) // K * K
        if history // K <= config.budget // K:
            raise UserError(f"--mc_budget={config.budget} holds the whole history of {history} tokens: nothing to "
                            "focus on; "
                            f"lower the budget or raise --max_seq_len")
        # rows are chosen within a micro-batch: the choice must not depend on where it begins
        for name in ("row_stride", "lens_row_stride"):
            if micro_batch % getattr(config, name):
                raise UserError(
                    f"--mc_{name}={getattr(config, name)} does not divide the micro-batch of {micro_batch} rows")
        if config.far_tokens and micro_batch < 2:
            raise UserError("--mc_far_tokens shows gists of the other rows of a micro-batch, which has one row; raise "
                            "--device_batch_size")
        if config.far_tokens and config.far_entries < (most := most_entries(config)):
            raise UserError(f"--mc_far_entries={config.far_entries} does not hold {config.far_tokens} tokens, which "
                            f"take up to {most} entries; "
                            f"raise it or --mc_max_lod, or lower --mc_far_tokens")
        if config.lens_queries > T - R - K:
            raise UserError(
                f"--mc_lens_queries={config.lens_queries} leaves no history in rows of {T} tokens; lower it")
        if min(gpt.config.windows()) < T:
            raise UserError(f"--window_pattern={gpt.config.window_pattern}: windowed layers cannot see distant gists; "
                            "use L with --mc_enabled=1")
        # history: the longest before a continuation
        self.config, self.T, self.history, self.seed, self.micro_batch = config, T, history, seed, micro_batch
        self._far_entries = config.far_entries if config.far_tokens else 0
        self.model = MegaContext(config, gpt.config.n_embd).to(gpt.lm_head.weight.device)
        check_feasible(history, self.model.focus_config())
        untrained = [lod for lod in range(1, config.max_lod + 1) if lod not in self.meta()["trained_lods"]]
        if nothing_far and untrained:
            print0(f"note: gists of LOD {', '.join(map(str, untrained))} will not be trained ({nothing_far}); sessions "
                   "leave out what only they would show",
                   file=sys.stderr)
        self.start_step, self.num_iterations = int(config.start * num_iterations), num_iterations
        for arm in self.model.arms.values():
            arm.begin(self)
        self._waits = any(arm.waits for arm in self.model.arms.values())
        self._pending: _Pending | None = None
        self._begun = -1  # the step that arms were told of last

    # -- the training loop's interface
    # ------------------------------------------------------------------------------------

    def param_groups(self, lr_scale: float = 1.0) -> list[dict]:
        """Optimizer groups of GistNet and LensNet; lr_scale as for the base's rates."""
        return self.model.param_groups(lr_scale)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)

    def meta(self) -> dict[str, Any]:
        """What a checkpoint must say about its MegaContext: the settings, and which levels were trained."""
        K, history = self.config.block_size, self.history
        return {"config": to_dict(self.config),
                "trained_lods": [lod for lod in range(1, self.config.max_lod + 1)
                                 if K ** lod <= max(history, self.config.far_tokens)]}

    def settings(self, meta: dict | None = None) -> dict[str, Any]:
        """All settings of this run, or of the one that a checkpoint's `meta` describes, as this version reads them."""
        return to_dict(self.config if meta is None else from_dict(meta["config"]))

    def share_active(self) -> float:
        return 1 - self.config.start

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {"mc": self.model}

    def flops_per_token(self, gpt: GPT) -> float:
        """Training FLOPs that MegaContext adds per token of the LM pass, from shapes, while it is active."""
        c, T = self.config, self.T
        entries = c.budget + c.horizon - 1 + self._far_entries
        read = c.protected + c.horizon - 1
        more = sum(arm.more_passes() for arm in self.model.arms.values())
        passes = (gpt.flops_per_token(entries, read) * entries + 2 * read * gpt.lm_head.weight.numel()) * (c.variants
                                                                                                           + more) / c.row_stride  # noqa: E501
        tree = 3 * self.model.gistnet.flops_per_token() / c.row_stride
        lens = self.model.lensnet.config
        nodes, width = T // c.block_size * c.lens_keys, gpt.config.n_embd
        per_query = 3 * width * lens.query_width + lens.query_width * c.lens_key_dim + nodes * c.lens_key_dim
        per_query += gpt.config.n_layer * width * T  # the teacher reads attention again
        per_row = c.lens_queries * per_query + nodes * 2 * width * c.lens_key_dim
        reader = 0.0
        if (network := self.model.lensnet.reader) is not None:
            counts = TreeShape(T, c.block_size, c.max_lod).counts[1:]
            per_reread = network.flops(CURSORS, counts[0], sum(counts), c.protected)
            # on gists of its own rows
            reader = (3 * per_reread / T + self.model.gistnet.flops_per_token()) / c.lens_row_stride
        return passes / T + tree + 6 * per_row / T / c.lens_row_stride + reader

    def activation_bytes(self, gpt: GPT, micro_batch: int) -> int:
        """Bytes of float32 that MegaContext adds to a micro-batch, from shapes: the working-context pass, the student's
        and the teacher's logits, and q, k, v and y of every layer of the LM pass."""
        c, g = self.config, gpt.config
        entries = c.budget + c.horizon + self._far_entries
        read = c.protected + c.horizon
        # as many copies of each as in the LM pass
        per_row = entries * g.n_layer * 24 * g.n_embd + read * 2 * 4 * g.vocab_size
        captured = micro_batch * self.T * g.n_layer * 4 * g.n_embd
        return 4 * (micro_batch // c.row_stride * c.variants * per_row + captured)

    def active(self, step: int) -> bool:
        return step >= self.start_step

    def training_step(self, gpt: GPT, batch, step: int, trace: Trace | None = None) -> StepResult:
        """One micro-batch, timed in `trace`. batch: inputs, targets [B, T] int64 (−1 ignored), rows [B]
        global row numbers, num_targets."""
        trace = trace or Trace("mc.step", batch.inputs.device)
        with trace.span("mc.step"):
            return self._training_step(gpt, batch, step, trace)

    def _training_step(self, gpt: GPT, batch, step: int, trace: Trace) -> StepResult:
        tokens, targets, rows = batch.inputs, batch.targets, batch.rows
        weight = ramp(step, self.start_step, self.config.ramp)
        metrics: Metrics = {}
        captured: list[Captured] | None = [] if self.active(step) else None
        arms = list(self.model.arms.values()) if captured is not None else []
        if step != self._begun:  # once a step, before it: the same when resumed
            for arm in arms:
                arm.before_step(self.model)
            self._begun = step
        with timed(trace, metrics, "lm"):
            embeds = gpt.embed(tokens)
            for arm in arms:
                arm.before_pass(embeds)
            middle: list[Tensor] = []
            hidden = gpt.hidden(tokens, inputs_embeds=embeds, capture=captured, middle=middle)
            loss = gpt.loss(hidden, targets, batch.num_targets)
            for arm in arms:
                arm.after_pass(captured)
        metrics["train.loss"] = loss.detach()
        primary = None
        if captured is not None:
            extra, primary, lesson = self._working_context(gpt, tokens, targets, rows, step, embeds, hidden, middle[0],
                                                           captured, metrics, trace)
            loss = loss + weight * extra
            if self._waits:
                self._pending = _Pending(lesson, weight)
            else:
                lens, found = self._teach_lens(lesson, trace)
                loss, metrics = loss + weight * lens, metrics | found
        return StepResult(loss, metrics, primary)

    def networks(self) -> dict[str, list[torch.nn.Parameter]]:
        """Parameters of each network, for the norms of their gradients."""
        networks = {"gistnet": self.model.gistnet.parameters(), "lensnet": self.model.lensnet.parameters()}
        return {name: found for name, params in networks.items() if (found := list(params))}  # the masked mean has none

    def after_backward(self, accumulation: int = 1, trace: Trace | None = None) -> tuple[Tensor | float, Metrics]:
        """Teach the lens what only the backward pass that has just run can say: adds to the lens's gradients
        only. Its loss and metrics."""
        if self._pending is None:
            return 0.0, {}
        pending, self._pending = self._pending, None
        loss, metrics = self._teach_lens(pending.lesson, trace or Trace("mc.step", pending.lesson.embeds_BTD.device))
        (pending.weight * loss / accumulation).backward()
        return loss.detach(), metrics

    def _teach_lens(self, lesson: Lesson, trace: Trace) -> tuple[Tensor, Metrics]:
        """The lens's loss, which reaches the lens alone."""
        metrics: Metrics = {}
        # small, and what it sums up is long
        with timed(trace, metrics, "lens"), torch.autocast(lesson.embeds_BTD.device.type, enabled=False):
            loss, found = lens_objective(self.model, lesson)
        return loss, metrics | found

    # -- the working context
    # -----------------------------------------------------------------------------------------------

    def _working_context(self, gpt: GPT, tokens: Tensor, targets: Tensor, rows: Tensor, step: int, embeds: Tensor,
                         hidden: Tensor, middle: Tensor, captured: list[Captured], metrics: Metrics,
                         trace: Trace) -> tuple[Tensor, Entries, Lesson]:
        """Losses of the working contexts of every `row_stride`-th row, the entries of each row's best variant, and what
        all of it teaches the lens."""
        c, chosen, every_row, every_target = self.config, slice(None, None, self.config.row_stride), rows, targets
        tokens, targets, rows, hidden = tokens[chosen], targets[chosen], rows[chosen], hidden[chosen]
        with timed(trace, metrics, "tree"):
            tree, n_R, far = self.model.build_tree(embeds[chosen], middle[chosen]), torch.full_like(rows,
                                                                                                    self.history), None
            added = self._added([arm.gist_part(self.model, tree, hidden) for arm in self.model.arms.values()], metrics)
            hidden = hidden.detach()
            trees = tree.with_table(tree.table_BND.detach())
            if c.far_tokens:
                far = draw_far_history(c, self.model.gistnet, embeds, every_row, chosen, n_R, c.variants, self.seed,
                                       step)
        with timed(trace, metrics, "score"):
            row = (gpt, trees, tokens, targets, rows, n_R)
            tree, tokens, targets, rows, hidden, n_RV, variant = self._variants(tree, tokens, targets, rows, hidden,
                                                                                n_R)
            scores, policy = self._scores(tree, captured, chosen, rows, variant, n_RV, step, metrics)
        with timed(trace, metrics, "focus"):
            state = self.model.allocator.allocate(scores, n_RV)
            cut, _ = self.model.allocator.cut(state)
            entries = with_continuation(cut, n_RV, c.horizon - 1)
        with timed(trace, metrics, "wc"):
            out = run_entries(gpt, self.model, tree, tokens, entries, far)
            read = read_rows(entries, c.block_size, c.protected + c.horizon - 1, c.protected, c.gists_per_block)
            token = read.token_BP.clamp_max(self.T - 1)
            wanted = targets.gather(1, token)
            counted = read.valid_BP & (wanted >= 0)
            logits = gpt.logits(take(out, read.slot_BP))
            with torch.no_grad():
                teacher = gpt.logits(take(hidden, token))
                full = token_losses(teacher, wanted.masked_fill(~counted, -1))
            nll = token_losses(logits, wanted.masked_fill(~counted, -1))
            nll_RV = row_mean(nll, counted)
            loss_RV = c.wc_weight * nll_RV
            if c.kl_weight:
                kl = row_mean(distillation(logits, teacher), counted)
                loss_RV = loss_RV + c.kl_weight * kl
                metrics["mc.loss.kl"] = kl.detach().mean()
        # the tail was read and trained on, too; reported is what lies behind the history alone
        ahead = counted & (token >= n_RV[:, None] - 1)
        delta = row_mean((nll - full).detach(), ahead)
        metrics["mc.loss.wc"] = row_mean(nll.detach(), ahead).mean()
        metrics["mc.delta_nll"] = delta.mean()
        metrics["mc.focus.utilization"] = utilization(entries_used(cut), n_RV, self.model.focus_config()).mean()
        metrics |= shares_by_lod(cut, n_RV, c.max_lod) | gist_statistics(tree)
        best = nll_RV.detach().view(c.variants, -1).argmin(0) * len(n_R) + torch.arange(len(n_R), device=rows.device)
        if c.variants > 1:
            for i, name in enumerate(POLICIES):
                metrics[f"mc.cuts.best.{name}"] = (policy[best] == i).float().mean()
        primary = Entries(*(x[best] for x in entries))
        seen = Seen(*row, state.expanded[0].unflatten(0, (c.variants, -1)), nll_RV.detach().view(c.variants, -1),
                    (self.seed, step))
        trace.event("mc.wc.snapshot", row=rows[0], tokens=n_RV[0], lods=torch.where(
            torch.arange(c.budget, device=rows.device) < primary.used_B[0], primary.lod_BM[0, :c.budget], -1))
        added += self._added([arm.lm_part(seen, embeds[chosen], primary, far) for arm in self.model.arms.values()],
                             metrics)
        watched = {name: found for name, arm in self.model.arms.items() if (found := arm.watch(self, seen)) is not None}
        lesson = Lesson(captured, embeds.detach(), every_target, every_row, trees, (self.seed, step), watched)
        return loss_RV.mean() + added, primary, lesson

    @staticmethod
    def _added(parts: list[Part | None], metrics: Metrics) -> Tensor | float:
        """The sum of what arms add to the loss, weighted."""
        found = [part for part in parts if part is not None]
        metrics |= {f"mc.loss.{name}": part.detach() for name, _, part in found}
        return sum((weight * part for _, weight, part in found), 0.0)

    def _variants(self, tree: Tree, tokens: Tensor, targets: Tensor, rows: Tensor, hidden: Tensor, n: Tensor):
        """Everything repeated once per variant: row r of variant v stands at v·R + r."""
        V, R = self.config.variants, len(rows)
        variant = torch.arange(V, device=rows.device).repeat_interleave(R)
        if V == 1:
            return tree, tokens, targets, rows, hidden, n, variant
        again = [x.repeat(V, *[1] * (x.ndim - 1)) for x in (tree.table_BND, tokens, targets, rows, hidden, n)]
        return tree.with_table(again[0]), *again[1:], variant

    @torch.no_grad()
    def _scores(self, tree: Tree, captured: list[Captured], chosen: slice, rows: Tensor, variant: Tensor, n: Tensor,
                step: int,
                metrics: Metrics) -> tuple[Tensor, Tensor]:
        """[RV, N] one row per row and variant, by a policy drawn from the mixture; a random number of blocks is left to
        show. And the policies, [RV]."""
        c, count = self.config, tree.shape.counts[1]
        key = rows * self.config.variants + variant
        draw = uniform(key, 2, self.seed, "policy", step)
        bounds = list(accumulate(c.cut_shares()[p] for p in POLICIES))[:-1]
        policy = sum((draw[:, :1] >= bound).long() for bound in bounds)
        noise = gumbel(key, count, self.seed, "cut", step)
        by_policy = torch.stack([noise, recency_scores(n, count),
                                 self.model.lens_logits(tree.levels[0], n, tree=tree) + noise,
                                 self._teacher_scores(captured, chosen, n, count, len(rows))], 1)
        scores = by_policy.gather(1, policy[..., None].expand(-1, -1, count))[:, 0]
        end = (torch.arange(count, device=rows.device) + 1) * c.block_size
        # the tail is shown anyway, the rest is the future
        scores = scores.masked_fill(end > (n - c.protected)[:, None], -torch.inf)
        for i, name in enumerate(POLICIES):
            metrics[f"mc.cuts.{name}"] = (policy == i).float().mean()
        return scores.masked_fill(self._unwanted(scores, draw[:, 1], n, step), -torch.inf), policy[:, 0]

    def _unwanted(self, scores: Tensor, draw: Tensor, n: Tensor, step: int) -> Tensor:
        """Mask all but the best m blocks: in three rows of four m is what the budget holds, else fewer, so that coarse
        cuts and levels above LOD1 are trained too; or what an arm says."""
        rank = scores.argsort(1, descending=True).argsort(1)
        done = (step - self.start_step) / (self.num_iterations - self.start_step)
        for arm in self.model.arms.values():
            if (most := arm.shown(draw, done, n, rank, self.model.focus_config())) is not None:
                return rank >= most[:, None]
        most = self.config.budget // self.config.block_size
        return rank >= torch.where(draw < 0.75, most, (draw - 0.75) * 4 * most).long()[:, None]

    def _teacher_scores(self, captured: list[Captured], chosen: slice, n: Tensor, count: int, rows: int) -> Tensor:
        """[RV, N] attention mass of the continuation's queries in the full pass: the best that
        is known before its backward."""
        if not self.config.cut_shares()["teacher"]:
            return torch.zeros(rows, count, device=n.device)
        # one position early: it predicts the first token of the continuation
        last = slice(self.history - 1, self.history + self.config.horizon - 1)
        seen = self.history // self.config.block_size
        mass = attention_mass(captured, chosen, last, seen, self.config.block_size).sum(1)
        # what lies beyond any history is never shown
        return F.pad(mass, (0, count - seen)).repeat(self.config.variants, 1)


SPANS = {"lm": "mc.lm.forward", "tree": "mc.tree.build", "score": "mc.lens.score", "focus": "mc.focus.apply",
         "wc": "mc.wc.forward",
         "lens": "mc.lens.teach"}  # part of mc.time.<part> -> span


@contextmanager
def timed(trace: Trace, metrics: Metrics, part: str):
    """A span of `trace` whose time is also a metric."""
    with trace.span(SPANS[part]) as span:
        yield
    metrics[f"mc.time.{part}"] = span.elapsed
