"""FSDP2 and DeepSpeed's ZeRO-3, two ranks on a CPU: what one process logs with the same batch."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import functools

import pytest
import torch

for _package in ("trl", "transformers", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

from tests import engine_runs, trl_runs
from tests.engine_runs import ENGINES, OWN_CASES, TRL_RUNS

pytestmark = pytest.mark.integrations

TRL_CASES = [
    (engine, name, mode) for engine in ENGINES for name in TRL_RUNS for mode in ("patched", "fused")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(rows of TRL's trainers, results of own trainings) by engine; each is launched once."""
    launched: dict[str, tuple[dict, dict]] = {}

    def of(engine: str):
        if engine == "zero3":
            pytest.importorskip("deepspeed", reason="deepspeed is missing: make test-integrations")
        if engine not in launched:
            # one that fails is not to be tried again by every test
            launched[engine] = ({}, {})
            launched[engine] = engine_runs.launch(engine, tmp_path_factory.mktemp(engine))
        return launched[engine]

    return of


@functools.cache
def alone(name: str) -> list[dict[str, float]]:
    return trl_runs.compared(trl_runs.train(engine_runs.one_of(TRL_RUNS[name], 1), "trl"))


@pytest.mark.parametrize("engine, name, mode", TRL_CASES)
def test_trl_trains_as_one_process(results, engine, name, mode):
    """The loss and every metric of every step, TRL's own on one process."""
    ours, theirs = results(engine)[0][f"{name}, {mode}"], alone(name)
    assert len(theirs) == trl_runs.STEPS + 1 and theirs[0]["loss"] != theirs[1]["loss"]
    assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key, value in other.items():
            # float32 sums of a few hundred terms, in another order
            assert mine[key] == pytest.approx(value, rel=1e-5, abs=1e-5), (mine["step"], key)


@pytest.mark.parametrize("function, frozen", OWN_CASES)
def test_own_loop_under_zero3_trains_as_one_process(results, function, frozen):
    """A rank that scores nothing in one of the steps among them."""
    losses, parameters = results("zero3")[1][function, frozen]
    wanted_losses, wanted = engine_runs.own_training(function, frozen, rank=None)
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    moved = 0
    start = engine_runs.Model(function, frozen).parameters()
    for ours, theirs, first in zip(parameters, wanted, start, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
        moved += not torch.equal(ours, first)
    assert moved == len(parameters) - frozen


def test_a_loss_outside_the_forward_is_refused_under_zero3(results):
    """DeepSpeed gathers for a gradient what a forward of its modules has used, and that alone."""
    error = results("zero3")[1]["outside"]
    assert "weight: ZeRO-3" in error and "inside the forward" in error
