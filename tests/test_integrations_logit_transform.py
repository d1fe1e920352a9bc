"""What a model does to its head's outputs, found out before its head is replaced."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dpo_kernels.integrations.heads import scoring_head
from dpo_kernels.integrations.logit_transform import LogitTransform, transform_of_model
from tests.test_integrations_heads import Model, V, make_batch


@pytest.fixture
def batch():
    return make_batch()


# what is done to logits that no config tells of
MORE = {
    "scaled": lambda logits: logits * 0.99999,
    "masked": lambda logits: logits.index_fill(-1, torch.tensor([V - 1]), -1e9),
    "sliced": lambda logits: logits[..., :-1],
    "shifted": lambda logits: logits.roll(1, -1),
    "failing": lambda logits: logits + logits.of_another_kind,
}


@pytest.mark.parametrize("what", MORE)
def test_a_model_that_does_more_makes_its_logits(batch, what, caplog, monkeypatch):
    ids, labels = batch
    monkeypatch.setattr("dpo_kernels.integrations.trl._logged", set())
    model = Model(logit_scale=0.3)
    model.more = MORE[what]
    for _ in range(2):
        with (
            caplog.at_level("WARNING", "dpo_kernels"),
            scoring_head(model, labels, shift=True) as head,
        ):
            if what != "failing":
                assert model(ids).logits.shape[-1] == V - (what == "sliced")
        assert head.logps is None
    assert caplog.text.count(head.reason) == 1


class Outer(nn.Module):
    """A model around a model, which may do to its logits what the inner one knows nothing of."""

    def __init__(self):
        super().__init__()
        self.inner = Model()
        self.get_output_embeddings = self.inner.get_output_embeddings


def test_a_head_inside_another_module_is_left_to_it(batch):
    with scoring_head(Outer(), batch[1], shift=True) as head:
        pass
    assert "not a Outer's own" in head.reason


@pytest.mark.parametrize("transform", [LogitTransform(0.3, None), LogitTransform(0.3, 2.0)])
def test_the_one_of_the_candidates_that_fits(transform):
    others = [LogitTransform(s, c) for s in (1.0, 0.3, 0.3001) for c in (None, 2.0, 1e4)]
    model = Model(logit_scale=0.3, final_logit_softcapping=transform.logit_softcap)
    found = [transform_of_model(model, model.lm_head, [other]) for other in others]
    assert [x for x in found if x is not None] == [transform]


def test_another_default_dtype():
    model = Model(logit_scale=0.3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = transform_of_model(model, model.lm_head, [LogitTransform(0.3, None)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found is not None


def test_it_is_tried_without_the_parameters_and_leaves_the_model_alone():
    model = Model(bias=True, logit_scale=0.3)
    before = dict(vars(model)), dict(model._modules)
    for parameter in model.parameters():
        # nothing can be computed with these
        parameter.data = torch.empty(0)
    found = transform_of_model(model, model.lm_head, [LogitTransform(0.3, None)])
    assert found == (0.3, None) and before == (vars(model), model._modules)
