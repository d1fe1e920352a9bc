"""Every Triton kernel compiles for every GPU it is meant for, without one, and without spills.

The launches are the backend's own on CPU tensors, with a stand-in for the driver, so that what is
compiled is what runs. That happens in a process of its own, because this one may have Triton's
interpreter switched on, under which a kernel cannot be compiled. ``make test-triton`` runs this
under every version of Triton that the backend serves.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks import sass
from dpo_kernels.compat import triton_unsuitable, triton_version

if triton_unsuitable() is not None:
    pytest.skip(triton_unsuitable(), allow_module_level=True)

ROOT = Path(__file__).parent.parent
# Ampere, Hopper, both Blackwells, and AMD's CDNA3
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# what the static costs were counted with; another version schedules, and spends, otherwise
BUDGETS_HOLD_FOR = (3, 7)
# issue slots of the inner loop for an element, in the code of sm_90 for bf16
BUDGETS = {
    "forward_kernel bf16 V=151936 pairs": 8.3,
    "forward_kernel bf16 V=151936 stats": 15.2,
    "forward_kernel bf16 V=151936 softcap": 27.5,
    "backward_kernel bf16 V=151936 pairs": 8.6,
    "backward_kernel bf16 V=151936 softcap": 25.7,
}


def skip_if_untargeted(target_name: str) -> None:
    if target_name.startswith("gfx") and triton_version() < (3, 5):
        pytest.skip("Triton before 3.5 takes the linker of an installed ROCm")


@functools.cache
def in_fresh_process(*arguments: str):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("target_name", TARGETS)
def test_compiles_without_spills(target_name):
    skip_if_untargeted(target_name)
    results = in_fresh_process(target_name)
    assert {r["kernel"] for r in results} == {"forward_kernel", "backward_kernel"}
    # two 64-bit numbers may wait in memory while a row is read, not more, and none within its loop
    spilled = {r["name"]: r["spilled"] for r in results if r["spilled"] > 16 or r["loop_spills"]}
    assert not spilled, f"bytes or registers spilled: {spilled}"
    # two programs must fit a multiprocessor: of 256 threads 65536 registers, of 4 waves 512 a lane
    limit = 128 if target_name.startswith("sm_") else 256
    greedy = {r["name"]: r["registers"] for r in results if r["registers"] > limit}
    assert not greedy, f"registers: {greedy}"


@pytest.mark.parametrize("target_name", TARGETS)
def test_aligned_rows_are_read_16_bytes_at_a_time(target_name):
    skip_if_untargeted(target_name)
    aligned = [r for r in in_fresh_process(target_name) if r["vector_bytes"] == 16]
    assert aligned
    assert not [r["name"] for r in aligned if not r["wide_loads"]]


def test_the_inner_loops_cost_no_more_than_this():
    """Bandwidth bounds a plain row on today's GPUs only while its arithmetic hides behind it."""
    if triton_version()[:2] != BUDGETS_HOLD_FOR:
        pytest.skip(f"counted with Triton {BUDGETS_HOLD_FOR[0]}.{BUDGETS_HOLD_FOR[1]}")
    slots = {r["name"]: r["slots"] for r in in_fresh_process("sm_90")}
    assert {n: slots[n] for n, most in BUDGETS.items() if not 0 < slots[n] <= most} == {}


def test_no_compilation_per_shape():
    """Batch, length, strides, counts, options with a value: none of them selects a compilation."""
    assert in_fresh_process("keys") == []


def record_launches(shape, dtype, *, kind, packed=False, padding=0, index="pair", **options):
    """{kernel: (arguments, options)} of a forward and its backward."""
    import torch

    from dpo_kernels.backends.batch import ForwardOutputs, GradOutput, PairLoss, TokenBatch
    from dpo_kernels.backends.triton import launch

    recorded = {}

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: recorded.update({self.kernel: (args, options)})

    num_seqs, seq_len, vocab = shape
    logits = torch.empty(num_seqs, seq_len, vocab + padding, dtype=dtype)[..., :vocab]
    labels = torch.zeros(num_seqs, seq_len, dtype=torch.int64)
    cu_seqlens = None
    if packed:
        cu_seqlens = torch.arange(num_seqs + 1) * seq_len
        logits, labels = logits.flatten(0, 1), labels.flatten()
    options = {"ignore_index": -100, "shift": True, **options}
    batch = TokenBatch(logits, labels, cu_seqlens, **options)
    stats, pairs = kind == "stats", kind == "pairs"
    seqs = pairs or kind == "sequences"
    out = ForwardOutputs(
        tokens=torch.empty(3, batch.num_tokens),
        stats=torch.empty(3, batch.num_tokens) if stats else None,
        is_top1=torch.empty(batch.num_tokens, dtype=torch.bool) if stats else None,
        seqs=torch.empty(3, num_seqs) if seqs else None,
        counts=torch.empty(num_seqs, dtype=torch.int64) if seqs else None,
        losses=torch.empty(num_seqs // 2) if pairs else None,
        loss=torch.empty(()) if pairs else None,
        average=False,
    )
    pair = PairLoss(torch.empty(num_seqs), 0.1, 0.0, 1.0) if pairs else None
    grad_output = GradOutput(torch.empty(1), 0, index, torch.empty(num_seqs) if seqs else None)
    kernels = launch.forward_kernel, launch.backward_kernel
    launch.forward_kernel, launch.backward_kernel = map(Recorder, kernels)
    try:
        launch.launch_forward(batch, pair, out)
        launch.launch_backward(batch, out.tokens, grad_output, torch.empty_like(logits), True)
    finally:
        launch.forward_kernel, launch.backward_kernel = kernels
    return recorded


def compilation_key(kernel, arguments, options):
    """What selects a compilation: ({parameter: type}, {parameter: constant}, compiler options)."""
    import torch
    from triton.runtime.jit import type_canonicalisation_dict

    signature, constants = {}, {}
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, arguments, strict=False)) | options
    for parameter in kernel.params:
        name, value = parameter.name, given.pop(parameter.name)
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            element = type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
            signature[name] = f"*{element}"
        else:
            # Triton 3.3 knows only integers by their annotation
            floating = "fp32" if "float32" in parameter.annotation else None
            signature[name] = parameter.annotation_type or floating
            assert signature[name], f"the type of {name} depends on its value"
        # else Triton tells 1 and multiples of 16 apart, and pointers by their alignment
        assert parameter.do_not_specialize or signature[name] == "fp32", name
    return signature, constants, given


def configurations(every: bool):
    """(name, arguments of record_launches): every flag and every way to load a row, or the main."""
    import torch

    # many segments and 16-byte loads; an odd vocabulary; a short row and 8-byte loads
    large, odd, small = 151936, 50257, 1004
    few, many = 2, 8
    main = {
        "pairs": {"kind": "pairs"},
        "stats": {"kind": "stats", "index": "token"},
        "packed pairs": {"kind": "pairs", "packed": True},
    }
    for name, kind in main.items():
        yield f"bf16 V={large} {name}", ((4, many, large), torch.bfloat16), kind
    yield f"bf16 V={large} split pairs", ((4, few, large), torch.bfloat16), main["pairs"]
    yield f"bf16 V={odd} pairs", ((4, many, odd), torch.bfloat16), main["pairs"]
    yield f"fp32 V={large} pairs", ((4, many, large), torch.float32), main["pairs"]
    if not every:
        return
    for name, kind in main.items():
        yield f"bf16 V={large} split {name}", ((4, few, large), torch.bfloat16), kind
        for vocab in (odd, small):
            yield f"bf16 V={vocab} {name}", ((4, many, vocab), torch.bfloat16), kind
        for vocab in (large, odd):
            yield f"fp32 V={vocab} {name}", ((4, many, vocab), torch.float32), kind
    for name, kind in (
        ("sequences", {"kind": "sequences", "index": "sequence"}),
        ("tokens", {"kind": "tokens", "index": "token"}),
        ("negative scale", {"kind": "pairs", "scale": -1.0}),
        ("shard", {"kind": "stats", "index": "token", "vocab_total": 2 * large}),
    ):
        yield f"bf16 V={large} {name}", ((4, many, large), torch.bfloat16), kind
    yield f"fp16 V={large} pairs", ((4, many, large), torch.float16), main["pairs"]
    capped = {"kind": "stats", "index": "token", "softcap": 30.0}
    yield f"bf16 V={large} softcap", ((4, many, large), torch.bfloat16), capped
    yield f"fp32 V={large} softcap", ((4, many, large), torch.float32), capped


def compile_all(target_name: str) -> list[dict]:
    import torch

    from tests.triton_stand_in import stand_in_for

    nvidia = target_name.startswith("sm_")
    if not nvidia:
        # what launch.py and the kernels ask, when they are imported
        torch.version.hip = "6.4"
    stand_in_for(target_name)
    results = {}
    for name, arguments, options in configurations(every=target_name == "sm_90"):
        for kernel, (args, flags) in record_launches(*arguments, **options).items():
            binary = kernel[(1,)](*args, **flags)
            if binary.hash in results:
                continue
            usage = nvidia_usage(binary, flags["ELEMENTS"]) if nvidia else amd_usage(binary)
            results[binary.hash] = {
                "kernel": kernel.__name__,
                "name": f"{kernel.__name__} {name}",
                "vector_bytes": flags["VECTOR"] * args[0].element_size(),
                **usage,
            }
    return list(results.values())


def nvidia_usage(binary, elements: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        arch = int(binary.metadata.target.arch)
        (code,) = sass.functions(cubin, arch).values()
        (usage,) = sass.registers(cubin, arch).values()
    # where loads are pipelined, only the loops that are
    pipelined = any(i.opcode.startswith("LDGSTS") for i in code)
    # None where a row is too short for a loop
    loop = sass.inner_loop(code, elements, ("LDGSTS" if pipelined else r"LDG\.", 1))
    return {
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "wide_loads": len(re.findall(r"cp\.async\.cg.* 0x10|ld\.global.*\.v4", binary.asm["ptx"])),
        "slots": loop.slots if loop else 0.0,
        "loop_spills": loop.spills if loop else 0,
        "pipes": loop.pipes if loop else {},
        "load_widths": loop.load_widths if loop else {},
    }


def amd_usage(binary) -> dict:
    text = binary.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count: +(\d+)", text)[1]),
        # scalar registers spill into lanes of vector registers, not to memory
        "spilled": int(re.search(r"\.vgpr_spill_count: +(\d+)", text)[1])
        + int(re.search(r"\.private_segment_fixed_size: +(\d+)", text)[1]),
        "loop_spills": 0,
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
    }


def changed_keys() -> list[str]:
    """What selected another compilation of a kernel although it must not, or did not and must."""
    import torch

    def keys(num_seqs=4, seq_len=8, vocab=32000, **options):
        launches = record_launches(
            (num_seqs, seq_len, vocab), torch.bfloat16, **{"kind": "pairs", **options}
        )
        return {k.__name__: compilation_key(k, *launch) for k, launch in launches.items()}

    same = [
        # 1, multiples of 16 and odd numbers are what Triton tells apart by default
        *({"num_seqs": s, "seq_len": t} for s, t in ((2, 1), (2, 16), (16, 16), (6, 7), (2, 999))),
        *({"ignore_index": i} for i in (0, 1, 16, -(2**40))),
        *({"temperature": 2}, {"scale": 3}, {"shift": False}, {"padding": 64}),
        # of the vocabulary only the width of a load, the tile and the number of segments matter
        *({"vocab": 31744}, {"vocab": 5000}),
    ]
    different = [{"vocab": 32001}, {"vocab": 500}, {"vocab": 100000}, {"padding": 1}]
    changed = []
    for packed in (False, True):
        base = keys(packed=packed)
        changed += [f"{o} differs" for o in same if keys(packed=packed, **o) != base]
        changed += [f"{o} is the same" for o in different if keys(packed=packed, **o) == base]
    shards = [{"kind": "tokens", "vocab_start": s, "vocab_total": 64000 + s} for s in (0, 16, 777)]
    if any(keys(**shard) != keys(**shards[0]) for shard in shards):
        changed.append("a shard at another place differs")
    return changed


if __name__ == "__main__":
    print(json.dumps(changed_keys() if sys.argv[1] == "keys" else compile_all(sys.argv[1])))
