"""A calculator: the peak memory of a loss, and what its ranks exchange, from the formulas alone."""

from __future__ import annotations

import torch
from rich.console import Console

from ..scaling import Step, sequence_group, vocab_group_from_hidden, vocab_group_from_logits
from .console import make_console, make_table


def main(args) -> int:
    console = make_console()
    step = Step(
        pairs=args.pairs,
        tokens=args.tokens,
        vocab=args.vocab,
        hidden=args.hidden,
        dtype=getattr(torch, args.dtype),
        scored=args.scored,
        tp=args.tp,
        cp=args.cp,
        workspace_mb=args.workspace_mb,
    )
    print_memory(console, step)
    if step.tp > 1 or step.cp > 1:
        print_traffic(console, step)
    console.print("All figures are modelled, by the formulas of dpo_kernels/scaling.py.")
    return 0


def print_memory(console: Console, step: Step) -> None:
    """Beside the inputs and the model, on one rank."""
    title = (
        f"Peak memory of the loss, forward and backward: [{2 * step.pairs}, {step.tokens}] tokens, "
        f"{step.scored:.0%} scored, vocabulary {step.vocab}, hidden size {step.hidden}"
    )
    table = make_table(console, title, "", "naive", "dpo_kernels", "of the naive", "head GEMMs")
    from_logits, from_hidden = step.naive_from_logits(), step.naive_from_hidden()
    rows = (
        ("from logits", from_logits, step.from_logits(), ""),
        ("from logits, in place", from_logits, step.from_logits(inplace=True), ""),
        *(
            (f"from hidden states, {head} head", from_hidden, step.from_hidden(t), gemms(step, t))
            for head, t in (("frozen", False), ("trainable", True))
        ),
    )
    for name, naive, ours, of_head in rows:
        table.add_row(name, size(naive), size(ours), f"{ours / naive:.1%}", of_head)
    console.print(table)


def print_traffic(console: Console, step: Step) -> None:
    """What a rank sends for a loss."""
    table = make_table(console, "Collectives of a loss", "", "number", "a rank sends")
    rows = {}
    if step.tp > 1:
        rows["vocab_group, from logits"] = step.tp, vocab_group_from_logits(step.rows, step.tp)
        from_hidden = (step.scored_rows, step.hidden, step.tp, step.tiles(True))
        rows["vocab_group, from hidden states"] = step.tp, vocab_group_from_hidden(*from_hidden)
    if step.cp > 1:
        rows["sequence_group"] = step.cp, sequence_group(step.pairs, step.cp)
    for name, (ranks, collectives) in rows.items():
        sent = sum(collective.sent(ranks) for collective in collectives)
        table.add_row(name, str(len(collectives)), size(sent))
    console.print(table)


def gemms(step: Step, trainable: bool) -> str:
    """Those of the policy: a reference from hidden states takes one more."""
    number = step.gemms(trainable, reference=False)
    return f"{number}, {step.gemm_flops(trainable, reference=False) / 1e12:.2f} TFLOP"


def size(count: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
