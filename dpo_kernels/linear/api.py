"""The public functions from hidden states: checks, then the ops, or the pipeline of pairs.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..checks import check_flag, check_pairs, check_row_options
from ..compat import in_profiles, varies
from ..losses import LOSSES, LossType, make_options
from ..pairs import compose, join_reference, refuse_two_references
from ..parallel.agreement import check_same_loss
from ..parallel.groups import ALONE, check_groups
from ..types import DPOOutput, LossOptions, TokenStats
from .ops import LinearDPO
from .source import Hidden, reference_head_of
from .workspace import Needs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    from .arguments import LinearDPOArguments


@in_profiles
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
    max_scored_tokens: int | None = None,
    backend: str | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> Tensor:
    """``log softmax(z)[label]``, ``z = softcap * tanh(scale * (W h + b) / softcap) / temperature``.

    Args:
        hidden: ``[..., T, D]`` float32, bfloat16, float16, or float64 (CPU).
        weight: ``[V, D]``, the head's dense matrix, in the dtype of hidden; under autocast either
            may be float32, and a float32 weight gets a float32 gradient. A weight or bias that
            FSDP2 (fully_shard) or DeepSpeed's ZeRO-3 has sharded is gathered once a call, so every
            rank has to make it, and its gradient reduced as the engine reduces the others.
        labels: ``[..., T]`` integers; ``ignore_index`` where nothing is scored. Only the rows of
            hidden that score a label enter a GEMM.
        bias: ``[V]``.
        logit_scale, logit_softcap: as Cohere's and Gemma-2's models define them.
        precision: "exact" keeps a tile of logits in float32; "fast" in the dtype of hidden, which
            costs up to 0.1 nat a token in bfloat16.
        workspace_mb: MiB for a tile of logits and the scratch memory of its GEMMs. None: what
            DPO_KERNELS_WORKSPACE_MB says, or 640 rows on a CPU; on a GPU 1024, with a trainable
            head 4096 or as many as a larger pair has, within 1/16 of its memory; no more than the
            scored rows need. On top of it a call takes O(N D), the gradients (the weight's in
            float32), and under autocast a copy of the weight in autocast's dtype.
        max_scored_tokens: your promise that no more tokens are scored (of this rank's, with
            sequence_group). A GPU is then not waited for, but with vocab_group for the ranks'
            sizes; without it once a pass. That many rows enter the GEMMs, so choose it tight: a
            trainable head takes four GEMMs in linear_dpo_loss, not three, where they outgrow a
            tile. A batch that scores more raises ValueError on a CPU; on a GPU all of its results
            and gradients are NaN, and with DPO_KERNELS_VALIDATE=1 it raises.
        ignore_index, shift, temperature, backend, sequence_group: as in token_logps.
        vocab_group: as in token_logps, for a head that is split: weight and bias are this rank's
            rows, hidden is the same on every rank. An all-gather a tile, and one of the ranks'
            sizes a call; the gradient of hidden is summed over the ranks by one all-reduce, those
            of weight and bias are this rank's.

    Returns:
        Log-probs in nats, shaped and aligned like ``labels``, 0 where nothing is scored; float32
        (float64 for float64 hidden).

    Raises:
        ValueError, TypeError, BackendUnavailableError: as token_logps, and for a weight that is not
            a plain dense matrix.
    """
    rows = check_row_options(ignore_index, shift, temperature, logit_scale, logit_softcap)
    tiles = (precision, workspace_mb, backend, max_scored_tokens)
    groups = check_groups(vocab_group, sequence_group, rows.shift)
    source = Hidden((hidden, weight, bias), labels, None, rows, tiles, groups, sequences=False)
    return source.tokens()[0].view(labels.shape)


@in_profiles
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
    max_scored_tokens: int | None = None,
    backend: str | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> TokenStats:
    """linear_token_logps with the entropy, mean logit, top-1 hit and ``log sum p^2`` beside it.

    Arguments and errors are linear_token_logps's; TokenStats says what each value is. Only
    ``logps`` carries a gradient.
    """
    rows = check_row_options(ignore_index, shift, temperature, logit_scale, logit_softcap)
    tiles = (precision, workspace_mb, backend, max_scored_tokens)
    groups = check_groups(vocab_group, sequence_group, rows.shift)
    source = Hidden((hidden, weight, bias), labels, None, rows, tiles, groups, sequences=False)
    logps, values, is_top1 = source.tokens(stats=True)
    return TokenStats.of(logps.view(labels.shape), values, is_top1)


@in_profiles
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
    max_scored_tokens: int | None = None,
    backend: str | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> Tensor:
    """``log pi(y|x)`` of every sequence, [S]: sequence_logps of the head's logits.

    Args:
        hidden: ``[S, T, D]``, or packed ``[N, D]`` with ``cu_seqlens``.
        average_log_prob, cu_seqlens, sequence_group: as in sequence_logps.
        The others: as in linear_token_logps.
    """
    rows = check_row_options(ignore_index, shift, temperature, logit_scale, logit_softcap)
    tiles = (precision, workspace_mb, backend, max_scored_tokens)
    groups = check_groups(vocab_group, sequence_group, rows.shift)
    source = Hidden((hidden, weight, bias), labels, cu_seqlens, rows, tiles, groups)
    return source.layout.sequence_logps(
        source.tokens()[0], check_flag("average_log_prob", average_log_prob)
    )


@overload
def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **arguments: Unpack[LinearDPOArguments],
) -> DPOOutput: ...


@overload
def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **arguments: Unpack[LinearDPOArguments],
) -> tuple[DPOOutput, TokenStats]: ...


@in_profiles
def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    reference_hidden: Tensor | None = None,
    reference_weight: Tensor | None = None,
    reference_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    precision: str = "exact",
    workspace_mb: float | None = None,
    max_scored_tokens: int | None = None,
    beta: float = 0.1,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    backend: str | None = None,
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    return_stats: bool = False,
) -> DPOOutput | tuple[DPOOutput, TokenStats]:
    """dpo_loss of the logits ``hidden @ weight.T + bias``, which are never held whole.

    Args:
        hidden: ``[2P, T, D]`` of the model's last layer, row i the chosen and row P + i the
            rejected answer of pair i, or packed ``[N, D]`` with ``cu_seqlens [2P + 1]``.
        weight, bias, logit_scale, logit_softcap, precision, workspace_mb: as in linear_token_logps.
        max_scored_tokens, vocab_group: likewise; reference_weight and reference_bias are split like
            weight and bias.
        reference_hidden: the reference model's hidden states, instead of its log-probs; they get
            no gradient.
        reference_weight, reference_bias: the reference's head; None: the policy's.
        return_stats: also return what trainers log of every token, from the same GEMMs.
        The others: as in dpo_loss.

    Returns:
        DPOOutput, or with ``return_stats`` ``(DPOOutput, TokenStats)``, the stats without
        gradient; an empty batch gives a differentiable 0.
    """
    rows = check_row_options(ignore_index, shift, temperature, logit_scale, logit_softcap)
    tiles = (precision, workspace_mb, backend, max_scored_tokens)
    groups = check_groups(vocab_group, sequence_group, rows.shift)
    return_stats = check_flag("return_stats", return_stats)
    source = Hidden((hidden, weight, bias), labels, cu_seqlens, rows, tiles, groups)
    options = make_options(
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        reference_free=reference_free,
        f_divergence=f_divergence,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
        average_log_prob=average_log_prob,
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
        reduction=reduction,
    )
    check_pairs("hidden", source.layout)
    fused = _is_fused(source.needs, options) and groups.sequence is None
    reference_head, reference_logps = (None, None, None), None
    if reference_hidden is not None:
        refuse_two_references(
            "reference_hidden", reference_chosen_logps, reference_rejected_logps, options
        )
        reference_head, dtype = reference_head_of(
            source, reference_hidden, reference_weight, reference_bias
        )
        # a pass of its own unless the tiles of the policy can hold it
        if not fused or dtype != source.options.dtype:
            reference_logps = source.reference_logps(reference_head, dtype, options)
            reference_head = (None, None, None)
    elif reference_weight is not None or reference_bias is not None:
        raise ValueError("reference_weight, reference_bias: given without reference_hidden")
    else:
        pairs = source.layout.num_seqs // 2
        references = (reference_chosen_logps, reference_rejected_logps)
        reference_logps = join_reference(*references, options, hidden, pairs, "reference_hidden")
    if groups is not ALONE:
        check_same_loss(groups, options, reference_logps)
    if fused:
        output, stats = _fused(source, reference_logps, reference_head, options, return_stats)
    else:
        output, stats = compose(source, reference_logps, options, return_stats)
    if not return_stats or stats is None:
        return output
    return output, TokenStats(*(value.view(labels.shape) for value in stats))


def _is_fused(needs: Needs, options: LossOptions) -> bool:
    """Whether the forward makes the gradients: it can, of a loss that couples no pairs.

    What a callable does with the batch is its own affair.
    """
    if options.reduction == "none" or any(
        callable(name) or LOSSES[name].sorts_pairs or (options.use_weighting and name == "sft")
        for name in options.loss_types
    ):
        return False
    # a loss outside of the op costs a frozen head no GEMM, and a new number no new graph
    numbers = (x for x in (*options, *options.loss_weights) if isinstance(x, float))
    return needs.weight or needs.bias or not any(map(varies, numbers))


def _fused(
    source: Hidden,
    reference_logps: Tensor | None,
    reference_head: tuple[Tensor | None, ...],
    options: LossOptions,
    return_stats: bool,
) -> tuple[DPOOutput, TokenStats | None]:
    """The gradients of the head in the same pass as its logits."""
    loss, losses, seqs, *tokens = LinearDPO.apply(
        *source.head,
        source.layout.labels,
        source.layout.cu_seqlens,
        reference_logps,
        *reference_head,
        source.options,
        return_stats,
        options,
        source.needs,
        None if torch.compiler.is_compiling() else tuple(map(_way_to, source.head[1:])),
    )
    chosen, rejected = seqs.chunk(2, 1)
    output = DPOOutput(loss, losses, chosen[0], rejected[0], chosen[2], rejected[2])
    return output, TokenStats.of(*tokens) if return_stats else None


def _way_to(x: Tensor | None) -> Tensor | None:
    """Where autograd finds x, without the memory of a head that was gathered or cast for a call."""
    if x is None or not x.requires_grad:
        return None
    return x if x.is_leaf else x[:0].clone()
