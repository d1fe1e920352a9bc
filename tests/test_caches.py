"""Compiled graphs and kernels are never shared between environments or versions of torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from dpo_kernels.cli import caches

ROOT = Path(__file__).parents[1]
# what a run of pytest by itself, without make, works with
SHOW = """
import os, pytest
class Plugin:
    def pytest_collection_finish(self):
        print(*(os.environ[name] for name in {names}), sep="\\n")
pytest.main(["-q", "--collect-only", "tests/test_promises.py"], plugins=[Plugin()])
"""


def test_pytest_has_caches_of_its_own(tmp_path):
    """Even where the caller's are shared, as two versions of torch have shared them."""
    shared = {name: str(tmp_path / "shared") for name in caches.VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", SHOW.format(names=caches.VARIABLES)],
        env={**os.environ, **shared},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    used = [line for line in done.stdout.splitlines() if "/cache/" in line]
    assert used == [os.environ[name] for name in caches.VARIABLES]


def test_a_cache_is_of_one_torch_and_one_triton(monkeypatch):
    for name in caches.VARIABLES:
        monkeypatch.setenv(name, "shared")
    folder = caches.keep_apart()
    assert folder.is_absolute()
    expected = [folder / "torchinductor", folder / "triton"]
    assert [Path(os.environ[name]) for name in caches.VARIABLES] == expected
    assert f"torch-{torch.__version__}" in folder.name
    monkeypatch.setattr(caches, "version", lambda name: version(name) + ".other")
    assert caches.keep_apart() != folder
