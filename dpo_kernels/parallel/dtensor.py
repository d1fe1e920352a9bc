"""Logits that are a DTensor: this rank's columns, and the group that has the others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import check_inplace
from .groups import Groups


def columns_of(name: str, logits: Any, groups: Groups, inplace: bool) -> tuple[Tensor, Groups]:
    """Of a DTensor whose last dimension a mesh of one dimension shards; another as it is.

    The gradient of such logits is a DTensor of the same placement.
    """
    mesh, placements = logits.device_mesh, logits.placements
    if mesh.ndim != 1 or not placements[0].is_shard(logits.dim() - 1):
        # refused like any other DTensor
        return logits, groups
    if groups.vocab is not None:
        raise ValueError(f"vocab_group: given beside {name} that are a DTensor, which has its own")
    vocab, ranks = logits.shape[-1], mesh.size()
    if -(-vocab // ranks) * (ranks - 1) >= vocab:
        raise ValueError(
            f"{name}: expected columns on every rank, got a vocabulary of {vocab} sharded over "
            f"{ranks} ranks"
        )
    if inplace:
        check_inplace(logits)
    group = mesh.get_group()
    vocab_group = group if ranks > 1 else None
    return logits.to_local(grad_placements=placements), groups._replace(vocab=vocab_group)
