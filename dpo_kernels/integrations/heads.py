"""A model's own head made to return the log-probs of given labels, so that no logits are made.

For trainers that call the whole model and score its logits afterwards. The log-probs are made
inside the head's forward: whatever gathers, shards or casts around that call still does.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import linear_token_logps
from ..linear.sharded import is_zero3
from .logit_transform import LogitTransform, transform_of_model
from .trl import head_in_trls_dtype, head_not_served, log_once

_LEFT = "dpo_kernels leaves a head to its model"
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class ScoringHead:
    """What the head was asked and what it found; None while, or where, it makes logits instead."""

    def __init__(self, labels: Tensor | None, shift: bool, temperature: float, means: bool):
        self.labels = labels
        self.shift = shift
        self.temperature = temperature
        self.means = means
        self.logps: Tensor | None = None  # like labels, float32, 0 where nothing is scored
        self.mean_logits: Tensor | None = None  # [B], over positions and vocabulary
        self.vocabulary: int | None = None
        self.reason: str | None = None

    def logps_through(self, logits: Tensor) -> Tensor:
        """logps, with ``logits``, what the model returned, between them and their gradient.

        FSDP gathers a model's parameters again once a gradient arrives at its outputs.
        """
        return _Through.apply(self.logps, logits)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logps: Tensor, logits: Tensor) -> Tensor:
        ctx.zeros = functools.partial(
            torch.zeros, logits.shape, dtype=logits.dtype, device=logits.device
        )
        return logps.view_as(logps)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, ctx.zeros()


_current: contextvars.ContextVar[ScoringHead | None] = contextvars.ContextVar(
    "scoring head", default=None
)


def current_head() -> ScoringHead | None:
    """That of the model that runs now."""
    return _current.get()


@contextlib.contextmanager
def scoring_head(
    model: Any,
    labels: Tensor | None = None,
    *,
    shift: bool,
    temperature: float = 1.0,
    means: bool = False,
) -> Iterator[ScoringHead]:
    """While it lasts, one forward of ``model`` scores ``labels`` in place of making logits.

    In place of its logits the model then returns the log-probs, ``[..., 1]``: they are for
    what walks the outputs (DDP); the results are in the ScoringHead, and a loss takes them from
    ``logps_through(outputs.logits)``. A head that cannot be served (a quantised or adapted one,
    one that is sharded while the model runs it, as by ZeRO-3, one whose outputs the model does more
    to than to scale and cap them) makes its logits as ever, with one logged reason.

    Args:
        model: the Hugging Face model, or what DeepSpeed, DDP, PEFT or a compiler has made of it.
        labels: as in token_logps; may be set on the ScoringHead until the head runs.
        means: mean_logits is wanted too, which a softcapped head cannot give without its logits.
    """
    scoring = ScoringHead(labels, shift, temperature, means)
    model = _unwrapped(model)
    head = model.get_output_embeddings()
    scoring.reason = _not_replaceable(model, head)
    transform = None
    if scoring.reason is None:
        transform, scoring.reason = _transform_of(model, head, means)
    if scoring.reason is not None:
        log_once(_LEFT, scoring.reason)
    token = _current.set(scoring)
    try:
        if transform is None:
            yield scoring
        else:
            with _replaced(head, scoring, transform):
                yield scoring
    finally:
        _current.reset(token)


def _unwrapped(model: Any) -> Any:
    for name in ("module", "_orig_mod"):
        while isinstance(getattr(model, name, None), nn.Module):
            model = getattr(model, name)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextlib.contextmanager
def _replaced(head: Any, scoring: ScoringHead, transform: LogitTransform) -> Iterator[None]:
    own_forward = head.forward

    def forward(hidden: Tensor, *args, **kwargs) -> Tensor:
        # the model may be run in another thread, or by another scoring_head, meanwhile
        if _current.get() is not scoring:
            return own_forward(hidden, *args, **kwargs)
        labels = scoring.labels
        scoring.reason = _not_scored(scoring, hidden, head)
        if scoring.reason is not None or labels is None:
            log_once(_LEFT, scoring.reason or "no labels")
            return own_forward(hidden, *args, **kwargs)
        return _score(scoring, hidden, labels, head, transform)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def _score(
    scoring: ScoringHead, hidden: Tensor, labels: Tensor, head: nn.Linear, transform: LogitTransform
) -> Tensor:
    weight, bias, precision = head_in_trls_dtype(hidden, head.weight, head.bias)
    with precision:
        logps = linear_token_logps(
            hidden,
            weight,
            labels,
            bias=bias,
            shift=scoring.shift,
            temperature=scoring.temperature,
            **transform._asdict(),
        )
    if scoring.means:
        with torch.no_grad():
            scoring.mean_logits = transform.logit_scale * mean_logits(hidden, weight, bias)
    scoring.logps, scoring.vocabulary = logps, weight.shape[0]
    # a copy: trainers write into their logits
    return logps.unsqueeze(-1).clone()


def _not_replaceable(model: Any, head: Any) -> str | None:
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, not a plain Linear"
    if "forward" in vars(head):
        return "the head's forward is replaced already"
    if not any(module is head for module in model.children()):
        return f"the head is not a {type(model).__name__}'s own, but one of a module inside it"
    return None


def _transform_of(
    model: Any, head: nn.Linear, means: bool
) -> tuple[LogitTransform | None, str | None]:
    """(what the model does to its logits, None), or (None, why it is not known)."""
    config = model.config.get_text_config()
    # a config may name what its model does to hidden states, before the head
    scales = dict.fromkeys((logit_scale_of(config), 1.0))
    caps = dict.fromkeys((*(getattr(config, name, None) or None for name in _SOFTCAPS), None))
    name = type(model).__name__
    try:
        candidates = itertools.starmap(LogitTransform, itertools.product(scales, caps))
        transform = transform_of_model(model, head, candidates)
    # a forward may raise whatever it likes where it does not find its modules
    except Exception as error:
        return None, f"what {name} does to its logits is unknown: {type(error).__name__}: {error}"
    if transform is None:
        return None, f"{name} does more to its logits than to scale and cap them"
    if means and transform.logit_softcap is not None:
        return None, "the mean of softcapped logits is logged, which needs them"
    return transform, None


def _not_scored(scoring: ScoringHead, hidden: Tensor, head: nn.Linear) -> str | None:
    if scoring.logps is not None:
        raise RuntimeError("the model ran its head twice in one forward, which is not supported")
    if scoring.labels is not None and hidden.shape[:-1] != scoring.labels.shape:
        # no shapes: every batch has others, and a reason is logged once
        return "the head is given other rows than there are labels for"
    if is_zero3(head.weight) or is_zero3(head.bias):
        # under DeepSpeed a head whose own forward makes the log-probs has not been run
        return "the head is sharded by ZeRO-3"
    return head_not_served(head.weight, head.bias)


def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[B]`` means of the logits ``h W' + b`` over positions and vocabulary, in float32.

    They are (mean h) . (mean row of W) + mean b: no logits are made.
    """
    mean_row = weight.mean(0, dtype=torch.float32)
    means = (hidden.mean(1, dtype=torch.float32) * mean_row).sum(-1)
    return means if bias is None else means + bias.float().mean()


def logit_scale_of(config) -> float:
    """What a model multiplies its logits by, before any softcap."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # hyperclovax multiplies by what granite and minicpm3 divide by
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)
