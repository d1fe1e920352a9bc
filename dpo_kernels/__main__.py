"""``python -m dpo_kernels``: the environment, parity, bench, memory and demo."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from .dispatch import BACKENDS

DTYPES = ("float32", "bfloat16", "float16", "float64")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dpo_kernels", description="Without a command: machine, versions, backends."
    )
    commands = parser.add_subparsers(dest="command")

    parity = commands.add_parser("parity", help="check every available backend against float64")
    parity.add_argument("--backend", choices=BACKENDS, help="only this one")

    bench = commands.add_parser("bench", help="speed and peak memory against the reference")
    bench.add_argument(
        "--quick", action="store_true", help="a smaller batch, and no torch.compile(reference)"
    )
    bench.add_argument("--csv", type=Path, metavar="FILE", help="append the rows to a CSV file")
    bench.add_argument(
        "--shape",
        type=_positive,
        nargs=3,
        metavar=("P", "T", "V"),
        help="pairs, tokens, vocabulary: logits are [2P, T, V]",
    )
    bench.add_argument("--dtype", choices=DTYPES, default="float32")
    bench.add_argument("--backend", choices=BACKENDS, help="only this one")
    bench.add_argument("--repetitions", type=_positive)

    memory = commands.add_parser("memory", help="peak memory of a loss and its traffic, modelled")
    for name, default, what in (
        ("pairs", 8, "pairs of a step on a rank"),
        ("tokens", 4096, "tokens of a sequence"),
        ("vocab", 128256, "vocabulary"),
        ("hidden", 4096, "hidden size"),
        ("tp", 1, "ranks that share the vocabulary (vocab_group)"),
        ("cp", 1, "ranks that share a sequence (sequence_group)"),
    ):
        memory.add_argument(
            f"--{name}", type=_positive, default=default, metavar="N", help=f"{what}, {default}"
        )
    memory.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    memory.add_argument("--scored", type=_share, default=1.0, help="share of tokens that score, 1")
    memory.add_argument(
        "--workspace-mb", type=_positive, metavar="MIB", help="as in linear_dpo_loss"
    )

    demo = commands.add_parser(
        "demo", help="environment, parity and bench, then a real training run"
    )
    demo.add_argument(
        "--data", type=Path, metavar="FILE.jsonl", help="pairs in TRL's preference format"
    )
    demo.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR")
    demo.add_argument("--steps", type=_positive, help="DPO steps of each run")
    demo.add_argument("--quick", action="store_true", help="a tiny model, small shapes")
    demo.add_argument("--backend", choices=BACKENDS, help="the one to train with")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share, above 0 and up to 1, got {text}")
    return value


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    needed = ("rich", "matplotlib") if args.command == "demo" else ("rich",)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        command = " ".join(filter(None, ("python -m dpo_kernels", args.command)))
        print(
            f"{command} needs {' and '.join(missing)}: pip install {' '.join(missing)}",
            file=sys.stderr,
        )
        return 2
    # matplotlib and the training code are not needed to print the environment
    if args.command == "parity":
        from .cli import parity as command
    elif args.command == "bench":
        from .cli import bench as command
    elif args.command == "memory":
        from .cli import memory as command
    elif args.command == "demo":
        from .cli import demo as command
    else:
        from .cli import environment as command
    return command.main(args)


if __name__ == "__main__":
    sys.exit(main())
