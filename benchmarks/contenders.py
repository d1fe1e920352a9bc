"""Who is timed: ours, plain PyTorch, torch.compile and the peers, each as problem -> scalar loss.

A peer's entry raises ImportError when it is not installed, and its wiring follows its own trainer:
per-token log-probs, masked sums, then the sigmoid loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import dpo_kernels
from dpo_kernels import reference

from .problems import LinearProblem, LogitsProblem

BETA = 0.1


def installed(factories: dict[str, Callable], say: Callable[[str], object]) -> dict[str, Callable]:
    """The factories whose package is installed; each missing one is said once."""
    found = {}
    for name, factory in factories.items():
        try:
            factory()
        except ImportError as error:
            say(f"{name} is not compared with: {error}")
        else:
            found[name] = factory
    return found


def _sigmoid_loss(logps: Tensor, reference_logps: Tensor) -> Tensor:
    losses, _, _ = reference.preference_loss(*logps.chunk(2), *reference_logps.chunk(2), beta=BETA)
    return losses.mean()


def ours(backend: str | None = None, inplace: bool = False) -> Callable[[LogitsProblem], Tensor]:
    def loss(p: LogitsProblem) -> Tensor:
        return dpo_kernels.dpo_loss(
            p.logits,
            p.labels,
            *p.reference,
            beta=BETA,
            cu_seqlens=p.cu_seqlens,
            inplace_backward=inplace,
            backend=backend,
        ).loss

    return loss


def naive() -> Callable[[LogitsProblem], Tensor]:
    def loss(p: LogitsProblem) -> Tensor:
        return reference.dpo_loss(
            p.logits, p.labels, *p.reference, beta=BETA, cu_seqlens=p.cu_seqlens
        ).loss

    return loss


def compiled() -> Callable[[LogitsProblem], Tensor]:
    # every shape its own code: past a limit of recompilations torch would fall back to eager
    torch._dynamo.reset()
    function = torch.compile(reference.dpo_loss, dynamic=False)

    def loss(p: LogitsProblem) -> Tensor:
        return function(p.logits, p.labels, *p.reference, beta=BETA, cu_seqlens=p.cu_seqlens).loss

    return loss


def _shifted(p: LogitsProblem) -> tuple[Tensor, Tensor, Tensor]:
    if p.cu_seqlens is not None:
        raise NotImplementedError("padded batches only")
    labels = p.labels[:, 1:]
    mask = labels != -100
    return p.logits[:, :-1], labels.where(mask, 0), mask


def trl_logits() -> Callable[[LogitsProblem], Tensor]:
    from trl.kernels import selective_log_softmax_and_entropy

    def loss(p: LogitsProblem) -> Tensor:
        logits, labels, mask = _shifted(p)
        logps, _ = selective_log_softmax_and_entropy(logits, labels, row_mask=mask)
        return _sigmoid_loss(logps.sum(-1), p.reference_logps)

    return loss


def liger_logits() -> Callable[[LogitsProblem], Tensor]:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def loss(p: LogitsProblem) -> Tensor:
        if p.cu_seqlens is not None:
            raise NotImplementedError("padded batches only")
        labels = torch.nn.functional.pad(p.labels[:, 1:], (0, 1), value=-100)
        # it overwrites its input in forward; the copy keeps the problem reusable, as a leaf must be
        logits = p.logits.flatten(0, 1).clone()
        nll = LigerCrossEntropyFunction.apply(
            logits, labels.flatten(), None, -100, 0.0, 0.0, "none"
        )[0]
        return _sigmoid_loss(-nll.view(labels.shape).float().sum(-1), p.reference_logps)

    return loss


def from_logits(device: torch.device) -> dict[str, Callable]:
    """name -> factory, for a device."""
    own = {
        name: lambda name=name: ours(name)
        for name in (("cuda", "triton") if device.type == "cuda" else ("cpu",))
    }
    own_inplace = {
        f"{name} in place": lambda name=name: ours(name, inplace=True) for name in tuple(own)
    }
    peers = {"trl": trl_logits, "liger": liger_logits} if device.type == "cuda" else {}
    return {**own, **own_inplace, "reference": naive, "torch.compile": compiled, **peers}


def ours_linear(precision: str = "exact") -> Callable[[LinearProblem], Tensor]:
    def loss(p: LinearProblem) -> Tensor:
        return dpo_kernels.linear_dpo_loss(
            p.hidden, p.weight, p.labels, **p.reference, beta=BETA, precision=precision
        ).loss

    return loss


def naive_linear() -> Callable[[LinearProblem], Tensor]:
    def loss(p: LinearProblem) -> Tensor:
        return reference.linear_dpo_loss(
            p.hidden, p.weight, p.labels, **p.reference, beta=BETA
        ).loss

    return loss


def _with_token_logps(token_logps: Callable) -> Callable[[LinearProblem], Tensor]:
    """The loss of a peer that makes ``[2P, T - 1]`` log-probs from (problem, hidden)."""

    def loss(p: LinearProblem) -> Tensor:
        reference_logps = p.reference_logps
        if p.shape.reference_hidden:
            with torch.no_grad():
                reference_logps = token_logps(p, p.reference_hidden).sum(-1)
        return _sigmoid_loss(token_logps(p, p.hidden).sum(-1), reference_logps)

    return loss


def trl_linear() -> Callable[[LinearProblem], Tensor]:
    from trl.kernels import ChunkedLogProbFunction

    def token_logps(p: LinearProblem, hidden: Tensor) -> Tensor:
        # compacted to the scored rows, as TRL does on a GPU only
        labels = p.labels[:, 1:]
        scored = labels != -100
        logps = ChunkedLogProbFunction.apply(
            hidden[:, :-1][scored], p.weight, None, labels[scored], 1.0, 32768, None, 1.0, ()
        )[0]
        return torch.zeros(labels.shape, device=labels.device).masked_scatter(scored, logps)

    return _with_token_logps(token_logps)


def cce_linear() -> Callable[[LinearProblem], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    def token_logps(p: LinearProblem, hidden: Tensor) -> Tensor:
        # filter_eps=None: the exact gradient, as ours
        nll = linear_cross_entropy(
            hidden, p.weight, p.labels, shift=True, reduction="none", filter_eps=None
        )
        return -nll.float()

    return _with_token_logps(token_logps)


def liger_linear() -> Callable[[LinearProblem], Tensor]:
    """Liger takes the reference's hidden states, not its log-probs: one more head GEMM."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    module = LigerFusedLinearDPOLoss(beta=BETA)

    def loss(p: LinearProblem) -> Tensor:
        return module(
            p.weight,
            p.hidden[:, :-1],
            p.labels[:, 1:],
            ref_input=p.reference_hidden[:, :-1],
            ref_weight=p.weight.detach(),
        )[0]

    return loss


def from_hidden(device: torch.device) -> dict[str, Callable]:
    """name -> factory of the losses from hidden states."""
    peers = {"trl": trl_linear, "liger compiled": liger_linear}
    if device.type == "cuda":
        peers["cut-cross-entropy"] = cce_linear
    return {
        "ours exact": lambda: ours_linear("exact"),
        "ours fast": lambda: ours_linear("fast"),
        "reference": naive_linear,
        **peers,
    }
