"""Every bad argument is refused before a kernel runs, by a message that names it, says what came
and what was expected."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels
from dpo_kernels import DPOLoss, dpo_loss, preference_loss
from dpo_kernels.losses import LOSSES
from tests.bad_calls import BAD_CALLS, BAD_OPTIONS, BASE, CU, LABELS, LOGITS, REF


def assert_refused(case, call) -> None:
    arguments, error, parts = case
    with pytest.raises(error) as raised:
        call(arguments)
    message = str(raised.value)
    assert message.startswith(parts[0]) or parts[0] in message.split(":")[0]
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("name", BAD_CALLS)
def test_dpo_loss_refuses(name):
    assert_refused(BAD_CALLS[name], lambda changed: dpo_loss(**{**BASE, **changed}))


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_refused(name):
    case = BAD_OPTIONS[name]
    assert_refused(case, lambda changed: preference_loss(REF, REF, REF, REF, **changed))
    assert_refused(case, lambda changed: dpo_loss(**BASE, **changed))
    assert_refused(case, lambda changed: DPOLoss(**changed))


@pytest.mark.parametrize("name", LOSSES)
def test_options_a_loss_does_not_take(name):
    """Rejected, never dropped."""
    smoothing = 0.1 if name == "exo_pair" else 0.0
    refused = []
    for options in (
        {"label_smoothing": 0.1},
        {"f_divergence": "js_divergence"},
        {"chosen_lengths": torch.ones(2), "rejected_lengths": torch.ones(2)},
    ):
        arguments = {"loss_type": name, "label_smoothing": smoothing, **options}
        try:
            preference_loss(REF, REF, REF, REF, **arguments)
        except ValueError as error:
            assert "does not take" in str(error)
            refused.append(next(iter(options)))
    loss = LOSSES[name]
    taken = {
        "label_smoothing": loss.label_smoothing,
        "f_divergence": loss.f_divergence,
        "chosen_lengths": loss.lengths,
    }
    assert refused == [option for option, takes in taken.items() if not takes]


@pytest.mark.parametrize("function", ("token_logps", "token_stats", "sequence_logps"))
def test_other_functions_refuse(function):
    def call(changed):
        getattr(dpo_kernels, function)(**{"logits": LOGITS, "labels": LABELS, **changed})

    for case in (
        ({"logits": None}, TypeError, ("logits", "NoneType", "tensor")),
        ({"logits": LOGITS.int()}, TypeError, ("logits", "int32", "float32")),
        ({"logits": LOGITS[0, 0]}, ValueError, ("logits", "[5]", "vocabulary")),
        ({"labels": None}, TypeError, ("labels", "NoneType", "tensor")),
        ({"labels": LABELS.float()}, TypeError, ("labels", "float32", "integer")),
        ({"labels": LABELS[1:]}, ValueError, ("labels", "[3, 3]", "[4, 3]")),
        ({"temperature": -1.0}, ValueError, ("temperature", "-1.0", "positive")),
        ({"ignore_index": None}, TypeError, ("ignore_index", "NoneType", "integer")),
        ({"backend": "numpy"}, ValueError, ("backend", "'numpy'", "torch")),
    ):
        assert_refused(case, call)


HIDDEN_BASE = {
    "hidden": torch.zeros(4, 3, 6),
    "weight": torch.zeros(5, 6),
    "labels": LABELS,
}


@pytest.mark.parametrize("frozen", (False, True), ids=("trainable", "frozen"))
@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_refused_from_hidden_states(name, frozen):
    """By one rule on every path, whether or not the head is trained."""

    def call(changed):
        weight = torch.zeros(5, 6, requires_grad=not frozen)
        references = {"reference_chosen_logps": REF, "reference_rejected_logps": REF}
        dpo_kernels.linear_dpo_loss(**{**HIDDEN_BASE, **references, "weight": weight, **changed})

    assert_refused(BAD_OPTIONS[name], call)


def test_reference_hidden_refused():
    def call(changed):
        dpo_kernels.linear_dpo_loss(**{**HIDDEN_BASE, **changed})

    free = {"reference_hidden": HIDDEN_BASE["hidden"], "reference_free": True}
    assert_refused((free, ValueError, ("reference_hidden", "reference_free=True")), call)
    missing = ("reference_chosen_logps", "reference_hidden", "reference_free")
    assert_refused(({}, ValueError, missing), call)


@pytest.mark.parametrize("function", ("token_logps", "sequence_logps"))
def test_in_place_refused(function):
    def call(changed):
        getattr(dpo_kernels, function)(labels=LABELS, inplace_backward=True, **changed)

    leaf, expanded = LOGITS.clone().requires_grad_(), LOGITS[:1].expand(4, 3, 5)
    assert_refused(({"logits": leaf}, ValueError, ("inplace_backward", "leaf")), call)
    assert_refused(({"logits": expanded}, ValueError, ("inplace_backward", "expanded")), call)


def test_preference_loss_refuses_tensors():
    def call(changed):
        names = ("policy_chosen_logps", "policy_rejected_logps")
        names += ("reference_chosen_logps", "reference_rejected_logps")
        preference_loss(**{**dict.fromkeys(names, REF), **changed})

    for case in (
        ({"policy_chosen_logps": [0.0]}, TypeError, ("policy_chosen_logps", "list", "tensor")),
        ({"policy_rejected_logps": None}, TypeError, ("policy_rejected_logps", "NoneType")),
        ({"policy_rejected_logps": REF.long()}, TypeError, ("policy_rejected_logps", "int64")),
        ({"policy_rejected_logps": REF[:1]}, ValueError, ("policy_rejected_logps", "[1]", "[2]")),
        ({"policy_chosen_logps": REF[None]}, ValueError, ("policy_chosen_logps", "[1, 2]")),
        ({"reference_chosen_logps": REF[:1]}, ValueError, ("reference_chosen_logps", "[1]", "[2]")),
        ({"reference_chosen_logps": None}, ValueError, ("reference_chosen_logps", "both")),
        ({"chosen_lengths": REF, "loss_type": "ipo"}, ValueError, ("chosen_lengths", "both")),
        (
            {"chosen_lengths": REF[:1], "rejected_lengths": REF, "loss_type": "ipo"},
            ValueError,
            ("chosen_lengths", "[1]", "[2]"),
        ),
    ):
        assert_refused(case, call)


def test_callable_must_return_one_loss_a_pair():
    for function, came in ((lambda c, r: (c - r).sum(), "[]"), (lambda c, r: 0.0, "float")):
        case = ({"loss_type": function}, ValueError, ("loss_type", came, "[2]"))
        assert_refused(case, lambda changed: preference_loss(REF, REF, REF, REF, **changed))
        assert_refused(case, lambda changed: dpo_loss(**BASE, **changed))


def test_module_refuses_unknown_options():
    for options in ({"betta": 0.1}, {"cu_seqlens": CU}, {"reference_logits": LOGITS}):
        name = next(iter(options))
        with pytest.raises(TypeError, match=f"^{name}: dpo_loss takes .*temperature"):
            DPOLoss(**options)
