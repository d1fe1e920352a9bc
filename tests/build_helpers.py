"""A copy of the project to build in, and compilers that build nothing but behave like real ones."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
UNBUILT = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
EXTENSION_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# what nvcc --list-gpu-code prints
TARGETS = {
    "11.0": "35 37 50 52 53 60 61 62 70 72 75 80",
    "12.4": "50 52 53 60 61 62 70 72 75 80 86 87 89 90",
    "12.8": "50 52 53 60 61 62 70 72 75 80 86 87 89 90 100 101 120",
    "13.0": "75 80 86 87 88 89 90 100 103 110 120 121",
}
# scans the includes as the real compiler does, and leaves an empty object
SCAN = """#!/bin/sh
for word in "$@"; do
  case $last in -o) out=$word;; -MF) dep=$word;; -c) source=$word;; esac
  last=$word
done
: > "$out"
[ -z "$source" ] || exec REAL -MM -MF "$dep" -MT "$out" -x c++ "$source"
"""
NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-code*) for n in TARGETS; do echo "sm_$n"; done;;
  *--version*) echo "Cuda compilation tools, release RELEASE, VRELEASE.1";;
  *) exec COMPILER "$@";;
esac
"""


def nvcc_code_flags() -> list[str]:
    """The flags of the build that decide which code nvcc makes."""
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "csrc" / "toolchain.py")
    toolchain = importlib.util.module_from_spec(spec)
    # a dataclass looks its module up
    sys.modules.setdefault(spec.name, toolchain)
    spec.loader.exec_module(toolchain)
    return toolchain.NVCC_CODE_FLAGS


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or CUDA_PATH, on PATH, or of the installed packages nvidia/cu*."""
    homes = [Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    for home in homes:
        if (home / "bin" / "nvcc").is_file():
            return str(home / "bin" / "nvcc")
    packages = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/bin/nvcc"))
    return shutil.which("nvcc") or (str(packages[-1]) if packages else None)


def copy_project(folder: Path) -> Path:
    for name in ("csrc", "dpo_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=UNBUILT)
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_cxx(folder: Path) -> Path:
    real = shutil.which("g++") or shutil.which("c++")
    return write_script(folder / "fake-c++", SCAN.replace("REAL", real))


def fake_toolkit(folder: Path, release: str) -> Path:
    """A CUDA_HOME whose nvcc has the targets of that release."""
    text = NVCC.replace("TARGETS", TARGETS[release]).replace("RELEASE", release)
    write_script(folder / "bin" / "nvcc", text.replace("COMPILER", str(fake_cxx(folder))))
    (folder / "lib64").mkdir(exist_ok=True)
    (folder / "lib64" / "libcudart_static.a").touch()
    return folder


def run(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Python in the project, without what the caller's environment says of compilers."""
    ours = ("DPO_KERNELS_", "CUDA_", "CXX", "CPPFLAGS", "LDFLAGS", "NVCC_", "PYTHONPATH")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


def build(project: Path, **variables: str) -> subprocess.CompletedProcess:
    return run(project, "setup.py", "build_ext", "--inplace", **variables)
