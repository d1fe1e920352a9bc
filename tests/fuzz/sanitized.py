"""The CPU kernels built with a sanitizer, and a pytest plugin that puts them in ours' place.

Loaded as a plugin it hands DPO_KERNELS_SANITIZED to Python as dpo_kernels._C before anything of
dpo_kernels is imported. Python is not instrumented, so the sanitizer's runtime is preloaded.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
_RUNTIMES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def runtimes(kind: str) -> list[str]:
    """The paths of the runtimes to preload; [] where the compiler has none."""
    found = []
    for name in _RUNTIMES[kind]:
        command = [compiler(), f"-print-file-name={name}"]
        try:
            path = subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return []
        if not os.path.isabs(path):
            return []
        found.append(path)
    return found


def build(kind: str) -> Path:
    """The instrumented module, built again only when a source is newer."""
    target = ROOT / "build" / f"sanitized-{kind}" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp", root_dir=ROOT))]
    inputs = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    if target.exists() and target.stat().st_mtime > max(x.stat().st_mtime for x in inputs):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # under another name first: another run may build it at the same time
    part = target.parent / str(os.getpid())
    part.mkdir(exist_ok=True)
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-fno-omit-frame-pointer", "-ffp-contract=off"]
    flags += ["-pthread", *FLAGS[kind], f"-I{ROOT / 'csrc'}"]
    # torch brings pybind11's headers along
    pybind11 = Path(importlib.util.find_spec("torch").origin).parent / "include"
    flags += [f"-isystem{pybind11}", f"-isystem{sysconfig.get_paths()['include']}"]
    objects = []
    for source in sources:
        objects.append(str(part / (Path(source).stem + ".o")))
        command = [compiler(), *flags, "-c", str(ROOT / source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    linked = part / target.name
    subprocess.run([compiler(), "-shared", *flags, *objects, "-o", str(linked)], check=True)
    linked.replace(target)
    shutil.rmtree(part)
    return target


def environment(kind: str) -> dict[str, str]:
    """What a Python with the plugin needs around it."""
    return {
        "DPO_KERNELS_SANITIZED": str(build(kind)),
        "LD_PRELOAD": " ".join(runtimes(kind)),
        # what Python itself leaves behind at exit is its own affair; OpenMP's barriers are not
        # instrumented, so under TSan the kernels run on threads of their own
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0:ignore_noninstrumented_modules=1",
        "DPO_KERNELS_SANITIZER": kind,
    }


def command(kind: str | None) -> list[str]:
    """What starts a Python under the sanitizer: TSan cannot live with random addresses."""
    fixed = ["setarch", platform.machine(), "-R"] if kind == "thread" else []
    return [*fixed, sys.executable]


def load(path: str) -> None:
    spec = importlib.util.spec_from_file_location("dpo_kernels._C", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["dpo_kernels._C"] = module
    spec.loader.exec_module(module)


if os.environ.get("DPO_KERNELS_SANITIZED") and "dpo_kernels._C" not in sys.modules:
    load(os.environ["DPO_KERNELS_SANITIZED"])
    if os.environ["DPO_KERNELS_SANITIZER"] == "thread":
        from dpo_kernels.backends import cpu

        cpu.MODULE.cpu_share_openmp(0)


def pytest_configure(config) -> None:
    # the plugin came too late if something had imported the usual module
    loaded = sys.modules["dpo_kernels._C"].__file__
    if loaded != os.environ["DPO_KERNELS_SANITIZED"]:
        raise RuntimeError(f"the module under test is {loaded}, which is not instrumented")
