"""An object with the call signature and return values of liger-kernel's LigerFusedLinearDPOLoss.

``dpo_kernels.patch("liger")`` puts it where liger-kernel has its own. TRL 0.24 to 1.13 and Axolotl
build one by name; ``dpo_kernels.patch("trl")`` puts it there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import preference_loss
from ..linear import linear_dpo_loss, linear_sequence_logps
from ..losses import LOSSES, make_options
from ..pairs import reduce_losses
from ..patching import Seam
from ..types import DPOOutput
from .heads import mean_logits

# the options of Liger's class, and of TRL 1.13's copy
PARAMETERS = (
    "ignore_index",
    "beta",
    "alpha",
    "compute_nll_loss",
    "compiled",
    "use_ref_model",
    "average_log_prob",
    "chunk_size",
    "loss_type",
    "label_smoothing",
    "discopop_tau",
)
_TAKES_LABEL_SMOOTHING = ("robust", "exo_pair", "aot", "aot_unpaired")


class LigerFusedLinearDPOLoss(nn.Module):
    """The DPO loss of hidden states, one chosen and one rejected half, aligned with their targets.

    Args:
        ignore_index: target that is not scored.
        beta, loss_type, label_smoothing, discopop_tau: as in preference_loss, whose every loss_type
            is served, not only Liger's.
        alpha: weight of the negative log-likelihood of the chosen answers, with compute_nll_loss.
        use_ref_model: False takes the reference log-probs as 0.
        average_log_prob: sequence log-probs are means over the scored tokens.
        compiled, chunk_size: taken for the signature's sake; there is nothing to compile or chunk.

    Raises:
        ValueError: an option that the loss does not take. Liger drops ``label_smoothing`` silently
            where a loss has none, "sigmoid" included; here it is refused.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        _check_as_liger_does(loss_type, label_smoothing)
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        make_options(**self._loss_options())

    def _loss_options(self) -> dict:
        options = {
            "beta": self.beta,
            "loss_type": self.loss_type,
            "label_smoothing": self.label_smoothing,
            "discopop_tau": self.discopop_tau,
            "reference_free": not self.use_ref_model,
        }
        if self.compute_nll_loss and not self.average_log_prob:
            # sft is that likelihood: minus the mean log-prob of all the chosen tokens of the batch
            options |= {"loss_type": [self.loss_type, "sft"], "loss_weights": [1.0, self.alpha]}
        return options

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """
        Args:
            lin_weight, bias: the head, ``[V, D]`` and ``[V]``.
            _input: ``[2P, T, D]``, the chosen answers first; target ``[2P, T]`` is aligned with it.
            ref_input, ref_weight, ref_bias: the same of the reference model, without gradient.

        Returns:
            ``(loss, (chosen_logps [P], rejected_logps [P], chosen_logits_mean,
            rejected_logits_mean, nll_loss, chosen_rewards [P], rejected_rewards [P]))``; only the
            loss has a gradient. The means are over all positions, scored or not.
        """
        make = self._with_means_and_nll if self._has_means_and_nll() else self._fused
        reference = (ref_input, ref_weight, ref_bias) if self.use_ref_model else (None,) * 3
        out = make(_input, lin_weight, bias, target, *reference)
        with torch.no_grad():
            chosen_means, rejected_means = mean_logits(_input, lin_weight, bias).chunk(2)
            nll = torch.zeros_like(out.loss)
            if self.compute_nll_loss:
                lengths = self._chosen_lengths(target)
                logps = out.chosen_logps * (lengths if self.average_log_prob else 1)
                nll = -logps.sum() / lengths.sum().clamp(min=1)
        logps = (out.chosen_logps, out.rejected_logps)
        rewards = (out.chosen_rewards, out.rejected_rewards)
        return out.loss, (*logps, chosen_means.mean(), rejected_means.mean(), nll, *rewards)

    def _has_means_and_nll(self) -> bool:
        return self.compute_nll_loss and self.average_log_prob

    def _chosen_lengths(self, target: Tensor) -> Tensor:
        return (target.chunk(2)[0] != self.ignore_index).sum(-1)

    def _fused(
        self, hidden, weight, bias, target, reference_hidden, reference_weight, reference_bias
    ) -> DPOOutput:
        return linear_dpo_loss(
            hidden,
            weight,
            target,
            bias=bias,
            reference_hidden=reference_hidden,
            reference_weight=reference_weight,
            reference_bias=reference_bias,
            shift=False,
            ignore_index=self.ignore_index,
            average_log_prob=self.average_log_prob,
            **self._loss_options(),
        )

    def _with_means_and_nll(
        self, hidden, weight, bias, target, reference_hidden, reference_weight, reference_bias
    ) -> DPOOutput:
        """The preference loss of means, and the likelihood of tokens: both from the same sums.

        The loss lies on top of the log-probs, so that a trainable head costs four GEMMs.
        """
        rows = {"shift": False, "ignore_index": self.ignore_index}
        sums = linear_sequence_logps(hidden, weight, target, bias=bias, **rows)
        lengths = (target != self.ignore_index).sum(-1).clamp(min=1)
        chosen, rejected = (sums / lengths).chunk(2)
        reference: tuple[Tensor | None, ...] = (None, None)
        if reference_hidden is not None:
            with torch.no_grad():
                reference = linear_sequence_logps(
                    reference_hidden,
                    reference_weight,
                    target,
                    bias=reference_bias,
                    average_log_prob=True,
                    **rows,
                ).chunk(2)
        losses, *rewards = preference_loss(chosen, rejected, *reference, **self._loss_options())
        nll = -sums.chunk(2)[0].sum() / self._chosen_lengths(target).sum().clamp(min=1)
        loss = reduce_losses(losses, "mean") + self.alpha * nll
        return DPOOutput(loss, losses.detach(), chosen.detach(), rejected.detach(), *rewards)


def _check_as_liger_does(loss_type: str, label_smoothing: float) -> None:
    """In Liger's words where there is a word of its own for it, which its users' tests match."""
    if loss_type not in LOSSES:
        raise ValueError(
            f"Unsupported loss_type: expected one of {', '.join(LOSSES)}, got {loss_type!r}"
        )
    if loss_type == "exo_pair" and not label_smoothing > 0:
        raise ValueError(
            f"label_smoothing must be > 0 for loss_type='exo_pair', got {label_smoothing}"
        )
    if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must lie in [0.0, 0.5) for loss_type='robust', got {label_smoothing}"
        )
    if label_smoothing and loss_type not in _TAKES_LABEL_SMOOTHING:
        raise ValueError(
            f"label_smoothing: loss_type {loss_type!r} has none in this interface, "
            f"got {label_smoothing}"
        )


def seams(version: str) -> list[Seam]:
    return [
        Seam(
            "liger_kernel.chunked_loss.dpo_loss:LigerFusedLinearDPOLoss",
            lambda _: LigerFusedLinearDPOLoss,
            PARAMETERS,
            "scored rows alone, the head's logits and gradient in float32, every loss type",
        )
    ]
