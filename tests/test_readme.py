"""README.md holds what it says: its examples run, its commands exist, its figures are rows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
# what each command runs with here, so that a test takes seconds; None: CI runs it as it stands
SHORTENED = {
    "pip install .": None,
    "make demo": None,
    "make test": None,
    "make lint": None,
    "make test-integrations": None,
    "python -m dpo_kernels": [],
    "python -m dpo_kernels parity": [],
    "python -m dpo_kernels bench --quick": ["--shape", "1", "16", "1024"],
    # tests/test_demo.py runs it
    "python -m dpo_kernels demo": ["--help"],
    "python -m benchmarks.gpu": ["--device", "cpu", "--skip", "build", "tests", "--budget", "120"],
}


def run(command: list[str], **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_example_runs(index):
    result = run([sys.executable, "-c", blocks("python")[index]])
    assert result.returncode == 0, result.stderr


def test_every_command_is_known():
    assert set(COMMANDS) == set(SHORTENED)


@pytest.mark.parametrize("command", [c for c in COMMANDS if SHORTENED.get(c) is not None])
def test_command_runs(command, tmp_path):
    words = [sys.executable, *command.split()[1:], *SHORTENED[command]]
    if command == "python -m benchmarks.gpu":
        words += ["--out", str(tmp_path)]
    result = run(words)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_ci_runs_make_target(command):
    assert command in (ROOT / ".ci" / "run").read_text()


def test_figures_are_rows():
    result = run([sys.executable, "-m", "benchmarks.readme", "--check"])
    assert result.returncode == 0, result.stdout + result.stderr


def test_environment_variables_are_all_told():
    told = set(re.findall(r"`(DPO_KERNELS_\w+)`", README))
    sources = [*(ROOT / "dpo_kernels").rglob("*.py"), ROOT / "setup.py"]
    read = {name for path in sources for name in re.findall(r"DPO_KERNELS_\w+", path.read_text())}
    # a compile-time macro and a build detail of setup.py
    assert read - {"DPO_KERNELS_WITH_CUDA", "DPO_KERNELS_BUILD_JOBS"} == told
