"""The ops as torch sees them: schemas, fakes, compiled graphs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves, tree_map_only

import dpo_kernels
from dpo_kernels import ops
from tests.helpers import CPU, make_problem
from tests.test_parity import gradient

ROWS = (-100, True, 1.0, 0.0, 1.0)
packings = pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
backends = pytest.mark.parametrize("backend", ("cpu", "torch"))
dtypes = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16")
)


def batch_arguments(dtype, packed):
    problem = make_problem(CPU, dtype, packed=packed)
    return problem, (problem.logits.detach(), problem.labels, problem.cu_seqlens, *ROWS)


def upstream_arguments(problem, batch, backend):
    """Every kind of upstream gradient, with what a forward left for it."""
    tokens, seqs, _ = ops.sequence_forward_op(*batch, False, backend)
    n, num_seqs = problem.labels.numel(), seqs.shape[1]
    yield torch.randn(n), "token", None, tokens
    yield torch.randn(num_seqs), "sequence", seqs[1], tokens
    yield torch.randn(num_seqs // 2), "pair", seqs[1], tokens
    yield torch.tensor(1.5), "pair", seqs[1], tokens


@backends
@packings
@dtypes
def test_opcheck_forward(backend, packed, dtype):
    problem, batch = batch_arguments(dtype, packed)
    for stats in (False, True):
        torch.library.opcheck(ops.token_forward_op, (*batch, stats, backend))
    for average in (False, True):
        torch.library.opcheck(ops.sequence_forward_op, (*batch, average, backend))
    for reference in (None, torch.cat(problem.reference)):
        pair = (False, reference, 0.1, 0.1, True)
        torch.library.opcheck(ops.dpo_forward_op, (*batch, *pair, backend))


@backends
@packings
@dtypes
def test_opcheck_backward(backend, packed, dtype):
    problem, batch = batch_arguments(dtype, packed)
    for upstream in upstream_arguments(problem, batch, backend):
        torch.library.opcheck(ops.backward_op, (*batch, *upstream, backend))
        logits = batch[0].clone()
        torch.library.opcheck(ops.backward_inplace_op, (logits, *batch[1:], *upstream, backend))


@backends
@pytest.mark.parametrize("layout", ("contiguous", "sliced vocabulary"))
def test_fakes_match(backend, layout):
    """Shapes, dtypes and strides of every fake output are those of the real one."""
    problem = make_problem(layout=layout)
    batch = (problem.logits.detach(), problem.labels, None, *ROWS)
    mode = torch._subclasses.FakeTensorMode()
    upstream = next(iter(upstream_arguments(problem, batch, backend)))
    refs = torch.cat(problem.reference)
    calls = (
        (ops.token_forward_op, (*batch, True, backend)),
        (ops.sequence_forward_op, (*batch, True, backend)),
        (ops.dpo_forward_op, (*batch, False, refs, 0.1, 0.0, True, backend)),
        (ops.backward_op, (*batch, *upstream, backend)),
    )
    for op, arguments in calls:
        real = op(*arguments)
        with mode:
            fake = op(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
        for a, b in zip(tree_leaves(real), tree_leaves(fake), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


FUNCTIONS = {
    "dpo_loss": lambda p, **o: dpo_kernels.dpo_loss(p.logits, p.labels, *p.reference, **o).loss,
    "ipo": lambda p, **o: dpo_kernels.dpo_loss(
        p.logits, p.labels, *p.reference, loss_type="ipo", **o
    ).loss,
    "none": lambda p, **o: dpo_kernels.dpo_loss(
        p.logits, p.labels, *p.reference, reduction="none", label_smoothing=0.1, **o
    ).loss.sum(),
    "sequence_logps": lambda p, **o: dpo_kernels.sequence_logps(p.logits, p.labels, **o).sum(),
    "token_logps": lambda p, **o: dpo_kernels.token_logps(p.logits, p.labels, **o).sum(),
    "token_stats": lambda p, **o: dpo_kernels.token_stats(p.logits, p.labels, **o).logps.sum(),
}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "cpu") for name in FUNCTIONS), ("dpo_loss", "torch")]
)
def test_compile_fullgraph(fresh_dynamo, backend, name):
    """Forward and backward in one graph each, equal to eager, over ten shapes of batches.

    At most one recompilation, from the first static shapes to dynamic ones; more would be one a
    sequence length.
    """
    counter = CompileCounterWithBackend("aot_eager")
    function = FUNCTIONS[name]
    compiled = torch.compile(
        lambda logits, labels, refs, **options: function(_View(logits, labels, refs), **options),
        fullgraph=True,
        backend=counter,
    )
    for n in range(10):
        problem = make_problem(pairs=2 + n % 4, length=3 + n, vocab=11, seed=n)
        out = compiled(problem.logits, problem.labels, problem.reference, backend=backend)
        expected = function(problem, backend=backend)
        assert torch.allclose(out, expected, rtol=1e-6)
        assert torch.allclose(gradient(problem, out), gradient(problem, expected), atol=1e-7)
    assert counter.frame_count <= 2


class _View:
    """What FUNCTIONS read of a Problem."""

    def __init__(self, logits, labels, reference):
        self.logits, self.labels, self.reference = logits, labels, reference


def test_compile_packed(fresh_dynamo):
    """cu_seqlens of changing length, and so ever other numbers of sequences and rows."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(logits, labels, cu_seqlens, chosen, rejected):
        out = dpo_kernels.dpo_loss(
            logits, labels, chosen, rejected, cu_seqlens=cu_seqlens, backend="cpu"
        )
        return out.loss, out.metrics()

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for n in range(10):
        problem = make_problem(pairs=2 + n, length=3 + n, vocab=11, packed=True, seed=n)
        arguments = (problem.logits, problem.labels, problem.cu_seqlens, *problem.reference)
        (out, metrics), (expected, wanted) = compiled(*arguments), loss(*arguments)
        assert torch.allclose(out, expected)
        assert torch.equal(gradient(problem, out), gradient(problem, expected))
        assert all(torch.allclose(metrics[k], wanted[k]) for k in wanted)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo"))
def test_compile_dynamic(fresh_dynamo, loss_type):
    """dynamic=True makes symbols of floats too, beta among them."""

    def loss(logits, labels, chosen, rejected, beta):
        return dpo_kernels.dpo_loss(
            logits, labels, chosen, rejected, beta=beta, loss_type=loss_type, backend="cpu"
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for pairs, length, beta in ((2, 4, 0.1), (3, 6, 0.3)):
        problem = make_problem(pairs=pairs, length=length, vocab=11)
        arguments = (problem.logits, problem.labels, *problem.reference, beta)
        out, expected = compiled(*arguments), loss(*arguments)
        assert torch.allclose(out, expected)
        assert torch.allclose(gradient(problem, out), gradient(problem, expected))


def test_compile_in_place(fresh_dynamo):
    """The head is inside the graph, as in a compiled trainer; the gradient is that of eager."""
    problem = make_problem(vocab=11)
    weight = torch.randn(11, 6, requires_grad=True)
    hidden = torch.randn(4, 4, 6)

    def loss(hidden, labels, chosen, rejected):
        logits = hidden @ weight.t()
        return dpo_kernels.dpo_loss(
            logits, labels, chosen, rejected, inplace_backward=True, backend="cpu"
        ).loss

    arguments = (hidden, problem.labels, *problem.reference)
    out = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.allclose(out, loss(*arguments))
    grads = [torch.autograd.grad(x, weight)[0] for x in (out, loss(*arguments))]
    assert torch.allclose(*grads, atol=1e-6)


def test_compile_inductor(fresh_dynamo):
    """Once through code generation, with a loss on top that inductor writes itself."""
    problem = make_problem(vocab=11)

    def loss(logits, labels, chosen, rejected):
        return dpo_kernels.dpo_loss(
            logits * 2.0, labels, chosen, rejected, loss_type="hinge", backend="cpu"
        ).loss

    arguments = (problem.logits, problem.labels, *problem.reference)
    out, expected = torch.compile(loss, fullgraph=True)(*arguments), loss(*arguments)
    assert torch.allclose(out, expected, rtol=1e-6)
    assert torch.allclose(gradient(problem, out), gradient(problem, expected), atol=1e-7)


@pytest.mark.parametrize("device", ("CPU", "CUDA", "MPS", "XPU", "PrivateUse1"))
def test_ops_reach_every_device(device):
    """The torch backend serves what no kernel does."""
    for name in (
        *("token_forward", "sequence_forward", "dpo_forward", "backward", "backward_"),
        *("linear_tokens", "linear_tokens_backward", "linear_dpo"),
    ):
        name = f"dpo_kernels::{name}"
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, device)


def test_in_place_op_declares_its_mutation():
    schema = ops.backward_inplace_op._schema
    mutated = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert mutated == ["logits"] and not schema.returns
    for op in (ops.token_forward_op, ops.sequence_forward_op, ops.dpo_forward_op, ops.backward_op):
        assert not any(a.alias_info for a in op._schema.arguments)
