"""Peak memory of a trainer's forward and backward, as it is and patched."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

import dpo_kernels
from dpo_kernels.cli.measure import peak_extra_bytes
from tests import trl_runs

# one pair; the vocabulary of SmolLM2, half of the tokens scored
ROWS, TOKENS, VOCAB = 2, 768, 49152


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels)."""
    ids = torch.randint(5, VOCAB, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : TOKENS // 2] = -100
    return ids, labels


def make_model():
    """bfloat16, its head frozen as with LoRA; the rest of it next to nothing."""
    model = trl_runs.make_model(
        dtype=torch.bfloat16, vocab_size=VOCAB, max_position_embeddings=TOKENS
    )
    model.get_output_embeddings().weight.requires_grad_(False)
    return model


def report_peaks(trainer: str, version: str, call: Callable[[], object]) -> None:
    """Prints the peaks of ``call``, a forward and backward that makes its model's log-probs."""
    call()
    before = peak_extra_bytes(call, "cpu")
    with dpo_kernels.patch(trainer, verbose=False):
        call()
        after = peak_extra_bytes(call, "cpu")
    what = f"peak of forward and backward, bfloat16 [{ROWS}, {TOKENS}, {VOCAB}]"
    row = {"trainer": trainer, "version": version, "what": what, "failed": []}
    if before is None or after is None:
        row["failed"] = ["this system does not tell its memory"]
    elif after >= before / 2:
        row["failed"] = [f"{after} bytes patched, {before} before"]
    print(json.dumps({**row, "peak": [before, after]}), flush=True)
