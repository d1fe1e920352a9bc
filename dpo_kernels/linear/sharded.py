"""A head that an engine shards for storage: whole once a call, its gradient left to the engine.

Every rank has pairs of its own, and makes the same collectives whatever tokens they score: one
all-gather of a parameter before anything else, one reduction of its gradient in the backward.

FSDP2's DTensors: under tensor parallelism, where every rank computes the same loss, the same
DTensor would want no mean over the ranks. Only FSDP2's own records tell the two apart; a DTensor
that they do not hold is left as it is, for check_head to refuse.

ZeRO-3's parameters are empty where no module of DeepSpeed's uses them, and DeepSpeed reduces the
gradient of any, by hooks that lie on the parameter.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import refuse_shard
from ..compat import fsdp_parameter, is_dtensor

# a tensor, or None
T = TypeVar("T")


class _Reduction(NamedTuple):
    """What fully_shard was told of a parameter."""

    mesh_dims: int
    param_dtype: torch.dtype
    reduce_dtype: torch.dtype
    # None: the mean
    divide_by: float | None


class _Whole(torch.autograd.Function):
    """The whole of a DTensor; the gradient goes back to the shards, reduced over FSDP2's ranks."""

    @staticmethod
    def forward(ctx: Any, shard: Any, reduction: _Reduction) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype = shard.device_mesh, shard.placements, shard.dtype
        ctx.reduction = reduction
        return shard.detach().to(reduction.param_dtype).full_tensor()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, None]:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh_dims, _, reduce_dtype, divide_by = ctx.reduction
        grad, kind = grad.to(reduce_dtype).contiguous(), "avg"
        if divide_by is not None:
            grad, kind = grad / divide_by, "sum"
        # along the other dimensions of the mesh every rank has the same
        placements = [Partial(kind)] * mesh_dims + [Replicate()] * (ctx.mesh.ndim - mesh_dims)
        summed = DTensor.from_local(grad, ctx.mesh, placements, run_check=False)
        return summed.redistribute(placements=ctx.placements).to(ctx.dtype), None


class _Kept(torch.autograd.Function):
    """ZeRO-3's parameter, in a tensor that stays whole when the parameter is partitioned again."""

    @staticmethod
    def forward(ctx: Any, name: str, parameter: Any) -> Tensor:
        ctx.name, ctx.parameter = name, parameter
        # a parameter loses its memory by being given other memory, which no other tensor sees
        return parameter.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        if ctx.parameter.shape != grad.shape:
            raise RuntimeError(
                f"{ctx.name}: ZeRO-3 has not gathered it for its gradient, as it does for what the "
                "forward of a model uses; make the loss inside the forward of the model that "
                "deepspeed.initialize was given"
            )
        return None, grad


def _of_zero3(name: str, parameter: Any) -> Any:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    # leaving the context would partition what somebody else still uses
    is_whole = parameter.ds_status == ZeroParamStatus.AVAILABLE
    with contextlib.nullcontext() if is_whole else GatheredParameters([parameter]):
        if parameter.shape != parameter.ds_shape:
            raise RuntimeError(
                f"{name}: expected {list(parameter.ds_shape)} once ZeRO-3 has gathered it, "
                f"got {list(parameter.shape)}"
            )
        return _Kept.apply(name, parameter)


def check_parts(name: str, x: Any, vocab_group: Any) -> None:
    """Refuses to take for parts of the vocabulary what the group's ranks shard for storage."""
    if vocab_group is None or not is_sharded(x):
        return
    ranks = set(dist.get_process_group_ranks(vocab_group))
    if is_dtensor(x):
        sharing = ranks.intersection(x.device_mesh.mesh.flatten().tolist())
    else:
        sharing = ranks.intersection(dist.get_process_group_ranks(x.ds_process_group))
    if len(sharing) > 1:
        raise ValueError(
            f"{name}: expected this rank's part of the vocabulary with vocab_group, got a "
            "parameter that the ranks of the group shard for storage: gathered, it is the same on "
            "each of them; leave vocab_group out"
        )


def is_zero3(x: Any) -> bool:
    return hasattr(x, "ds_id") and hasattr(x, "ds_status")


def is_sharded(x: Any) -> bool:
    return is_dtensor(x) or is_zero3(x)


def whole(name: str, given: T, tensor_parallel: bool = False) -> T:
    """The whole of a parameter of fully_shard's or ZeRO-3's; anything else as it is.

    ``tensor_parallel``: what else shards a DTensor is a group that computes the same loss on every
    rank; where it is not known to be one, such a DTensor is not for us to gather.
    """
    if torch.compiler.is_compiling() or not is_sharded(given):
        return given
    x: Any = given
    if not is_dtensor(x):
        return _of_zero3(name, x)
    found = fsdp_parameter(x)
    if found is None:
        return x.full_tensor() if tensor_parallel else x
    parameter, group = found
    # what is sharded again after a forward is a copy that no optimiser sees
    x = parameter.sharded_param
    info = parameter.mesh_info
    if info.mesh.ndim != x.device_mesh.ndim and not tensor_parallel:
        refuse_shard(name, x, "which another group shards besides")
    reason = None
    if getattr(info, "is_spmd_mesh", False):
        reason = "is sharded over some dimensions of a larger mesh"
    elif x.device.type != x.device_mesh.device_type:
        reason = f"lies on {x.device}"
    elif getattr(group, "reduce_scatter_reduce_op", None) is not None:
        reason = "has gradients that are reduced by an operation of the user's"
    if reason is not None:
        raise TypeError(
            f"{name}: expected a parameter that can be gathered here, this one {reason}; a head in "
            "the root unit of fully_shard is whole inside the forward of the model"
        )
    policy = parameter.mp_policy
    param_dtype = policy.param_dtype or x.dtype
    reduction = _Reduction(
        info.mesh.ndim,
        param_dtype,
        policy.reduce_dtype or param_dtype,
        getattr(group, "gradient_divide_factor", None),
    )
    return _Whole.apply(x, reduction)
