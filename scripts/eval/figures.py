"""How figures look: colours that the colour-blind tell apart (Okabe and Ito), fonts readable in print, PDF beside PNG."""

from pathlib import Path

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, GREY = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#777777")
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, GREY, "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def new_figure(rows: int = 1, columns: int = 1, *, width: float = 5.0, height: float = 3.4):
    """(figure, axes [rows, columns]); width and height of one panel in inches."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                         "pdf.fonttype": 42})  # fonts as outlines that editors and printers take
    return plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained")


def legend_below(figure) -> None:
    """One legend for all panels, of whatever any of them draws."""
    drawn = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=min(4, len(drawn)), fontsize=8)


def save_figure(figure, path: Path) -> None:
    """As PNG, at `path`, and beside it as PDF."""
    import matplotlib.pyplot as plt
    figure.savefig(path, dpi=150)
    figure.savefig(path.with_suffix(".pdf"))
    plt.close(figure)
