"""DPO with TRL and LoRA: a trainer as it is, with its head computed by dpo_kernels.

    pip install trl peft
    python trl_lora.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --output_dir trained

Each line of the file is {"prompt": text, "chosen": text, "rejected": text}.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

import dpo_kernels
from dpo_kernels.integrations.trl_savings import LogSavings


@dataclass
class Arguments:
    model: str = field(metadata={"help": "a folder, or a name on the hub"})
    data: str = field(metadata={"help": "JSON lines of preference pairs"})


def main() -> None:
    arguments, config = HfArgumentParser((Arguments, DPOConfig)).parse_args_into_dataclasses()
    # before the trainer is made
    dpo_kernels.patch("trl")
    trainer = DPOTrainer(
        model=arguments.model,
        args=config,
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
        # the head stays frozen, which takes two matrix products with it instead of four
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    # fused/logits_mib in the log: the logits that a step did not hold
    trainer.add_callback(LogSavings(trainer))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
