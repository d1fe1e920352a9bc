"""Where the commands print: boxes and bars on a terminal, Markdown tables and lines elsewhere."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

# logs and pipes report no width, and a table that wraps in one cannot be read
_PLAIN_WIDTH = 160


def make_console(stderr: bool = False) -> Console:
    console = Console(highlight=False, stderr=stderr, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, stderr=stderr, markup=False, width=_PLAIN_WIDTH)
    return console


def make_table(console: Console, title: str, first: str, *columns: str, **options) -> Table:
    """A table whose first column is text and whose others hold figures."""
    table = Table(
        title=title,
        title_justify="left",
        box=box.ROUNDED if console.is_terminal else box.MARKDOWN,
        **options,
    )
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def make_progress(console: Console) -> Progress:
    """Bars that are drawn on a terminal only; elsewhere they would fill a log."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.3f} ms" if value < 1 else f"{value:.1f} ms"


def mebibytes(size: int | None) -> str:
    return "not measured" if size is None else f"{size / 2**20:.1f} MiB"
