"""A real transformers model with our loss_function, in a loop of one's own."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import pytest
import torch

for _package in ("trl", "transformers", "peft", "datasets"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

from dpo_kernels import reference
from dpo_kernels.integrations.transformers_loss import DPOLossFunction
from tests import trl_runs

pytestmark = pytest.mark.integrations


def _batches():
    rng = torch.Generator().manual_seed(0)
    for _ in range(10):
        ids = torch.randint(5, trl_runs.VOCAB, (4, 16), generator=rng)
        labels = ids.clone()
        labels[:, :6] = -100
        yield ids, labels


def _train(step) -> list[float]:
    model = trl_runs.make_model()
    reference_model = trl_runs.moved(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for ids, labels in _batches():
        with torch.no_grad():
            given = reference.sequence_logps(reference_model(ids).logits, labels).chunk(2)
        loss = step(model, ids, labels, *given)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_ten_steps():
    function = DPOLossFunction(beta=0.2, label_smoothing=0.1)

    def ours(model, ids, labels, chosen, rejected):
        model.loss_function = function
        logps = {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
        return model(ids, attention_mask=torch.ones_like(ids), labels=labels, **logps).loss

    def plain(model, ids, labels, chosen, rejected):
        options = {"beta": 0.2, "label_smoothing": 0.1}
        return reference.dpo_loss(model(ids).logits, labels, chosen, rejected, **options).loss

    losses = _train(ours)
    torch.testing.assert_close(losses, _train(plain), rtol=1e-4, atol=1e-5)
    assert len(set(losses)) == 10
    assert float(function.output.metrics()["rewards/margins"]) != 0
