"""A model's own head made to return the log-probs of given labels, so that no logits are made.

For trainers that call the whole model and score its logits afterwards. The log-probs are made
inside the head's forward: whatever gathers, shards or casts around that call still does.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import linear_token_logps
from ..linear.sharded import is_zero3
from .trl import head_in_trls_dtype, head_not_served, log_once


class ScoringHead:
    """What the head was asked and what it found; None while, or where, it makes logits instead."""

    def __init__(self, labels: Tensor | None, shift: bool, temperature: float, means: bool):
        self.labels = labels
        self.shift = shift
        self.temperature = temperature
        self.means = means
        self.logps: Tensor | None = None  # like labels, float32, 0 where nothing is scored
        self.mean_logits: Tensor | None = None  # [B], over positions and vocabulary
        self.reason: str | None = None


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
    what walks the outputs (DDP); the results are in the ScoringHead. A head that cannot be served
    (a quantised or adapted one, ZeRO-3 and FSDP2 shards) makes its logits as ever, with one
    logged reason.

    Args:
        model: the Hugging Face model, unwrapped.
        labels: as in token_logps; may be set on the ScoringHead until the head runs.
        means: mean_logits is wanted too, which a softcapped head cannot give without its logits.
    """
    scoring = ScoringHead(labels, shift, temperature, means)
    head = model.get_output_embeddings()
    scoring.reason = _not_replaceable(model, head, means)
    if scoring.reason is not None:
        log_once("dpo_kernels leaves a head to its model", scoring.reason)
        yield scoring
        return
    config = model.config.get_text_config()
    scaling = {
        "logit_scale": logit_scale_of(config),
        "logit_softcap": getattr(config, "final_logit_softcapping", None),
    }
    own_forward = head.forward

    def forward(hidden: Tensor, *args, **kwargs) -> Tensor:
        labels = scoring.labels
        scoring.reason = _not_scored(scoring, hidden, head)
        if scoring.reason is not None or labels is None:
            log_once("dpo_kernels leaves a head to its model", scoring.reason or "no labels")
            return own_forward(hidden, *args, **kwargs)
        return _score(scoring, hidden, labels, head, scaling)

    head.forward = forward
    token = _current.set(scoring)
    try:
        yield scoring
    finally:
        _current.reset(token)
        del head.forward


def _score(
    scoring: ScoringHead, hidden: Tensor, labels: Tensor, head: nn.Linear, scaling: dict
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
            **scaling,
        )
    if scoring.means:
        with torch.no_grad():
            scoring.mean_logits = scaling["logit_scale"] * mean_logits(hidden, weight, bias)
    scoring.logps = logps
    # a copy: trainers write into their logits
    return logps.unsqueeze(-1).clone()


def _not_replaceable(model: Any, head: Any, means: bool) -> str | None:
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, not a plain Linear"
    if "forward" in vars(head):
        return "the head's forward is replaced already"
    config = model.config.get_text_config()
    if means and getattr(config, "final_logit_softcapping", None):
        return "the mean of softcapped logits is logged, which needs them"
    return None


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
