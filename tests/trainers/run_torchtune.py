"""torchtune's recipe lora_dpo_single_device, from its config to its last step.

The config names this module's components where a user's names files: model weights and data.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
from pathlib import Path

import torch
import torchtune
from omegaconf import OmegaConf
from torchtune.models.llama2 import llama2

from .report import STEPS, report

VOCAB = 127
SIZES = {
    "vocab_size": VOCAB,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 64,
}
OURS = "dpo_kernels.integrations.torchtune.patched_dpo_loss"


class Checkpointer:
    def __init__(self, should_load_recipe_state: bool):
        pass

    def load_checkpoint(self) -> dict:
        torch.manual_seed(1)
        model = llama2(**SIZES)
        with torch.no_grad():
            # logits that spread enough for their losses to differ
            model.output.weight.normal_(std=0.5)
        return {"model": model.state_dict()}

    def save_checkpoint(self, *_, **__) -> None:
        pass


class Logger:
    def __init__(self):
        self.logged: list[dict[str, float]] = []

    def log_config(self, _) -> None:
        pass

    def log_dict(self, values: dict, step: int) -> None:
        # the speed is another every time
        self.logged.append({k: float(v) for k, v in values.items() if "per_second" not in k})

    def close(self) -> None:
        pass


class Tokenizer:
    pad_id = 0


def pairs(tokenizer: Tokenizer) -> list[dict[str, list[int]]]:
    rng = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(2 * STEPS):
        row = {}
        prompt, *answers = (int(torch.randint(4, 12, (), generator=rng)) for _ in range(3))
        for name, length in zip(("chosen", "rejected"), answers, strict=True):
            ids = torch.randint(1, VOCAB, (prompt + length,), generator=rng).tolist()
            row[f"{name}_input_ids"] = ids
            row[f"{name}_labels"] = [-100] * prompt + ids[prompt:]
        rows.append(row)
    return rows


def config(loss: str):
    here = __spec__.name
    return OmegaConf.create(
        {
            "output_dir": "unused",
            "device": "cpu",
            "dtype": "fp32",
            "seed": 3,
            "epochs": 1,
            "max_steps_per_epoch": STEPS,
            "resume_from_checkpoint": False,
            "gradient_accumulation_steps": 1,
            "compile": False,
            "enable_activation_checkpointing": False,
            "shuffle": False,
            "batch_size": 2,
            "metric_logger": {"_component_": f"{here}.Logger"},
            "checkpointer": {"_component_": f"{here}.Checkpointer"},
            "tokenizer": {"_component_": f"{here}.Tokenizer"},
            "dataset": {"_component_": f"{here}.pairs"},
            "model": {
                "_component_": "torchtune.models.llama2.lora_llama2",
                "lora_attn_modules": ["q_proj", "v_proj"],
                "apply_lora_to_mlp": False,
                "lora_rank": 4,
                "lora_alpha": 8,
                **SIZES,
            },
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 2e-2},
            "loss": {"_component_": loss, "beta": 0.1},
        }
    )


@functools.cache
def recipe_module():
    # "tune run" runs the file too: the folder of recipes refuses to be imported
    path = Path(torchtune.__file__).parent.parent / "recipes" / "lora_dpo_single_device.py"
    spec = importlib.util.spec_from_file_location("lora_dpo_single_device", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(loss: str = "torchtune.rlhf.loss.DPOLoss") -> list[dict[str, float]]:
    cfg = config(loss)
    recipe = recipe_module().LoRADPORecipeSingleDevice(cfg=cfg)
    recipe.setup(cfg=cfg)
    recipe.train()
    return recipe._metric_logger.logged


def main() -> None:
    logging.disable(logging.INFO)
    version = importlib.metadata.version("torchtune")
    row = functools.partial(report, "torchtune", version=version, vocabulary=VOCAB)
    row("LoRA DPO", train=train)
    row("LoRA DPO, YAML", train=train, patched=functools.partial(train, OURS))


if __name__ == "__main__":
    main()
