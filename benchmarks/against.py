"""This tree against another commit, in rounds that take turns: `make bench-against REF=COMMIT`.

    python -m benchmarks.against REF [suite ...] [--rounds 3]

Builds REF in a worktree of its own, puts the benchmark code of this tree in it, runs the suites in
turns (REF, this, this, REF, ...), joins the rounds by their medians and compares. Exit 1 when
this tree is slower beyond noise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from dpo_kernels.cli.rows import OK, read_rows, write_rows

from . import compare
from .session import key_of

ROOT = Path(__file__).parent.parent


def build(tree: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)


def put_benchmarks(tree: Path) -> None:
    """Both trees are measured by the same code; it uses the package's public functions."""
    for folder in ("benchmarks", "dpo_kernels/cli", "dpo_kernels/demo"):
        shutil.rmtree(tree / folder, ignore_errors=True)
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))


def run(tree: Path, suites: list[str], out: Path, quick: bool) -> None:
    command = [sys.executable, "-m", "benchmarks", *suites, "--no-peers", "--no-report"]
    command += ["--out", str(out), *(["--quick"] if quick else [])]
    subprocess.run(command, cwd=tree, check=True, env={**os.environ, "PYTHONPATH": str(tree)})


def join(parts: list[Path], out: Path) -> None:
    """One row of each key: the median of the rounds, and their extremes as the spread."""
    rounds: dict[tuple, list[dict[str, str]]] = {}
    for part in parts:
        for row in read_rows(part):
            rounds.setdefault(key_of(row), []).append(row)
    joined = []
    for rows in rounds.values():
        row = dict(rows[0])
        timed = [r for r in rows if r["status"] == OK and r["median_ms"]]
        if timed:
            row["median_ms"] = str(median(float(r["median_ms"]) for r in timed))
            row["p20_ms"] = str(min(float(r["p20_ms"]) for r in timed))
            row["p80_ms"] = str(max(float(r["p80_ms"]) for r in timed))
        joined.append(row)
    write_rows(out, joined, append=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.add_argument("ref")
    parser.add_argument("suites", nargs="*", default=["logits", "linear"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="the shapes of the record")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(other), options.ref], check=True)
        try:
            build(ROOT)
            build(other)
            put_benchmarks(other)
            parts: dict[Path, list[Path]] = {other: [], ROOT: []}
            for number in range(options.rounds):
                trees = [other, ROOT] if number % 2 == 0 else [ROOT, other]
                for tree in trees:
                    part = Path(folder) / f"{number}_{'ref' if tree == other else 'this'}.csv"
                    run(tree, options.suites, part, not options.full)
                    parts[tree].append(part)
            before, after = Path(folder) / "ref.csv", Path(folder) / "this.csv"
            join(parts[other], before)
            join(parts[ROOT], after)
            return compare.main([str(before), str(after)])
        finally:
            subprocess.run([*git, "remove", "--force", str(other)], check=False)


if __name__ == "__main__":
    sys.exit(main())
