"""What machine, which versions, which backends and why not the others."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console

from .. import __version__
from ..backends.native import MODULE
from ..build_record import left_out
from ..dispatch import available_backends
from .console import make_console, make_table

VARIABLES = {
    "DPO_KERNELS_BACKEND": "backend of every call that names none",
    "DPO_KERNELS_VALIDATE": "1: check what a GPU is given too, which waits for it",
    "DPO_KERNELS_WORKSPACE_MB": "workspace_mb of every call that names none",
    "DPO_KERNELS_GRADIENT_POOL_MB": "MiB of freed CPU gradients kept for the next call, 0: none",
    "DPO_KERNELS_BUILD": "while building: off, or require: fail where there is no compiler",
    "DPO_KERNELS_BUILD_JOBS": "while building: compilations at once",
    "DPO_KERNELS_CUDA_ARCHS": 'while building: GPU architectures, "" for none',
    "TRITON_INTERPRET": "Triton's own; 1: the Triton kernels run interpreted on CPU tensors",
}


def main(args) -> int:
    print_environment(make_console())
    return 0


def print_environment(console: Console) -> None:
    table = make_table(console, "Environment", "", show_header=False)
    table.add_column(overflow="fold")
    for name, value in environment().items():
        table.add_row(name, value)
    console.print(table)

    table = make_table(console, "Backends", "name")
    table.add_column("", overflow="fold")
    for name, reason in available_backends().items():
        table.add_row(name, "available" if reason is None else f"unavailable: {reason}")
    console.print(table)
    # a target that the compiler lacked takes no backend away, so that none names it
    if "targets" in left_out():
        console.print(f"CUDA kernels: {left_out()['targets']}")

    table = make_table(console, "Environment variables", "name")
    table.add_column("value", overflow="fold")
    table.add_column("meaning", overflow="fold")
    for name, meaning in VARIABLES.items():
        table.add_row(name, os.environ.get(name, "not set"), meaning)
    console.print(table)


@lru_cache(maxsize=1)
def environment() -> dict[str, str]:
    """Hardware and versions, as the environment table and every CSV row name them."""
    return {
        "cpu": cpu_model(),
        "cores": f"{_usable_cores()} usable of {os.cpu_count()}",
        "threads": str(torch.get_num_threads()),
        "isa": MODULE.cpu_isa() if MODULE is not None else "no compiled module",
        "memory": _memory(),
        "gpu": gpu_model(),
        "cuda_archs": (MODULE is not None and MODULE.cuda_archs) or "none compiled in",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "dpo_kernels": __version__,
        "commit": commit(),
    }


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def gpu_model() -> str:
    if not torch.cuda.is_available():
        return "none visible to torch"
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    count = torch.cuda.device_count()
    capability = f"sm_{properties.major}{properties.minor}"
    return f"{count} x {properties.name}, {capability}, {memory:.0f} GiB"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return "unknown"
    return f"{size / 2**30:.1f} GiB"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """The commit of the checkout that the package is imported from, "none" for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "none"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
