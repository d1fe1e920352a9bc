"""What a process group may be, the DTensor that brings one along, and collectives over one."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist
from torch import Tensor

from ..checks import check_inplace
from ..compat import all_gather_into


class Groups(NamedTuple):
    """The groups of a call; None where a call is one rank's own affair."""

    vocab: Any = None
    sequence: Any = None


ALONE = Groups()


def check_groups(vocab_group: Any, sequence_group: Any, shift: bool = False) -> Groups:
    """A group of one rank is none: the results are those of one device, without a collective."""
    if vocab_group is None and sequence_group is None:
        return ALONE
    groups = Groups(
        check_group("vocab_group", vocab_group), check_group("sequence_group", sequence_group)
    )
    if sequence_group is not None and shift:
        raise ValueError(
            "shift: expected False with sequence_group: the label of a slice's last row lies in "
            "the next slice, on another rank. Align the labels before they are cut, by "
            "labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)"
        )
    return groups


def check_group(name: str, group: Any) -> Any:
    """The group, or None for one rank."""
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{name}: expected a group that this rank is a member of")
        hint = "; of a DeviceMesh, pass its get_group()" if hasattr(group, "get_group") else ""
        raise TypeError(
            f"{name}: expected a torch.distributed.ProcessGroup or None, "
            f"got {type(group).__name__}{hint}"
        )
    return group if group.size() > 1 else None


def columns_of(name: str, logits: Any, groups: Groups, inplace: bool) -> tuple[Tensor, Groups]:
    """This rank's columns of a DTensor, and the group that has the others.

    Only where a mesh of one dimension shards the last dimension; another DTensor stays as it is.
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


def gather(name: str, group: Any, what: str, local: Tensor) -> Tensor:
    """``local`` of every rank, ``[ranks, *local.shape]`` in the order of the group's ranks."""
    gathered = local.new_empty((group.size(), *local.shape))
    try:
        all_gather_into(gathered.flatten(), local.contiguous().flatten(), group)
    except RuntimeError as error:
        _failed(name, group, f"the all-gather of {what}", error)
    return gathered


def add(name: str, group: Any, what: str, local: Tensor) -> Tensor:
    """The sum over the ranks, in the place of ``local``.

    Its order is the all-reduce's own: one and the same for every rank and every run of a group.
    """
    try:
        dist.all_reduce(local, group=group)
    except RuntimeError as error:
        _failed(name, group, f"the all-reduce of {what}", error)
    return local


def gather_objects(name: str, group: Any, what: str, local: Any) -> list[Any]:
    """Any object of every rank, for what is not done in every step."""
    gathered: list[Any] = [None] * group.size()
    try:
        dist.all_gather_object(gathered, local, group=group)
    except RuntimeError as error:
        _failed(name, group, f"the all-gather of {what}", error)
    return gathered


def _failed(name: str, group: Any, collective: str, error: RuntimeError) -> NoReturn:
    raise RuntimeError(
        f"{name}: {collective} failed on rank {group.rank()} of {group.size()}. Another rank may "
        f"have ended or raised, or be at another call: {error}"
    ) from error
