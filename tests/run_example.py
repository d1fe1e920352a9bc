"""Runs a TRL example of docs/ and writes down what it did:

    python -m tests.run_example REPORT.json SCRIPT ARGUMENTS

Started by torchrun it trains on the CPU with FSDP2 over gloo, which accelerate offers on GPUs only.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from dpo_kernels.linear import gemm


def shard_on_cpu() -> None:
    """Makes accelerate take this process for one of several GPUs' and use the CPU as its device."""

    def set_device(state: PartialState) -> None:
        state.device = torch.device("cpu")

    # what accelerate shards depends on the kind of launch, and "several CPUs" is none of those
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device


def count_tiles() -> list[int]:
    """The rows of every tile of logits that dpo_kernels computes from now on."""
    rows, make_tile = [], gemm.logits_into

    def counted(tile, *rest):
        rows.append(tile.shape[0])
        return make_tile(tile, *rest)

    gemm.logits_into = counted
    return rows


def keep_trainer() -> list[transformers.Trainer]:
    kept, train = [], transformers.Trainer.train

    def kept_train(self, *args, **kwargs):
        kept.append(self)
        return train(self, *args, **kwargs)

    transformers.Trainer.train = kept_train
    return kept


def main() -> None:
    report, script, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    if "LOCAL_RANK" in os.environ:
        shard_on_cpu()
    tiles, trainers = count_tiles(), keep_trainer()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    (trainer,) = trainers
    if trainer.is_world_process_zero():
        parameters = list(trainer.model.parameters())
        report_of = {
            "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
            "tiles": len(tiles),
            "sharded": sum(isinstance(parameter, DTensor) for parameter in parameters),
            "parameters": len(parameters),
        }
        Path(report).write_text(json.dumps(report_of))


if __name__ == "__main__":
    main()
