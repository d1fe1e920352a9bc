"""Ranks that were given different arguments: an error with DPO_KERNELS_VALIDATE=1."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import validates
from ..sequences import SequenceLayout
from ..types import LossOptions, RowOptions
from .groups import Groups, gather_objects


def check_same_batch(
    groups: Groups,
    rows: RowOptions,
    layout: SequenceLayout,
    vocab: Mapping[str, Any],
    sequence: Mapping[str, Any],
) -> None:
    """``vocab``, ``sequence``: what ranks of either group have the same of besides, by name."""
    labels, cu_seqlens = layout.labels, layout.cu_seqlens
    options = {
        "ignore_index": rows.ignore_index,
        "shift": rows.shift,
        "temperature": rows.temperature,
        "logit_scale": rows.scale,
        "logit_softcap": rows.softcap,
    }
    slices = {"labels": f"{layout.num_seqs} sequences", "cu_seqlens": cu_seqlens is not None}
    _check(
        groups,
        {**options, **vocab, "labels": labels, "cu_seqlens": cu_seqlens},
        {**options, **sequence, **slices},
    )


def check_same_loss(groups: Groups, options: LossOptions, reference_logps: Tensor | None) -> None:
    """The loss is one and the same for all ranks of a group."""
    facts: dict[str, Any] = {
        "loss_type": options.loss_types,
        **options._asdict(),
        "reference_chosen_logps, reference_rejected_logps": reference_logps,
    }
    del facts["loss_types"]
    _check(groups, facts, facts)


def _check(groups: Groups, vocab: Mapping[str, Any], sequence: Mapping[str, Any]) -> None:
    """Raises where the ranks of a group differ, by the first name."""
    if not any(groups) or not validates():
        return
    own = ("vocab_group", groups.vocab, vocab), ("sequence_group", groups.sequence, sequence)
    for name, group, same in own:
        if group is None:
            continue
        facts = {key: _description(value) for key, value in same.items()}
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
