"""An object with the call signature and return values of liger-kernel's LigerFusedLinearDPOLoss.

TRL 0.24 to 1.13 (``use_liger_loss=True``, later ``use_liger_kernel=True``) and Axolotl build one by
name. Before the trainer is made::

    from dpo_kernels.integrations.liger import LigerFusedLinearDPOLoss
    trl.trainer.dpo_trainer.LigerFusedLinearDPOLoss = LigerFusedLinearDPOLoss
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..linear import linear_dpo_loss
from ..losses import make_options

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
        if label_smoothing and loss_type not in _TAKES_LABEL_SMOOTHING:
            raise ValueError(
                f"label_smoothing: loss_type {loss_type!r} has none in this interface, "
                f"got {label_smoothing}"
            )
        if compute_nll_loss and average_log_prob:
            raise ValueError("compute_nll_loss: not supported together with average_log_prob=True")
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
        if self.compute_nll_loss:
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
        out = linear_dpo_loss(
            _input,
            lin_weight,
            target,
            bias=bias,
            reference_hidden=ref_input if self.use_ref_model else None,
            reference_weight=ref_weight if self.use_ref_model else None,
            reference_bias=ref_bias if self.use_ref_model else None,
            shift=False,
            ignore_index=self.ignore_index,
            average_log_prob=self.average_log_prob,
            **self._loss_options(),
        )
        with torch.no_grad():
            chosen, rejected = _input.chunk(2)
            head = _mean_row(lin_weight, bias)
            nll = torch.zeros_like(out.loss)
            if self.compute_nll_loss:
                scored = (target[: target.shape[0] // 2] != self.ignore_index).sum()
                nll = -out.chosen_logps.sum() / scored.clamp(min=1)
            means = (_mean_logit(chosen, *head), _mean_logit(rejected, *head))
        logps = (out.chosen_logps, out.rejected_logps)
        return out.loss, (*logps, *means, nll, out.chosen_rewards, out.rejected_rewards)


def _mean_row(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | float]:
    return weight.mean(0, dtype=torch.float32), 0.0 if bias is None else bias.float().mean()


def _mean_logit(hidden: Tensor, mean_row: Tensor, mean_bias: Tensor | float) -> Tensor:
    # the mean of h W' + b over rows and vocabulary is (mean h) . (mean row of W) + mean b
    mean_hidden = hidden.flatten(0, -2).mean(0, dtype=torch.float32)
    return (mean_hidden * mean_row).sum() + mean_bias
