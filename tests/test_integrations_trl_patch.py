"""The patch of TRL: the seam it needs, what it binds and what it undoes."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import importlib.metadata
import inspect
import re
import types
from pathlib import Path

import pytest
import torch

for _package in ("trl", "transformers", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

import trl
from trl.kernels import ChunkedLogProbFunction, chunked_divergence, chunked_logprob
from trl.trainer import distillation_trainer, dpo_trainer, kto_trainer, utils

from dpo_kernels.integrations import trl as integration
from dpo_kernels.integrations.trl import patch_trl, patched_trl, unpatch_trl
from dpo_kernels.integrations.trl_dpo import FusedDPOTrainer

pytestmark = pytest.mark.integrations


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    unpatch_trl()
    integration._logged.clear()


# the seam: each of these fails when a release of TRL moves what is built on


def test_the_name_its_signature_and_who_uses_it():
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    found = tuple(inspect.signature(ChunkedLogProbFunction.forward).parameters)
    assert found == ("ctx", *integration.PARAMETERS)
    source = inspect.getsource(utils.add_fused_lm_head)
    assert source.count("_ChunkedLogProbFunction.apply(") == 1
    root = Path(trl.__file__).parent
    users = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "ChunkedLogProbFunction" in path.read_text()
    }
    assert users == {"kernels/__init__.py", "kernels/chunked_logprob.py", "trainer/utils.py"}


def test_what_the_call_site_passes_and_takes():
    source = inspect.getsource(utils.add_fused_lm_head)
    call = re.search(r"_ChunkedLogProbFunction\.apply\((.*?)\n {12}\)", source, re.DOTALL).group(1)
    arguments = [line.strip().rstrip(",") for line in call.strip().splitlines()]
    assert len(arguments) == len(integration.PARAMETERS)
    assert arguments[1:3] == ["weight", "bias"] and arguments[4] == "temperature"
    assert arguments[6:] == ["final_logit_softcapping", "logit_scale", "outputs"]
    assert f"{', '.join(integration.OUTPUTS)} = per_token" in source


def test_rows_are_dropped_by_a_function_of_their_own():
    source = inspect.getsource(utils)
    assert len(re.findall(r"\b_use_triton\(", source)) == 1
    assert "compact = _use_triton(hidden_states.device)" in source


def test_what_the_trainer_overrides():
    trainer = dpo_trainer.DPOTrainer
    expected = {
        "_compute_loss": ["self", "model", "inputs", "return_outputs"],
        "compute_ref_log_probs": ["self", "model", "inputs"],
        "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
        "log": ["self", "logs", "start_time"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(trainer, name)).parameters) == parameters
        assert name in vars(FusedDPOTrainer)
    source = inspect.getsource(trainer)
    logged = set(re.findall(r'_metrics\[mode\]\["([^"]+)"\]', source))
    assert logged == {
        "aux_loss",
        "entropy",
        "num_tokens",
        "logits/chosen",
        "logits/rejected",
        "mean_token_accuracy",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    }
    attributes = (
        "aux_loss_enabled router_aux_loss_coef precompute_ref_logps loss_types loss_weights "
        "ld_alpha f_divergence_type f_alpha_divergence_coef label_smoothing use_weighting beta "
        "_total_train_tokens _tp_size _precompute_model_hash"
    )
    for attribute in attributes.split():
        assert f"self.{attribute}" in source, attribute
    read = set(
        re.findall(r'getattr\(text_config, "(\w+)"', inspect.getsource(utils.add_fused_lm_head))
    )
    assert read == {
        "final_logit_softcapping",
        "logit_scale",
        "output_multiplier",
        "lm_head_multiplier",
        "logits_scaling",
        "output_router_logits",
        "router_aux_loss_coef",
    }


# binding and undoing


def _bound():
    return (
        utils._ChunkedLogProbFunction,
        utils._use_triton,
        dpo_trainer.hash_module,
        kto_trainer.hash_module,
    )


def test_undo_restores_exactly_and_both_are_idempotent():
    before = _bound()
    patch_trl()
    once = _bound()
    patch_trl()
    assert all(a is b for a, b in zip(_bound(), once, strict=True))
    assert not any(a is b for a, b in zip(once, before, strict=True))
    unpatch_trl()
    unpatch_trl()
    assert all(a is b for a, b in zip(_bound(), before, strict=True))


def test_the_context_manager_leaves_a_patch_that_was_there():
    with patched_trl():
        with patched_trl():
            pass
        assert isinstance(utils._ChunkedLogProbFunction, integration.FusedLogProbs)
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    with pytest.raises(KeyError), patched_trl():
        raise KeyError
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_another_patch_is_refused_below_and_above(monkeypatch):
    class Other(ChunkedLogProbFunction):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", Other)
        with pytest.raises(RuntimeError, match=r"not trl's own.*Other"):
            patch_trl()
        assert utils._use_triton is chunked_logprob._use_triton
    patch_trl()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", Other)
        with pytest.raises(RuntimeError, match="bound again"):
            unpatch_trl()
        assert utils._use_triton is not chunked_logprob._use_triton


def test_older_versions_are_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.23.1")
    with pytest.raises(ImportError, match=r"needs trl >= 0.24, got 0.23.1"):
        patch_trl()


def test_a_moved_seam_is_refused(monkeypatch):
    def forward(ctx, hidden, weight, targets):
        pass

    with monkeypatch.context() as patch:
        patch.setattr(ChunkedLogProbFunction, "forward", staticmethod(forward))
        with pytest.raises(
            ImportError, match=r"another trl.trainer.utils._Chunked.*hidden, weight, targets"
        ):
            patch_trl()
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    with pytest.raises(
        ImportError, match=r"no trl.trainer.utils._ChunkedLogProbFunction to replace"
    ):
        patch_trl()


# what the patch leaves as it is


def test_trls_kernels_keep_every_name():
    """They run where a call is left to TRL, and under trainers that have no seam."""
    modules = [chunked_logprob, chunked_divergence, distillation_trainer]
    before = [dict(vars(module)) for module in modules]
    with patched_trl():
        changed = {
            name
            for module, names in zip(modules, before, strict=True)
            for name, value in vars(module).items()
            if names.get(name) is not value
        }
    assert not changed


@pytest.mark.parametrize(
    ("device", "trls", "compact"),
    [("cpu", False, True), ("cuda", True, True), ("xpu", True, True), ("neuron", False, False)],
)
def test_rows_are_dropped_where_either_can(monkeypatch, device, trls, compact):
    monkeypatch.setattr(chunked_logprob, "_TRITON_AVAILABLE", True)
    device = types.SimpleNamespace(type=device)
    assert utils._use_triton(device) is trls
    with patched_trl():
        assert utils._use_triton(device) is compact


class _Sharded(torch.nn.Parameter):
    pass


@pytest.mark.parametrize("make_weight", [_Sharded, torch.Tensor], ids=["not served", "entropy"])
def test_trls_own_function_still_runs_on_a_cpu(monkeypatch, make_weight):
    """For a head that is not served, and for the gradient of an entropy."""
    # the interpreter that these tests run Triton in takes a CPU's tensors too
    monkeypatch.setattr(chunked_logprob, "_forward_kernel", None)
    monkeypatch.setattr(chunked_logprob, "_backward_kernel", None)
    hidden = torch.randn(4, 8, requires_grad=True)
    weight, targets = make_weight(torch.randn(11, 8)), torch.arange(4)

    def gradient():
        outputs = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy")
        )
        return torch.autograd.grad(outputs[1].sum(), hidden)[0]

    expected = gradient()
    with patched_trl():
        torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-5)
