"""DeepSpeed-Chat: ``get_batch_logps`` of training/step2_dpo_finetuning/main.py.

The script defines the function itself, so that importing another one above it changes nothing.
From a script of your own beside it::

    import dpo_kernels, main
    dpo_kernels.patch("deepspeed_chat", module=main)
    main.main()
"""

from __future__ import annotations

import sys
from types import ModuleType

from torch import Tensor

from .. import functional
from ..patching import Seam


def get_batch_logps(logits: Tensor, input_ids: Tensor, label_mask: Tensor) -> Tensor:
    """``[B]`` sums of the log-probs of ``input_ids`` where ``label_mask`` is 1.

    Logits at t score token t + 1.
    """
    return functional.sequence_logps(logits, input_ids.masked_fill(label_mask == 0, -100))


def seams(module: ModuleType | None) -> list[Seam]:
    script = sys.modules["__main__"] if module is None else module
    return [
        Seam(
            f"{script.__name__}:get_batch_logps",
            lambda _: get_batch_logps,
            ("logits", "input_ids", "label_mask"),
            "log-probs from logits in one pass, prompts left out, float32 from 16-bit logits",
            owner=script.__name__.partition(".")[0],
            module=script,
        )
    ]
