"""Processes on this machine that call dpo_kernels together, over gloo.

They start once for a file of tests, and then run one function after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 4
COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce_scatter_tensor",
)


@dataclass
class Member:
    """What a function that runs on a rank is given."""

    rank: int
    # a group of the first n ranks by n
    first: dict[int, Any] = field(default_factory=dict)
    # of the mesh [[0, 1], [2, 3]] the rows, and the columns
    row: Any = None
    column: Any = None


class World:
    """``ranks`` processes in one gloo world."""

    def __init__(self, folder: Path, ranks: int = RANKS, timeout: float = 120) -> None:
        context = multiprocessing.get_context("forkserver")
        # torch is imported once, and not by every process
        context.set_forkserver_preload([__name__, "tests.parallel_cases"])
        self.timeout = timeout
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, ranks, str(folder), timeout)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def start(self, function: Callable, *args: Any, ranks: int = RANKS) -> None:
        """``function(member, *args)`` on the first ``ranks`` of them."""
        for pipe in self.pipes[:ranks]:
            pipe.send_bytes(pickle.dumps((function, args)))

    def result(self, rank: int) -> Any:
        """What the function gave on a rank, or the exception that it raised there."""
        if not self.pipes[rank].poll(self.timeout):
            raise TimeoutError(f"rank {rank} gave no answer")
        return pickle.loads(self.pipes[rank].recv_bytes())

    def run(self, function: Callable, *args: Any, ranks: int = RANKS) -> list[Any]:
        self.start(function, *args, ranks=ranks)
        results = [self.result(rank) for rank in range(ranks)]
        for rank, result in enumerate(results):
            if isinstance(result, Exception):
                raise AssertionError(f"on rank {rank}:\n{result.__notes__[0]}") from result
        return results

    def raised(self, function: Callable, *args: Any, ranks: int = RANKS) -> list[Exception]:
        """The exceptions of a function that raises on every rank."""
        self.start(function, *args, ranks=ranks)
        results = [self.result(rank) for rank in range(ranks)]
        assert all(isinstance(result, Exception) for result in results), results
        return results

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(pipe, rank: int, ranks: int, folder: str, timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.pop("DPO_KERNELS_VALIDATE", None)
    limit = timedelta(seconds=timeout)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=limit
    )
    member = Member(rank)
    for size in range(1, ranks + 1):
        member.first[size] = dist.new_group(range(size), timeout=limit)
    if ranks == RANKS:
        for side in ("row", "column"):
            for ids in ((0, 1), (2, 3)) if side == "row" else ((0, 2), (1, 3)):
                group = dist.new_group(ids, timeout=limit)
                if rank in ids:
                    setattr(member, side, group)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            result = function(member, *args)
        except Exception as error:
            result = _portable(error)
        pipe.send_bytes(pickle.dumps(result))


def _portable(error: Exception) -> Exception:
    """As an exception of a built-in type; the traceback is in its notes."""
    kind = next(x for x in type(error).__mro__ if x.__module__ == "builtins")
    same = kind(str(error))
    same.__notes__ = ["".join(traceback.format_exception(error))]
    return same


@contextmanager
def counted():
    """The names of the collectives that are made, in order."""
    made: list[str] = []
    before = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def log(name: str, function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            made.append(name)
            return function(*args, **kwargs)

        return wrapped

    for name, function in before.items():
        setattr(dist, name, log(name, function))
    try:
        yield made
    finally:
        for name, function in before.items():
            setattr(dist, name, function)
