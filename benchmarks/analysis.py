"""What the rows say: who is fastest where, how cost grows, and where we lose."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from dpo_kernels.cli.rows import KEY, OK

Row = dict[str, str]
# rows that agree in these met in one run
MEETING = tuple(column for column in KEY if column not in ("contender", "precision"))
# how far from its floor one of our rows may be before the report lists it
FAR_FROM_FLOOR = 1.25


@dataclass(frozen=True)
class Loss:
    """One thing in which we are not ahead; ``ratio`` above 1 says by how much."""

    row: Row
    what: str
    ratio: float


def is_ours(row: Row) -> bool:
    return row["contender"].startswith("dpo_kernels")


def timed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == OK and row["median_ms"]]


def meetings(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same shape and mode, together; in place meets forward + backward."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in MEETING), []).append(row)
    return list(found.values())


def best_of_ours(rows: list[Row]) -> Row | None:
    """The fastest exact row of ours: "fast" gives up digits and is no answer to a loss."""
    own = [row for row in rows if is_ours(row) and row["precision"] == "exact"]
    return min(own, key=lambda row: float(row["median_ms"]), default=None)


def where_we_lose(rows: list[Row]) -> list[Loss]:
    """Every row in which another is faster or takes less memory, or which is far from its floor,
    and every row of ours without a figure; the worst first."""
    found = [
        Loss(row, f"no figure: {row['status']}", math.inf)
        for row in rows
        if is_ours(row) and row["status"] != OK
    ]
    calibration = ("torch.sum", "torch.mm", "empty ")
    for together in meetings(timed(rows)):
        own = best_of_ours(together)
        if own is None:
            continue
        for row in together:
            if is_ours(row) or row["contender"].startswith(calibration):
                continue
            ratio = float(own["median_ms"]) / float(row["median_ms"])
            if ratio > 1:
                found.append(Loss(own, f"{row['contender']} is {ratio:.2f}x faster", ratio))
            ours, theirs = own["peak_extra_bytes"], row["peak_extra_bytes"]
            # less than a MiB is bookkeeping
            if ours and theirs and int(ours) > int(theirs) + 2**20:
                ratio = int(ours) / max(int(theirs), 2**20)
                what = f"{row['contender']} takes {int(theirs) / 2**20:.0f} MiB, ours "
                found.append(Loss(own, what + f"{int(ours) / 2**20:.0f} MiB", ratio))
        if own["times_floor"] and float(own["times_floor"]) > FAR_FROM_FLOOR:
            ratio = float(own["times_floor"])
            found.append(Loss(own, f"{ratio:.2f}x of the floor", ratio))
    return sorted(found, key=lambda loss: -loss.ratio)


def exponent(sizes: list[float], values: list[float]) -> float | None:
    """The slope of log value over log size by least squares; None for fewer than two points."""
    points = [(math.log(s), math.log(v)) for s, v in zip(sizes, values, strict=True) if v > 0]
    if len(points) < 2:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread == 0:
        return None
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def growing_size(row: Row) -> float:
    """What the benchmark of a growth row makes grow."""
    sequences, tokens, vocab = (int(part) for part in row["shape"].split("x"))
    what = row["benchmark"].removeprefix("growth, ")
    sizes = {"tokens": tokens, "vocabulary": vocab, "pairs": sequences // 2}
    return sizes.get(what) or int(row["scored_tokens"]) / (sequences * tokens)
