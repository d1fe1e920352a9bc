"""The CPU suites under pytest-benchmark: `pytest benchmarks`, then `pytest-benchmark compare`.

All contenders of a shape are timed once, in rounds that take turns; each test then hands the rounds
of one contender to pytest-benchmark through a clock that replays them, so that its statistics are
of interleaved rounds. A contender without figures is skipped with its status.
"""

from __future__ import annotations

import pytest

pytest.importorskip("pytest_benchmark")

from dpo_kernels.cli import runner
from dpo_kernels.cli.rows import OK

from .suites import Group, Options, groups_for


class ReplayClock:
    """A clock that stands still but for ``tick``."""

    def __init__(self):
        self.time, self.pending = 0.0, []

    def now(self) -> float:
        return self.time

    def tick(self) -> None:
        self.time += self.pending.pop(0)


CLOCK = ReplayClock()
_measured: dict[str, list] = {}


def pytest_generate_tests(metafunc):
    config = metafunc.config
    options = Options(
        "cpu", quick=not config.getoption("full"), rehearse=config.getoption("rehearse")
    )
    cases = []
    for suite in ("logits", "linear"):
        for group in groups_for(suite, options):
            for contender in group.contenders:
                for mode in runner.modes_of(contender, group.modes):
                    name = f"{group.label}, {contender.name}, {mode}"
                    cases.append(pytest.param(group, contender.name, mode, id=name))
    metafunc.parametrize(("group", "contender", "mode"), cases)


def rounds(group: Group) -> list:
    """(row, seconds of its rounds) of every contender of a group, measured when first asked for."""
    if group.label not in _measured:
        seconds: dict[str, list[float]] = {}
        rows: list[dict[str, str]] = []

        def keep(timed):
            seconds.update({one.name: one.seconds for one in timed})

        group.run("cpu", rows.append, lambda note: None, keep)
        names = [f"{row['contender']}, {row['mode']}" for row in rows]
        _measured[group.label] = [
            (row, seconds.get(name, [])) for row, name in zip(rows, names, strict=True)
        ]
    return _measured[group.label]


@pytest.mark.benchmark(timer=CLOCK.now, warmup=False)
def test_suite(benchmark, group, contender, mode):
    found = [
        (row, seconds)
        for row, seconds in rounds(group)
        if (row["contender"], row["mode"]) == (contender, mode)
    ]
    (row, seconds) = found[0]
    if row["status"] != OK:
        pytest.skip(row["status"])
    benchmark.group = f"{group.label}, {mode}"
    benchmark.extra_info.update({name: value for name, value in row.items() if value})
    CLOCK.pending = list(seconds)
    benchmark.pedantic(CLOCK.tick, rounds=len(seconds), iterations=1)
