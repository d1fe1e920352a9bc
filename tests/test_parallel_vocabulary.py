"""How a vocabulary is divided among ranks: shards that change, labels out of range, DTensors."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import dpo_kernels
from dpo_kernels.parallel import vocabulary
from tests.helpers import IGNORE
from tests.parallel_cases import Case, call, columns_of, one_process, same_bits, shard_of
from tests.parallel_world import Member, World, counted


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("ranks")) as made:
        yield made


def changing(member: Member, rounds: tuple[tuple[int, ...], ...]) -> list[tuple]:
    """One group, and shards that change from call to call."""
    made = []
    for sizes in rounds:
        case = Case("token_logps", sizes=sizes)
        outcome = call(case, shard_of(case, case.entry(), member.rank), **case.groups(member))
        made.append((outcome.outputs["logps"], len(outcome.forward)))
    return made


def test_shards_may_change_from_call_to_call(world):
    """Ranks that see no change of their own take part in the exchange that another one needs."""
    rounds = ((30, 20, 17), (30, 20, 17), (20, 30, 17), (20, 30, 18), (21, 30, 18), (21, 30, 18))
    results = world.run(changing, rounds, ranks=3)
    for i, sizes in enumerate(rounds):
        logps, exchanges = results[0][i]
        assert all(same_bits(logps, other[i][0]) for other in results[1:])
        alone = one_process(Case("token_logps", sizes=sizes)).outputs["logps"]
        torch.testing.assert_close(logps, alone, rtol=1e-5, atol=1e-5)
        # where the last rank alone has more, nobody's columns start elsewhere
        assert exchanges == (2 if i in (0, 2, 4) else 1), i


@contextmanager
def nobody_waits(group):
    """As on a GPU: no rank looks at numbers unasked."""
    before = vocabulary._free_to_look, vocabulary.check_values
    vocabulary._free_to_look, vocabulary.check_values = lambda device: False, lambda *_: None
    vocabulary._columns.pop(group, None)
    try:
        yield
    finally:
        vocabulary._free_to_look, vocabulary.check_values = before
        vocabulary._columns.pop(group, None)


def without_waiting(member: Member, rounds: tuple[tuple[int, ...], ...]) -> list[tuple]:
    group, made = member.first[3], []
    with nobody_waits(group):
        for sizes in rounds:
            case = Case("token_logps", sizes=sizes)
            own = shard_of(case, case.entry(), member.rank)
            with counted() as collectives:
                try:
                    result = own.token_logps(vocab_group=group).detach()
                except ValueError as error:
                    result = str(error)
            made.append((result, len(collectives)))
    return made


def test_shards_that_change_where_nobody_waits(world):
    """Right; or where a rank could not know, NaN there and an error on those that could."""
    first, last_grows, all_change = (30, 20, 17), (30, 20, 18), (21, 31, 18)
    rounds = (first, first, last_grows, first, (20, 30, 17), all_change, all_change)
    results = world.run(without_waiting, rounds, ranks=3)
    for i, sizes in enumerate(rounds):
        case, made = Case("token_logps", sizes=sizes), [of_rank[i][0] for of_rank in results]
        if i == 4:
            assert all(x.startswith("vocab_group: the ranks hold [20, 30, 17]") for x in made[:2])
            assert torch.equal(made[2].isnan(), case.entry().labels != IGNORE)
            continue
        alone = one_process(case).outputs["logps"]
        for logps in made:
            torch.testing.assert_close(logps, alone, rtol=1e-5, atol=1e-5)
    for of_rank in results:
        assert [exchanges for _, exchanges in of_rank] == [2, 1, 1, 1, 1, 2, 1]


def label_without_waiting(member: Member) -> list[torch.Tensor]:
    entry, group = Case(sizes=(40, 27)).entry(), member.first[2]
    entry.labels[1, 2] = 67
    own = columns_of(entry, (40, 27), member.rank)
    with nobody_waits(group):
        # one call looks at the other rank's columns, and one does not
        return [own.token_logps(vocab_group=group).detach() for _ in range(2)]


def test_a_label_out_of_range_is_nan_where_nobody_waits(world):
    for results in world.run(label_without_waiting, ranks=2):
        for logps in results:
            assert logps.isnan().nonzero().tolist() == [[1, 2]]


def bad_label(member: Member, label: int, sizes: tuple[int, ...]) -> None:
    entry = Case(sizes=sizes).entry()
    entry.labels[1, 2] = label
    own = columns_of(entry, sizes, member.rank)
    own.token_logps(vocab_group=member.first[len(sizes)])


@pytest.mark.parametrize("label", (67, -1, 2**31, -(2**40)))
def test_a_label_out_of_range_raises_on_every_rank(world, label):
    for error in world.raised(bad_label, label, (40, 27), ranks=2):
        assert type(error) is ValueError
        assert str(error).startswith("labels[1, 2]: ")
        assert f"0 <= label < 67, got {label}" in str(error)


def as_dtensor(member: Member, case: Case) -> tuple:
    entry = case.entry()
    mesh, part = init_device_mesh("cpu", (case.ranks,)), shard_of(case, entry, member.rank)
    plain = call(case, part, torch.ones(()), **case.groups(member))
    local = part.inputs[0].detach()
    logits = DTensor.from_local(local, mesh, [Shard(2)], run_check=False).requires_grad_()
    own = entry.with_inputs(logits)
    with counted() as forward:
        out = own.dpo_loss()
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert type(gradient) is DTensor and gradient.placements == (Shard(2),)
    assert same_bits(gradient.to_local(), plain.gradients[0])
    assert same_bits(out.loss.detach(), plain.outputs["loss"]) and type(out.loss) is torch.Tensor
    return forward, own.token_logps().detach()


def test_dtensor_logits(world):
    case = Case("dpo_loss", sizes=(17, 17, 17, 17))
    for forward, logps in world.run(as_dtensor, case):
        assert len(forward) == 1
        alone = one_process(replace(case, function="token_logps")).outputs["logps"]
        torch.testing.assert_close(logps, alone, rtol=1e-5, atol=1e-5)


def wrong_dtensors(member: Member) -> list[str]:
    mesh = init_device_mesh("cpu", (4,))
    labels = torch.zeros(2, 3, dtype=torch.int64)
    errors = []
    for vocab, placement, groups in (
        (8, Replicate(), {}),
        (8, Shard(0), {}),
        (8, Shard(2), {"vocab_group": member.first[4]}),
        # no column is left for the last rank
        (3, Shard(2), {}),
    ):
        logits = distribute_tensor(torch.zeros(2, 3, vocab), mesh, [placement])
        try:
            dpo_kernels.token_logps(logits, labels, **groups)
        except (TypeError, ValueError) as error:
            errors.append(str(error))
    return errors


def test_dtensors_that_are_refused(world):
    for errors in world.run(wrong_dtensors):
        assert [error.split(":")[0] for error in errors] == [
            "logits",
            "logits",
            "vocab_group",
            "logits",
        ]
