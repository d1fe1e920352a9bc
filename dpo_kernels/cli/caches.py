"""Where compiled graphs and kernels are kept while tests or benchmarks run."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def keep_apart() -> Path:
    """Gives the compilers a folder that one environment, torch and Triton have to themselves.

    Whatever the caller's environment says: a graph that another torch compiled corrupts memory.
    """
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    root = Path(sys.prefix)
    if sys.prefix == sys.base_prefix:
        root = Path.cwd() / "build"
    folder = root / "cache" / f"torch-{torch.__version__}-triton-{triton}"
    for name in VARIABLES:
        os.environ[name] = str(folder / name.split("_")[0].lower())
    return folder
