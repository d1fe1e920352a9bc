"""Ranks that disagree, raise or end: the others get an error with a name, and no wrong number."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.parallel_cases import Case, shard_of
from tests.parallel_world import Member, World

# seconds: what a group waits for a rank, and what a test gives it to notice
TIMEOUT, NOTICED = 3, 60


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with World(tmp_path_factory.mktemp("ranks"), ranks=2) as made:
        yield made


VOCAB, SEQUENCE = {"sizes": (30, 37)}, {"ends": (3, 8)}
# (how the call is split, its source, the argument that rank 1 has another of, what it has)
DISAGREEMENTS = [
    *(
        (split, source, *change)
        for split in (VOCAB, SEQUENCE)
        for source in ("logits", "trained head")
        for change in (
            ("loss_type", {"loss_type": "ipo"}),
            ("beta", {"beta": 0.2}),
            ("reduction", {"reduction": "sum"}),
            ("temperature", {"temperature": 0.5}),
            ("ignore_index", {"ignore_index": -1}),
            ("reference_chosen_logps, reference_rejected_logps", "references"),
        )
    ),
    (VOCAB, "logits", "policy_logits", "pairs"),
    (VOCAB, "logits", "policy_logits", "dtype"),
    (VOCAB, "logits", "labels", "labels"),
    (VOCAB, "trained head", "hidden", "pairs"),
    (VOCAB, "trained head", "hidden", "dtype"),
    (VOCAB, "trained head", "labels", "labels"),
    (VOCAB, "trained head", "weight.requires_grad", "frozen"),
    (SEQUENCE, "logits", "labels", "pairs"),
    (SEQUENCE, "logits", "policy_logits", "dtype"),
    (SEQUENCE, "logits", "policy_logits", "vocabulary"),
    (SEQUENCE, "trained head", "labels", "pairs"),
    (SEQUENCE, "trained head", "weight", "dtype"),
    (SEQUENCE, "trained head", "weight", "vocabulary"),
]


def disagree(member: Member, case: Case, change) -> None:
    os.environ["DPO_KERNELS_VALIDATE"] = "1"
    try:
        entry, options = case.entry(), {}
        if member.rank == 1 and change == "pairs":
            entry = replace(case, make={"pairs": 3}).entry()
        own = shard_of(case, entry, member.rank)
        if member.rank == 1:
            if isinstance(change, dict):
                options = change
            elif change == "references":
                own = replace(own, reference=(own.reference[0] + 1, own.reference[1]))
            elif change == "labels":
                own.labels[0, 3] = 5 if own.labels[0, 3] != 5 else 6
            elif change == "dtype":
                own = own.with_inputs(*(x.detach().bfloat16().requires_grad_() for x in own.inputs))
            elif change == "frozen":
                own = own.with_inputs(own.inputs[0], *(x.detach() for x in own.inputs[1:]))
            elif change == "vocabulary":
                last = [x[:-1] if x.shape[0] == 67 else x for x in own.inputs]
                last = last if len(last) > 1 else [own.inputs[0][..., :-1]]
                own = own.with_inputs(*last)
        shift = not case.ends
        own.dpo_loss(**{"shift": shift, **options}, **case.groups(member))
    finally:
        del os.environ["DPO_KERNELS_VALIDATE"]


@pytest.mark.parametrize(
    "split, source, name, change", DISAGREEMENTS, ids=lambda x: str(x).replace(" ", "")
)
def test_ranks_that_disagree(world, split, source, name, change):
    case = Case("dpo_loss", source, **split)
    for error in world.raised(disagree, case, change, ranks=2):
        assert type(error) is ValueError, error.__notes__[0]
        assert str(error).startswith(f"{name}: expected the same on every rank of ")
        assert " on rank 0 and " in str(error)


def agree(member: Member, case: Case, options: dict) -> tuple:
    """Without the checks, and with them."""
    own = shard_of(case, case.entry(), member.rank)
    options = {"shift": not case.ends, **options, **case.groups(member)}
    losses = []
    for value in ("", "1"):
        os.environ["DPO_KERNELS_VALIDATE"] = value
        losses.append(own.dpo_loss(**options).loss.detach())
    del os.environ["DPO_KERNELS_VALIDATE"]
    return tuple(losses)


def margin(c: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return (c - r - 1).square()


@pytest.mark.parametrize("split", (VOCAB, SEQUENCE), ids=str)
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("options", ({}, {"loss_type": margin}), ids=("sigmoid", "callable"))
def test_ranks_that_agree(world, split, packed, options):
    case = Case("dpo_loss", packed=packed, **split)
    for without, checked in world.run(agree, case, options, ranks=2):
        assert torch.equal(without, checked)


def ending(member: Member, case: Case, how: str) -> float:
    own = shard_of(case, case.entry(), member.rank)
    # a rank that ends while the other still connects would end that one too
    dist.barrier()
    if member.rank == 1:
        if how == "dies":
            os._exit(1)
        raise RuntimeError("something else went wrong")
    started = time.monotonic()
    try:
        own.dpo_loss(shift=not case.ends, **case.groups(member))
    except RuntimeError as error:
        assert time.monotonic() - started < NOTICED
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    "case, said",
    (
        (Case("dpo_loss", **VOCAB), "vocab_group: the all-gather of row sums"),
        (Case("dpo_loss", **SEQUENCE), "sequence_group: the all-gather of sums over sequences"),
        (Case("dpo_loss", "trained head", **VOCAB), "vocab_group: the all-gather of columns"),
    ),
    ids=("logits", "sequences", "head"),
)
@pytest.mark.parametrize("how", ("dies", "raises"))
def test_a_rank_that_ends(tmp_path, case, said, how):
    with World(tmp_path, ranks=2, timeout=TIMEOUT) as world:
        world.timeout = NOTICED
        world.start(ending, case, how, ranks=2)
        message = world.result(0)
    assert message.startswith(f"{said} failed on rank 0 of 2. Another rank may"), message
