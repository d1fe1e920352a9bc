"""What got slower between two files of rows: `python -m benchmarks compare A.csv B.csv`.

A row is slower when its whole spread is: B's p20 above A's p80, and B's median above A's by more
than --margin. On a machine that both files share, a contender other than ours tells its drift:
medians are divided by the median drift of the contenders that do not change. Exit 1 when any row of
ours is slower, or was measured in A and is not in B.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dpo_kernels.cli.console import make_console, make_table
from dpo_kernels.cli.rows import OK, read_rows

from .session import key_of

MARGIN = 0.05


@dataclass(frozen=True)
class Change:
    """A row in both files; ``ratio`` is B over A, without the drift of the machine."""

    row: dict[str, str]
    before: float
    after: float
    ratio: float
    beyond_noise: bool


def measured(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    return {key_of(row): row for row in read_rows(path) if row["status"] == OK and row["median_ms"]}


def is_ours(row: dict[str, str]) -> bool:
    return row["contender"].startswith("dpo_kernels")


def drift(before: dict, after: dict) -> float:
    """How much slower the contenders that do not change became; 1 when there are none."""
    ratios = [
        float(after[key]["median_ms"]) / float(row["median_ms"])
        for key, row in before.items()
        if key in after and not is_ours(row)
    ]
    return median(ratios) if ratios else 1.0


def changes(before: dict, after: dict, margin: float) -> list[Change]:
    scale = drift(before, after)
    found = []
    for key, row in before.items():
        if key not in after:
            continue
        old, new = float(row["median_ms"]), float(after[key]["median_ms"]) / scale
        slower = float(after[key]["p20_ms"]) / scale > float(row["p80_ms"])
        faster = float(after[key]["p80_ms"]) / scale < float(row["p20_ms"])
        ratio = new / old
        noise = not ((slower and ratio > 1 + margin) or (faster and ratio < 1 / (1 + margin)))
        found.append(Change(row, old, new, ratio, not noise))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--margin", type=float, default=MARGIN, help="share of a time (0.05)")
    options = parser.parse_args(arguments)
    console = make_console()
    before, after = measured(options.before), measured(options.after)
    found = changes(before, after, options.margin)
    if not found:
        console.print("the files have no row in common")
        return 2
    slower = 0
    title = f"{options.before} to {options.after}, drift {drift(before, after):.3f} taken out"
    table = make_table(console, title, "row", "before", "after", "after / before", "")
    for change in found:
        if not (is_ours(change.row) or change.beyond_noise):
            continue
        worse = change.beyond_noise and change.ratio > 1
        slower += worse and is_ours(change.row)
        verdict = "" if not change.beyond_noise else "slower" if worse else "faster"
        name = f"{change.row['contender']}, {change.row['mode']}, {change.row['shape']} "
        cells = (f"{change.before:.4g} ms", f"{change.after:.4g} ms", f"{change.ratio:.3f}")
        table.add_row(name + change.row["dtype"], *cells, verdict)
    console.print(table)
    lost = [row for key, row in before.items() if key not in after and is_ours(row)]
    for row in lost:
        console.print(f"not measured any more: {row['contender']}, {row['mode']}, {row['shape']}")
    console.print(f"{slower} of {len(found)} rows got slower beyond noise")
    return 1 if slower or lost else 0


if __name__ == "__main__":
    sys.exit(main())
