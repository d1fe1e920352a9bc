"""TRL's seams: where each of its generations makes the log-probs of tokens, or the loss.

| TRL | from hidden states | from logits |
|---|---|---|
| 0.24 to 1.12 | Liger's DPO loss, with ``use_liger_kernel`` | ``selective_log_softmax`` |
| 1.13 | its own copy of that | ``selective_log_softmax`` |
| 1.13, 1.14 | ``_ChunkedLogProbFunction``: log-probs and entropy | ``selective_log_softmax`` |
| 1.15 and later | ``_ChunkedLogProbFunction``: five values, those that are asked for | |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..checks import DTYPES
from ..functional import token_logps
from ..patching import Seam
from .liger import PARAMETERS as LIGER_PARAMETERS
from .liger import LigerFusedLinearDPOLoss
from .trl import DEVICES, PARAMETERS, FusedLogProbs, serves_compact_rows

# "last_hidden" to "logit_scale" of 1.13 and 1.14
TWO_RESULTS = ("last_hidden", *PARAMETERS[1:-1])


class LogProbsAndEntropy:
    """What stands at ``_ChunkedLogProbFunction`` in TRL 1.13 and 1.14: two results, always both."""

    def __init__(self, original: Any):
        self._fused = FusedLogProbs(_WithoutOutputs(original))

    def apply(self, *args, **kwargs) -> tuple[Tensor | None, ...]:
        if len(args) == len(TWO_RESULTS):
            args = (*args, ("log_probs", "entropy"))
        return self._fused.apply(*args, **kwargs)[:2]


class _WithoutOutputs:
    """TRL's function of two results, called as the one of five is."""

    def __init__(self, original: Any):
        self._original = original

    def apply(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self._original.apply(*args[: len(TWO_RESULTS)], **kwargs)


def selective_log_softmax(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """TRL's ``log softmax(logits)[index]``; what has not one index a row is left to TRL."""

    def selected(logits: Tensor, index: Tensor) -> Tensor:
        if (
            index.shape != logits.shape[:-1]
            or type(logits) is not Tensor
            or logits.device.type not in DEVICES
            or logits.dtype not in DTYPES
        ):
            return original(logits, index)
        return token_logps(logits, index)

    return selected


class KeyedHash:
    """TRL's hash of a model, salted: reference log-probs cached by other kernels are not reused."""

    def __init__(self, original: Any):
        self.original = original

    def __call__(self, model) -> str:
        return f"{self.original(model)}-dpo_kernels"


def seams(version: str) -> list[Seam]:
    from packaging.version import Version

    release = Version(version).release
    if release < (0, 24):
        raise ImportError(f'patch("trl") needs trl >= 0.24, got {version}')
    cached = Seam(
        "trl.trainer.utils:hash_module",
        KeyedHash,
        ("module",),
        "reference log-probs that other kernels cached are not reused",
        optional=True,
    )
    if release >= (1, 15):
        return [
            Seam(
                "trl.trainer.utils:_ChunkedLogProbFunction",
                FusedLogProbs,
                PARAMETERS,
                "the head in 2 GEMMs frozen, 4 trainable, its logits in float32",
            ),
            Seam(
                "trl.trainer.utils:_use_triton",
                lambda _: serves_compact_rows,
                ("device",),
                "prompt rows are left out on a CPU too",
                optional=True,
            ),
            cached,
        ]
    from_logits = Seam(
        "trl.trainer.utils:selective_log_softmax",
        selective_log_softmax,
        ("logits", "index"),
        "log-probs from logits in one pass, float32 from 16-bit logits",
    )
    two_results = Seam(
        "trl.trainer.utils:_ChunkedLogProbFunction",
        LogProbsAndEntropy,
        TWO_RESULTS,
        "the head in 2 GEMMs frozen, 4 trainable, its logits in float32",
    )
    if release >= (1, 14):
        return [two_results, from_logits, cached]
    name = "FusedLinearDPOLoss" if release >= (1, 13) else "LigerFusedLinearDPOLoss"
    fused_loss = Seam(
        f"trl.trainer.dpo_trainer:{name}",
        lambda _: LigerFusedLinearDPOLoss,
        LIGER_PARAMETERS,
        "with use_liger_kernel=True (0.24: use_liger_loss): scored rows alone, in 3 GEMMs",
        owner="trl" if release >= (1, 13) else "liger_kernel",
        # TRL has the name only where Liger is installed
        optional=True,
    )
    return [fused_loss, *([two_results] if release >= (1, 13) else []), from_logits, cached]
