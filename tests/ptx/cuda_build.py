"""csrc/cuda compiled once for the executor: nvcc's PTX, and the launchers without a device.

The launchers and the binding are the project's own, linked with runtime.cpp in the place of CUDA's
runtime. Their namespace is renamed so that pybind11 keeps the structs apart from those of
``dpo_kernels._C``, which is loaded beside it; the functions of other devices are never called.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from .. import build_cache
from ..build_helpers import find_nvcc, nvcc_code_flags
from .parse import Module, parse

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RENAMED = "-Ddpo_kernels=dpo_kernels_ptx"


def unavailable() -> str | None:
    # make test-wheels has the tests alone
    if not (ROOT / "csrc").is_dir():
        return "its sources are not beside the tests"
    if find_nvcc() is None:
        return "no nvcc in CUDA_HOME, on PATH or among the installed packages"
    if shutil.which("g++") is None:
        return "no g++"
    return None


@functools.cache
def _folder() -> Path:
    """Of what is compiled from the sources as they are now."""
    version = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True)
    words = (find_nvcc(), version.stdout, sysconfig.get_platform(), sysconfig.get_python_version())
    inputs = [path for path in (ROOT / "csrc").rglob("*.*") if "cpu" not in path.parts]
    inputs = [path for path in inputs if path.is_file() and path.suffix != ".pyc"]
    return build_cache.folder("ptx", words, [*inputs, HERE / "runtime.cpp", Path(__file__)])


def _run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
    return done.stdout


def compile_ptx(arch: int, output: Path, *flags: str) -> str:
    """A warning is an error, and so is a host function that device code calls, as in the build."""
    source = ROOT / "csrc" / "cuda" / "launchers.cu"
    errors = ("-Werror", "all-warnings", "-diag-error", "20013,20015")
    words = (*nvcc_code_flags(), "-DDPO_KERNELS_WITH_CUDA", RENAMED, *errors, *flags)
    _run(find_nvcc(), *words, f"-arch=compute_{arch}", "-ptx", source, "-o", output)
    return output.read_text()


@functools.cache
def ptx(arch: int) -> str:
    """What nvcc makes of the kernels for an architecture."""
    path = _folder() / f"sm_{arch}.ptx"
    return build_cache.once(path, lambda part: compile_ptx(arch, part)).read_text()


@functools.cache
def kernels(arch: int) -> Module:
    return parse(ptx(arch))


def _link(part: Path) -> None:
    nvcc, folder = find_nvcc(), part.parent
    here = folder / str(os.getpid())
    here.mkdir(exist_ok=True)
    defines = ["-DDPO_KERNELS_WITH_CUDA", RENAMED, '-DDPO_KERNELS_CUDA_ARCHS="90"']
    csrc = ROOT / "csrc"
    launchers, binding, runtime = here / "launchers.o", here / "bindings.o", here / "runtime.o"
    _run(
        nvcc,
        "-std=c++17",
        "-O1",
        *defines,
        "-arch=compute_90",
        "-Werror",
        "all-warnings",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden,-Wall",
        "-c",
        csrc / "cuda" / "launchers.cu",
        "-o",
        launchers,
    )
    includes = [
        f"-I{csrc}",
        f"-I{sysconfig.get_paths()['include']}",
        f"-I{Path(torch.__file__).parent / 'include'}",
    ]
    _run(
        "g++",
        "-std=c++17",
        "-O0",
        *defines,
        *includes,
        "-fPIC",
        "-fvisibility=hidden",
        "-c",
        csrc / "bindings.cpp",
        "-o",
        binding,
    )
    _run(
        nvcc,
        "-std=c++17",
        "-O1",
        "-x",
        "c++",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
        "-c",
        HERE / "runtime.cpp",
        "-o",
        runtime,
    )
    missing = [s.split()[-1] for s in _run("nm", "-u", binding).splitlines() if "cpu_" in s]
    stubs = here / "stubs.s"
    lines = [f".hidden {s}\n.globl {s}\n.type {s}, @function\n{s}: ud2" for s in missing]
    stubs.write_text("\n".join([".text", *lines, '.section .note.GNU-stack,"",@progbits', ""]))
    _run("g++", "-shared", "-Wl,-z,now", launchers, binding, runtime, stubs, "-o", part)
    shutil.rmtree(here)


@functools.cache
def host():
    """(binding, runtime): the module in the place of dpo_kernels._C, and runtime.cpp by ctypes."""
    path = build_cache.once(_folder() / "_C.so", _link)
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, ctypes.CDLL(str(path))
