"""LLaMA-Factory's run_exp, as ``llamafactory-cli train`` calls it, for DPO (full, LoRA) and KTO."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from llamafactory.train.tuner import run_exp

from tests import trl_runs

from . import memory
from .report import STEPS, report

# the words that the template "default" puts around a turn
TURNS = ("Human:", "Assistant:", "System:")


def make_files(folder: Path) -> None:
    """A model, its tokenizer, and preference and KTO data, as a user has them on disk."""
    trl_runs.make_model(attention_bias=False).save_pretrained(folder / "model")
    trl_runs.moved(trl_runs.make_model()).save_pretrained(folder / "reference")
    tokenizer = trl_runs.make_tokenizer()
    for name in ("model", "reference"):
        tokenizer.save_pretrained(folder / name)
    pairs = [
        {"instruction": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in trl_runs.make_pairs()
    ]
    answers = [
        {"instruction": row["prompt"], "output": row["completion"], "kto_tag": row["label"]}
        for row in trl_runs.make_unpaired()
    ]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "answers.json").write_text(json.dumps(answers))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
        "answers": {
            "file_name": "answers.json",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "kto_tag"},
        },
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def train(folder: Path, stage: str, finetuning: str, **options) -> list[dict]:
    output = Path(tempfile.mkdtemp(dir=folder))
    reference = {"ref_model": str(folder / "reference")} if finetuning == "full" else {}
    run_exp(
        {
            "stage": stage,
            "do_train": True,
            "model_name_or_path": str(folder / "model"),
            "finetuning_type": finetuning,
            "dataset": "pairs" if stage == "dpo" else "answers",
            "dataset_dir": str(folder),
            "template": "default",
            "cutoff_len": 64,
            "output_dir": str(output),
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "logging_steps": 1,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "seed": 3,
            "disable_tqdm": True,
            "preprocessing_num_workers": 1,
            "dataloader_num_workers": 0,
            **({"lora_rank": 4, "lora_target": "q_proj,v_proj"} if finetuning == "lora" else {}),
            **reference,
            **options,
        }
    )
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row for row in trl_runs.compared(history) if "loss" in row]


def forward_and_backward():
    """One policy forward of the DPO trainer, its arguments at hand, and its gradient."""
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    trainer = object.__new__(CustomDPOTrainer)
    trainer.finetuning_args = SimpleNamespace(use_ref_model=True)
    trainer.loss_type, trainer.ld_alpha = "sigmoid", None
    trainer.accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    model = memory.make_model()
    ids, labels = memory.make_batch()

    def call():
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        found = trainer.concatenated_forward(model, batch)
        (found["chosen_logps"] - found["rejected_logps"]).sum().backward()
        # what the trainer logs
        return found["chosen_logits"].mean().item(), found["rejected_logits"].mean().item()

    return call


def main() -> None:
    version = importlib.metadata.version("llamafactory")
    row = functools.partial(report, "llamafactory", version=version, vocabulary=trl_runs.VOCAB)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        row("DPO, full", train=functools.partial(train, folder, "dpo", "full"))
        row("DPO, LoRA", train=functools.partial(train, folder, "dpo", "lora"))
        ld = functools.partial(train, folder, "dpo", "lora", ld_alpha=0.5)
        row("DPO, LoRA, LD-DPO", train=ld)
        simpo = functools.partial(train, folder, "dpo", "lora", pref_loss="simpo")
        row("SimPO, LoRA", train=simpo)
        row("KTO, LoRA", train=functools.partial(train, folder, "kto", "lora"))
    memory.report_peaks("llamafactory", version, forward_and_backward())


if __name__ == "__main__":
    main()
