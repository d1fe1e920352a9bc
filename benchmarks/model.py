"""``python -m benchmarks.model``: the time that memory and the pipes of a GPU allow at least.

    t = sum over passes of max(bytes / bandwidth, elements * max over pipes of n_p * 32 / r_p / f)

with n_p instructions of a warp for an element of a lane, from the SASS of the inner loop, r_p
results a clock and multiprocessor, and f multiprocessors times the clock. It is an upper bound on
speed: full clock, full bandwidth, nothing but the inner loop, every pipe perfectly filled.

Published figures only. Results a clock: CUDA C++ Best Practices Guide 13, section 12.1.1,
"Throughput of Native Arithmetic Instructions". Four warp schedulers a multiprocessor: CUDA
Programming Guide, "Compute Capabilities". Bandwidth and float32 peak: NVIDIA's data sheets of the
A100 80GB SXM, H100 SXM, H200 SXM and HGX B200 (an eighth of the board). Multiprocessors: the A100
and H100 architecture white papers; 148 for B200. The clock follows from the float32 peak,
2 * lanes * multiprocessors * f.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dpo_kernels.backends import native

from . import sass

ROOT = Path(__file__).parents[1]
MEASURED = {
    chip: ROOT / "benchmarks" / "results" / "gpu" / f"{name}.csv"
    for chip, name in (("H100", "nvidia_h100_80gb_hbm3"), ("H200", "nvidia_h200"))
}
NOTE = "modelled upper bound, not measured"
# vectors of 16 bytes of bfloat16: a lane's share of a segment
ELEMENTS = 32
LOADS = (r"LDG\.E\.(EF\.)?128", 4)
# warp schedulers: an instruction of a warp each a clock
ISSUE = 4 * 32


@dataclass(frozen=True)
class Chip:
    name: str
    arch: int
    multiprocessors: int
    # terabytes a second, and float32 operations a second / 10^12
    bandwidth: float
    float32_peak: float
    # results a clock and multiprocessor of float32 multiply-adds
    float32_lanes: int

    @property
    def clock(self) -> float:
        return self.float32_peak * 1e12 / (2 * self.float32_lanes * self.multiprocessors)

    @property
    def rates(self) -> dict[str, int]:
        """Results a clock and multiprocessor by pipe; one multiply-add pipe serves FMA and IMAD."""
        return {"issue": ISSUE, "MUFU": 16, "ALU": 64, "SHFL": 32, "FMA": self.float32_lanes}


CHIPS = (
    Chip("A100", 80, 108, 2.039, 19.5, 64),
    Chip("H100", 90, 132, 3.35, 67.0, 128),
    Chip("H200", 90, 132, 4.8, 67.0, 128),
    Chip("B200", 100, 148, 8.0, 75.0, 128),
)


def clocks(chip: Chip, pipes: dict[str, float]) -> dict[str, float]:
    """Clocks of a multiprocessor for an element of one lane's, by what takes them."""
    taken = {pipe: pipes[pipe] / rate for pipe, rate in chip.rates.items()}
    taken["FMA"] += pipes["IMAD"] / 64
    return taken


def pipe_seconds(chip: Chip, pipes: dict[str, float]) -> tuple[float, str]:
    """Of an element, and the pipe."""
    taken = clocks(chip, pipes)
    slowest = max(taken, key=taken.__getitem__)
    return taken[slowest] / (chip.multiprocessors * chip.clock), slowest


def seconds(chip: Chip, pipes: dict[str, float], bytes_: float) -> tuple[float, str]:
    """Of an element for which ``bytes_`` move, and what it waits for: "memory" or a pipe."""
    return max((bytes_ / (chip.bandwidth * 1e12), "memory"), pipe_seconds(chip, pipes))


@dataclass(frozen=True)
class Call:
    """bfloat16 logits of ``tokens`` rows, ``scored`` of which score a token."""

    tokens: int
    scored: int
    vocab: int
    backward: bool

    @property
    def is_odd(self) -> bool:
        """Whether rows begin between two vectors of 16 bytes."""
        return self.vocab % 8 != 0

    @property
    def floor_bytes(self) -> int:
        """One read of the scored rows, and in the backward a second, and one write of all."""
        read = 2 * self.scored * self.vocab
        return read + (read + 2 * self.tokens * self.vocab if self.backward else 0)


def modelled(chip: Chip, call: Call, forward: dict, backward: dict) -> tuple[float, str]:
    """Seconds at least, and what the scored rows wait for."""
    elements = call.scored * call.vocab
    taken, waits = seconds(chip, forward, 2)
    total = taken * elements
    if call.backward:
        turned, then = seconds(chip, backward, 4)
        cleared = 2 * (call.tokens - call.scored) * call.vocab / (chip.bandwidth * 1e12)
        total += turned * elements + cleared
        waits = waits if waits == then else f"{waits}, {then}"
    return total, waits


def extension() -> Path:
    return Path(native.MODULE.__file__)


def plain_kernel(names, which: int) -> str:
    """forward (0) or backward (1) of bfloat16 without a softcap or statistics."""
    part = ("14forward_kernelINS0_8BFloat16ELb0ELb0E", "15backward_kernelINS0_8BFloat16ES2_Lb0E")
    (name,) = (name for name in names if part[which] in name)
    return name


def threads_in_flight(registers: int, which: int) -> int:
    """Of a multiprocessor with 65536 registers, given out to whole warps by eights."""
    block_warps = (28, 4)[which]
    warps = 65536 // (32 * -(-registers // 8) * 8)
    return 32 * (min(warps, 64) // block_warps * block_warps)


@functools.cache
def cuda_pipes(arch: int, is_odd: bool) -> list[dict[str, float]]:
    """Of forward and backward, from the code in the extension."""
    functions = sass.functions(extension(), arch)
    needs = (LOADS, ("SHFL", 4)) if is_odd else (LOADS,)
    names = [plain_kernel(functions, which) for which in (0, 1)]
    return [sass.inner_loop(functions[n], ELEMENTS, *needs).pipes for n in names]


@functools.cache
def _triton_kernels(arch: int) -> dict[str, dict]:
    """By name; compiled in a process of its own, which has no interpreter switched on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = ROOT / "tests" / "test_triton_compile.py"
    command = [sys.executable, str(script), f"sm_{arch}"]
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return {kernel["name"]: kernel for kernel in json.loads(done.stdout)}


@functools.cache
def triton_pipes(arch: int, is_odd: bool) -> list[dict[str, float]]:
    shape = f"bf16 V={50257 if is_odd else 151936} pairs"
    kernels = _triton_kernels(arch)
    return [kernels[f"{which}_kernel {shape}"]["pipes"] for which in ("forward", "backward")]


def measured_calls(chip: str, backend: str) -> dict[tuple[str, Call], float]:
    """{(model, call): seconds} of a backend, bfloat16; the least where a call repeats."""
    found: dict[tuple[str, Call], float] = {}
    with MEASURED[chip].open(newline="") as file:
        for row in csv.DictReader(file):
            wanted = (row["benchmark"], row["contender"], row["dtype"], row["status"])
            backward = {"forward": False, "forward + backward": True}.get(row["mode"])
            ours = ("logits", f"dpo_kernels, {backend}", "bfloat16", "ok")
            if wanted != ours or backward is None:
                continue
            sequences, tokens, vocab = map(int, row["shape"].split("x"))
            call = Call(sequences * tokens, int(row["scored_tokens"]), vocab, backward)
            # a packed batch has no padding: its floor says how many rows there are
            if call.floor_bytes != int(row["floor"]):
                continue
            key = (row["model"] or f"V={vocab}", call)
            found[key] = min(found.get(key, float("inf")), float(row["median_ms"]) / 1e3)
    return found


def table(backend: str, pipes_of) -> list[str]:
    """Milliseconds at least on each chip, the share of the byte floor and what is waited for."""
    head = ["model", "call", "scored", *(c.name for c in CHIPS)]
    lines = [f"{backend}: {NOTE}; ms at least (share of the byte floor, what is waited for)"]
    measured = {chip: measured_calls(chip, backend) for chip in MEASURED}
    measured = {chip: calls for chip, calls in measured.items() if calls}
    head += [f"measured on {chip}: ms (share of the byte floor)" for chip in measured]
    bandwidth = {chip.name: chip.bandwidth * 1e12 for chip in CHIPS}
    rows = [head]
    for name, call in dict.fromkeys(key for calls in measured.values() for key in calls):
        row = [name, "forward + backward" if call.backward else "forward", str(call.scored)]
        for chip in CHIPS:
            time, waits = modelled(chip, call, *pipes_of(chip.arch, call.is_odd))
            share = call.floor_bytes / (chip.bandwidth * 1e12) / time
            row.append(f"{1e3 * time:.3f} ({share:.0%}, {waits})")
        for chip, calls in measured.items():
            took = calls.get((name, call))
            share = f" ({call.floor_bytes / bandwidth[chip] / took:.0%})" if took else ""
            row.append(f"{1e3 * took:.3f}{share}" if took else "")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return lines


def main() -> int:
    if reason := sass.unavailable():
        print(f"no model: {reason}")
        return 1
    if native.MODULE is not None and hasattr(native.MODULE, "cuda_forward"):
        print("\n".join(table("cuda", cuda_pipes)), end="\n\n")
    else:
        print("cuda: the extension is not built with the CUDA kernels", end="\n\n")
    print("\n".join(table("triton", triton_pipes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
