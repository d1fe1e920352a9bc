"""Captured once and replayed: a call's memory is its own, beside eager calls too."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels
from dpo_kernels.dispatch import available_backends

pytestmark = pytest.mark.gpu
# two rows of the larger vocabulary are split over blocks, whose counters a replay has to zero
SHAPES = [(4, 9, 1003), (2, 2, 128256)]


@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


def _batch(shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(shape[-1], shape[:2], generator=generator, device="cuda")
    labels[:, 0] = -100
    reference = torch.randn(shape[0], generator=generator, device="cuda")
    return logits, labels, reference


def _step(logits, labels, reference, backend):
    """(loss, chosen log-probs, gradient)."""
    logits = logits.detach().requires_grad_()
    output = dpo_kernels.dpo_loss(logits, labels, *reference.chunk(2), backend=backend)
    (gradient,) = torch.autograd.grad(output.loss, logits)
    return output.loss.detach(), output.chosen_logps, gradient


def _same_bits(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_replays_beside_eager_calls(backend, shape):
    static = _batch(shape, 0)
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        _step(*static, backend)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(*static, backend)
    side = torch.cuda.Stream()
    for seed in range(1, 6):
        batch = _batch(shape, seed)
        for place, value in zip(static, batch, strict=True):
            place.copy_(value)
        expected = _step(*batch, backend)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # a larger call at the same time: whatever was cached would be freed or shared by now
            beside = [_step(*_batch((8, 16, 50257), 0), backend) for _ in range(3)]
        graph.replay()
        _same_bits(captured, expected)
        torch.cuda.current_stream().wait_stream(side)
        _same_bits(beside[0], beside[-1])


@pytest.mark.parametrize("shape", SHAPES)
def test_reduce_overhead(backend, shape):
    def loss(logits, labels, chosen, rejected):
        return dpo_kernels.dpo_loss(logits, labels, chosen, rejected, backend=backend).loss

    compiled = torch.compile(loss, mode="reduce-overhead", fullgraph=True)
    for seed in range(5):
        logits, labels, reference = _batch(shape, seed)
        expected = _step(logits, labels, reference, backend)
        torch.compiler.cudagraph_mark_step_begin()
        leaf = logits.clone().requires_grad_()
        value = compiled(leaf, labels, *reference.chunk(2))
        (gradient,) = torch.autograd.grad(value, leaf)
        _same_bits((value.detach(), gradient), (expected[0], expected[2]))
