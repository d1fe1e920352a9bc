"""TRL >= 1.15: its fused head replaced by this package's, for every trainer that has one.

    dpo_kernels.patch("trl")

DPO, KTO, SFT, GRPO and RLOO score their tokens through one name,
``trl.trainer.utils._ChunkedLogProbFunction``. The patch (trl_seams.py, for older versions too)
binds it to an object with the same ``apply``; metrics, adapters, sharding hooks and losses stay
TRL's. What this package does not serve goes to TRL's own function, call by call, and the reason is
logged once.

FusedDPOTrainer (trl_dpo.py) goes further, for DPO alone.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import DTYPES
from ..compat import fsdp_parameter, is_dtensor
from ..linear import linear_token_logps, linear_token_stats
from ..linear.sharded import whole
from ..patching import Patch, active, patch

logger = logging.getLogger("dpo_kernels")

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# what TRL's function takes, in order; patch() refuses a TRL that takes something else
PARAMETERS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
DEVICES = ("cpu", "cuda")


class FusedLogProbs:
    """What stands at ``_ChunkedLogProbFunction``: ``apply`` as TRL calls it.

    ``(hidden [N, H], weight [V, H], bias, targets [N], temperature, chunk_size, softcap,
    logit_scale, outputs)`` -> ``(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1)``,
    ``[N]`` float32 (is_top1 bool), None where ``outputs`` does not ask. log_probs and entropy carry
    gradients.
    """

    def __init__(self, original: Any):
        self.original = original

    def apply(self, *args, **kwargs) -> tuple[Tensor | None, ...]:
        if len(args) > 2 and is_dtensor(args[1]):
            head = (whole("weight", args[1]), whole("bias", args[2]))
            args = (args[0], *head, *args[3:])
        reason = _not_served(args, kwargs)
        if reason is not None:
            log_once("dpo_kernels leaves a call of TRL's fused head to TRL", reason)
            return self.original.apply(*args, **kwargs)
        return self._apply(*args)

    def _apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        # TRL partitions a head of ZeRO-3's again before the backward
        weight, bias = whole("weight", weight), whole("bias", bias)
        head, head_bias, precision = head_in_trls_dtype(hidden, weight, bias)
        options = {
            "bias": head_bias,
            "temperature": temperature,
            "logit_softcap": softcap,
            "logit_scale": logit_scale,
        }
        with precision:
            if set(outputs) <= {"log_probs"}:
                return linear_token_logps(hidden, head, targets, **options), *[None] * 4
            stats = linear_token_stats(hidden, head, targets, **options)
        rest = {name: getattr(stats, name) if name in outputs else None for name in OUTPUTS[1:]}
        if rest["entropy"] is not None and torch.is_grad_enabled():
            recompute = functools.partial(
                _entropy_of, self.original, targets, temperature, chunk_size, softcap, logit_scale
            )
            rest["entropy"] = EntropyWithGradient.apply(
                rest["entropy"], hidden, weight, bias, recompute
            )
        return stats.logps, *rest.values()


class EntropyWithGradient(torch.autograd.Function):
    """The entropy as it is; for its gradient, if a loss uses it, TRL's own function is run.

    Nothing is computed for an entropy that is only logged.
    """

    @staticmethod
    def forward(ctx, entropy: Tensor, hidden: Tensor, weight: Tensor, bias, recompute) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.recompute = recompute
        device = hidden.device.type
        ctx.autocast = (
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
        )
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx, grad: Tensor):
        wanted = ctx.needs_input_grad[1:4]
        leaves = [
            None if x is None else x.detach().requires_grad_(want)
            for x, want in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            entropy = ctx.recompute(*leaves)
        inputs = [x for x in leaves if x is not None and x.requires_grad]
        grads = iter(torch.autograd.grad(entropy, inputs, grad))
        return None, *(next(grads) if want else None for want in wanted), None


def _entropy_of(
    original, targets, temperature, chunk_size, softcap, logit_scale, hidden, weight, bias
):
    options = (temperature, chunk_size, softcap, logit_scale, ("log_probs", "entropy"))
    return original.apply(hidden, weight, bias, targets, *options)[1]


def head_in_trls_dtype(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, contextlib.AbstractContextManager]:
    """(weight, bias, context) for GEMMs in TRL's dtype: that of autocast, or of hidden."""
    device = hidden.device.type
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if len(dtypes) == 1 or torch.is_autocast_enabled(device):
        return weight, bias, contextlib.nullcontext()
    if hidden.dtype in (torch.bfloat16, torch.float16):
        # PEFT keeps a trained head in float32, whose gradient autocast leaves in float32
        return weight, bias, torch.autocast(device, dtype=hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    return weight.to(hidden.dtype), bias, contextlib.nullcontext()


def _not_served(args: tuple, kwargs: dict) -> str | None:
    """Why TRL's own function has to take this call, or None."""
    if kwargs or not 6 <= len(args) <= len(PARAMETERS):
        return f"called with {len(args)} arguments and keywords {sorted(kwargs)}"
    hidden, weight, bias, _, temperature = args[:5]
    outputs = args[8] if len(args) > 8 else OUTPUTS
    unknown = sorted(set(outputs) - set(OUTPUTS))
    if unknown:
        return f"outputs {unknown} are not known"
    reason = head_not_served(weight, bias)
    if reason is not None:
        return reason
    if hidden.device.type not in DEVICES or weight.device != hidden.device:
        return f"hidden states on {hidden.device}, the head on {weight.device}"
    if hidden.dtype not in DTYPES:
        return f"hidden states of {hidden.dtype}"
    if not temperature > 0:
        return f"a temperature of {temperature}"
    return None


def head_not_served(weight: Tensor, bias: Tensor | None) -> str | None:
    """Why a head's parameters cannot go to the kernels, or None."""
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None:
            continue
        if type(x) not in (Tensor, torch.nn.Parameter):
            return f"the head's {name} is a {type(x).__name__}, not a plain tensor"
        if x.dtype not in DTYPES:
            return f"the head's {name} has dtype {x.dtype}"
    return None


_logged: set[tuple[str, str]] = set()


def log_once(what: str, reason: str) -> None:
    if (what, reason) not in _logged:
        _logged.add((what, reason))
        logger.warning("%s: %s", what, reason)


class _NotOfFSDP2(type):
    def __instancecheck__(cls, x: Any) -> bool:
        return is_dtensor(x) and fsdp_parameter(x) is None


class GatheredByTRL(metaclass=_NotOfFSDP2):
    """What TRL takes for a DTensor, and makes whole by full_tensor().

    That gives every rank its part of its own gradient, and takes no mean over the ranks, as a head
    needs that FSDP2 shards in a unit of its own: such a one is left to FusedLogProbs.
    """


def drops_unscored_rows(original: Callable[..., bool]) -> Callable[..., bool]:
    """What TRL asks before it leaves out the rows that nothing scores.

    TRL does so where it has Triton; with this package, wherever its backends serve the device too.
    """

    def dropped(device: torch.device) -> bool:
        return device.type in DEVICES or original(device)

    return dropped


def patch_trl() -> None:
    """``dpo_kernels.patch("trl")``, without its line of print."""
    patch("trl", verbose=False)


def unpatch_trl() -> None:
    """Binds every name back to what was there. Does nothing if TRL is not patched.

    Raises:
        RuntimeError: something else has been bound over the patch since; nothing is changed then.
    """
    patched = active("trl")
    if patched is not None:
        patched.undo()


def patched_trl() -> Patch:
    """The patch for the body of a with statement; leaves a patch that was there before."""
    return patch("trl", verbose=False)


def __getattr__(name: str) -> Any:
    # the trainer imports TRL, which only a call of patch() does
    if name == "FusedDPOTrainer":
        from .trl_dpo import FusedDPOTrainer

        return FusedDPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
