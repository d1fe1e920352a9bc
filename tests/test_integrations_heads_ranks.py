"""A head that returns log-probs, inside models that two ranks wrap or shard."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dpo_kernels import reference
from dpo_kernels.integrations.heads import scoring_head
from tests.test_integrations_heads import Model, make_batch
from tests.test_training_distributed import share, whole
from tests.two_ranks import RANKS, on_two_ranks


def _fsdp2(model: nn.Module) -> nn.Module:
    # a root is left whole unless this is said of it
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), reshard_after_forward=True)


def _fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp1": _fsdp1, "fsdp2": _fsdp2}


def make_model() -> Model:
    return Model(bias=True, logit_scale=0.3)


def trained(name: str, rank: int) -> list[torch.Tensor]:
    """Parameters after a step, gradients of the ranks averaged."""
    model = WRAPPERS[name](make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids, labels = share(make_batch(), rank)
    with scoring_head(model, labels, shift=True) as head:
        outputs = model(ids)
    assert head.reason is None
    head.logps_through(outputs["logits"]).sum().backward()
    optimizer.step()
    if name == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(model):
            return [p.detach().clone() for p in model.parameters()]
    return [whole(p) for p in model.parameters()]


def results_of(rank: int) -> dict:
    return {name: trained(name, rank) for name in WRAPPERS}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(results_of, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_step_of_two_ranks_is_that_of_one_process(results, name):
    model, (ids, labels) = make_model(), make_batch()
    loss = reference.token_logps(model(ids).logits, labels, shift=True).sum() / RANKS
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for rank in results:
        for ours, start, grad in zip(rank[name], model.parameters(), grads, strict=True):
            assert grad.abs().max() > 0
            torch.testing.assert_close(ours, start.detach() - grad, rtol=1e-5, atol=1e-5)
