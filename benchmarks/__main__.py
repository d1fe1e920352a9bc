"""Times every contender, each beside its floor and only when its values are right.

    python -m benchmarks                          all suites but train, on the GPU if there is one
    python -m benchmarks logits linear --quick    two of them, small
    python -m benchmarks compare A.csv B.csv      exit 1 on what got slower beyond noise

Rows are written as they are made: an interrupt keeps them, and --resume goes on. In the end the
report of all that --out holds is written to report.html beside the rows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from dpo_kernels.cli import caches
from dpo_kernels.cli.console import make_console

from .session import Clock, Session
from .suites import SUITES, Options, groups_for

ROOT = Path(__file__).parent.parent


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suites", nargs="*", metavar="suite", help=", ".join(SUITES))
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="time TRL, Liger, cut-cross-entropy and torch's own kernel too",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks"),
        help="folder for SUITE_DEVICE.csv, or one CSV file (default: runs/benchmarks)",
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--first", type=int, metavar="N", help="shapes of a suite; default: all")
    parser.add_argument("--exclude", nargs="*", default=[], metavar="BACKEND", help="not timed")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, to try it out")
    parser.add_argument("--report", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--model", help="train: folder of a model, or a GGUF file")
    parser.add_argument("--data", help="train: JSONL of prompt, chosen, rejected")
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        from . import compare

        return compare.main(arguments[1:])
    parser = make_parser()
    options = parser.parse_args(arguments)
    for suite in options.suites:
        if suite not in SUITES:
            parser.error(f"suite {suite!r}: expected {', '.join(SUITES)} or compare")
    suites = options.suites or [suite for suite in SUITES if suite != "train"]
    if "train" in suites and not (options.model and options.data):
        parser.error("train: needs --model and --data")
    caches.keep_apart()
    console = make_console()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        console.print("no CUDA GPU is visible to torch")
        return 2
    if device == "cpu":
        _limit_memory()
    how = Options(
        device,
        options.quick,
        options.peers,
        options.rehearse,
        tuple(options.exclude),
        options.first,
    )
    work = [
        (_file(options.out, suite, device), group)
        for suite in suites
        if suite != "train"
        for group in groups_for(suite, how)
    ]
    # the first shapes of every suite, then the others: a run that is cut short has some of each
    work.sort(key=lambda item: item[1].rank)
    session = Session(console, device, Clock(options.budget), resume=options.resume)
    try:
        session.run(work)
    except KeyboardInterrupt:
        console.print("interrupted: what was measured is kept, --resume goes on")
        return 130
    finally:
        if options.report and session.rows:
            _report(console, options.out, work)
    if "train" in suites and not _train(options):
        return 1
    for line in session.failed:
        console.print(f"failed: {line}")
    return 1 if session.failed else 0


def _file(out: Path, suite: str, device: str) -> Path:
    return out if out.suffix == ".csv" else out / f"{suite}_{device}.csv"


def _report(console, out: Path, work: list) -> None:
    from .report import write_report

    files = sorted({path for path, _ in work if path.exists()})
    folder = out.parent if out.suffix == ".csv" else out
    console.print(f"report: {write_report(files, folder / 'report.html')}")


def _train(options) -> bool:
    command = [sys.executable, "-m", "benchmarks.train_parity", "--model", options.model]
    command += ["--data", options.data, "--out", str(options.out / "train")]
    if options.quick:
        command += ["--steps", "3"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def _limit_memory() -> None:
    """Makes an allocation that does not fit fail, where Linux would end the process later on."""
    try:
        import resource
    except ImportError:
        return
    status = Path("/proc/self/status")
    memory = Path("/proc/meminfo")
    if not (status.exists() and memory.exists()):
        return
    fields = dict(line.split(":", 1) for line in memory.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    mapped = next(x for x in status.read_text().splitlines() if x.startswith("VmSize:"))
    limit = int(mapped.split()[1]) * 1024 + int(0.9 * available)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


if __name__ == "__main__":
    sys.exit(main())
