"""One HTML file of everything that was measured: `python -m benchmarks.report FILE.csv ... --out`.

Tables, pictures, machine, versions, and beside each figure the command that makes it again. It
refers to no other file, and follows the light or dark setting of the browser.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
from collections.abc import Iterator
from pathlib import Path

from dpo_kernels.cli.rows import OK, read_rows

from . import analysis
from .analysis import Row

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d8d8d8; --own: #a3273a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181c; --line: #3a3d44; --own: #f08a98; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .6rem 0 1.4rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.own td { color: var(--own); font-weight: 600; }
code { font-size: .92em; } img { max-width: 100%; } .quiet { opacity: .72; }
"""


def write_report(files: list[Path], out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for path in files for row in read_rows(path)]
    out.write_text(render(rows), encoding="utf-8")
    write_plots(rows, out.parent)
    return out


def write_plots(rows: list[Row], folder: Path) -> None:
    """A PNG of each growth, and of the first shape of every other suite that has times."""
    from . import plots

    for benchmark in dict.fromkeys(row["benchmark"] for row in analysis.timed(rows)):
        own = [row for row in rows if row["benchmark"] == benchmark]
        name = "_".join(benchmark.replace(",", "").split())
        if benchmark.startswith("growth"):
            what = benchmark.removeprefix("growth, ")
            (folder / f"{name}.png").write_bytes(plots.growth(own, what, dark=False))
            continue
        together = max(analysis.meetings(analysis.timed(own))[:2], key=len)
        (folder / f"{name}.png").write_bytes(plots.bars(together, dark=False))


def render(rows: list[Row]) -> str:
    body = "\n".join(_sections(rows))
    title = "dpo_kernels: what was measured"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _sections(rows: list[Row]) -> Iterator[str]:
    yield from _machine(rows)
    yield "<h2>Where we lose</h2>"
    yield from _losses(rows)
    for benchmark in dict.fromkeys(row["benchmark"] for row in rows):
        own = [row for row in rows if row["benchmark"] == benchmark]
        yield f"<h2>{_text(benchmark)}</h2>"
        suite = benchmark.partition(",")[0]
        devices = sorted({row["device"] for row in own})
        for device in devices:
            yield f"<p><code>python -m benchmarks {_text(suite)} --device {device}</code></p>"
        if suite == "growth":
            yield from _growth(own, benchmark.removeprefix("growth, "))
        elif suite == "accuracy":
            yield from _accuracy(own)
        else:
            yield from _times(own)


def _machine(rows: list[Row]) -> Iterator[str]:
    names = ("cpu", "cores", "threads", "isa", "memory", "gpu", "system")
    versions = ("python", "torch", "triton", "dpo_kernels", "commit", "packages")
    lines = []
    for name in (*names, *versions):
        values = sorted({row[name] for row in rows if row[name]})
        lines.append([name, "; ".join(values)])
    yield _table(["machine and versions", ""], lines)
    yield (
        "<p>A figure is the median of rounds in which all contenders take turns. It is shown only "
        "if the loss and the gradients of that contender were within their bound of float64 on "
        "that very input. The floor is the bytes or FLOPs that no implementation avoids, at the "
        "rate of a copy or GEMM measured in the same rounds.</p>"
    )


def _losses(rows: list[Row]) -> Iterator[str]:
    found = analysis.where_we_lose(rows)
    if not found:
        yield "<p>Nowhere in these rows.</p>"
        return
    yield (
        f"<p>{len(found)} entries, the worst first: another contender is faster or takes less "
        f"memory than our best exact one, ours is above {analysis.FAR_FROM_FLOOR}x of its floor, "
        "or has no figure.</p>"
    )
    lines = [[_about(loss.row), loss.row["mode"], loss.what] for loss in found]
    yield _table(["shape", "mode", "what"], lines)


def _about(row: Row) -> str:
    parts = [row["model"], row["shape"], row["dtype"], f"{row['scored_tokens']} scored"]
    parts += [row["layout"] if row["layout"] == "packed" else ""]
    parts += [f"{row['head']} head" if row["head"] else ""]
    parts += [row["loss_type"] if row["loss_type"] not in ("", "sigmoid") else ""]
    parts += [f"std {row['std']}" if row["benchmark"] == "accuracy" else ""]
    return " ".join(filter(None, parts))


def _times(rows: list[Row]) -> Iterator[str]:
    from . import plots

    for together in analysis.meetings(rows):
        first = together[0]
        yield f"<h3>{_text(_about(first))}, {_text(first['mode'])}</h3>"
        figures = analysis.timed(together)
        if len(figures) > 1:
            yield _picture(lambda dark, figures=figures: plots.bars(figures, dark), "times")
        base = analysis.best_of_ours(figures)
        lines, own = [], []
        for row in sorted(together, key=lambda row: float(row["median_ms"] or "inf")):
            own.append(analysis.is_ours(row))
            lines.append(_cells(row, base))
        header = ["contender", "median", "p20 to p80", "of the floor", "ours is", "extra memory"]
        yield _table([*header, "loss error", "gradient error"], lines, own)


def _cells(row: Row, base: Row | None) -> list[str]:
    from .readme import against, memory

    if row["status"] != OK:
        return [
            row["contender"],
            row["status"],
            *[""] * 4,
            row["loss_error"],
            row["gradient_error"],
        ]
    call = f", call {float(row['call_ms']):.3g} ms" if row["call_ms"] else ""
    return [
        row["contender"],
        f"{float(row['median_ms']):.4g} ms{call}",
        f"{float(row['p20_ms']):.4g} to {float(row['p80_ms']):.4g}",
        f"{float(row['times_floor']):.2f}x" if row["times_floor"] else "",
        against(row, base),
        memory(row),
        row["loss_error"],
        row["gradient_error"],
    ]


def _growth(rows: list[Row], what: str) -> Iterator[str]:
    from . import plots

    yield _picture(lambda dark: plots.growth(rows, what, dark), f"growth with {what}")
    lines, own = [], []
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == name]
        figures = analysis.timed(mine)
        sizes = [analysis.growing_size(row) for row in figures]
        slopes = [
            analysis.exponent(sizes, [float(row[column] or 0) for row in figures])
            for column in ("median_ms", "peak_extra_bytes")
        ]
        refused = sorted({row["status"] for row in mine if row["status"] != OK})
        cells = ["" if slope is None else f"{slope:.2f}" for slope in slopes]
        lines.append([name, *cells, "; ".join(refused)])
        own.append(analysis.is_ours(mine[0]))
    yield _table(["contender", "exponent of time", "of memory", "no figure"], lines, own)


def _accuracy(rows: list[Row]) -> Iterator[str]:
    from . import plots

    kinds = dict.fromkeys((row["dtype"], bool(row["head"])) for row in rows)
    for dtype, hidden in kinds:
        mine = [row for row in rows if (row["dtype"], bool(row["head"])) == (dtype, hidden)]
        where = "from hidden states" if hidden else "from logits"
        yield f"<h3>{dtype}, {where}</h3>"
        yield _picture(lambda dark, mine=mine: plots.accuracy(mine, dark), "errors")
        names = ("contender", "std", "loss_error", "loss_bound", "gradient_error", "gradient_bound")
        lines = [[*(row[name] for name in names), row["status"]] for row in mine]
        header = [name.replace("_", ", ") for name in names]
        yield _table([*header, ""], lines, [analysis.is_ours(row) for row in mine])


def _picture(draw, name: str) -> str:
    light, dark = (base64.b64encode(draw(dark)).decode() for dark in (False, True))
    return (
        "<picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
        f'<img alt="{_text(name)}" src="data:image/png;base64,{light}"></picture>'
    )


def _table(header: list[str], lines: list[list[str]], own: list[bool] | None = None) -> str:
    marks = own or [False] * len(lines)
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr{' class=own' * mark}>" + "".join(f"<td>{_text(c)}</td>" for c in line) + "</tr>"
        for line, mark in zip(lines, marks, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: str) -> str:
    return html.escape(str(value))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/report.html"))
    options = parser.parse_args(arguments)
    print(write_report(options.files, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
