"""The Triton backend on the PTX that Triton makes: its own launches, executed here."""

from __future__ import annotations

import importlib
import struct
from unittest import mock

import torch
from torch import Tensor

from dpo_kernels import dispatch
from dpo_kernels.backends import triton
from dpo_kernels.compat import triton_unsuitable

from .executor import Executor
from .parse import parse
from .program import Program
from .triton_compiler import Compiler

compiler = Compiler()
_PACKED = {"i32": "<i", "i64": "<q", "fp32": "<f", "u32": "<I"}


class Launched:
    """In the place of a @triton.jit function: kernel[grid](...)."""

    def __init__(self, kernel, executor: TritonExecutor):
        self._kernel, self._executor = kernel, executor

    def __getattr__(self, name: str):
        return getattr(self._kernel, name)

    def __getitem__(self, grid):
        return lambda *args, **options: self._executor.run(self._kernel, grid, args, options)


class TritonExecutor(Executor):
    def unavailable(self) -> str | None:
        return triton_unsuitable()

    def patches(self):
        from dpo_kernels.backends.triton import launch

        for name in ("forward_kernel", "backward_kernel"):
            stand_in = Launched(getattr(launch, name), self)
            yield mock.patch.object(launch, name, stand_in)
        yield mock.patch.object(triton, "unavailable", lambda *a: None)
        refuses = triton.refuses

        def serves(device, dtype):
            return refuses(torch.device("cuda", 0), dtype)

        yield mock.patch.object(triton, "refuses", serves)
        yield mock.patch.object(triton, "forward", self.wrap(triton.forward))
        yield mock.patch.object(triton, "backward", self.wrap(triton.backward))
        yield mock.patch.object(dispatch, "_resolved", {})

    def run(self, kernel, grid, args, options) -> None:
        names = list(kernel.arg_names)
        given = {**dict(zip(names, args, strict=False)), **options}
        described = {
            name: ("tensor", str(v.dtype).removeprefix("torch."))
            if isinstance(v, Tensor)
            else ("value", v)
            for name, v in given.items()
        }
        request = {
            "module": kernel.fn.__module__,
            "name": kernel.fn.__name__,
            "arguments": described,
            "arch": self.arch,
        }
        # a number that is no constant selects no compilation
        answer = self.compile(request)
        key = answer["ptx"]
        if key not in self.programs:
            module = parse(self.edit(key) if self.edit else key)
            (name,) = module.kernels
            self.programs[key] = Program(module, name)
        program = self.programs[key]
        params = []
        for name, kind in answer["signature"].items():
            if kind.startswith("*"):
                params.append(struct.pack("<Q", given[name].data_ptr()))
            elif kind != "constexpr":
                params.append(struct.pack(_PACKED[kind], given[name]))
        # scratch of Triton's own, which these kernels do not ask for
        params += [bytes(v.size) for v in program.kernel.params[len(params) :]]
        tensors = {n: v for n, v in given.items() if isinstance(v, Tensor)}
        self.launch(
            program,
            grid=grid[0],
            block=answer["threads"],
            params=params,
            regions=self.regions(tensors),
            shared_bytes=answer["shared"],
        )

    def compile(self, request: dict) -> dict:
        """Numbers that are no constants are left out of what is asked for."""
        runtime = _runtime_arguments(request["module"], request["name"])
        arguments = {
            name: ("value", 0)
            if name in runtime and kind == "value" and v is not None
            else (kind, v)
            for name, (kind, v) in request["arguments"].items()
        }
        return compiler(**{**request, "arguments": arguments})


def _runtime_arguments(module: str, name: str) -> set[str]:
    """Parameters of a kernel that are not constexpr, by their annotation."""
    function = getattr(importlib.import_module(module), name).fn
    return {n for n, a in function.__annotations__.items() if "constexpr" not in str(a)}
