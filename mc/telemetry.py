"""The metrics MegaContext records, added to nanochat's registry on import."""

from nanochat.recorder import Metric, register

register(
    Metric("mc.loss.wc", "{nat}", "histogram", "NLL of the continuation's next H tokens given a training working context.", short="wc"),
    Metric("mc.loss.kl", "{nat}", "histogram", "KL from the full-context distribution to the working context's.", short="kl"),
    Metric("mc.loss.lens", "{nat}", "histogram", "Cross-entropy of the lens's distribution over blocks against its teacher's.", short="lens"),
    Metric("mc.delta_nll", "{nat}", "histogram", "NLL given the working context minus NLL given the full context, same tokens.", short="ΔNLL"),
    Metric("mc.val.delta_nll", "{nat}", "gauge", "ΔNLL@H on held-out rows by what is shown (whole history at a LOD, or a focus) and compression ratio."),
    Metric("mc.lens.hit", "1", "histogram", "Share of queries, weighted by what is to win, whose best block the lens ranks first.", short="hit"),
    Metric("mc.lens.teacher_entropy", "{nat}", "histogram", "Entropy of the teacher's distribution over blocks."),
    Metric("mc.focus.utilization", "1", "histogram", "Entries used over the largest count reachable within the budget."),
    *(Metric(f"mc.cuts.{policy}", "1", "histogram", f"Share of working contexts chosen by the {policy} policy.")
      for policy in ("random", "recency", "lens", "teacher")),
    *(Metric(f"mc.time.{part}", "s", "histogram", f"Wall time of {what} per micro-batch (CPU only).")
      for part, what in (("lm", "the LM pass, forward"), ("tree", "building the tree"), ("focus", "choosing cuts"),
                         ("wc", "the working-context pass, forward"), ("lens", "the lens, teacher and backward included"))),
)
