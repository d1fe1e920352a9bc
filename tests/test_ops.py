"""The ops as torch sees them: schemas, fakes, mutations."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import dpo_kernels
from dpo_kernels import ops
from dpo_kernels.linear import ops as linear_ops
from dpo_kernels.linear.workspace import Needs
from dpo_kernels.losses import make_options
from tests.entries import packings
from tests.helpers import CPU, make_problem
from tests.linear_helpers import make_head

ROWS = (-100, True, 1.0, 0.0, 1.0, 0, 0)
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


@packings
@backends
def test_opcheck_of_a_head(backend, packed):
    problem = make_head(packed=packed)
    head = (*(x.detach() for x in problem.leaves), problem.labels, problem.cu_seqlens)
    options = (*ROWS, torch.float32, "exact", 1 << 20, backend, "", 0, 0, None)
    tests = ("test_schema", "test_faketensor")
    for stats, unit in ((True, False), (False, True)):
        args = (*head, *options, stats, unit)
        torch.library.opcheck(linear_ops.linear_tokens_op, args, test_utils=tests)
    tokens = linear_ops.linear_tokens_op(*head, *options, False, False)[0]
    for needs in ((True, True, True), (False, True, False)):
        args = (*head, *options, tokens, torch.ones_like(tokens[0]), *needs)
        torch.library.opcheck(linear_ops.linear_tokens_backward_op, args, test_utils=tests)
    needs = Needs(True, True, False)
    for pair, stats in (
        (make_options(ld_alpha=0.5, use_weighting=True), True),
        (make_options(), False),
    ):
        args = (*head, *options, None, problem.reference_hidden, None, None, stats, *pair, *needs)
        torch.library.opcheck(linear_ops.linear_dpo_op, args, test_utils=tests)


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


def test_meta_tensors():
    problem = make_head(bias=False)
    tensors = (*problem.leaves[:2], problem.labels, *problem.reference_logps)
    hidden, weight, *rest = (x.detach().to("meta") for x in tensors)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = dpo_kernels.linear_dpo_loss(hidden, weight, *rest).loss
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert [x.shape for x in gradients] == [hidden.shape, weight.shape] and loss.shape == ()
