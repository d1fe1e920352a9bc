"""The head's GEMMs, all of them: logits, hidden gradient and weight gradient of one tile of rows.

The vendor libraries do the work. What is decided here is the precision they work in and, on a CPU,
which of torch's two libraries is called and how much of the weight at a time.

On a GPU a product of half precision is summed and kept in float32 by torch.mm(out_dtype=) where
torch and the device have it. Elsewhere (torch 2.6 and 2.7, bfloat16 before Ampere) the operands are
cast to float32, a chunk of the vocabulary at a time, and multiplied in TF32. That loses nothing: a
significand of 8 bits (bfloat16) or 11 (float16) fits TF32's 11, the exponent fits its 8 bits, and
products are summed in float32 all the same. TF32 runs at half the rate of half precision; a GPU
without it multiplies in float32, at 1/8 of it or less.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compat import addmm_widens, mm_widens

_HALF = (torch.bfloat16, torch.float16)


def tile_dtype(compute: torch.dtype, precision: str) -> torch.dtype:
    """What a tile of logits is kept in: float32 for half precision, unless "fast" is asked for."""
    return torch.float32 if compute in _HALF and precision == "exact" else compute


def gradient_dtype(compute: torch.dtype, precision: str, device: torch.device) -> torch.dtype:
    """What dlogits enter their GEMMs in: on a GPU the matrix units want the weight's own dtype."""
    return tile_dtype(compute, precision) if _device_type(device) == "cpu" else compute


def scratch_bytes(
    rows: int, columns: int, hidden_size: int, compute: torch.dtype, device: torch.device
) -> int:
    """An upper bound of what the GEMMs of a tile allocate beside their operands and results."""
    if _device_type(device) == "cpu":
        # a float32 chunk of the weight or of its gradient and the library's packing of it; a chunk
        # of logits and its packing; the rows of hidden in float32, transposed, and their gradient
        return 4 * (2 * columns * hidden_size + 2 * columns * rows + 3 * rows * hidden_size)
    if compute not in _HALF or (_widens(compute, device) and addmm_widens()):
        return 0
    # a float32 chunk of the weight or of its gradient; of dlogits; the rows of hidden
    return 4 * (columns * hidden_size + columns * rows + rows * hidden_size)


def logits_into(
    tile: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: int
) -> None:
    """``tile = hidden @ weight.T + bias``, where need be in chunks of ``columns`` logits."""
    if _device_type(tile.device) == "cpu" and tile.dtype == torch.float32:
        hidden = hidden.float()
        for chunk, rows in _chunks(weight, columns, tile.dtype):
            part = None if bias is None else bias[chunk].float()
            _multiply_into(tile[:, chunk], hidden, rows, part)
        return
    if tile.dtype == hidden.dtype and bias is not None:
        torch.addmm(bias, hidden, weight.t(), out=tile)
        return
    if tile.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=tile)
    elif _widens(hidden.dtype, tile.device):
        torch.mm(hidden, weight.t(), out_dtype=tile.dtype, out=tile)
    else:
        hidden = hidden.to(tile.dtype)
        with _tf32():
            for chunk, rows in _chunks(weight, columns, tile.dtype):
                torch.mm(hidden, rows.t(), out=tile[:, chunk])
    if bias is not None:
        # as many bytes as addmm moves, which copies the bias to the tile first; not every torch
        # takes a bias of another dtype, nor does every cuBLASLt add it rightly
        tile += bias


def hidden_gradient(
    gradient: Tensor, weight: Tensor, columns: int, wide: torch.dtype | None = None
) -> Tensor:
    """``gradient @ weight`` in the gradient's dtype, or where torch.mm can in ``wide``."""
    if _device_type(gradient.device) != "cpu" or gradient.dtype != torch.float32:
        if wide not in (None, gradient.dtype) and _widens(gradient.dtype, gradient.device):
            return torch.mm(gradient, weight, out_dtype=wide)
        return torch.mm(gradient, weight)
    result = gradient.new_empty(gradient.shape[0], weight.shape[1])
    for chunk, rows in _chunks(weight, columns, gradient.dtype):
        _multiply_into(result, gradient[:, chunk], rows.t(), add=chunk.start > 0)
    return result


def add_weight_gradient(
    total: Tensor, gradient: Tensor, hidden: Tensor, first: bool, columns: int
) -> None:
    """``total += gradient.T @ hidden`` in total's dtype; ``first``: total holds nothing yet."""
    if _device_type(total.device) == "cpu" and total.dtype == torch.float32:
        hidden = hidden.float().t()
        if _uses_onednn():
            # it would make its own copy for every chunk
            hidden = hidden.contiguous()
        for chunk, rows in _chunks(total, columns, total.dtype):
            _multiply_into(rows, gradient[:, chunk].float().t(), hidden, add=not first)
        return
    wide: dict[str, Any] = {} if total.dtype == hidden.dtype else {"out_dtype": total.dtype}
    if wide and not _widens(hidden.dtype, total.device):
        hidden = hidden.to(total.dtype)
        with _tf32():
            for chunk, rows in _chunks(total, columns, total.dtype):
                part = gradient[:, chunk].to(total.dtype).t()
                _add_product(rows, part, hidden, first)
    elif wide and not first and not addmm_widens():
        for chunk, rows in _chunks(total, columns, total.dtype):
            rows += torch.mm(gradient[:, chunk].t(), hidden, **wide)
    else:
        _add_product(total, gradient.t(), hidden, first, **wide)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool, **wide: Any) -> None:
    """``total += a @ b``."""
    if first:
        torch.mm(a, b, **wide, out=total)
    else:
        torch.addmm(total, a, b, **wide, out=total)


def _device_type(device: torch.device) -> str:
    return device.type


def _widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch.mm keeps a product of ``dtype`` in float32."""
    if _device_type(device) != "cuda" or not mm_widens():
        return False
    return dtype != torch.bfloat16 or _capability(device) >= (8, 0)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


_tf32_lock = threading.Lock()


@contextmanager
def _tf32() -> Iterator[None]:
    """float32 GEMMs in TF32; only for operands that TF32 holds exactly.

    The switch is the process's, not the thread's: a float32 GEMM that another thread launches
    meanwhile runs in TF32 as well. The lock keeps two calls of ours from restoring each other's
    state; it is held while GEMMs are launched, not while they run.
    """
    if mm_widens():
        # then this is for a device that has no TF32
        yield
        return
    switch = torch.backends.cuda.matmul
    with _tf32_lock:
        before = switch.allow_tf32
        switch.allow_tf32 = True
        try:
            yield
        finally:
            switch.allow_tf32 = before


def _chunks(weight: Tensor, columns: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(slice of the vocabulary, its rows of the weight in ``dtype``).

    Rows of another dtype are converted into one buffer, which the next ones overwrite: glibc puts
    an aligned block of its own for each beside the last one's, whose hole is too small by bytes.
    """
    size = (min(columns, weight.shape[0]), weight.shape[1])
    buffer = None if weight.dtype == dtype else weight.new_empty(size, dtype=dtype)
    for start in range(0, weight.shape[0], columns):
        chunk = slice(start, start + columns)
        rows = weight[chunk]
        yield chunk, rows if buffer is None else buffer[: rows.shape[0]].copy_(rows)


def _onednn_linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@cache
def _has_onednn() -> bool:
    """Whether float32 goes to oneDNN: on AMD's AVX-512 it is twice as fast as torch.mm's MKL.

    On Intel's processors both are as fast, and MKL writes its product where it is wanted.
    """
    if not torch.backends.mkldnn.is_available() or _is_intel():
        return False
    a, b = (torch.arange(n, dtype=torch.float32).view(-1, 3) for n in (6, 12))
    try:
        return torch.equal(_onednn_linear(a, b), a @ b.t())
    except (AttributeError, RuntimeError, TypeError):
        # an internal operator of torch: a version without it, or with another signature
        return False


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _uses_onednn() -> bool:
    return torch.backends.mkldnn.enabled and _has_onednn()


def _multiply_into(
    out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, add: bool = False
) -> None:
    """``out = a @ b.T + bias`` in float32 on a CPU, or with ``add`` ``out += a @ b.T``."""
    if _uses_onednn():
        product = _onednn_linear(a, b, bias)
        out.add_(product) if add else out.copy_(product)
        return
    added = out if add else bias
    if added is None:
        torch.mm(a, b.t(), out=out)
    else:
        torch.addmm(added, a, b.t(), out=out)
