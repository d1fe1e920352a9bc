"""Everything that needs a GPU, in one command of at most nine minutes: `python -m benchmarks.gpu`.

Builds the CUDA kernels for the GPU at hand, runs the gpu tests and compute-sanitizer, then
benchmarks.device: the ceilings, and ours against the reference, torch.compile and the peers that
are installed. Logs and rows go to --out as they are made, so that a run that is cut short keeps
what it has. Without a GPU, --device cpu rehearses every step on tiny shapes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).parent.parent
BUDGET_S = 9 * 60
console = Console()


class Clock:
    """The time left; a step that does not fit is skipped and said so."""

    def __init__(self, budget_s: float):
        self.end = time.monotonic() + budget_s

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def run_step(name: str, command: list[str], log: Path, clock: Clock, limit_s: float, **env) -> bool:
    """Runs a command into its own log file; False when it failed or did not fit."""
    limit = min(limit_s, clock.left - 5)
    if limit < 5:
        console.print(f"[yellow]{name}: skipped, no time left")
        return False
    started = time.monotonic()
    with log.open("w") as stream:
        try:
            code = subprocess.run(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                timeout=limit,
                env={**os.environ, **env},
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = "timeout"
    seconds = time.monotonic() - started
    colour = "green" if code == 0 else "red"
    console.print(f"[{colour}]{name}: exit {code}, {seconds:.0f} s, {log.name}")
    if code != 0:
        console.print("".join(log.read_text().splitlines(keepends=True)[-15:]), markup=False)
    return code == 0


def build(device: str, out: Path, clock: Clock) -> bool:
    archs = ""
    if device == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability()
        archs = f"{major}{minor}"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run_step(
        f"build for {archs or 'CPU'}",
        command,
        out / "build.log",
        clock,
        180,
        DPO_KERNELS_CUDA_ARCHS=archs,
    )


def test(device: str, out: Path, clock: Clock) -> bool:
    selection = ["-m", "gpu"] if device == "cuda" else ["tests/test_losses.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *selection]
    return run_step("tests", command, out / "tests.log", clock, 200)


def sanitize(device: str, out: Path, clock: Clock) -> None:
    tool = shutil.which("compute-sanitizer")
    if device != "cuda" or tool is None:
        console.print("[yellow]compute-sanitizer: not found, or no GPU; not run")
        return
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "benchmarks.sanitize"]
        # torch's caching allocator would hide accesses past the end of a tensor
        run_step(
            f"compute-sanitizer {check}",
            command,
            out / f"sanitizer_{check}.log",
            clock,
            60,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )


def bench(device: str, out: Path, clock: Clock) -> bool:
    command = [sys.executable, "-m", "benchmarks.device", "--device", device]
    command += ["--out", str(out / "rows.csv"), "--budget", str(clock.left - 10)]
    # its table belongs on the terminal
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds")
    parser.add_argument("--skip", nargs="*", default=[], choices=("build", "tests", "sanitizer"))
    options = parser.parse_args(arguments)
    out, clock = options.out.absolute(), Clock(options.budget)
    out.mkdir(parents=True, exist_ok=True)

    if "build" not in options.skip and not build(options.device, out, clock):
        console.print("[yellow]going on with the backends that need no build")
    green = "tests" in options.skip or test(options.device, out, clock)
    if "sanitizer" not in options.skip:
        sanitize(options.device, out, clock)
    if not green:
        console.print("[red]the tests are red: nothing is timed")
        return 1
    return 0 if bench(options.device, out, clock) else 1


if __name__ == "__main__":
    sys.exit(main())
