"""A head that FSDP2 shards, two ranks over gloo: what a call sends, what it keeps, what it makes.

One rank of the two may score nothing: it makes the same collectives, and gradients of zero.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_kernels as dk
from tests.two_ranks import RANKS, on_two_ranks

# a vocabulary that the ranks cannot share equally
PAIRS, LENGTH, SIZE, VOCAB = 2, 5, 8, 67
FUNCTIONS = ("loss", "sequence_logps", "token_logps", "token_stats")
CASES = [
    f"{function} {mode} {scores} {mesh}"
    for function in FUNCTIONS
    for mode in ("trainable", "frozen")
    for scores in ("all", "one")
    for mesh in ("shard", "replicate")
    # the mesh changes what is reduced, which is the same for every function
    if mesh == "shard" or function == "loss"
]


class Watch(TorchDispatchMode):
    """The collectives that are begun, and the storages with room for the head that ops return."""

    def __init__(self):
        super().__init__()
        self.collectives: Counter[str] = Counter()
        # of a collective, the larger of what goes in and what comes out
        self.bytes = 0
        self.storages: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        namespace, name = func._overloadpacket._qualified_op_name.split("::")
        if namespace == "_c10d_functional" and not name.startswith(("wait", "_wrap")):
            self.collectives[name] += 1
            self.bytes += max(args[0].nbytes, out.nbytes)
        for x in torch.utils._pytree.tree_leaves(out):
            if type(x) is torch.Tensor and x.untyped_storage().nbytes() >= 4 * VOCAB * SIZE:
                self.storages.append(StorageWeakRef(x.untyped_storage()))
        return out

    def alive(self) -> int:
        alive = {ref.cdata for ref in self.storages if not ref.expired()}
        return len(alive)


def make_head(mode: str) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(SIZE, VOCAB).requires_grad_(mode == "trainable")


def make_batch(rank: int, scores: str):
    rng = torch.Generator().manual_seed(rank)
    hidden = torch.randn(2 * PAIRS, LENGTH, SIZE, generator=rng).requires_grad_()
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=rng)
    if scores == "one" and rank == 1:
        labels.fill_(-100)
    return hidden, labels


def call(function: str, head: nn.Linear, hidden, labels) -> torch.Tensor:
    if function == "loss":
        options = {"reference_free": True, "beta": 0.3}
        return dk.linear_dpo_loss(hidden, head.weight, labels, bias=head.bias, **options).loss
    made = getattr(dk, f"linear_{function}")(hidden, head.weight, labels, bias=head.bias)
    return (made.logps if function == "token_stats" else made).sum()


def run(case: str, rank: int) -> dict:
    function, mode, scores, kind = case.split()
    head = make_head(mode)
    sizes = {"shard": (RANKS,), "replicate": (RANKS, 1)}[kind]
    names = ("replicate", "shard")[-len(sizes) :]
    fully_shard(head, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=names))
    hidden, labels = make_batch(rank, scores)
    with Watch() as watch:
        loss = call(function, head, hidden, labels)
        forward, kept = dict(watch.collectives), watch.alive()
        watch.collectives.clear()
        loss.backward()
        alive, backward = watch.alive(), dict(watch.collectives)
    grads = [p.grad for p in head.parameters()]
    return {
        "forward": forward,
        "backward": backward,
        "bytes": watch.bytes,
        "seen": len(watch.storages),
        "alive": (kept, alive),
        "grads": [g if g is None else g.full_tensor() for g in grads],
        "hidden": hidden.grad,
    }


def error_of_a_head_split_twice(rank: int) -> str:
    head = make_head("frozen")
    fully_shard(head)
    hidden, labels = make_batch(rank, "all")
    try:
        dk.linear_token_logps(hidden, head.weight, labels, vocab_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "none"


def results_of(rank: int) -> dict:
    results = {case: run(case, rank) for case in CASES}
    results["split twice"] = error_of_a_head_split_twice(rank)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(results_of, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_collectives(results, case):
    """One all-gather and one reduction of weight and of bias, whatever tokens a rank has."""
    _, mode, _, mesh = case.split()
    gather, reduce = {
        "shard": ("all_gather_into_tensor", "reduce_scatter_tensor"),
        # a mesh whose shards are of one rank each: nothing to gather
        "replicate": (None, "all_reduce"),
    }[mesh]
    for rank in results:
        assert rank[case]["forward"] == ({} if gather is None else {gather: 2})
        assert rank[case]["backward"] == ({} if mode == "frozen" else {reduce: 2})


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("shard")])
def test_what_was_gathered_is_freed(results, case):
    """A frozen head at once; a trainable one, or the gradient that is made of it, in the backward.

    The log-probs' backward reads the head again, the loss's has its gradient already: one storage
    of that size is kept, never two.
    """
    kept = 1 if case.split()[1] == "trainable" else 0
    for rank in results:
        assert rank[case]["seen"] > 0
        assert rank[case]["alive"] == (kept, 0)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_mean_of_the_ranks(results, case):
    function, mode, scores, _ = case.split()
    head = make_head(mode)
    for rank in range(RANKS):
        hidden, labels = make_batch(rank, scores)
        (call(function, head, hidden, labels) / RANKS).backward()
        # hidden states are a rank's own: their gradient is of its own loss
        torch.testing.assert_close(results[rank][case]["hidden"], hidden.grad * RANKS)
    for ours, other, parameter in zip(
        *(rank[case]["grads"] for rank in results), head.parameters(), strict=True
    ):
        if parameter.grad is None:
            assert ours is None and other is None
            continue
        assert torch.equal(ours, other) and ours.abs().sum() > 0
        torch.testing.assert_close(ours, parameter.grad)


def test_shards_for_storage_are_no_parts_of_the_vocabulary(results):
    """Each rank would give its whole head as a part, and every log-prob would be wrong by log 2."""
    for rank in results:
        assert rank["split twice"].startswith("weight: ")
        assert "leave vocab_group out" in rank["split twice"]
