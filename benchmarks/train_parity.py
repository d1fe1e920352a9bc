"""TRL's DPOTrainer on a real model, as it is and with this package, step by step from one seed.

    python -m benchmarks.train_parity --model DIR_OR_GGUF --data FILE.jsonl --steps 30

Every run has a process of its own. A finished run is kept in --out and not repeated, so that the
command goes on where it was stopped. Rows and the plot are written only if the losses agree.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dpo_kernels.cli.environment import environment

from .train_run import (
    CONTENDERS,
    MODES,
    InputError,
    RunSettings,
    locate_model,
    read_pairs,
    run,
    split_pairs,
)

# wide enough for the table where the output is a file
console = Console(width=None if sys.stdout.isatty() else 110)

# how far a step's loss may be from unpatched TRL's in float32
LOSS_TOLERANCE = 1e-3
NAMES = {"trl": "TRL", "patched": "TRL, patched", "fused": "FusedDPOTrainer"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_parity", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a model, or a GGUF file")
    parser.add_argument("--data", required=True, help="JSONL of prompt, chosen, rejected")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--mode", choices=[*MODES, "both"], default="both")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--batch", type=int, default=2, help="pairs a step")
    parser.add_argument(
        "--max-length", type=int, default=512, help="tokens of an answer's sequence"
    )
    parser.add_argument("--learning-rate", type=float, default=5e-6, help="ten times that for LoRA")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--held-out", type=int, default=0, help="pairs at the end of the data, asked after training"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/train_parity"))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "max_length"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1")
    if options.held_out < 0:
        parser.error("--held-out: expected at least 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = RunSettings(
        str(Path(options.model).resolve()),
        str(Path(options.data).resolve()),
        *(options.steps, options.batch, options.max_length, options.learning_rate),
        *(options.dtype, options.seed, options.held_out),
    )
    try:
        if options.only:
            mode, contender = options.only.split("/")
            write_run(options.out, settings, mode, contender, run(settings, mode, contender))
            return 0
        locate_model(Path(settings.model))
        pairs, _ = split_pairs(read_pairs(Path(settings.data)), settings.held_out)
    except InputError as error:
        console.print(f"[red]{error}", soft_wrap=True)
        return 2
    modes = MODES if options.mode == "both" else (options.mode,)
    console.print(
        f"{len(pairs)} pairs; {options.steps} steps of {options.batch} in {options.dtype}"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    runs = {}
    for mode in modes:
        for contender in options.contenders:
            rows = finished_run(options.out, settings, mode, contender)
            if rows is None:
                console.print(f"{mode}, {NAMES[contender]} ...")
                rows = run_apart(options, settings, mode, contender)
            if rows is None:
                return 1
            runs[mode, contender] = rows
    return report(options.out, settings, runs)


def _run_file(out: Path, mode: str, contender: str) -> Path:
    return out / f"{mode}-{contender}.json"


def write_run(out: Path, settings: RunSettings, mode: str, contender: str, rows: list) -> None:
    content = {"settings": dataclasses.asdict(settings), "rows": rows, "machine": machine()}
    file = _run_file(out, mode, contender)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(file)


def finished_run(out: Path, settings: RunSettings, mode: str, contender: str) -> list | None:
    """The rows of a run that was made before with the same settings."""
    file = _run_file(out, mode, contender)
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    if content["settings"] != dataclasses.asdict(settings):
        console.print(f"{file} is of other settings and is made again")
        return None
    return content["rows"]


def run_apart(options, settings: RunSettings, mode: str, contender: str) -> list | None:
    """Rows of a run in a process of its own: its memory is its own, and so are its patches."""
    command = [sys.executable, "-m", "benchmarks.train_parity", "--only", f"{mode}/{contender}"]
    for name, value in dataclasses.asdict(settings).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--out", str(options.out)]
    log = options.out / f"{mode}-{contender}.log"
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        console.print(f"[red]{mode}, {NAMES[contender]} failed; the end of {log}:\n", tail)
        return None
    return finished_run(options.out, settings, mode, contender)


def machine() -> dict[str, str]:
    packages = ("trl", "transformers", "peft", "accelerate")
    return {**environment(), **{name: metadata.version(name) for name in packages}}


def median(rows: list[dict], name: str) -> float:
    # the first step warms caches up
    return statistics.median(row[name] for row in (rows[1:] or rows))


def largest_rise(rows: list[dict]) -> float:
    """Bytes; a step that finds room in what malloc kept of an earlier one raises nothing."""
    return max(row["peak_bytes"] for row in (rows[1:] or rows))


def tokens_per_second(rows: list[dict]) -> float:
    """Of both answers, prompts included: the median step, but the first, which warms caches up."""
    return statistics.median(row["tokens"] / row["step_s"] for row in rows[1:] or rows)


def largest_difference(rows: list[dict], baseline: list[dict], name: str) -> float:
    return max(abs(a[name] - b[name]) for a, b in zip(rows, baseline, strict=True))


def report(out: Path, settings: RunSettings, runs: dict[tuple[str, str], list[dict]]) -> int:
    title = f"{Path(settings.model).name}, {settings.steps} steps"
    table = Table(title=f"{title}; medians of a step, and its most memory")
    for column in (
        "",
        "contender",
        "step s",
        "tokens/s",
        "loss part s",
        "x",
        "most MiB",
        "|dloss|",
        "|dmargin|",
        "held out",
    ):
        table.add_column(column, justify="left" if column in ("", "contender") else "right")
    agree = True
    for (mode, contender), rows in runs.items():
        baseline = runs.get((mode, "trl"), rows)
        difference = largest_difference(rows, baseline, "loss")
        agree &= difference <= LOSS_TOLERANCE or settings.dtype != "float32"
        accuracy = rows[-1]["held_out_rewards/accuracies"]
        speedup = median(baseline, "loss_part_s") / median(rows, "loss_part_s")
        table.add_row(
            mode,
            NAMES[contender],
            f"{median(rows, 'step_s'):.2f}",
            f"{tokens_per_second(rows):.0f}",
            f"{median(rows, 'loss_part_s'):.3f}",
            f"{speedup:.2f}",
            f"{largest_rise(rows) / 2**20:.0f}",
            f"{difference:.1e}",
            f"{largest_difference(rows, baseline, 'rewards/margins'):.1e}",
            "" if accuracy is None else f"{accuracy:.3f}",
        )
    console.print(table)
    if not agree:
        console.print(
            f"[red]losses differ from TRL's by more than {LOSS_TOLERANCE}: no rows written"
        )
        return 1
    write_rows(out / "train_parity.csv", settings, runs)
    plot(out / "train_parity.png", settings, runs)
    console.print(f"{out / 'train_parity.csv'}, {out / 'train_parity.png'}")
    return 0


def write_rows(path: Path, settings: RunSettings, runs: dict) -> None:
    described = dataclasses.asdict(settings)
    described |= {name: Path(described[name]).name for name in ("model", "data")}
    with path.open("w", newline="") as file:
        writer = None
        for (mode, contender), rows in runs.items():
            content = json.loads(_run_file(path.parent, mode, contender).read_text())
            for row in rows:
                values = {"mode": mode, "contender": contender, **row, **described}
                values |= content["machine"]
                if writer is None:
                    writer = csv.DictWriter(file, list(values))
                    writer.writeheader()
                writer.writerow(values)


def plot(path: Path, settings: RunSettings, runs: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = list(dict.fromkeys(mode for mode, _ in runs))
    panels = ("loss", "rewards/margins", "loss_part_s", "peak_bytes")
    labels = (
        "loss",
        "rewards/margins",
        "time of loss and head, s",
        "largest rise of memory in a step, MiB",
    )
    figure, axes = pyplot.subplots(
        len(modes), len(panels), figsize=(16, 3.6 * len(modes)), squeeze=False
    )
    for axes_row, mode in zip(axes, modes, strict=True):
        kinds = [contender for one, contender in runs if one == mode]
        for axis, panel, label in zip(axes_row, panels, labels, strict=True):
            axis.set_title(f"{mode}: {label}")
            if panel in ("loss", "rewards/margins"):
                # wide below, narrow above: curves that agree are seen to
                for width, kind in zip((5, 3, 1), kinds, strict=False):
                    rows = runs[mode, kind]
                    steps = [row["step"] for row in rows]
                    axis.plot(steps, [row[panel] for row in rows], lw=width, label=NAMES[kind])
                axis.set_xlabel("step")
                axis.legend()
                continue
            if panel == "peak_bytes":
                heights = [largest_rise(runs[mode, kind]) / 2**20 for kind in kinds]
            else:
                heights = [median(runs[mode, kind], panel) for kind in kinds]
            colours = [f"C{i}" for i in range(len(kinds))]
            bars = axis.bar([NAMES[kind] for kind in kinds], heights, color=colours)
            axis.bar_label(bars, fmt="%.0f" if panel == "peak_bytes" else "%.3g")
            axis.margins(y=0.12)
            axis.tick_params(axis="x", labelsize=8)
    name = f"{Path(settings.model).name}, batch of {settings.batch}, {settings.dtype}"
    figure.suptitle(name)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
