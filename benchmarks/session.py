"""A run of groups: rows are written as they are made, progress says what is left."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from dpo_kernels.cli.rows import KEY, read_rows, write_rows
from dpo_kernels.cli.runner import modes_of

from .suites import Group

# a group needs a moment to make its problem
_LEAST_S = 15


class Clock:
    """The time left; a step that does not fit is skipped and said so."""

    def __init__(self, budget_s: float):
        self.end = time.monotonic() + budget_s

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Session:
    """Runs groups into CSV files; with ``resume`` those whose rows are there are not run again."""

    def __init__(self, console: Console, device: str, clock: Clock, *, resume: bool):
        self.console, self.device, self.clock, self.resume = console, device, clock, resume
        self.rows: list[dict[str, str]] = []
        self.failed: list[str] = []

    def run(self, work: list[tuple[Path, Group]]) -> None:
        if not self.resume:
            for path in {path for path, _ in work}:
                path.unlink(missing_ok=True)
        started, done = time.monotonic(), 0
        for number, (path, group) in enumerate(work, 1):
            if self._is_there(path, group):
                self.console.print(f"{number} of {len(work)}: {group.label}: measured before")
                continue
            if self.clock.left < _LEAST_S:
                self.console.print(
                    f"the time is up: {len(work) - number + 1} of {len(work)} groups are not run"
                )
                return
            left = ""
            if done:
                seconds = (time.monotonic() - started) / done * (len(work) - number + 1)
                left = f", about {_duration(seconds)} left"
            self.console.print(f"{number} of {len(work)}{left}: {group.label}")
            self._run_one(path, group)
            done += 1

    def _run_one(self, path: Path, group: Group) -> None:
        def emit(row: dict[str, str]) -> None:
            write_rows(path, [row], append=True)
            self.rows.append(row)
            self.console.print(describe(row))

        try:
            group.run(self.device, emit, lambda note: None)
        except Exception as error:
            # one group's fault costs its own rows
            self.failed.append(f"{group.label}: {type(error).__name__}: {error}")
            self.console.print(f"  failed: {type(error).__name__}: {error}")

    def _is_there(self, path: Path, group: Group) -> bool:
        if not self.resume or not path.exists():
            return False
        probe: list[dict[str, str]] = []
        wanted = expected_keys(group, self.device)
        probe = read_rows(path)
        return wanted <= {key_of(row) for row in probe}


def expected_keys(group: Group, device: str) -> set[tuple[str, ...]]:
    from dpo_kernels.cli.rows import make_row

    names = [
        (c, mode)
        for c in group.contenders
        for mode in modes_of(c, group.modes)
        if group.benchmark not in ("overhead", "accuracy")
        or (mode == "forward + backward" and not c.compiles)
    ]
    return {
        key_of(make_row(group.benchmark, c.name, mode, group.shape, device, precision=c.precision))
        for c, mode in names
    }


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in KEY)


def describe(row: dict[str, str]) -> str:
    name = f"  {row['contender']}, {row['mode']}: "
    if row["status"] != "ok":
        return name + row["status"]
    if not row["median_ms"]:
        return name + f"loss off by {row['loss_error']}, gradient by {row['gradient_error']}"
    floor = f", {float(row['times_floor']):.2f}x of the floor" if row["times_floor"] else ""
    return name + f"{float(row['median_ms']):.3g} ms{floor}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
