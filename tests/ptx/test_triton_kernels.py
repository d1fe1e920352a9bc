"""Triton's kernels as a GPU would be given them: every flag that selects a compilation is met.

A specialisation is what the flags, the dtype and the width of a load make of a kernel; the calls of
one differ in what selects none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch

from . import targets
from .calls import Call, check, problem
from .triton import TritonExecutor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Share of the instructions of each specialisation that run here at least once; counted 93 to 99%.
# What is left are branches around what has to be done, 64-bit divisions, which numbers of tokens
# below 2^32 never need, and what a thread does for its second and further labels or columns, where
# a sequence or a rest is short.
LEAST_COVERAGE = 0.9


@dataclass
class Specialisation:
    dtype: torch.dtype
    # of one alignment and number of tiles each
    vocabs: tuple[int, ...]
    stats: bool = False
    index: str = "pair"
    average: bool = False
    referenced: bool = True
    shape: tuple[int, int] = (4, 5)
    # where the sequences of a packed batch begin
    starts: tuple[int, ...] = ()
    grad_dtype: torch.dtype | None = None
    softcap: float = 0.0
    options: dict = field(default_factory=dict)
    backward: bool = True

    def calls(self) -> Iterator[Call]:
        """Full tiles and a rest, or no rest; rows whose sums are made anew; a label of no class."""
        for vocab in self.vocabs:
            yield self.call(vocab)
        extreme = self.call(self.vocabs[0])
        batch = extreme.batch
        rows, labels = batch.logits.flatten(0, -2), batch.labels.view(-1)
        scored = labels >= 0
        labels[scored] = 1
        if self.index != "pair" and not self.stats:
            # NaN for this token, and for its sequence
            labels[scored.nonzero()[-1]] = batch.labels_below
        if self.softcap:
            # one column at the cap, and others far from it
            rows[:, 1], rows[:, 2] = -1.0, 40.0
            batch = replace(batch, temperature=1e-10)
        else:
            # exponents far beyond what a float32 resolves to 1, and logits that are -inf
            rows[::2] = rows[::2].abs() * (torch.finfo(self.dtype).max / 64)
            rows[1::2, ::3] = -torch.inf
            batch = replace(batch, temperature=2.0**-20 if self.dtype == F16 else 1.0)
        yield replace(extreme, batch=batch, zero_unscored=False)

    def call(self, vocab: int) -> Call:
        batch = problem(
            self.dtype,
            vocab,
            self.softcap,
            shape=self.shape,
            packed=self.starts,
            **self.options,
        )
        shared = {"average": self.average, "referenced": self.referenced}
        return Call(batch, self.index, backward=self.backward, **shared)


STARTS = (0, 3, 9, 14, 20)
SPECIALISATIONS = {
    "bfloat16": Specialisation(BF16, (9000, 4096)),
    "odd float16, means": Specialisation(F16, (9001, 4097), index="sequence", average=True),
    "float32 with statistics": Specialisation(F32, (4500, 2048), stats=True, referenced=False),
    "a shard": Specialisation(
        F32, (4502,), stats=True, index="token", options={"vocab_start": 1, "vocab_total": 5000}
    ),
    "packed, softcap and statistics": Specialisation(
        BF16, (4104, 8192), stats=True, average=True, starts=STARTS, softcap=4.0
    ),
    "a gradient of another dtype": Specialisation(F32, (4500,), grad_dtype=BF16, softcap=4.0),
    "negated, two elements a load": Specialisation(
        F16, (5002,), index="sequence", starts=STARTS, options={"scale": -1.0}
    ),
    "tokens of a short row": Specialisation(BF16, (7, 256), index="token", starts=STARTS),
    "a program for each segment": Specialisation(
        BF16, (33000,), stats=True, shape=(2, 4), options={"scale": -0.5}
    ),
    # no fewer tokens, or each segment has its program
    "two segments of one program": Specialisation(
        BF16, (32776,), shape=(2, 8), starts=(0, 9, 16), backward=False
    ),
}


@pytest.fixture(scope="module")
def executor():
    """That of the session, without what other tests ran."""
    made = targets.executor("triton")
    programs, made.programs = made.programs, {}
    yield made
    made.programs = {**programs, **made.programs}


@pytest.mark.parametrize("name", SPECIALISATIONS)
def test_triton_kernel(executor: TritonExecutor, name: str):
    one = SPECIALISATIONS[name]
    before = set(executor.programs)
    for call in one.calls():
        check("triton", call, one.stats, one.grad_dtype or one.dtype)
    new = [executor.programs[key] for key in executor.programs.keys() - before]
    assert new, "another case has the same flags"
    for program in new:
        code = program.kernel.code
        share = sum(i.hits > 0 for i in code) / len(code)
        assert share >= LEAST_COVERAGE, f"{program.kernel.name}: {share:.0%}"
