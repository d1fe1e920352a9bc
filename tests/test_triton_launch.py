"""What a launch allocates and leaves behind, what its programs do, and which pointers it may take.

The kernels run in Triton's interpreter, one program after the other.
"""

from __future__ import annotations

import gc
import os

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_kernels
from dpo_kernels import ops
from dpo_kernels.backends.batch import GradOutput, TokenBatch
from dpo_kernels.dispatch import available_backends
from tests.helpers import Target, make_problem, scored_rows

if available_backends()["triton"] is not None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter", allow_module_level=True)

from dpo_kernels.backends.triton import launch

INTERPRETER = Target("triton", "cpu")


class Allocations(TorchDispatchMode):
    """The storage of every tensor that an operator returns; with ``hold``, zeroed ones stay."""

    def __init__(self, hold=False):
        super().__init__()
        self.hold, self.storages, self.zeroed = hold, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.storages.append(StorageWeakRef(tensor.untyped_storage()))
        if self.hold and function is torch.ops.aten.zeros.default:
            self.zeroed.append(result)
        return result


def loss_of(problem, logits):
    return dpo_kernels.dpo_loss(
        logits,
        problem.labels,
        *problem.reference,
        cu_seqlens=problem.cu_seqlens,
        backend="triton",
    )


def dpo_forward(problem, logits) -> tuple[torch.Tensor, ...]:
    """What the op does, without the op: a dispatch mode does not see what happens inside of one."""
    options = (-100, True, 1.0, 0.0, 1.0, 0, 0, False, torch.cat(problem.reference), 0.1, 0.0, True)
    return ops.dpo_forward(logits, problem.labels, problem.cu_seqlens, *options, "triton")


@pytest.fixture(params=["whole rows", "split rows"])
def split(request, monkeypatch):
    """Rows of two segments, by one program or by two."""
    wanted = request.param == "split rows"
    monkeypatch.setattr(launch, "_splits", lambda batch, segments: wanted)
    return wanted


def test_nothing_that_a_call_allocates_outlives_it(split):
    problem = make_problem(INTERPRETER, vocab=40000, length=2, pairs=1)
    with Allocations() as allocated:
        out = dpo_forward(problem, problem.logits.detach())
    returned = {StorageWeakRef(tensor.untyped_storage()) for tensor in out}
    given = {StorageWeakRef(t.untyped_storage()) for t in (problem.logits, problem.labels)}
    made = [storage for storage in allocated.storages if storage not in given]
    # what is returned, the counters and for split rows the partial sums
    assert len(set(made) | returned) >= 5 + 1 + split
    del out
    # the interpreter leaves cycles
    gc.collect()
    assert [storage for storage in made if not storage.expired()] == []


def test_a_captured_launch_can_be_replayed(split, monkeypatch):
    """A graph replays the memset and the launch, on the memory and the arguments of its capture."""
    problem = make_problem(INTERPRETER, vocab=40000, length=2, pairs=1, scored=1.0)
    logits = problem.logits.detach().clone()
    kernel, launches = launch.forward_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            def run(*args, **flags):
                launches.append((grid, args, flags))
                kernel[grid](*args, **flags)

            return run

    monkeypatch.setattr(launch, "forward_kernel", Recorder())
    with Allocations(hold=True) as captured:
        _, seqs, _, _, loss = dpo_forward(problem, logits)
    monkeypatch.undo()
    assert len(launches) == 1
    ((grid, args, flags),) = launches
    assert len(captured.zeroed) == 1
    for seed in (1, 2):
        fresh = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
        logits.copy_(fresh)
        # eager work between two replays shares nothing with them
        expected = loss_of(problem, fresh)
        for counters in captured.zeroed:
            counters.zero_()
        kernel[grid](*args, **flags)
        assert torch.equal(loss, expected.loss)
        assert torch.equal(seqs[0, :1], expected.chosen_logps)


@pytest.mark.parametrize("packed", [False, True])
def test_tokens_that_nothing_scores_arrive_nowhere(packed, split, monkeypatch):
    """One atomic for a scored token (and one a segment of a split row), none for the others."""
    from triton.runtime.interpreter import InterpreterBuilder

    atomics = []
    original = InterpreterBuilder.create_atomic_rmw
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_atomic_rmw",
        lambda *args: atomics.append(args) or original(*args),
    )
    problem = make_problem(INTERPRETER, vocab=33000, pairs=2, length=8, packed=packed)
    out = loss_of(problem, problem.logits.detach())
    scored = int(scored_rows(problem, shift=True).sum())
    assert 0 < scored < problem.labels.numel()
    assert out.loss.isfinite()
    # sequences, pairs of sequences, pairs
    expected = scored * (1 + 2 * split) + 4 + 4 + 2
    assert len(atomics) == expected


def test_tokens_outside_all_sequences_are_zero():
    """cu_seqlens that neither begin at 0 nor end at the number of rows, as only a GPU lets pass."""
    from dpo_kernels.backends.batch import ForwardOutputs

    tokens, vocab = 3000, 5
    batch = TokenBatch(
        torch.randn(tokens, vocab),
        torch.zeros(tokens, dtype=torch.int64),
        torch.tensor([1100, 1102, 1105]),
        ignore_index=-100,
        shift=False,
    )
    out = ForwardOutputs(
        tokens=torch.full((3, tokens), torch.nan),
        stats=None,
        is_top1=None,
        seqs=torch.full((2, 2), torch.nan),
        counts=torch.full((2,), -1),
        losses=None,
        loss=None,
        average=False,
    )
    launch.launch_forward(batch, None, out)
    inside = torch.zeros(tokens, dtype=torch.bool)
    inside[1100:1105] = True
    assert not out.tokens[:, ~inside].any()
    assert torch.equal(out.counts, torch.tensor([2, 3]))
    truth = torch.log_softmax(batch.logits.double(), -1)[:, 0]
    sums = torch.stack([truth[1100:1102].sum(), truth[1102:1105].sum()])
    torch.testing.assert_close(out.seqs[0].double(), sums, rtol=1e-6, atol=1e-6)


# a gradient that is as aligned as the logits, one that is not, and one that is better aligned
@pytest.mark.parametrize("pads", [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_of_another_dtype_than_the_logits(dtype, pads):
    vocab = 4104
    problem = make_problem(INTERPRETER, vocab=vocab)
    wide, labels = problem.logits.detach(), problem.labels
    logits_pad, grad_pad = pads
    shape = wide.shape[:-1]
    logits = torch.empty(*shape, vocab + logits_pad)[..., :vocab].copy_(wide)
    batch = TokenBatch(logits, labels, None, ignore_index=-100, shift=True)
    logps = dpo_kernels.token_logps(logits, labels, shift=True, backend="triton")
    tokens = torch.ops.dpo_kernels.token_forward(
        logits, labels, None, -100, True, 1.0, 0.0, 1.0, 0, 0, False, "triton"
    )[0]
    assert torch.equal(tokens[0], logps.flatten())
    grad = torch.randn(labels.numel(), generator=torch.Generator().manual_seed(3))
    grad_output = GradOutput(grad, 1, "token", None)
    exact = torch.full((*shape, vocab), torch.nan)
    narrow = torch.full((*shape, vocab + grad_pad), torch.nan, dtype=dtype)[..., :vocab]
    launch.launch_backward(batch, tokens, grad_output, exact, True)
    launch.launch_backward(batch, tokens, grad_output, narrow, True)
    assert torch.equal(narrow, exact.to(dtype))


@pytest.mark.parametrize(
    ("dtypes", "offsets", "widest"),
    [
        ((torch.float32, torch.bfloat16), (0, 0), 4),
        ((torch.bfloat16, torch.float32), (0, 0), 4),
        ((torch.bfloat16, torch.bfloat16), (0, 0), 8),
        # 4 bytes past a boundary: one element of float32, two of bfloat16
        ((torch.float32, torch.bfloat16), (1, 0), 1),
        ((torch.float32, torch.bfloat16), (0, 2), 2),
    ],
)
def test_the_width_of_an_access_is_counted_in_each_tensors_own_elements(dtypes, offsets, widest):
    tensors = [
        torch.empty(8 + 2 * 64, dtype=dtype)[offset : offset + 128].view(2, 64)
        for dtype, offset in zip(dtypes, offsets, strict=True)
    ]
    assert launch._vector(64, *tensors) == widest
