"""A GPU that is not there: Triton compiles for it as at a launch, and the launch does nothing."""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])


def gpu_target(name: str) -> GPUTarget:
    """ "sm_90" or "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


class _Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}

    def load_binary(self, *arguments):
        # module, function, registers, spills and from 3.4 on the most threads of a block
        return (1, 1, 0, 0, 1024)[: 5 if VERSION >= (3, 4) else 4]

    def unload_module(self, module):
        pass


class Launcher:
    """What Triton calls with (grid x, y, z, stream, function, ..., the kernel's arguments)."""

    def __init__(self, source, metadata):
        self.launch_cooperative_grid = False

    def __call__(self, *arguments):
        pass


class StandInDriver:
    launcher_cls = Launcher

    def __init__(self, target: GPUTarget):
        self.target = target
        self.utils = _Utils()

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("cpu")


def stand_in_for(name: str) -> None:
    """Makes the GPU of that name Triton's current device, for the rest of this process."""
    driver.set_active(StandInDriver(gpu_target(name)))
