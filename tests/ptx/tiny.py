"""Tiny PTX programs: one block (or more) of one warp (or more), one input, one output."""

from __future__ import annotations

import numpy as np

from .machine import Machine
from .memory import Region
from .numbers import SIZE, dtype_of
from .parse import parse
from .program import Program

HEADER = ".version 8.7\n.target sm_90\n.address_size 64\n"


def program(body: str, outside: str = "") -> Program:
    """A kernel of two pointers, at %in and %out, with %t the thread's number in the grid."""
    text = f"""{HEADER}{outside}
.visible .entry tiny(.param .u64 p_in, .param .u64 p_out) {{
  .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %d<20>;
  .reg .b64 %in; .reg .b64 %out; .reg .b64 %at; .reg .b32 %t; .reg .b32 %tx; .reg .b32 %bx;
  ld.param.u64 %in, [p_in];
  ld.param.u64 %out, [p_out];
  mov.u32 %tx, %tid.x;
  mov.u32 %bx, %ctaid.x;
  mov.u32 %t, %ntid.x;
  mad.lo.s32 %t, %t, %bx, %tx;
  {body}
}}"""
    module = parse(text)
    return Program(module, "tiny")


def execute(body, given=None, *, out=32, grid=1, block=32, seed=0, outside="", writable=False):
    """(contents of the output, as int32; the machine, with its findings)"""
    given = np.zeros(64, np.int32) if given is None else given
    result = np.full(out, -1, np.int32)
    regions = [
        Region("input", given.ctypes.data, given.nbytes, writable, True, writable),
        Region("output", result.ctypes.data, result.nbytes, True, False, True, output=True),
    ]
    params = [int(x.ctypes.data).to_bytes(8, "little") for x in (given, result)]
    machine = Machine(
        program(body, outside), grid=grid, block=block, params=params, regions=regions, seed=seed
    )
    machine.run()
    return result, machine


def kinds(machine) -> set[str]:
    return {kind for kind, _ in machine.findings}


def evaluate(instruction: str, result_type: str, *operands):
    """What ``instruction %result, %a, %b, %c;`` gives; operands are (type, values).

    An instruction with a {} in it is taken whole, with the operands at %0, %1, ...
    """
    count = len(operands[0][1])
    size = {t: "pred" if t == "pred" else f"b{8 * SIZE[t]}" for t in [result_type, "u32"]}
    lines, memory = [f".reg .{size[result_type]} %res;"], []
    for k, (type_, values) in enumerate(operands):
        bits = 8 * SIZE[type_]
        data = np.zeros(32, np.uint64)
        unsigned = np.array(values, dtype_of(type_)).view(f"u{bits // 8}")
        data[:count] = unsigned
        memory.append(data)
        lines += [
            f".reg .b{bits} %o{k};",
            f"mad.wide.u32 %at, %tx, 8, %in; ld.global.b{bits} %o{k}, [%at+{256 * k}];",
        ]
    names = [f"%o{k}" for k in range(len(operands))]
    if "{}" in instruction:
        lines.append(instruction.format("%res", *names) + ";")
    else:
        lines.append(f"{instruction} %res, {', '.join(names)};")
    if result_type == "pred":
        lines += ["selp.b32 %r1, 1, 0, %res; mov.b64 %d1, {%r1, 0};", ""]
        width = 64
    else:
        width = 8 * SIZE[result_type]
        register = {16: "%h8", 32: "%r8", 64: "%d1"}[width]
        lines.append(f"mov.b{width} {register}, %res;")
    lines.append("mad.wide.u32 %at, %tx, 8, %out;")
    lines.append(f"st.global.b64 [%at], 0; st.global.b{width} [%at], "
                 + {16: "%h8", 32: "%r8", 64: "%d1"}[width] + ";")  # fmt: skip
    given = np.concatenate(memory).view(np.int32)
    result, machine = execute("\n".join(lines), given, out=64)
    assert not machine.findings, machine.findings
    raw = result.view(np.uint64)[:count]
    if result_type == "pred":
        return raw.astype(bool)
    kept = dtype_of(result_type)
    return raw.astype(f"u{np.dtype(kept).itemsize}").view(kept)
