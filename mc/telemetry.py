"""The metrics MegaContext records, added to nanochat's registry on import; and what every step
measures from what it holds anyway.

Shapes: B rows, Q queries, N blocks, W entries, D width.
"""

import torch
from torch import Tensor

from mc.config import POLICIES
from mc.mega_context import Tree
from mc.working_context import Cut, entries_used, spans
from nanochat.telemetry.metrics import (
    DELTA_NATS, NATS, NORMS, SECONDS, SHARES, Labelled, Metric, one_two_five, register,
)  # fmt: skip

RUNTIME = "mc/runtime.py"
TRAIN = "scripts/base_train.py"

register(
    Metric("mc.loss.wc", "{nat}", "histogram",
           "NLL of the continuation's next H tokens given a training working context.", short="wc",
           healthy="falls with train.loss", where=RUNTIME, buckets=NATS),
    Metric("mc.loss.kl", "{nat}", "histogram", "KL from the full-context distribution to the working context's.",
           short="kl",
           healthy="falls", where=RUNTIME, buckets=NATS),
    Metric("mc.loss.contrast", "{nat}", "histogram",
           "Cross-entropy of each gist naming its own content among its row's nodes, mean over levels "
           "(--mc_arms=contrast).",
           healthy="near 0: gists tell their blocks apart", where=RUNTIME, buckets=NATS),
    Metric("mc.loss.horizon_gist", "{nat}", "histogram",
           "Cross-entropy of the hidden state at a node's end naming the next node's gist among its row's, mean over "
           "the levels of which a row has two nodes (--mc_arms=horizon).",
           healthy="below ln(nodes), falling slowly", where=RUNTIME, buckets=NATS),
    Metric("mc.loss.placed", "{nat}", "histogram",
           "Next-token loss of rows that the LM reads at the positions of their primary working context "
           "(--mc_arms=placed).",
           healthy="falls with train.loss", where=RUNTIME, buckets=NATS),
    Metric("mc.loss.lens", "{nat}", "histogram",
           "What the lens is taught, all targets and terms: with a dense teacher cross-entropies against its "
           "distribution.", short="lens",
           healthy="falls; with one dense teacher towards twice mc.lens.teacher_entropy", where=RUNTIME, buckets=NATS),
    Metric("mc.loss.lens_part", "{nat}", "histogram",
           "One target or term of the lens's loss, not yet weighted, by attribute part.",
           healthy="falls", where="mc/lens_loss.py", buckets=NATS),
    Metric("mc.delta_nll", "{nat}", "histogram",
           "NLL given the working context minus NLL given the full context, same tokens.", short="ΔNLL",
           healthy="falls towards 0", where=RUNTIME, buckets=DELTA_NATS),
    Metric("mc.lens.hit", "1", "histogram",
           "Share of queries, weighted by what is to win, whose best block the lens ranks first.", short="hit",
           healthy="rises", where=RUNTIME, buckets=SHARES),
    Metric("mc.lens.teacher_entropy", "{nat}", "histogram", "Entropy of the teacher's distribution over blocks.",
           healthy="well below ln(blocks): the base looks at some blocks more than at others", where=RUNTIME,
           buckets=NATS),
    Metric("mc.focus.utilization", "1", "histogram",
           "Entries used by a training cut / the largest count reachable within the budget; one cut in four is coarse "
           "on purpose.",
           healthy="above 0.8, 0.9 and more where every cut fills the budget", where=RUNTIME, buckets=SHARES),
    *(Metric(f"mc.cuts.{policy}", "1", "histogram", f"Share of working contexts chosen by the {policy} policy.",
             healthy="the share that --mc_cuts gives it", where=RUNTIME, buckets=SHARES)
      for policy in POLICIES),
    *(Metric(f"mc.cuts.best.{policy}", "1", "histogram",
             f"Sibling success: share of rows of whose working contexts (--mc_variants of 2 or more) the {policy} "
             f"policy's had the lowest loss; / mc.cuts.{policy}: above 1 where that policy wins.",
             healthy="lens and teacher above their mc.cuts share", where=RUNTIME,
             buckets=SHARES)
      for policy in POLICIES),
    Metric("mc.lens.spread", "{nat}", "histogram",
           "Standard deviation of the lens's logits over the blocks a query can see, mean over queries.",
           healthy="rises from its start and stays: a lens that scores all alike has no opinion", where=RUNTIME,
           buckets=NATS),
    Metric("mc.grad_norm", "1", "histogram",
           "L2 norm of the gradients of a network (gistnet or lensnet), by attribute network.",
           healthy="above 0, no jumps", where=TRAIN, buckets=NORMS),
    Metric("mc.update", "1", "gauge", "L2 norm of what one step changed in a network's parameters / their norm, at log "
                                      "lines, by attribute network.",
           healthy="follows the learning rate; 0 is a network that no optimizer moves", where=TRAIN),
    *(Metric(f"mc.time.{part}", "s", "histogram", f"Time of {what}, per micro-batch; on CUDA the device's.",
             healthy="steady", where=RUNTIME, buckets=SECONDS)
      for part, what in (("lm", "the LM pass, forward"), ("tree", "building the tree"),
                         ("score", "scoring blocks by the drawn policies"),
                         ("focus", "choosing cuts by the scores"),
                         ("wc", "the working-context pass, forward, and measured edits"),
                         ("lens", "the lens and its teacher, forward"))),
    Metric("mc.time.probe", "s", "gauge",
           "Wall time of the last probe; like evaluation it is not part of train.step_time.",
           healthy="steady; below --probe_every steps' time / 20", where=TRAIN),
)

HERE = "mc/telemetry.py"

register(
    Metric("mc.focus.compression", "{token}", "histogram",
           "Tokens of history per entry of a training cut: n / entries used.",
           healthy="n / W, more where cuts are coarse on purpose", where=HERE, buckets=one_two_five(0, 4)),
    Metric("mc.focus.entry_share", "1", "histogram", "Share of a training cut's entries at each LOD, by attribute lod.",
           healthy="LOD0 the most, every trained LOD above 0", where=HERE, buckets=SHARES),
    Metric("mc.focus.token_share", "1", "histogram",
           "Share of the history's tokens shown at each LOD, by attribute lod.",
           healthy="LOD0 near its entry share / mc.focus.compression; the rest in gists", where=HERE, buckets=SHARES),
    Metric("mc.gist.rms", "1", "histogram",
           "Root mean square of a gist's elements, by attribute lod; token embeddings have 1.",
           healthy="1", where=HERE, buckets=NORMS),
    Metric("mc.gist.variance", "1", "histogram",
           "Variance of a gist's elements over the nodes of a row, mean over elements, by attribute lod.",
           healthy="well above 0: gists that are all alike say nothing", where=HERE, buckets=SHARES),
    Metric("mc.gist.effective_rank", "1", "histogram",
           "Participation ratio tr(C)^2 / tr(C^2) of the covariance C of a row's gists, by attribute lod; at most "
           "nodes - 1 and the width.",
           healthy="steady or rising; falling towards 1 is collapse", where=HERE, buckets=one_two_five(0, 3)),
)


Metrics = dict[str, Tensor]  # keys: names, or `Labelled`; values: tensors of one element, on the device


# ---------------------------------------------------------------------------------------------------------------------
# Every step: device tensors, nothing waits for them


def shares_by_lod(cut: Cut, n_B: Tensor, max_lod: int) -> Metrics:
    """Share of a working context's entries, and of its history's tokens, at each LOD; and tokens per entry."""
    _, length_BW = spans(cut)
    used_B = entries_used(cut)
    metrics: Metrics = {"mc.focus.compression": (n_B / used_B).mean()}
    for lod in range(max_lod + 1):
        mine_BW = cut.valid_BW & (cut.lod_BW == lod)
        entries_B = mine_BW.sum(1) * (cut.n_gists if lod else 1)
        metrics[Labelled("mc.focus.entry_share", lod=lod)] = (entries_B / used_B).mean()
        metrics[Labelled("mc.focus.token_share", lod=lod)] = ((length_BW * mine_BW).sum(1) / n_B).mean()
    return metrics


@torch.no_grad()
def gist_statistics(tree: Tree) -> Metrics:
    """Per level with at least two nodes a row: rms of a gist's elements (1 where its size matches token embeddings),
    variance over the nodes of a row (0: all alike), and effective rank of their deviations from the mean: participation
    ratio tr(C)² / tr(C²) of the covariance C, between 1 and min(N − 1, D)."""
    metrics: Metrics = {}
    for lod, level_BND in enumerate(tree.levels):
        if lod == 0 or level_BND.shape[1] < 2:
            continue
        x_BND = level_BND.detach().to(torch.promote_types(level_BND.dtype, torch.float32))
        rms_BN, x_BND = x_BND.square().mean(-1).sqrt(), x_BND - x_BND.mean(1, keepdim=True)
        wide = x_BND.shape[1] > x_BND.shape[2]
        gram = x_BND.mT @ x_BND if wide else x_BND @ x_BND.mT
        trace_B, square_B = gram.diagonal(dim1=1, dim2=2).sum(-1), gram.square().sum((1, 2))
        metrics[Labelled("mc.gist.rms", lod=lod)] = rms_BN.mean()
        metrics[Labelled("mc.gist.variance", lod=lod)] = x_BND.square().mean()
        metrics[Labelled("mc.gist.effective_rank", lod=lod)] = (trace_B.square() / square_B.clamp_min(1e-30)).mean()
    return metrics


def spread(logits_BQN: Tensor, visible_BQN: Tensor) -> Tensor:
    """[] standard deviation of the lens's logits over the visible blocks, mean over queries
    that see two or more, and rows."""
    count_BQ = visible_BQN.sum(-1)
    mean_BQ1 = (logits_BQN * visible_BQN).sum(-1, keepdim=True) / count_BQ.clamp_min(1).unsqueeze(-1)
    deviation_BQ = ((((logits_BQN - mean_BQ1) * visible_BQN).square().sum(-1)) / count_BQ.clamp_min(1)).sqrt()
    several_BQ = count_BQ > 1
    return ((deviation_BQ * several_BQ).sum(1) / several_BQ.sum(1).clamp_min(1)).mean()
