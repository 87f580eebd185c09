"""A run's metrics as one HTML page that needs nothing else: the panels of `mc/observe/dashboards.py` as
inline SVG, and which alerts hold.

Lines are told apart by colour and mark, runs by dashes, so that nothing depends on colour alone; most colours are Okabe
and Ito's. The page follows the reader's light or dark setting. Hovering a point shows its value (an
SVG title: no script is needed).
"""

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from mc.observe.dashboards import ALERTS, DASHBOARDS, Alert, Panel, Rows, Value

WIDTH, HEIGHT = 460, 250  # of a panel's drawing, in pixels
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 10, 34  # of what surrounds the plot
DASHES = ("", "6 3", "2 3", "8 3 2 3")  # one per run
MARK_SHAPES = ("M-2.4 0a2.4 2.4 0 1 0 4.8 0a2.4 2.4 0 1 0-4.8 0", "M-2.2-2.2h4.4v4.4h-4.4z", "M0-3L3 2.4H-3z",
               "M0-3.2L3.2 0L0 3.2L-3.2 0z",
               # one per colour: round, square, triangle, diamond, …
               "M0 3L3-2.4H-3z", "M-3-.9h6v1.8h-6zM-.9-3h1.8v6h-1.8z", "M-1-3.2h2v6.4h-2z")
COLOURS = len(MARK_SHAPES)  # classes c0 … c6 of the style sheet
MARKS = 60  # of a line, at most
FAR = 1e300  # what lies beyond is drawn beyond the edge
MOST = 800  # points of a line that are drawn: of longer ones, the least and the greatest of each stretch


@dataclass(frozen=True)
class Run:
    name: str
    rows: Rows


@dataclass(frozen=True)
class Series:
    """One line of a panel: points in order, its run's number and its number within the run."""

    name: str
    points: list[tuple[float, float]]
    run: int
    colour: int


# ---------------------------------------------------------------------------------------------------------------------
# What is drawn


def series_of(panel: Panel, runs: Sequence[Run]) -> list[Series]:
    """Every line of a panel that has points. x: what the panel asks for, by default the step."""
    found = []
    for number, run in enumerate(runs):
        lines: dict[str, list[tuple[float, float]]] = {}
        for line in panel.lines:
            for i, row in enumerate(run.rows):
                x = Value(panel.x).at(run.rows, i).get("") if panel.x else row["step"]
                for attribute, y in line.expr.at(run.rows, i).items() if x is not None else ():
                    if not math.isfinite(y):  # numbers at the end of float64, multiplied
                        continue
                    lines.setdefault(" ".join(part for part in (line.label, attribute) if part), []).append((x, y))
        for name, points in lines.items():
            label = " ".join(part for part in (run.name if len(runs) > 1 else "", name) if part) or run.name
            found.append(Series(label, thinned(points), number, list(lines).index(name) % COLOURS))
    if len({s.run for s in found}) == len(found):  # a line a run: then runs have colours
        found = [replace(s, colour=s.run % COLOURS) for s in found]
    return found


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST points, the last among them: what stands out stays."""
    if len(points) <= MOST:
        return points
    size = -(-2 * len(points) // (MOST - 3))
    stretches = [points[i:i + size] for i in range(0, len(points) - 1, size)]
    kept = [p for stretch in stretches
            for p in sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})]
    return [*kept, points[-1]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them."""
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    size *= next(m for m in (1, 2, 5, 10) if m * size >= rough)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(i * size, max(12, 2 - math.floor(math.log10(size)))) for i in range(first, last + 1)]


def span(values: Iterable[float], zero: bool = False, limit: float | None = None) -> tuple[float, float]:
    """The least and the greatest, a little apart if they are one; so far within float64 that their distance is too."""
    values = [*values, *([0.0] if zero else []), *([limit] if limit is not None else [])]
    low, high = max(min(values), -FAR), min(max(values), FAR)
    return (low, high) if high - low > max(1e-12 * max(abs(low), abs(high)), 1 / FAR) else (low - abs(low) / 2 - 0.5,
                                                                                            high + abs(high) / 2 + 0.5)


def figure(x: float) -> str:
    """A number in at most five characters or so: 1.2M, 0.034, 5e-07."""
    if x == 0:
        return "0"
    for factor, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= factor:
            return f"{x / min(factor, 1e3 if letter == 'k' else factor):.3g}{letter}"
    return f"{x:.4g}" if abs(x) >= 1000 else f"{x:.3g}"


def plot(panel: Panel, series: Sequence[Series]) -> str:
    """The drawing of a panel with at least one line."""
    xs, ys = ([p[i] for s in series for p in s.points] for i in (0, 1))
    x_ticks, y_ticks = ticks(*span(xs)), ticks(*span(ys, panel.zero, panel.limit))
    (x0, x1), (y0, y1) = span(xs), (y_ticks[0], y_ticks[-1])
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return round(LEFT + (x - x0) / (x1 - x0) * across, 1), round(TOP + (y1 - y) / (y1 - y0) * down, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(panel.title)}">']
    for y in y_ticks:
        _, v = at(x0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v}" y2="{v}"/><text class="tick" '
                     f'x="{LEFT - 6}" y="{v + 4}" text-anchor="end">{figure(y)}</text>')
    for x in (x for x in x_ticks if x0 <= x <= x1):
        h, _ = at(x, y0)
        parts.append(f'<line class="grid" x1="{h}" x2="{h}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/><text class="tick" '
                     f'x="{h}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{figure(x)}</text>')
    axis = {"": "step", "train.tokens": "tokens", "train.flops": "FLOPs",
            "train.elapsed": "seconds of training"}[panel.x]
    parts.append(f'<text class="tick" x="{LEFT + across / 2}" y="{HEIGHT - 3}" text-anchor="middle">{axis}</text>')
    if panel.limit is not None:
        _, v = at(x0, panel.limit)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v}" y2="{v}"><title>limit '
                     f'{figure(panel.limit)}</title></line>')
    for s in series:
        points = [at(*p) for p in s.points]
        parts.append(f'<polyline class="line c{s.colour}" stroke-dasharray="{DASHES[s.run % len(DASHES)]}" '
                     f'points="{" ".join(f"{h},{v}" for h, v in points)}"/>')
        every = -(-len(points) // MARKS)
        for (x, y), (h, v) in list(zip(s.points, points))[::every]:
            parts.append(f'<path class="dot c{s.colour}" d="{MARK_SHAPES[s.colour]}" transform="translate({h} '
                         f'{v})"><title>{html.escape(s.name)}\n{axis} {figure(x)}: {y:.5g}</title></path>')
    return "".join([*parts, "</svg>"])


def key(series: Sequence[Series]) -> str:
    """What each line is, and its last value."""
    items = []
    for s in series:
        sample = (f'<svg class="sample" viewBox="0 0 26 8"><line class="line c{s.colour}" '
                  f'stroke-dasharray="{DASHES[s.run % len(DASHES)]}" x1="0" x2="26" y1="4" y2="4"/>')
        sample += f'<path class="dot c{s.colour}" d="{MARK_SHAPES[s.colour]}" transform="translate(13 4)"/></svg>'
        items.append(f"<li>{sample}<span>{html.escape(s.name)}</span> <b>{figure(s.points[-1][1])}</b></li>")
    return f'<ul class="key">{"".join(items)}</ul>'


def figure_of(panel: Panel, runs: Sequence[Run]) -> str:
    series = series_of(panel, runs)
    body = plot(panel, series) + key(series) if series else '<p class="none">no data in this run</p>'
    return (f'<figure><figcaption>{html.escape(panel.title)}</figcaption>{body}<p '
            f'class="about">{html.escape(panel.description)}</p></figure>')


# ---------------------------------------------------------------------------------------------------------------------
# Alerts


@dataclass(frozen=True)
class Standing:
    """How an alert stands at the end of a run. state: "holds", "did hold", "never", or "unknown"
    where nothing was recorded."""

    alert: Alert
    state: str
    steps: list[int]  # at which its condition held


def standings(run: Run) -> list[Standing]:
    found = []
    for alert in ALERTS:
        told = [(row["step"], holds) for i, row in enumerate(run.rows) if (holds := alert.at(run.rows, i)) is not None]
        steps = [step for step, holds in told if holds]
        state = "unknown" if not told else "holds" if told[-1][1] else "did hold" if steps else "never"
        found.append(Standing(alert, state, steps))
    return found


SIGNS = {"holds": "▲ holds", "did hold": "△ held before", "never": "✓ never", "unknown": "– not recorded"}


def alert_table(runs: Sequence[Run]) -> str:
    columns = [standings(run) for run in runs]
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    lines = []
    for alert, *stands in zip(ALERTS, *columns):
        cells = "".join(
            f'<td class="{s.state.replace(" ", "-")}">{SIGNS[s.state]}{f" ({len(s.steps)} lines, last at step {s.steps[-1]})" if s.steps else ""}</td>' for s in stands)  # noqa: E501
        remedy = f"Cause: {alert.cause} Remedy: {alert.remedy}"
        lines.append(
            f'<tr><th title="{html.escape(remedy)}">{alert.name}<br><small>{html.escape(alert.summary)}</small></th>{cells}</tr>')  # noqa: E501
    return f'<table><tr><th>Signal</th>{head}</tr>{"".join(lines)}</table>'


# ---------------------------------------------------------------------------------------------------------------------
# The page


STYLE = """
:root { color-scheme: light dark; --back:#fff; --card:#fff; --edge:#d5d9df; --text:#1b1f24; --dim:#57606a; --grid:#e6e9ed; --limit:#b3261e;
  --c0:#0072b2; --c1:#d55e00; --c2:#009e73; --c3:#a3527f; --c4:#8a6d00; --c5:#5b4bc4; --c6:#444b54; }
@media (prefers-color-scheme: dark) { :root { --back:#15181c; --card:#1c2026; --edge:#343b44; --text:#e6e9ed; --dim:#a3acb8; --grid:#2b313a; --limit:#ff8a80;
  --c0:#56b4e9; --c1:#f0893a; --c2:#2fc79b; --c3:#dd92bd; --c4:#f0e442; --c5:#a99cff; --c6:#c3cad3; } }
body { margin:0 auto; padding:1.5rem; max-width:1560px; background:var(--back); color:var(--text); font:15px/1.45 system-ui, sans-serif; }
h1 { font-size:1.5rem; margin:0 0 .3rem } h2 { font-size:1.25rem; margin:2.2rem 0 .2rem } h3 { font-size:1rem; margin:1.4rem 0 .6rem; color:var(--dim) }
.panels { display:grid; grid-template-columns:repeat(auto-fill, minmax(420px, 1fr)); gap:14px }
figure { margin:0; padding:.8rem .9rem; background:var(--card); border:1px solid var(--edge); border-radius:8px }
figcaption { font-weight:600; margin-bottom:.3rem } svg { width:100%; display:block } .sample { width:26px; height:8px; display:inline-block; vertical-align:middle; margin-right:6px }
.grid { stroke:var(--grid) } .tick { fill:var(--dim); font-size:11px } .limit { stroke:var(--limit); stroke-dasharray:4 4; stroke-width:1.5 }
.line { fill:none; stroke-width:2 } .dot { stroke-width:.5 } .about, .none, small { color:var(--dim); font-size:13px; margin:.5rem 0 0; font-weight:normal }
.key { list-style:none; display:flex; flex-wrap:wrap; gap:2px 14px; padding:0; margin:.4rem 0 0; font-size:13px }
table { border-collapse:collapse; margin:.8rem 0; font-size:14px } td, th { border:1px solid var(--edge); padding:.35rem .6rem; text-align:left; vertical-align:top }
td.holds { color:var(--limit); font-weight:600 } td.did-hold { color:var(--limit) } nav a { margin-right:1.2rem; color:var(--c0) }
""" + "".join(f".c{i} {{ stroke:var(--c{i}) }} .dot.c{i} {{ fill:var(--c{i}) }}\n"  # noqa: E501
              for i in range(COLOURS))  # fmt: skip  # noqa: E501


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document."""
    return "".join(_parts(runs))


def _parts(runs: Sequence[Run]) -> Iterator[str]:
    names = ", ".join(run.name for run in runs)
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(names)}</title><style>{STYLE}</style>'  # noqa: E501
    yield f"<h1>{html.escape(names)}</h1><p class='about'>" + "; ".join(f"{html.escape(r.name)}: {len(r.rows)} lines, "
                                                                        f"up to step {r.rows[-1]['step']}"
                                                                        for r in runs) + "</p>"
    yield "<nav>" + "".join(f'<a href="#{board.uid}">{board.title}</a>'
                            for board in DASHBOARDS) + '<a href="#signals">Signals</a></nav>'
    yield '<h2 id="signals">Signals</h2><p class="about">Conditions of the alert rules, line by line of the run. Hover a name for cause and remedy.</p>' + alert_table(runs)  # noqa: E501
    for board in DASHBOARDS:
        yield f'<h2 id="{board.uid}">{html.escape(board.title)}</h2><p class="about">{html.escape(board.description)}</p>'  # noqa: E501
        for title, row in board.rows.items():
            yield f'<h3>{html.escape(title)}</h3><div class="panels">{"".join(figure_of(p, runs) for p in row)}</div>'
    yield "</html>\n"
