"""The CSV rows of every benchmark: one set of columns, each row with its machine and versions."""

from __future__ import annotations

import csv
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from .environment import environment
from .measure import Timing
from .problems import Shape, dtype_name

# what a row is about; rows that agree in these are measurements of the same thing
KEY = (
    *("benchmark", "contender", "precision", "mode", "model", "shape", "dtype", "scored_tokens"),
    *("layout", "head", "softcap", "loss_type", "std", "device"),
)
COLUMNS = (
    *KEY,
    # ok, or why there is no number
    "status",
    *("median_ms", "p20_ms", "p80_ms", "repetitions", "call_ms", "peak_extra_bytes"),
    # bytes or FLOPs that no implementation can avoid, at the rate measured in the same run
    *("floor", "floor_kind", "rate", "times_floor"),
    # against float64, and the bound that a number needs
    *("loss_error", "loss_bound", "gradient_error", "gradient_bound"),
    *("packages", "measured_at"),
    *("cpu", "cores", "threads", "isa", "memory", "gpu", "system"),
    *("python", "torch", "triton", "dpo_kernels", "commit"),
)
OK = "ok"


def make_row(benchmark: str, contender: str, mode: str, shape: Shape, device: str, **values):
    """A row of text; ``values`` are columns, None is empty."""
    about = {
        "benchmark": benchmark,
        "contender": contender,
        "mode": mode,
        "model": shape.model,
        "shape": "x".join(map(str, shape.size)),
        "dtype": dtype_name(shape.dtype),
        "scored_tokens": shape.scored_tokens,
        "layout": "packed" if shape.packed else "padded",
        "softcap": shape.softcap,
        "loss_type": shape.loss_type,
        "std": f"{shape.std:g}",
        "device": device,
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if shape.hidden is not None:
        about["head"] = "trainable" if shape.trainable_head else "frozen"
    values = {**environment(), **about, **values}
    unknown = set(values) - set(COLUMNS) - set(environment())
    if unknown:
        raise KeyError(f"no such columns: {sorted(unknown)}")
    return {c: "" if values.get(c) is None else str(values[c]) for c in COLUMNS}


def time_columns(timing: Timing) -> dict[str, str | int | None]:
    names = ("median", "p20", "p80", "call")
    seconds = {f"{name}_ms": getattr(timing, name) for name in names}
    milliseconds = {k: None if v is None else f"{v * 1e3:.6g}" for k, v in seconds.items()}
    return {**milliseconds, "repetitions": timing.repetitions}


def versions(packages: tuple[str, ...]) -> str:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, str]], *, append: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not append or not path.exists() or path.stat().st_size == 0
    if not fresh and tuple(next(csv.reader(path.open(newline="")))) != COLUMNS:
        raise ValueError(f"{path} has other columns: name another file")
    with path.open("w" if fresh else "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
