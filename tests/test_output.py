"""DPOOutput where other code walks, copies or compares it: DDP, torch.export, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import dpo_kernels
from dpo_kernels import DPOLoss, DPOOutput
from tests.helpers import make_problem


def make_output(**options) -> DPOOutput:
    problem = make_problem(vocab=11)
    return dpo_kernels.dpo_loss(problem.logits, problem.labels, *problem.reference, **options)


def test_is_a_pytree_of_its_tensors():
    out = make_output(reduction="none")
    leaves, spec = tree_flatten(out)
    assert len(leaves) == 6 and leaves[0] is out.loss and out.loss.requires_grad
    again = tree_unflatten(leaves, spec)
    assert isinstance(again, DPOOutput) and again.rejected_rewards is out.rejected_rewards
    assert isinstance(tree_map(lambda x: x.detach(), out), DPOOutput)


@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo"))
def test_compares_and_copies(loss_type):
    """With a graph behind the loss: identity, a detached deep copy, a dict of what is detached."""
    out = make_output(loss_type=loss_type)
    assert out == out and out != make_output(loss_type=loss_type)
    twin = copy.deepcopy(out)
    assert not twin.loss.requires_grad and torch.equal(twin.loss, out.loss.detach())
    twin.losses.zero_()
    assert out.losses.any()
    values = dataclasses.asdict(out)
    assert torch.equal(values["chosen_logps"], out.chosen_logps) and "loss" not in values
    assert repr(out).startswith("DPOOutput(loss=tensor(")


def test_export():
    problem = make_problem(vocab=11)
    arguments = (problem.logits.detach(), problem.labels, *problem.reference)
    module = DPOLoss(beta=0.2, backend="cpu")
    exported = torch.export.export(module, arguments).module()(*arguments)
    expected = module(*arguments)
    assert isinstance(exported, DPOOutput)
    assert torch.equal(exported.losses, expected.losses)
    assert torch.equal(exported.loss, expected.loss)


class _Model(nn.Module):
    """A head whose forward returns DPOOutput, as a trainer's wrapped model would."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 11)
        self.loss = DPOLoss(backend="cpu")

    def forward(self, hidden, labels, chosen, rejected) -> DPOOutput:
        return self.loss(self.head(hidden), labels, chosen, rejected)


def _train(rank: int, static_graph: bool, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(_Model(), static_graph=static_graph)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for step in range(3):
        problem = make_problem(vocab=11, seed=2 * step + rank)
        hidden = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(2 * step + rank))
        out = model(hidden, problem.labels, *problem.reference)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    mine = model.module.head.weight.detach()
    other = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(other, mine)
    same = torch.equal(*other)
    dist.destroy_process_group()
    # a traceback would drown the reason: the exit status says it
    os._exit(0 if same else 3)


@pytest.mark.parametrize("static_graph", (False, True))
def test_ddp_ranks_stay_together(tmp_path, static_graph):
    """static_graph=True finds the loss in the module's output only if that is a pytree."""
    context = mp.get_context("spawn")
    file = str(tmp_path / "rendezvous")
    ranks = [context.Process(target=_train, args=(r, static_graph, file)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=180)
    assert [process.exitcode for process in ranks] == [0, 0]
