"""What to look at, and when to worry: every panel and alert, defined once.

Grafana's dashboards and the alert rules (`runs/observability/make_dashboards.py`) render an expression as PromQL, the
offline page (`scripts/mc_dash.py`) evaluates the same expression on the lines of a run's metrics.jsonl. A panel's
description says what healthy looks like; an alert names its cause and its remedy.

    Value("mc.val.delta_nll", shown="lens") / Value("mc.val.delta_nll", shown="window")

A value is, per run, a gauge's last, a counter's rate per second, or a histogram's mean. `by` draws one
line per value of an attribute.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import mc.observe.metrics  # noqa: F401  registers MegaContext's metrics
import nanochat.telemetry.otlp  # noqa: F401  and those of the exporter
from mc.config import POLICIES
from nanochat.telemetry.metrics import METRICS, Metric

RUN = ("mc_run_id", "mc_variant")  # labels of a run, as `mc.run.id` and `mc.variant` arrive in a Prometheus store
WINDOW = "$__rate_interval"  # Grafana's: several scrape intervals
# how long a value that is not recorded at every log line counts: evaluations and probes must come more often
LASTING = "30m"
# gauges that are such
SPARSE = ("train.nonfinite", "val.", "mc.val.", "mc.lens.", "mc.focus.", "mc.time.probe", "checkpoint.", "mc.session.")

UNITS = {"s": "seconds", "By": "bytes", "1": "ratio"}


def prometheus_name(metric: Metric) -> str:
    """As OpenTelemetry's rules rename a metric for Prometheus: dots to underscores, then unit, `total` or
    `ratio`, unless they are there."""
    words = re.findall(r"[a-z0-9]+", metric.name)
    main, _, per = metric.unit.partition("/")
    if main not in ("", "1") and "{" not in main:
        words = [w for w in words if w != UNITS[main]] + [UNITS[main]]
    if per and "{" not in per:
        word = {"s": "second"}.get(per, per)
        words += [] if word in words else ["per", word]
    if metric.kind == "counter":
        words = [w for w in words if w != "total"] + ["total"]
    if metric.unit == "1" and metric.kind == "gauge":
        words = [w for w in words if w != "ratio"] + ["ratio"]
    return "_".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Expressions


Rows = Sequence[Mapping[str, float | None]]  # lines of metrics.jsonl
Lines = dict[str, float]  # what an expression is at one moment: by attribute value, "" without `by`


class Expr:
    def promql(self, scope: str, window: str = WINDOW) -> str:
        """scope: label matchers of the runs in question, `mc_run_id=~"$run"`."""
        raise NotImplementedError

    def at(self, rows: Rows, i: int) -> Lines:
        """Its values in line i of metrics.jsonl; empty where something is missing."""
        raise NotImplementedError

    def metrics(self) -> Iterator[str]:
        raise NotImplementedError

    def __add__(self, other): return Binary("+", self, other)
    def __sub__(self, other): return Binary("-", self, other)
    def __mul__(self, other): return Binary("*", self, other)
    def __truediv__(self, other): return Binary("/", self, other)
    def __rsub__(self, other): return Binary("-", Number(other), self)
    def __rmul__(self, other): return Binary("*", Number(other), self)


@dataclass(frozen=True)
class Number(Expr):
    value: float

    def promql(self, scope: str, window: str = WINDOW) -> str:
        return f"{self.value:g}"

    def at(self, rows: Rows, i: int) -> Lines:
        return {"": self.value}

    def metrics(self) -> Iterator[str]:
        return iter(())


class Value(Expr):
    """One metric. by: an attribute, one line for each of its values. over: the mean of a gauge over that long, `1h`;
    offline over all lines so far. whole: a histogram's mean since its process began, for processes too short for a
    rate. where: attributes it must have. Offline, a counter's rate is since the line before."""

    def __init__(self, name: str, by: str = "", over: str = "", whole: bool = False, **where: str | int):
        self.name, self.by, self.over, self.whole, self.where = name, by, over, whole, {k: str(v)
                                                                                        for k, v in where.items()}

    @property
    def metric(self) -> Metric:
        return METRICS[self.name]

    def promql(self, scope: str, window: str = WINDOW) -> str:
        name, kind = prometheus_name(self.metric), self.metric.kind
        labels = ",".join([scope, *(f'{k}="{v}"' for k, v in self.where.items())])
        group = f"by ({', '.join([*RUN, *([self.by] if self.by else [])])})"
        if kind == "histogram" and self.whole:
            return (f"sum {group} (last_over_time({name}_sum{{{labels}}}[{LASTING}])) / sum {group} "
                    f"(last_over_time({name}_count{{{labels}}}[{LASTING}]))")
        if kind == "histogram":  # a sum of values that may be negative can fall, which `rate` would take for a restart
            change = "delta" if self.metric.buckets[0] < 0 else "rate"
            return (f"sum {group} ({change}({name}_sum{{{labels}}}[{window}])) / sum {group} "
                    f"({change}({name}_count{{{labels}}}[{window}]))")
        if kind == "counter":
            return f"sum {group} (rate({name}{{{labels}}}[{window}]))"
        if self.over:
            return f"avg {group} (avg_over_time({name}{{{labels}}}[{self.over}]))"
        inner = (f"last_over_time({name}{{{labels}}}[{LASTING}])" if self.name.startswith(SPARSE)
                 else f"{name}{{{labels}}}")
        return f"avg {group} ({inner})"

    def at(self, rows: Rows, i: int) -> Lines:
        row, found = rows[i], {}
        for key, attributes in keys_of(self.name, tuple(row)):
            if row[key] is None or any(attributes.get(k) != v for k, v in self.where.items()):
                continue
            value = row[key]
            if self.metric.kind == "counter":
                if not i:
                    continue
                value /= max(row["time"] - rows[i - 1]["time"], 1e-3)
            if self.over:
                earlier = [r[key] for r in rows[:i + 1] if r.get(key) is not None]
                value = sum(earlier) / len(earlier)
            found[attributes.get(self.by, "")] = value
        return found

    def metrics(self) -> Iterator[str]:
        yield self.name


@cache
def keys_of(name: str, keys: tuple[str, ...]) -> list[tuple[str, dict[str, str]]]:
    """Those of a line's keys that are a metric, `name` or `name{lod=1}`, with their attributes."""
    found = []
    for key in keys:
        plain, _, rest = key.partition("{")
        if plain == name:
            found.append((key, dict(pair.partition("=")[::2] for pair in rest.rstrip("}").split(",") if pair)))
    return found


OPERATORS: dict[str, Callable[[float, float], float]] = {"+": operator.add, "-": operator.sub, "*": operator.mul,
                                                         "/": operator.truediv}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {">": operator.gt, "<": operator.lt, "<=": operator.le,
                                                          ">=": operator.ge, "==": operator.eq}


@dataclass(frozen=True)
class Binary(Expr):
    op: str
    left: Expr
    right: Expr | float

    def promql(self, scope: str, window: str = WINDOW) -> str:
        return " ".join([self._side(self.left, scope, window), self.op, self._side(self.right, scope, window)])

    def _side(self, side: Expr | float, scope: str, window: str) -> str:
        text = as_expr(side).promql(scope, window)
        return text if isinstance(as_expr(side), Number) or (isinstance(side, Value)
                                                             and side.metric.kind != "histogram") else f"({text})"

    def at(self, rows: Rows, i: int) -> Lines:
        left, right = self.left.at(rows, i), as_expr(self.right).at(rows, i)
        if isinstance(as_expr(self.right), Number):
            right = dict.fromkeys(left, right[""])
        if isinstance(self.left, Number):
            left = dict.fromkeys(right, left[""])
        return {key: OPERATORS[self.op](x, right[key]) for key, x in left.items() if key in right
                and (self.op != "/" or right[key])}

    def metrics(self) -> Iterator[str]:
        yield from self.left.metrics()
        yield from as_expr(self.right).metrics()


def as_expr(x: Expr | float) -> Expr:
    return x if isinstance(x, Expr) else Number(x)


# ---------------------------------------------------------------------------------------------------------------------
# Panels


@dataclass(frozen=True)
class Line:
    """label: what it is called beside the run's name; with `by`, the attribute's value follows."""

    expr: Expr
    label: str = ""

    @property
    def by(self) -> str:
        return self.expr.by if isinstance(self.expr, Value) else ""


@dataclass(frozen=True)
class Panel:
    """x: the metric on the horizontal axis; "" is time. unit: Grafana's. limit: where an
    alert stands, drawn as a line."""

    title: str
    description: str
    lines: tuple[Line, ...]
    unit: str = "short"
    x: str = ""
    limit: float | None = None
    zero: bool = False  # the vertical axis begins at 0


@dataclass(frozen=True)
class Dashboard:
    uid: str
    title: str
    description: str
    rows: dict[str, tuple[Panel, ...]] = field(default_factory=dict)

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows.values() for panel in row]


def panel(title: str, description: str, *lines: Line | Expr, **options) -> Panel:
    return Panel(title, description, tuple(line if isinstance(line, Line) else Line(line) for line in lines), **options)


def overlays() -> tuple[Panel, ...]:
    axes = {"train.tokens": "tokens", "train.flops": "FLOPs", "train.elapsed": "wall-clock"}
    healthy = {
        "train.tokens": "Healthy: MegaContext within 0.05 nat of vanilla at equal tokens; its own losses must not cost "
                        "the base.",
        "train.flops": "Healthy: MegaContext a little to the right of vanilla, by the FLOPs of its working contexts.",
        "train.elapsed": "Healthy: MegaContext at most 1.3 times as far right as vanilla.",
    }
    return tuple(
        panel(f"{what} by {word}", healthy[x], Line(Value(metric)), x=x)
        for metric, what in (("val.loss", "Held-out loss"), ("train.loss", "Training loss"))
        for x, word in axes.items()
    )


TRAINING = Dashboard("mc-training", "MegaContext: training",
                     "Vanilla and MegaContext side by side; every loss term; what a working context costs in nats.", {
    "Vanilla against MegaContext": overlays(),
    "Losses": (
        panel("Loss", "Next-token loss of the full rows, and of the continuation given a training working context. "
                      "Healthy: both fall; the second stays above the first.",
              Line(Value("train.loss"), "LM"), Line(Value("mc.loss.wc"), "working context")),
        panel("Held-out bits per byte", "Independent of the vocabulary. Healthy: falls; flat while the training loss "
                                        "falls is overfitting.", Value("val.bpb")),
        panel("Distillation", "KL from the full-context distribution to the working context's. Healthy: falls.",
              Value("mc.loss.kl")),
        panel("Gist losses", "Of runs with the arms contrast and horizon: a gist names its own block, a hidden state "
                             "the next node's gist. Healthy: both fall.",
              Line(Value("mc.loss.contrast"), "contrast"), Line(Value("mc.loss.horizon_gist"), "horizon")),
        panel("LM at other positions", "Of runs with the arm placed: rows that the LM reads at the positions of their "
                                       "primary working context. Healthy: falls with the loss.",
              Value("mc.loss.placed")),
        panel("Lens loss", "The whole, each target and term before it is weighted, and the teacher's entropy. A dense "
                           "teacher's part is a cross-entropy, twice (own vote and tail). "
              "Healthy: the loss falls, such a part towards twice the entropy; flat from the first steps means that "
              "the lens learns nothing.",
              Line(Value("mc.loss.lens"), "loss"), Line(Value("mc.loss.lens_part", by="part")),
              Line(Value("mc.lens.teacher_entropy"), "entropy")),
        panel("Gradient norms", "Of base, GistNet and LensNet. Healthy: steady, no jumps, never 0: a network at 0 is "
                                "in no graph.",
              Line(Value("train.grad_norm"), "base"), Line(Value("mc.grad_norm", by="network")), zero=True),
        panel("Updates", "What a step changes in a network, relative to its size. Healthy: follows the learning rate; "
                         "0 is a network that no optimizer moves.",
              Value("mc.update", by="network"), zero=True),
        panel("Schedule",
              "Learning-rate multiplier and Muon's momentum. Healthy: up, flat, down; momentum 0.85 to 0.95.",
              Line(Value("optim.lr"), "learning rate"), Line(Value("optim.momentum"), "momentum"), zero=True),
        panel("Not finite", "1 once a loss was not finite, which stops the run; recorded values of any metric that "
                            "were not, per second. Healthy: 0.",
              Line(Value("train.nonfinite"), "loss"), Line(Value("telemetry.not_finite"), "values"), limit=0.5,
              zero=True),
        panel("Tokens", "So far. Healthy: a straight line.", Value("train.tokens")),
        panel("FLOPs", "So far, counted from shapes. Healthy: a straight line, steeper once MegaContext begins.",
              Value("train.flops")),
    ),
    "What a working context costs": (
        panel("NLL by what is shown", "The same held-out tokens given the full context, the last W tokens, and working "
                                      "contexts. Healthy: full lowest, lens next, "
              "below window, recency and random.", Line(Value("mc.val.nll", by="shown"))),
        panel("ΔNLL@H by what is shown", "NLL minus that of the full context. Healthy: lens below half of window; lod1 "
                                         "below lod2.", Line(Value("mc.val.delta_nll", by="shown"))),
        panel("Gap closed by the lens", "1 - ΔNLL(lens) / ΔNLL(window). Healthy: above 0.5 and rising; at 0 the lens "
                                        "shows nothing better than the last tokens.",
              1 - Value("mc.val.delta_nll", shown="lens") / Value("mc.val.delta_nll", shown="window"), limit=0.5),
        panel("ΔNLL@H by compression band", "Lens focus with n/4, n/8 and n/16 entries. Healthy: falls in each band; "
                                            "rises from band to band.",
              Line(Value("mc.val.band_delta_nll", by="band"))),
        panel("Training ΔNLL@H", "Of the cuts that were trained on, coarse and random ones included. Healthy: falls.",
              Value("mc.delta_nll")),
    ),
})  # fmt: skip

FOCUS = Dashboard("mc-focus", "MegaContext: focus", "Is the lens learning, and is the allocator calm?", {
    "Is the lens learning?": (
        panel("Agreement with measured utility",
              "Spearman correlation of lens logits with what showing a block really gains. Healthy: above 0 and "
              "rising; at or below 0 "
              "the lens picks no better than chance.", Value("mc.lens.rank_correlation"), limit=0),
        panel("Hits", "Share of the most useful sampled blocks that the lens ranks as high, for k = 1 and k = what the "
                      "budget shows; and of teacher queries. "
              "Healthy: above chance (k over the number of blocks) and rising.",
              Line(Value("mc.lens.hit_at", by="k"), "k ="), Line(Value("mc.lens.hit"), "teacher's best"), zero=True),
        panel("Regret", "NLL of lens focus minus the best of all focus that was tried. Healthy: falls towards 0.",
              Value("mc.lens.regret"), zero=True),
        panel("Spread", "Standard deviation of the lens's logits over blocks, and of measured utilities. Healthy: the "
                        "first rises and stays; a lens that scores all "
              "alike has no opinion. Where utilities spread less than 0.01 nat there is nothing to choose.",
              Line(Value("mc.lens.spread"), "logits"), Line(Value("mc.lens.utility_spread"), "utilities"), zero=True),
    ),
    "Is the allocator calm?": (
        panel("Swap rate", "Nodes flipped by edits over blocks shown raw or as LOD1, per refocus of a replay. Healthy: "
                           "below 0.12.", Value("mc.focus.swap_rate"), limit=0.12, zero=True),
        panel("Edits", "Nodes expanded and collapsed by edits, and collapsed by the hard budget, per refocus. Healthy: "
                       "the first two alike; forced at most 1.",
              Line(Value("mc.focus.expands"), "expands"), Line(Value("mc.focus.collapses"), "collapses"),
              Line(Value("mc.focus.forced"), "forced"), zero=True),
        panel("Residency", "Refocuses that a block shown by an edit stays shown: mean, and 95th percentile. Healthy: "
                           "mean above 2.",
              Line(Value("mc.focus.residency"), "mean"), Line(Value("mc.focus.residency_p95"), "p95"), limit=1.8,
              zero=True),
        panel("Thrash", "Share of flips that undo another within twice the cooldown. Healthy: below 0.2 once the lens "
                        "has learned.", Value("mc.focus.thrash"), limit=0.3, zero=True),
        panel("Budget utilization", "Entries used over the largest count within reach: in a replay, and of training "
                                    "cuts (one in four is coarse on purpose). "
              "Healthy: replay above 0.8.", Line(Value("mc.focus.replay_utilization"), "replay"),
              Line(Value("mc.focus.utilization"), "training cuts"), limit=0.8),
    ),
    "What is shown": (
        panel("Entries by LOD", "Share of a training cut's entries. Healthy: steady; every trained LOD above 0.",
              Line(Value("mc.focus.entry_share", by="lod"), "LOD"), zero=True),
        panel("Tokens by LOD", "Share of the history's tokens. Healthy: steady; most in gists.",
              Line(Value("mc.focus.token_share", by="lod"), "LOD"), zero=True),
        panel("Compression", "Tokens of history per entry. Healthy: n / W or somewhat more.",
              Value("mc.focus.compression"), zero=True),
        panel("Cuts by policy", "Share of working contexts that each policy chose. Healthy: as --mc_cuts says.",
              *(Line(Value(f"mc.cuts.{p}"), p) for p in POLICIES), zero=True),
        panel("Best variant by policy", "Share of rows whose lowest-loss variant a policy chose. Healthy: lens and "
                                        "teacher above their share of cuts (needs --mc_variants of 2 or more).",
              *(Line(Value(f"mc.cuts.best.{p}"), p) for p in POLICIES), zero=True),
    ),
    "Gists": (
        panel("Size", "Root mean square of a gist's elements. Healthy: 1, like token embeddings.",
              Line(Value("mc.gist.rms", by="lod"), "LOD"), zero=True),
        panel("Variance", "Over the gists of one history. Healthy: well above 0; falling to 0 is collapse.",
              Line(Value("mc.gist.variance", by="lod"), "LOD"), zero=True),
        panel("Effective rank", "Participation ratio of the gists' covariance. Healthy: steady or rising; falling "
                                "towards 1 is collapse.", Line(Value("mc.gist.effective_rank", by="lod"), "LOD"),
              zero=True),
    ),
})  # fmt: skip

PARTS = {"lm": "LM pass", "tree": "tree", "score": "scores", "focus": "cuts", "wc": "working context", "lens": "lens"}

RUNTIME = Dashboard("mc-runtime", "MegaContext: runtime",
                    "Latency, memory and telemetry of training; latency, KV and store of inference sessions.", {
    "Training": (
        panel("Tokens per second", "All ranks; evaluating, probing and saving apart. Healthy: steady; MegaContext at "
                                   "0.77 of vanilla or more.", Value("train.tokens_per_second"), zero=True),
        panel("MFU", "Share of peak FLOP/s. Healthy: steady; a drop means waiting, a slower device or more work.",
              Value("train.mfu"), unit="percentunit", zero=True),
        panel("Step time", "Healthy: steady; MegaContext at most 1.3 times vanilla.", Value("train.step_time"),
              unit="s", zero=True),
        panel("Parts of a step", "Per micro-batch; forward alone but for the lens. Healthy: the LM pass is the "
                                 "largest.", *(Line(Value(f"mc.time.{p}"), word) for p, word in PARTS.items()),
              unit="s", zero=True),
        panel("Waiting and updating",
              "Waiting for data, and the optimizer (on CPU). Healthy: data below 5 % of a step.",
              Line(Value("train.data_wait"), "data"), Line(Value("train.optimizer_time"), "optimizer"), unit="s",
              zero=True),
        panel("Beside training", "The last probe and the last checkpoint. Healthy: steady.",
              Line(Value("mc.time.probe"), "probe"), Line(Value("checkpoint.save_time"), "checkpoint"), unit="s",
              zero=True),
        panel("Memory", "Peak of the device on CUDA, else of the process. Healthy: flat after the first steps.",
              Value("train.memory"), unit="bytes", zero=True),
        panel("Training time", "Steps alone. Healthy: a straight line.", Value("train.elapsed"), unit="s"),
    ),
    "Telemetry": (
        panel("Overhead", "Share of the training thread's time that goes into recording. Healthy: below 0.01.",
              Value("telemetry.overhead"), unit="percentunit", limit=0.01, zero=True),
        panel("Delivery", "Points and spans delivered and lost, requests failed, lines that metrics.jsonl lacks. "
                          "Healthy: nothing lost.", Line(Value("telemetry.otlp.delivered"), "delivered"),
              Line(Value("telemetry.otlp.lost"), "lost"), Line(Value("telemetry.jsonl.lost"), "lines lost"),
              Line(Value("telemetry.otlp.failures"), "failures"), zero=True),
    ),
    "Preflight": (
        panel("Checks",
              "Signals that `python -m scripts.mc_bench otlp` sent. Healthy: one for each check that was run.",
              Value("telemetry.preflight"), zero=True),
        panel("Time to send", "Of a preflight's request. Healthy: far below OTEL_METRIC_EXPORT_INTERVAL.",
              Value("telemetry.preflight_time", whole=True), unit="s", zero=True),
    ),
    "Session": (
        panel("History", "Tokens of history. Healthy: grows; nothing else on this row grows with it.",
              Value("mc.session.history")),
        panel("Time per token", "Per generated token after the first. Healthy: flat in the history.",
              Value("gen_ai.server.time_per_output_token"), unit="s", zero=True),
        panel("Time to first token",
              "Ingest, refocus and the first decode. Healthy: grows with the request's tokens alone.",
              Value("gen_ai.server.time_to_first_token"), unit="s", zero=True),
        panel("Request duration", "Healthy: flat in the history.", Value("gen_ai.server.request.duration"), unit="s",
              zero=True),
        panel("Refocus",
              "Wall time of a refocus. Healthy: flat in the history; below the time of the tokens between two.",
              Value("mc.session.refocus_time"), unit="s", zero=True),
        panel("Refocuses by trigger", "Per second: the user's tokens came (append), or the horizon between two "
                                      "refocuses was read. Healthy: one by append per request.",
              Line(Value("mc.session.triggers", by="by"), "by"), zero=True),
        panel("Ingest", "Tokens appended per second. Healthy: steady.", Value("mc.session.ingest_rate"), zero=True),
        panel("Entries by LOD", "Healthy: their sum at most the budget and the tokens since the last refocus.",
              Line(Value("mc.session.entries", by="lod"), "LOD"), zero=True),
        panel("KV kept", "Share of entries whose keys and values survive a refocus. Healthy: above 0.5.",
              Value("mc.session.kv_kept") / (Value("mc.session.kv_kept") + Value("mc.session.kv_recomputed")),
              unit="percentunit", zero=True),
        panel("Left out", "Share of the history that no entry stands for. Healthy: 0 while the budget tiles it; what "
                          "is left out is searched all the same.",
              Value("mc.session.omitted") / Value("mc.session.history"), unit="percentunit", zero=True),
        panel("Store reads", "Records read per second. Healthy: flat in the history.", Value("mc.session.store_reads"),
              zero=True),
        panel("Session swap rate", "Healthy: below 0.12.", Value("mc.session.swap_rate"), limit=0.12, zero=True),
        panel("Session edits", "Nodes per second: expanded, collapsed, collapsed by force, undone within twice the "
                               "cooldown. Healthy: undone below a tenth.",
              *(Line(Value(f"mc.session.{name}"), name) for name in ("expands", "collapses", "forced", "undone")),
              zero=True),
        panel("Session residency", "Refocuses that a block stayed shown. Healthy: above 2.",
              Value("mc.session.residency"), limit=1.8, zero=True),
        panel("Session utilization", "Healthy: above 0.8.", Value("mc.session.utilization"), limit=0.8),
    ),
})  # fmt: skip

DASHBOARDS = (TRAINING, FOCUS, RUNTIME)


# ---------------------------------------------------------------------------------------------------------------------
# Alerts


@dataclass(frozen=True)
class Alert:
    """Fires when `left op right` has held for `wait`, and `when` (left, op, right) too if given."""

    name: str
    left: Expr
    op: str
    right: Expr | float
    summary: str
    cause: str
    remedy: str
    wait: str = "10m"
    severity: str = "warning"
    when: tuple[Expr, str, float] | None = None

    @property
    def expression(self) -> str:
        """PromQL over all runs; window and scope are a rule's own, it has no Grafana to fill them in."""
        def compare(left: Expr, op: str, right: Expr | float) -> str:
            return " ".join([f"({left.promql(ALL_RUNS, RULE_WINDOW)})", op,
                             f"({as_expr(right).promql(ALL_RUNS, RULE_WINDOW)})" if isinstance(right, Expr)
                             else f"{right:g}"])

        condition = compare(self.left, self.op, self.right)
        return condition if self.when is None else f"{condition} and {compare(*self.when)}"

    def at(self, rows: Rows, i: int) -> bool | None:
        """Whether the condition holds in line i of metrics.jsonl; None where it cannot be told."""
        def holds(left: Expr, op: str, right: Expr | float) -> bool | None:
            a, b = left.at(rows, i), as_expr(right).at(rows, i)
            return any(COMPARISONS[op](x, b.get(key, b.get("", 0.0))) for key, x in a.items()) if a and b else None

        found = [holds(self.left, self.op, self.right), *([holds(*self.when)] if self.when else [])]
        return None if None in found else all(found)


ALL_RUNS, RULE_WINDOW = 'mc_run_id!=""', "10m"

ALERTS = (
    Alert("LossNotFinite", Value("train.nonfinite"), ">", 0, "A loss is not finite; the run has stopped.",
          "Rates too high, or a bad batch.",
          "Begin anew with --grad_clip=1 or lower rates, or look at the data of that step. No step with such a loss "
          "was saved.", wait="0m", severity="critical"),
    Alert("FocusWorthLittle", Value("mc.val.delta_nll", shown="lens"), ">",
          0.5 * Value("mc.val.delta_nll", shown="window"),
          "Lens focus costs more than half of what a sliding window costs.",
          "The lens does not find what matters, the gists carry little, or need is not announced in this data.",
          "Look at agreement and regret (focus dashboard): low agreement is the lens, high regret with good agreement "
          "the budget. On ordinary text expect this.",
          when=(Value("mc.val.delta_nll", shown="window"), ">=", 0.1)),
    Alert("SwapRateHigh", Value("mc.focus.swap_rate"), ">", 0.12,
          "More than an eighth of what is shown changes at each refocus.", "Scores jump between refocuses.",
          "Longer lens tail, higher thresholds or margin, a longer cooldown."),
    Alert("ResidencyLow", Value("mc.focus.residency"), "<", 1.8, "Blocks that were just shown are hidden again.",
          "The budget is too tight for what the lens wants, or it changes its mind.",
          "Raise the budget, or the margin and cooldown.", when=(Value("mc.focus.expands"), ">", 0.1)),
    Alert("Thrash", Value("mc.focus.thrash"), ">", 0.3, "Edits are undone as soon as the cooldown allows.",
          "The lens's scores oscillate.", "Raise margin and cooldown; look at the lens's spread."),
    Alert("UtilizationLow", Value("mc.focus.replay_utilization"), "<", 0.8, "Entries of the budget are left unused.",
          "The price is too high, or the thresholds are.",
          "Lower tau_expand, or the budget."),
    Alert("LensAgreementLost", Value("mc.lens.rank_correlation"), "<=", 0,
          "The lens agrees with measured utility no better than chance.",
          "It does not learn (frozen, rate too low), its teacher is wrong, or need cannot be foreseen.",
          "Check its gradient norm, the teacher's entropy, --mc_teacher and --mc_lens_horizon.",
          when=(Value("mc.lens.utility_spread"), ">=", 0.01)),
    Alert("LensNoBetterThanRandom", Value("mc.val.delta_nll", shown="lens"), ">=",
          Value("mc.val.delta_nll", shown="random"),
          "Lens focus is worth no more than random focus.", "The lens has learned nothing, or the wrong thing.",
          "As for LensAgreementLost.",
          when=(Value("mc.lens.utility_spread"), ">=", 0.01)),
    Alert("NetworkFrozen", Value("mc.update", by="network"), "<=", 1e-7, "A network does not move.",
          "It is in no optimizer, its rate is 0, or its gradient is.",
          "Check --mc_lens_lr and --mc_gist_lr, the weights of its losses, and its gradient norm."),
    Alert("MfuDrop", Value("train.mfu"), "<", 0.7 * Value("train.mfu", over="1h"),
          "MFU is 30 % below its mean of the last hour.",
          "Waiting for data, a throttled or shared device, more work per step.",
          "Look at data wait, step parts and what else runs on the node."),
    Alert("ExporterLosingData", Value("telemetry.otlp.lost"), ">", 0,
          "Measurements were lost on the way to the collector.",
          "The collector was away or slow for longer than the queue lasts.",
          "Restart the collector; the JSONL of the run is complete.", wait="0m"),
)  # fmt: skip
