"""A table of wrong calls: each is refused before any work, by an error that names the argument.

A row is (functions, what is changed in a right call, the error, the argument's name). The change is
made to each function in turn, with values that are made when the test runs.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import dpo_kernels as dk
from tests.wrong_values import FLOAT_TENSORS, INTEGER_TENSORS, VECTORS, dtensor, float8

LOGITS = torch.zeros(4, 3, 5)
LABELS = torch.ones(4, 3, dtype=torch.int64)
HIDDEN, WEIGHT = torch.zeros(4, 3, 6), torch.zeros(5, 6)
LOGPS = torch.zeros(2)
CU = torch.tensor([0, 3, 6, 9, 12])

REFERENCES = {"reference_chosen_logps": LOGPS, "reference_rejected_logps": LOGPS}
HEAD = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS}
RIGHT = {
    "token_logps": {"logits": LOGITS, "labels": LABELS},
    "token_stats": {"logits": LOGITS, "labels": LABELS},
    "sequence_logps": {"logits": LOGITS, "labels": LABELS},
    "dpo_loss": {"policy_logits": LOGITS, "labels": LABELS, **REFERENCES},
    "linear_token_logps": HEAD,
    "linear_token_stats": HEAD,
    "linear_sequence_logps": HEAD,
    "linear_dpo_loss": {**HEAD, **REFERENCES},
    "preference_loss": {"policy_chosen_logps": LOGPS, "policy_rejected_logps": LOGPS, **REFERENCES},
    "DPOLoss": {},
    "LinearDPOLoss": {},
}

LOGPS_OF_LOGITS = ("token_logps", "token_stats", "sequence_logps")
OF_HIDDEN = ("linear_token_logps", "linear_token_stats", "linear_sequence_logps", "linear_dpo_loss")
OF_LOGITS = (*LOGPS_OF_LOGITS, "dpo_loss")
EVERY = (*OF_LOGITS, *OF_HIDDEN)
SEQUENCES = ("sequence_logps", "dpo_loss", "linear_sequence_logps", "linear_dpo_loss")
PAIRS = ("dpo_loss", "linear_dpo_loss")
MODULES = ("DPOLoss", "LinearDPOLoss")
LOSS = (*PAIRS, "preference_loss", *MODULES)
OPTIONS = (*EVERY, *MODULES)
HEADS = (*OF_HIDDEN, "LinearDPOLoss")

# not a number, or none that float32 holds
NO_NUMBERS = ("1", None, True, 1j, [1.0], torch.tensor(1.0), b"1")
TOO_LARGE = 10**400
BEYOND_FLOAT32 = (1e-40, 1e-45, 1e300, TOO_LARGE)
NO_FLAGS = ("False", "no", 7, 0, 1.0, None, [], torch.tensor(True))

GROUPS = ("vocab_group", "sequence_group")
NO_MEMBER = dist.GroupMember.NON_GROUP_MEMBER


def everybody(_):
    return dist.group.WORLD


def mesh(_):
    return init_device_mesh("cpu", (1,))


def number_rows(functions, name, *, optional=False, also=()):
    """Rows for an option that is a number; ``also`` are numbers out of its range."""
    changes = [{name: value} for value in NO_NUMBERS if not (optional and value is None)]
    yield from ((functions, change, TypeError, name) for change in changes)
    yield from ((functions, {name: value}, ValueError, name) for value in (*BEYOND_FLOAT32, *also))


def flag_rows(functions, name):
    yield from ((functions, {name: value}, TypeError, name) for value in NO_FLAGS)


SIMPO, IPO, DISCOPOP = ({"loss_type": name} for name in ("simpo", "ipo", "discopop"))
ALPHA = {"f_divergence": "alpha_divergence"}
MIX = {"loss_type": ["sigmoid", "ipo"]}
OUT = (0.0, -1.0, math.nan, math.inf, -math.inf)

ROWS = [
    *number_rows(LOSS, "beta", also=OUT),
    *number_rows(LOSS, "label_smoothing", also=(1.0, -0.1, math.nan, math.inf)),
    *number_rows(OPTIONS, "temperature", also=OUT),
    *number_rows(HEADS, "logit_scale", also=(math.nan, math.inf)),
    *number_rows(HEADS, "logit_softcap", optional=True, also=OUT),
    *number_rows(HEADS, "workspace_mb", optional=True, also=(*OUT, 1e13, 1e15)),
    *number_rows((*PAIRS, *MODULES), "ld_alpha", optional=True, also=(-0.1, 1.1, math.nan)),
    *flag_rows(OPTIONS[:-2], "shift"),
    *flag_rows(SEQUENCES, "average_log_prob"),
    *flag_rows(LOSS, "reference_free"),
    *flag_rows((*PAIRS, *MODULES), "use_weighting"),
    *flag_rows(("dpo_loss", "DPOLoss"), "inplace_backward"),
    *flag_rows(("linear_dpo_loss", "LinearDPOLoss"), "return_stats"),
    *((OPTIONS, {"ignore_index": x}, TypeError, "ignore_index") for x in (True, "x", 1.5, None)),
    *((OPTIONS, {"ignore_index": x}, ValueError, "ignore_index") for x in (2**63, 2**70, -(2**64))),
    *(
        (HEADS, {"max_scored_tokens": x}, TypeError, "max_scored_tokens")
        for x in (True, "x", 3.0, [3], torch.tensor(3))
    ),
    *(
        (HEADS, {"max_scored_tokens": x}, ValueError, "max_scored_tokens")
        for x in (-1, -(2**64), 2**63, 2**70)
    ),
    *((OPTIONS, {"backend": x}, ValueError, "backend") for x in ("gpu", "CPU", 3, False, ["cpu"])),
    *(((*PAIRS, *MODULES), {"reduction": x}, ValueError, "reduction") for x in ("max", None, 0)),
    *((HEADS, {"precision": x}, ValueError, "precision") for x in ("half", None, 32, ["exact"])),
    *((LOSS, {"f_divergence": x}, ValueError, "f_divergence") for x in ("kl", None, ["alpha"])),
    *((LOSS, {"loss_type": x}, TypeError, "loss_type") for x in (None, 3, [["sigmoid"]], [3])),
    *((LOSS, {"loss_type": x}, ValueError, "loss_type") for x in ("dpo", "Sigmoid", [], ["dpo"])),
    (LOSS, {"loss_type": {"sigmoid"}}, TypeError, "loss_type"),
    *(
        (LOSS, {"loss_type": {"sigmoid": 1.0, "ipo": x}}, error, "loss_type")
        for x, error in (
            ("1", TypeError),
            (None, TypeError),
            (True, TypeError),
            (math.nan, ValueError),
        )
    ),
    *(
        (LOSS, {"loss_type": x}, ValueError, "loss_type")
        for x in ({}, {"dpo": 1.0}, {"sigmoid": 1.0, "Ipo": 1.0})
    ),
    (LOSS, {"loss_type": {3: 1.0}}, TypeError, "loss_type"),
    (LOSS, {"loss_type": {"ipo": 1.0}, "loss_weights": [1.0]}, ValueError, "loss_weights"),
    *((LOSS, {**MIX, "loss_weights": x}, TypeError, "loss_weights") for x in (1.0, "11", {1, 2})),
    *((LOSS, {**MIX, "loss_weights": x}, ValueError, "loss_weights") for x in ([1.0], [1, 2, 3])),
    *(
        (LOSS, {**MIX, "loss_weights": [1.0, x]}, TypeError, "loss_weights[1]")
        for x in ("1", None, True, torch.tensor(1.0, requires_grad=True))
    ),
    *(
        (LOSS, {**MIX, "loss_weights": [1.0, x]}, ValueError, "loss_weights[1]")
        for x in (math.nan, math.inf, TOO_LARGE)
    ),
    *((LOSS, {**SIMPO, "simpo_gamma": x}, TypeError, "simpo_gamma") for x in ("1", None, True)),
    *((LOSS, {**SIMPO, "simpo_gamma": x}, ValueError, "simpo_gamma") for x in (math.nan, math.inf)),
    *((LOSS, {**DISCOPOP, "discopop_tau": x}, TypeError, "discopop_tau") for x in ("1", True)),
    *((LOSS, {**DISCOPOP, "discopop_tau": x}, ValueError, "discopop_tau") for x in (*OUT, 1e-40)),
    *(
        (LOSS, {**ALPHA, "f_alpha_divergence_coef": x}, error, "f_alpha_divergence_coef")
        for x, error in (("half", TypeError), (True, TypeError), (math.nan, ValueError))
    ),
    # a reference that is missing, or half given, or given to a loss that has none
    (PAIRS, dict.fromkeys(REFERENCES), ValueError, "reference_chosen_logps"),
    (PAIRS, {"reference_rejected_logps": None}, ValueError, "reference_rejected_logps"),
    (PAIRS, {"reference_free": True}, ValueError, "reference_chosen_logps"),
    # tensors
    *((LOGPS_OF_LOGITS, {"logits": make}, TypeError, "logits") for make in FLOAT_TENSORS),
    *(("dpo_loss", {"policy_logits": make}, TypeError, "policy_logits") for make in FLOAT_TENSORS),
    *((OF_HIDDEN, {"hidden": make}, TypeError, "hidden") for make in FLOAT_TENSORS),
    *((EVERY, {"labels": make}, TypeError, "labels") for make in INTEGER_TENSORS),
    *((OF_HIDDEN, {"bias": make}, TypeError, "bias") for make in (*VECTORS, float8, dtensor)),
    *(
        (PAIRS, {name: make}, TypeError, name)
        for name in REFERENCES
        for make in (*VECTORS, dtensor)
    ),
    *((PAIRS, {name: LOGPS[:1]}, ValueError, name) for name in REFERENCES),
    *(
        ("preference_loss", {name: make}, TypeError, name)
        for name in RIGHT["preference_loss"]
        for make in VECTORS
    ),
    *(
        (PAIRS, {"cu_seqlens": value}, TypeError, "cu_seqlens")
        for value in (CU.float(), CU.tolist(), CU.to(torch.complex64), lambda _: CU.to_sparse())
    ),
    *(
        (
            "preference_loss",
            {**IPO, "chosen_lengths": LOGPS, "rejected_lengths": x},
            error,
            "rejected_lengths",
        )
        for x, error in (
            (torch.tensor([3, -1]), ValueError),
            (torch.tensor([3.0, math.nan]), ValueError),
            (torch.ones(3), ValueError),
            (LOGPS.to(torch.complex64), TypeError),
            (LOGPS.bool(), TypeError),
            ([3, 4], TypeError),
            (lambda _: LOGPS.to_sparse(), TypeError),
        )
    ),
    # a DTensor that fully_shard did not make
    (OF_HIDDEN, {"weight": dtensor}, TypeError, "weight"),
    *(
        (
            "linear_dpo_loss",
            {"reference_hidden": HIDDEN, **dict.fromkeys(REFERENCES), name: dtensor},
            TypeError,
            name,
        )
        for name in ("reference_hidden", "reference_weight")
    ),
    ("linear_dpo_loss", {"reference_weight": WEIGHT}, ValueError, "reference_weight"),
    ("linear_dpo_loss", {"reference_hidden": HIDDEN}, ValueError, "reference_hidden"),
    ("dpo_loss", {"reference_logits": LOGITS}, ValueError, "reference_logits"),
    # groups of ranks
    *((OPTIONS, {x: y}, TypeError, x) for x in GROUPS for y in (1, "world", [0, 1], True, mesh)),
    *((OPTIONS, {x: NO_MEMBER}, ValueError, x) for x in GROUPS),
    (OPTIONS, {"sequence_group": everybody, "shift": True}, ValueError, "shift"),
]


def label(value) -> str:
    if callable(value):
        return value.__name__
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return "10**400" if value is TOO_LARGE else repr(value)


def cases():
    made = []
    for functions, change, error, name in ROWS:
        said = ", ".join(f"{key}={label(value)}" for key, value in change.items())
        for function in (functions,) if isinstance(functions, str) else functions:
            made.append(pytest.param(function, change, error, name, id=f"{function}({said})"))
    return made


def call(function: str, change: dict):
    right = RIGHT[function]
    made = {
        key: value(right.get(key, WEIGHT[:, 0])) if callable(value) else value
        for key, value in change.items()
    }
    return getattr(dk, function)(**{**right, **made})


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """One rank by itself: a DTensor needs a mesh."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("function", RIGHT)
def test_the_call_that_rows_change_is_right(function):
    call(function, {})


@pytest.mark.parametrize("function, change, error, name", cases())
def test_refused_by_name(function, change, error, name):
    with pytest.raises(error) as raised:
        call(function, change)
    assert type(raised.value) is error
    # the names come first, before what was expected
    assert name in str(raised.value).split(": ")[0], str(raised.value)


def test_the_table_is_long_enough():
    assert len(ROWS) >= 150 and len({row[3] for row in ROWS}) >= 30


# calls that look odd and are right


@pytest.mark.parametrize("function", PAIRS)
@pytest.mark.parametrize("loss_type", ("sigmoid", "ipo", "sppo_hard"))
def test_numbers_of_every_kind(function, loss_type):
    """A fraction and numpy's numbers are numbers, numpy's booleans are flags."""
    expected = call(function, {"beta": 0.25, "loss_type": loss_type}).losses
    for beta in (Fraction(1, 4), np.float32(0.25), np.float64(0.25)):
        options = {"beta": beta, "shift": np.bool_(True), "ignore_index": np.int64(-100)}
        assert torch.equal(call(function, {**options, "loss_type": loss_type}).losses, expected)
    assert torch.equal(
        call(function, {"beta": 1, "loss_type": loss_type}).losses,
        call(function, {"beta": 1.0, "loss_type": loss_type}).losses,
    )


@pytest.mark.parametrize("function", (*PAIRS, "preference_loss"))
def test_a_dict_of_losses_has_their_weights(function):
    """In any order; names without weights are a list."""
    mixed = call(function, {"loss_type": {"ipo": 0.5, "sigmoid": 2}})
    listed = call(function, {"loss_type": ["ipo", "sigmoid"], "loss_weights": [0.5, 2.0]})
    ours, wanted = (x[0] if isinstance(x, tuple) else x.losses for x in (mixed, listed))
    assert torch.equal(ours, wanted) and ours.all()


@pytest.mark.parametrize("name", ("labels", "cu_seqlens", "reference_chosen_logps"))
@pytest.mark.parametrize("function", PAIRS)
def test_tensors_made_in_inference_mode(function, name):
    """A collator or a reference pass may make them there; the gradient is the usual one."""
    packed = {"labels": LABELS.flatten(), "cu_seqlens": CU}
    first = "policy_logits" if function == "dpo_loss" else "hidden"
    arguments = {**RIGHT[function], **packed}
    gradients = []
    for made_there in (False, True):
        values = torch.linspace(-1, 1, RIGHT[function][first].numel())
        leaf = values.view(12, -1).requires_grad_()
        with torch.inference_mode(made_there):
            changed = arguments[name].clone()
        assert changed.is_inference() == made_there
        output = getattr(dk, function)(**{**arguments, first: leaf, name: changed})
        gradients.append(torch.autograd.grad(output.loss, leaf)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", ("hidden", "weight", "bias"))
@pytest.mark.parametrize("function", OF_HIDDEN)
def test_a_head_made_in_inference_mode(function, name):
    """Refused where a backward would read it, legal where none does."""
    arguments = {**RIGHT[function], "bias": torch.zeros(5)}
    with torch.inference_mode():
        changed = arguments[name].clone()
    getattr(dk, function)(**{**arguments, name: changed})
    other = "weight" if name == "hidden" else "hidden"
    trained = {other: arguments[other].clone().requires_grad_()}
    with pytest.raises(ValueError, match=f"^{name}: made in inference mode"):
        getattr(dk, function)(**{**arguments, name: changed, **trained})
    with torch.no_grad():
        getattr(dk, function)(**{**arguments, name: changed, **trained})


# what is known only later


@pytest.mark.parametrize("function", PAIRS)
def test_a_callable_that_detaches_is_refused(function):
    first = "policy_logits" if function == "dpo_loss" else "hidden"
    leaf = RIGHT[function][first].clone().requires_grad_()
    for detaches in (lambda c, r: (r - c).detach(), lambda c, r: torch.zeros_like(c)):
        with pytest.raises(ValueError, match=r"^loss_type: .*no gradient"):
            getattr(dk, function)(**{**RIGHT[function], first: leaf, "loss_type": detaches})
    # where there is no gradient to lose it is as good as any
    assert not getattr(dk, function)(**RIGHT[function], loss_type=detaches).loss.requires_grad


@pytest.mark.parametrize("function", PAIRS)
@pytest.mark.parametrize("name", REFERENCES)
def test_nan_in_reference_log_probs(monkeypatch, function, name):
    """It propagates; where values are validated it is refused with its place."""
    monkeypatch.delenv("DPO_KERNELS_VALIDATE", raising=False)
    wrong = torch.tensor([0.0, math.nan])
    assert call(function, {name: wrong}).losses.isnan().tolist() == [False, True]
    monkeypatch.setenv("DPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match=rf"^{name}\[1\]: .*nan"):
        call(function, {name: wrong})


def test_a_missing_reference_is_asked_for_by_names_that_exist():
    for function, other in (
        ("dpo_loss", "reference_logits"),
        ("linear_dpo_loss", "reference_hidden"),
    ):
        with pytest.raises(ValueError, match=other):
            call(function, dict.fromkeys(REFERENCES))
