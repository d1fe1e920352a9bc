"""From logits: ours against the reference, torch.compile(reference) and torch.sum, on a CPU or GPU.

    python -m benchmarks.logits

Logits ``[8, 256, 49152]``, half of the tokens scored, float32 and bfloat16; then what a call costs
when there is nothing to compute. Writes ``benchmarks/results/logits_<device>.csv``. torch.sum over
the scored rows is the floor of the forward pass: it reads the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from dpo_kernels import dpo_loss
from dpo_kernels.cli.bench import (
    FORWARD,
    FRESH,
    backends_for,
    contenders_for,
    parity_failures,
    print_table,
)
from dpo_kernels.cli.console import make_console, make_table
from dpo_kernels.cli.measure import (
    Contender,
    Timing,
    interleaved,
    make_row,
    peak_extra_bytes,
    write_rows,
)
from dpo_kernels.cli.problems import Problem, make_problem

BENCHMARK = "logits"
SHAPE = (4, 256, 49152)
OVERHEAD_SHAPE = (1, 8, 128)
OVERHEAD_CALLS = 200


class Empty(torch.autograd.Function):
    """What any loss pays for having a backward: one gradient and one scalar, computed by nobody."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logits")
    parser.add_argument("--shape", type=int, nargs=3, default=SHAPE, metavar=("P", "T", "V"))
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/logits_DEVICE.csv")
    args = parser.parse_args(argv)
    console = make_console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem(*args.shape, dtype, device)
        names = backends_for(device, dtype)
        failures = parity_failures(problem, names)
        if failures:
            console.print(f"parity failed, nothing is written: {failures}")
            return 1
        # one dtype's logits at a time
        rows += measure_shape(console, problem, names, args.repetitions)
        del problem
    rows += measure_overhead(console, device, args.repetitions)
    out = args.out or Path(__file__).parent / "results" / f"{BENCHMARK}_{device}.csv"
    write_rows(out, rows, append=False)
    console.print(f"written to {out}")
    return 0


def measure_shape(console: Console, problem: Problem, names: list[str], repetitions: int) -> list:
    device, dtype = problem.logits.device.type, problem.logits.dtype
    console.print(f"logits {list(problem.logits.shape)} {dtype} on {device}, half scored")
    contenders = [Contender(*parts) for parts in contenders_for(problem, names, compiled=True)]
    scored = scored_rows(problem)
    contenders.append(Contender("torch.sum(scored rows)", FORWARD, scored.sum))
    timings = interleaved(contenders, device, repetitions)
    peaks = []
    for contender in contenders:
        contender.setup()
        peaks.append(peak_extra_bytes(contender.run, device))
    print_table(console, contenders, timings, peaks)
    return [
        make_row(
            BENCHMARK,
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


def scored_rows(problem: Problem) -> torch.Tensor:
    """A view of the rows that score a token: the second half, one row earlier."""
    seq_len = problem.logits.shape[1]
    return problem.logits[:, seq_len // 2 - 1 : seq_len - 1]


def measure_overhead(console: Console, device: str, repetitions: int) -> list[dict[str, str]]:
    """Time of one forward and backward where the arithmetic costs next to nothing."""
    problem = make_problem(*OVERHEAD_SHAPE, torch.float32, device)
    logits = problem.logits.detach().requires_grad_()

    def ours(name: str):
        def call():
            output = dpo_loss(logits, *problem.arguments, beta=problem.beta, backend=name)
            torch.autograd.grad(output.loss, logits)

        return call

    def empty():
        torch.autograd.grad(Empty.apply(logits), logits)

    calls = {"empty autograd.Function": empty}
    calls |= {f"dpo_kernels, {name}": ours(name) for name in backends_for(device, torch.float32)}

    def many(call):
        def run():
            for _ in range(OVERHEAD_CALLS):
                call()

        return run

    contenders = [Contender(name, FRESH, many(call)) for name, call in calls.items()]
    timings = [
        Timing(*(seconds / OVERHEAD_CALLS for seconds in (t.median, t.p20, t.p80)), t.repetitions)
        for t in interleaved(contenders, device, max(repetitions, 21))
    ]
    table = make_table(
        console,
        f"One call, logits {list(logits.shape)}",
        "",
        "forward + backward",
        "beyond the empty function",
    )
    for contender, timing in zip(contenders, timings, strict=True):
        beyond = timing.median - timings[0].median
        table.add_row(contender.name, f"{timing.median * 1e6:.1f} us", f"{beyond * 1e6:.1f} us")
    console.print(table)
    return [
        make_row(
            f"{BENCHMARK} overhead",
            contender,
            timing,
            device=device,
            dtype=torch.float32,
            shape=tuple(logits.shape),
            scored_tokens=problem.scored_tokens,
        )
        for contender, timing in zip(contenders, timings, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
