"""References to draw: none, log-probs, or another model's logits or hidden states."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz.compare import Scored, scored, sequence_logps
from tests.fuzz.heads import HeadProblem, head_logits
from tests.fuzz.strategies import UNREFERENCED, Batch, names_of, strided


class Reference(NamedTuple):
    keywords: dict
    logps: Tensor  # [2P] in float64
    error: Tensor


def draw_reference(draw, batch: Batch, loss: dict, pair: dict, head: HeadProblem | None):
    """``head``: the policy's, for a batch of hidden states."""
    pairs = (len(batch.bounds) - 1) // 2
    none = torch.zeros(2 * pairs, dtype=torch.float64)
    if set(names_of(loss)) <= set(UNREFERENCED):
        return Reference({}, none, none)
    kind = draw(st.sampled_from(("free", "log-probs", "model")))
    if kind == "free":
        return Reference({"reference_free": True}, none, none)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if kind == "log-probs":
        values = 3 * torch.randn(2 * pairs, generator=rng, dtype=torch.float64) - 8
        wide = torch.promote_types(batch.x.dtype, torch.float32)
        values = values.to(draw(st.sampled_from((torch.float32, wide))))
        names = ("reference_chosen_logps", "reference_rejected_logps")
        keywords = dict(zip(names, values.chunk(2), strict=True))
        return Reference(keywords, values.double(), none)
    if head is None:
        other = _like(draw, batch, rng, (torch.float32, torch.bfloat16, torch.float16))
        truth, keywords = scored(other), {"reference_logits": other.x}
    else:
        truth, keywords = _of_hidden(draw, batch, rng, head)
    return Reference(keywords, *sequence_logps(truth, pair))


def _like(draw, batch: Batch, rng, dtypes) -> Batch:
    """Other values for the same labels, perhaps of another dtype."""
    dtype = batch.x.dtype
    values = torch.randn(batch.x.shape, generator=rng, dtype=torch.float64)
    values *= draw(st.sampled_from((0.0, 1.0, 10.0)))
    if dtype != torch.float64:
        dtype = draw(st.sampled_from((dtype, *dtypes)))
    return replace(batch, x=draw(strided(values.to(dtype))))


def _of_hidden(draw, batch: Batch, rng, head: HeadProblem) -> tuple[Scored, dict]:
    """Under the policy's head, or one of its own."""
    if draw(st.booleans()):
        other = _like(draw, batch, rng, (batch.x.dtype,))
        weight, bias = head.weight.detach(), head.options["bias"]
        keywords = {"reference_hidden": other.x}
    else:
        other = _like(draw, batch, rng, (torch.float32, torch.bfloat16))
        width = batch.x.shape[-1]
        weight = torch.randn(batch.vocab, width, generator=rng, dtype=torch.float64)
        weight, bias = weight.to(other.x.dtype), None
        keywords = {"reference_hidden": other.x, "reference_weight": weight}
        if draw(st.booleans()):
            bias = torch.randn(batch.vocab, generator=rng, dtype=torch.float64).to(other.x.dtype)
            keywords["reference_bias"] = bias
    _, z, z_error = head_logits(other, weight, bias, head.options)
    return Scored(other, z, z_error), keywords
