"""What a model does to its head's outputs before it returns them as logits.

Models scale, cap, mask and slice their logits, each under config names of its own. What a model
does is found by a trial: its forward is run on known head outputs, with a stand-in for each of its
modules. No layer runs, and no parameter is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LogitTransform(NamedTuple):
    """``softcap * tanh(scale * x / softcap)``, or ``scale * x`` without a softcap."""

    logit_scale: float
    logit_softcap: float | None

    def of(self, x: Tensor) -> Tensor:
        z = self.logit_scale * x
        cap = self.logit_softcap
        return z if cap is None else cap * torch.tanh(z / cap)


def transform_of_model(
    model: nn.Module, head: nn.Linear, candidates: Iterable[LogitTransform]
) -> LogitTransform | None:
    """The one that ``model`` applies to what ``head`` returns, or None.

    Raises:
        Exception: whatever a forward raises that does not run on stand-ins.
    """
    # dense around 0 and far beyond any softcap; no two are equal, so a slice or a mask shows
    outputs = torch.linspace(-10, 10, 2 * head.out_features, dtype=torch.float32)
    outputs = outputs.pow(3).view(1, 2, -1)
    logits = _logits(model, head, outputs)
    # two orders of a few float32 operations
    rtol = 16 * torch.finfo(torch.float32).eps
    for transform in candidates:
        expected = transform.of(outputs)
        # allclose takes four times as long, and this is done in every step
        if logits.shape == expected.shape and bool(
            ((logits - expected).abs_() <= rtol * expected.abs()).all()
        ):
            return transform
    return None


def _logits(model: nn.Module, head: nn.Linear, outputs: Tensor) -> Tensor:
    """The logits of ``model``'s forward, in float32, where ``head`` returns ``outputs``."""
    hidden = outputs.new_zeros(*outputs.shape[:2], head.in_features)
    # a model may write into its logits
    made = {True: outputs.clone, False: lambda: _Outputs((hidden,))}
    # the model itself may run in another thread
    shadow = object.__new__(type(model))
    vars(shadow).update(vars(model))
    vars(shadow)["_modules"] = {
        name: module if module is None else _StandIn(module, made[module is head])
        for name, module in model._modules.items()
    }
    # a forward of the instance's own is bound to it as one of the class is
    forward = getattr(model.forward, "__func__", type(model).forward)
    ids = torch.zeros(outputs.shape[:2], dtype=torch.long)
    with torch.no_grad():
        return forward(shadow, input_ids=ids, return_dict=True).logits.float()


class _StandIn:
    """For a module and those inside it: a call returns what ``make`` makes."""

    def __init__(self, module: nn.Module, make: Callable[[], Any]):
        self._module = module
        self._make = make

    def __call__(self, *args, **kwargs) -> Any:
        return self._make()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _StandIn(value, self._make) if isinstance(value, nn.Module) else value


class _Outputs(tuple):
    """Of a backbone: its hidden states, and None for whatever else it may have returned."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None
