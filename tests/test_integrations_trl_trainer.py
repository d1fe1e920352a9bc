"""FusedDPOTrainer beyond its numbers: GEMMs, waiting for a GPU, outputs, what it leaves to TRL."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import contextlib
import logging

import pytest
import torch

for _package in ("trl", "transformers", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

from torch.utils._python_dispatch import TorchDispatchMode

from dpo_kernels.integrations.trl import patched_trl
from dpo_kernels.integrations.trl_dpo import logit_scale_of
from dpo_kernels.linear import gemm
from tests import trl_runs
from tests.trl_runs import Run

pytestmark = pytest.mark.integrations


class _Sharded(torch.nn.Parameter):
    pass


class _Waits(TorchDispatchMode):
    """Counts reads of a tensor's value, each of which waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_metrics_are_tensors_until_they_are_logged():
    waits, batches = {}, {}
    for mode in ("trl", "fused"):
        _, trainer = trl_runs.train_and_keep(Run({"max_steps": 1}), mode)
        batches[mode] = next(iter(trainer.get_train_dataloader()))
        with _Waits() as counter:
            trainer.compute_loss(trainer.model, batches[mode])
        waits[mode] = counter.count
    metrics = trainer._metrics["train"]
    assert all(isinstance(v, torch.Tensor) for values in metrics.values() for v in values)
    assert waits["trl"] >= 15
    assert waits["fused"] <= 2, waits
    logs = {}
    with _Waits() as counter:
        trainer.log(logs)
    assert counter.count <= 3
    assert all(type(value) in (int, float) for value in logs.values())
    assert not trainer._metrics["train"]


@pytest.fixture
def head_gemms(monkeypatch):
    """(which GEMM, rows) of every call, in order."""
    calls = []
    for name, rows_of in (
        ("logits_into", lambda tile, *_: tile.shape[0]),
        ("hidden_gradient", lambda gradient, *_: gradient.shape[0]),
        ("add_weight_gradient", lambda total, gradient, *_: gradient.shape[0]),
    ):
        function = getattr(gemm, name)

        def counted(*args, name=name, rows_of=rows_of, function=function):
            calls.append((name, rows_of(*args)))
            return function(*args)

        monkeypatch.setattr(gemm, name, counted)
    return calls


@pytest.mark.parametrize(
    ("mode", "frozen", "count"),
    [("fused", False, 3), ("fused", True, 2), ("patched", False, 4), ("patched", True, 2)],
)
def test_gemms_of_a_step(head_gemms, mode, frozen, count):
    """One more is the reference's; each sees the scored rows alone."""
    run = Run({"max_steps": 1}, peft_config=trl_runs.lora if frozen else None)
    _, trainer = trl_runs.train_and_keep(run, mode)
    batch = next(iter(trainer.get_train_dataloader()))
    scored = int(batch["completion_mask"][:, 1:].sum())
    assert scored < batch["input_ids"].numel() / 2
    head_gemms.clear()
    with patched_trl() if mode == "patched" else contextlib.nullcontext():
        trainer.compute_loss(trainer.model, batch).backward()
    assert len(head_gemms) == count + 1, head_gemms
    assert {rows for _, rows in head_gemms} == {scored}


def test_return_outputs_still_gives_logits():
    _, trainer = trl_runs.train_and_keep(Run({"max_steps": 1}), "fused")
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert loss.requires_grad
    assert outputs.logits.shape == (*batch["input_ids"].shape, trl_runs.VOCAB)


def test_a_head_that_cannot_be_fused_is_left_to_trl(caplog):
    _, trainer = trl_runs.train_and_keep(Run({"max_steps": 1}), "fused")
    _, plain = trl_runs.train_and_keep(Run({"max_steps": 1}), "trl")
    batch = next(iter(trainer.get_train_dataloader()))
    plain.model.load_state_dict(trainer.model.state_dict())
    trainer.model.lm_head.weight = _Sharded(trainer.model.lm_head.weight.data)
    with caplog.at_level(logging.WARNING, "dpo_kernels"):
        loss = trainer.compute_loss(trainer.model, batch)
    assert "leaves the loss to DPOTrainer" in caplog.text and "_Sharded" in caplog.text
    torch.testing.assert_close(loss, plain.compute_loss(plain.model, batch))


def test_generation_is_what_it_was():
    _, trainer = trl_runs.train_and_keep(Run({"max_steps": 1}), "fused")
    ids = torch.tensor([[5, 6, 7]])
    model = trainer.model.eval()
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        expected = type(model).forward(model, ids).logits[:, -1].argmax(-1)
    assert torch.equal(generated[:, 3], expected)


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.25}, 0.25),
        ({"logit_scale": None, "output_multiplier": 2.0}, 2.0),
        ({"lm_head_multiplier": 3.0}, 3.0),
        ({"logits_scaling": 4.0}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
    ],
)
def test_logit_scale(fields, scale):
    config = type("Config", (), {"model_type": "llama", **fields})()
    assert logit_scale_of(config) == scale
