"""A call from logits split over 2, 3 and 4 gloo processes gives what one process gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import dpo_kernels
from dpo_kernels import TokenStats, available_backends, reference
from tests.helpers import (
    CPU,
    DTYPES,
    IGNORE,
    acc_eps,
    assert_rule,
    gradient_tolerance,
    logp_tolerance,
    stats_tolerances,
)
from tests.parallel_cases import (
    Case,
    call,
    one_process,
    run,
    same_bits,
    shard_of,
    together,
    weights_of,
)
from tests.parallel_world import Member, World

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SHIFTED = {"shift": True}
# uneven shards, of one column too, and of several segments of the kernels' sums
SIZES = ((40, 27), (1, 66), (20, 3, 44), (1, 1, 64, 1), (8500, 9000))
TOKENS = [
    *(Case(dtype=dtype, sizes=sizes) for dtype in DTYPES for sizes in SIZES[:2]),
    *(Case(dtype=dtype, sizes=SIZES[2], backend="torch") for dtype in DTYPES),
    *(Case(sizes=sizes, kind="borders", packed=True) for sizes in SIZES),
    Case(dtype=torch.bfloat16, sizes=SIZES[3], options={"temperature": 0.7, **SHIFTED}),
    Case(sizes=SIZES[4], backend="torch"),
    *(Case(sizes=(1, 22, 44), kind="ties", backend=backend) for backend in ("cpu", "torch")),
    Case(sizes=SIZES[2], backend="triton", length=4),
    *(Case(sizes=(20, 3, 44), kind="closed", backend=backend) for backend in ("cpu", "torch")),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("ranks")) as made:
        yield made


def name_of(case: Case) -> str:
    parts = (case.function, case.source, str(case.dtype)[6:], case.backend, case.kind, case.packed)
    return "-".join(map(str, (*parts, case.sizes, case.ends, case.options, case.make)))


cases = pytest.mark.parametrize("case", TOKENS, ids=name_of)


def by_reference(case: Case, dtype: torch.dtype) -> tuple[TokenStats, torch.Tensor]:
    entry = case.entry()
    logits = entry.inputs[0].detach().to(dtype).requires_grad_()
    stats = reference.token_stats(logits, entry.labels, **case.options)
    weights = weights_of(stats.logps).to(stats.logps.dtype)
    return stats, torch.autograd.grad(stats.logps, logits, weights)[0]


@cases
def test_tokens_obey_the_rule(world, case):
    if reason := available_backends()[case.backend]:
        pytest.skip(f"{case.backend}: {reason}")
    outcomes = world.run(run, case, ranks=case.ranks)
    outputs, (gradient,) = together(case, outcomes)
    assert outcomes[0].forward == [GATHER] and outcomes[0].backward == []
    (theirs, their_gradient), (truth, true_gradient) = (
        by_reference(case, dtype) for dtype in (case.dtype, torch.float64)
    )
    entry, vocab = case.entry(), sum(case.sizes)
    z = entry.inputs[0].detach().double() / case.options.get("temperature", 1.0)
    z_max = z.nan_to_num(0, 0, 0).abs().max().item() if "temperature" in case.options else 0.0
    scored = entry.labels != IGNORE
    if case.options.get("shift"):
        scored[..., 0] = False
        z = z.roll(1, dims=-2)
    tolerances = stats_tolerances(truth, case.dtype, vocab, z.abs().mean(-1))
    tolerances["logps"] = logp_tolerance(truth.logps, case.dtype, vocab, z_max)
    assert scored.any()
    for name, tolerance in tolerances.items():
        values = (outputs[name], getattr(theirs, name), getattr(truth, name))
        assert_rule(name, *(x[scored] for x in values), tolerance[scored])
        assert not outputs[name][~scored].any()
    assert torch.equal(outputs["is_top1"], truth.is_top1)
    tolerance = gradient_tolerance(
        true_gradient, CPU, case.dtype, vocab, acc_eps(case.dtype) * (1 + 4 * z_max)
    )
    assert_rule("gradient", gradient, their_gradient, true_gradient, tolerance)


@pytest.mark.parametrize("backend", ("cpu", "torch"))
def test_confident_tokens_keep_their_digits(world, backend):
    """A label 40 nats above the rest has a log-prob near -1e-16, on whatever rank it is."""
    case = Case(sizes=(20, 3, 44), kind="confident", backend=backend, make={"pairs": 3})
    outputs, (gradient,) = together(case, world.run(run, case, ranks=3))
    entry = case.entry()
    scored = entry.labels != IGNORE
    z = entry.inputs[0].detach().double()[scored]
    label = entry.labels[scored].unsqueeze(-1)
    # the sum over the others alone: float64's own softmax would have lost the last of these digits
    odds = (z - z.gather(-1, label)).exp().scatter(-1, label, 0.0)
    wanted = -odds.sum(-1).log1p()
    got = outputs["logps"][scored].double()
    assert (wanted < -1e-18).all() and (wanted > -1e-15).any() and (wanted > -1e-4).all()
    # a distance of up to 60 nats, its exponential, and a sum of 67 terms
    rtol = 100 * acc_eps(torch.float32)
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=0)
    weights = weights_of(scored)[scored].unsqueeze(-1)
    slopes = -weights * odds * wanted.exp().unsqueeze(-1)
    slopes.scatter_(-1, label, -wanted.expm1().unsqueeze(-1) * weights)
    torch.testing.assert_close(gradient[scored].double(), slopes, rtol=rtol, atol=1e-37)


LOSSES = (
    {},
    {"loss_type": "ipo", "reduction": "sum"},
    {"average_log_prob": True, "label_smoothing": 0.1, "reduction": "none"},
    {"ld_alpha": 0.3},
    {"ld_alpha": 0.0, "use_weighting": True},
    {"use_weighting": True, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    {"loss_type": "aot", "f_divergence": "reverse_kl"},
    {"loss_type": "sigmoid_norm"},
)
SPLITS = ({"sizes": (30, 37)}, {"ends": (3, 8)}, {"ends": (1, 1, 4, 8)})
BOTH = {"sizes": (30, 37), "ends": (5, 8)}


@pytest.mark.parametrize("split", (*SPLITS, BOTH), ids=str)
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_losses_in_float64(world, options, packed, split):
    case = Case("dpo_loss", dtype=torch.float64, packed=packed, options=options, **split)
    case = replace(case, make={"pairs": 3})
    outcomes = world.run(run, case, ranks=case.ranks)
    outputs, gradients = together(case, outcomes)
    alone = one_process(case)
    for name, value in alone.outputs.items():
        torch.testing.assert_close(outputs[name], value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradients, alone.gradients, rtol=1e-10, atol=1e-13)
    # one for the tokens, one for the sums, and one for lengths that are needed before
    expected = bool(case.sizes) + bool(case.ends) * (1 + ("ld_alpha" in options))
    assert outcomes[0].forward == [GATHER] * expected and outcomes[0].backward == []


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("split", (*SPLITS, BOTH), ids=str)
@pytest.mark.parametrize("options", ({}, {"average_log_prob": True}), ids=str)
def test_sequence_logps(world, options, split, dtype):
    """In the dtypes that round: as near as the roundings of a sum of log-probs are."""
    case = Case("sequence_logps", dtype=dtype, options=options, **split)
    outcomes = world.run(run, case, ranks=case.ranks)
    outputs, gradients = together(case, outcomes)
    alone = one_process(case)
    tolerance = logp_tolerance(alone.outputs["logps"], dtype, 67) * case.length
    assert ((outputs["logps"] - alone.outputs["logps"]).abs() <= tolerance).all()
    eps = torch.finfo(dtype).eps + 200 * acc_eps(dtype)
    torch.testing.assert_close(gradients, alone.gradients, rtol=eps, atol=1e-30)
    assert len(outcomes[0].forward) == bool(case.sizes) + bool(case.ends)


@pytest.mark.parametrize("function", ("token_logps", "token_stats"))
def test_tokens_of_a_slice_need_no_other(world, function):
    """The group changes nothing: no collective, and the bits of one process."""
    case = Case(function, ends=(3, 8))
    outcomes = world.run(run, case, ranks=2)
    for rank, outcome in enumerate(outcomes):
        own = shard_of(case, case.entry(), rank)
        alone = outputs_alone(case, own)
        assert outcome.forward == [] and same_bits(outcome.outputs["logps"], alone)


def outputs_alone(case: Case, entry) -> torch.Tensor:
    out = getattr(entry, case.function)()
    return (out if isinstance(out, torch.Tensor) else out.logps).detach()


def nothing_scored(member: Member, case: Case) -> tuple:
    """On the last rank of a group no token is scored."""
    entry = shard_of(case, case.entry(), member.rank)
    if member.rank == case.ranks - 1:
        entry.labels.fill_(IGNORE)
    outcome = call(case, entry, **case.groups(member))
    return outcome.outputs["loss"], outcome.gradients, outcome.forward


@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_a_rank_with_nothing_scored(world, packed):
    case = Case("dpo_loss", ends=(3, 8), packed=packed)
    (loss, gradients, forward), other = world.run(nothing_scored, case, ranks=2)
    assert same_bits(loss, other[0]) and forward == other[2]
    assert not other[1][0].any() and gradients[0].any()
    entry = case.entry()
    labels = entry.labels.clone()
    if not packed:
        # the aligned label of row t is that of row t + 1
        labels[:, 4:] = IGNORE
        alone = call(case, replace(entry, labels=labels))
        torch.testing.assert_close(loss, alone.outputs["loss"], rtol=1e-6, atol=0)


def group_of_one(member: Member) -> bool:
    alone = {"vocab_group": member.first[1], "sequence_group": member.first[1]}
    entry = Case().entry()
    for function in ("token_stats", "sequence_logps", "dpo_loss"):
        case = Case(function, options={"shift": False})
        with_groups, without = (call(case, entry, **groups) for groups in (alone, {}))
        assert with_groups.forward == [] and with_groups.backward == []
        for name, value in without.outputs.items():
            assert same_bits(value, with_groups.outputs[name])
        assert all(map(same_bits, without.gradients, with_groups.gradients))
    return True


def test_a_group_of_one_rank_is_one_process(world):
    assert world.run(group_of_one, ranks=1) == [True]


def in_place(member: Member, case: Case) -> list[torch.Tensor]:
    entry = shard_of(case, case.entry(), member.rank)
    logits = entry.inputs[0].detach().clone().requires_grad_()
    stored = logits * 1
    own = entry.with_inputs(stored)
    groups = {"shift": not case.ends, **case.groups(member)}
    own.dpo_loss(inplace_backward=True, **groups).loss.backward()
    plain = call(case, entry, torch.ones(()), **groups).gradients[0]
    assert same_bits(logits.grad, plain)
    # the memory of the logits holds it
    return stored.detach()


@pytest.mark.parametrize("split", (SPLITS[0], BOTH), ids=str)
def test_in_place(world, split):
    case = Case("dpo_loss", **split)
    for stored in world.run(in_place, case, ranks=case.ranks):
        assert stored.abs().max() < 1


# torch.compile


@pytest.fixture
def one_rank_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_compiled_graphs_end_at_a_call_over_ranks(one_rank_group):
    entry = Case().entry()

    def total(logits, group):
        logps = dpo_kernels.token_logps(logits * 2, entry.labels, vocab_group=group)
        return (logps * 3).sum()

    logits = entry.inputs[0].detach()
    wanted = total(logits, one_rank_group)
    torch._dynamo.reset()
    compiled = torch.compile(total, backend="eager")
    assert torch.equal(compiled(logits, one_rank_group), wanted)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="token_logps"):
        torch.compile(total, backend="eager", fullgraph=True)(logits, one_rank_group)
    torch._dynamo.reset()
    # without a group it is one graph
    assert torch.equal(torch.compile(total, backend="eager", fullgraph=True)(logits, None), wanted)
    torch._dynamo.reset()
