"""What depends on torch's version or internals, each with its reason."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad

P = ParamSpec("P")
R = TypeVar("R")
_KEY = torch._C.DispatchKey
_AUTOGRAD_KEYS = (_KEY.AutogradCPU, _KEY.AutogradCUDA, _KEY.AutogradOther, _KEY.ADInplaceOrView)

# it has no name in Python
_BATCHED = torch._C._dispatch_key_parse("Batched")


@contextmanager
def autograd_inside_op():
    """Lets the implementation of an op use autograd for itself.

    A compiled graph calls ops below the autograd keys, where enable_grad alone records nothing, and
    neither does it in inference mode.
    """
    with torch.inference_mode(False), _autograd_keys(), torch.enable_grad():
        yield


def _autograd_keys():
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        excluded = excluded - torch._C.DispatchKeySet(key)
    included = torch._C._dispatch_tls_local_include_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded)


def transform_of(x: torch.Tensor) -> str | None:
    """The transform of functions that x is an argument of; under torch.compile nobody asks."""
    if torch.compiler.is_compiling():
        return None
    if is_functorch_wrapped_tensor(x):
        return "a torch.func transform"
    # a level is open only inside a with statement of the user's
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return "forward-mode differentiation"
    return None


def is_batched(x: torch.Tensor) -> bool:
    """Whether x stands for many tensors, as in a backward with is_grads_batched=True."""
    return torch._C._dispatch_keys(x).has(_BATCHED)


def is_seen(x: torch.Tensor) -> bool:
    """Whether somebody looks at ops that are called with x: a graph, a mode, a profiler, vmap."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or _profiler_enabled()
        or is_functorch_wrapped_tensor(x)
        or is_batched(x)
        or type(x) not in (torch.Tensor, torch.nn.Parameter)
    )


def varies(number: float) -> bool:
    """Whether torch.compile makes its graph for any value of number.

    It does so from the second value on. An op that takes a float would fix it again, and be
    compiled anew for every value; arithmetic on tensors does not.
    """
    if not torch.compiler.is_compiling():
        return False
    # it imports sympy
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(number)


def outside_of_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, at which torch.compile ends one graph and begins another.

    torch.compiler.disable is the public name of this, and takes seconds to import what it needs.
    """
    return cast("Callable[P, R]", _disable_dynamo(function))


def in_profiles(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, with its name in torch.profiler's timeline."""
    name = f"dpo_kernels.{function.__name__}"
    over_ranks = outside_of_graphs(function)

    @functools.wraps(function)
    def ranged(*args: P.args, **kwargs: P.kwargs) -> R:
        # a range costs microseconds, the question nearly nothing; graphs have names of their own
        if torch.compiler.is_compiling():
            if kwargs.get("vocab_group") is None and kwargs.get("sequence_group") is None:
                return function(*args, **kwargs)
            return over_ranks(*args, **kwargs)
        if not _profiler_enabled():
            return function(*args, **kwargs)
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)

    return ranged


def is_dtensor(x: Any) -> bool:
    # without the import, which takes its time
    return type(x).__name__ == "DTensor"


def fsdp_parameter(x: torch.Tensor) -> tuple[Any, Any] | None:
    """FSDP2's records (FSDPParam, FSDPParamGroup) of the DTensor x, where fully_shard made it.

    A DTensor does not say what it is sharded for. The records hang on the modules, and torch keeps
    a table of these; their attributes have no public names.
    """
    from torch.distributed import _composable_state

    for state in list(_composable_state._module_state_mapping.values()):
        # a state itself, in some versions, or no longer anything
        state = state() if isinstance(state, weakref.ref) else state
        groups = getattr(state, "_fsdp_param_groups", None)
        # one group before it could be several
        groups = [getattr(state, "_fsdp_param_group", None)] if groups is None else groups
        for group in groups:
            for parameter in getattr(group, "fsdp_params", ()):
                again = getattr(parameter, "_sharded_post_forward_param", None)
                if x is parameter.sharded_param or x is again:
                    return parameter, group
    return None


def all_gather_into(gathered: torch.Tensor, local: torch.Tensor, group: Any) -> None:
    """The tensors of all ranks, one behind the other."""
    # the name before 2.13
    name = "all_gather_single"
    getattr(dist, name if hasattr(dist, name) else "all_gather_into_tensor")(
        gathered, local, group=group
    )


def process_group(name: str) -> Any:
    """The group of this ``group_name``; an op's arguments have no other way to say a group."""
    # without torch.distributed there is no such module
    from torch._C import _distributed_c10d

    # a str, to which some versions give a type of its own
    return _distributed_c10d._resolve_process_group(cast("Any", name))


def torch_version() -> tuple[int, ...]:
    """(2, 13) for "2.13.0+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])


@functools.cache
def mm_widens() -> bool:
    """Whether torch.mm has out_dtype, to keep products of half precision in float32."""
    return torch_version() >= (2, 8)


@functools.cache
def addmm_widens() -> bool:
    """Whether torch.addmm adds such a product to a float32 sum.

    In 2.8 and 2.9 the sum must have the dtype of the operands (pytorch pull request 167931).
    """
    return torch_version() >= (2, 10)


# before 3.3 a kernel knows no tuples, and pipelined loads no tiles of three dimensions
TRITON_MINIMUM = (3, 3)


def triton_version() -> tuple[int, ...]:
    """(3, 7, 1) for "3.7.1+git..."; imports Triton."""
    import triton

    return tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])


def triton_unsuitable() -> str | None:
    """None, or why the Triton that is installed cannot compile the kernels."""
    try:
        version = triton_version()
    except ImportError as error:
        return f"triton is not installed ({error})"
    if version < TRITON_MINIMUM:
        needed, found = (".".join(map(str, v)) for v in (TRITON_MINIMUM, version))
        return f"the kernels need triton {needed} or later, {found} is installed"
    return None
