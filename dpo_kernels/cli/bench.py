"""Speed and peak memory of dpo_loss against the reference, on a batch that passed parity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console

from .. import dpo_loss, reference
from ..dispatch import BACKENDS, available_backends, backend_module
from .console import make_console, make_progress, make_table, mebibytes, milliseconds
from .measure import Contender, Timing, interleaved, make_row, peak_extra_bytes, write_rows
from .parity import Check, compare, evaluate
from .problems import Problem, make_problem

FORWARD, FRESH, INPLACE = "forward", "forward + backward", "in place"


def main(args) -> int:
    console = make_console()
    rows = run_bench(
        console,
        shape=tuple(args.shape),
        dtype=getattr(torch, args.dtype),
        backend=args.backend,
        compiled=not args.quick,
        repetitions=args.repetitions,
    )
    if rows is None:
        return 1
    if args.csv:
        write_rows(args.csv, rows, append=True)
        console.print(f"rows appended to {args.csv}")
    return 0


def run_bench(
    console: Console,
    *,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    backend: str | None = None,
    compiled: bool = False,
    repetitions: int = 7,
) -> list[dict[str, str]] | None:
    """Prints the table and returns its CSV rows; None, and no times, when parity fails."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = backends_for(device, dtype, backend)
    if not names:
        reason = available_backends().get(backend) or f"it takes no {dtype} on {device}"
        console.print(f"nothing to measure: {backend} is unavailable ({reason})")
        return None
    pairs, seq_len, vocab = shape
    console.print(f"logits [{2 * pairs}, {seq_len}, {vocab}] {dtype} on {device}, half scored")
    problem = make_problem(pairs, seq_len, vocab, dtype, device)
    failures = parity_failures(problem, names)
    if failures:
        for name, quantity, check in failures:
            console.print(
                f"{name}: error of the {quantity} {check.ours:.2e} exceeds "
                f"torch's {check.torch:.2e} + {check.tolerance:.2e}"
            )
        console.print("parity failed on this batch: no times are reported")
        return None
    contenders = [Contender(*parts) for parts in contenders_for(problem, names, compiled)]
    with make_progress(console) as progress:
        total = len(contenders) * (repetitions + 1)
        task = progress.add_task("timing", total=total, note="")
        timings = interleaved(
            contenders,
            device,
            repetitions,
            lambda note: progress.update(task, advance=1, note=note),
        )
        task = progress.add_task("peak memory", total=len(contenders), note="")
        peaks = []
        for contender in contenders:
            contender.setup()
            peaks.append(peak_extra_bytes(contender.run, device))
            progress.update(task, advance=1)
    print_table(console, contenders, timings, peaks)
    return [
        make_row(
            "bench",
            contender,
            timing,
            device=device,
            dtype=dtype,
            shape=tuple(problem.logits.shape),
            scored_tokens=problem.scored_tokens,
            peak=peak,
        )
        for contender, timing, peak in zip(contenders, timings, peaks, strict=True)
    ]


def backends_for(device: str, dtype: torch.dtype, backend: str | None = None) -> list[str]:
    """The kernels that serve ``dtype`` on ``device``: torch is the reference and not among them,
    unless it is asked for."""
    reasons = available_backends()
    wanted = [backend] if backend else [name for name in BACKENDS if name != "torch"]
    names = [name for name in wanted if reasons[name] is None]
    names = [n for n in names if backend_module(n).refuses(torch.device(device), dtype) is None]
    return names or ([] if backend else ["torch"])


def parity_failures(problem: Problem, names: list[str]) -> list[tuple[str, str, Check]]:
    plain = evaluate(reference.dpo_loss, problem)
    failures = []
    for name in names:
        checks = compare(problem, evaluate(dpo_loss, problem, backend=name), plain)
        failures += [(name, quantity, c) for quantity, c in checks.items() if not c.passed]
    return failures


def contenders_for(problem: Problem, names: list[str], compiled: bool):
    """(name, mode, run, setup) of everyone in every mode."""
    functions: dict[str, Callable] = {"reference": _loss_of(reference.dpo_loss)}
    if compiled:
        functions["torch.compile(reference)"] = torch.compile(_loss_of(reference.dpo_loss))
    for name in names:
        functions[f"dpo_kernels, {name}"] = _loss_of(dpo_loss, backend=name)
    for name, function in functions.items():
        yield name, FORWARD, *forward_of(function, problem)
        yield name, FRESH, *backward_of(function, problem)
    for name in names:
        function = _loss_of(dpo_loss, backend=name, inplace_backward=True)
        yield f"dpo_kernels, {name}", INPLACE, *inplace_of(function, problem)


def _loss_of(loss_function, **options) -> Callable:
    def loss(logits, labels, chosen, rejected, **rest):
        return loss_function(logits, labels, chosen, rejected, **rest, **options).loss

    return loss


def forward_of(function: Callable, problem: Problem) -> tuple[Callable, Callable]:
    """(run, setup) of the loss without a graph, as for a model that is not trained."""

    def run():
        with torch.no_grad():
            return function(problem.logits, *problem.arguments, **problem.options)

    return run, lambda: None


def backward_of(function: Callable, problem: Problem) -> tuple[Callable, Callable]:
    """(run, setup) of the loss and its gradient in fresh memory."""
    logits = problem.logits.detach().requires_grad_()

    def run():
        loss = function(logits, *problem.arguments, **problem.options)
        return torch.autograd.grad(loss, logits)

    return run, lambda: None


def inplace_of(function: Callable, problem: Problem) -> tuple[Callable, Callable]:
    """(run, setup): the gradient overwrites a copy of the logits, which setup restores."""
    copies: list[torch.Tensor] = []

    def setup():
        if copies:
            copies[0].copy_(problem.logits)
        else:
            copies.append(problem.logits.clone())

    def run():
        logits = copies[0].detach().requires_grad_()
        loss = function(logits, *problem.arguments, **problem.options)
        return torch.autograd.grad(loss, logits)

    return run, setup


def print_table(
    console: Console, contenders: list[Contender], timings: list[Timing], peaks: list[int | None]
) -> None:
    """Times as the median (p20 to p80); faster than the reference's median in the same mode.

    In place compares with the reference's forward and backward: it has no such mode.
    """
    medians = {(c.name, c.mode): t.median for c, t in zip(contenders, timings, strict=True)}
    base = {mode: medians["reference", mode] for mode in (FORWARD, FRESH)}
    base[INPLACE] = base[FRESH]
    columns = ("mode", "median", "p20 to p80", "against the reference", "peak extra memory")
    table = make_table(console, "dpo_loss", "", *columns)
    for contender, timing, peak in zip(contenders, timings, peaks, strict=True):
        table.add_row(
            contender.name,
            contender.mode,
            milliseconds(timing.median),
            f"{milliseconds(timing.p20)} to {milliseconds(timing.p80)}",
            f"{base[contender.mode] / timing.median:.1f} x",
            mebibytes(peak),
        )
    console.print(table)
