"""Which backend serves a call, and why the others do not."""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

import torch

from .types import BackendUnavailableError

logger = logging.getLogger("dpo_kernels")

BACKENDS = ("cuda", "triton", "cpu", "torch")
# The order of an automatic choice, by device type; torch serves every device. On a GPU, measured on
# an H200 (benchmarks/results/gpu/nvidia_h200.csv; bfloat16 unless it says otherwise):
#   plain rows               cuda and triton within 5% of each other
#   float32, forward         triton 8% faster
#   a few rows               triton 25% faster on the device, cuda 25% cheaper in Python
#   an odd vocabulary        cuda 1.5x faster: its loads stay 16 bytes wide
#   statistics, softcap      cuda 1.3x to 1.6x faster forward
PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}

_modules: dict[str, ModuleType] = {}
_resolved: dict[tuple, ModuleType] = {}


def backend_module(name: str) -> ModuleType:
    """The module of a backend, imported when first asked for."""
    if name not in _modules:
        _modules[name] = importlib.import_module(f"dpo_kernels.backends.{name}")
    return _modules[name]


def available_backends() -> dict[str, str | None]:
    """For every backend None if it can be used on this machine, or the reason why not."""
    return {name: backend_module(name).unavailable() for name in BACKENDS}


def check_name(backend: str | None) -> str:
    """The backend asked for by argument or by DPO_KERNELS_BACKEND; "" leaves the choice open."""
    name = os.environ.get("DPO_KERNELS_BACKEND", "") if backend is None else backend
    if name != "" and name not in BACKENDS:
        source = "DPO_KERNELS_BACKEND" if backend is None else "backend"
        raise ValueError(f"{source}: {name!r} is not one of {', '.join(BACKENDS)}")
    return name


def resolve(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module that serves ``device`` and ``dtype``; ``name`` as check_name returned it.

    A backend asked for by name serves or raises BackendUnavailableError. An automatic choice takes
    the first of PREFERENCE that can, and logs once what it passed over.
    """
    # two GPUs of a machine may differ in what they can run
    key = (name, device, dtype)
    if key not in _resolved:
        _resolved[key] = _resolve(name, device, dtype)
    return _resolved[key]


def _resolve(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    if name:
        reason = _reason(name, device, dtype)
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} cannot serve this call: {reason}")
        return backend_module(name)
    passed_over, candidate = [], "torch"
    for candidate in PREFERENCE.get(device.type, ("torch",)):
        reason = _reason(candidate, device, dtype)
        if reason is None:
            break
        passed_over.append(f"{candidate}: {reason}")
    if passed_over:
        logger.warning(
            "dpo_kernels uses the %s backend for %s on %s; passed over: %s",
            candidate,
            dtype,
            device.type,
            "; ".join(passed_over),
        )
    return backend_module(candidate)


def _reason(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    module = backend_module(name)
    return module.unavailable() or module.refuses(device, dtype)
