"""From hidden states: ours against the reference, the peers that are installed, and the bare GEMMs.

    python -m benchmarks.linear

Hidden ``[8, 512, 576]`` and a head ``[49152, 576]``, half of the tokens scored, the reference's
hidden states given, forward and backward, float32 and bfloat16. Writes
``benchmarks/results/linear_<device>.csv``. "GEMMs alone" are torch.mm on the scored rows, 512 at a
time: the logits of the policy and of the reference, and the gradients of hidden and weight.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from dpo_kernels.cli.console import make_console, make_table
from dpo_kernels.cli.measure import Contender, interleaved, make_row, peak_extra_bytes, write_rows

from . import contenders
from .problems import LinearProblem, LinearShape, make_linear_problem

BENCHMARK = "linear"
ROWS = 512
BARE = "GEMMs alone"


def bare_gemms(problem: LinearProblem) -> Callable[[], None]:
    scored = problem.shape.scored
    hidden = problem.hidden.detach().flatten(0, 1)[:ROWS].contiguous()
    weight = problem.weight.detach()
    tile = hidden.new_empty(ROWS, weight.shape[0])
    rows, total = torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        for start in range(0, scored, ROWS):
            n = min(ROWS, scored - start)
            for _ in range(2):
                torch.mm(hidden[:n], weight.t(), out=tile[:n])
            torch.mm(tile[:n], weight, out=rows[:n])
            if problem.shape.trainable_head:
                torch.mm(tile[:n].t(), hidden[:n], out=total)

    return run


def contenders_for(console, problem: LinearProblem) -> list[Contender]:
    factories = contenders.installed(contenders.from_hidden(problem.hidden.device), console.print)
    if problem.shape.dtype == torch.float32:
        del factories["ours fast"]
    losses = {name: factory() for name, factory in factories.items()}

    def run(loss) -> Callable[[], object]:
        # the gradients are kept until the time is taken, as an optimiser would find them
        return lambda: torch.autograd.grad(loss(problem), problem.inputs)

    mode = "trainable head" if problem.shape.trainable_head else "frozen head"
    found = [Contender(name, mode, run(loss)) for name, loss in losses.items()]
    return [*found, Contender(BARE, mode, bare_gemms(problem))]


def measure(console, shape: LinearShape, device: str, repetitions: int) -> list[dict[str, str]]:
    problem = make_linear_problem(shape, torch.device(device))
    truth, got = contenders.naive_linear()(problem), contenders.ours_linear()(problem)
    if not torch.allclose(got, truth, rtol=2e-2, atol=1e-3):
        raise SystemExit(f"parity failed: {got.item()} against {truth.item()}")
    found = contenders_for(console, problem)
    timings = interleaved(found, device, repetitions)
    peaks = [peak_extra_bytes(contender.run, device) for contender in found]
    medians = {c.name: t.median for c, t in zip(found, timings, strict=True)}
    title = f"hidden {list(problem.hidden.shape)}, head {list(problem.weight.shape)}, {shape.dtype}"
    columns = ("mode", "median ms", "of the GEMMs", "ours is faster by", "peak extra MiB")
    table = make_table(console, title, "", *columns)
    for contender, timing, peak in zip(found, timings, peaks, strict=True):
        table.add_row(
            contender.name,
            contender.mode,
            f"{timing.median * 1e3:.0f}",
            f"{timing.median / medians[BARE]:.2f}",
            f"{timing.median / medians['ours exact']:.2f} x",
            "" if peak is None else f"{peak / 2**20:.0f}",
        )
    console.print(table)
    return [
        make_row(
            BENCHMARK,
            contender,
            timing,
            device=device,
            dtype=shape.dtype,
            shape=(2 * shape.pairs, shape.tokens, shape.hidden, shape.vocab),
            scored_tokens=shape.scored,
            peak=peak,
        )
        for contender, timing, peak in zip(found, timings, peaks, strict=True)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__)
    parser.add_argument(
        "--shape", type=int, nargs=4, default=(4, 512, 576, 49152), metavar=("P", "T", "D", "V")
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/linear_DEVICE.csv")
    args = parser.parse_args(argv)
    console = make_console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for trainable in (True, False):
            shape = LinearShape(
                *args.shape, dtype=dtype, trainable_head=trainable, reference_hidden=True
            )
            rows += measure(console, shape, device, args.repetitions)
    out = args.out or Path(__file__).parent / "results" / f"{BENCHMARK}_{device}.csv"
    write_rows(out, rows, append=False)
    console.print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
