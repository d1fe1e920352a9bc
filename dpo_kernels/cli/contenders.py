"""Who is timed: plain PyTorch, torch.compile of it, and ours by the backend that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dpo_loss, linear_dpo_loss, reference
from ..dispatch import BACKENDS, available_backends, backend_module
from .gate import EXACT, FAST
from .problems import Problem, Shape

Loss = Callable[[Problem], Tensor]


@dataclass(frozen=True)
class Contender:
    """``make`` gives problem -> scalar loss; it raises ImportError when a package is missing, and
    NotImplementedError with the reason when the contender does not serve the shape."""

    name: str
    make: Callable[[Shape], Loss]
    # the bound of the parity gate
    precision: str = FAST
    inplace: bool = False
    # whether the first call compiles, which takes a while
    compiles: bool = False
    # distributions whose versions belong in its rows
    packages: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.name.startswith("dpo_kernels")


def plain(shape: Shape) -> Loss:
    function = reference.dpo_loss if shape.hidden is None else reference.linear_dpo_loss

    def loss(problem: Problem) -> Tensor:
        return function(*problem.arguments, **problem.options).loss

    return loss


def compiled(shape: Shape) -> Loss:
    # every shape its own code: past a limit of recompilations torch would fall back to eager
    torch._dynamo.reset()
    return torch.compile(plain(shape), dynamic=False)


def ours(backend: str, precision: str = EXACT, inplace: bool = False) -> Callable[[Shape], Loss]:
    def make(shape: Shape) -> Loss:
        if shape.hidden is None:
            function, options = dpo_loss, {"inplace_backward": inplace}
        else:
            function, options = linear_dpo_loss, {"precision": precision}

        def loss(problem: Problem) -> Tensor:
            first, *others = problem.arguments
            # a model's logits are no leaf, which in place would be refused
            first = first.view_as(first) if inplace else first
            return function(first, *others, **problem.options, **options, backend=backend).loss

        return loss

    return make


def backends_for(
    device: torch.device | str, dtype: torch.dtype, backend: str | None = None
) -> list[str]:
    """The kernels that serve ``dtype`` on ``device``.

    Unless asked for, torch is not among them (it is the reference) while there is another, nor is
    Triton on a CPU (it is interpreted).
    """
    reasons = available_backends()
    left_out = {"torch"} if torch.device(device).type == "cuda" else {"torch", "triton"}
    wanted = [backend] if backend else [name for name in BACKENDS if name not in left_out]
    names = [name for name in wanted if reasons[name] is None]
    names = [n for n in names if backend_module(n).refuses(torch.device(device), dtype) is None]
    return names or ([] if backend else ["torch"])


def contenders_for(
    shape: Shape, device: torch.device | str, *, backend: str | None = None, compile: bool = True
) -> list[Contender]:
    """Ours first: if the time is up early, its rows are there."""
    found = []
    for name in backends_for(device, shape.dtype, backend):
        label = f"dpo_kernels, {name}"
        found.append(Contender(label, ours(name), EXACT))
        if shape.hidden is None:
            found.append(Contender(label, ours(name, inplace=True), EXACT, inplace=True))
        elif shape.dtype.itemsize == 2:
            found.append(Contender(f"{label}, fast", ours(name, FAST), FAST))
    found.append(Contender("reference", plain))
    if compile:
        found.append(Contender("torch.compile(reference)", compiled, compiles=True))
    return found
