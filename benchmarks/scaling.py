"""Writes the tables of docs/scaling.md from the formulas: `python -m benchmarks.scaling [--check]`.

No figure is typed by hand, and none is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from dpo_kernels.cli.memory import size
from dpo_kernels.scaling import (
    Collective,
    Step,
    gathered_logits,
    sequence_group,
    sharded_head,
    vocab_group_from_hidden,
    vocab_group_from_logits,
)

PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN = "<!-- {}: begin (python -m benchmarks.scaling writes it from the formulas) -->"
END = "<!-- {}: end -->"
VOCAB, HIDDEN, PAIRS, TOKENS, DTYPE = 128256, 4096, 8, 4096, torch.bfloat16
# (GPUs, vocab_group, sequence_group); the others hold other pairs
LAYOUTS = (
    (8, 1, 1),
    (8, 8, 1),
    (64, 1, 1),
    (64, 8, 1),
    (64, 8, 8),
    (1024, 1, 1),
    (1024, 8, 1),
    (1024, 8, 16),
)


def step_of(tp: int, cp: int) -> Step:
    return Step(PAIRS, TOKENS, VOCAB, HIDDEN, DTYPE, scored=0.5, tp=tp, cp=cp)


def traffic() -> str:
    """A row a layout."""
    names = ("GPUs", "pairs by", "vocabulary by", "sequence by", "sharded head")
    names += ("vocab_group, from logits", "vocab_group, from hidden states", "sequence_group")
    names += ("GEMMs, trainable head",)
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for gpus, tp, cp in LAYOUTS:
        step = step_of(tp, cp)
        head = sharded_head(VOCAB, HIDDEN, gpus, DTYPE, True) if tp == cp == 1 else None
        logits = vocab_group_from_logits(step.rows, tp) if tp > 1 else None
        from_hidden = (step.scored_rows, HIDDEN, tp, step.tiles(True))
        hidden = vocab_group_from_hidden(*from_hidden) if tp > 1 else None
        sequence = sequence_group(PAIRS, cp) if cp > 1 else None
        gemms = f"{step.gemms(True, False)}, {step.gemm_flops(True, False) / 1e12:.1f} TFLOP"
        cells = [sent(head, gpus), sent(logits, tp), sent(hidden, tp), sent(sequence, cp), gemms]
        lines.append("| " + " | ".join(map(str, (gpus, gpus // tp // cp, tp, cp, *cells))) + " |")
    return "\n".join(lines)


def sent(collectives: list[Collective] | None, ranks: int) -> str:
    """What a rank sends, and in how many collectives."""
    if collectives is None:
        return ""
    total = sum(collective.sent(ranks) for collective in collectives)
    return f"{size(total)} in {len(collectives)}"


def memory() -> str:
    lines = ["| | naive | dpo_kernels |", "|---|---|---|"]
    for tp, cp in ((1, 1), (8, 1), (8, 8)):
        step = step_of(tp, cp)
        where = "one rank" if tp == cp == 1 else f"vocabulary by {tp}, sequence by {cp}"
        naive, from_hidden = step.naive_from_logits(), step.naive_from_hidden()
        for name, before, now in (
            ("from logits", naive, step.from_logits()),
            ("from logits, in place", naive, step.from_logits(inplace=True)),
            ("from hidden states, frozen head", from_hidden, step.from_hidden(False)),
            ("from hidden states, trainable head", from_hidden, step.from_hidden(True)),
        ):
            lines.append(f"| {where}: {name} | {size(before)} | {size(now)} |")
    return "\n".join(lines)


def comparison() -> str:
    step = step_of(8, 1)
    whole = gathered_logits(step.rows, VOCAB, DTYPE).sent(8)
    ours = sum(c.sent(8) for c in vocab_group_from_logits(step.rows, 8))
    return (
        f"With the vocabulary split by 8, gathering the logits would send {size(whole)} from every "
        f"rank; the sums are {size(ours)}, 1/{whole / ours:.0f} of it."
    )


def written(page: str) -> str:
    for name, text in (("traffic", traffic()), ("memory", memory()), ("whole", comparison())):
        begin, end = BEGIN.format(name), END.format(name)
        head, rest = page.split(begin)
        page = f"{head}{begin}\n\n{text}\n{end}{rest.split(end)[1]}"
    return page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling")
    parser.add_argument("--check", action="store_true", help="fail when the page differs")
    args = parser.parse_args(argv)
    page = PAGE.read_text()
    new = written(page)
    if args.check:
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
