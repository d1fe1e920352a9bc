"""A model's head that returns log-probs in place of logits."""

from __future__ import annotations

import threading
import types

import pytest
import torch
from torch import nn

from dpo_kernels import reference
from dpo_kernels.integrations import heads
from dpo_kernels.integrations.heads import scoring_head

P, T, H, V = 2, 7, 12, 37


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, H)

    def forward(self, input_ids):
        return (self.embedding(input_ids).tanh(),)


class Model(nn.Module):
    """Embedding, head, and what the families put around their heads: a scale, a softcap."""

    def __init__(self, bias: bool = False, **config):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Backbone()
        self.lm_head = nn.Linear(H, V, bias=bias)
        self.config = types.SimpleNamespace(model_type="cohere", **config)
        self.config.get_text_config = lambda: self.config
        self.head_shapes = []
        self.register_forward_hook(
            lambda *call: self.head_shapes.append(tuple(call[-1].logits.shape))
        )

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, position_ids=None, **_):
        # minicpm3 divides before its head by what granite divides by behind it
        hidden = self.backbone(input_ids)[0] / getattr(self.config, "logits_scaling", 1.0)
        logits = self.lm_head(hidden) * getattr(self.config, "logit_scale", 1.0)
        for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
            cap = getattr(self.config, name, None)
            if cap is not None:
                logits = torch.tanh(logits / cap) * cap
        return Output(logits=self.more(logits))

    def more(self, logits):
        return logits


class Output(dict):
    """As transformers' ModelOutput: keys and attributes."""

    logits = property(lambda self: self["logits"])


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (2 * P, T), generator=rng)
    labels = ids.clone()
    for row, (start, end) in enumerate([(2, 7), (1, 5), (3, 7), (4, 5)]):
        labels[row, :start] = -100
        labels[row, end:] = -100
    return ids, labels


@pytest.fixture
def batch():
    return make_batch()


def grads(model, value):
    weights = torch.linspace(-1, 2, value.numel()).view(value.shape)
    return torch.autograd.grad((value * weights).sum(), list(model.parameters()))


def close(ours, truth):
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"logit_scale": 0.3},
        {"final_logit_softcapping": 2.0},
        {"logits_soft_cap": 2.0, "logit_scale": 0.3},
        {"output_logit_soft_cap": 2.0},
        {"logits_scaling": 3.0},
    ],
    ids=str,
)
def test_log_probs_and_gradients_are_those_of_the_logits(batch, config, bias):
    ids, labels = batch
    model = Model(bias, **config)
    with scoring_head(model, labels, shift=True, temperature=0.7) as head:
        outputs = model(ids)
    assert model.head_shapes == [(2 * P, T, 1)]
    logps = head.logps_through(outputs.logits)
    truth = reference.token_logps(model(ids).logits, labels, shift=True, temperature=0.7)
    close(logps, truth)
    for ours, theirs in zip(grads(model, logps), grads(model, truth), strict=True):
        close(ours, theirs)
    # DDP finds the parameters that a loss uses by walking the outputs
    assert outputs.logits.grad_fn is not None
    assert "forward" not in vars(model.lm_head)


def test_mean_logits(batch):
    ids, labels = batch
    model = Model(bias=True, logit_scale=0.3)
    with scoring_head(model, labels, shift=True, means=True) as head:
        model(ids)
    close(head.mean_logits, model(ids).logits.mean((1, 2)))
    assert not head.mean_logits.requires_grad


def test_writing_into_the_logits_leaves_the_log_probs_alone(batch):
    ids, labels = batch
    model = Model()
    with scoring_head(model, labels, shift=True) as head:
        logits = model(ids).logits
    before = head.logps.detach().clone()
    logits.div_(3.0)
    assert torch.equal(head.logps, before)


class Adapted(nn.Linear):
    pass


@pytest.mark.parametrize(
    "case", ["adapted", "replaced", "softcapped means", "other rows", "ZeRO-3"]
)
def test_a_head_that_is_not_served_makes_its_logits(batch, case, caplog, monkeypatch):
    ids, labels = batch
    monkeypatch.setattr("dpo_kernels.integrations.trl._logged", set())
    model = Model(final_logit_softcapping=2.0 if case == "softcapped means" else None)
    if case == "adapted":
        model.lm_head.__class__ = Adapted
    if case == "replaced":
        model.lm_head.forward = model.lm_head.forward
    if case == "other rows":
        labels = labels[:, :3]
    if case == "ZeRO-3":
        # what DeepSpeed's parameters have besides
        model.lm_head.weight.ds_id, model.lm_head.weight.ds_status = 0, None
    expected = model(ids).logits
    with (
        caplog.at_level("WARNING", "dpo_kernels"),
        scoring_head(model, labels, shift=True, means=case == "softcapped means") as head,
    ):
        assert torch.equal(model(ids).logits, expected)
    assert head.logps is None and head.reason
    assert head.reason in caplog.text


class Engine(nn.Module):
    """As DeepSpeed's: what it lacks is its model's, the config it has is its own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module, self.config = model, {"train_batch_size": 1}

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Adapter(Engine):
    """As PEFT's."""

    def get_base_model(self):
        return super().__getattr__("module")


@pytest.mark.parametrize("wrap", [Engine, nn.DataParallel, torch.compile, Adapter])
def test_a_wrapped_model(batch, wrap):
    ids, labels = batch
    model = Model(logit_scale=0.3)
    # a compiled model makes its graphs when it is called, which takes longer than the test is worth
    wrapped = wrap(model, backend="eager") if wrap is torch.compile else wrap(model)
    with scoring_head(wrapped, labels, shift=True) as head:
        wrapped(ids)
    close(head.logps, reference.token_logps(model(ids).logits, labels, shift=True))


def test_another_forward_meanwhile_makes_its_logits(batch):
    """In another thread, and of a scoring_head that finds the head replaced."""
    ids, labels = batch
    model = Model()
    expected = model(ids).logits
    found = []
    with scoring_head(model, labels, shift=True) as head:
        thread = threading.Thread(target=lambda: found.append(model(ids).logits))
        thread.start()
        thread.join()
        with scoring_head(model, labels, shift=True) as inner:
            found.append(model(ids).logits)
        model(ids)
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)
    assert inner.logps is None and "replaced already" in inner.reason
    close(head.logps, reference.token_logps(expected, labels, shift=True))


def test_a_second_head_in_one_forward_is_refused(batch):
    ids, labels = batch
    model = Model()
    with (
        pytest.raises(RuntimeError, match="ran its head twice"),
        scoring_head(model, labels, shift=True),
    ):
        model(ids)
        model(ids)
    assert "forward" not in vars(model.lm_head) and heads.current_head() is None
