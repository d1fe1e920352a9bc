"""Every barrier, fence and acq_rel of the compiled forward kernels is missed when it is gone."""

from __future__ import annotations

import re

import pytest
import torch

import dpo_kernels
from tests.helpers import make_problem

from .cuda import CudaExecutor
from .memory import Fault
from .program import BARRIER
from .triton import TritonExecutor

_SITE = re.compile(
    r"^[^\n/]*?(?P<what>membar\.gl|fence\.\w+\.gpu|bar\.sync|barrier\.sync|bar\.warp\.sync|acq_rel)"
    r"[^\n;]*;",
    re.M,
)
# what is put in the place of an instruction; "" drops it
WEAKER = {
    "membar.gl": ("", "membar.cta"),
    "bar.sync": ("",),
    "barrier.sync": ("",),
    "bar.warp.sync": ("",),
    "acq_rel": ("relaxed", "acquire", "release"),
}
# rows that several warps and both blocks share; sequences of several chunks; many sequences
CASES = (
    {"vocab": 4099, "length": 4},
    {"vocab": 40, "length": 700, "pairs": 1},
    {"vocab": 40, "length": 2, "pairs": 70},
    # more rows than warps have slots: a warp's scratch is used again
    {"vocab": 1100, "length": 70, "pairs": 1, "scored": 1.0},
    # packed batches have a count of their own
    {"vocab": 40, "length": 70, "pairs": 2, "packed": True},
)
# barriers of Triton's whose absence changes nothing: (what stands before, what stands behind, why)
REDUNDANT = (
    (r"", r"(selp.*)?cp\.async", "the compiler's: nothing has used the shared memory before"),
    (r"", r"shfl\.sync", "the compiler's: the reduction before has a barrier behind its last read"),
    (r"", r".*atom\.global", "the one thread that counts has itself stored what it releases"),
    (
        r".*st\.global|ld\.shared.*setp",
        r"@%p\d+ bra",
        "the flag came through shared memory, with a barrier there",
    ),
    (
        r"",
        r"selp\.b16.*st\.shared",
        "the compiler's: only a second chunk of 1024 tokens has used the shared memory before",
    ),
)


def outcome(executor, backend: str, case: dict):
    """What a call gives: the bits of its results, or what was found."""
    problem = make_problem(**case)
    before = set(executor.findings)
    with executor.active(), torch.no_grad():
        try:
            out = dpo_kernels.dpo_loss(
                problem.logits,
                problem.labels,
                *problem.reference,
                beta=0.1,
                cu_seqlens=problem.cu_seqlens,
                backend=backend,
            )
        except Fault as fault:
            return "fault", str(fault)
    found = set(executor.findings) - before
    if found:
        return "found", sorted(found)[0]
    values = torch.cat([out.chosen_logps, out.rejected_logps, out.losses, out.loss.view(1)])
    return "values", values.tolist()


def mutants(text: str):
    """(name, edited text) of every weakening of every site."""
    for site in _SITE.finditer(text):
        line = text[: site.start()].count("\n")
        weaker = WEAKER.get(site["what"], ("",))
        for instead in weaker:
            what = site["what"]
            new = site[0].replace(what, instead) if instead else ""
            name = f"{what} -> {instead or 'nothing'} at line {line}: {site[0].strip()}"
            yield name, text[: site.start()] + new + text[site.end() :]


def _instructions(text: str) -> list[str]:
    lines = (re.sub(r"//.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith((".loc", "$", "mov."))]


def is_redundant(text: str, line: int) -> bool:
    lines = text.splitlines()
    before, behind = "\n".join(lines[:line]), "\n".join(lines[line + 1 :])
    last, first = " ".join(_instructions(before)[-2:]), " ".join(_instructions(behind)[:2])
    return any(re.match(b, last) and re.match(f, first) for b, f, _ in REDUNDANT)


def never_runs(executor, text: str, line: int) -> bool:
    """Whether the barrier of a line is in a part that the case does not reach."""
    (program,) = executor.programs.values()
    number = len(re.findall(r"\bbar\.sync", "\n".join(text.splitlines()[:line])))
    barriers = [s.instruction for s in program.steps if s.kind == BARRIER]
    return barriers[number].hits == 0


def unnoticed(make, backend: str, text: str) -> list[str]:
    right = [outcome(make(text), backend, case) for case in CASES]
    assert all(kind == "values" for kind, _ in right), right
    missed, count = [], 0
    for name, edited in mutants(text):
        count += 1
        executor = make(edited)
        if all(outcome(executor, backend, c) == w for c, w in zip(CASES, right, strict=True)):
            missed.append(name)
    assert count > 8
    return missed


def test_cuda():
    whole = CudaExecutor(90)
    if reason := whole.unavailable():
        pytest.skip(reason)
    name = next(n for n in whole.module().kernels if "forward_kernelINS0_7Float32ELb0ELb0E" in n)
    from . import cuda_build

    text = cuda_build.ptx(90)
    start = text.index(f".visible .entry {name}")
    kernel = text[: text.index(".visible .entry")] + text[start : text.index("\n}\n", start) + 3]
    made = unnoticed(lambda edited: CudaExecutor(90, edit=lambda _: edited), "cuda", kernel)
    assert not made, "\n".join(made)


def test_triton(monkeypatch):
    if reason := TritonExecutor(90).unavailable():
        pytest.skip(reason)
    missed = []
    for case in ({"vocab": 1004, "length": 3}, {"vocab": 40, "length": 40, "pairs": 2}):
        monkeypatch.setattr("tests.ptx.test_mutations.CASES", (case,))
        seen = {}
        whole = TritonExecutor(90, edit=lambda text, seen=seen: seen.setdefault("ptx", text))
        outcome(whole, "triton", case)
        text = seen["ptx"]
        for name in unnoticed(
            lambda edited: TritonExecutor(90, edit=lambda _: edited), "triton", text
        ):
            line = int(re.search(r"at line (\d+)", name)[1])
            barrier = name.startswith("bar.sync")
            if not barrier or not (is_redundant(text, line) or never_runs(whole, text, line)):
                missed.append(name)
    assert not missed, "\n".join(missed)
