"""How often a call makes the host wait for the GPU: torch itself counts."""

from __future__ import annotations

import warnings

import pytest
import torch

import dpo_kernels
from dpo_kernels.dispatch import available_backends

pytestmark = pytest.mark.gpu
SEQUENCES, TOKENS, HIDDEN, VOCAB = 4, 9, 16, 1003


@pytest.fixture(params=["cuda", "triton", "torch"])
def backend(request):
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return request.param


def _waits(call) -> int:
    # what a process does once, such as loading a kernel, is no part of a call
    call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # torch also says, once, that it does not see every wait
    return sum("called a synchronizing" in str(one.message) for one in caught)


def _labels() -> torch.Tensor:
    labels = torch.randint(VOCAB, (SEQUENCES, TOKENS), device="cuda")
    labels[:, :2] = -100
    return labels


def test_torch_sees_a_wait():
    counted = torch.ones(3, device="cuda")
    assert _waits(lambda: counted.sum().item()) == 1


def test_from_logits_nobody_waits(backend):
    logits = torch.randn(SEQUENCES, TOKENS, VOCAB, device="cuda", requires_grad=True)
    labels, reference = _labels(), torch.randn(SEQUENCES // 2, device="cuda")

    def call():
        loss = dpo_kernels.dpo_loss(logits, labels, reference, reference, backend=backend).loss
        torch.autograd.grad(loss, logits)

    assert _waits(call) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reference", ["log-probs", "hidden states"])
# all rows enter, and no more than that
@pytest.mark.parametrize(
    "promised, waits", [(None, 1), (SEQUENCES * TOKENS, 0), (SEQUENCES * (TOKENS - 2), 0)]
)
def test_from_hidden_states_for_the_number_of_scored_tokens(
    backend, dtype, reference, promised, waits
):
    options = {"device": "cuda", "dtype": dtype}
    hidden = torch.randn(SEQUENCES, TOKENS, HIDDEN, **options, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, **options, requires_grad=True)
    labels = _labels()
    if reference == "log-probs":
        given = (torch.randn(SEQUENCES // 2, device="cuda"),) * 2
        named = {}
    else:
        given = ()
        named = {"reference_hidden": hidden.detach(), "reference_weight": weight.detach()}

    def call():
        loss = dpo_kernels.linear_dpo_loss(
            hidden, weight, labels, *given, **named, backend=backend, max_scored_tokens=promised
        ).loss
        torch.autograd.grad(loss, (hidden, weight))

    assert _waits(call) == waits


@pytest.mark.parametrize("promised, waits", [(None, 2), (SEQUENCES * (TOKENS - 2), 0)])
def test_a_loss_of_two_passes_waits_twice(backend, promised, waits):
    """The backward of a trainable head makes the logits again, here of a packed batch."""
    hidden = torch.randn(SEQUENCES * TOKENS, HIDDEN, device="cuda", requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device="cuda", requires_grad=True)
    bounds = torch.arange(0, SEQUENCES * TOKENS + 1, TOKENS, device="cuda")
    options = {"cu_seqlens": bounds, "backend": backend, "max_scored_tokens": promised}
    labels = _labels().flatten()

    def call():
        logps = dpo_kernels.linear_sequence_logps(hidden, weight, labels, **options)
        torch.autograd.grad(logps.sum(), (hidden, weight))

    assert _waits(call) == waits
