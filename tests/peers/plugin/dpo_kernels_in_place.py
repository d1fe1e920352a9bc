"""A pytest plugin for a peer's suite, in a folder of its own: the peer has a ``tests`` too."""

from __future__ import annotations

import functools
import inspect
import json
import os
from pathlib import Path

import dpo_kernels
from dpo_kernels import patching

TRAINER = os.environ["PEER_TRAINER"]
PATCHED = os.environ["PEER_PATCHED"] == "1"
OUTCOMES = Path(os.environ["PEER_OUTCOMES"])

outcomes: dict[str, str] = {}
calls = 0
where = ""


def _counted(function):
    @functools.wraps(function)
    def counted(*args, **kwargs):
        global calls
        calls += 1
        return function(*args, **kwargs)

    return counted


def pytest_configure(config) -> None:
    global where
    package = __import__(patching.TRAINERS[TRAINER].package)
    where = f"{package.__name__} {getattr(package, '__version__', '')} in {package.__path__[0]}"
    if not PATCHED:
        return
    patch = dpo_kernels.patch(TRAINER)
    for _, holder, name, _, replacement in patch.bindings:
        if inspect.isclass(replacement):
            replacement.forward = _counted(replacement.forward)
        elif hasattr(replacement, "apply"):
            replacement.apply = _counted(replacement.apply)
        elif inspect.isfunction(replacement):
            patching._bind(holder, name, replacement, _counted(replacement))


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session) -> None:
    OUTCOMES.write_text(json.dumps({"outcomes": outcomes, "calls": calls, "where": where}))
