"""Which compilers setup.py finds, and which GPU targets they build."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEFAULT_TARGETS = (80, 90, 100, 120)
# What decides which code nvcc makes. Where a compiler may join a product and a sum into one FMA or
# leave them, as suits the code around them, a formula has other bits in every kernel, and two equal
# products may differ by something else than 0. ptxas joins what the PTX leaves open, so no look at
# the PTX shows it. -fmad=false leaves nothing open: an FMA is where the source has fmaf.
NVCC_CODE_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]
LIBRARY_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")


class NotFound(Exception):
    """A compiler that is not there; the message is what users are told."""


@dataclass(frozen=True)
class Cuda:
    nvcc: Path
    libraries: Path
    targets: list[int]
    left_out: str | None


def find_cxx() -> list[str]:
    """The C++ compiler as the words of a command: $CXX, or the first that is there."""
    asked = os.environ.get("CXX", "")
    if asked:
        # one that was asked for and is not there is a mistake, no reason to do without
        if shutil.which(shlex.split(asked)[0]) is None:
            raise SystemExit(f"dpo_kernels: CXX={asked} was not found")
        return shlex.split(asked)
    # a Python that was built elsewhere may name a compiler that this machine lacks
    for candidate in (sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"):
        words = shlex.split(candidate)
        if words and shutil.which(words[0]):
            return words
    raise NotFound("no C++ compiler was found (looked for CXX, c++, g++ and clang++)")


def find_cuda() -> Cuda:
    """nvcc, and the targets of DPO_KERNELS_CUDA_ARCHS (default "80;90;100;120") that it has."""
    asked = os.environ.get("DPO_KERNELS_CUDA_ARCHS")
    if asked is not None and not asked.strip("; "):
        raise NotFound("DPO_KERNELS_CUDA_ARCHS was empty")
    try:
        nvcc, libraries = find_nvcc()
        targets, left_out = choose_targets(nvcc, asked)
    except NotFound as error:
        if asked is not None:
            raise SystemExit(f"dpo_kernels: DPO_KERNELS_CUDA_ARCHS={asked}, but {error}") from error
        raise
    return Cuda(nvcc, libraries, targets, left_out)


def find_nvcc() -> tuple[Path, Path]:
    """nvcc and the folder of its libcudart_static.a."""
    incomplete = ""
    for home in cuda_homes():
        nvcc = home / "bin" / "nvcc"
        if not nvcc.is_file():
            continue
        for folder in LIBRARY_FOLDERS:
            if (home / folder / "libcudart_static.a").is_file():
                return nvcc, home / folder
        incomplete = incomplete or f"{nvcc} has no libcudart_static.a in its toolkit"
    raise NotFound(
        incomplete or "nvcc was not found (in CUDA_HOME, on PATH or in the pip CUDA packages)"
    )


def cuda_homes() -> Iterator[Path]:
    """Folders that may hold a CUDA toolkit, the user's choice first."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    on_path = shutil.which("nvcc")
    if on_path:
        yield toolkit_of(on_path)
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    yield from sorted(packages.glob("cu[0-9]*"), reverse=True)
    yield packages / "cuda_nvcc"


def toolkit_of(nvcc: str) -> Path:
    """The toolkit that an nvcc belongs to, as it says itself: the one on PATH may be a wrapper."""
    for line in ask(nvcc, "--dryrun", "-x", "cu", os.devnull).splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parent.parent


def choose_targets(nvcc: Path, asked: str | None) -> tuple[list[int], str | None]:
    """The targets to build, ascending, and a line on those of the default that nvcc lacks."""
    known = {int(number) for number in re.findall(r"\bsm_(\d+)\b", ask(nvcc, "--list-gpu-code"))}
    if not known:
        raise NotFound(f"{nvcc} does not say which GPU targets it has (nvcc --list-gpu-code)")
    wanted = list(DEFAULT_TARGETS) if asked is None else parse_targets(asked)
    built = [target for target in wanted if target in known]
    lacking = ", ".join(f"sm_{target}" for target in wanted if target not in known)
    if not lacking:
        return built, None
    release = re.search(r"release ([\d.]+)", ask(nvcc, "--version"))
    named = f"nvcc {release[1]}" if release else str(nvcc)
    if asked is not None or not built:
        raise NotFound(f"{named} has no {lacking}")
    return built, f"{named} has no {lacking}: those GPUs compile the PTX of sm_{built[-1]}"


def parse_targets(asked: str) -> list[int]:
    words = [word.strip() for word in asked.split(";") if word.strip()]
    if not all(word.isdecimal() for word in words):
        raise SystemExit(
            f'dpo_kernels: DPO_KERNELS_CUDA_ARCHS={asked}: expected numbers, such as "80;90"'
        )
    return sorted({int(word) for word in words})


def ask(nvcc: str | Path, *arguments: str) -> str:
    said = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    return said.stdout + said.stderr
