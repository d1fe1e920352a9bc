"""What comes with the logits: dtypes, strides, masks, temperature, references, instruction sets."""

from __future__ import annotations

import itertools

import pytest
import torch

import dpo_kernels
from dpo_kernels import reference
from dpo_kernels.dispatch import backend_module
from tests.entries import packings
from tests.helpers import (
    CPU,
    assert_rule,
    assert_same_bits,
    gradient_tolerance,
    make_problem,
    skip_if_refused,
)
from tests.test_parity import check_pairs, check_tokens, gradient


@packings
def test_shift_is_manual_slicing(target, packed):
    """The same bits as sliced logits and labels; the result is aligned with the labels."""
    problem = make_problem(target, length=6, packed=packed, seed=33)
    options = {"backend": target.backend}
    if packed:
        starts = problem.cu_seqlens[:-1]
        keep = torch.ones_like(problem.labels, dtype=torch.bool)
        keep[starts] = False
        rows = keep.nonzero().flatten() - 1
        lengths = problem.cu_seqlens.diff() - 1
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        ours = dpo_kernels.sequence_logps(
            problem.logits, problem.labels, cu_seqlens=problem.cu_seqlens, **options
        )
        sliced = dpo_kernels.sequence_logps(
            problem.logits[rows], problem.labels[keep], cu_seqlens=bounds, shift=False, **options
        )
    else:
        ours = dpo_kernels.token_logps(problem.logits, problem.labels, shift=True, **options)
        assert not ours[:, 0].any()
        ours = ours[:, 1:]
        sliced = dpo_kernels.token_logps(problem.logits[:, :-1], problem.labels[:, 1:], **options)
    if target.backend == "torch":
        assert torch.allclose(ours, sliced, rtol=1e-6)
    else:
        assert_same_bits(ours, sliced)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int16, torch.uint8, torch.int64))
@packings
def test_integer_dtypes(target, dtype, packed):
    problem = make_problem(target, vocab=11, packed=packed, scored=1.0, seed=34)
    layout = problem.layout
    options = {"backend": target.backend}
    expected = dpo_kernels.sequence_logps(problem.logits, problem.labels, **layout, **options)
    if packed:
        layout = {"cu_seqlens": problem.cu_seqlens.to(torch.int32)}
    labels = problem.labels.to(dtype)
    ours = dpo_kernels.sequence_logps(problem.logits, labels, **layout, **options)
    assert_same_bits(ours, expected)


def test_strided_labels_and_cu_seqlens(target):
    """Every other column of a wider tensor, a transposed one, an expanded row."""
    problem = make_problem(target, length=4, vocab=11, scored=0.8, seed=35)
    options = {"backend": target.backend}
    expected = dpo_kernels.sequence_logps(problem.logits, problem.labels, **options)
    wide = torch.full((4, 8), 10**9, device=target.device)
    wide[:, ::2] = problem.labels
    for labels in (wide[:, ::2], problem.labels.t().contiguous().t()):
        assert not labels.is_contiguous()
        assert_same_bits(dpo_kernels.sequence_logps(problem.logits, labels, **options), expected)
    row = problem.labels[:1]
    assert_same_bits(
        dpo_kernels.sequence_logps(problem.logits, row.expand(4, 4), **options),
        dpo_kernels.sequence_logps(problem.logits, row.repeat(4, 1), **options),
    )
    packed = make_problem(target, vocab=11, packed=True, seed=36)
    twice = packed.cu_seqlens.repeat_interleave(2)[::2]
    arguments = (packed.logits, packed.labels)
    assert_same_bits(
        dpo_kernels.sequence_logps(*arguments, cu_seqlens=twice, **options),
        dpo_kernels.sequence_logps(*arguments, cu_seqlens=packed.cu_seqlens, **options),
    )


@pytest.mark.parametrize("ignore_index", (-1, 0, 3, 10**6, -(2**40)))
@packings
def test_ignore_index(target, ignore_index, packed):
    """Any integer; one that is a class hides that class."""
    problem = make_problem(target, vocab=11, packed=packed, seed=37)
    labels = problem.labels.masked_fill(problem.labels == ignore_index, -100)
    renamed = labels.masked_fill(labels == -100, ignore_index)
    options = {**problem.layout, "average_log_prob": True, "backend": target.backend}
    expected = dpo_kernels.sequence_logps(problem.logits, labels, **options)
    ours = dpo_kernels.sequence_logps(problem.logits, renamed, ignore_index=ignore_index, **options)
    assert_same_bits(ours, expected)
    refs = problem.reference
    out = [
        dpo_kernels.dpo_loss(
            problem.logits, x, *refs, ignore_index=i, loss_type="ipo", backend=target.backend,
            **problem.layout,
        ).loss
        for x, i in ((labels, -100), (renamed, ignore_index))
    ]  # fmt: skip
    assert_same_bits(*out)


@packings
def test_non_unit_last_stride(target, packed):
    """Copied, and still right, gradient included."""
    problem = make_problem(target, vocab=11, packed=packed, seed=38)
    expected = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *problem.reference, backend=target.backend, **problem.layout
    )
    wanted = gradient(problem, expected.loss)
    values = problem.logits.detach()
    for logits in (
        values.transpose(-1, -2).contiguous().transpose(-1, -2),
        values.repeat_interleave(2, dim=-1)[..., ::2],
    ):
        assert logits.stride(-1) != 1
        logits.requires_grad_()
        out = dpo_kernels.dpo_loss(
            logits, problem.labels, *problem.reference, backend=target.backend, **problem.layout
        )
        assert_same_bits(out.loss, expected.loss)
        assert_same_bits(torch.autograd.grad(out.loss, logits)[0], wanted)


def test_tokens_of_any_number_of_dimensions(target):
    """[T, V], [A, B, T, V]: the rows are those of the flattened call."""
    flat = make_problem(target, pairs=3, length=4, vocab=11, seed=39)
    expected = dpo_kernels.token_logps(flat.logits, flat.labels, shift=True, backend=target.backend)
    deep = dpo_kernels.token_stats(
        flat.logits.unflatten(0, (3, 2)),
        flat.labels.unflatten(0, (3, 2)),
        shift=True,
        backend=target.backend,
    )
    assert all(value.shape == (3, 2, 4) for value in deep)
    assert_same_bits(deep.logps.flatten(0, 1), expected)
    row = dpo_kernels.token_logps(
        flat.logits[1], flat.labels[1], shift=True, backend=target.backend
    )
    assert_same_bits(row, expected[1])
    check_tokens(target, flat)


@pytest.mark.parametrize("temperature", (0.5, 2.0))
def test_temperature_of_a_pair(target, temperature):
    """Of policy and reference alike; powers of two, so that dividing rounds nothing."""
    problem = make_problem(target, vocab=11, seed=40)
    other = torch.randn_like(problem.logits)
    ours = dpo_kernels.dpo_loss(
        problem.logits,
        problem.labels,
        reference_logits=other,
        temperature=temperature,
        backend=target.backend,
    )
    wide = problem.double()
    truth = reference.dpo_loss(
        wide.logits / temperature,
        wide.labels,
        reference_logits=other.double() / temperature,
    )
    assert ours.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    grads = gradient(problem, ours.loss), gradient(wide, truth.loss)
    tolerance = gradient_tolerance(grads[1], target, torch.float32, 11, c_error=1e-5)
    assert_rule("gradient", grads[0], grads[1], grads[1], tolerance)


@packings
def test_reference_logits_are_reference_log_probs(target, packed):
    """And carry no gradient, even where they could."""
    problem = make_problem(target, vocab=11, packed=packed, seed=41)
    other = torch.randn_like(problem.logits).requires_grad_()
    options = {**problem.layout, "backend": target.backend}
    given = dpo_kernels.sequence_logps(other, problem.labels, **options)
    a = dpo_kernels.dpo_loss(problem.logits, problem.labels, reference_logits=other, **options)
    b = dpo_kernels.dpo_loss(problem.logits, problem.labels, *given.chunk(2), **options)
    assert_same_bits(a.losses, b.losses)
    for out in (a, b):
        grads = torch.autograd.grad(out.loss, (problem.logits, other), allow_unused=True)
        assert grads[0].any() and grads[1] is None


def test_float64_references_of_float32_logits(target):
    """Log-probs cached in another dtype are taken to that of the results."""
    problem = make_problem(target, vocab=11, seed=42)
    for dtype in (torch.float64, torch.float16):
        refs = [x.to(dtype) for x in problem.reference]
        out = dpo_kernels.dpo_loss(problem.logits, problem.labels, *refs, backend=target.backend)
        same = [x.float() for x in refs]
        expected = dpo_kernels.dpo_loss(
            problem.logits, problem.labels, *same, backend=target.backend
        )
        assert_same_bits(out.losses, expected.losses)


@pytest.fixture
def instruction_set():
    """Chooses the CPU kernels' instruction set, and puts the best one back."""
    module = backend_module("cpu").MODULE
    yield module.cpu_set_isa
    module.cpu_set_isa(None)


@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512"))
@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str
)
def test_instruction_sets(instruction_set, isa, dtype):
    """Each of the three in the binary; 1031 leaves a remainder to every vector width."""
    if not instruction_set(isa):
        pytest.skip(f"this CPU has no {isa}")
    assert backend_module("cpu").MODULE.cpu_isa() == isa
    for vocab in (3, 1031):
        problem = make_problem(dtype=dtype, vocab=vocab, layout="sliced vocabulary", seed=46)
        check_tokens(CPU, problem)
        check_pairs(CPU, problem)


@pytest.mark.parametrize(
    "dtypes", [*itertools.permutations((torch.float64, torch.float32, torch.bfloat16), 2)], ids=str
)
def test_reference_logits_of_another_dtype(target, dtypes):
    """The kernel of the policy's dtype reads the log-probs that the reference's left."""
    for dtype in dtypes:
        skip_if_refused(target, dtype)
    policy = make_problem(target, dtypes[0])
    other = torch.randn_like(policy.logits, dtype=dtypes[1]).detach()
    out, expected = (
        function(policy.logits, policy.labels, reference_logits=other, **options)
        for function, options in (
            (dpo_kernels.dpo_loss, {"backend": target.backend}),
            (reference.dpo_loss, {}),
        )
    )
    assert out.loss.dtype == policy.reference[0].dtype
    assert torch.allclose(out.losses.double(), expected.losses.double(), rtol=1e-5)
