"""The head that FusedDPOTrainer gives a model, under FSDP2 and tensor parallelism on two ranks."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import pytest
import torch

for _package in ("trl", "transformers", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from dpo_kernels.integrations.trl_dpo import add_dpo_head
from dpo_kernels.linear import linear_dpo_loss
from tests.test_training_distributed import share, whole
from tests.trl_runs import make_model
from tests.two_ranks import RANKS, on_two_ranks

pytestmark = pytest.mark.integrations

STEPS = 3
CASES = ("fsdp2 root", "fsdp2 own", "tensor parallel")


def head(hidden, labels, weight, **options) -> dict:
    out = linear_dpo_loss(hidden, weight, labels, reference_free=True, beta=0.3, **options)
    return {"loss": out.loss}


def trained(case: str, rank: int | None) -> list[torch.Tensor]:
    model = make_model()
    add_dpo_head(model)
    ranks_differ = case.startswith("fsdp2")
    if ranks_differ:
        if case == "fsdp2 own":
            fully_shard(model.lm_head)
        fully_shard(model)
    elif rank is not None:
        mesh = init_device_mesh("cpu", (RANKS,))
        weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(STEPS):
        rng = torch.Generator().manual_seed(step)
        ids = torch.randint(3, model.config.vocab_size, (8, 6), generator=rng)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=rng) < 0.3, -100)
        if ranks_differ and rank is not None:
            ids, labels = share((ids, labels), rank)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels, use_cache=False, dpo_head=head)["loss"].backward()
        optimizer.step()
    return [whole(p) for p in model.parameters()]


def results_of(rank: int) -> dict:
    return {case: trained(case, rank) for case in CASES}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return on_two_ranks(results_of, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process(results, case):
    alone = trained("alone", None)
    for ours, other, wanted in zip(results[0][case], results[1][case], alone, strict=True):
        assert torch.equal(ours, other)
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
