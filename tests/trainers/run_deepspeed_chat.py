"""DeepSpeed-Chat's main.py of step 2 (DPO), from a checkout: its get_batch_logps in a DPO loop.

Its main() needs DeepSpeed's launcher and a GPU.
"""

from __future__ import annotations

import functools

import main as script
import torch

from tests import trl_runs

from . import loop
from .report import report, version_of_checkout


def score(logits, ids):
    mask = (torch.arange(loop.LENGTH) >= loop.PROMPT).int().expand_as(ids)
    return script.get_batch_logps(logits, ids, mask)


def main() -> None:
    version = version_of_checkout(script)
    train = functools.partial(loop.train, score)
    what = "its log-probs in a loop"
    report("deepspeed_chat", what, version, train, trl_runs.VOCAB, module=script)


if __name__ == "__main__":
    main()
