"""The report's pictures, as PNG bytes, for a light and for a dark page."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.figure import Figure

from . import analysis
from .analysis import Row

OURS, OTHERS = "#d1495b", ("#4c78a8", "#72b7b2", "#8f8f8f", "#b279a2", "#9d755d", "#eeca3b")


def _style(dark: bool) -> dict:
    ink, paper = ("#e6e6e6", "#16181c") if dark else ("#1a1a1a", "#ffffff")
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(names, ink),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), paper),
        "legend.facecolor": paper,
        "legend.edgecolor": paper,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
    }


def _png(draw, dark: bool, width: float, height: float) -> bytes:
    with matplotlib.rc_context(_style(dark)):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def colours(names: list[str]) -> dict[str, str]:
    own = [name for name in names if name.startswith("dpo_kernels")]
    others = [name for name in names if name not in own]
    found = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}
    # several of ours share the colour and differ in lightness
    return found | {name: OURS if i == 0 else "#e58a96" for i, name in enumerate(own)}


def bars(rows: list[Row], dark: bool) -> bytes:
    """Times of one meeting, over the floor where there is one."""
    rows = sorted(rows, key=lambda row: float(row["median_ms"]))
    names = [row["contender"] for row in rows]
    colour = colours(names)

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        values = [float(row["median_ms"]) for row in rows]
        drawn = ax.barh(range(len(rows)), values, color=[colour[name] for name in names])
        labels = [f"{value:.3g} ms{_floor(row)}" for value, row in zip(values, rows, strict=True)]
        ax.bar_label(drawn, labels, padding=4)
        ax.set_yticks(range(len(rows)), names)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.3 * max(values))
        ax.set_xlabel("median, ms; in brackets, multiples of the floor")

    return _png(draw, dark, 8.5, 0.7 + 0.38 * len(rows))


def _floor(row: Row) -> str:
    return f" ({float(row['times_floor']):.3g}x)" if row["times_floor"] else ""


def growth(rows: list[Row], what: str, dark: bool) -> bytes:
    """Time and memory against a size; a contender that runs out of memory ends in a cross."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    colour = colours(names)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        columns = (("median_ms", "ms", 1.0), ("peak_extra_bytes", "MiB", 2.0**20))
        for ax, (column, unit, scale) in zip(panels, columns, strict=True):
            for name in names:
                own = [row for row in rows if row["contender"] == name]
                points = [
                    (analysis.growing_size(row), float(row[column]) / scale)
                    for row in analysis.timed(own)
                    if row[column] and float(row[column]) > 0
                ]
                if not points:
                    continue
                sizes, values = zip(*points, strict=True)
                slope = analysis.exponent(list(sizes), list(values))
                label = name if slope is None else f"{name}: size^{slope:.2f}"
                ax.plot(sizes, values, marker="o", color=colour[name], label=label)
                if any("out of memory" in row["status"] for row in own):
                    ax.plot(sizes[-1], values[-1], marker="x", markersize=13, color=colour[name])
                    ax.annotate(
                        "then out of memory",
                        (sizes[-1], values[-1]),
                        xytext=(0, 12),
                        textcoords="offset points",
                        ha="right",
                        color=colour[name],
                    )
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_xlabel(what)
            ax.set_ylabel(unit)
            if ax.lines:
                ax.legend(fontsize=8)

    return _png(draw, dark, 11, 4)


def accuracy(rows: list[Row], dark: bool) -> bytes:
    """Errors of the loss and of the gradient by the spread of the logits."""
    names = list(dict.fromkeys(row["contender"] for row in rows))
    colour = colours(names)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2)
        for ax, column in zip(panels, ("loss_error", "gradient_error"), strict=True):
            for name in names:
                points = sorted(
                    (float(row["std"]), max(float(row[column]), 1e-12))
                    for row in rows
                    if row["contender"] == name and row[column]
                )
                if points:
                    stds, errors = zip(*points, strict=True)
                    ax.plot(stds, errors, marker="o", color=colour[name], label=name)
            ax.set_yscale("log")
            ax.set_xlabel("standard deviation of the logits")
            ax.set_ylabel(column.replace("_", ", ") + " against float64")
            if ax.lines:
                ax.legend(fontsize=8)

    return _png(draw, dark, 11, 4)
