"""The public functions from logits: validation, layout, then one autograd.Function.

Rows are described in the README: ``labels == ignore_index`` is not scored; padded batches of P
pairs are ``[2P, T, V]`` with the chosen answers first, packed ones ``[N, V]`` with ``cu_seqlens
[2P + 1]``; with ``shift`` the logits at t score the label at t + 1 of the same sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference
from .autograd import (
    CallOptions,
    PairOptions,
    RowOptions,
    SequenceLogps,
    SigmoidDPO,
    TokenLogps,
)
from .checks import (
    check_cu_seqlens,
    check_flag,
    check_floating,
    check_ignore_index,
    check_inplace,
    check_labels,
    check_ld_alpha,
    check_padded_or_packed,
    check_pairs,
    check_reduction,
    check_sequence_logps,
    check_temperature,
)
from .dispatch import check_name
from .losses import LossOptions, make_options
from .types import DPOOutput, TokenStats, accumulation_dtype

preference_loss = reference.preference_loss


def _rows(
    logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, name: str = "logits"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked (logits, labels, cu_seqlens) with unit stride along the vocabulary."""
    check_floating(name, logits)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        raise ValueError(f"{name}: expected [..., rows, vocabulary], got {list(logits.shape)}")
    labels = check_labels(labels, logits.shape[:-1], logits.device, name)
    cu_seqlens = check_cu_seqlens(cu_seqlens, logits.dim(), logits.device, name)
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        logits = logits.contiguous()
    return logits, labels, cu_seqlens


def _options(
    ignore_index: int, shift: bool, temperature: float, backend: str | None, inplace: bool = False
) -> CallOptions:
    rows = RowOptions(
        check_ignore_index(ignore_index),
        check_flag("shift", shift),
        1.0,
        0.0,
        check_temperature(temperature),
    )
    return CallOptions(rows, check_name(backend), inplace)


def _tokens(
    logits: Tensor,
    labels: Tensor,
    options: CallOptions,
    stats: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logps like labels, stats [3, N], is_top1 [N]) for labels of any number of dimensions."""
    shape = labels.shape
    if cu_seqlens is None and logits.dim() == 2:
        logits, labels = logits.unsqueeze(0), labels.unsqueeze(0)
    elif cu_seqlens is None:
        logits, labels = logits.flatten(0, -3), labels.flatten(0, -2)
    logps, values, is_top1 = TokenLogps.apply(logits, labels, cu_seqlens, options, stats)
    return logps.view(shape), values, is_top1


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """``log softmax(logits / temperature)[label]`` for every token.

    Args:
        logits: ``[..., T, V]`` float32, bfloat16, float16, or float64 (CPU); any strides but the
            last, which is copied away if it is not 1.
        labels: ``[..., T]`` integers; ``ignore_index`` where nothing is scored.
        shift: the logits at t score the label at t + 1, and the first label is not scored.
        temperature: divides the logits.
        backend: "cuda", "triton", "cpu" or "torch"; None chooses, DPO_KERNELS_BACKEND overrides.

    Returns:
        Log-probs in nats, shaped and aligned like ``labels``, 0 where nothing is scored; float32
        (float64 for float64 logits). The gradient has the dtype of the logits.

    Raises:
        ValueError: shapes that do not fit; on a CPU, a label outside ``[0, V)``, with its position.
            On a GPU such a row is NaN, and DPO_KERNELS_VALIDATE=1 raises.
        TypeError: dtypes that do not fit.
        BackendUnavailableError: a backend asked for by name cannot serve the call.
    """
    logits, labels, _ = _rows(logits, labels, None)
    options = _options(ignore_index, shift, temperature, backend)
    return _tokens(logits, labels, options, False)[0]


def token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    temperature: float = 1.0,
    backend: str | None = None,
) -> TokenStats:
    """token_logps with the entropy, mean logit, top-1 hit and ``log sum p^2`` from the same read.

    Arguments and errors are token_logps's; TokenStats says what each value is. Only ``logps``
    carries a gradient.
    """
    logits, labels, _ = _rows(logits, labels, None)
    options = _options(ignore_index, shift, temperature, backend)
    logps, values, is_top1 = _tokens(logits, labels, options, True)
    return make_stats(logps, values, is_top1)


def make_stats(logps: Tensor, values: Tensor, is_top1: Tensor) -> TokenStats:
    """TokenStats shaped like ``logps`` from the stacked values of token_forward."""
    entropy, mean_logits, log_sum_sq_probs = values.view(3, *logps.shape).unbind(0)
    return TokenStats(logps, entropy, mean_logits, is_top1.view(logps.shape), log_sum_sq_probs)


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """``log pi(y|x) = sum_t log softmax(logits_t / temperature)[label_t]`` for every sequence.

    Args:
        logits: ``[S, T, V]``, or packed ``[N, V]`` with ``cu_seqlens``.
        labels: ``[S, T]`` or ``[N]``.
        average_log_prob: the mean over the scored tokens instead of the sum; 0 where there is none.
        cu_seqlens: ``[S + 1]`` int32 or int64, rising from 0 to N.
        ignore_index, shift, temperature, backend: as in token_logps.

    Returns:
        ``[S]`` float32 (float64 for float64 logits), in nats. The sum runs in a fixed order, so the
        same sequence gives the same bits in any batch.
    """
    logits, labels, cu_seqlens = _rows(logits, labels, cu_seqlens)
    check_padded_or_packed("logits", logits, cu_seqlens)
    options = _options(ignore_index, shift, temperature, backend)
    return SequenceLogps.apply(
        logits, labels, cu_seqlens, options, check_flag("average_log_prob", average_log_prob)
    )[0]


def dpo_loss(
    policy_logits: Tensor,
    labels: Tensor,
    reference_chosen_logps: Tensor | None = None,
    reference_rejected_logps: Tensor | None = None,
    *,
    reference_logits: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] | Callable = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    average_log_prob: bool = False,
    ignore_index: int = -100,
    shift: bool = True,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    inplace_backward: bool = False,
    backend: str | None = None,
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
) -> DPOOutput:
    """The DPO loss of a batch of pairs (arXiv:2305.18290, eq. 7), from logits.

    ``loss = -log sigmoid(beta * [(log pi(w) - log ref(w)) - (log pi(l) - log ref(l))])``

    Args:
        policy_logits: ``[2P, T, V]``, row i the chosen and row P + i the rejected answer of pair i,
            or packed ``[N, V]`` with ``cu_seqlens [2P + 1]``.
        labels: ``[2P, T]`` or ``[N]``; ``ignore_index`` at prompt and padding.
        reference_chosen_logps, reference_rejected_logps: ``[P]``, in nats, without gradient.
        reference_logits: the reference's logits, instead of its log-probs; no gradient.
        beta, loss_type, label_smoothing, reference_free, loss_weights, f_divergence,
            f_alpha_divergence_coef, discopop_tau, simpo_gamma: as in preference_loss.
        average_log_prob: sequence log-probs are means over the scored tokens.
        reduction: "mean" over the pairs, "sum", or "none" for ``[P]`` losses.
        inplace_backward: backward overwrites the logits with their gradient. Nothing else may need
            the logits afterwards, and a second backward raises.
        ld_alpha: weight of tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411).
        use_weighting: weighs each pair by how likely the policy finds it (WPO, arXiv:2406.11827).
        ignore_index, shift, temperature, backend: as in token_logps.

    Returns:
        DPOOutput; an empty batch gives a differentiable 0.

    Raises:
        ValueError, TypeError, BackendUnavailableError: as in token_logps and preference_loss.
    """
    logits, labels, cu_seqlens = _rows(policy_logits, labels, cu_seqlens, "policy_logits")
    check_padded_or_packed("policy_logits", logits, cu_seqlens)
    check_reduction(reduction)
    use_weighting = check_flag("use_weighting", use_weighting)
    if check_flag("inplace_backward", inplace_backward):
        check_inplace(logits)
    loss_options = make_options(
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        reference_free=reference_free,
        f_divergence=f_divergence,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        discopop_tau=discopop_tau,
        simpo_gamma=simpo_gamma,
    )
    num_seqs = logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_pairs(num_seqs, "policy_logits" if cu_seqlens is None else "cu_seqlens")
    batch = _PairBatch(
        labels,
        cu_seqlens,
        num_seqs // 2,
        check_flag("average_log_prob", average_log_prob),
        _options(ignore_index, shift, temperature, backend, inplace_backward),
        check_ld_alpha(ld_alpha),
    )
    if reference_logits is not None:
        if reference_chosen_logps is not None or reference_rejected_logps is not None:
            raise ValueError(
                "reference_logits: given beside reference log-probs; expected one of them"
            )
        with torch.no_grad():
            ref_logits, _, _ = _rows(reference_logits, labels, cu_seqlens, "reference_logits")
            reference_logps = batch.sequences(ref_logits)[0]
            # the kernels read it as their own
            reference_logps = reference_logps.to(accumulation_dtype(logits.dtype))
    else:
        reference_logps = join_reference(
            reference_chosen_logps, reference_rejected_logps, loss_options, logits, num_seqs // 2
        )
    if loss_options.is_plain_sigmoid and ld_alpha is None and not use_weighting and num_seqs:
        return _fused_sigmoid(logits, reference_logps, batch, loss_options, reduction)
    return _composed(logits, reference_logps, batch, loss_options, reduction, use_weighting)


class _PairBatch:
    """Labels and layout of a batch of pairs, and its sequence log-probs from any logits."""

    def __init__(self, labels, cu_seqlens, pairs, average, options: CallOptions, ld_alpha):
        self.labels = labels
        self.cu_seqlens = cu_seqlens
        self.pairs = pairs
        self.average = average
        self.options = options
        self.ld_alpha = ld_alpha

    @property
    def layout(self) -> dict:
        rows = self.options.rows
        return {
            "ignore_index": rows.ignore_index,
            "shift": rows.shift,
            "cu_seqlens": self.cu_seqlens,
        }

    def tokens(self, logits: Tensor, stats: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return _tokens(logits, self.labels, self.options, stats, self.cu_seqlens)

    def sequences(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[2P] sequence log-probs, LD-DPO's weights applied, and numbers of scored tokens."""
        if self.ld_alpha is not None:
            return self.weighted_sums(self.tokens(logits)[0])
        return SequenceLogps.apply(logits, self.labels, self.cu_seqlens, self.options, self.average)

    def weighted_sums(self, logps: Tensor) -> tuple[Tensor, Tensor]:
        """sequences() from token log-probs."""
        if self.ld_alpha is not None:
            logps = logps * reference.token_weights(
                self.labels, ld_alpha=self.ld_alpha, **self.layout
            )
        sums = reference.sums_per_sequence(logps, self.cu_seqlens)
        lengths = reference.sequence_lengths(self.labels, **self.layout)
        return (sums / lengths.clamp(min=1) if self.average else sums), lengths


def join_reference(
    chosen, rejected, options: LossOptions, logits: Tensor, pairs: int
) -> Tensor | None:
    """The reference's [2P] log-probs without gradient; None where none are given or needed."""
    names = ("reference_chosen_logps", "reference_rejected_logps")
    if chosen is None and rejected is None:
        if options.needs_reference:
            raise ValueError(
                f"{', '.join(names)}: needed, or what the reference model makes of the batch "
                "(reference_logits, reference_hidden), unless reference_free=True"
            )
        return None
    if chosen is None or rejected is None or options.reference_free:
        raise ValueError(
            f"{', '.join(names)}: expected both, or neither with reference_free=True; "
            f"got reference_free={options.reference_free}"
        )
    for name, value in zip(names, (chosen, rejected), strict=True):
        check_sequence_logps(name, value, pairs, logits.device)
    return torch.cat((chosen.detach(), rejected.detach())).to(accumulation_dtype(logits.dtype))


def _fused_sigmoid(
    logits: Tensor, reference_logps, batch: _PairBatch, options: LossOptions, reduction: str
) -> DPOOutput:
    pair = PairOptions(
        batch.average,
        float(options.beta),
        float(options.label_smoothing),
        reduction == "mean",
        reduction == "none",
    )
    loss, losses, seqs = SigmoidDPO.apply(
        logits, batch.labels, batch.cu_seqlens, reference_logps, batch.options, pair
    )
    chosen_logps, rejected_logps, _, _, *rewards = seqs.view(6, batch.pairs).unbind(0)
    return DPOOutput(
        losses if pair.per_pair else loss,
        losses.detach(),
        chosen_logps,
        rejected_logps,
        *rewards,
    )


def _composed(
    logits: Tensor,
    reference_logps,
    batch: _PairBatch,
    options: LossOptions,
    reduction: str,
    use_weighting: bool,
) -> DPOOutput:
    """Any loss on top of the sequence log-probs: autograd hands its [2P] slopes to the kernels."""
    weights = None
    if use_weighting:
        logps, stats, _ = batch.tokens(logits, stats=True)
        sums, lengths = batch.weighted_sums(logps)
        aligned = logps.detach() - stats[2].view(logps.shape)
        aligned_sums = reference.sums_per_sequence(aligned, batch.cu_seqlens)
        weights = reference.wpo_weights(aligned_sums, lengths)
    else:
        sums, lengths = batch.sequences(logits)
    return reference.pair_output(
        sums.chunk(2),
        (None, None) if reference_logps is None else reference_logps.chunk(2),
        None if batch.average else lengths.chunk(2),
        options,
        reduction,
        weights,
    )
