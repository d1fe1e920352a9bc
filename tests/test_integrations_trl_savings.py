"""LogSavings counts the logits of a step as the trainer's models are called for them."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import types

import pytest
import torch

for _package in ("trl", "transformers", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

import datasets
from trl import DPOConfig, DPOTrainer

from dpo_kernels.integrations.trl import FusedDPOTrainer, patched_trl
from dpo_kernels.integrations.trl_savings import LogSavings
from tests import trl_runs

pytestmark = pytest.mark.integrations

PAIRS, ACCUMULATED = 2, 2


def _logged(trainer) -> list[float]:
    return [row["fused/logits_mib"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("trainer_class", [DPOTrainer, FusedDPOTrainer])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_logits_of_policy_and_reference(trainer_class, adapter, tmp_path):
    config = trl_runs.make_config(
        DPOConfig,
        str(tmp_path),
        per_device_train_batch_size=PAIRS,
        gradient_accumulation_steps=ACCUMULATED,
    )
    model = trl_runs.make_model()
    with patched_trl():
        trainer = trainer_class(
            model=model,
            ref_model=None if adapter else trl_runs.moved(model),
            args=config,
            train_dataset=trl_runs.make_pairs(),
            processing_class=trl_runs.make_tokenizer(),
            peft_config=trl_runs.lora() if adapter else None,
        )
        trainer.add_callback(LogSavings(trainer))
        collate, shapes = trainer.data_collator, []

        def collated(rows):
            batch = collate(rows)
            shapes.append(batch["input_ids"].shape)
            return batch

        trainer.data_collator = collated
        trainer.train()
    # a batch more may have been collated than was trained with
    sizes = [2 * 4 * sequences * length * trl_runs.VOCAB / 2**20 for sequences, length in shapes]
    wanted = [sum(sizes[i : i + ACCUMULATED]) / ACCUMULATED for i in (0, 2, 4)]
    assert _logged(trainer) == pytest.approx(wanted)
    assert not trainer.model._forward_pre_hooks


@pytest.mark.parametrize("precomputed", [False, True], ids=["reference", "precomputed"])
def test_rows_between_the_steps_are_not_counted(precomputed, tmp_path):
    """Those of an evaluation, and of the reference log-probs that are made for it."""
    config = trl_runs.make_config(
        DPOConfig,
        str(tmp_path),
        per_device_train_batch_size=PAIRS,
        eval_strategy="steps",
        eval_steps=1,
        precompute_ref_log_probs=precomputed,
    )
    # batches of one shape
    pair = trl_runs.make_pairs(1)[0]
    pairs = datasets.Dataset.from_list([pair] * 2 * PAIRS)
    model = trl_runs.make_model()
    trainer = FusedDPOTrainer(
        model=model,
        ref_model=None if precomputed else trl_runs.moved(model),
        args=config,
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=trl_runs.make_tokenizer(),
    )
    trainer.add_callback(LogSavings(trainer))
    trainer.train()
    first, *others = _logged(trainer)
    assert first > 0 and others == [first] * 2


def test_a_partitioned_head_counts_whole():
    """As ZeRO-3 leaves it between the forwards: its weight is empty."""
    model = trl_runs.make_model()
    model.lm_head.weight.data = torch.empty(0)
    model.forward = lambda **_: None
    trainer = types.SimpleNamespace(model=model, _metrics={"train": {"fused/logits_mib": []}})
    callback = LogSavings(trainer)
    callback.on_train_begin(None, None, None)
    callback.on_step_begin(None, None, None)
    model(input_ids=torch.zeros(2, 5))
    callback.on_step_end(None, None, None)
    wanted = 4 * 2 * 5 * trl_runs.VOCAB / 2**20
    assert trainer._metrics["train"]["fused/logits_mib"] == [wanted]
