"""The adapters of trainers that split the vocabulary and the sequences over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.integrations import megatron, nemo_rl
from tests.helpers import make_problem
from tests.parallel_world import Member, World, counted

SIZES, LENGTH = (30, 37), 8


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("ranks")) as made:
        yield made


def batch() -> tuple[Tensor, Tensor]:
    problem = make_problem(length=LENGTH)
    ids = torch.randint(67, problem.labels.shape, generator=torch.Generator().manual_seed(1))
    return problem.logits.detach(), ids


def columns(rank: int) -> slice:
    return slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))


def megatron_logps(member: Member) -> tuple[Tensor, Tensor]:
    logits, ids = batch()
    # the sequence first, as in Megatron
    own = logits.transpose(0, 1)[..., columns(member.rank)].clone().requires_grad_()
    logps = megatron.vocab_parallel_logps(own, ids.t(), member.first[2])
    logps.sum().backward()
    return logps.detach(), own.grad


def test_megatron(world):
    logits, ids = batch()
    wide = logits.double().transpose(0, 1).requires_grad_()
    truth = wide.log_softmax(-1).gather(-1, ids.t().unsqueeze(-1)).squeeze(-1)
    truth.sum().backward()
    (logps, first), (other, second) = world.run(megatron_logps, ranks=2)
    assert torch.equal(logps, other)
    torch.testing.assert_close(logps.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.cat((first, second), -1).double()
    torch.testing.assert_close(gradient, wide.grad, rtol=1e-5, atol=1e-6)


def nemo_logps(member: Member, length: int, vocab: bool, context: bool):
    """Log-probs on a rank, and the gradient of what every rank of a context group makes of them."""
    logits, ids = batch()
    logits, ids = logits[:, :length], ids[:, :length]
    groups = {}
    if context:
        group = member.column if vocab else member.first[2]
        # padded to 4 slices, of which a rank has one from each end
        padded = F.pad(logits, (0, 0, 0, -length % 4))
        slices = padded.chunk(4, dim=1)
        rank = group.rank()
        logits = torch.cat((slices[rank], slices[3 - rank]), dim=1)
        groups["context_parallel_group"] = group
    if vocab:
        group = member.row if context else member.first[2]
        logits = logits[..., columns(group.rank())]
        groups |= {"vocab_parallel_group": group, "vocab_parallel_rank": group.rank()}
    logits = logits.clone().requires_grad_()
    with counted() as made:
        logps = nemo_rl.get_next_token_logprobs_from_logits(ids, logits, **groups)
    weights = torch.linspace(0.5, 2, logps.numel()).view(logps.shape)
    (logps * weights).sum().backward()
    return logps.detach(), logits.grad, len(made)


@pytest.mark.parametrize("length", (8, 7, 6))
@pytest.mark.parametrize(
    "vocab, context", ((True, False), (False, True), (True, True)), ids=("tp", "cp", "tp+cp")
)
def test_nemo_rl(world, length, vocab, context):
    logits, ids = batch()
    logits, ids = logits[:, :length].double().requires_grad_(), ids[:, :length]
    truth = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    weights = torch.linspace(0.5, 2, truth.numel()).view(truth.shape)
    (truth * weights).sum().backward()
    ranks = 2 ** (vocab + context)
    # the first call tells the ranks their columns
    world.run(nemo_logps, length, vocab, context, ranks=ranks)
    results = world.run(nemo_logps, length, vocab, context, ranks=ranks)
    for rank, (logps, gradient, collectives) in enumerate(results):
        assert collectives == vocab + context
        assert torch.equal(logps, results[0][0])
        torch.testing.assert_close(logps.double(), truth.detach(), rtol=1e-5, atol=1e-5)
        wanted = logits.grad
        if context:
            # the sum over two ranks that made the same of the log-probs
            wanted = 2 * F.pad(wanted, (0, 0, 0, -length % 4))
            slices, own = wanted.chunk(4, dim=1), rank // 2 if vocab else rank
            wanted = torch.cat((slices[own], slices[3 - own]), dim=1)
        if vocab:
            wanted = wanted[..., columns(rank % 2)]
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-6)


def wrong_slices(member: Member) -> None:
    logits, ids = batch()
    nemo_rl.get_next_token_logprobs_from_logits(
        ids, logits[:, :3], context_parallel_group=member.first[2]
    )


def test_nemo_rl_refuses_slices_that_do_not_fit(world):
    for error in world.raised(wrong_slices, ranks=2):
        assert type(error) is ValueError and str(error).startswith("next_token_logits: ")
