"""The oracle knows a wrong result from a right one."""

from __future__ import annotations

import math

import pytest
import torch

from tests.fuzz import oracle
from tests.fuzz.compare import close
from tests.helpers import CPU, assert_rule, gradient_tolerance, logp_tolerance


def test_values_by_hand():
    """Two tokens of a vocabulary of two: log(1/2) and log(1/4), and the DPO loss of no ratio."""
    rows = oracle.rows_of(torch.tensor([9, 0, 1, 1]), [0, 3, 4], False, 9)
    assert rows.tokens.tolist() == [1, 2, 3] and rows.nth.tolist() == [1, 2, 1]
    assert rows.lengths.tolist() == [2, 1]
    shifted = oracle.rows_of(torch.tensor([9, 0, 1, 1]), [0, 3, 4], True, 9)
    assert shifted.rows.tolist() == [0, 1] and shifted.lengths.tolist() == [2, 0]
    z = torch.tensor([[0.0, 0.0], [0.0, 0.0], [math.log(3), 0.0], [0.0, 0.0]]).double()
    logps = oracle.token_logps(z, rows)
    assert logps.exp().tolist() == pytest.approx([1 / 2, 1 / 4, 1 / 2])
    assert oracle.per_sequence(logps, rows, True).exp().tolist() == pytest.approx([8**-0.5, 0.5])
    assert oracle.ld_weights(rows, 0.25).tolist() == [1.0, 0.25, 1.0]


def test_close_tells_off_by_a_little():
    truth = torch.linspace(-3, 3, 5, dtype=torch.float64)
    close("x", truth.float(), truth, 1e-6)
    close("x", torch.tensor([math.inf]), torch.tensor([1e300]).double(), 0.0)
    for wrong in (truth + 1e-5, truth.where(truth < 1, math.nan), truth * math.inf, -truth):
        with pytest.raises(AssertionError, match=r"^x\["):
            close("x", wrong.float(), truth, 1e-6)


def test_the_rule_can_break():
    """A problem whose gradient or value is off by a few roundings is told from a right one."""
    truth = torch.linspace(-12, -0.1, 50, dtype=torch.float64)
    theirs = truth.float()
    tolerance = logp_tolerance(truth, torch.float32, 67)
    assert_rule("logps", theirs, theirs, truth, tolerance)
    for wrong in (theirs * 1.00001, theirs + 1e-4, theirs.bfloat16(), theirs.flip(0)):
        with pytest.raises(AssertionError, match="break the rule"):
            assert_rule("logps", wrong, theirs, truth, tolerance)
    with pytest.raises(AssertionError, match="break the rule"):
        assert_rule("logps", theirs.where(truth < -1, math.nan), theirs, truth, tolerance)
    tolerance = gradient_tolerance(truth, CPU, torch.float32, 67)
    for wrong in (theirs * 1.0001, theirs + 1e-3, theirs * 0):
        with pytest.raises(AssertionError, match="break the rule"):
            assert_rule("gradient", wrong, theirs, truth, tolerance)
