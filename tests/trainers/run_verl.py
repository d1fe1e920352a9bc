"""verl's log_probs_from_logits_response in a DPO loop: its trainers start Ray and need GPUs."""

from __future__ import annotations

import functools
import importlib.metadata

from verl.utils import torch_functional

from tests import trl_runs

from . import loop
from .report import report


def score(logits, ids):
    response = loop.LENGTH - loop.PROMPT
    return torch_functional.log_probs_from_logits_response(ids, logits, response).sum(-1)


def main() -> None:
    version = importlib.metadata.version("verl")
    train = functools.partial(loop.train, score)
    report("verl", "its log-probs in a loop", version, train, trl_runs.VOCAB)


if __name__ == "__main__":
    main()
