"""Builds dpo_kernels._C with ninja; no torch is imported or linked, so one build serves them all.

Without a C++ compiler the package installs with its Triton and PyTorch backends, without nvcc
with the CPU kernels beside them; dpo_kernels/_build.json keeps the reason. A compiler that fails is
an error. `python setup.py ninja` writes build/<platform>/build.ninja alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

import ninja
import pybind11
from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import toolchain  # noqa: E402

# no -I: a header of csrc/ must not be found where one of the system is meant
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall"),
    # as in toolchain.NVCC_CODE_FLAGS
    "-ffp-contract=off",
]
NVCC_FLAGS = [
    *toolchain.NVCC_CODE_FLAGS,
    *("-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    # a host function that device code calls compiles to garbage, and nvcc only warns of it;
    # -Werror does not reach the warning of a constexpr one, as std::log1p can be
    *("-Werror", "cross-execution-space-call", "-diag-error", "20013,20015"),
]
MODES = ("auto", "off", "require")


def write_ninja(path: Path, cxx: list[str], cuda: toolchain.Cuda | None) -> Path:
    """Writes build.ninja, its paths relative to the project; returns the module's path."""
    out = path.parent.relative_to(ROOT)
    # in the names of what depends on Python; all other objects are shared between its versions
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    macros = []
    if cuda:
        archs = ";".join(map(str, cuda.targets))
        macros = ["-DDPO_KERNELS_WITH_CUDA", f'-DDPO_KERNELS_CUDA_ARCHS="{archs}"']
    python = [sysconfig.get_path("include"), pybind11.get_include()]

    cache = shutil.which("ccache")
    prefix = [cache] if cache and Path(cxx[0]).name != "ccache" else []
    user = {name: shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CXXFLAGS")}
    compile_cxx = [*prefix, *cxx, *CXX_FLAGS, *user["CPPFLAGS"], *user["CXXFLAGS"]]

    with path.open("w") as stream:
        writer = ninja.Writer(stream, width=100)
        writer.comment("Written by setup.py.")
        # what ninja asks for, and where it keeps its log
        writer.variable("ninja_required_version", "1.5")
        writer.variable("builddir", str(out))
        writer.rule(
            "cxx",
            f"{quoted(compile_cxx)} $flags -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
        )
        objects = []

        def compile_one(rule: str, source: Path, name: str, flags: list[str]) -> None:
            objects.append(str(out / name))
            writer.build(objects[-1], rule, str(source), variables={"flags": quoted(flags)})

        if cuda:
            writer.rule(
                "nvcc",
                f"{quoted(compile_cuda(prefix, cuda))} $flags -MD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            # first, as they take longest
            for source in sources("csrc/cuda", "*.cu"):
                compile_one("nvcc", source, f"cuda/{source.stem}.o", macros[:1])
        for source in sources("csrc/cpu", "*.cpp"):
            compile_one("cxx", source, f"cpu/{source.stem}.o", [])
        include = [word for folder in python for word in ("-isystem", folder)]
        for source in sources("csrc", "*.cpp"):
            compile_one("cxx", source, f"{source.stem}{suffix}.o", [*macros, *include])
        module = str(out / f"_C{suffix}")
        writer.rule("link", f"{quoted(cxx)} $in -o $out {quoted(link_flags(cuda))}")
        writer.build(module, "link", objects)
        writer.default(module)
    return ROOT / module


def sources(folder: str, pattern: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / folder).glob(pattern))


def compile_cuda(prefix: list[str], cuda: toolchain.Cuda) -> list[str]:
    command = [*prefix, str(cuda.nvcc), *NVCC_FLAGS]
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked and not os.environ.get("NVCC_CCBIN"):
        command += ["-ccbin", asked[Path(asked[0]).name == "ccache"]]
    for target in cuda.targets:
        command.append(f"-gencode=arch=compute_{target},code=sm_{target}")
    # GPUs newer than all of these compile it when they load the module
    newest = cuda.targets[-1]
    return [*command, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def link_flags(cuda: toolchain.Cuda | None) -> list[str]:
    if sys.platform == "darwin":
        flags = ["-bundle", "-undefined", "dynamic_lookup"]
    else:
        flags = ["-shared", "-pthread"]
    if cuda:
        flags += [f"-L{cuda.libraries}", "-lcudart_static", "-ldl", "-lrt"]
        # keeps the static CUDA runtime's symbols from meeting those of torch's shared one
        flags.append("-Wl,--exclude-libs,ALL")
    return [*flags, *shlex.split(os.environ.get("LDFLAGS", ""))]


def quoted(words: list[str]) -> str:
    return ninja.escape(shlex.join(words))


def say(text: str) -> None:
    print(f"dpo_kernels: {text}", file=sys.stderr, flush=True)


def configure() -> tuple[Path | None, dict[str, str]]:
    """Writes build.ninja; returns the module to build, if any, and what is left out and why."""
    mode = os.environ.get("DPO_KERNELS_BUILD", "auto")
    if mode not in MODES:
        raise SystemExit(f"dpo_kernels: DPO_KERNELS_BUILD={mode}: expected {', '.join(MODES)}")
    left_out = {}
    try:
        if mode == "off":
            raise toolchain.NotFound("DPO_KERNELS_BUILD was off")
        if os.name != "posix":
            raise toolchain.NotFound("its C++ builds on Linux and macOS only")
        cxx = toolchain.find_cxx()
    except toolchain.NotFound as error:
        if mode == "require":
            raise SystemExit(f"dpo_kernels: DPO_KERNELS_BUILD=require, but {error}") from error
        return None, {"module": str(error)}
    try:
        cuda = toolchain.find_cuda()
        if cuda.left_out:
            left_out["targets"] = cuda.left_out
    except toolchain.NotFound as error:
        cuda, left_out["cuda"] = None, str(error)
    path = ROOT / "build" / sysconfig.get_platform() / "build.ninja"
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_ninja(path, cxx, cuda), left_out


class WriteNinja(Command):
    """Writes build.ninja and prints its path."""

    user_options: ClassVar[list] = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        module, left_out = configure()
        if module is None:
            raise SystemExit(f"dpo_kernels: {left_out['module']}")
        print(module.parent / "build.ninja")


class BuildExtension(build_ext):
    """build_ext by ninja, in a folder that outlasts pip's temporary ones."""

    def run(self):
        module, left_out = configure()
        target = Path(self.get_ext_fullpath("dpo_kernels._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        # an older one would go on serving; and a process that has it loaded must keep its own
        target.unlink(missing_ok=True)
        if module is None:
            reason = left_out["module"]
            say(f"{reason}: installing without the compiled module, with Triton and PyTorch")
        else:
            for reason in left_out.values():
                say(f"CUDA kernels: {reason}")
            self.run_ninja(module)
            shutil.copy2(module, target)
        (target.parent / "_build.json").write_text(json.dumps(left_out, indent=1) + "\n")

    def run_ninja(self, module: Path) -> None:
        command = [sys.executable, "-m", "ninja", "-f", str(module.parent / "build.ninja")]
        jobs = os.environ.get("DPO_KERNELS_BUILD_JOBS")
        if jobs:
            command += ["-j", jobs]
        if self.force:
            subprocess.run([*command, "-t", "clean"], cwd=ROOT, check=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise SystemExit(
                "dpo_kernels: the build failed, see above. DPO_KERNELS_CUDA_ARCHS= leaves the "
                "CUDA kernels out, DPO_KERNELS_BUILD=off everything that is compiled."
            )


setup(
    # its sources are in build.ninja; what is declared here is that there is one
    ext_modules=[Extension("dpo_kernels._C", [])],
    cmdclass={"build_ext": BuildExtension, "ninja": WriteNinja},
)
