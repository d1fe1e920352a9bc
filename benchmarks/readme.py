"""Writes the tables of README.md from the committed rows: `python -m benchmarks.readme [--check]`.

No figure is typed by hand; --check fails when the README and the rows differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dpo_kernels.cli.rows import OK, read_rows
from dpo_kernels.cli.runner import FORWARD, FRESH, INPLACE

from . import train_parity

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
H200 = RESULTS / "gpu" / "nvidia_h200.csv"
# what stands between these two lines of README.md is written here
BEGIN = "<!-- {}: begin (python -m benchmarks.readme writes it from the committed rows) -->"
END = "<!-- {}: end -->"
MIB = 2**20
Row = dict[str, str]


def read(path: Path, **wanted: str) -> list[Row]:
    """Rows with a figure whose columns are as wanted."""
    rows = [row for row in read_rows(path) if row["status"] == OK and row["median_ms"]]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def time(row: Row | None) -> str:
    if row is None:
        return ""
    milliseconds = float(row["median_ms"])
    digits = 3 if milliseconds < 1 else 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    floor = f", {float(row['times_floor']):.2f}x of the floor" if row["times_floor"] else ""
    return f"{milliseconds:.{digits}f} ms" + floor * is_ours(row)


def against(row: Row | None, own: Row | None) -> str:
    """How ours compares with a row, in words."""
    if row is None or own is None or is_ours(row):
        return ""
    ratio = float(row["median_ms"]) / float(own["median_ms"])
    word = "faster" if ratio >= 1 else "slower"
    ratio = max(ratio, 1 / ratio)
    return f"{ratio:.0f}x {word}" if ratio >= 9.95 else f"{ratio:.1f}x {word}"


def memory(row: Row | None) -> str:
    if row is None or not row["peak_extra_bytes"]:
        return ""
    size = int(row["peak_extra_bytes"]) / MIB
    return f"{size:.0f} MiB" if size < 10000 else f"{size / 1024:.0f} GiB"


def is_ours(row: Row) -> bool:
    return row["contender"].startswith("dpo_kernels")


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def machine(row: Row) -> str:
    where = row["gpu"].split(",")[0].removeprefix("1 x ")
    if row["device"] == "cpu":
        where = f"{row['cpu']}, {row['threads']} threads, {row['isa']}"
    day = f", {row['measured_at'][:10]}" if row["measured_at"] else ""
    return f"{where}, torch {row['torch']}, commit {row['commit']}{day}"


def contenders(rows: list[Row]) -> list[str]:
    """In the order of the table: ours first, then as measured; no calibration calls."""
    names = dict.fromkeys(row["contender"] for row in rows)
    names = [name for name in names if not name.startswith("torch.sum")]
    return sorted(names, key=lambda name: not name.startswith("dpo_kernels"))


TITLES = {"reference": "plain PyTorch", "torch.compile(reference)": "torch.compile"}


def title_of(name: str) -> str:
    return TITLES.get(name, name)


def logits_table(rows: list[Row], title: str) -> list[str]:
    """Forward, and forward + backward, with what ours is against each."""
    found = {(row["contender"], row["mode"]): row for row in rows}
    own = next(name for name in contenders(rows) if name.startswith("dpo_kernels"))
    lines = []
    for name in contenders(rows):
        forward, both = found.get((name, FORWARD)), found.get((name, FRESH))
        cells = [time(forward), against(forward, found[own, FORWARD])]
        cells += [time(both), against(both, found[own, FRESH])]
        lines.append([title_of(name), *cells, memory(both)])
        inplace = found.get((name, INPLACE))
        if inplace:
            lines.append([f"{name}, in place", "", "", time(inplace), "", memory(inplace)])
    header = [title, "forward", "ours is", "forward + backward", "ours is", "extra memory"]
    return [*table(header, lines), ""]


def linear_table(rows: list[Row], title: str) -> list[str]:
    """Forward + backward by kind of head."""
    found = {(row["contender"], row["head"]): row for row in rows if row["mode"] == FRESH}
    heads = [head for head in ("trainable", "frozen") if any(head == key[1] for key in found)]
    own = next(name for name in contenders(rows) if name.startswith("dpo_kernels"))
    lines = []
    for name in contenders(rows):
        cells = []
        for head in heads:
            row = found.get((name, head))
            cells += [time(row), against(row, found[own, head]), memory(row)]
        lines.append([title_of(name), *cells])
    header = [title]
    for head in heads:
        header += [f"{head} head", "ours is", "extra memory"]
    return [*table(header, lines), ""]


def shape_of(row: Row) -> str:
    return f"`[{row['shape'].replace('x', ', ')}]`"


def cpu_tables() -> list[str]:
    logits = read(RESULTS / "logits_cpu.csv", device="cpu")
    first = logits[0]
    lines = [
        f"**On a CPU, from logits** {shape_of(first)} with {first['scored_tokens']} tokens scored; "
        "medians. Extra memory is what a call allocates at its peak: ours is the gradient of the "
        "scored rows, and nothing in place. The floor counts a write of every row's gradient; "
        "rows that score nothing need none on a CPU, so that ours can be below it.",
        "",
    ]
    shape = {"shape": first["shape"], "scored_tokens": first["scored_tokens"]}
    for dtype in ("float32", "bfloat16"):
        lines += logits_table(
            read(RESULTS / "logits_cpu.csv", device="cpu", dtype=dtype, **shape), dtype
        )
    overhead = {
        row["contender"]: float(row["median_ms"]) for row in read(RESULTS / "overhead_cpu.csv")
    }
    empty = overhead.pop("empty autograd.Function")
    own = next(value for name, value in overhead.items() if name.startswith("dpo_kernels"))
    lines += [
        f"A call with next to nothing to compute takes {(own - empty) * 1e3:.0f} us more than an "
        "empty autograd.Function, forward and backward.",
        "",
        f"({machine(first)}; `python -m benchmarks logits overhead`)",
        "",
    ]
    linear = read(RESULTS / "linear_cpu.csv", device="cpu")
    first = linear[0]
    lines += [
        f"**On a CPU, from hidden states** {shape_of(first)} (sequences, tokens, hidden size, "
        f"vocabulary) with {first['scored_tokens']} tokens scored and the reference's hidden "
        "states given; forward + backward. The exact one computes in float32 for bfloat16 inputs "
        "too; the floor is the GEMMs in the dtype of the inputs, which this CPU makes faster in "
        "float32.",
        "",
    ]
    for dtype in ("float32", "bfloat16"):
        lines += linear_table(read(RESULTS / "linear_cpu.csv", device="cpu", dtype=dtype), dtype)
    return [*lines, f"({machine(first)}; `python -m benchmarks linear`)", ""]


def gpu_tables() -> list[str]:
    rows = read(H200, benchmark="logits")
    first = rows[0]
    shape = {name: first[name] for name in ("shape", "scored_tokens", "dtype", "layout")}
    hidden = read(H200, benchmark="linear")
    other = hidden[0]
    hidden = like_the_first(hidden)
    return [
        f"**On an H200, from logits** {shape_of(first)} in {first['dtype']}, "
        f"{first['scored_tokens']} tokens scored. The floor is the bytes that must move at the "
        f"measured {float(first['rate']) / 1e12:.2f} TB/s of a copy.",
        "",
        *logits_table(read(H200, benchmark="logits", **shape), first["model"]),
        "Other shapes, forward + backward:",
        "",
        *shapes_table(rows),
        f"**On an H200, from hidden states** {shape_of(other)} (sequences, tokens, hidden size, "
        f"vocabulary) in {other['dtype']}, {other['scored_tokens']} tokens scored, forward + "
        "backward. The floor is the GEMMs that no one can avoid, three or with a frozen head two, "
        f"at the measured {float(other['rate']) / 1e12:.0f} TFLOP/s. Ours took 1/16 of the GPU's "
        "memory for a tile of logits; since then a tile has 1024 rows, with a trainable head 4096 "
        "or those of a larger pair, and `workspace_mb` sets less or more. fast is "
        '`precision="fast"`: a tile of logits in the dtype of the inputs, which costs up to 0.1 '
        "nat a token in bfloat16.",
        "",
        *linear_table(hidden, other["model"]),
        f"({machine(first)}; `python -m benchmarks.gpu`)",
        "",
    ]


def shapes_table(rows: list[Row]) -> list[str]:
    """Ours on every shape from logits, by backend, and the best of the others."""
    about = ("model", "shape", "dtype", "scored_tokens", "layout")
    shapes = list(dict.fromkeys(tuple(row[name] for name in about) for row in rows))
    own = list(dict.fromkeys(row["contender"] for row in rows if is_ours(row)))
    lines = []
    for shape in shapes[1:]:
        wanted = dict(zip(about, shape, strict=True))
        found = [r for r in rows if r["mode"] == FRESH and wanted.items() <= r.items()]
        by_name = {row["contender"]: row for row in found}
        others = [row for row in found if not is_ours(row)]
        best = min(others, key=lambda row: float(row["median_ms"]))
        model, size, dtype, scored, layout = shape
        lines.append(
            [
                f"{model} {size}, {scored} scored, {dtype}" + ", packed" * (layout == "packed"),
                *(time(by_name.get(name)) for name in own),
                f"{title_of(best['contender'])}, {time(best)}",
            ]
        )
    return [*table(["", *own, "the best of the others"], lines), ""]


ACCURACY = RESULTS / "accuracy_cpu.csv"
KINDS = [(dtype, hidden) for hidden in (False, True) for dtype in ("float32", "bfloat16")]


def worst_errors(rows: list[Row], contender: str, dtype: str, hidden: bool) -> list[float]:
    """Of the loss and of a gradient, over the spreads of the logits; none where it was not run."""
    kind = (contender, dtype, hidden)
    own = [r for r in rows if (r["contender"], r["dtype"], bool(r["head"])) == kind]
    own = [row for row in own if row["loss_error"]]
    return [max(float(r[name]) for r in own) for name in ("loss_error", "gradient_error") if own]


def accuracy_table() -> list[str]:
    rows = read_rows(ACCURACY)
    lines = [
        [title_of(name)]
        + [" and ".join(f"{x:.1e}" for x in worst_errors(rows, name, *kind)) for kind in KINDS]
        for name in contenders([row for row in rows if row["loss_error"]])
    ]
    header = [f"from {'hidden states' if hidden else 'logits'}, {dtype}" for dtype, hidden in KINDS]
    stds = ", ".join(dict.fromkeys(row["std"] for row in rows))
    return [
        "**How exact**: the largest error against float64 of the loss, and of a row of the "
        f"gradient relative to the largest, for logits of standard deviation {stds}.",
        "",
        *table(["", *header], lines),
        "",
        f"({machine(rows[0])}; `python -m benchmarks accuracy`)",
        "",
    ]


def training_table() -> list[str]:
    measured = ("loss", "step_s", "loss_part_s", "peak_bytes", "tokens")
    rows = read_rows(RESULTS / "train_parity.csv")
    first, runs = rows[0], {}
    for row in rows:
        numbers = {**row, **{name: float(row[name]) for name in measured}}
        runs.setdefault((row["mode"], row["contender"]), []).append(numbers)
    body = []
    for (mode, name), own in runs.items():
        step, part = (train_parity.median(own, key) for key in ("step_s", "loss_part_s"))
        rate, rise = train_parity.tokens_per_second(own), train_parity.largest_rise(own)
        difference = train_parity.largest_difference(own, runs[mode, "trl"], "loss")
        times = [f"{step:.2f} s", f"{part:.2f} s", f"{rate:.0f}", f"{rise / MIB:.0f} MiB"]
        accuracy = float(own[-1]["held_out_rewards/accuracies"])
        agrees = ["" if name == "trl" else f"{difference:.1e}", f"{accuracy:.3f}"]
        body.append([mode, train_parity.NAMES[name], *times, *agrees])
    header = ["", "trainer", "whole step", "loss and head", "tokens a second"]
    header += [
        "largest rise of memory in a step",
        "largest difference from TRL's loss",
        "held-out accuracy",
    ]
    return [
        f"**A real run**: TRL {first['trl']}'s DPOTrainer on {first['model']}, {first['steps']} "
        f"steps of {first['batch']} real preference pair, {first['max_length']} tokens, "
        f'{first["dtype"]}, from one seed, as it is and after `dpo_kernels.patch("trl")`.',
        "",
        *table(header, body),
        "",
        f"({first['cpu']}, {first['threads']} threads, torch {first['torch']}, transformers "
        f"{first['transformers']}, commit {first['commit']}; `python -m benchmarks.train_parity "
        f"--model {first['model']} --data {first['data']} --steps {first['steps']} "
        f"--batch {first['batch']} --max-length {first['max_length']} "
        f"--held-out {first['held_out']}`; [where the two files come from and what the curves look "
        "like](benchmarks/results/README.md#train_paritycsv))",
        "",
    ]


def beside(rows: list[Row], name: str) -> str:
    """How ours compares with a contender in time and memory, forward and backward, in words."""
    found = {row["contender"]: row for row in rows if row["mode"] == FRESH}
    own = next(row for row in rows if is_ours(row) and row["mode"] == FRESH)
    row = found.get(name)
    if row is None:
        return ""
    ratio = int(row["peak_extra_bytes"]) / int(own["peak_extra_bytes"])
    word = "less" if ratio >= 1 else "more"
    return f"{against(row, own)}, {max(ratio, 1 / ratio):.1f}x {word} memory"


def like_the_first(rows: list[Row]) -> list[Row]:
    """Of its shape and number of scored tokens."""
    same = ("shape", "scored_tokens")
    return [row for row in rows if all(row[name] == rows[0][name] for name in same)]


def headline() -> list[str]:
    """Forward and backward against every contender, one column a place it was measured."""
    gpu, cpu = read(H200, benchmark="logits"), read(RESULTS / "logits_cpu.csv", dtype="float32")
    shape = {key: gpu[0][key] for key in ("shape", "scored_tokens", "dtype", "layout")}
    heads = {"head": "trainable"}
    hidden = read(H200, benchmark="linear", **heads)
    columns = {
        "H200, from logits": read(H200, benchmark="logits", **shape),
        "H200, from hidden states": like_the_first(hidden),
        "CPU, from logits": like_the_first(cpu),
        "CPU, from hidden states": read(RESULTS / "linear_cpu.csv", dtype="float32", **heads),
    }
    names = {
        **TITLES,
        "TRL": "TRL 1.16",
        "Liger": "Liger 0.8.5",
        "cut-cross-entropy": "cut-cross-entropy",
    }
    lines = [
        [title, *(beside(rows, name) for rows in columns.values())] for name, title in names.items()
    ]
    rows, kind = read_rows(ACCURACY), ("bfloat16", True)
    (ours, _), (theirs, _) = (
        worst_errors(rows, name, *kind) for name in ("dpo_kernels, cpu", "TRL")
    )
    exact = (
        f"From hidden states in bfloat16 its loss is at most {ours:.0e} off float64's, TRL's "
        f"{theirs:.0e} ([how exact](#how-fast))."
    )
    return [*table(["against", *columns], lines), "", exact, ""]


def tables() -> list[str]:
    measured = (gpu_tables, cpu_tables, accuracy_table, training_table)
    return [line for made in measured for line in made()]


def written(text: str) -> str:
    """The text of README.md with its blocks made anew."""
    for name, block in (("headline", headline), ("tables", tables)):
        before, rest = text.split(BEGIN.format(name))
        _, after = rest.split(END.format(name))
        body = "\n".join(["", *block()])
        text = f"{before}{BEGIN.format(name)}\n{body}{END.format(name)}{after}"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    text = path.read_text()
    wanted = written(text)
    if options.check:
        if text != wanted:
            print("README.md differs from the rows: run python -m benchmarks.readme")
        return int(text != wanted)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
