"""Heads and options that are refused before any matrix product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dpo_kernels as dk
from tests.linear_helpers import GemmLog, make_head


@pytest.fixture
def log(monkeypatch) -> GemmLog:
    return GemmLog(monkeypatch)


class _Adapter(nn.Linear):
    """What peft makes of a wrapped nn.Linear."""

    def __init__(self):
        super().__init__(24, 67)
        self.base_layer = nn.Linear(24, 67)


def _empty_shard() -> torch.Tensor:
    weight = nn.Parameter(torch.empty(0))
    weight.ds_id = 7
    return weight


REFUSED = {
    "module": (lambda: nn.Linear(24, 67), TypeError, "pass its .weight"),
    "adapter": (_Adapter, TypeError, "Merge the adapter"),
    "ZeRO-3 shard": (_empty_shard, ValueError, "GatheredParameters"),
    "flat shard": (lambda: torch.zeros(67 * 12), ValueError, "gathered first"),
    "int8": (lambda: torch.zeros(67, 24, dtype=torch.int8), TypeError, "dequantise"),
    "float8": (lambda: torch.zeros(67, 24).to(torch.float8_e4m3fn), TypeError, "dequantise"),
    "sparse": (lambda: torch.eye(67, 24).to_sparse(), TypeError, "dense"),
    "transposed": (lambda: torch.zeros(24, 67), ValueError, r"weight: expected \[vocabulary, 24\]"),
    "float64": (lambda: torch.zeros(67, 24).double(), TypeError, "torch.autocast"),
    "list": (lambda: [1.0], TypeError, "weight: expected a tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_dense_matrix_is_refused(log, case):
    make, error, message = REFUSED[case]
    problem = make_head()
    with pytest.raises(error, match=message):
        dk.linear_token_logps(problem.hidden, make(), problem.labels)
    assert not log.calls


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bias": torch.zeros(66)}, "bias"),
        ({"precision": "half"}, "precision"),
        ({"workspace_mb": 0}, "workspace_mb"),
        ({"logit_softcap": -1.0}, "logit_softcap"),
        ({"logit_scale": float("nan")}, "logit_scale"),
        ({"temperature": 0.0}, "temperature"),
        ({"reference_weight": torch.zeros(67, 24)}, "reference_hidden"),
        ({"reference_hidden": torch.zeros(6, 5, 24)}, "reference_hidden"),
        ({"reference_hidden": torch.zeros(6, 6, 23)}, "reference_weight"),
        ({"reduction": "max"}, "reduction"),
        ({"loss_type": "dpo"}, "loss_type"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_options_that_do_not_fit_are_refused(options, message):
    problem = make_head()
    with pytest.raises(ValueError, match=message):
        dk.linear_dpo_loss(problem.hidden, problem.weight, problem.labels, **options)


@pytest.mark.parametrize(
    "options",
    [{"logit_scale": "1"}, {"logit_softcap": "30"}, {"workspace_mb": "1"}, {"ignore_index": 1.5}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_another_type_are_refused(options):
    problem = make_head()
    with pytest.raises(TypeError, match=next(iter(options))):
        dk.linear_token_logps(problem.hidden, problem.weight, problem.labels, **options)


def test_a_label_outside_the_vocabulary_is_named_before_any_gemm(log):
    for backend in ("cpu", "torch"):
        problem = make_head()
        problem.labels[2, 3] = 67
        with pytest.raises(ValueError, match=r"labels\[2, 3\].*0 <= label < 67, got 67"):
            dk.linear_dpo_loss(
                problem.hidden,
                problem.weight,
                problem.labels,
                *problem.reference_logps,
                backend=backend,
            )
    assert not log.calls
