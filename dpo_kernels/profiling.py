"""Names in torch.profiler's timeline."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._C._autograd import _profiler_enabled

from .compat import outside_of_graphs

P = ParamSpec("P")
R = TypeVar("R")


def in_profiles(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, a range of its name around it while a profiler runs."""
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
