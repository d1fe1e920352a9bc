"""LogSavings counts the logits of a step as the trainer's models are called for them."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import pytest

for _package in ("trl", "transformers", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

from trl import DPOConfig, DPOTrainer

from dpo_kernels.integrations.trl import FusedDPOTrainer, patched_trl
from dpo_kernels.integrations.trl_savings import LogSavings
from tests import trl_runs

pytestmark = pytest.mark.integrations

PAIRS, ACCUMULATED = 2, 2


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
    logged = [row["fused/logits_mib"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(wanted)
    assert not trainer.model._forward_pre_hooks
