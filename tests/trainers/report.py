"""What a run of a trainer has to show: the losses that it had before, made by our kernels."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dpo_kernels

STEPS = 10
# float32 sums of a few hundred terms in another order, through ten steps of an optimiser
TOLERANCE = 2e-4


class Watch(TorchDispatchMode):
    """Counts calls of this package's ops, and the most rows of any tensor over the vocabulary."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary = vocabulary
        self.calls = self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += func.namespace == "dpo_kernels"
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


def version_of_checkout(module: ModuleType) -> str:
    command = ["git", "log", "-1", "--format=%h of %cs"]
    folder = Path(module.__file__ or "").parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def report(
    trainer: str,
    what: str,
    version: str,
    train: Callable[[], list[dict[str, float]]],
    vocabulary: int,
    *,
    patched: Callable[[], list[dict[str, float]]] | None = None,
    **patch_options,
) -> None:
    """Runs a training as it is and under ``dpo_kernels.patch(trainer)``, and prints the row.

    ``train`` returns what every step logged, "loss" among it; all that both runs logged is
    compared. ``patched``: the training under the patch, where it is not the same call.
    """
    row = {"trainer": trainer, "version": version, "what": what}
    with contextlib.redirect_stdout(sys.stderr):
        with Watch(vocabulary) as before:
            theirs = train()
        with dpo_kernels.patch(trainer, **patch_options) as patch, Watch(vocabulary) as after:
            ours = (patched or train)()
        replaced = [binding.seam.where for binding in patch.bindings]
    differences = {
        name: max(
            abs(mine[name] - other[name]) / max(1.0, abs(other[name]))
            for mine, other in zip(ours, theirs, strict=True)
        )
        # what every step logged: a batch of KTO may have no rejected answer
        for name in set.intersection(*(set(step) for step in (*ours, *theirs)))
    }
    worst = max(differences, key=differences.__getitem__)
    losses = [step["loss"] for step in ours]
    row |= {
        "steps": len(ours),
        "first": losses[0],
        "last": losses[-1],
        "difference": differences["loss"],
        "compared": sorted(differences),
        "calls": after.calls,
        "rows": [before.rows, after.rows],
        "replaced": replaced,
        "failed": [
            reason
            for reason, is_so in (
                (f"{len(ours)} steps, not {STEPS}", len(ours) != STEPS),
                (
                    f"{worst} differs by {differences[worst]:.1e}",
                    not differences[worst] < TOLERANCE,
                ),
                ("our kernels were not called", after.calls == 0),
                ("our kernels were called without the patch", before.calls != 0),
                ("nothing was learnt", len(set(losses)) < 2),
            )
            if is_so
        ],
    }
    print(json.dumps(row), flush=True)
