"""What a call sends to a GPU: every kernel of ours, every torch op that launches one, every wait.

CPU tensors stand for a GPU's: the head's GEMMs take a GPU's ways, a module that only counts stands
for the backend, and nobody looks at the values of labels. What a GPU alone does is left out: two
ops on cu_seqlens of a packed batch, and what torch's ops or the allocator do inside.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_kernels as dk
from dpo_kernels import ops
from dpo_kernels.backends import torch as torch_backend
from dpo_kernels.dispatch import backend_module
from dpo_kernels.linear import gemm, passes, plan, workspace
from dpo_kernels.linear import ops as linear_ops
from tests.helpers import make_problem
from tests.linear_helpers import CPU, make_head

# no kernel runs for these
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
# the host reads what the device has yet to make
WAITS = ("_local_scalar_dense", "nonzero", "tolist")
GEMMS = ("mm", "addmm")
KERNELS = ("backend.forward", "backend.backward")


class Launches(TorchDispatchMode):
    """Counts by name while it is entered; ``backend.forward`` and ``.backward`` are our kernels."""

    CHECKS_LABELS = True
    CASTS_GRADIENT = True

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1].rstrip("_")
        result = func(*args, **(kwargs or {}))
        # of no elements: no launch
        empty = isinstance(result, torch.Tensor) and result.numel() == 0
        if not (func.is_view or name in FREE or empty):
            self.counts[name] += 1
        return result

    def forward(self, *args) -> int:
        return self._launch("backend.forward", lambda: torch_backend.forward(*args))

    def backward(self, batch, tokens, grad_output, grad_logits, zero_unscored) -> int:
        self._launch("backend.backward", grad_logits.zero_)
        return -1

    def empty_gradient(self, batch):
        return torch.empty_like(batch.logits), False

    def _launch(self, name, run):
        before = self.counts.copy()
        result = run()
        self.counts = before
        self.counts[name] += 1
        return result

    def taken(self) -> dict[str, int]:
        """The counts; they start again."""
        counts, self.counts = dict(self.counts), Counter()
        return counts


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Not here: it would count as launches."""


@pytest.fixture
def launches(monkeypatch) -> Launches:
    made = Launches()
    for module in (ops, workspace):
        monkeypatch.setattr(module, "resolve", lambda *args: made)
    for module in (ops, linear_ops):
        monkeypatch.setattr(module, "check_values", lambda *args: None)
    monkeypatch.setattr(gemm, "_device_type", lambda device: "cuda")
    monkeypatch.setattr(gemm, "mm_widens", lambda: True)
    monkeypatch.setattr(gemm, "addmm_widens", lambda: True)
    monkeypatch.setattr(gemm, "_capability", lambda device: (9, 0))
    # modes do not see into an op, so the Functions call what it runs
    for name in ("token_forward", "sequence_forward", "dpo_forward", "backward"):
        monkeypatch.setattr(ops, f"{name}_op", getattr(ops, name))
    for name, run in (
        ("linear_tokens", passes.linear_tokens),
        ("linear_tokens_backward", linear_ops._linear_tokens_backward),
        ("linear_dpo", linear_ops._linear_dpo),
    ):
        monkeypatch.setattr(linear_ops, f"{name}_op", linear_ops._implements(run))
    monkeypatch.setattr(plan, "_free_to_look", lambda device: False)
    mm, addmm, tolist, copied = torch.mm, torch.addmm, torch.Tensor.tolist, plan._copied

    def counted_mm(a, b, *, out_dtype=None, out=None):
        made.counts["mm"] += 1
        before = made.counts.copy()
        result = mm(a, b) if out is None else out.copy_(mm(a.to(out.dtype), b.to(out.dtype)))
        made.counts = before
        return result

    def counted_addmm(added, a, b, *, out_dtype=None, out):
        made.counts["addmm"] += 1
        before = made.counts.copy()
        result = addmm(added, a.to(out.dtype), b.to(out.dtype), out=out)
        made.counts = before
        return result

    def counted_tolist(tensor):
        made.counts["tolist"] += 1
        return tolist(tensor)

    def counted_copy(*args):
        made.counts["copy to the device"] += 1
        return copied(*args)

    # a CPU has neither out_dtype nor copies to and from the host
    monkeypatch.setattr(torch, "mm", counted_mm)
    monkeypatch.setattr(torch, "addmm", counted_addmm)
    monkeypatch.setattr(torch.Tensor, "tolist", counted_tolist)
    monkeypatch.setattr(plan, "_copied", counted_copy)
    return made


def summary(counts: dict[str, int]) -> dict[str, int]:
    """GEMMs, our kernels and waits; ``others``: what torch launches beside them."""
    groups = {"gemms": GEMMS, "kernels": KERNELS, "waits": WAITS}
    result = {group: sum(counts.get(name, 0) for name in names) for group, names in groups.items()}
    return {**result, "others": sum(counts.values()) - sum(result.values())}


def passes_of(launches: Launches, loss) -> tuple[dict[str, int], dict[str, int]]:
    """The counts of the forward and of the backward."""
    with launches:
        value = loss()
        forward = launches.taken()
        value.sum().backward() if value.dim() else value.backward()
        return forward, launches.taken()


def test_dpo_loss_from_logits(launches):
    problem = make_problem(CPU, torch.float32)
    forward, backward = passes_of(
        launches, lambda: dk.dpo_loss(problem.logits, problem.labels, *problem.reference).loss
    )
    # the two halves of the reference's log-probs become one tensor
    assert forward == {"backend.forward": 1, "cat": 1}
    # autograd's own gradient of the loss
    assert backward == {"backend.backward": 1, "ones_like": 1}


def test_token_logps_from_logits(launches):
    problem = make_problem(CPU, torch.float32)
    forward, backward = passes_of(launches, lambda: dk.token_logps(problem.logits, problem.labels))
    # what a caller may change in place is not what the backward reads
    assert forward == {"backend.forward": 1, "clone": 1}
    # the sum is the test's own
    assert backward == {"backend.backward": 1, "sum": 1, "ones_like": 1}


def linear_counts(launches: Launches, function, head: str, **options):
    """Of a head in bfloat16."""
    problem = make_head(CPU, torch.bfloat16, bias=False, frozen=head == "frozen")

    def loss():
        if function is dk.linear_dpo_loss:
            args = (problem.hidden, problem.weight, problem.labels, *problem.reference_logps)
            return function(*args, **options).loss
        return function(problem.hidden, problem.weight, problem.labels, **options)

    return tuple(map(summary, passes_of(launches, loss)))


ONE, MORE = None, 0.005
# (GEMMs, kernels of ours, waits, others) of the forward with one tile, of its backward, and of both
# with more tiles: two of linear_dpo_loss, three of linear_token_logps, whose first tokens count
# too. One of the others zeroes the columns behind a vocabulary that fills no whole vectors.
CASES = {
    # the kernels make the loss
    ("linear_dpo_loss", "trainable"): ((3, 2, 1, 12), (0, 0, 0, 3), (6, 4, 1, 20), (0, 0, 0, 3)),
    ("linear_dpo_loss", "frozen"): ((2, 2, 1, 11), (0, 0, 0, 2), (4, 4, 1, 19), (0, 0, 0, 2)),
    # torch makes it: once for every group of pairs, or with a frozen head once
    ("hinge", "trainable"): ((3, 2, 1, 40), (0, 0, 0, 3), (6, 4, 1, 69), (0, 0, 0, 3)),
    ("hinge", "frozen"): ((2, 2, 1, 39), (0, 0, 0, 2), (4, 4, 1, 46), (0, 0, 0, 2)),
    # the backward makes the logits again
    ("linear_token_logps", "trainable"): (
        (1, 1, 1, 8),
        (3, 1, 1, 13),
        (3, 3, 1, 12),
        (9, 3, 1, 21),
    ),
    ("linear_token_logps", "frozen"): ((2, 2, 1, 12), (0, 0, 0, 6), (6, 6, 1, 18), (0, 0, 0, 6)),
}


@pytest.mark.parametrize("function, head", CASES)
def test_from_hidden_states(launches, function, head):
    options = {"loss_type": "hinge"} if function == "hinge" else {}
    called = dk.linear_dpo_loss if options else getattr(dk, function)
    counts = [
        tuple(passed.values())
        for room in (ONE, MORE)
        for passed in linear_counts(launches, called, head, workspace_mb=room, **options)
    ]
    assert tuple(counts) == CASES[function, head]


# of the forward and the backward in one tile, with a promise that is kept
PROMISED = {
    ("linear_dpo_loss", "trainable"): ((3, 2, 0, 22), (0, 0, 0, 3)),
    ("linear_dpo_loss", "frozen"): ((2, 2, 0, 21), (0, 0, 0, 2)),
    ("linear_token_logps", "trainable"): ((1, 1, 0, 10), (3, 1, 0, 16)),
    ("linear_token_logps", "frozen"): ((2, 2, 0, 15), (0, 0, 0, 6)),
    ("linear_sequence_logps", "trainable"): ((1, 1, 0, 16), (3, 1, 0, 22)),
}


@pytest.mark.parametrize("function, head", PROMISED)
def test_nobody_waits_with_max_scored_tokens(launches, function, head):
    """What it takes instead are kernels on labels and a few numbers."""
    counts = linear_counts(launches, getattr(dk, function), head, max_scored_tokens=30)
    assert tuple(tuple(passed.values()) for passed in counts) == PROMISED[function, head]


@pytest.mark.parametrize("casts", [False, True])
def test_only_a_backend_that_cannot_narrow_has_its_gradient_copied(launches, casts):
    """float32 logits, dlogits in bfloat16: one copy a tile where the kernel does not write them."""
    launches.CASTS_GRADIENT = casts
    problem = make_head(CPU, torch.bfloat16, bias=False)
    with launches:
        dk.linear_dpo_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            *problem.reference_logps,
            workspace_mb=MORE,
        )
    assert launches.counts["backend.backward"] == 2
    assert launches.counts["copy"] == (0 if casts else 2)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_the_gpu_backends_narrow(launches, monkeypatch, name):
    """They say so, and what they are handed is the tile in bfloat16 beside float32 logits."""
    module = backend_module(name)
    assert module.CASTS_GRADIENT
    handed = []

    def backward(batch, tokens, grad_output, grad_logits, zero_unscored):
        handed.append((batch.logits.dtype, grad_logits.dtype))
        if name == "triton" and module.unavailable() is None:
            module.backward(batch, tokens, grad_output, grad_logits, zero_unscored)
            assert grad_logits.isfinite().all() and grad_logits.any()
        return -1

    launches.CASTS_GRADIENT = module.CASTS_GRADIENT
    monkeypatch.setattr(launches, "backward", backward)
    problem = make_head(CPU, torch.bfloat16, bias=False)
    dk.linear_dpo_loss(
        problem.hidden, problem.weight, problem.labels, *problem.reference_logps, backend=name
    )
    assert handed == [(torch.float32, torch.bfloat16)]
