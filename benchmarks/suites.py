"""What each suite measures: groups of one shape and the contenders that meet on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dpo_kernels.cli.contenders import Contender, contenders_for
from dpo_kernels.cli.gate import Gate
from dpo_kernels.cli.measure import Timed, Timing, interleaved
from dpo_kernels.cli.problems import Shape, make_problem
from dpo_kernels.cli.rows import OK, make_row, time_columns, versions
from dpo_kernels.cli.runner import FRESH, MODES, Emit, admit, measure_shape

from . import shapes
from .peers import peers_for

SUITES = ("logits", "linear", "loss", "overhead", "growth", "accuracy", "train")
OVERHEAD_SHAPE = Shape(1, 8, 128, model="nothing to compute")
OVERHEAD_CALLS = 50


@dataclass(frozen=True)
class Options:
    device: str
    quick: bool = False
    peers: bool = True
    rehearse: bool = False
    # backends that may not run, say because a call of theirs would kill the process
    exclude: tuple[str, ...] = ()
    # of a suite's shapes, the most telling ones
    first: int | None = None


@dataclass(frozen=True)
class Group:
    """A shape and who is timed on it, in rounds."""

    benchmark: str
    shape: Shape
    contenders: tuple[Contender, ...]
    modes: tuple[str, ...] = MODES
    repetitions: int = 7
    # groups of a lower rank run first
    rank: int = 0

    @property
    def label(self) -> str:
        return f"{self.benchmark}: {self.shape.label()}"

    def run(self, device: str, emit: Emit, advance, keep=lambda timed: None) -> None:
        if self.benchmark == "overhead":
            measure_overhead(self, device, emit)
        elif self.benchmark == "accuracy":
            measure_accuracy(self, device, emit)
        else:
            measure_shape(
                self.shape,
                list(self.contenders),
                device,
                emit,
                benchmark=self.benchmark,
                repetitions=self.repetitions,
                modes=self.modes,
                advance=advance,
                keep=keep,
            )


def groups_for(suite: str, options: Options) -> list[Group]:
    """The most telling shapes have the lowest rank. On a GPU whoever compiles comes after all the
    others: a compiler that takes minutes costs only its own rows."""
    device, quick = options.device, options.quick
    repetitions = 3 if options.rehearse else 5 if quick else (15 if device == "cuda" else 7)
    if suite == "growth":
        found = []
        for what, members in shapes.growth_shapes(device, quick).items():
            for shape in members:
                who = _contenders(shape, options, compile=False, inplace=False)
                found.append(Group(f"growth, {what}", shape, who, (FRESH,), 3))
        return found
    if suite in ("logits", "linear"):
        if options.rehearse:
            members = shapes.rehearsal(suite == "linear")
        elif suite == "logits":
            members = shapes.logits_shapes(device, quick)
        else:
            members = shapes.linear_shapes(device, quick)
    elif suite == "loss":
        members = shapes.loss_shapes(device, quick)
    elif suite == "accuracy":
        members = shapes.accuracy_shapes(quick)
    elif suite == "overhead":
        members = [OVERHEAD_SHAPE]
    else:
        raise ValueError(f"suite {suite!r}: expected one of {', '.join(SUITES)}")
    # the loss of hidden states runs both ways; compiling costs minutes for the same GEMMs
    compile = suite == "logits" and not quick and not options.rehearse
    found = []
    for number, shape in enumerate(members[: options.first]):
        who = _contenders(shape, options, compile=compile)
        found.append(Group(suite, shape, who, MODES, repetitions, rank=int(number > 1)))
    return found if device != "cuda" else _compilers_last(found)


def _contenders(
    shape: Shape, options: Options, *, compile: bool, inplace: bool = True
) -> tuple[Contender, ...]:
    found = contenders_for(shape, options.device, compile=compile)
    if options.peers:
        found += peers_for(shape)
    found = [c for c in found if inplace or not c.inplace]
    return tuple(replace(c, make=_left_out) if _excluded(c, options) else c for c in found)


def _excluded(contender: Contender, options: Options) -> bool:
    backends = {f"dpo_kernels, {name}" for name in options.exclude}
    return contender.name.removesuffix(", fast") in backends


def _left_out(shape: Shape):
    raise NotImplementedError("left out: it failed its smoke test")


def _compilers_last(groups: list[Group]) -> list[Group]:
    def only(group: Group, compiles: bool) -> Group:
        kept = tuple(c for c in group.contenders if c.compiles == compiles)
        return replace(group, contenders=kept, rank=2 if compiles else group.rank)

    found = [only(group, compiles) for compiles in (False, True) for group in groups]
    return [group for group in found if group.contenders]


class Empty(torch.autograd.Function):
    """What any loss pays for having a backward: one gradient and one scalar, computed by nobody."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0])


def measure_overhead(group: Group, device: str, emit: Emit) -> None:
    """One forward and backward where the arithmetic costs next to nothing, by the clock of Python.

    On a GPU a call returns before its kernels end; many in a row are bound by the slower of both.
    """
    problem = make_problem(group.shape, device).trainable()
    gate = Gate(problem)
    timed, contenders = [], []

    def many(loss) -> Timed:
        inputs = list(problem.inputs.values())

        def run(number: int) -> None:
            for _ in range(OVERHEAD_CALLS):
                torch.autograd.grad(loss(problem), inputs)

        return Timed("", run)

    empty = Contender("empty autograd.Function", lambda shape: lambda p: Empty.apply(p.logits))
    for contender in (empty, *group.contenders):
        if contender.inplace or contender.compiles:
            continue
        status, loss, parity = OK, contender.make, {}
        if contender is empty:
            loss = contender.make(group.shape)
        else:
            status, loss, parity = admit(contender, problem, gate)
        if loss is None:
            emit(make_row("overhead", contender.name, FRESH, group.shape, device, status=status))
            continue
        timed.append(many(loss))
        contenders.append((contender, parity))
    # wall time: what is asked is what Python costs
    interleaved(timed, "cpu", group.repetitions)
    for one, (contender, parity) in zip(timed, contenders, strict=True):
        timing = one.timing()
        share = Timing(
            *(value / OVERHEAD_CALLS for value in (timing.median, timing.p20, timing.p80)),
            timing.repetitions,
        )
        columns = {**_about(contender), **parity, **time_columns(share)}
        emit(make_row("overhead", contender.name, FRESH, group.shape, device, status=OK, **columns))


def _about(contender: Contender) -> dict[str, str]:
    return {"precision": contender.precision, "packages": versions(contender.packages)}


def measure_accuracy(group: Group, device: str, emit: Emit) -> None:
    """Errors against float64 and the bounds of the gate; here a red one shows its error too."""
    problem = make_problem(group.shape, device).trainable()
    gate = Gate(problem)
    for contender in group.contenders:
        if contender.inplace or contender.compiles:
            continue
        status, _, parity = admit(contender, problem, gate)
        columns = {"status": status, **_about(contender), **parity}
        emit(make_row("accuracy", contender.name, FRESH, group.shape, device, **columns))
