"""TRL's seams: where each of its generations makes the log-probs of tokens, or the loss.

| TRL | from hidden states | from logits |
|---|---|---|
| 0.24 to 1.12 | Liger's DPO loss, with ``use_liger_kernel`` | ``selective_log_softmax`` |
| 1.13 | its own copy of that | ``selective_log_softmax`` |
| 1.13, 1.14 | ``_ChunkedLogProbFunction``: log-probs and entropy | ``selective_log_softmax`` |
| 1.14 | with ``use_liger_kernel``, for DPO | the same, and one with the entropy |
| 1.15 and later | ``_ChunkedLogProbFunction``: five values, those that are asked for | |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import DTYPES
from ..functional import token_logps, token_stats
from ..patching import Seam
from .liger import PARAMETERS as LIGER_PARAMETERS
from .liger import LigerFusedLinearDPOLoss
from .trl import DEVICES, PARAMETERS, FusedLogProbs, GatheredByTRL, drops_unscored_rows

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
    """TRL's ``log softmax(logits / temperature)[index]``, 0 where ``row_mask`` is."""

    def selected(
        logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        if _served(logits, index, temperature):
            return token_logps(logits, _masked(index, row_mask), temperature=temperature)
        options = () if temperature == 1.0 and row_mask is None else (temperature, row_mask)
        return original(logits, index, *options)

    return selected


def selective_log_softmax_and_entropy(original: Callable[..., Any]) -> Callable[..., Any]:
    """TRL 1.14's, with the entropy; one that carries a gradient is left to TRL."""

    def selected(
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        gradient = entropy_requires_grad and logits.requires_grad and torch.is_grad_enabled()
        if gradient or not _served(logits, index, temperature):
            return original(logits, index, entropy_requires_grad, temperature, row_mask)
        stats = token_stats(logits, _masked(index, row_mask), temperature=temperature)
        return stats.logps, stats.entropy

    return selected


def _served(logits: Tensor, index: Tensor, temperature: float) -> bool:
    return (
        index.shape == logits.shape[:-1]
        and type(logits) is Tensor
        and logits.device.type in DEVICES
        and logits.dtype in DTYPES
        and temperature > 0
    )


def _masked(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else index.masked_fill(row_mask == 0, -100)


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
                drops_unscored_rows,
                ("device",),
                "prompt rows are left out on a CPU too",
                optional=True,
                # TRL's kernels ask the same function whether they can launch
                shared=False,
            ),
            Seam(
                "trl.trainer.utils:DTensor",
                lambda _: GatheredByTRL,
                None,
                "the gradient of a head that FSDP2 shards is the mean over its ranks",
                owner="torch",
                optional=True,
                shared=False,
            ),
            cached,
        ]
    options = ("temperature", "row_mask")
    from_logits = Seam(
        "trl.trainer.utils:selective_log_softmax",
        selective_log_softmax,
        ("logits", "index", *(options if release >= (1, 14) else ())),
        "log-probs from logits in one pass, float32 from 16-bit logits",
    )
    two_results = Seam(
        "trl.trainer.utils:_ChunkedLogProbFunction",
        LogProbsAndEntropy,
        TWO_RESULTS,
        "the head in 2 GEMMs frozen, 4 trainable, its logits in float32",
    )
    if release >= (1, 14):
        with_entropy = Seam(
            "trl.trainer.utils:selective_log_softmax_and_entropy",
            selective_log_softmax_and_entropy,
            ("logits", "index", "entropy_requires_grad", *options),
            "the same, and the entropy where it is only logged",
        )
        return [two_results, from_logits, with_entropy, cached]
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
