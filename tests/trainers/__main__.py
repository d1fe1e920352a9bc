"""Runs trainers and renews their rows of results.md: ``python -m tests.trainers [NAME ...]``.

results.jsonl has the rows that results.md is made of.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from .environments import ENVIRONMENTS, STUBS, Environment

ROOT = Path(__file__).parent.parent.parent
ROWS = Path(__file__).parent / "results.jsonl"
TABLE = Path(__file__).parent / "results.md"


def install(name: str, environment: Environment, folder: Path) -> Path:
    """The folder of what the run needs, made once: a stamp names what is in it."""
    target = folder / name
    stamp = target / ".installed"
    wanted = "\n".join(environment.packages)
    if environment.packages and (not stamp.exists() or stamp.read_text() != wanted):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        # make's constraints name the newest of each
        variables = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}
        command += ["--target", str(target), *environment.packages]
        subprocess.run(command, check=True, env=variables)
        stamp.write_text(wanted)
    return target


def run(name: str, environment: Environment, folder: Path, checkouts: Path | None) -> list[dict]:
    paths = [install(name, environment, folder)]
    if environment.checkout is not None:
        if checkouts is None or not (checkouts / environment.checkout).exists():
            print(f"{name}: not run, needs a checkout of {environment.checkout}")
            return []
        paths += [checkouts / environment.checkout / path for path in environment.folders]
    variables = {
        **os.environ,
        **dict(environment.variables),
        "PYTHONPATH": os.pathsep.join(map(str, (*paths, STUBS, ROOT))),
        "OMP_NUM_THREADS": "1",
        # nothing is looked up in a hub
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", f"tests.trainers.{environment.module}"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    # trainers print what they like
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"trainer"')]
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:]
        rows.append({"trainer": name, "what": "", "version": "", "failed": last or ["it ended"]})
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    for row in rows:
        row |= {"environment": name, "date": day, "torch": torch.__version__}
        verdict = "; ".join(row["failed"]) or "passed"
        print(f"{row['trainer']} {row['version']}, {row['what']}: {verdict}", flush=True)
    return rows


def renew(rows: list[dict]) -> None:
    """Puts the rows in place of those of the same environments, and writes the table."""
    kept = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    ran = {row["environment"] for row in rows}
    rows = [row for row in kept if row["environment"] not in ran] + rows
    rows.sort(key=lambda row: list(ENVIRONMENTS).index(row["environment"]))
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    TABLE.write_text(table(rows))


def table(rows: list[dict]) -> str:
    lines = [
        "# Ten steps of every trainer, unpatched and patched",
        "",
        "Written by `make test-trainers`: one process on a CPU, tiny models made in code, float32.",
        "All that both runs log is compared, relative to the larger of 1 and its size. Rows over",
        "the vocabulary: the most that any tensor had, before and after (0: no logits are made; 2:",
        "none but the two rows on which a model's forward is tried).",
        "",
        "| trainer | version | run | loss, first to last step, or peak, before and after | largest "
        "difference of a loss | rows over the vocabulary | torch, day | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = "; ".join(row["failed"]) or "passed"
        cells = ["", "", ""]
        if "first" in row:
            before, after = row["rows"]
            cells = [
                f"{row['first']:.4f} to {row['last']:.4f}",
                f"{row['difference']:.1e}" if row["difference"] else "none in the digits logged",
                f"{before} to {after}",
            ]
        if "peak" in row:
            cells[0] = " to ".join(f"{size / 2**20:.0f} MiB" for size in row["peak"])
        ran = f"{row['torch']}, {row['date']}"
        columns = [row["trainer"], row["version"], row["what"], *cells, ran, verdict]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trainers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="ENVIRONMENT", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-trainers")
    parser.add_argument("--checkouts", type=Path, help="folder with DeepSpeedExamples")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(ENVIRONMENTS))
    if unknown:
        parser.error(f"expected some of {', '.join(ENVIRONMENTS)}, got {', '.join(unknown)}")
    rows = []
    for name in options.names or ENVIRONMENTS:
        folder, checkouts = options.folder.resolve(), options.checkouts
        rows += run(name, ENVIRONMENTS[name], folder, checkouts and checkouts.resolve())
    renew(rows)
    failed = sum(bool(row["failed"]) for row in rows)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
