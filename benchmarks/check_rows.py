"""Whether a contributed file of rows can be taken: `python -m benchmarks.check_rows FILE.csv`.

Columns and machine are whole, the commit is one of this repository and nothing was changed on top
of it, versions are named, every figure passed parity within its bound, and no time is below its
floor by more than the error of the ceiling. Exit 1 with one line a fault.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

from dpo_kernels.cli.rows import COLUMNS, OK, read_rows

from .session import key_of

ROOT = Path(__file__).parent.parent
NEEDED = ("contender", "mode", "shape", "dtype", "device", "status", "python", "torch", "commit")
# a measured ceiling is beaten a little by kernels that read more than they write
_LEAST_FLOOR = 0.8
_PEERS = {"TRL": "trl", "Liger": "liger-kernel", "cut-cross-entropy": "cut-cross-entropy"}


def known_commit(commit: str) -> bool:
    command = ["git", "-C", str(ROOT), "cat-file", "-e", f"{commit}^{{commit}}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def faults_of(row: dict[str, str]) -> list[str]:
    found = [f"{name} is empty" for name in NEEDED if not row[name]]
    if row["device"] == "cuda" and ("none" in row["gpu"] or not row["gpu"]):
        found.append("device is cuda and no GPU is named")
    if row["status"] != OK:
        return found + (["a figure beside a status that is not ok"] if row["median_ms"] else [])
    if row["contender"].startswith("empty"):
        return found
    for quantity in ("loss", "gradient"):
        error, bound = row[f"{quantity}_error"], row[f"{quantity}_bound"]
        if not (error and bound):
            found.append(f"no parity of the {quantity}")
        elif not float(error) <= float(bound):
            found.append(f"the {quantity} is off by {error}, at most {bound} is allowed")
    package = _PEERS.get(row["contender"])
    if package and package not in row["packages"]:
        found.append(f"no version of {package}")
    if not row["median_ms"]:
        return found
    low, middle, high = (float(row[name]) for name in ("p20_ms", "median_ms", "p80_ms"))
    if not (0 < low <= middle <= high and math.isfinite(high)):
        found.append(f"p20, median and p80 are {low}, {middle} and {high}")
    if row["benchmark"] in ("logits", "linear"):
        if not row["times_floor"]:
            found.append("no floor")
        elif float(row["times_floor"]) < _LEAST_FLOOR and row["device"] == "cuda":
            found.append(f"{row['times_floor']}x of the floor: faster than the machine")
    return found


def check(path: Path) -> list[str]:
    """One line a fault, none for a file that can be taken."""
    rows = read_rows(path)
    if not rows:
        return [f"{path}: no rows"]
    missing = [column for column in COLUMNS if column not in rows[0]]
    if missing:
        return [f"{path}: columns are missing: {', '.join(missing)}"]
    found = []
    for name in ("commit", "gpu", "torch", "cpu"):
        values = sorted({row[name] for row in rows})
        if len(values) > 1:
            found.append(f"{path}: rows of several machines or trees: {name} is {values}")
    commit = rows[0]["commit"]
    if commit.endswith("-dirty"):
        found.append(f"{path}: the tree was changed on top of {commit.removesuffix('-dirty')}")
    elif not known_commit(commit):
        found.append(f"{path}: commit {commit!r} is not in this repository")
    keys = [key_of(row) for row in rows]
    for number, row in enumerate(rows, 2):
        name = f"{path}:{number}: {row['contender']}, {row['mode']}, {row['shape']}"
        found += [f"{name}: {fault}" for fault in faults_of(row)]
        if keys.index(key_of(row)) != number - 2:
            found.append(f"{name}: measured twice")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check_rows", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args(arguments)
    found = [fault for path in options.files for fault in check(path)]
    print("\n".join(found) if found else "all rows can be taken")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
