"""Which backend serves a call, by name, by environment and by itself."""

from __future__ import annotations

import math

import pytest
import torch

import dpo_kernels
from dpo_kernels import BackendUnavailableError, dispatch
from dpo_kernels.dispatch import BACKENDS, available_backends
from tests.bad_calls import LABELS, LOGITS


def test_the_kernels_are_available():
    """Nothing of the suite skips for want of a backend, except what needs a GPU."""
    reasons = available_backends()
    assert set(reasons) == set(BACKENDS)
    assert {name: reasons[name] for name in ("cpu", "torch", "triton")} == dict.fromkeys(
        ("cpu", "torch", "triton")
    )
    if not torch.cuda.is_available():
        assert reasons["cuda"]


@pytest.fixture
def fresh_dispatch(monkeypatch):
    monkeypatch.setattr(dispatch, "_resolved", {})
    monkeypatch.delenv("DPO_KERNELS_BACKEND", raising=False)


def test_backend_by_name_serves_or_says_why(fresh_dispatch):
    if available_backends()["cuda"] is None:
        pytest.skip("the cuda backend is available here")
    reason = available_backends()["cuda"]
    with pytest.raises(BackendUnavailableError) as raised:
        dpo_kernels.token_logps(LOGITS, LABELS, backend="cuda")
    assert "'cuda'" in str(raised.value) and reason in str(raised.value)
    with pytest.raises(BackendUnavailableError, match=r"'triton'.*float64"):
        dpo_kernels.token_logps(LOGITS.double(), LABELS, backend="triton")


@pytest.mark.gpu
def test_cpu_backend_refuses_gpu_tensors(fresh_dispatch):
    with pytest.raises(BackendUnavailableError, match=r"'cpu'.*cuda"):
        dpo_kernels.token_logps(LOGITS.cuda(), LABELS.cuda(), backend="cpu")


@pytest.mark.parametrize("backend", ("torch", "cpu"))
def test_environment_chooses(fresh_dispatch, monkeypatch, backend):
    monkeypatch.setenv("DPO_KERNELS_BACKEND", backend)
    calls = []
    module = dispatch.backend_module(backend)
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args: calls.append(1) or forward(*args))
    dpo_kernels.token_logps(LOGITS, LABELS)
    assert calls == [1]
    # an argument comes first
    other = {"torch": "cpu", "cpu": "torch"}[backend]
    dpo_kernels.token_logps(LOGITS, LABELS, backend=other)
    assert calls == [1]


def test_environment_is_checked(fresh_dispatch, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^DPO_KERNELS_BACKEND: 'fast' .*cuda, triton"):
        dpo_kernels.token_logps(LOGITS, LABELS)


def test_automatic_choice_falls_back_and_says_so_once(fresh_dispatch, monkeypatch, caplog):
    monkeypatch.setattr(dispatch.backend_module("cpu"), "unavailable", lambda: "not built")
    for _ in range(3):
        out = dpo_kernels.token_logps(LOGITS, LABELS)
    assert out[0, 0].item() == pytest.approx(-math.log(5))
    messages = [r.getMessage() for r in caplog.records if r.name == "dpo_kernels"]
    assert len(messages) == 1
    assert "torch backend" in messages[0] and "cpu: not built" in messages[0]


def test_automatic_choice_on_the_cpu_is_silent(fresh_dispatch, caplog):
    module = dispatch.resolve("", torch.device("cpu"), torch.float32)
    assert module is dispatch.backend_module("cpu")
    assert not [r for r in caplog.records if r.name == "dpo_kernels"]
