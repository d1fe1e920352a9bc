"""Speed and peak memory of dpo_loss against the reference; a number needs a green parity gate."""

from __future__ import annotations

import torch
from rich.console import Console

from ..dispatch import available_backends
from .console import make_console, make_progress, make_table, mebibytes
from .contenders import backends_for, contenders_for
from .problems import Shape, dtype_name
from .rows import OK, write_rows
from .runner import FORWARD, FRESH, INPLACE, measure_shape

SHAPE, SHAPE_QUICK = (4, 256, 49152), (2, 256, 32000)


def main(args) -> int:
    console = make_console()
    pairs, tokens, vocab = args.shape or (SHAPE_QUICK if args.quick else SHAPE)
    rows = run_bench(
        console,
        Shape(pairs, tokens, vocab, dtype=getattr(torch, args.dtype)),
        backend=args.backend,
        compiled=not args.quick,
        repetitions=args.repetitions or (5 if args.quick else 7),
    )
    if args.csv and rows:
        write_rows(args.csv, rows, append=True)
        console.print(f"rows appended to {args.csv}")
    return 0 if rows and all(row["status"] == OK for row in rows) else 1


def run_bench(
    console: Console,
    shape: Shape,
    *,
    backend: str | None = None,
    compiled: bool = False,
    repetitions: int = 7,
) -> list[dict[str, str]]:
    """Prints the table and returns its rows, none when nothing can be measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if backend is not None and not backends_for(device, shape.dtype, backend):
        reason = available_backends().get(backend) or f"it takes no {shape.dtype} on {device}"
        console.print(f"nothing to measure: {backend} is unavailable ({reason})")
        return []
    console.print(
        f"logits [{2 * shape.pairs}, {shape.tokens}, {shape.vocab}] {dtype_name(shape.dtype)} "
        f"on {device}, {shape.scored_share:.0%} of the tokens scored"
    )
    contenders = contenders_for(shape, device, backend=backend, compile=compiled)
    rows: list[dict[str, str]] = []
    with make_progress(console) as progress:
        calls = sum(1 if c.inplace else 2 for c in contenders) + 1
        task = progress.add_task(
            "measuring", total=len(contenders) + calls * (repetitions + 1), note=""
        )
        measure_shape(
            shape,
            contenders,
            device,
            rows.append,
            benchmark="bench",
            repetitions=repetitions,
            advance=lambda note: progress.update(task, advance=1, note=note),
        )
    print_table(console, rows)
    console.print(
        "floor: the bytes that must move, at the speed of a copy; in place: backward overwrites "
        "the logits; peak: what a call allocates on top of its inputs"
    )
    return rows


def print_table(console: Console, rows: list[dict[str, str]], title: str = "dpo_loss") -> None:
    """Times as the median (p20 to p80), against the floor and the reference in the same mode.

    In place compares with the reference's forward and backward: it has no such mode.
    """
    medians = {
        (row["contender"], row["mode"]): float(row["median_ms"])
        for row in rows
        if row["status"] == OK
    }
    base = {mode: medians.get(("reference", mode)) for mode in (FORWARD, FRESH)}
    base[INPLACE] = base[FRESH]
    columns = ("mode", "median", "p20 to p80", "of the floor", "against the reference", "peak")
    table = make_table(console, title, "", *columns)
    for row in rows:
        if row["status"] != OK:
            table.add_row(row["contender"], row["mode"], row["status"])
            continue
        median = float(row["median_ms"])
        reference = base[row["mode"]]
        peak = row["peak_extra_bytes"]
        table.add_row(
            row["contender"],
            row["mode"],
            _ms(median),
            f"{_ms(float(row['p20_ms']))} to {_ms(float(row['p80_ms']))}",
            f"{float(row['times_floor']):.2f}x",
            ratio(reference, median),
            mebibytes(int(peak) if peak else None),
        )
    console.print(table)


def ratio(reference: float | None, median: float) -> str:
    """How many times as fast as the reference, in words."""
    if reference is None:
        return ""
    if median <= reference:
        return f"{reference / median:.1f}x faster" if median < reference else "the same"
    return f"{median / reference:.1f}x slower"


def _ms(value: float) -> str:
    return f"{value:.3f} ms" if value < 1 else f"{value:.1f} ms"
