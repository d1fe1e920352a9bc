"""One shape, all contenders: admitted by the gate, timed in rounds, each beside its floor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .contenders import Contender, Loss
from .gate import Gate
from .measure import Timed, interleaved, peak_extra_bytes
from .problems import Problem, Shape, make_problem
from .rows import OK, make_row, time_columns, versions

FORWARD, FRESH, INPLACE = "forward", "forward + backward", "in place"
MODES = (FORWARD, FRESH)
# what the rate of the floor is measured with: 256 MiB of float32 on a GPU, far beyond any cache
_COPY_ELEMENTS = 1 << 26
_GEMM_ROWS = {"cuda": 4096, "cpu": 512}
Emit = Callable[[dict[str, str]], object]


@dataclass
class Entry:
    """A contender in one mode, on its way to a row."""

    contender: Contender
    mode: str
    timed: Timed
    parity: dict[str, str]
    peak: int | None = None


def measure_shape(
    shape: Shape,
    contenders: list[Contender],
    device: torch.device | str,
    emit: Emit,
    *,
    benchmark: str,
    repetitions: int = 7,
    modes: tuple[str, ...] = MODES,
    advance: Callable[[str], object] = lambda note: None,
    keep: Callable[[list[Timed]], object] = lambda timed: None,
) -> None:
    """Emits a row for every contender and mode: its figures, or a status that says why not.

    ``keep`` is given all rounds. Interrupted, it emits what has been timed and lets the interrupt
    go on.
    """
    kind = torch.device(device).type

    def row(contender: Contender, mode: str, **values) -> None:
        packages = versions(contender.packages)
        names = {"precision": contender.precision, "packages": packages, **values}
        emit(make_row(benchmark, contender.name, mode, shape, kind, **names))

    def refuse(contender: Contender, status: str, **values) -> None:
        for mode in modes_of(contender, modes):
            row(contender, mode, status=status, **values)
            advance(f"{contender.name}: {status}")

    try:
        problem = make_problem(shape, device)
        gate = Gate(problem)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        for contender in contenders:
            refuse(contender, "out of memory: the problem in float64")
        return
    buffers = rotation(problem)
    entries = []
    for contender in contenders:
        advance(f"parity of {contender.name}")
        status, loss, parity = admit(contender, problem, gate)
        if loss is None:
            refuse(contender, status, **parity)
            continue
        for mode in modes_of(contender, modes):
            entries.append(
                Entry(contender, mode, timed_call(contender, mode, loss, buffers), parity)
            )
    del gate
    floor = floor_call(problem)
    try:
        interleaved([floor, *(entry.timed for entry in entries)], device, repetitions, advance)
        for entry in entries:
            entry.timed.setup(0)
            entry.peak = peak_extra_bytes(lambda timed=entry.timed: timed.run(0), device)
    finally:
        keep([entry.timed for entry in entries])
        for entry in entries:
            if entry.timed.seconds and floor.seconds:
                columns = figures(shape, entry, floor, kind)
                row(entry.contender, entry.mode, status=OK, **entry.parity, **columns)


def modes_of(contender: Contender, modes: tuple[str, ...]) -> tuple[str, ...]:
    if contender.inplace:
        return (INPLACE,) if FRESH in modes else ()
    return modes


def admit(
    contender: Contender, problem: Problem, gate: Gate
) -> tuple[str, Loss | None, dict[str, str]]:
    """(status, the loss if it may be timed, parity columns)."""
    try:
        loss = contender.make(problem.shape)
        one = problem.trainable(copy=contender.inplace)
        value = loss(one)
        gradients = torch.autograd.grad(value, list(one.inputs.values()))
        found = dict(zip(one.inputs, gradients, strict=True))
        checks = gate.check(value.detach(), found, contender.precision)
    except ImportError as error:
        return f"missing: {error}", None, {}
    except NotImplementedError as error:
        return f"not served: {error}", None, {}
    except Exception as error:
        if problem.device.type == "cuda":
            torch.cuda.empty_cache()
        if is_out_of_memory(error):
            return "out of memory", None, {}
        first = (str(error).splitlines() or [""])[0]
        return f"failed: {type(error).__name__}: {first[:200]}", None, {}
    worst = max((c for name, c in checks.items() if name != "loss"), key=_excess)
    parity = {
        "loss_error": f"{checks['loss'].ours:.3g}",
        "loss_bound": f"{checks['loss'].torch + checks['loss'].tolerance:.3g}",
        "gradient_error": f"{worst.ours:.3g}",
        "gradient_bound": f"{worst.torch + worst.tolerance:.3g}",
    }
    red = [name for name, check in checks.items() if not check.passed]
    if red:
        return f"red: {', '.join(red)} out of bounds", None, parity
    return OK, loss, parity


def _excess(check) -> float:
    excess = check.ours / (check.torch + check.tolerance)
    return math.inf if math.isnan(excess) else excess


def is_out_of_memory(error: BaseException) -> bool:
    told = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate" in told


def rotation(problem: Problem) -> list[Problem]:
    """Copies of the problem, enough that one that was used has left a GPU's cache."""
    buffers = [problem.trainable()]
    if problem.device.type == "cuda":
        cache = torch.cuda.get_device_properties(problem.device).L2_cache_size
        size = sum(value.nbytes for value in problem.inputs.values())
        buffers += [problem.trainable(copy=True) for _ in range(min(15, 2 * cache // size))]
    return buffers


def timed_call(contender: Contender, mode: str, loss: Loss, buffers: list[Problem]) -> Timed:
    name = f"{contender.name}, {mode}"

    def one(number: int) -> Problem:
        return buffers[number % len(buffers)]

    def forward(number: int):
        with torch.no_grad():
            return loss(one(number))

    def both(number: int):
        problem = one(number)
        return torch.autograd.grad(loss(problem), list(problem.inputs.values()))

    if mode == FORWARD:
        return Timed(name, forward)
    if mode == FRESH:
        return Timed(name, both)
    copies: list[Problem] = []

    def restore(number: int) -> None:
        # a new leaf each time: its backward may run once
        if copies:
            copies[0].restore(buffers[0])
            copies[0] = copies[0].trainable()
        else:
            copies.append(buffers[0].trainable(copy=True))

    def inplace(number: int):
        problem = copies[0]
        return torch.autograd.grad(loss(problem), list(problem.inputs.values()))

    return Timed(name, inplace, restore)


def floor_call(problem: Problem) -> Timed:
    """What the floor's rate is measured with: a copy, or a GEMM of the dtype and head."""
    shape, device = problem.shape, problem.device
    if shape.hidden is None:
        source = torch.ones(min(_COPY_ELEMENTS, problem.source.numel()), device=device)
        target = torch.empty_like(source)
        return Timed("copy", lambda number: target.copy_(source))
    rows = min(_GEMM_ROWS[device.type], shape.scored_tokens)
    hidden = problem.source.detach().flatten(0, -2)[:rows].contiguous()
    weight = problem.head.detach()
    tile = hidden.new_empty(rows, len(weight))
    return Timed("torch.mm", lambda number: torch.mm(hidden, weight.t(), out=tile))


def floor_work(shape: Shape, device: str) -> float:
    """Bytes that the floor's call moves, or its FLOPs."""
    if shape.hidden is None:
        elements = min(_COPY_ELEMENTS, shape.rows * shape.vocab)
        # read and written
        return 2 * 4 * elements
    rows = min(_GEMM_ROWS[device], shape.scored_tokens)
    return 2 * rows * shape.hidden * shape.vocab


def figures(shape: Shape, entry: Entry, floor: Timed, device: str) -> dict[str, object]:
    timing = entry.timed.timing()
    backward = entry.mode != FORWARD
    if shape.hidden is None:
        kind, amount = "bytes", shape.floor_bytes(backward)
    else:
        kind, amount = "FLOPs", shape.floor_flops(backward)
    rate = floor_work(shape, device) / floor.timing().median
    return {
        **time_columns(timing),
        "peak_extra_bytes": entry.peak,
        "floor": amount,
        "floor_kind": kind,
        "rate": f"{rate:.4g}",
        "times_floor": f"{timing.median * rate / amount:.4g}",
    }
