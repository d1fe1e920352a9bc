"""Random calls: shapes, layouts, strides, dtypes, default dtypes, magnitudes, masks, losses."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import dpo_kernels as dk
from tests.fuzz import oracle
from tests.fuzz.compare import (
    Pairs,
    Scored,
    check_logits_gradient,
    check_output,
    check_sequences,
    check_tokens,
    close,
    scored,
    stored,
)
from tests.fuzz.strategies import (
    DTYPES,
    UNREFERENCED,
    batches,
    default_dtype,
    loss_options,
    names_of,
    pair_options,
)

# 200 examples, the same every run; python -m tests.fuzz asks for others, and more of them
EXAMPLES = int(os.environ.get("DPO_KERNELS_FUZZ_EXAMPLES", "0"))


def fuzz(examples: int):
    """``examples``: this property's share of the 200."""
    return settings(
        derandomize=not EXAMPLES,
        max_examples=EXAMPLES or examples,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate] + [Phase.shrink] * bool(EXAMPLES),
        # a fixture that poisons memory is set up once for all examples: it holds no state
        suppress_health_check=list(HealthCheck),
    )


backends = st.sampled_from(("cpu", "cpu", "torch"))
defaults = st.sampled_from(DTYPES)


@fuzz(50)
@given(batch=batches(pairs=False), backend=backends, default=defaults)
def test_tokens(batch, backend, default):
    with default_dtype(default):
        check_tokens(batch, backend)


@fuzz(30)
@given(batch=batches(pairs=False), backend=backends, default=defaults, average=st.booleans())
def test_sequences(batch, backend, default, average):
    with default_dtype(default):
        check_sequences(batch, backend, average)


def references(draw, loss: dict, pairs: int, dtype: torch.dtype):
    """(keywords, [2P] in float64): log-probs, or none for a reference-free call."""
    needless = set(names_of(loss)) <= set(UNREFERENCED)
    if draw(st.booleans()) if not needless else True:
        keywords = {} if needless else {"reference_free": True}
        return keywords, torch.zeros(2 * pairs, dtype=torch.float64)
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    values = (3 * torch.randn(2 * pairs, generator=rng, dtype=torch.float64) - 8).to(
        draw(st.sampled_from((torch.float32, torch.promote_types(dtype, torch.float32))))
    )
    names = ("reference_chosen_logps", "reference_rejected_logps")
    return dict(zip(names, values.chunk(2), strict=True)), values.double()


@fuzz(70)
@given(
    batch=batches(),
    backend=backends,
    default=defaults,
    loss=loss_options(),
    pair=pair_options,
    data=st.data(),
)
def test_dpo_loss(batch, backend, default, loss, pair, data):
    pairs = (len(batch.bounds) - 1) // 2
    given_refs, refs = references(data.draw, loss, pairs, batch.x.dtype)
    truth = scored(batch)
    wanted = Pairs(truth, refs, torch.zeros_like(refs), loss, pair)
    assume(wanted.usable(loss))
    inplace = data.draw(st.booleans())
    logits = batch.x * 1 if inplace else batch.x
    with default_dtype(default):
        output = dk.dpo_loss(
            logits,
            batch.labels,
            **given_refs,
            cu_seqlens=batch.cu_seqlens,
            **batch.scoring,
            **loss,
            **pair,
            inplace_backward=inplace,
            backend=backend,
        )
        check_output(output, wanted, pair["reduction"])
        assume(wanted.sorted_apart(loss))
        (grad,) = torch.autograd.grad(output.loss.sum(), batch.x)
    check_logits_gradient(batch, truth, grad, wanted.derivatives, wanted.derivative_error)


@fuzz(50)
@given(
    batch=batches(dtypes=(torch.float32, torch.float64, torch.bfloat16), width=12, wild=False),
    backend=backends,
    default=defaults,
    loss=loss_options(),
    pair=pair_options,
    data=st.data(),
)
def test_linear_dpo_loss(batch, backend, default, loss, pair, data):
    """Frozen and trainable heads, with bias, scale and softcap, in one tile or many."""
    dtype, eps = batch.x.dtype, batch.eps
    rng = torch.Generator().manual_seed(7)
    weight = torch.randn(batch.vocab, 12, generator=rng, dtype=torch.float64).to(dtype)
    weight.requires_grad_(data.draw(st.booleans()))
    bias = torch.randn(batch.vocab, generator=rng, dtype=torch.float64).to(dtype)
    bias = bias if data.draw(st.booleans()) else None
    head = {
        "bias": bias,
        "logit_scale": data.draw(st.sampled_from((1.0, 1.0, 0.3))),
        "logit_softcap": data.draw(st.sampled_from((None, None, 5.0))),
        "workspace_mb": data.draw(st.sampled_from((None, 0.02))),
        "backend": backend,
    }
    x, w = batch.rows, weight.detach().double()
    raw = x @ w.t() + (0 if bias is None else bias.double())
    size = (x.abs() @ w.abs().t() + (0 if bias is None else bias.double().abs())).amax(-1)
    temperature = batch.scoring["temperature"]
    z = oracle.transformed(raw, head["logit_scale"], head["logit_softcap"], temperature)
    # a dot product of 12 rounded products, and the transform of it
    z_error = eps * 20 * size * head["logit_scale"] / temperature + 4 * eps * z.abs().amax(-1)
    truth = Scored(batch, z, z_error)
    pairs = (len(batch.bounds) - 1) // 2
    given_refs, refs = references(data.draw, loss, pairs, dtype)
    wanted = Pairs(truth, refs, torch.zeros_like(refs), loss, pair)
    assume(wanted.usable(loss))
    with default_dtype(default):
        output = dk.linear_dpo_loss(
            batch.x,
            weight,
            batch.labels,
            **given_refs,
            **head,
            cu_seqlens=batch.cu_seqlens,
            **batch.scoring,
            **loss,
            **pair,
        )
        check_output(output, wanted, pair["reduction"])
        assume(wanted.sorted_apart(loss))
        leaves = [leaf for leaf in (batch.x, weight) if leaf.requires_grad]
        grads = torch.autograd.grad(output.loss.sum(), leaves)
    g, error = truth.gradient(wanted.derivatives, wanted.derivative_error)
    softcap = head["logit_softcap"]
    inner = 1.0 if softcap is None else 1 - torch.tanh(raw * head["logit_scale"] / softcap) ** 2
    factor = inner * head["logit_scale"] / temperature
    g, error = g * factor, error * head["logit_scale"] / temperature + 16 * eps * g.abs()
    if softcap is not None:
        # 1 - tanh^2 is off by what its argument is off
        error = error + g.abs() / factor.clamp(min=1e-30) * z_error[:, None] / softcap
    for name, grad, value, moved, terms in (
        ("dhidden", grads[0].reshape(x.shape), g @ w, error @ w.abs(), g.abs() @ w.abs()),
        ("dweight", grads[-1], g.t() @ x, error.t() @ x.abs(), g.abs().t() @ x.abs()),
    )[: len(leaves)]:
        roundings = max(eps * 64, 2 * torch.finfo(dtype).eps)
        close(name, grad, value, stored(value, moved + roundings * terms, dtype, 2))


@fuzz(20)
@given(batch=batches(), threads=st.integers(1, 4), loss=loss_options(), inplace=st.booleans())
def test_bits(batch, threads, loss, inplace):
    """Threads, in-place use and the memory that logits lie in change no bit."""
    before = torch.get_num_threads()
    free = not set(names_of(loss)) <= set(UNREFERENCED)

    def gradient(x, inplace):
        x = x.detach().requires_grad_()
        out = dk.dpo_loss(
            x * 1 if inplace else x,
            batch.labels,
            cu_seqlens=batch.cu_seqlens,
            reference_free=free,
            inplace_backward=inplace,
            backend="cpu",
            **batch.scoring,
            **loss,
        )
        return out.losses, torch.autograd.grad(out.loss, x)[0]

    expected = gradient(batch.x, False)
    try:
        torch.set_num_threads(threads)
        for x in (batch.x, batch.x.contiguous()):
            for ours, wanted in zip(gradient(x, inplace), expected, strict=True):
                assert torch.equal(ours.nan_to_num(7.0), wanted.nan_to_num(7.0))
    finally:
        torch.set_num_threads(before)
