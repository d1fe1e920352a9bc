"""The CUDA backend on nvcc's PTX: its launchers run as they are, its launches are executed here."""

from __future__ import annotations

import ctypes
import re
from unittest import mock

from dpo_kernels import dispatch
from dpo_kernels.backends import cuda, native

from . import cuda_build
from .executor import Executor
from .parse import parse
from .program import Program

_ON_LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
_ON_SET = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


class Binding:
    """In the place of dpo_kernels._C: the same functions, on a device that this is."""

    def __init__(self, executor: CudaExecutor):
        self._executor = executor
        self._module, _ = cuda_build.host()

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        if not name.startswith("cuda_") or not callable(value):
            return value

        kinds = re.findall(r"\w+: ([^,)]+)", value.__doc__)

        def call(*arguments):
            # a tensor on the CPU has no device number
            numbered = (
                0 if a is None and "int" in kind.lower() else a
                for a, kind in zip(arguments, kinds, strict=False)
            )
            return self._executor.run(value, *numbered)

        return call


class CudaExecutor(Executor):
    """``blocks`` is the number of multiprocessors the launchers are told of."""

    def __init__(self, arch: int = 90, *, blocks: int = 2, **options):
        super().__init__(arch, **options)
        self.blocks = blocks
        self._queue: list = []
        self._module = None

    def unavailable(self) -> str | None:
        return cuda_build.unavailable()

    def module(self):
        if self._module is None:
            text = cuda_build.ptx(self.arch)
            self._module = parse(self.edit(text) if self.edit else text)
        return self._module

    def program(self, name: str) -> Program:
        if name not in self.programs:
            self.programs[name] = Program(self.module(), name)
        return self.programs[name]

    def patches(self):
        yield mock.patch.object(cuda, "unavailable", lambda *a: None)
        binding, _ = cuda_build.host()
        problem = binding.cuda_device_problem
        yield mock.patch.object(cuda, "_device_problem", lambda index: problem(index) or None)
        refuses = cuda.refuses

        def serves(device, dtype):
            return refuses(_Device("cuda", 0), dtype)

        yield mock.patch.object(cuda, "refuses", serves)
        yield mock.patch.object(cuda, "forward", self.wrap(cuda.forward))
        yield mock.patch.object(cuda, "backward", self.wrap(cuda.backward))
        yield mock.patch.object(dispatch, "_resolved", {})

    def call_patches(self):
        binding = Binding(self)
        yield mock.patch.object(native, "MODULE", binding)
        yield mock.patch.object(cuda, "MODULE", binding)

    def run(self, function, *arguments):
        """A launcher, and then what it put into the stream."""
        self._queue, self.cleared = [], []
        launched, set_ = _ON_LAUNCH(self._launched), _ON_SET(self._set)
        _, runtime = cuda_build.host()
        runtime.ptx_multiprocessors(self.blocks)
        runtime.ptx_listen(launched, set_)
        result = function(*arguments)
        for command in self._queue:
            command()
        return result

    def _set(self, at, value, size) -> None:
        self._queue.append(lambda: self._memset(at, value, size))

    def _memset(self, at: int, value: int, size: int) -> None:
        self.cleared.append((at, size))
        ctypes.memset(at, value, size)

    def _launched(self, name, blocks, threads, shared, arguments) -> None:
        # no exception leaves a function that C calls: all that may fail is done later
        sizes = self._parameter_sizes(name.decode())
        params = [ctypes.string_at(arguments[k], size) for k, size in enumerate(sizes)]

        def launch():
            self.launch(
                self.program(name.decode()),
                grid=blocks,
                block=threads,
                params=params,
                regions=self.regions(),
                shared_bytes=shared,
            )

        self._queue.append(launch)

    def _parameter_sizes(self, name: str) -> list[int]:
        kernel = self.module().kernels.get(name)
        return [v.size for v in kernel.params] if kernel else []


class _Device:
    def __init__(self, type_: str, index: int):
        self.type, self.index = type_, index
