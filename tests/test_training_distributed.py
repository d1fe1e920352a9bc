"""DistributedDataParallel and FSDP over gloo, two processes on a CPU: every rank ends with the
parameters that one process gets from the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dpo_kernels as dk
from tests.test_training import Model, data
from tests.two_ranks import RANKS, on_two_ranks

STEPS = 3
PATHS = ("logits", "hidden")
RETURNS = ("loss", "tuple", "dict", "output")
# the head in the root unit is whole inside the model's forward, in a unit of its own it is sharded
FSDP2_UNITS = ("root", "own")
DDP_OPTIONS = {"plain": {}, "static_graph": {"static_graph": True}}
DDP_OPTIONS["find_unused"] = {"find_unused_parameters": True}
DDP_OPTIONS["bucket_view"] = {"gradient_as_bucket_view": True}


def loss_in(output) -> torch.Tensor:
    if isinstance(output, dk.DPOOutput):
        return output.loss
    if isinstance(output, dict):
        return output["loss"]
    return output[0] if isinstance(output, tuple) else output


def share(batch, rank: int):
    """The pairs of a rank, out of a batch of chosen, then rejected rows."""
    ids, labels = batch
    pairs = ids.shape[0] // 2
    mine = torch.arange(rank, pairs, RANKS)
    rows = torch.cat((mine, mine + pairs))
    return ids[rows], labels[rows]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return parameter.detach().clone()


def train(model, step, rank: int | None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for i in range(STEPS):
        batch = data(i, pairs=4)
        optimizer.zero_grad()
        step(model, batch if rank is None else share(batch, rank))
        optimizer.step()


def plainly(model, batch) -> None:
    loss_in(model(*batch)).backward()


def accumulating(model, batch) -> None:
    """Pair by pair; only the last one talks to the other rank."""
    ids, labels = batch
    for pair in range(2):
        rows = [pair, pair + 2]
        if pair == 0:
            with model.no_sync():
                (loss_in(model(ids[rows], labels[rows])) / 2).backward()
        else:
            (loss_in(model(ids[rows], labels[rows])) / 2).backward()


def cases():
    for fused in PATHS:
        for frozen in (False, True):
            kind = "frozen" if frozen else "trainable"
            for name in DDP_OPTIONS:
                for returns in RETURNS:
                    # raises: see the last test
                    if (name, returns) == ("find_unused", "output"):
                        continue
                    yield f"ddp {fused} {kind} {name} {returns}"
            yield f"ddp {fused} {kind} no_sync loss"
            yield f"fsdp1 {fused} {kind}"
            for units in FSDP2_UNITS:
                yield f"fsdp2 {fused} {kind} {units}"


# FSDP2 gathers bfloat16 and reduces float32, for a head that it gathers and for one that we do
LOW_PRECISION = tuple(f"fsdp2 hidden trainable {units} bf16" for units in FSDP2_UNITS)


def run_case(name: str, rank: int) -> list[torch.Tensor]:
    kind, fused, frozen, *rest = name.split()
    model = Model(fused, frozen == "frozen", rest[1] if kind == "ddp" else "loss")
    if kind == "ddp":
        wrapped = DistributedDataParallel(model, **DDP_OPTIONS.get(rest[0], {}))
        train(wrapped, accumulating if rest[0] == "no_sync" else plainly, rank)
        return [whole(p) for p in model.parameters()]
    if kind == "fsdp2":
        policy = MixedPrecisionPolicy()
        if rest[1:] == ["bf16"]:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if rest[0] == "own":
            fully_shard(model.head, mp_policy=policy)
        train(fully_shard(model, mp_policy=policy), plainly, rank)
        return [whole(p) for p in model.parameters()]
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    train(wrapped, plainly, rank)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return [whole(p) for p in model.parameters()]


def results_of(rank: int) -> dict:
    return {name: run_case(name, rank) for name in (*cases(), *LOW_PRECISION)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Both ranks' parameters after every case; one pair of processes runs them all."""
    return on_two_ranks(results_of, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    """Parameters of one process, by (path, frozen)."""
    made = {}
    for fused in PATHS:
        for frozen in ("trainable", "frozen"):
            model = Model("naive", frozen == "frozen")
            train(model, plainly, None)
            made[fused, frozen] = [whole(p) for p in model.parameters()]
    return made


@pytest.mark.parametrize("name", list(cases()))
def test_two_ranks_train_as_one_process(results, alone, name):
    _, fused, frozen, *_ = name.split()
    start = Model("naive", frozen == "frozen")
    for ours, other, wanted, first in zip(
        results[0][name], results[1][name], alone[fused, frozen], start.parameters(), strict=True
    ):
        assert torch.equal(ours, other)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(wanted, first) == (not first.requires_grad)


def test_mixed_precision_of_fsdp2_is_that_of_its_other_parameters(results, alone):
    root, own = (results[0][name] for name in LOW_PRECISION)
    for ours, wanted, exact in zip(own, root, alone["hidden", "trainable"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-7)
        assert not torch.equal(ours, exact)


def test_find_unused_parameters_with_a_whole_output_raises(tmp_path, monkeypatch):
    """DDP looks at the fields of a dataclass, and a loss with a graph cannot be one: asdict copies
    them all. No step is made with wrong gradients."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model("hidden", returns="output")
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
        with pytest.raises(RuntimeError, match="mark a variable ready only once"):
            wrapped(*data()).loss.backward()
    finally:
        dist.destroy_process_group()
