"""The CPU kernels built with a sanitizer, and a pytest plugin that puts them in ours' place.

Loaded as a plugin it hands DPO_KERNELS_SANITIZED to Python as dpo_kernels._C before anything of
dpo_kernels is imported. Python is not instrumented, so the sanitizer's runtime is preloaded.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests import build_cache

ROOT = Path(__file__).resolve().parents[2]
EXTENSION_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
CXX_FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer", "-ffp-contract=off"]
CXX_FLAGS += ["-pthread"]
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
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


@functools.cache
def folder(kind: str) -> Path:
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True)
    inputs = [path for path in (ROOT / "csrc").rglob("*.*") if path.is_file()]
    words = (*CXX_FLAGS, *FLAGS[kind], version.stdout, EXTENSION_SUFFIX, torch_include())
    return build_cache.folder(f"sanitized-{kind}", words, [*inputs, Path(__file__)])


def command_line(kind: str) -> list[str]:
    """What compiles or links with the sanitizer."""
    return [compiler(), *CXX_FLAGS, *FLAGS[kind], f"-I{ROOT / 'csrc'}"]


def objects(kind: str) -> list[Path]:
    """The object files of csrc/cpu."""
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))

    def compile_all(part: Path) -> None:
        part.mkdir()
        for source in sources:
            command = [*command_line(kind), "-c", str(source), "-o", str(part / f"{source.stem}.o")]
            subprocess.run(command, check=True)

    made = build_cache.once(folder(kind) / "objects", compile_all)
    return [made / f"{source.stem}.o" for source in sources]


def torch_include() -> str:
    """Where torch keeps pybind11's headers."""
    return str(Path(importlib.util.find_spec("torch").origin).parent / "include")


def build(kind: str) -> Path:
    """The instrumented module."""

    def link(part: Path) -> None:
        binding = part.with_suffix(".o")
        # unoptimised: pybind11's templates take most of the time, and none of it when they run
        command = [*command_line(kind), "-O0", f"-isystem{torch_include()}"]
        command += [f"-isystem{sysconfig.get_paths()['include']}"]
        source = str(ROOT / "csrc" / "bindings.cpp")
        subprocess.run([*command, "-c", source, "-o", str(binding)], check=True)
        parts = map(str, (binding, *objects(kind)))
        subprocess.run([*command_line(kind), "-shared", *parts, "-o", str(part)], check=True)
        binding.unlink()

    return build_cache.once(folder(kind) / f"_C{EXTENSION_SUFFIX}", link)


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
