"""Transforms of functions: what has no rule for them raises, the rest is plain PyTorch."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels as dk
from tests.test_wrong_calls import EVERY, LOGPS, RIGHT


def of_transform(function: str):
    """The function of its first tensor alone, summed, and that tensor."""
    right = dict(RIGHT[function])
    name = next(iter(right))
    value = right.pop(name)

    def total(x):
        out = getattr(dk, function)(**right, **{name: x})
        return getattr(out, "loss", getattr(out, "logps", out)).sum()

    return name, total, value


@pytest.mark.parametrize("function", EVERY)
@pytest.mark.parametrize("transform", ("grad", "vmap", "jvp", "forward AD"))
def test_transforms_are_refused(function, transform):
    name, total, value = of_transform(function)
    with pytest.raises(TypeError, match=rf"^{name}: .*reference"):
        if transform == "grad":
            torch.func.grad(total)(value)
        elif transform == "vmap":
            torch.func.vmap(total)(value[None])
        elif transform == "jvp":
            torch.func.jvp(total, (value,), (value,))
        else:
            with torch.autograd.forward_ad.dual_level():
                total(torch.autograd.forward_ad.make_dual(value, value))


def test_transforms_of_preference_loss():
    """It is plain PyTorch."""

    def total(x):
        return dk.preference_loss(x, LOGPS, LOGPS, LOGPS, beta=0.5)[0].sum()

    assert torch.func.grad(total)(LOGPS).tolist() == [-0.25, -0.25]


@pytest.mark.parametrize("trainable", (False, True), ids=("frozen", "trainable"))
@pytest.mark.parametrize("function", ("token_logps", "linear_token_logps"))
def test_batched_gradients(function, trainable):
    """is_grads_batched gives the rows of the Jacobian, as one gradient after the other does."""
    rng = torch.Generator().manual_seed(0)
    arguments = {
        key: torch.randn(value.shape, generator=rng) if value.is_floating_point() else value
        for key, value in RIGHT[function].items()
    }
    leaf = arguments[next(iter(arguments))].requires_grad_()
    if trainable and "weight" in arguments:
        arguments["weight"].requires_grad_()
    out = getattr(dk, function)(**arguments)
    every = torch.eye(out.numel()).view(-1, *out.shape)
    together = torch.autograd.grad(out, leaf, every, is_grads_batched=True, retain_graph=True)[0]
    for grad_output, gradient in zip(every, together, strict=True):
        alone = torch.autograd.grad(out, leaf, grad_output, retain_graph=True)[0]
        torch.testing.assert_close(gradient, alone, rtol=1e-6, atol=1e-7)
