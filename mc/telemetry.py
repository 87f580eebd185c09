"""The metrics MegaContext records, added to nanochat's registry on import."""

from nanochat.recorder import DELTA_NATS, NATS, SECONDS, SHARES, Metric, register

RUNTIME = "mc/runtime.py"

register(
    Metric("mc.loss.wc", "{nat}", "histogram", "NLL of the continuation's next H tokens given a training working context.", short="wc",
           healthy="falls with train.loss", where=RUNTIME, buckets=NATS),
    Metric("mc.loss.kl", "{nat}", "histogram", "KL from the full-context distribution to the working context's.", short="kl",
           healthy="falls", where=RUNTIME, buckets=NATS),
    Metric("mc.loss.lens", "{nat}", "histogram", "Cross-entropy of the lens's distribution over blocks against its teacher's.", short="lens",
           healthy="falls towards mc.lens.teacher_entropy", where=RUNTIME, buckets=NATS),
    Metric("mc.delta_nll", "{nat}", "histogram", "NLL given the working context minus NLL given the full context, same tokens.", short="ΔNLL",
           healthy="falls towards 0", where=RUNTIME, buckets=DELTA_NATS),
    Metric("mc.val.delta_nll", "{nat}", "gauge", "ΔNLL@H on held-out rows by what is shown (whole history at a LOD, or a focus) and compression ratio.",
           healthy="lens below window, random and recency", where=RUNTIME),
    Metric("mc.lens.hit", "1", "histogram", "Share of queries, weighted by what is to win, whose best block the lens ranks first.", short="hit",
           healthy="rises", where=RUNTIME, buckets=SHARES),
    Metric("mc.lens.teacher_entropy", "{nat}", "histogram", "Entropy of the teacher's distribution over blocks.",
           healthy="well below ln(blocks): the base looks at some blocks more than at others", where=RUNTIME, buckets=NATS),
    Metric("mc.focus.utilization", "1", "histogram", "Entries used over the largest count reachable within the budget.",
           healthy="above 0.8", where=RUNTIME, buckets=SHARES),
    *(Metric(f"mc.cuts.{policy}", "1", "histogram", f"Share of working contexts chosen by the {policy} policy.",
             healthy="the share that --mc_cuts gives it", where=RUNTIME, buckets=SHARES)
      for policy in ("random", "recency", "lens", "teacher")),
    *(Metric(f"mc.time.{part}", "s", "histogram", f"Time of {what}, per micro-batch; on CUDA the device's.", healthy="steady", where=RUNTIME, buckets=SECONDS)
      for part, what in (("lm", "the LM pass, forward"), ("tree", "building the tree"), ("score", "scoring blocks by the drawn policies"),
                         ("focus", "choosing cuts by the scores"), ("wc", "the working-context pass, forward"),
                         ("lens", "the lens, teacher and backward included"))),
)
