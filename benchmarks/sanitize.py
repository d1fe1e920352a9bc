"""A small run of a backend's kernels: `compute-sanitizer python -m benchmarks.sanitize cuda`.

Shapes are chosen for the edges: odd vocabularies (unaligned tails), one row split over blocks,
masked rows, packed and padded, in place. Exits 1 when a value is wrong. With --smoke only the
first few, which takes seconds.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from dpo_kernels.cli.contenders import Contender, ours
from dpo_kernels.cli.gate import EXACT, Gate
from dpo_kernels.cli.problems import Shape, make_problem
from dpo_kernels.cli.rows import OK
from dpo_kernels.cli.runner import admit

SHAPES = (
    # an aligned vocabulary, an odd one
    Shape(2, 5, 4096, dtype=torch.bfloat16),
    Shape(2, 7, 1001, packed=True),
    # from hidden states, several tiles of a trainable head
    Shape(2, 9, 1003, hidden=64, dtype=torch.bfloat16),
    # rows that start at an odd byte, one of a single element
    Shape(1, 4, 50257, dtype=torch.float16),
    Shape(3, 3, 1),
    # few rows and a large vocabulary: a row over several blocks
    Shape(1, 2, 128256, scored=1.0, dtype=torch.bfloat16),
)
SMOKE = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("backend", nargs="?", default="cuda")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device("cpu" if options.backend == "cpu" else "cuda")
    red = 0
    # a few rows a tile
    os.environ["DPO_KERNELS_WORKSPACE_MB"] = "0.1"
    for shape in SHAPES[: SMOKE if options.smoke else None]:
        problem = make_problem(shape, device)
        gate = Gate(problem)
        for inplace in (False, True) if shape.hidden is None else (False,):
            make = ours(options.backend, inplace=inplace)
            status, _, parity = admit(
                Contender(options.backend, make, EXACT, inplace), problem, gate
            )
            print(f"{options.backend}, {shape.label()}{', in place' * inplace}: {status} {parity}")
            red += status != OK
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
