"""What the two backends have in common: tensors as regions, launches, findings, coverage.

While a backend's ``forward`` or ``backward`` runs, torch's allocations are noted and torch.cuda is
told that there is a stream, so that the backend's own host code runs as it does before a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import re
import time
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor

from .machine import Machine
from .memory import Region

# logits and tokens of one launch beyond which a test is skipped: about 20 seconds
LARGEST = 600_000
LONGEST = 20_000
_MAKERS = [
    *((torch, n) for n in ("empty", "empty_like", "empty_strided", "zeros", "zeros_like", "full")),
    *((torch.Tensor, n) for n in ("new_empty", "new_zeros", "new_full")),
]


def tensors_of(value, name: str = ""):
    """(name, tensor) of every tensor in an argument."""
    if isinstance(value, Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name), field.name)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_of(item, name)


def spans(tensor: Tensor) -> list[tuple[int, int]]:
    """(address, bytes) of each row where rows are apart or long, else of the whole."""
    size = tensor.element_size()
    if tensor.numel() == 0:
        return []
    strides, shape = tensor.stride(), tensor.shape
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    whole = [(tensor.data_ptr(), extent * size)]
    if tensor.dim() < 2 or strides[-1] != 1 or tensor.numel() // shape[-1] > 4096:
        return whole
    leading = itertools.product(*(range(n) for n in shape[:-1]))
    starts = sorted(sum(i * s for i, s in zip(at, strides, strict=False)) for at in leading)
    if any(b - a < shape[-1] for a, b in itertools.pairwise(starts)):
        return whole
    return [(tensor.data_ptr() + a * size, shape[-1] * size) for a in starts]


class Executor:
    """Runs launches; ``edit`` changes the PTX of a kernel before it is parsed."""

    def __init__(self, arch: int = 90, *, seed: int = 0, races: bool = True, edit=None):
        self.arch, self.seed, self.races, self.edit = arch, seed, races, edit
        self.findings: dict[tuple[str, str], int] = {}
        self.programs: dict[object, object] = {}
        self.launches = self.executed = 0
        self.seconds = 0.0
        # what this backend's host code has allocated and not yet freed
        self._allocated: dict[int, tuple] = {}
        self._arguments: list[tuple[str, Tensor, str]] = []
        # (address, bytes) that this call has set in its stream
        self.cleared: list[tuple[int, int]] = []

    def unavailable(self) -> str | None:
        raise NotImplementedError

    def patches(self):
        """Context managers that put this executor in the place of the device."""
        raise NotImplementedError

    def call_patches(self):
        """And those that hold only while its ``forward`` or ``backward`` runs."""
        return ()

    def active(self):
        stack = contextlib.ExitStack()
        for patch in self.patches():
            stack.enter_context(patch)
        return stack

    def wrap(self, function):
        """``forward`` or ``backward`` of a backend, its tensor arguments noted with their role."""
        signature = inspect.signature(function)

        def wrapped(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            whole = given.get("zero_unscored", True)
            self._arguments = []
            for parameter, value in given.items():
                for name, tensor in tensors_of(value, parameter):
                    role = "input"
                    if parameter in ("out", "grad_logits"):
                        role = "output" if whole else "scratch"
                    self._arguments.append((name, tensor, role))
                    if name == "logits" and tensor.numel() > LARGEST:
                        pytest.skip(f"{tensor.numel()} logits are too many for the PTX executor")
                    if name == "labels" and tensor.numel() > LONGEST:
                        pytest.skip(f"{tensor.numel()} tokens are too many for the PTX executor")
            with self._device():
                return function(*args, **kwargs)

        return wrapped

    @contextlib.contextmanager
    def _device(self):
        with contextlib.ExitStack() as stack:
            for owner, name in _MAKERS:
                make = self._noted(getattr(owner, name), "empty" not in name)
                stack.enter_context(mock.patch.object(owner, name, make))
            for name, value in (
                ("current_stream", lambda *a: SimpleNamespace(cuda_stream=0)),
                ("is_current_stream_capturing", lambda: False),
                ("current_device", lambda: 0),
                ("device", lambda *a: contextlib.nullcontext()),
            ):
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            for patch in self.call_patches():
                stack.enter_context(patch)
            yield

    def _noted(self, make, initialised: bool):
        def noted(*args, **kwargs):
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            tensor = make(*args, **kwargs)
            self._allocated[tensor.data_ptr()] = weakref.ref(tensor), initialised
            return tensor

        return noted

    def regions(self, others=None) -> list[Region]:
        """The arguments of the call, what was allocated for it and ``others``, which are read.

        Tensors in one place are one region.
        """
        tensors = list(self._arguments)
        known = {t.data_ptr() for _, t, _ in tensors}
        for at, (ref, initialised) in list(self._allocated.items()):
            tensor = ref()
            if tensor is None:
                del self._allocated[at]
            elif at not in known:
                tensors.append(("counters" if initialised else "scratch", tensor, "scratch"))
        known = {t.data_ptr() for _, t, _ in tensors}
        tensors += [(n, t, "input") for n, t in (others or {}).items() if t.data_ptr() not in known]
        merged: dict[int, Region] = {}
        for name, tensor, role in tensors:
            written = role != "input"
            fresh = written and name not in ("counters",)
            for base, size in spans(tensor):
                r = Region(name, base, size, written, not fresh, written, output=role == "output")
                r.granule = min(tensor.element_size(), 4)
                old = merged.get(base)
                if old is not None:
                    # in place: read before it is written
                    r.initialised |= old.initialised
                    r.writable |= old.writable
                    r.shadowed |= old.shadowed
                    r.size = max(r.size, old.size)
                merged[base] = r
        return [part for r in merged.values() for part in self._split(r)]

    def _split(self, r: Region) -> list[Region]:
        """In two, where a memset has initialised the beginning."""
        for at, size in self.cleared:
            if at == r.base and size < r.size and not r.initialised:
                rest = dataclasses.replace(r, base=at + size, size=r.size - size)
                return [dataclasses.replace(r, name="counters", size=size, initialised=True), rest]
        return [r]

    def launch(self, program, *, grid, block, params, regions, shared_bytes=0) -> Machine:
        began = time.perf_counter()
        machine = Machine(
            program,
            grid=grid,
            block=block,
            params=params,
            regions=regions,
            shared_bytes=shared_bytes,
            seed=self.seed,
            races=self.races,
        )
        for key, count in machine.run().items():
            self.findings[key] = self.findings.get(key, 0) + count
        self.launches += 1
        self.executed += machine.executed
        self.seconds += time.perf_counter() - began
        return machine

    def coverage(self) -> dict[str, tuple[int, int]]:
        """{kernel: (instructions executed at least once, instructions)} of what was launched."""
        found: dict[str, tuple[int, int]] = {}
        for program in self.programs.values():
            code = program.kernel.code
            done, all_ = found.get(program.kernel.name, (0, 0))
            found[program.kernel.name] = done + sum(i.hits > 0 for i in code), all_ + len(code)
        return found

    def kinds(self) -> set[str]:
        """Findings without the names of registers, which differ between compilations."""
        return {f"{kind}: {re.sub(r'%[a-z]+[0-9]+', '%', text)}" for kind, text in self.findings}
