"""Times every contender on one device against the ceilings measured there; see benchmarks.gpu."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dpo_kernels.cli.environment import environment
from dpo_kernels.cli.measure import Contender, interleaved, peak_extra_bytes

from . import contenders
from .gpu import Clock
from .problems import LinearShape, LogitsShape, make_linear_problem, make_logits_problem

console = Console()


class RowWriter:
    """A CSV file that grows row by row; every row carries the machine it was measured on."""

    COLUMNS = (
        *("bench", "contender", "direction", "pairs", "tokens", "vocab", "hidden", "masked"),
        *("dtype", "layout", "head", "median_ms", "p20_ms", "p80_ms", "peak_bytes"),
        *("floor_bytes", "floor_flops", "times_floor", "copy_bytes_per_s", "bf16_flops_per_s"),
    )

    def __init__(self, path: Path):
        self.machine = environment()
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, (*self.COLUMNS, *self.machine))
        self.writer.writeheader()

    def add(self, **values) -> None:
        self.writer.writerow({**values, **self.machine})
        self.file.flush()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *unused) -> None:
        self.file.close()


def timed(function, device: torch.device) -> tuple[float, float, float]:
    """(median, p20, p80) in milliseconds; on a GPU with a cold L2 and device events."""
    if device.type == "cuda":
        from triton.testing import do_bench

        median, low, high = do_bench(function, warmup=20, rep=80, quantiles=[0.5, 0.2, 0.8])
        return median, low, high
    (timing,) = interleaved([Contender("", "", function)], device, repetitions=3)
    return timing.median * 1e3, timing.p20 * 1e3, timing.p80 * 1e3


def ceilings(device: torch.device) -> tuple[float, float]:
    """(bytes a second of a copy, read and written counted; bf16 FLOPs a second of a matmul)."""
    gpu = device.type == "cuda"
    source = torch.randn(1 << (30 if gpu else 22), device=device)
    target = torch.empty_like(source)
    copy_ms = timed(lambda: target.copy_(source), device)[0]
    size = 8192 if gpu else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    gemm_ms = timed(lambda: a @ b, device)[0]
    return 2 * source.nbytes / copy_ms * 1e3, 2 * size**3 / gemm_ms * 1e3


def logits_shapes(device: torch.device) -> list[tuple[LogitsShape, bool]]:
    """(shape, whether to time the slow contenders too)."""
    if device.type != "cuda":
        return [(LogitsShape(1, 8, 301), True), (LogitsShape(1, 8, 301, packed=True), False)]
    shapes = [(LogitsShape(4, 1024, 128256, masked), True) for masked in (0.5, 0.0, 0.8)]
    shapes += [(LogitsShape(4, 1024, vocab), True) for vocab in (32000, 151936, 256000)]
    # launch-bound
    shapes += [(LogitsShape(2, 128, 32000), True)]
    shapes += [(LogitsShape(4, 1024, 128256, packed=True), False)]
    shapes += [(LogitsShape(4, 1024, 128256, dtype=torch.float32), False)]
    shapes += [(LogitsShape(4, 1024, 128256, dtype=torch.float16), False)]
    # an odd vocabulary: every row starts at another alignment
    shapes += [(LogitsShape(4, 1024, 50257), False)]
    shapes += [(LogitsShape(2, 512, 128256), False), (LogitsShape(32, 512, 128256), False)]
    shapes += [(LogitsShape(2, 8192, 128256), False), (LogitsShape(1, 8, 128256, 0.0), False)]
    return shapes


def bench_logits(device: torch.device, rows: RowWriter, bandwidth: float, clock: Clock) -> None:
    table = Table(title=f"from logits; floor at {bandwidth / 1e12:.2f} TB/s, times in ms")
    for column in ("shape", "contender", "forward", "x floor", "fwd + bwd", "x floor", "peak MiB"):
        table.add_column(column, justify="right" if column != "contender" else "left")
    factories = contenders.installed(contenders.from_logits(device), console.print)
    for shape, thorough in logits_shapes(device):
        problem = make_logits_problem(shape, device)
        for name, factory in factories.items():
            if clock.left < 20:
                break
            if name in ("torch.compile", "reference", "liger") and not thorough:
                continue
            try:
                loss = factory()
                results = time_contender(loss, problem, [problem.logits], device)
            except Exception as error:
                console.print(f"[yellow]{name} on {shape}: {type(error).__name__}: {error}")
                torch.cuda.empty_cache()
                continue
            inplace = name.endswith("in place")
            cells = []
            for direction, (spread, peak) in results.items():
                floor = shape.floor_bytes(direction == "fwd_bwd", inplace)
                ratio = spread[0] * 1e-3 * bandwidth / floor
                cells += [f"{spread[0]:.3f}", f"{ratio:.2f}"]
                rows.add(
                    bench="from_logits",
                    contender=name,
                    direction=direction,
                    pairs=shape.pairs,
                    tokens=shape.tokens,
                    vocab=shape.vocab,
                    masked=shape.masked,
                    dtype=str(shape.dtype).removeprefix("torch."),
                    layout="packed" if shape.packed else "padded",
                    median_ms=spread[0],
                    p20_ms=spread[1],
                    p80_ms=spread[2],
                    peak_bytes=peak,
                    floor_bytes=floor,
                    times_floor=ratio,
                )
            peak = results["fwd_bwd"][1]
            table.add_row(label(shape), name, *cells, "" if peak is None else f"{peak / 2**20:.0f}")
        del problem
    console.print(table)


def time_contender(loss, problem, inputs, device: torch.device) -> dict:
    """{"fwd" and "fwd_bwd": ((median, p20, p80), peak bytes)}."""

    def forward():
        with torch.no_grad():
            return loss(problem)

    def both():
        return torch.autograd.grad(loss(problem), inputs)

    results = {}
    for direction, function in (("fwd", forward), ("fwd_bwd", both)):
        function()
        results[direction] = (timed(function, device), peak_extra_bytes(function, device))
    return results


def label(shape) -> str:
    size = f"{2 * shape.pairs}x{shape.tokens}x{shape.vocab}"
    parts = [size, str(shape.dtype).removeprefix("torch."), f"{shape.masked:.0%} masked"]
    if isinstance(shape, LinearShape):
        parts += [f"D={shape.hidden}", "trainable" if shape.trainable_head else "frozen"]
    elif shape.packed:
        parts += ["packed"]
    return " ".join(parts)


def linear_shapes(device: torch.device) -> list[LinearShape]:
    if device.type != "cuda":
        return [LinearShape(1, 8, 16, 301, trainable_head=head) for head in (True, False)]
    # 16384 scored tokens in 8 pairs: the heads of Llama-3-8B and Qwen3-1.7B
    sizes = ((4096, 128256), (2048, 151936))
    return [
        LinearShape(8, 2048, hidden, vocab, trainable_head=head)
        for hidden, vocab in sizes
        for head in (True, False)
    ]


def bench_linear(device: torch.device, rows: RowWriter, rate: float, clock: Clock) -> None:
    table = Table(title=f"from hidden states; floor at {rate / 1e12:.0f} TFLOP/s, times in ms")
    for column in ("shape", "contender", "fwd + bwd", "x floor", "peak MiB"):
        table.add_column(column, justify="right" if column != "contender" else "left")
    factories = contenders.installed(contenders.from_hidden(device), console.print)
    for shape in linear_shapes(device):
        problem = make_linear_problem(shape, device)
        for name, factory in factories.items():
            if clock.left < 20:
                break
            try:
                loss = factory()
                results = time_contender(loss, problem, problem.inputs, device)
            except Exception as error:
                console.print(f"[yellow]{name} on {shape}: {type(error).__name__}: {error}")
                torch.cuda.empty_cache()
                continue
            spread, peak = results["fwd_bwd"]
            ratio = spread[0] * 1e-3 * rate / shape.floor_flops()
            rows.add(
                bench="from_hidden",
                contender=name,
                direction="fwd_bwd",
                pairs=shape.pairs,
                tokens=shape.tokens,
                vocab=shape.vocab,
                hidden=shape.hidden,
                masked=shape.masked,
                head="trainable" if shape.trainable_head else "frozen",
                dtype=str(shape.dtype).removeprefix("torch."),
                median_ms=spread[0],
                p20_ms=spread[1],
                p80_ms=spread[2],
                peak_bytes=peak,
                floor_flops=shape.floor_flops(),
                times_floor=ratio,
            )
            table.add_row(
                label(shape),
                name,
                f"{spread[0]:.2f}",
                f"{ratio:.2f}",
                "" if peak is None else f"{peak / 2**20:.0f}",
            )
        del problem
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.device", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    parser.add_argument("--budget", type=float, default=300, help="seconds")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        console.print("[red]no CUDA GPU is visible to torch; --device cpu rehearses the command")
        return 2
    device, clock = torch.device(options.device), Clock(options.budget)
    bandwidth, rate = ceilings(device)
    with RowWriter(options.out) as rows:
        rows.add(bench="ceilings", copy_bytes_per_s=bandwidth, bf16_flops_per_s=rate)
        bench_logits(device, rows, bandwidth, clock)
        bench_linear(device, rows, rate, clock)
    return 0


if __name__ == "__main__":
    sys.exit(main())
