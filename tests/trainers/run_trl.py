"""TRL's DPOTrainer, and KTOTrainer where its head is ours too, from 0.24 on."""

from __future__ import annotations

import functools
import inspect
import tempfile

import trl
from packaging.version import Version
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from tests import trl_runs

from .report import STEPS, report

VERSION = Version(trl.__version__)
# Liger's own kernels are Triton's, which a CPU has not
LIGER_OFF = dict.fromkeys(
    ("rope", "rms_norm", "swiglu", "cross_entropy", "fused_linear_cross_entropy"), False
)


def run(trainer_class, config_class, dataset, lora: bool = False, **config) -> list[dict]:
    model = trl_runs.make_model()
    options = {"peft_config": trl_runs.lora()} if lora else {"ref_model": trl_runs.moved(model)}
    # TRL >= 1.15 takes it away
    known = inspect.signature(config_class).parameters
    config = {name: value for name, value in config.items() if name in known}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=trl_runs.make_config(config_class, folder, max_steps=STEPS, **config),
            train_dataset=dataset(),
            processing_class=trl_runs.make_tokenizer(),
            **options,
        )
        trainer.train()
    rows = trl_runs.compared(trainer.state.log_history)
    return [row for row in rows if "loss" in row]


def losses(rows: list[dict]) -> list[dict]:
    return [{"loss": row["loss"]} for row in rows]


def main() -> None:
    row = functools.partial(report, "trl", version=trl.__version__, vocabulary=trl_runs.VOCAB)
    dpo = functools.partial(run, DPOTrainer, DPOConfig, trl_runs.make_pairs)
    row("DPO", train=dpo)
    row("DPO, LoRA", train=functools.partial(dpo, lora=True))
    row("KTO", train=functools.partial(run, KTOTrainer, KTOConfig, trl_runs.make_unpaired))
    if VERSION.release < (1, 15):
        flags = {"use_liger_kernel": True, "liger_kernel_config": LIGER_OFF}
        if "use_liger_loss" in inspect.signature(DPOConfig).parameters:
            flags = {"use_liger_loss": True}
        # against the run from logits, which logs other logits: Liger compiles for every shape
        row(
            "DPO, use_liger_kernel",
            train=lambda: losses(dpo()),
            patched=lambda: losses(dpo(**flags)),
        )


if __name__ == "__main__":
    main()
