"""Heads to fuzz with, and their gradients held to the oracle."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.fuzz import oracle
from tests.fuzz.compare import Scored, close, stored


def head_logits(batch, weight: Tensor, bias: Tensor | None, options: dict) -> tuple[Tensor, ...]:
    """(x W^T + b, the logits z, how far the z of a row may be off), [rows, V] in float64."""
    scale, softcap = options["logit_scale"], options["logit_softcap"]
    temperature, eps = batch.scoring["temperature"], batch.eps
    x, w = batch.rows, weight.detach().double()
    offset = w.new_zeros(()) if bias is None else bias.double()
    raw = x @ w.t() + offset
    size = (x.abs() @ w.abs().t() + offset.abs()).amax(-1)
    z = oracle.transformed(raw, scale, softcap, temperature)
    # a dot product of 12 rounded products, and the transform of it
    return raw, z, eps * 20 * size * scale / temperature + 4 * eps * z.abs().amax(-1)


class HeadProblem:
    """A head over a batch's hidden states, frozen or trainable, and what the oracle knows of it."""

    def __init__(self, batch, draw, backend: str):
        dtype = batch.x.dtype
        rng = torch.Generator().manual_seed(7)
        weight = torch.randn(batch.vocab, 12, generator=rng, dtype=torch.float64).to(dtype)
        self.weight = weight.requires_grad_(draw(st.booleans()))
        bias = torch.randn(batch.vocab, generator=rng, dtype=torch.float64).to(dtype)
        bias = bias if draw(st.booleans()) else None
        self.options = {
            "bias": bias,
            "logit_scale": draw(st.sampled_from((1.0, 1.0, 0.3))),
            "logit_softcap": draw(st.sampled_from((None, None, 5.0))),
            "workspace_mb": draw(st.sampled_from((None, 0.02))),
            "backend": backend,
        }
        self.batch, self.temperature = batch, batch.scoring["temperature"]
        self.raw, z, self.z_error = head_logits(batch, weight, bias, self.options)
        self.truth = Scored(batch, z, self.z_error)
        self.leaves = [leaf for leaf in (batch.x, weight) if leaf.requires_grad]

    def check_gradients(self, grads, slopes, slope_error) -> None:
        dtype, eps = self.batch.x.dtype, self.batch.eps
        x, w = self.batch.rows, self.weight.detach().double()
        scale, softcap = self.options["logit_scale"], self.options["logit_softcap"]
        g, error = self.truth.gradient(slopes, slope_error)
        inner = 1.0 if softcap is None else 1 - torch.tanh(self.raw * scale / softcap) ** 2
        factor = inner * scale / self.temperature
        g, error = g * factor, error * scale / self.temperature + 16 * eps * g.abs()
        if softcap is not None:
            # 1 - tanh^2 is off by what its argument is off
            error = error + g.abs() / factor.clamp(min=1e-30) * self.z_error[:, None] / softcap
        for name, grad, value, moved, terms in (
            ("dhidden", grads[0].reshape(x.shape), g @ w, error @ w.abs(), g.abs() @ w.abs()),
            ("dweight", grads[-1], g.t() @ x, error.t() @ x.abs(), g.abs().t() @ x.abs()),
        )[: len(self.leaves)]:
            roundings = max(eps * 64, 2 * torch.finfo(dtype).eps)
            close(name, grad, value, stored(value, moved + roundings * terms, dtype, 2))
