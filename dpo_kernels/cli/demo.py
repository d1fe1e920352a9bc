"""The main job on real text: environment, parity, speed, and a DPO training run made twice."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from rich.console import Console

from .. import BackendUnavailableError, dpo_loss, reference
from ..demo.corpus import docstring_corpus
from ..demo.data import DataError, PreferencePair, read_preferences
from ..demo.tokenizer import Tokenizer
from ..demo.training import (
    Run,
    Split,
    TrainingOptions,
    encode,
    make_model,
    preferred,
    sequence_logps,
    train,
    warm_up,
)
from ..dispatch import resolve
from .bench import run_bench
from .console import make_console, make_progress, make_table, mebibytes, milliseconds
from .environment import cpu_model, gpu_model, print_environment
from .parity import run_parity
from .problems import Shape
from .rows import OK

FULL = TrainingOptions()
QUICK = replace(
    FULL, vocab_size=2048, seq_len=48, width=64, warmup_steps=50, steps=50, evaluations=2
)
# of the held-out docstring pairs; a file of the user's has no figure that it must reach
REQUIRED_ACCURACY = 0.75
REQUIRED_ACCURACY_QUICK = 0.60
# rounding differs between the two, and training lets it grow
_LARGEST_DIFFERENCE = 0.01
_HELD_OUT_PAIRS = 384
BENCH_SHAPE, BENCH_SHAPE_QUICK = Shape(4, 256, 49152), Shape(2, 64, 8192)


def main(args) -> int:
    console, errors = make_console(), make_console(stderr=True)
    try:
        pairs = read_preferences(args.data) if args.data else None
        if pairs is not None and len(pairs) < 5:
            raise DataError(f"{args.data}: {len(pairs)} pairs are too few to hold some out")
    except DataError as error:
        errors.print(str(error))
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolve(args.backend or "", torch.device(device), torch.float32)
    except BackendUnavailableError as error:
        errors.print(str(error))
        return 2
    options = QUICK if args.quick else FULL
    if args.steps:
        options = replace(options, steps=args.steps)
    started = time.perf_counter()
    _heading(console, "1 of 4: the machine and the backends")
    print_environment(console)
    _heading(console, "2 of 4: parity")
    if not run_parity(console):
        return 1
    _heading(console, "3 of 4: speed and peak memory")
    rows = run_bench(console, BENCH_SHAPE_QUICK if args.quick else BENCH_SHAPE, repetitions=5)
    if not rows or any(row["status"] != OK for row in rows):
        return 1
    _heading(console, "4 of 4: training on real text")
    required = REQUIRED_ACCURACY_QUICK if args.quick else REQUIRED_ACCURACY
    passed = run_training(
        console,
        pairs,
        options,
        device,
        required=None if args.data else required,
        out=args.out,
        backend=args.backend,
    )
    console.print(f"took {time.perf_counter() - started:.0f} s in all")
    return 0 if passed else 1


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(text, style="bold")


def run_training(
    console: Console,
    pairs: list[PreferencePair] | None,
    options: TrainingOptions,
    device: str,
    *,
    required: float | None,
    out: Path,
    backend: str | None,
) -> bool:
    """Trains, prints and draws; whether the curves overlap and the accuracy suffices."""
    train_pairs, held_out_pairs = _split(console, pairs, options)
    texts = (text for pair in train_pairs for text in (pair.prompt, pair.chosen))
    tokenizer = Tokenizer.train(texts, options.vocab_size)
    warm_up_split = encode(train_pairs, tokenizer, options.seq_len, device)
    # reference log-probs are made before training, and only of pairs that it will see
    seen = train_pairs[: options.steps * options.pairs]
    train_split = encode(seen, tokenizer, options.seq_len, device)
    held_out = encode(held_out_pairs[:_HELD_OUT_PAIRS], tokenizer, options.seq_len, device)
    start = make_model(tokenizer, options, device)
    parameters = sum(parameter.numel() for parameter in start.parameters())
    model = (
        f"{parameters / 1e6:.1f} M parameters, byte-pair vocabulary of {tokenizer.vocab_size}, "
        f"logits [{2 * options.pairs}, {options.seq_len}, {tokenizer.vocab_size}]"
    )
    console.print(f"a transformer of {model}, on {device}")
    cut = train_split.cut + held_out.cut
    console.print(
        f"{cut} of {len(train_split) + len(held_out)} pairs are cut to {options.seq_len} tokens: "
        "prompts keep their end, answers their start"
    )

    contenders = {
        "plain PyTorch": reference.dpo_loss,
        "dpo_kernels": partial(dpo_loss, backend=backend),
    }
    runs = []
    with make_progress(console) as progress:

        def bar(name: str, steps: int):
            task = progress.add_task(name, total=steps, note="")
            return lambda note: progress.update(task, advance=1, note=note)

        warm_up(start, warm_up_split, options, bar("language-model warm-up", options.warmup_steps))
        for split in (train_split, held_out):
            split.reference_logps = sequence_logps(start, split)
        for name, loss_function in contenders.items():
            advance = bar(f"DPO with {name}", options.steps)
            runs.append(train(name, loss_function, start, train_split, held_out, options, advance))
    plain, ours = runs
    _print_runs(console, runs, held_out)
    _draw(console, out / "training.png", model, (plain, ours), required, device)
    return _verdict(console, plain, ours, required)


def _split(console: Console, pairs: list[PreferencePair] | None, options: TrainingOptions):
    """(train, held-out) pairs of the file, or of the docstrings."""
    if pairs is None:
        with console.status("reading the docstrings of the standard library"):
            corpus = docstring_corpus(options.seed)
        console.print(
            f"standard library docstrings: {len(corpus.train)} pairs from "
            f"{len(corpus.train_modules)} modules to train on, {len(corpus.held_out)} from "
            f"{len(corpus.held_out_modules)} other modules held out"
        )
        return corpus.train, corpus.held_out
    pairs = list(pairs)
    random.Random(options.seed).shuffle(pairs)
    count = max(1, len(pairs) // 5)
    console.print(f"{len(pairs) - count} pairs to train on, {count} held out")
    return pairs[count:], pairs[:count]


def _print_runs(console: Console, runs: list[Run], held_out: Split) -> None:
    before = preferred(*held_out.reference_logps.chunk(2)).mean()
    kinds = list(runs[0].accuracy_by_kind)
    columns = (
        "accuracy before",
        "after",
        *(f"after, {kind}" for kind in kinds),
        "last losses",
        "the loss, a step",
        "whole step",
        "peak memory of the loss",
    )
    table = make_table(console, f"DPO, {len(held_out)} held-out pairs", "loss from", *columns)
    for run in runs:
        accuracy = list(run.accuracy.values())
        table.add_row(
            run.name,
            f"{accuracy[0]:.1%}",
            f"{accuracy[-1]:.1%}",
            *(f"{run.accuracy_by_kind[kind]:.1%}" for kind in kinds),
            f"{mean(run.losses[-10:]):.4f}",
            _seconds(run.loss_seconds),
            _seconds(run.step_seconds),
            mebibytes(_peak(run)),
        )
    console.print(table)
    console.print(
        "accuracy: pairs whose chosen answer has the higher log pi - log ref, ties count half; "
        f"the reference's own log-probs put {before:.1%} of the chosen answers first"
    )


def _seconds(values: list[float]) -> str:
    return milliseconds(median(values)) if values else "too few steps"


def _peak(run: Run) -> int | None:
    measured = [peak for peak in run.peaks if peak is not None]
    return max(measured) if measured else None


def _draw(console, path: Path, model: str, runs: tuple[Run, Run], required, device: str) -> None:
    from ..demo.plot import draw

    costs = {}
    if all(run.loss_seconds for run in runs):
        times = [1e3 * median(run.loss_seconds) for run in runs]
        costs["Time of the loss, a step"] = (times, "ms")
    peaks = [peak / 2**20 for run in runs if (peak := _peak(run))]
    if len(peaks) == len(runs):
        costs["Peak memory of the loss"] = (peaks, "MiB")
    count = torch.get_num_threads()
    on_cpu = f"{cpu_model()}, {count} thread{'s' * (count > 1)}"
    machine = gpu_model() if device == "cuda" else on_cpu
    draw(path, f"DPO with the same seed and two losses\n{model}\n{machine}", runs, required, costs)
    console.print(f"drawn to {path}")


def _verdict(console: Console, plain: Run, ours: Run, required: float | None) -> bool:
    from ..demo.plot import largest_difference

    difference = largest_difference(plain, ours)
    overlap = difference <= _LARGEST_DIFFERENCE
    console.print(
        f"loss curves: {difference:.1e} apart at most, "
        f"{'which is rounding' if overlap else f'FAILED: {_LARGEST_DIFFERENCE} is allowed'}"
    )
    if required is None:
        return overlap
    accuracy = min(list(run.accuracy.values())[-1] for run in (plain, ours))
    enough = accuracy >= required
    console.print(
        f"held-out accuracy: {accuracy:.1%}, {'' if enough else 'FAILED: '}{required:.0%} required"
    )
    return overlap and enough
