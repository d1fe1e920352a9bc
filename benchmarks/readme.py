"""Writes the tables of README.md from the committed rows: `python -m benchmarks.readme [--check]`.

No figure is typed by hand; --check fails when the README and the rows differ.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- tables: begin (python -m benchmarks.readme writes them from the committed rows) -->"
END = "<!-- tables: end -->"
MIB = 2**20


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def cell(row: dict[str, str] | None, base: dict[str, str] | None) -> str:
    """Milliseconds, and how many times as long as ours."""
    if row is None:
        return "-"
    milliseconds = float(row["median_ms"])
    text = f"{milliseconds:.1f} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"
    if base is None or row is base:
        return text
    return f"{text} ({milliseconds / float(base['median_ms']):.1f}x)"


def memory(row: dict[str, str] | None) -> str:
    if row is None or not row["peak_extra_bytes"]:
        return "-"
    return f"{int(row['peak_extra_bytes']) / MIB:.0f} MiB"


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(line) + " |" for line in lines),
    ]


def machine(row: dict[str, str]) -> str:
    return (
        f"{row['cpu']}, {row['threads']} threads, {row['isa']}, torch {row['torch']}, "
        f"commit {row['commit']}, {row['measured_at'][:10]}"
    )


def logits_tables() -> list[str]:
    rows = read("logits_cpu.csv")
    measured = [row for row in rows if row["benchmark"] == "logits"]
    lines = [
        f"From logits `[{measured[0]['shape'].replace('x', ', ')}]`, "
        f"{measured[0]['scored_tokens']} tokens scored; medians, and in brackets how many times as "
        "long as ours. In place has no counterpart elsewhere: it is compared with their forward + "
        "backward. Our extra memory is the gradient of the scored rows, and nothing in place. "
        "torch.sum reads the same bytes as our forward; in bfloat16 it copies, and is no floor.",
        "",
    ]
    for dtype in ("float32", "bfloat16"):
        found = {(r["contender"], r["mode"]): r for r in measured if r["dtype"] == dtype}
        names = list(dict.fromkeys(name for name, _ in found))
        own = next(name for name in names if name.startswith("dpo_kernels"))
        body = []
        for name in names:
            both = found.get((name, "forward + backward"))
            inplace = found.get((own, "in place"))
            last = cell(inplace, None) if name == own else cell(both, inplace)
            body.append(
                [
                    name,
                    cell(found.get((name, "forward")), found[own, "forward"]),
                    cell(both, found[own, "forward + backward"]),
                    last,
                    memory(both),
                ]
            )
        header = [dtype, "forward", "forward + backward", "in place", "extra memory"]
        lines += [*table(header, body), ""]
    overhead = {r["contender"]: float(r["median_ms"]) for r in rows if "overhead" in r["benchmark"]}
    empty = overhead.pop("empty autograd.Function")
    beyond = ", ".join(f"{(ms - empty) * 1e3:.0f} us" for ms in overhead.values())
    lines += [
        f"A call with next to nothing to compute costs {beyond} beyond an empty autograd.Function, "
        "forward and backward.",
        "",
        f"({machine(measured[0])}; `python -m benchmarks.logits`)",
        "",
    ]
    return lines


def linear_tables() -> list[str]:
    rows = read("linear_cpu.csv")
    lines = [
        f"From hidden states, `{rows[0]['shape']}` (sequences, tokens, hidden, vocabulary), "
        f"{rows[0]['scored_tokens']} tokens scored, reference hidden states given, forward + "
        "backward; in brackets how many times as long as ours with the same inputs. GEMMs alone "
        "are torch.mm; ours go through oneDNN where that is faster, and exact works in float32 "
        "also for bfloat16 inputs.",
        "",
    ]
    for dtype in ("float32", "bfloat16"):
        found = {(r["contender"], r["mode"]): r for r in rows if r["dtype"] == dtype}
        names = list(dict.fromkeys(name for name, _ in found))
        own = next(name for name in names if "exact" in name or name.startswith("dpo_kernels"))
        modes = ("trainable head", "frozen head")
        body = [
            [
                name,
                *(cell(found.get((name, mode)), found.get((own, mode))) for mode in modes),
                memory(found.get((name, modes[0]))),
            ]
            for name in names
        ]
        lines += [*table([dtype, *modes, "extra memory, trainable"], body), ""]
    return [*lines, f"({machine(rows[0])}; `python -m benchmarks.linear`)", ""]


def training_table() -> list[str]:
    rows = read("train_parity.csv")
    first = rows[0]
    # the first step warms up
    timed = [row for row in rows if int(row["step"]) > 1]
    names = {"trl": "TRL", "patched": "TRL, patched"}
    body = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        losses = {
            name: [float(r["loss"]) for r in rows if (r["mode"], r["contender"]) == (mode, name)]
            for name in names
        }
        for name, label in names.items():
            own = [r for r in timed if (r["mode"], r["contender"]) == (mode, name)]
            apart = max(abs(a - b) for a, b in zip(losses[name], losses["trl"], strict=True))
            step, part, peak = (
                median(float(r[key]) for r in own)
                for key in ("step_s", "loss_part_s", "peak_bytes")
            )
            body.append(
                [
                    mode,
                    label,
                    f"{step:.2f} s",
                    f"{part:.2f} s",
                    f"{peak / MIB:.0f} MiB",
                    f"{apart:.1e}",
                ]
            )
    header = ["", "trainer", "step", "of it the loss", "peak of a step", "loss apart by at most"]
    return [
        f"A real run: TRL {first['trl']}'s DPOTrainer on {first['model']}, {first['steps']} steps "
        f"of {first['batch']} real preference pair, {first['max_length']} tokens, "
        f"{first['dtype']}, from one seed, as it is and after `patch_trl()`.",
        "",
        *table(header, body),
        "",
        f"({first['cpu']}, {first['threads']} threads, torch {first['torch']}, transformers "
        f"{first['transformers']}, commit {first['commit']}; `python -m benchmarks.train_parity`; "
        "curves in benchmarks/results/train_parity.png)",
        "",
    ]


def render() -> str:
    return "\n".join(["", *logits_tables(), *linear_tables(), *training_table()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    text = path.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{render()}{END}{after}"
    if options.check:
        if text != wanted:
            print("README.md differs from the rows: run python -m benchmarks.readme")
        return int(text != wanted)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
