"""Operands of instructions as functions of a wave, made once a kernel (PTX ISA, chapter 6).

A reader gives an array with one element a thread, or a scalar. A writer stores for the threads of
``act``, None meaning all of them.
"""

from __future__ import annotations

import re

import numpy as np

from .numbers import SIGNED, SIZE, UNSIGNED, dtype_of
from .parse import Unsupported

_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%(laneid|warpid|lanemask_(lt|le|eq|ge|gt)|clock64|clock|"
    r"globaltimer)"
)


def wide(w, x):
    """``x`` with one element a thread, contiguous."""
    x = np.asarray(x)
    return x if x.shape == (w.n,) else np.full(w.n, x)


def immediate(text: str, type_: str):
    if text[:2] in ("0f", "0F"):
        return np.uint32(int(text[2:], 16)).view(np.float32)
    if text[:2] in ("0d", "0D"):
        return np.uint64(int(text[2:], 16)).view(np.float64)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        value = int(text.rstrip("U"), 0)
        if type_ == "pred":
            return np.bool_(value)
        size = SIZE[type_]
        return UNSIGNED[size](value & ((1 << 8 * size) - 1)).view(dtype_of(type_))
    if text in ("true", "false"):
        return np.bool_(text == "true")
    raise Unsupported(f"operand {text}")


def reader(text: str, type_: str, program):
    if text.startswith("!"):
        inner = reader(text[1:], type_, program)
        return lambda w: ~inner(w)
    dtype = np.dtype(dtype_of(type_))
    width = program.kernel.registers.get(text)
    if width == "pred":
        return lambda w: w.registers[text]
    if width is not None:
        if width == dtype.itemsize:
            return lambda w: w.registers[text].view(dtype)
        if width > dtype.itemsize:
            narrow = UNSIGNED[dtype.itemsize]
            return lambda w: w.registers[text].astype(narrow).view(dtype)
        held = (SIGNED if type_[0] == "s" else UNSIGNED)[width]
        return lambda w: w.registers[text].view(held).astype(dtype)
    if text.startswith("%"):
        if not _SPECIAL.fullmatch(text):
            raise Unsupported(f"register {text}")
        return lambda w: np.asarray(w.special(text)).astype(dtype)
    name, _, offset = text.partition("+")
    if name in program.symbols:
        offset = int(offset or "0", 0)
        return lambda w: dtype.type(w.symbol(name) + offset)
    value = immediate(text, type_)
    if value.dtype.itemsize != dtype.itemsize:
        raise Unsupported(f"{text} as {type_}")
    # a float given as an operand of untyped bits is those bits
    value = value.view(dtype)
    return lambda w: value


def writer(text: str, program):
    if text == "_":
        return lambda w, act, value: None
    width = program.kernel.registers.get(text)
    if width is None:
        raise Unsupported(f"result {text}")
    if width == "pred":

        def store(w, act, value):  # fmt: skip
            np.copyto(w.registers[text], value, where=True if act is None else act)

        return store
    unsigned, signed = UNSIGNED.get(width), SIGNED.get(width)

    def store(w, act, value):
        value = np.asarray(value)
        dtype = value.dtype
        if dtype.itemsize == width and dtype.kind != "b":
            value = value.view(unsigned)
        elif dtype.kind == "i":
            # a narrower result is extended by its sign
            value = value.astype(signed).view(unsigned)
        elif dtype.kind in "ub":
            value = value.astype(unsigned)
        else:
            value = value.view(UNSIGNED[dtype.itemsize]).astype(unsigned)
        np.copyto(w.registers[text], value, where=True if act is None else act)

    return store


def vector(text: str) -> list[str]:
    """The registers of {a, b}, or of a single operand."""
    if not text.startswith("{"):
        return [text]
    return [part.strip() for part in text[1:-1].split(",")]


def address(text: str, program):
    """Addresses as the instruction gives them: int64, one a thread or a scalar."""
    inside = text.strip()[1:-1].strip()
    m = re.fullmatch(r"([^\s+-]+)\s*(?:([+-])\s*(-?\w+))?", inside)
    if m is None:
        raise Unsupported(f"address {text}")
    offset = int(m[3] or "0", 0) * (-1 if m[2] == "-" else 1)
    base = m[1]
    if base in program.symbols:
        return lambda w: np.int64(w.symbol(base) + offset)
    get = reader(base, "u32" if program.kernel.registers.get(base) == 4 else "u64", program)
    offset = np.int64(offset)
    return lambda w: np.asarray(get(w)).astype(np.int64) + offset


def space_of(op: list[str]) -> str:
    for part in op:
        space = part.split("::")[0]
        if space in ("global", "shared", "param", "local", "const"):
            return space
    return "generic"
