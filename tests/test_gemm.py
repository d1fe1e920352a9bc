"""The head's GEMMs on a GPU, as each release of torch allows them: no GPU and one torch needed.

torch.mm and torch.addmm are stood in for by functions that refuse what a release refuses and give
what it gives, read from aten/src/ATen/native/cuda/Blas.cpp and CUDABlas.cpp of each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import dpo_kernels as dk
from dpo_kernels import compat, reference
from dpo_kernels.linear import gemm, workspace
from tests.helpers import IGNORE, Target, eps
from tests.linear_helpers import CPU, gradient_error, logp_error, make_head, with_gradients

HALF = (torch.bfloat16, torch.float16)
# where dlogits are rounded before their GEMMs
GPU = Target("torch", "cuda")
AMPERE, TURING = (8, 0), (7, 5)


def _tf32(x: Tensor) -> Tensor:
    """As a matrix unit reads a float32: 10 of the 23 stored bits of the significand."""
    bits = x.contiguous().view(torch.int32) & ~((1 << 13) - 1)
    return bits.view(torch.float32)


@dataclass
class Release:
    """torch.mm and torch.addmm of a release, on a GPU of a compute capability."""

    version: tuple[int, int]
    capability: tuple[int, int] = AMPERE
    calls: list[tuple[str, torch.dtype, torch.dtype, bool]] = field(default_factory=list)

    def mm(self, a: Tensor, b: Tensor, *, out_dtype=None, out=None) -> Tensor:
        self._check(a, b, out_dtype, out)
        return self._run("mm", a, b, None, out_dtype, out)

    def addmm(self, added: Tensor, a: Tensor, b: Tensor, *, out_dtype=None, out=None) -> Tensor:
        self._check(a, b, out_dtype, out)
        if self.version < (2, 10) or out_dtype is None:
            assert added.dtype == b.dtype, f"self {added.dtype} and mat2 {b.dtype} must be equal"
        assert added.dtype in (out_dtype, a.dtype), "self dtype must match out_dtype or mat1 dtype"
        # cuBLASLt adds a vector in the wrong dtype, and 2.8 gives the result the vector's shape
        assert out_dtype is None or added.dim() == 2, "a vector is not added to a wider product"
        return self._run("addmm", a, b, added, out_dtype, out)

    def _check(self, a: Tensor, b: Tensor, out_dtype, out) -> None:
        assert a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0]
        assert a.dtype == b.dtype, f"expected the same dtype, got {a.dtype} and {b.dtype}"
        if out_dtype is not None:
            if self.version < (2, 8):
                raise TypeError("unexpected keyword argument 'out_dtype'")
            wider = out_dtype == torch.float32 and a.dtype in HALF
            assert out_dtype == a.dtype or wider, f"{a.dtype} to {out_dtype}"
            assert a.dtype != torch.bfloat16 or self.capability >= AMPERE, "sm_80 and later only"
        if out is not None:
            assert out.dtype == (out_dtype or a.dtype), f"out is {out.dtype}"
            assert out.shape == (a.shape[0], b.shape[1])

    def _run(self, name, a, b, added, out_dtype, out) -> Tensor:
        tf32 = a.dtype == torch.float32 and bool(torch.backends.cuda.matmul.allow_tf32)
        self.calls.append((name, a.dtype, out_dtype or a.dtype, tf32))
        if tf32 and self.capability >= AMPERE:
            a, b = _tf32(a), _tf32(b)
        result = a.double() @ b.double()
        if added is not None:
            result += added
        result = result.to(out_dtype or a.dtype)
        return result if out is None else out.copy_(result)


def _pretend(monkeypatch, release: Release) -> None:
    """CPU tensors take the ways of a GPU's, under a release of torch."""
    monkeypatch.setattr(torch, "mm", release.mm)
    monkeypatch.setattr(torch, "addmm", release.addmm)
    monkeypatch.setattr(gemm, "_device_type", lambda device: "cuda")
    monkeypatch.setattr(gemm, "mm_widens", lambda: release.version >= (2, 8))
    monkeypatch.setattr(gemm, "addmm_widens", lambda: release.version >= (2, 10))
    monkeypatch.setattr(gemm, "_capability", lambda device: release.capability)
    # so that the vocabulary of a test takes several chunks
    monkeypatch.setattr(workspace, "_CHUNK_COLUMNS", 16)


RELEASES = {
    "2.6": Release((2, 6)),
    "2.8": Release((2, 8)),
    "2.9": Release((2, 9)),
    "2.10": Release((2, 10)),
    "2.13": Release((2, 13)),
    "2.13 on sm_75": Release((2, 13), TURING),
    "2.6 on sm_75": Release((2, 6), TURING),
}


@pytest.fixture(params=RELEASES)
def release(request, monkeypatch) -> Release:
    made = RELEASES[request.param]
    made = Release(made.version, made.capability)
    _pretend(monkeypatch, made)
    return made


OPTIONS = [{"logit_softcap": 9.0}, {"precision": "fast"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["exact", "fast"])
@pytest.mark.parametrize("workspace_mb", [None, 0.004], ids=["one tile", "several tiles"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_every_release_takes_every_call(release, dtype, frozen, bias, workspace_mb, options):
    problem = make_head(CPU, dtype, frozen=frozen, bias=bias)
    before = torch.backends.cuda.matmul.allow_tf32
    ours, gradients = with_gradients(
        dk.linear_dpo_loss,
        problem,
        *problem.reference_logps,
        bias=problem.bias,
        workspace_mb=workspace_mb,
        backend="torch",
        **options,
    )
    assert release.calls and torch.backends.cuda.matmul.allow_tf32 == before
    wide = problem.to(torch.float64)
    fast = "precision" in options
    scoring = {} if fast else options
    truth, true_gradients = with_gradients(
        reference.linear_dpo_loss, wide, *wide.reference_logps, bias=wide.bias, **scoring
    )
    error = logp_error(problem, dtype)
    if fast:
        largest = (wide.hidden @ wide.weight.t()).abs().max().item() + 4
        error += 2 * eps(dtype) * largest
    tokens = problem.labels.shape[-1]
    for name in ("chosen_logps", "rejected_logps", "loss"):
        off = (getattr(ours, name).double() - getattr(truth, name)).abs().max()
        assert off <= tokens * error, name
    # as in test_linear.py: a pair weighs at most beta / P, a row of dlogits sums to at most 2
    rows = int((problem.labels != IGNORE).sum())
    slope = 0.1 / problem.reference_logps[0].shape[0]
    bounds = (2 * slope * wide.weight.abs().max(), rows * slope * wide.hidden.abs().max())
    for got, true, bound in zip(gradients, true_gradients, (*bounds, rows * slope), strict=False):
        others = torch.as_tensor(bound)
        allowed = gradient_error(true, others, GPU, dtype) + tokens * error * true.abs()
        if fast:
            allowed = allowed + error * others
        assert ((got.double() - true).abs() <= allowed).all()


def test_which_calls_a_release_gets(monkeypatch):
    """What runs where: the contracts leave a choice, speed does not."""
    expected = {
        # the sum of the weight's gradient in one call
        (2, 10): {("mm", torch.bfloat16, False), ("addmm", torch.bfloat16, False)},
        (2, 8): {("mm", torch.bfloat16, False)},
        # the gradient of hidden is in 16 bits everywhere
        (2, 6): {
            ("mm", torch.float32, True),
            ("addmm", torch.float32, True),
            ("mm", torch.bfloat16, False),
        },
    }
    for version, calls in expected.items():
        release = Release(version)
        with monkeypatch.context() as patches:
            _pretend(patches, release)
            problem = make_head(CPU, torch.bfloat16)
            with_gradients(
                dk.linear_dpo_loss,
                problem,
                *problem.reference_logps,
                bias=problem.bias,
                workspace_mb=0.004,
                backend="torch",
            )
        assert {(name, operands, tf32) for name, operands, _, tf32 in release.calls} == calls


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_tf32_holds_every_value_of_half_precision(dtype):
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    assert torch.equal(_tf32(values), values)


def test_a_converted_weight_takes_the_memory_of_one_chunk():
    weight = torch.randn(10, 3).bfloat16()
    chunks = [
        (rows.data_ptr(), rows.equal(weight[chunk].float()))
        for chunk, rows in gemm._chunks(weight, 4, torch.float32)
    ]
    # one address, and the right rows while they are there
    assert chunks == [(chunks[0][0], True)] * 3
    own = weight.float()
    assert [rows.data_ptr() for _, rows in gemm._chunks(own, 4, torch.float32)] == [
        own[start:].data_ptr() for start in (0, 4, 8)
    ]


def test_tf32_is_never_used_for_float32_heads(release):
    problem = make_head(CPU, torch.float32, bias=False)
    with_gradients(dk.linear_dpo_loss, problem, *problem.reference_logps, backend="torch")
    assert release.calls and not any(tf32 for *_, tf32 in release.calls)


def test_the_switch_is_restored_when_a_gemm_fails(monkeypatch):
    release = Release((2, 6))
    _pretend(monkeypatch, release)
    problem = make_head(CPU, torch.bfloat16)

    def fail(*args, **kwargs):
        assert torch.backends.cuda.matmul.allow_tf32
        raise MemoryError

    monkeypatch.setattr(torch, "mm", fail)
    with pytest.raises(MemoryError):
        dk.linear_token_logps(problem.hidden, problem.weight, problem.labels, backend="torch")
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    "version, mm, addmm",
    [("2.6.0+cu124", 0, 0), ("2.8.0", 1, 0), ("2.9.1", 1, 0), ("2.10.0a0+git1", 1, 1)],
)
def test_versions(monkeypatch, version, mm, addmm):
    monkeypatch.setattr(torch, "__version__", version)
    # the results of the installed version stay in the caches
    assert compat.mm_widens.__wrapped__() == bool(mm)
    assert compat.addmm_widens.__wrapped__() == bool(addmm)
