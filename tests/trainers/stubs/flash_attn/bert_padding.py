"""What OpenRLHF packs its samples with, in plain PyTorch."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["index_first_axis", "pad_input", "rearrange", "unpad_input"]


def index_first_axis(values: Tensor, indices: Tensor) -> Tensor:
    return values[indices]


def unpad_input(values: Tensor, attention_mask: Tensor) -> tuple:
    """(values of the tokens that count, their places, where sequences start, longest, lengths)."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return values.flatten(0, 1)[indices], indices, starts, int(lengths.max()), lengths


def pad_input(values: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    padded = values.new_zeros(batch * seqlen, *values.shape[1:])
    return padded.index_put((indices,), values).view(batch, seqlen, *values.shape[1:])
