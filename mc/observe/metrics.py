"""The metrics that sessions and probes record, added to nanochat's registry on import; `mc.telemetry`
has those of a training step."""

import mc.telemetry  # noqa: F401  those of a training step
from nanochat.telemetry.metrics import SECONDS, SHARES, Metric, one_two_five, register

DIAGNOSTICS = "scripts/eval/probe.py"
SESSION = "mc/session/meter.py"

register(
    Metric("mc.val.nll", "{nat}", "gauge",
           "Mean NLL of the same H held-out tokens, by attribute shown: full context, window (last W tokens), working "
           "context with lens, "
           "recency or random focus, or the whole history at one LOD (lod1, …).",
           healthy="full below lens below window, recency and random", where=DIAGNOSTICS),
    Metric("mc.val.delta_nll", "{nat}", "gauge",
           "ΔNLL@H = mc.val.nll of what is shown - mc.val.nll of full, by attribute shown.",
           healthy="lens below half of window; lod1 below lod2; all falling", where=DIAGNOSTICS),
    Metric("mc.val.band_delta_nll", "{nat}", "gauge",
           "ΔNLL@H of lens focus by attribute band: to_5 with n / 4 entries, to_10 with n / 8, over_10 with n / 16 "
           "(where they hold the coarsest cut).",
           healthy="rises with the band; each falls over training", where=DIAGNOSTICS),
    Metric("mc.lens.rank_correlation", "1", "gauge",
           "Spearman correlation over up to 32 sampled blocks of lens logit and measured utility, NLL(coarsest cut) - "
           "NLL(that block shown raw).",
           healthy="above 0 and rising; at or below 0 the lens picks no better than chance", where=DIAGNOSTICS),
    Metric("mc.lens.hit_at", "1", "gauge",
           "Share of the k most useful sampled blocks among the lens's k best, by attribute k: 1, or budget (what the "
           "budget shows).",
           healthy="above k / blocks and rising", where=DIAGNOSTICS),
    Metric("mc.lens.regret", "{nat}", "gauge",
           "NLL(lens focus) - least NLL of every focus tried: each sampled block alone, the best of them together, all "
           "policies, both teachers'.",
           healthy="falls; never below 0", where=DIAGNOSTICS),
    Metric("mc.lens.utility_spread", "{nat}", "gauge",
           "Standard deviation of the measured utilities of sampled blocks: how much there is to choose.",
           healthy="above 0.01; below, agreement is noise", where=DIAGNOSTICS),
    Metric("mc.focus.swap_rate", "1", "gauge",
           "(Expands + collapses by edits) / blocks shown raw or as LOD1, mean per refocus of a replay: held-out rows "
           "growing block by block.",
           healthy="below 0.12", where=DIAGNOSTICS),
    Metric("mc.focus.expands", "{node}", "gauge", "Nodes that edits expanded, mean per refocus of a replay.",
           healthy="about as many as collapses", where=DIAGNOSTICS),
    Metric("mc.focus.collapses", "{node}", "gauge", "Nodes that edits collapsed, mean per refocus of a replay.",
           healthy="about as many as expands", where=DIAGNOSTICS),
    Metric("mc.focus.forced", "{node}", "gauge", "Nodes collapsed by the hard budget, mean per refocus of a replay.",
           healthy="at most 1: a block arrives per refocus", where=DIAGNOSTICS),
    Metric("mc.focus.replay_utilization", "1", "gauge",
           "Entries used / the largest count reachable within the budget, mean per refocus of a replay.",
           healthy="above 0.8", where=DIAGNOSTICS),
    Metric("mc.focus.residency", "{refocus}", "gauge",
           "Refocuses that blocks shown by an edit stayed shown, together / times one of them was hidden again, by an "
           "edit or by force (at least 1), in a replay.",
           healthy="above 2", where=DIAGNOSTICS),
    Metric("mc.focus.residency_p95", "{refocus}", "gauge",
           "95th percentile of single stays in a replay, those cut short by its end included.",
           healthy="well above mc.focus.residency's least", where=DIAGNOSTICS),
    Metric("mc.focus.thrash", "1", "gauge", "Share of the nodes flipped by edits whose flip undid another edit's of at "
                                            "most 2 x cooldown refocuses ago (2 without cooldown), in a replay.",
           healthy="below 0.2 once the lens has learned", where=DIAGNOSTICS),
)

register(
    Metric("gen_ai.server.request.duration", "s", "histogram",
           "From a request's first token handed in to its last token out.",
           healthy="flat in the length of the history", where=SESSION, buckets=SECONDS),
    Metric("gen_ai.server.time_to_first_token", "s", "histogram",
           "From a request's first token handed in to its first token out: ingest, refocus, first decode.",
           healthy="grows with the request's tokens alone", where=SESSION, buckets=SECONDS),
    Metric("gen_ai.server.time_per_output_token", "s", "histogram",
           "Time per generated token after the first, mean between two refocuses.",
           healthy="flat in the length of the history", where=SESSION, buckets=SECONDS),
    Metric("mc.session.refocus_time", "s", "histogram",
           "Wall time of one refocus: scoring, edits, recomputing what changed.",
           healthy="flat in the length of the history; below the time of the tokens between two refocuses",
           where=SESSION, buckets=SECONDS),
    Metric("mc.session.ingest_rate", "{token}/s", "gauge",
           "Tokens appended per second of append: embedding, gists, keys, storing.", healthy="steady", where=SESSION),
    Metric("mc.session.history", "{token}", "gauge", "Tokens of history.", healthy="grows", where=SESSION),
    Metric("mc.session.entries", "{entry}", "gauge", "Entries of the working context, by attribute lod.",
           healthy="sum at most W", where=SESSION),
    Metric("mc.session.omitted", "{token}", "gauge",
           "Tokens of history that no entry stands for: the budget does not tile the history. They are searched, and "
           "shown when they are asked for.",
           healthy="0 while the budget tiles the history; else below mc.session.history by what blocks and gists show",
           where=SESSION),
    Metric("mc.session.kv_kept", "{entry}", "counter", "Entries whose keys and values were kept over a refocus.",
           healthy="most of the entries", where=SESSION),
    Metric("mc.session.kv_recomputed", "{entry}", "counter",
           "Entries whose keys and values were computed again at a refocus, or for the first time.",
           healthy="less than kv_kept", where=SESSION),
    Metric("mc.session.store_reads", "{record}", "counter",
           "Records read from the store: token ids, gists, keys of a block; also to make the nodes of an append.",
           healthy="flat per refocus, appends apart", where=SESSION),
    Metric("mc.session.swap_rate", "1", "histogram",
           "(Expands + collapses by edits) / blocks shown raw or as LOD1, per refocus.",
           healthy="mean below 0.12", where=SESSION, buckets=SHARES),
    Metric("mc.session.expands", "{node}", "counter", "Nodes that edits expanded.",
           healthy="about as many as collapses", where=SESSION),
    Metric("mc.session.collapses", "{node}", "counter", "Nodes that edits collapsed.",
           healthy="about as many as expands", where=SESSION),
    Metric("mc.session.forced", "{node}", "counter", "Nodes collapsed by the hard budget.",
           healthy="at most one per block appended", where=SESSION),
    Metric("mc.session.undone", "{node}", "counter",
           "Nodes whose flip by an edit undid another edit's of at most 2 x cooldown refocuses ago (2 without).",
           healthy="below a tenth of expands + collapses", where=SESSION),
    Metric("mc.session.utilization", "1", "gauge", "Entries used / the largest count reachable within the budget; raw "
                                                   "entries alone where spans are left out.",
           healthy="above 0.95; 0.69 to 0.80 was measured on text at the market price",
           where=SESSION),
    Metric("mc.session.residency", "{refocus}", "histogram",
           "Refocuses that a block had stayed shown by an edit when it was hidden.",
           healthy="mean above 2", where=SESSION, buckets=one_two_five(0, 4)),
)
