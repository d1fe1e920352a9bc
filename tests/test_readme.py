"""README.md holds what it says: its examples run, its commands exist, its figures are rows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
# what each command runs with here, so that a test takes seconds; None: CI runs it as it stands
SHORTENED = {
    # test_install_from_a_clone runs it and what follows
    "pip install -e '.[demo]'": None,
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


def run(command: list[str]) -> subprocess.CompletedProcess:
    # a user has no interpreted Triton kernels, which would make every command slow
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
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


def cases() -> list:
    shortened = [command for command, options in SHORTENED.items() if options is not None]
    # it has a budget of seconds
    alone = {"python -m benchmarks.gpu": pytest.mark.alone}
    return [pytest.param(command, marks=alone.get(command, ())) for command in shortened]


@pytest.mark.parametrize("command", cases())
def test_command_runs(command, tmp_path):
    words = [sys.executable, *command.split()[1:], *SHORTENED[command]]
    if command == "python -m benchmarks.gpu":
        words += ["--out", str(tmp_path)]
    result = run(words)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


def test_install_from_a_clone(tmp_path):
    """The commands of "Install", in a fresh clone and a fresh environment, as a user types them."""
    lines = README.split("## Install")[1].split("```")[1].splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["pip", "python"]
    if not (ROOT / ".git").exists():
        pytest.skip("no clone can be made of what is no checkout")
    clone, environment = tmp_path / "clone", tmp_path / "venv"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    # torch, rich and matplotlib are taken from here: no test should have to fetch gigabytes
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def type_in(line: str, folder: Path = clone) -> str:
        path = os.pathsep.join((str(environment / "bin"), os.environ["PATH"]))
        # the CUDA kernels are compiled by tests/test_cuda_compile.py; nothing here has to be fast
        variables = {**os.environ, "PATH": path, "DPO_KERNELS_CUDA_ARCHS": "", "CXXFLAGS": "-O0"}
        variables.pop("PYTHONPATH", None)
        done = subprocess.run(
            line, shell=True, cwd=folder, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    for line in lines:
        told = type_in(line)
    assert re.search(r"cpu +\| available", told), told
    (built,) = (clone / "dpo_kernels").glob("_C*.so")

    # and a copy in the environment, which the sources hide; what was compiled is not compiled again
    built.unlink()
    type_in("pip uninstall --yes dpo_kernels")
    type_in("pip install .")
    told = " ".join(type_in(lines[-1]).replace("|", " ").split())
    assert f"the source folder {clone}, where nothing was built, hides the dpo_kernels" in told
    assert re.search(r"cpu +\| available", type_in(lines[-1], tmp_path))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_ci_runs_make_target(command):
    assert command in (ROOT / ".ci" / "run").read_text()


def test_figures_are_rows():
    result = run([sys.executable, "-m", "benchmarks.readme", "--check"])
    assert result.returncode == 0, result.stdout + result.stderr


def test_environment_variables_are_all_told():
    told = set(re.findall(r"`(DPO_KERNELS_\w+)`", README))
    sources = [*(ROOT / "dpo_kernels").rglob("*.py"), ROOT / "setup.py", *ROOT.glob("csrc/*.py")]
    read = {name for path in sources for name in re.findall(r"DPO_KERNELS_\w+", path.read_text())}
    # a compile-time macro of setup.py
    assert read - {"DPO_KERNELS_WITH_CUDA"} == told
