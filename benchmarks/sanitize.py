"""A small run of every CUDA kernel: `compute-sanitizer python -m benchmarks.sanitize`.

Shapes are chosen for the edges: odd vocabularies (unaligned tails), one row split over blocks,
masked rows, packed and padded, in place. Exits non-zero when a value is wrong.
"""

from __future__ import annotations

import sys

import torch

import dpo_kernels
from dpo_kernels import reference

from .problems import LogitsShape, make_logits_problem

SHAPES = (
    # an aligned vocabulary, an odd one, one of a single element
    LogitsShape(2, 5, 4096),
    LogitsShape(1, 4, 50257, dtype=torch.float16),
    LogitsShape(3, 3, 1, dtype=torch.float32),
    # few rows and a large vocabulary: a row over several blocks
    LogitsShape(1, 2, 128256, masked=0.0),
    LogitsShape(2, 7, 1001, packed=True, dtype=torch.float32),
)


def main(backend: str = "cuda") -> int:
    device = torch.device("cuda")
    for shape in SHAPES:
        for inplace in (False, True):
            problem = make_logits_problem(shape, device)
            options = {"cu_seqlens": problem.cu_seqlens}
            truth_logits = problem.logits.detach().double().requires_grad_()
            truth = reference.dpo_loss(truth_logits, problem.labels, *problem.reference, **options)
            truth.loss.backward()
            loss = dpo_kernels.dpo_loss(
                problem.logits,
                problem.labels,
                *problem.reference,
                inplace_backward=inplace,
                backend=backend,
                **options,
            ).loss
            (gradient,) = torch.autograd.grad(loss, problem.logits)
            torch.testing.assert_close(loss.double(), truth.loss, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(gradient.double(), truth_logits.grad, rtol=2e-2, atol=2e-3)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
