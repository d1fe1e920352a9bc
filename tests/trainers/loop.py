"""A DPO loop of our own, for trainers whose own one a CPU cannot start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tests import trl_runs

from .report import STEPS

PROMPT, LENGTH = 8, 20


def train(score: Callable[[Tensor, Tensor], Tensor]) -> list[dict[str, float]]:
    """``score(logits, ids)``: [2P] sums of the log-probs of what follows the prompt."""
    model = trl_runs.make_model()
    reference = trl_runs.moved(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    rng = torch.Generator().manual_seed(0)
    logged = []
    for _ in range(STEPS):
        # the chosen answers first
        ids = torch.randint(5, trl_runs.VOCAB, (4, LENGTH), generator=rng)
        policy = score(model(ids).logits, ids)
        with torch.no_grad():
            given = score(reference(ids).logits, ids)
        chosen, rejected = (policy - given).chunk(2)
        loss = -logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        margin = (chosen - rejected).mean()
        logged.append({"loss": float(loss.detach()), "margin": float(margin.detach())})
    return logged
