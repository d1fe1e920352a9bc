"""What a fused head spares a TRL trainer, in the trainer's own log:

trainer.add_callback(LogSavings(trainer))
"""

from __future__ import annotations

from typing import Any

import torch
import transformers


class LogSavings(transformers.TrainerCallback):
    """Logs ``fused/logits_mib`` of the training steps, beside the metrics of TRL.

    The size of the float32 logits of policy and reference, ``[2P, T, V]`` each for DPO, of which a
    fused head holds a tile at a time. It is computed from the shapes of what the models are given,
    not measured; a trainer that holds its logits needs a gradient of that size besides.

    Args:
        trainer: a trainer of TRL, patched or FusedDPOTrainer. TRL's own fused head (1.15 and later)
            spares the same logits: the number does not compare the two.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        # a sharded head does not show how many rows it has
        self._vocabulary = trainer.model.config.get_text_config().vocab_size
        self._elements = 0
        self._hooks: list[Any] = []

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        models = (self.trainer.model, getattr(self.trainer, "ref_model", None))
        self._hooks = [
            model.register_forward_pre_hook(self._count, with_kwargs=True)
            for model in models
            if model is not None
        ]

    def _count(self, model, args: tuple, kwargs: dict) -> None:
        self._elements += kwargs["input_ids"].numel() * self._vocabulary

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        # what ran since the last step, an evaluation say, is none of this one's
        self._elements = 0

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self._log()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._log()

    def _log(self) -> None:
        size = self._elements * torch.float32.itemsize
        self.trainer._metrics["train"]["fused/logits_mib"].append(size / 2**20)
        self._elements = 0

    def on_train_end(self, args, state, control, **kwargs) -> None:
        for hook in self._hooks:
            hook.remove()
