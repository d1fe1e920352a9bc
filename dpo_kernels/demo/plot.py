"""The demo's picture: what must be equal on top, what must differ below."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .training import Run

_STYLES = (
    {"color": "#9ecae1", "linewidth": 6, "solid_capstyle": "round"},
    {"color": "#b30000", "linewidth": 1.6, "linestyle": (0, (4, 2))},
)
_RC: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
# what fits across the picture
_TITLE_COLUMNS = 110
_BARS = ("#9ecae1", "#b30000")


def draw(
    path: Path, title: str, runs: tuple[Run, Run], required: float | None, costs: dict
) -> None:
    """Writes a PNG. ``costs`` maps a title to (values of the runs, unit)."""
    with matplotlib.rc_context(_RC):
        figure = make_figure(title, runs, required, costs)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def make_figure(title: str, runs: tuple[Run, Run], required: float | None, costs: dict) -> Figure:
    figure = Figure(figsize=(11, 7), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    # a machine's name may be of any length
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, _TITLE_COLUMNS)]
    figure.suptitle("\n".join(lines), fontsize=11)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.2, 1))[:, 0]
    losses, accuracy = top.subplots(1, 2)
    _draw_losses(losses, runs)
    _draw_accuracy(accuracy, runs, required)
    axes = bottom.subplots(1, max(2, len(costs)))
    for ax in axes[len(costs) :]:
        ax.set_axis_off()
    for ax, (name, (values, unit)) in zip(axes, costs.items(), strict=False):
        _draw_cost(ax, name, [run.name for run in runs], values, unit)
    return figure


def _draw_losses(ax, runs: tuple[Run, Run]) -> None:
    for run, style in zip(runs, _STYLES, strict=True):
        ax.plot(range(1, len(run.losses) + 1), run.losses, label=run.name, **style)
    label = "ln 2: policy = reference"
    ax.axhline(math.log(2), color="0.6", linewidth=0.8, linestyle=":", label=label)
    difference = largest_difference(*runs)
    ax.set_title(f"Training loss: {difference:.0e} apart at most", loc="left")
    ax.set_xlabel("step")
    ax.set_ylabel("DPO loss, nats")
    # room for the legend above the curves
    ax.set_ylim(0, 1.35 * max(max(run.losses) for run in runs))
    ax.legend(frameon=False, loc="upper right")


def _draw_accuracy(ax, runs: tuple[Run, Run], required: float | None) -> None:
    for run, style in zip(runs, _STYLES, strict=True):
        values = [100 * value for value in run.accuracy.values()]
        ax.plot(list(run.accuracy), values, marker="o", markersize=6, label=run.name, **style)
    ax.axhline(50, color="0.6", linewidth=0.8, linestyle=":", label="chance")
    if required is not None:
        label = f"required at the end: {required:.0%}"
        ax.axhline(100 * required, color="#31a354", linewidth=1, linestyle="--", label=label)
    ax.set_title("Held-out preference accuracy", loc="left")
    ax.set_xlabel("step")
    ax.set_ylabel("chosen answer has the higher reward, %")
    ax.set_ylim(40, 100)
    ax.legend(frameon=False, loc="lower right")


def _draw_cost(ax, title: str, names: list[str], values: list[float], unit: str) -> None:
    bars = ax.barh(names, values, color=_BARS)
    ax.bar_label(bars, [f"{value:.1f} {unit}" for value in values], padding=4)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.25 * max(values))
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)
    ax.tick_params(left=False)
    ax.set_title(f"{title}: {values[0] / max(values[1], 1e-9):.1f} times less", loc="left")


def largest_difference(first: Run, second: Run) -> float:
    return max(abs(a - b) for a, b in zip(first.losses, second.losses, strict=True))
