"""The public functions from hidden states: the logits are made tile by tile and never held.

With N scored rows, hidden size D and vocabulary V one GEMM of the head costs 2 N D V FLOPs. A
frozen head costs two, under any loss; a trainable one three with linear_dpo_loss. The backward
computes the logits once more, which makes four, for a pair that alone outgrows the workspace, for
reduction="none", for losses whose slopes depend on other pairs (aot, aot_unpaired, callables, sft
with use_weighting), and for linear_token_logps, _stats and _sequence_logps with a trainable head.
Reference rows cost one GEMM. Rows that score nothing cost nothing.
"""

from __future__ import annotations

from torch import Tensor

from .checks import check_flag
from .functional import make_stats
from .linear_call import HeadCall
from .linear_dpo import linear_dpo_loss
from .types import TokenStats

__all__ = [
    "linear_dpo_loss",
    "linear_sequence_logps",
    "linear_token_logps",
    "linear_token_stats",
]


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    temperature: float = 1.0,
    precision: str = "exact",
    workspace_mb: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """``log softmax(z)[label]``, ``z = softcap * tanh(scale * (W h + b) / softcap) / temperature``.

    Args:
        hidden: ``[..., T, D]`` float32, bfloat16, float16, or float64 (CPU).
        weight: ``[V, D]``, the head's dense matrix, in the dtype of hidden; under autocast either
            may be float32, and a float32 weight gets a float32 gradient.
        labels: ``[..., T]`` integers; ``ignore_index`` where nothing is scored. Only the rows of
            hidden that score a label enter a GEMM.
        bias: ``[V]``.
        logit_scale, logit_softcap: as Cohere's and Gemma-2's models define them.
        precision: "exact" keeps a tile of logits in float32; "fast" in the dtype of hidden, which
            costs up to 0.1 nat a token in bfloat16.
        workspace_mb: MiB that a tile of logits and what its GEMMs need beside it may take. None:
            room for 640 rows on a CPU and 4096 on a GPU, where the GEMMs run at full speed, there
            at most 1/16 of its memory. Beside it a call takes O(N D), the gradients, a weight's
            gradient in float32, and under autocast the weight in autocast's dtype.
        ignore_index, shift, temperature, backend: as in token_logps.

    Returns:
        Log-probs in nats, shaped and aligned like ``labels``, 0 where nothing is scored; float32
        (float64 for float64 hidden).

    Raises:
        ValueError, TypeError, BackendUnavailableError: as token_logps, and for a weight that is not
            a plain dense matrix.
    """
    call = HeadCall(
        hidden,
        weight,
        bias,
        labels,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        precision=precision,
        workspace_mb=workspace_mb,
        backend=backend,
        padded_or_packed=False,
    )
    return call.tokens()[0].view(call.shape)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    temperature: float = 1.0,
    precision: str = "exact",
    workspace_mb: float | None = None,
    backend: str | None = None,
) -> TokenStats:
    """linear_token_logps with the entropy, mean logit, top-1 hit and ``log sum p^2`` beside it.

    Arguments and errors are linear_token_logps's; TokenStats says what each value is. Only
    ``logps`` carries a gradient.
    """
    call = HeadCall(
        hidden,
        weight,
        bias,
        labels,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        precision=precision,
        workspace_mb=workspace_mb,
        backend=backend,
        padded_or_packed=False,
    )
    logps, values, is_top1 = call.tokens(stats=True)
    return make_stats(logps.view(call.shape), values, is_top1)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    precision: str = "exact",
    workspace_mb: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """``log pi(y|x)`` of every sequence, [S]: sequence_logps of the head's logits.

    Args:
        hidden: ``[S, T, D]``, or packed ``[N, D]`` with ``cu_seqlens``.
        average_log_prob, cu_seqlens: as in sequence_logps.
        The others: as in linear_token_logps.
    """
    call = HeadCall(
        hidden,
        weight,
        bias,
        labels,
        cu_seqlens,
        ignore_index=ignore_index,
        shift=shift,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        precision=precision,
        workspace_mb=workspace_mb,
        backend=backend,
    )
    return call.layout.sequence_logps(
        call.tokens()[0], check_flag("average_log_prob", average_log_prob)
    )
