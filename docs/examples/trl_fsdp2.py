"""DPO of a whole model with TRL and FSDP2, the loss made where the head is.

    accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 \
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_state_dict_type FULL_STATE_DICT \
        trl_fsdp2.py --model Qwen/Qwen2.5-7B-Instruct --data pairs.jsonl --output_dir trained

Each line of the file is {"prompt": text, "chosen": text, "rejected": text}. Without
FULL_STATE_DICT the trainer's save_model writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import DPOConfig

from dpo_kernels.integrations.trl import FusedDPOTrainer


@dataclass
class Arguments:
    model: str = field(metadata={"help": "a folder, or a name on the hub"})
    data: str = field(metadata={"help": "JSON lines of preference pairs"})


def main() -> None:
    arguments, config = HfArgumentParser((Arguments, DPOConfig)).parse_args_into_dataclasses()
    # in place of DPOTrainer: three matrix products with the trainable head instead of four
    trainer = FusedDPOTrainer(
        model=arguments.model,
        args=config,
        train_dataset=load_dataset("json", data_files=arguments.data, split="train"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
