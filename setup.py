"""Builds dpo_kernels._C: no torch is imported or linked, so one build serves every torch.

With nvcc (in CUDA_HOME, on PATH or in the pip CUDA packages) the CUDA kernels are built in too, for
DPO_KERNELS_CUDA_ARCHS (default "80;90;100;120", the last also as PTX; "" builds CPU only).
"""

import glob
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

DEFAULT_ARCHS = "80;90;100;120"
# contracting a * b + c at will would make two instantiations of one formula differ in their bits
COMPILE_ARGS = ["-O3", "-fvisibility=hidden", "-pthread", "-ffp-contract=off"]
ROOT = Path(__file__).parent


def cuda_homes():
    """Folders that may hold a CUDA toolkit, the user's choice first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    on_path = shutil.which("nvcc")
    if on_path:
        yield toolkit_of(on_path)
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    yield from sorted(packages.glob("cu[0-9]*"), reverse=True)
    yield packages / "cuda_nvcc"


def toolkit_of(nvcc):
    """The toolkit that an nvcc belongs to, as it says itself: the one on PATH may be a wrapper."""
    command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in (said.stdout + said.stderr).splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parent.parent


def find_nvcc():
    """(nvcc, folder of libcudart_static.a) or None."""
    for home in cuda_homes():
        nvcc = home / "bin" / "nvcc"
        for lib in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if nvcc.is_file() and (home / lib / "libcudart_static.a").is_file():
                return nvcc, home / lib
    return None


def gencode(archs):
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class BuildExtension(build_ext):
    """build_ext that hands .cu files to nvcc."""

    def build_extensions(self):
        original = self.compiler._compile

        def compile_one(obj, src, ext, cc_args, extra_postargs, pp_opts):
            if not src.endswith(".cu"):
                return original(obj, src, ext, cc_args, extra_postargs, pp_opts)
            host_flags = ",".join(["-fPIC", "-fvisibility=hidden"])
            command = [str(CUDA[0]), "-c", src, "-o", obj, "-O3", "-std=c++17", "--threads", "2"]
            # a host function in device code is garbage there, and only a warning by default
            command += ["-Werror", "cross-execution-space-call", "-diag-error", "20013,20015"]
            command += [*gencode(ARCHS), "-Xcompiler", host_flags, *pp_opts]
            subprocess.run(command, check=True)

        self.compiler.src_extensions.append(".cu")
        self.compiler._compile = compile_one
        super().build_extensions()


ARCHS = [a for a in os.environ.get("DPO_KERNELS_CUDA_ARCHS", DEFAULT_ARCHS).split(";") if a]
CUDA = find_nvcc() if ARCHS else None

sources = ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
macros, link_args, library_dirs, libraries = [], ["-pthread"], [], []
if CUDA:
    sources.append("csrc/cuda/launchers.cu")
    macros += [
        ("DPO_KERNELS_WITH_CUDA", "1"),
        ("DPO_KERNELS_CUDA_ARCHS", f'"{";".join(ARCHS)}"'),
    ]
    library_dirs.append(str(CUDA[1]))
    libraries += ["cudart_static", "dl", "rt"]
    # keeps the static CUDA runtime's symbols from meeting those of torch's shared one
    link_args.append("-Wl,--exclude-libs,ALL")
elif ARCHS:
    print("dpo_kernels: nvcc not found, building the CPU kernels only", file=sys.stderr)

# setuptools rebuilds when a dependency is newer, not when a setting changed
settings = json.dumps([sys.version, macros, str(CUDA), ARCHS, COMPILE_ARGS])
stamp = ROOT / "build" / "settings.json"
stamp.parent.mkdir(exist_ok=True)
if not stamp.exists() or stamp.read_text() != settings:
    stamp.write_text(settings)

headers = [
    path
    for suffix in ("h", "inc", "cuh")
    for path in glob.glob(f"csrc/**/*.{suffix}", recursive=True)
]
ParallelCompile("DPO_KERNELS_BUILD_JOBS", default=os.cpu_count() or 1).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "dpo_kernels._C",
            sources,
            cxx_std=17,
            include_dirs=["csrc"],
            define_macros=macros,
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=link_args,
            library_dirs=library_dirs,
            libraries=libraries,
            depends=[*headers, str(stamp.relative_to(ROOT))],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
