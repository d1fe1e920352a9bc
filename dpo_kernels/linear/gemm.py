"""The head's GEMMs, all of them: logits, hidden gradient and weight gradient of one tile of rows.

The vendor libraries do the work. What is decided here is the precision they work in and, on a CPU,
which of torch's two libraries is called and how much of the weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def tile_dtype(compute: torch.dtype, precision: str) -> torch.dtype:
    """What a tile of logits is kept in: float32 for half precision, unless "fast" is asked for."""
    return torch.float32 if compute in _HALF and precision == "exact" else compute


def gradient_dtype(compute: torch.dtype, precision: str, device: torch.device) -> torch.dtype:
    """What dlogits enter their GEMMs in: on a GPU the matrix units want the weight's own dtype."""
    return compute if device.type != "cpu" else tile_dtype(compute, precision)


def scratch_bytes(rows: int, columns: int, hidden_size: int, device: torch.device) -> int:
    """An upper bound of what the GEMMs of a tile allocate beside their operands and results."""
    if device.type != "cpu":
        return 0
    # a float32 chunk of the weight or of its gradient and the library's packing of it; a chunk of
    # logits and its packing; the rows of hidden in float32, transposed, and their gradient
    return 4 * (2 * columns * hidden_size + 2 * columns * rows + 3 * rows * hidden_size)


def logits_into(
    tile: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: int
) -> None:
    """``tile = hidden @ weight.T + bias``; a CPU takes ``columns`` of the vocabulary at a time."""
    if tile.device.type == "cpu" and tile.dtype == torch.float32:
        hidden = hidden.float()
        for chunk, rows in _chunks(weight, columns):
            part = None if bias is None else bias[chunk].float()
            _linear_into(tile[:, chunk], hidden, rows.float(), part)
        return
    _mm_into(tile, hidden, weight.t(), None if bias is None else bias.to(tile.dtype))


def hidden_gradient(gradient: Tensor, weight: Tensor, columns: int) -> Tensor:
    """``gradient @ weight`` in the gradient's dtype."""
    if gradient.device.type != "cpu" or gradient.dtype != torch.float32:
        return torch.mm(gradient, weight)
    result = gradient.new_zeros(gradient.shape[0], weight.shape[1])
    for chunk, rows in _chunks(weight, columns):
        result += _linear(gradient[:, chunk], rows.float().t())
    return result


def add_weight_gradient(
    total: Tensor, gradient: Tensor, hidden: Tensor, first: bool, columns: int
) -> None:
    """``total += gradient.T @ hidden`` in total's dtype; ``first``: total holds nothing yet."""
    if gradient.device.type == "cpu" and total.dtype == torch.float32:
        hidden = hidden.float().t().contiguous()
        for chunk, rows in _chunks(total, columns):
            product = _linear(gradient[:, chunk].float().t(), hidden)
            rows.copy_(product) if first else rows.add_(product)
        return
    _mm_into(total, gradient.t(), hidden, None if first else total)


def _mm_into(out: Tensor, a: Tensor, b: Tensor, added: Tensor | None) -> None:
    """``out = a @ b + added`` in the dtype of out."""
    wide: dict[str, Any] = {}
    if out.dtype != a.dtype and _widens(out.device):
        wide = {"out_dtype": out.dtype}
    elif out.dtype != a.dtype:
        a, b = a.to(out.dtype), b.to(out.dtype)
    if added is None:
        torch.mm(a, b, **wide, out=out)
    else:
        torch.addmm(added, a, b, **wide, out=out)


def _chunks(weight: Tensor, columns: int) -> Iterator[tuple[slice, Tensor]]:
    """(slice of the vocabulary, its rows of the weight)."""
    for start in range(0, weight.shape[0], columns):
        chunk = slice(start, start + columns)
        yield chunk, weight[chunk]


def _widens(device: torch.device) -> bool:
    """Whether torch.mm takes half precision to float32: torch 2.8 and later, on CUDA only."""
    return device.type == "cuda" and _has_out_dtype()


@cache
def _has_out_dtype() -> bool:
    return "dtype_out" in torch.ops.aten.mm.overloads()


def _onednn_linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@cache
def _has_onednn() -> bool:
    """Whether float32 goes to oneDNN: on AMD's AVX-512 it is twice as fast as torch.mm's MKL."""
    if not torch.backends.mkldnn.is_available():
        return False
    a, b = (torch.arange(n, dtype=torch.float32).view(-1, 3) for n in (6, 12))
    try:
        return torch.equal(_onednn_linear(a, b), a @ b.t())
    except (AttributeError, RuntimeError, TypeError):
        # an internal operator of torch: a version without it, or with another signature
        return False


def _uses_onednn() -> bool:
    return torch.backends.mkldnn.enabled and _has_onednn()


def _linear(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` in float32 on a CPU."""
    return _onednn_linear(a, b) if _uses_onednn() else torch.mm(a, b.t())


def _linear_into(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    if _uses_onednn():
        out.copy_(_onednn_linear(a, b, bias))
    elif bias is None:
        torch.mm(a, b.t(), out=out)
    else:
        torch.addmm(bias, a, b.t(), out=out)
