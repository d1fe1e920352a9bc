"""Everything that needs a GPU, in one command of at most nine minutes: `python -m benchmarks.gpu`.

    build      the CUDA kernels for the GPU at hand
    smoke      a few values of every backend against float64, in seconds
    time       ours, the reference, torch.compile and the peers that are installed
    tests      every test marked gpu, each backend in processes of its own
    sanitizer  compute-sanitizer over the kernels of each backend, beside the tests

Each phase writes its log and what it has to --out as it goes; none waits for another to be green. A
backend that fails its smoke test is not timed, and every timed contender passes its own gate: what
is red has no figures, the rest has. The exit status is 1 if anything was red. Without a GPU,
--device cpu rehearses every phase on tiny shapes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from dpo_kernels.cli.console import make_console

from .session import Clock

ROOT = Path(__file__).parent.parent
BUDGET_S = 9 * 60
PHASES = ("build", "smoke", "time", "tests", "sanitizer")
# of the time that is left when a phase begins
_TIME_SHARE = 0.6
# of one selection of tests, where pytest-xdist is installed
_PYTEST_WORKERS = 4
_TAIL_LINES = 12
# what phases import beside the package and what its command line needs
_NEEDED = {"build": ("setuptools", "pybind11", "ninja"), "tests": ("pytest", "hypothesis")}
# the shapes of the record need as much, truth in float64 included
_LARGE_GIB = 70


class Run:
    """One run of the command: where it writes, what time it has, what was red."""

    def __init__(self, device: str, out: Path, clock: Clock):
        self.device, self.out, self.clock = device, out, clock
        self.console = make_console()
        self.red: list[str] = []
        # backends whose smoke test failed
        self.excluded: list[str] = []

    def can(self, phase: str) -> bool:
        """Whether the packages of a phase are here; what is missing is red, and said in a line."""
        missing = [name for name in _NEEDED[phase] if find_spec(name) is None]
        if missing:
            self.red.append(f"{phase}: needs {', '.join(missing)}: pip install -e '.[test]'")
            self.console.print(self.red[-1])
        return not missing

    def step(self, name: str, command: list[str], limit_s: float, *, show=False, **env) -> bool:
        """Runs a command into a log of its own; False when it failed or did not fit."""
        limit = min(limit_s, self.clock.left - 5)
        if limit < 5:
            self.console.print(f"{name}: skipped, the time is up")
            self.red.append(f"{name}: skipped")
            return False
        log = self.out / (re.sub(r"\W+", "_", name) + ".log")
        started = time.monotonic()
        with log.open("w") as stream:
            try:
                code = subprocess.run(
                    command,
                    stdout=None if show else stream,
                    stderr=None if show else subprocess.STDOUT,
                    cwd=ROOT,
                    timeout=limit,
                    env={**os.environ, **env},
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = "timeout"
        self.console.print(f"{name}: exit {code}, {time.monotonic() - started:.0f} s")
        if code != 0:
            self.red.append(f"{name}: exit {code}")
            tail = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]
            self.console.print("\n".join(f"  {line}" for line in tail))
        return code == 0

    def together(self, steps: list[Callable[[], object]]) -> None:
        """At once: nothing is timed, and a GPU serves many processes."""
        with ThreadPoolExecutor(max_workers=max(1, len(steps))) as pool:
            list(pool.map(lambda step: step(), steps))


def build(run: Run, optional: bool) -> None:
    archs = ""
    if run.device == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability()
        archs = f"{major}{minor}"
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    name = f"build {archs or 'cpu'}"
    done = run.can("build") and run.step(name, command, 240, DPO_KERNELS_CUDA_ARCHS=archs)
    if not done and optional:
        run.red.pop()


def backends(device: str) -> list[str]:
    """The kernels to try, asked in another process: this one must not hold a build's module."""
    code = (
        "from dpo_kernels.cli.contenders import backends_for; import torch; "
        f"print(*backends_for({device!r}, torch.float32))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.split()


def smoke(run: Run, names: list[str]) -> None:
    def one(name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.sanitize", name, "--smoke"]
        if not run.step(f"smoke {name}", command, 60):
            run.excluded.append(name)

    run.together([lambda name=name: one(name) for name in names])


def measure(run: Run, rows: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "logits", "linear", "overhead"]
    if run.device == "cpu":
        command.append("--rehearse")
    share = _TIME_SHARE * run.clock.left
    command += ["--device", run.device, "--out", str(rows), "--budget", f"{share:.0f}"]
    command += ["--no-report"]
    if run.device == "cuda" and memory_gib() < _LARGE_GIB:
        command.append("--quick")
    if run.excluded:
        command += ["--exclude", *run.excluded]
    # the rows that it prints belong on the terminal; a little more time than it gives itself
    run.step("time", command, share + 60, show=True)


def test_steps(run: Run, names: list[str]) -> list[Callable[[], object]]:
    if not run.can("tests"):
        return []
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if run.device == "cpu":
        return [lambda: run.step("tests cpu", [*pytest, "tests/test_losses.py"], 200)]
    if find_spec("xdist"):
        pytest += ["-n", str(_PYTEST_WORKERS)]
    # a label out of range, or a fault, kills the context of its process with every later test
    own = [*names, "torch"]
    selections = {name: f"{name}-gpu" for name in own}
    selections["others"] = " and ".join(f"not {name}-gpu" for name in own)

    def one(name: str, selection: str) -> None:
        report = f"--junitxml={run.out / f'tests_{name}.xml'}"
        run.step(f"tests {name}", [*pytest, "-m", "gpu", "-k", selection, report], run.clock.left)

    return [lambda pair=pair: one(*pair) for pair in selections.items()]


def sanitizer_steps(run: Run, names: list[str]) -> list[Callable[[], object]]:
    tool = shutil.which("compute-sanitizer")
    if run.device != "cuda" or tool is None:
        run.console.print("sanitizer: compute-sanitizer not found, or no GPU; not run")
        return []

    def one(name: str, check: str) -> None:
        command = [tool, "--tool", check, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "benchmarks.sanitize", name]
        # torch's caching allocator would hide accesses past the end of a tensor
        cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run.step(f"sanitizer {name} {check}", command, run.clock.left, **cache)

    checks = ("memcheck", "racecheck", "initcheck", "synccheck")
    return [lambda pair=(name, check): one(*pair) for name in names for check in checks]


def memory_gib() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30


def rows_file(device: str, out: Path) -> Path:
    """``nvidia_h100_80gb_hbm3.csv``, as benchmarks/results/gpu names them."""
    name = "rehearsal"
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_properties(0).name
    return out / (re.sub(r"\W+", "_", name.lower()).strip("_") + ".csv")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds")
    parser.add_argument("--skip", nargs="*", default=[], choices=PHASES)
    parser.add_argument(
        "--build-may-fail", action="store_true", help="then the status is that of the rest"
    )
    options = parser.parse_args(arguments)
    run = Run(options.device, options.out.absolute(), Clock(options.budget))
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            run.console.print("no CUDA GPU is visible to torch; --device cpu rehearses the command")
            return 2
    run.out.mkdir(parents=True, exist_ok=True)
    rows = rows_file(options.device, run.out)
    phases = [phase for phase in PHASES if phase not in options.skip]
    if "build" in phases:
        build(run, options.build_may_fail)
    names = backends(options.device)
    run.console.print(f"backends: {', '.join(names) or 'none'}")
    if "smoke" in phases:
        smoke(run, names)
    if "time" in phases:
        measure(run, rows)
    steps = test_steps(run, names) if "tests" in phases else []
    if "sanitizer" in phases:
        steps += sanitizer_steps(run, names)
    run.together(steps)
    run.console.print(f"{rows if rows.exists() else 'no rows'}; logs in {run.out}")
    for line in run.red:
        run.console.print(f"red: {line}")
    return 1 if run.red else 0


if __name__ == "__main__":
    sys.exit(main())
