"""Ranks that were given different arguments: an error with DPO_KERNELS_VALIDATE=1."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import validates
from .groups import Groups, gather_objects


def check_agreement(
    groups: Groups,
    same: Mapping[str, Any],
    vocab: Mapping[str, Any] | None = None,
    sequence: Mapping[str, Any] | None = None,
) -> None:
    """Raises where the ranks of a group differ in an argument, by its name.

    ``same`` is for both groups, and what a group has the same besides comes on top of it.
    """
    if not any(groups) or not validates():
        return
    own = ("vocab_group", groups.vocab, vocab), ("sequence_group", groups.sequence, sequence)
    for name, group, besides in own:
        if group is None:
            continue
        facts = {key: _description(value) for key, value in {**same, **(besides or {})}.items()}
        first, *others = gather_objects(name, group, "what the ranks were given", facts)
        for rank, other in enumerate(others, 1):
            for argument in first:
                if first[argument] != other.get(argument):
                    raise ValueError(
                        f"{argument}: expected the same on every rank of {name}, got "
                        f"{first[argument]} on rank 0 and {other.get(argument)} on rank {rank}"
                    )


def _description(value: Any) -> str:
    if isinstance(value, Tensor):
        values = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(values).hexdigest()[:8]
        return f"{value.dtype} {list(value.shape)} with the digest {digest}"
    if isinstance(value, tuple):
        return ", ".join(map(_description, value))
    return getattr(value, "__qualname__", repr(value))
