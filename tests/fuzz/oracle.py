"""What the functions mean, in float64, written from the papers' formulas.

It shares no code with dpo_kernels. Besides values it says how far float32 arithmetic (float64 for
float64 input) may be off: errors are counted in roundings and carried through to the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

ls = F.logsigmoid


@dataclass
class Rows:
    """Which row of logits scores which token: [scored tokens] int64 each, in order."""

    tokens: Tensor
    rows: Tensor
    labels: Tensor
    sequence: Tensor
    nth: Tensor  # 1 for the first scored token of its sequence, 2 for the next
    lengths: Tensor  # [sequences]


def rows_of(labels: Tensor, bounds: list[int], shift: bool, ignore_index: int) -> Rows:
    """``labels`` flat, sequence s at ``bounds[s] .. bounds[s + 1]``."""
    found, lengths = [], []
    flat = labels.tolist()
    for s, (start, end) in enumerate(pairwise(bounds)):
        tokens = [i for i in range(start + shift, end) if flat[i] != ignore_index]
        found += [(i, i - shift, flat[i], s, nth + 1) for nth, i in enumerate(tokens)]
        lengths.append(len(tokens))
    columns = torch.tensor(found, dtype=torch.int64).view(-1, 5).unbind(1)
    return Rows(*columns, torch.tensor(lengths, dtype=torch.int64))


def transformed(x: Tensor, scale: float, softcap: float | None, temperature: float) -> Tensor:
    z = x * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logps(z: Tensor, rows: Rows) -> Tensor:
    """[scored tokens], from ``z`` [rows, V] in float64."""
    picked = z[rows.rows]
    return picked.log_softmax(-1).gather(-1, rows.labels[:, None])[:, 0]


def per_sequence(values: Tensor, rows: Rows, average: bool) -> Tensor:
    sums = values.new_zeros(len(rows.lengths)).index_add(0, rows.sequence, values)
    return sums / rows.lengths.clamp(min=1) if average else sums


def ld_weights(rows: Rows, alpha: float) -> Tensor:
    shared = torch.minimum(*rows.lengths.chunk(2)).repeat(2)[rows.sequence]
    return 1.0 - (1.0 - alpha) * (rows.nth > shared).double()


def divergence(x: Tensor, name: str, a: float) -> Tensor:
    if name == "reverse_kl":
        return x
    if name == "forward_kl":
        return 1 - torch.exp(-x)
    if name == "js_divergence":
        return math.log(2) + ls(x)
    return (torch.exp((a - 1) * x) - 1) / (a - 1)


def steepness(ratios: Tensor, o: dict) -> Tensor:
    """How much larger than the log-ratios what a loss is made of may be, per sequence."""
    x = ratios.detach().requires_grad_()
    score = divergence(x, o["f_divergence"], o["f_alpha_divergence_coef"])
    return torch.autograd.grad(score.sum(), x)[0].abs().clamp(min=1)


def loss(name, w, l, ref_w, ref_l, n_w, n_l, o) -> Tensor:
    """[P] losses; ``o`` holds beta and the rest, ``n`` are counts (ones where means came in)."""
    b, e = o["beta"], o["label_smoothing"]
    c, r = w - ref_w, l - ref_l
    score = [divergence(x, o["f_divergence"], o["f_alpha_divergence_coef"]) for x in (c, r)]
    d = b * (score[0] - score[1])
    scored, all_w = (n_w.clamp(min=1), n_l.clamp(min=1)), n_w.sum().clamp(min=1)
    mean = score[0] / scored[0] - score[1] / scored[1]
    half = 1 / (2 * b)
    if name == "sigmoid":
        return -(1 - e) * ls(d) - e * ls(-d)
    if name == "hinge":
        return torch.relu(1 - d)
    if name == "ipo":
        return (mean - half) ** 2
    if name == "exo_pair":
        chosen = torch.sigmoid(d) * (ls(d) - math.log(1 - e))
        return chosen + torch.sigmoid(-d) * (ls(-d) - math.log(e))
    if name == "nca_pair":
        return -ls(b * c) - ls(-b * c) / 2 - ls(-b * r) / 2
    if name == "robust":
        return (-(1 - e) * ls(d) + e * ls(-d)) / (1 - 2 * e)
    if name == "bco_pair":
        return -ls(b * c) - ls(-b * r)
    if name == "sppo_hard":
        return (c - half) ** 2 + (r + half) ** 2
    if name in ("aot", "aot_unpaired"):
        gap = c.sort().values - r.sort().values
        if name == "aot":
            gap = (w - l).sort().values - (ref_w - ref_l).sort().values
        return -(1 - e) * ls(b * gap) - e * ls(-b * gap)
    if name == "apo_zero":
        return 1 - torch.sigmoid(b * c) + torch.sigmoid(b * r)
    if name == "apo_down":
        return torch.sigmoid(b * c) + 1 - torch.sigmoid(b * (c - r))
    if name == "discopop":
        # m exp(-d) with one exponent: 0 * inf is not a number
        scaled = d / o["discopop_tau"]
        return -torch.sigmoid(-scaled) * ls(d) + torch.exp(ls(scaled) - d)
    if name == "sft":
        # the mean over the scored tokens of all chosen answers; of means, their own
        return -w if o["means"] else (-w.sum() / all_w).expand_as(w)
    if name == "sigmoid_norm":
        return -ls(b * mean)
    assert name == "simpo"
    return -ls(b * (w / scored[0] - l / scored[1]) - o["simpo_gamma"])


def pair_losses(logps: Tensor, refs: Tensor, lengths: Tensor, o: dict) -> Tensor:
    """[P] losses of the mix, from sequence log-probs [2P]."""
    pairs = logps.shape[0] // 2
    counts = torch.ones(2 * pairs, dtype=torch.float64) if o["means"] else lengths.double()
    total = torch.zeros(pairs, dtype=torch.float64)
    for name, weight in o["mix"]:
        total = total + weight * loss(name, *logps.chunk(2), *refs.chunk(2), *counts.chunk(2), o)
    return total


def reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return losses.sum() / max(losses.shape[0], 1)
    return losses.sum() if reduction == "sum" else losses


# how far arithmetic with a unit roundoff of eps may be off


def token_error(z: Tensor, rows: Rows, eps: float, z_error: Tensor | float) -> Tensor:
    """Of every scored token's log-prob; ``z_error`` bounds the error of a row's z, [rows] or 0."""
    logps = token_logps(z, rows).abs()
    # two exp and log, and a sum over the vocabulary in blocks
    error = eps * (8 * logps + 16 + 4 * math.log2(z.shape[-1]))
    return error + 2 * (z_error[rows.rows] if isinstance(z_error, Tensor) else z_error)


def spread_over_corners(function, centre: Tensor, error: Tensor) -> Tensor:
    """The largest change of ``function`` where its argument is off by ``error``, to first order."""
    pairs = centre.shape[0] // 2
    value = function(centre)
    worst = torch.zeros_like(value)
    for chosen in (-1.0, 1.0):
        for rejected in (-1.0, 1.0):
            signs = torch.tensor([chosen] * pairs + [rejected] * pairs, dtype=torch.float64)
            worst = torch.maximum(worst, (function(centre + signs * error) - value).abs())
    return worst


def logits_gradient(
    z: Tensor, rows: Rows, derivatives: Tensor, derivative_error: Tensor, eps: float, z_error=0.0
) -> tuple[Tensor, Tensor]:
    """d / dz [rows, V] from the derivatives of the scored tokens, and how far it may be off."""
    gradient, error = torch.zeros_like(z), torch.zeros_like(z)
    picked = z[rows.rows]
    logps = picked.log_softmax(-1)
    p = logps.exp()
    onehot = F.one_hot(rows.labels, z.shape[-1]).double()
    z_error = z_error[rows.rows, None] if isinstance(z_error, Tensor) else z_error
    # p = exp(z - lse): its relative error is the absolute one of the exponent
    exponent = eps * (4 * logps.abs().clamp(max=200) + 32 + 4 * math.log2(z.shape[-1]))
    p_error = p * (exponent + 4 * z_error) + onehot * 8 * eps * (1 - p)
    size = (onehot - p).abs()
    gradient[rows.rows] = derivatives[:, None] * (onehot - p)
    # the smallest numbers may be flushed to 0
    p_error = p_error + (1e-37 if eps > 1e-10 else 1e-307)
    error[rows.rows] = derivative_error[:, None] * size + derivatives.abs()[:, None] * (
        p_error + 8 * eps * size
    )
    return gradient, error
