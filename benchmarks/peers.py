"""The peers' kernels as contenders: wired as their own trainers wire them.

Each makes per-token log-probs, sums them over the scored tokens and ends in the sigmoid loss. What
a peer cannot serve is a row that says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import reference
from dpo_kernels.cli.contenders import Contender, Loss
from dpo_kernels.cli.problems import IGNORE, Problem, Shape


def _padded_sigmoid_only(shape: Shape, softcap: bool = False) -> None:
    if shape.packed:
        raise NotImplementedError("packed batches")
    if shape.loss_type != "sigmoid":
        raise NotImplementedError(f"loss_type {shape.loss_type}")
    if shape.softcap and not softcap:
        raise NotImplementedError("softcap")


def _sigmoid_loss(logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    losses, _, _ = reference.preference_loss(*logps.chunk(2), *reference_logps.chunk(2), beta=beta)
    return losses.mean()


def _needs_triton_on_gpu() -> None:
    if not torch.cuda.is_available():
        raise NotImplementedError("Triton kernels, for a GPU only")


def trl_logits(shape: Shape) -> Loss:
    _padded_sigmoid_only(shape)
    _needs_triton_on_gpu()
    from trl.kernels import selective_log_softmax_and_entropy

    def loss(p: Problem) -> Tensor:
        labels = p.labels[:, 1:]
        mask = labels != IGNORE
        logps, _ = selective_log_softmax_and_entropy(
            p.logits[:, :-1], labels.where(mask, 0), row_mask=mask
        )
        return _sigmoid_loss(logps.sum(-1), p.reference_logps, p.beta)

    return loss


def liger_logits(shape: Shape) -> Loss:
    _padded_sigmoid_only(shape)
    _needs_triton_on_gpu()
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def loss(p: Problem) -> Tensor:
        labels = F.pad(p.labels[:, 1:], (0, 1), value=IGNORE)
        # it overwrites its input in forward; the copy keeps the problem as it is
        logits = p.logits.flatten(0, 1).clone()
        nll = LigerCrossEntropyFunction.apply(
            logits, labels.flatten(), None, IGNORE, 0.0, 0.0, "none"
        )[0]
        return _sigmoid_loss(-nll.view(labels.shape).float().sum(-1), p.reference_logps, p.beta)

    return loss


def _with_token_logps(token_logps) -> Loss:
    """The loss of a peer that makes ``[2P, T - 1]`` log-probs from (problem, hidden)."""

    def loss(p: Problem) -> Tensor:
        reference_logps = p.reference_logps
        if p.reference_hidden is not None:
            with torch.no_grad():
                reference_logps = token_logps(p, p.reference_hidden).sum(-1)
        return _sigmoid_loss(token_logps(p, p.hidden).sum(-1), reference_logps, p.beta)

    return loss


def trl_linear(shape: Shape) -> Loss:
    _padded_sigmoid_only(shape, softcap=True)
    from trl.kernels import ChunkedLogProbFunction

    def token_logps(p: Problem, hidden: Tensor) -> Tensor:
        # compacted to the scored rows, as TRL does on a GPU only
        labels = p.labels[:, 1:]
        scored = labels != IGNORE
        rows = hidden[:, :-1][scored]
        logps = ChunkedLogProbFunction.apply(
            rows, p.weight, None, labels[scored], 1.0, 32768, p.shape.softcap, 1.0, ()
        )[0]
        return torch.zeros(labels.shape, device=labels.device).masked_scatter(scored, logps)

    return _with_token_logps(token_logps)


def liger_linear(shape: Shape) -> Loss:
    """Liger takes the reference's hidden states; log-probs that are given cost it a head GEMM."""
    _padded_sigmoid_only(shape)
    if not shape.reference_hidden:
        raise NotImplementedError("log-probs of the reference; it takes hidden states")
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = None

    def loss(p: Problem) -> Tensor:
        nonlocal module
        if module is None:
            module = LigerFusedLinearDPOLoss(beta=p.beta)
        return module(
            p.weight,
            p.hidden[:, :-1],
            p.labels[:, 1:],
            ref_input=p.reference_hidden[:, :-1],
            ref_weight=p.weight.detach(),
        )[0]

    return loss


def cce_linear(shape: Shape) -> Loss:
    _padded_sigmoid_only(shape, softcap=True)
    _needs_triton_on_gpu()
    from cut_cross_entropy import linear_cross_entropy

    def token_logps(p: Problem, hidden: Tensor) -> Tensor:
        # filter_eps=None: the exact gradient, as ours
        nll = linear_cross_entropy(
            hidden,
            p.weight,
            p.labels,
            shift=True,
            reduction="none",
            filter_eps=None,
            softcap=p.shape.softcap,
        )
        return -nll.float()

    return _with_token_logps(token_logps)


def torch_linear(shape: Shape) -> Loss:
    _padded_sigmoid_only(shape)
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("torch.nn.functional.linear_cross_entropy, of torch 2.13")

    def token_logps(p: Problem, hidden: Tensor) -> Tensor:
        labels = p.labels[:, 1:]
        scored = labels != IGNORE
        nll = F.linear_cross_entropy(
            hidden[:, :-1][scored], p.weight, labels[scored], reduction="none"
        )
        zeros = torch.zeros(labels.shape, device=labels.device)
        return zeros.masked_scatter(scored, -nll.float())

    return _with_token_logps(token_logps)


def peers_for(shape: Shape) -> list[Contender]:
    if shape.hidden is None:
        return [
            Contender("TRL", trl_logits, packages=("trl",)),
            Contender("Liger", liger_logits, packages=("liger-kernel",)),
        ]
    return [
        Contender("TRL", trl_linear, packages=("trl",)),
        Contender("cut-cross-entropy", cce_linear, packages=("cut-cross-entropy",)),
        Contender("torch linear_cross_entropy", torch_linear),
        Contender("Liger", liger_linear, compiles=True, packages=("liger-kernel",)),
    ]
