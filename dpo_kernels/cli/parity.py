"""Every available backend against float64.

The rule: ``max |ours - truth| <= max |torch - truth| + tolerance``, with torch the plain
implementation on the same inputs in their dtype, and the tolerance made of that dtype's eps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from .. import dpo_loss, reference
from ..dispatch import BACKENDS, available_backends, backend_module
from ..types import accumulation_dtype
from .console import make_console, make_table
from .gate import Check
from .problems import Problem, Shape, make_problem, ragged_lengths

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTITIES = ("loss", "logps", "gradient")


class Results(NamedTuple):
    loss: Tensor
    logps: Tensor  # [2P]
    gradient: Tensor  # like the logits


def main(args) -> int:
    console = make_console()
    return 0 if run_parity(console, args.backend) else 1


def run_parity(console: Console, backend: str | None = None) -> bool:
    """Prints one row a case; whether all passed."""
    columns = [f"{name}: ours / torch" for name in QUANTITIES]
    table = make_table(console, "Largest error against float64", "backend, on", *columns, "")
    cases = failed = 0
    for name, device, dtype in served(backend):
        for packed in (False, True):
            # an odd vocabulary, more than one block long, and prompts and padding of all lengths
            lengths = ragged_lengths(3, 29)
            shape = Shape(3, 29, 1031, lengths=lengths, dtype=dtype, packed=packed)
            problem = make_problem(shape, device)
            checks = check_backend(name, problem)
            passed = all(check.passed for check in checks.values())
            cases, failed = cases + 1, failed + (not passed)
            layout = "packed" if packed else "padded"
            label = f"{name}, {device}, {str(dtype).removeprefix('torch.')}, {layout}"
            cells = [_cell(checks[quantity]) for quantity in QUANTITIES]
            table.add_row(label, *cells, "ok" if passed else "FAILED")
    console.print(table)
    reasons = {
        name: reason
        for name, reason in available_backends().items()
        if reason is not None and backend in (None, name)
    }
    for name, reason in reasons.items():
        console.print(f"not checked: {name} ({reason})")
    if backend in reasons:
        return False
    verdict = "all passed" if not failed else f"{failed} FAILED"
    console.print(
        f"{cases} cases, {verdict}: an error may exceed torch's in the same dtype by a tolerance "
        "of a few eps"
    )
    return not failed


def _cell(check: Check) -> str:
    mark = "" if check.passed else f" > + {check.tolerance:.1e}"
    return f"{check.ours:.1e} / {check.torch:.1e}{mark}"


def served(backend: str | None = None) -> Iterator[tuple[str, str, torch.dtype]]:
    """(backend, device type, dtype) for all that this machine can run."""
    reasons = available_backends()
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    for name in BACKENDS:
        if reasons[name] is not None or backend not in (None, name):
            continue
        for device in devices:
            for dtype in DTYPES:
                if backend_module(name).refuses(torch.device(device), dtype) is None:
                    yield name, device, dtype


def check_backend(name: str, problem: Problem) -> dict[str, Check]:
    """The checks of dpo_loss on one problem, by quantity."""
    ours = evaluate(dpo_loss, problem, backend=name)
    plain = evaluate(reference.dpo_loss, problem)
    return compare(problem, ours, plain)


def evaluate(loss_function, problem: Problem, **options) -> Results:
    problem = problem.trainable()
    output = loss_function(*problem.arguments, **problem.options, **options)
    (gradient,) = torch.autograd.grad(output.loss, problem.source)
    logps = torch.cat((output.chosen_logps, output.rejected_logps))
    return Results(output.loss.detach(), logps, gradient)


def compare(problem: Problem, ours: Results, plain: Results) -> dict[str, Check]:
    truth = evaluate(
        reference.dpo_loss,
        replace(
            problem,
            logits=problem.source.double(),
            reference_logps=problem.reference_logps.double(),
        ),
    )
    largest = [float(value.abs().max()) for value in truth]
    tolerance = tolerances(problem, *largest)
    return {
        name: Check(_worst(a, t), _worst(b, t), bound)
        for name, a, b, t, bound in zip(QUANTITIES, ours, plain, truth, tolerance, strict=True)
    }


def _worst(values: Tensor, truth: Tensor) -> float:
    return float((values.double() - truth).abs().max())


class Tolerances(NamedTuple):
    loss: float
    logps: float
    gradient: float


def tolerances(problem: Problem, loss: float, logps: float, gradient: float) -> Tolerances:
    """Absolute tolerances from the largest true magnitudes.

    A log-prob is good to 2 eps. Two of them enter the loss, whose derivative is at most beta, and
    move the gradient's coefficient, sigmoid(-d), by beta relative at most; storing it costs an eps.
    """
    dtype = problem.shape.dtype
    eps, eps_stored = torch.finfo(accumulation_dtype(dtype)).eps, torch.finfo(dtype).eps
    of_logps = 2 * eps * logps
    of_logit = 2 * problem.beta * of_logps
    return Tolerances(
        loss=2 * eps * loss + of_logit,
        logps=of_logps,
        gradient=gradient * (eps_stored + 4 * eps + of_logit),
    )
