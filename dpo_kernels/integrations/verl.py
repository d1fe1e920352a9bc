"""verl: ``logprobs_from_logits`` of ``verl/utils/torch_functional.py``.

``dpo_kernels.patch("verl")`` replaces it, in the process that computes the loss (a Ray worker).
"""

from __future__ import annotations

from torch import Tensor

from .. import functional
from ..patching import Seam


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """``log softmax(logits)[label]`` of every row, float32, shaped like ``labels``.

    With ``inplace_backward`` the backward overwrites 2-D logits with their gradient. Logits of
    more dimensions are left alone: verl's callers pass them without a word on it, and compute
    entropies from them afterwards.
    """
    inplace = inplace_backward and logits.dim() == 2 and logits.requires_grad and not logits.is_leaf
    return functional.token_logps(logits, labels, inplace_backward=inplace)


def seams(version: str) -> list[Seam]:
    return [
        Seam(
            "verl.utils.torch_functional:logprobs_from_logits",
            lambda _: logprobs_from_logits,
            ("logits", "labels", "inplace_backward"),
            "log-probs from logits in one pass, with no memory for the gradient of packed ones",
        )
    ]
