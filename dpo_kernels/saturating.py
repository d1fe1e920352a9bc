"""Functions that level off, with slopes that keep their digits there."""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid(y: Tensor) -> Tensor:
    # its slope is made of its value, s (1 - s): where s rounds to 1 the slope would be 0
    return torch.where(y > 0, 1 - torch.sigmoid(-y), torch.sigmoid(y))


def expm1(y: Tensor) -> Tensor:
    """``exp(y) - 1``, y held below 80."""
    # exp overflows beyond 88, and inf times a loss's slope of 0 is not a number
    y = y.clamp(max=80.0)
    # the slope of torch's is its value + 1, which cancels far below 0
    return torch.where(y < -1, torch.exp(y) - 1, torch.expm1(y))
