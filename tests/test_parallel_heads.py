"""Split over ranks, a head and its hidden states give what they give in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import dpo_kernels
from dpo_kernels import reference
from dpo_kernels.linear import gemm, plan
from tests.helpers import DTYPES, IGNORE, acc_eps, assert_rule, eps
from tests.linear_helpers import logp_error, make_head
from tests.parallel_cases import (
    Case,
    Outcome,
    call,
    one_process,
    run,
    same_bits,
    shard_of,
    together,
)
from tests.parallel_world import Member, World

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
HEADS = ("trained head", "frozen head")
heads = pytest.mark.parametrize("source", HEADS)
# a call has one tile, or as many as fit a workspace of a few rows
WORKSPACES = (None, 0.01)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("ranks")) as made:
        yield made


def collectives(forward: int, backward: int, hidden_in: str) -> tuple[list[str], list[str]]:
    """So many all-gathers, and one all-reduce for the gradient of hidden."""
    lists = {"forward": [GATHER] * forward, "backward": [GATHER] * backward}
    lists[hidden_in].append("all_reduce")
    return lists["forward"], lists["backward"]


@heads
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_tokens_obey_the_rule(world, dtype, source):
    case = Case("token_stats", source, dtype, sizes=(20, 3, 44), options={"logit_softcap": 8.0})
    outcomes = world.run(run, case, ranks=3)
    outputs, gradients = together(case, outcomes)
    # the ranks' sizes, and the one tile; a frozen head has its gradient in the forward
    where = "forward" if source == "frozen head" else "backward"
    assert (outcomes[0].forward, outcomes[0].backward) == collectives(2, 0, where)
    problem = make_head(dtype=dtype, pairs=2, length=8, frozen=source == "frozen head")
    found = {}
    for name, kind in (("theirs", dtype), ("truth", torch.float64)):
        same = problem.to(kind)
        options = {**case.options, "bias": same.bias}
        found[name] = reference.linear_token_stats(same.hidden, same.weight, same.labels, **options)
    error = logp_error(problem, dtype)
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        values = (outputs[name], *(getattr(found[kind], name) for kind in ("theirs", "truth")))
        # the entropy's derivative with respect to a logit is at most log V
        assert_rule(name, *values, error * (1 + torch.tensor(67.0).log().item()))
    assert torch.equal(outputs["is_top1"], found["truth"].is_top1)
    # a gradient is stored once more and summed in another order than on one device
    for ours, alone in zip(gradients, one_process(case).gradients, strict=True):
        assert ours.dtype == dtype
        near = 1.1 * eps(dtype) * alone.abs() + 256 * acc_eps(dtype) * alone.abs().max()
        assert ((ours - alone).double().abs() <= near).all()


LOSSES = (
    {},
    {"loss_type": "ipo", "reduction": "sum"},
    {"average_log_prob": True, "reduction": "none"},
    {"ld_alpha": 0.3, "use_weighting": True},
    {"loss_type": "aot"},
)
SPLITS = ({"sizes": (30, 37)}, {"ends": (1, 1, 4, 8)}, {"sizes": (30, 37), "ends": (5, 8)})


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@heads
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_losses_in_float64(world, options, source, packed, split):
    options = {**options, "workspace_mb": WORKSPACES[packed]}
    case = Case("dpo_loss", source, torch.float64, packed=packed, options=options, **split)
    case = replace(case, make={"pairs": 3})
    outputs, gradients = together(case, world.run(run, case, ranks=case.ranks))
    alone = one_process(case)
    for name, value in alone.outputs.items():
        torch.testing.assert_close(outputs[name], value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients, alone.gradients, rtol=1e-10, atol=1e-11)


def with_reference(member: Member, case: Case) -> tuple:
    entry = case.entry()
    other = make_head(dtype=case.dtype, pairs=2, length=8, seed=5)
    names = ("reference_hidden", "reference_weight", "reference_bias")
    results = []
    for split in (True, False):
        own, others = entry, entry.with_inputs(other.hidden, other.weight, other.bias)
        if split:
            own, others = (shard_of(case, x, member.rank) for x in (own, others))
        options = dict(zip(names, others.inputs, strict=True))
        own = replace(own, reference=(None, None))
        groups = case.groups(member) if split else {}
        results.append(call(replace(case, options=options), own, **groups))
    return tuple(results)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@heads
def test_a_reference_head(world, source, split):
    case = Case("dpo_loss", source, torch.float64, **split)
    for made, alone in world.run(with_reference, case, ranks=case.ranks):
        for name, value in alone.outputs.items():
            torch.testing.assert_close(made.outputs[name], value, rtol=1e-11, atol=1e-11)


def with_stats(member: Member, case: Case):
    own = shard_of(case, case.entry(), member.rank)
    return call(case, own, **case.groups(member))


@heads
def test_return_stats(world, source):
    """From the same tiles: no collective more."""
    case = Case("dpo_loss", source, sizes=(30, 37), options={"return_stats": True})
    plain = replace(case, options={})
    made, without = (world.run(with_stats, x, ranks=2)[0] for x in (case, plain))
    stats = one_process(replace(case, function="token_stats", options={"shift": True}))
    for name, value in stats.outputs.items():
        torch.testing.assert_close(made.outputs[name], value, rtol=1e-4, atol=1e-4)
    assert made.forward == without.forward and same_bits(
        made.outputs["loss"], without.outputs["loss"]
    )


def counted_gemms(member: Member, case: Case) -> dict[str, int]:
    """Rows that go through each of the head's GEMMs."""
    rows: dict[str, int] = {}

    def logged(name, function, at):
        def wrapped(*args):
            rows[name] = rows.get(name, 0) + args[at].shape[0]
            return function(*args)

        return wrapped

    names = {"logits_into": 0, "hidden_gradient": 0, "add_weight_gradient": 1}
    before = {name: getattr(gemm, name) for name in names}
    for name, at in names.items():
        setattr(gemm, name, logged(name, before[name], at))
    try:
        own = shard_of(case, case.entry(), member.rank)
        outcome = call(case, own, **case.groups(member))
    finally:
        for name, function in before.items():
            setattr(gemm, name, function)
    return {**rows, "gathers": len(outcome.forward)}


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@heads
def test_gemms_and_collectives(world, source, workspace_mb):
    """Two GEMMs of a rank's rows for a frozen head, three for a trained one, whatever the tiles."""
    case = Case("dpo_loss", source, sizes=(3, 64), options={"workspace_mb": workspace_mb})
    entry = case.entry()
    scored = int((entry.labels[:, 1:] != IGNORE).sum())
    found, other = world.run(counted_gemms, case, ranks=2)
    assert found == other
    expected = {"logits_into": scored, "hidden_gradient": scored}
    if source == "trained head":
        # the bias gets its gradient without one
        expected["add_weight_gradient"] = scored
    gathers = found.pop("gathers")
    assert found == expected
    # the ranks' sizes, every tile, the gradient of hidden
    assert gathers == 3 if workspace_mb is None else gathers > 3


def nothing_scored(member: Member, case: Case, where: str):
    own = shard_of(case, case.entry(), member.rank)
    if where == "everywhere" or member.rank == 1:
        own.labels.fill_(IGNORE)
    outcome = call(case, own, **case.groups(member))
    return outcome.outputs["loss"], outcome.gradients


@heads
@pytest.mark.parametrize("split", ({"sizes": (30, 37)}, {"ends": (3, 8)}), ids=str)
def test_a_rank_with_nothing_scored(world, source, split):
    """With the vocabulary split it is the same labels for all ranks, so then it is all of them."""
    case = Case("dpo_loss", source, **split)
    where = "everywhere" if case.sizes else "on rank 1"
    (loss, gradients), other = world.run(nothing_scored, case, where, ranks=2)
    assert same_bits(loss, other[0]) and loss.isfinite()
    assert not any(x.any() for x in other[1])
    assert any(x.any() for x in gradients) == bool(case.ends)


def promised(member: Member, case: Case) -> Outcome:
    """As on a GPU, where nobody looks how many tokens are scored."""
    before, plan._free_to_look = plan._free_to_look, lambda device: False
    try:
        return call(case, shard_of(case, case.entry(), member.rank), **case.groups(member))
    finally:
        plan._free_to_look = before


@pytest.mark.parametrize("split", SPLITS, ids=str)
@heads
def test_max_scored_tokens(world, source, split):
    """Kept, it changes nothing; one rank that breaks it makes the results of all ranks NaN, and all
    of its own gradients."""
    case = Case("dpo_loss", source, torch.float64, backend="torch", **split)
    for options, bound in (({}, 24), ({"reduction": "none"}, 24), ({}, 1)):
        case = replace(case, options={**options, "max_scored_tokens": bound})
        made = world.run(promised, case, ranks=case.ranks)
        if bound == 1:
            assert all(x.isnan().all() for outcome in made for x in outcome.outputs.values())
            # the last has the most tokens
            assert all(x.isnan().all() for x in made[-1].gradients)
            continue
        outputs, gradients = together(case, made)
        alone = one_process(case)
        for name, value in alone.outputs.items():
            torch.testing.assert_close(outputs[name], value, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradients, alone.gradients, rtol=1e-10, atol=1e-11)


def low_precision(member: Member, case: Case):
    """The sum over ranks of the gradient of hidden is rounded once."""
    own = shard_of(case, case.entry(), member.rank)
    return call(case, own, **case.groups(member)).gradients[0]


def test_the_gradient_of_hidden_is_rounded_once(world):
    case = Case("sequence_logps", "frozen head", torch.bfloat16, sizes=(20, 3, 44))
    gradient = world.run(low_precision, case, ranks=3)[0]
    exact = one_process(replace(case, dtype=torch.bfloat16)).gradients[0]
    # two results that are rounded once each
    torch.testing.assert_close(gradient, exact, rtol=1.1 * eps(torch.bfloat16), atol=1e-4)


def test_functions_take_groups_of_one(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        entry = Case(source="trained head").entry()
        hidden, weight, bias = entry.inputs
        groups = {"vocab_group": dist.group.WORLD, "sequence_group": dist.group.WORLD}
        options = {"bias": bias, "shift": False}
        for name in ("token_logps", "sequence_logps"):
            function = getattr(dpo_kernels, f"linear_{name}")
            made, plain = (
                function(hidden, weight, entry.labels, **options, **given) for given in (groups, {})
            )
            assert same_bits(made.detach(), plain.detach())
    finally:
        dist.destroy_process_group()
