"""A model's head that returns log-probs in place of logits, and the trainers that get it so.

The trainers are stand-ins with the recorded signatures of LLaMA-Factory 0.9.5 and OpenRLHF 0.11.2;
tests/trainers runs the real ones.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

import dpo_kernels
from dpo_kernels import reference
from dpo_kernels.integrations import heads
from dpo_kernels.integrations.heads import scoring_head

P, T, H, V = 2, 7, 12, 37


class Model(nn.Module):
    """Embedding, head, and what the families put behind their heads: a scale, a softcap."""

    def __init__(self, bias: bool = False, **config):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.lm_head = nn.Linear(H, V, bias=bias)
        self.config = types.SimpleNamespace(model_type="cohere", **config)
        self.config.get_text_config = lambda: self.config
        self.head_shapes = []

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, position_ids=None, **_):
        logits = self.lm_head(self.embedding(input_ids).tanh())
        self.head_shapes.append(tuple(logits.shape))
        logits = logits * getattr(self.config, "logit_scale", 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return Output(logits=logits)


class Output(dict):
    """As transformers' ModelOutput: keys and attributes."""

    logits = property(lambda self: self["logits"])


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (2 * P, T), generator=rng)
    labels = ids.clone()
    for row, (start, end) in enumerate([(2, 7), (1, 5), (3, 7), (4, 5)]):
        labels[row, :start] = -100
        labels[row, end:] = -100
    return ids, labels


def _grads(model, value):
    weights = torch.linspace(-1, 2, value.numel()).view(value.shape)
    return torch.autograd.grad((value * weights).sum(), list(model.parameters()))


def _close(ours, truth):
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"logit_scale": 0.3}, {"final_logit_softcapping": 2.0}], ids=str
)
def test_log_probs_and_gradients_are_those_of_the_logits(batch, config, bias):
    ids, labels = batch
    model = Model(bias, **config)
    with scoring_head(model, labels, shift=True, temperature=0.7) as head:
        outputs = model(ids)
    assert model.head_shapes == [(2 * P, T, 1)]
    truth = reference.token_logps(model(ids).logits, labels, shift=True, temperature=0.7)
    _close(head.logps, truth)
    for ours, theirs in zip(_grads(model, head.logps), _grads(model, truth), strict=True):
        _close(ours, theirs)
    # DDP finds the parameters that a loss uses by walking the outputs
    assert outputs.logits.grad_fn is not None
    assert "forward" not in vars(model.lm_head)


def test_mean_logits(batch):
    ids, labels = batch
    model = Model(bias=True, logit_scale=0.3)
    with scoring_head(model, labels, shift=True, means=True) as head:
        model(ids)
    _close(head.mean_logits, model(ids).logits.mean((1, 2)))
    assert not head.mean_logits.requires_grad


def test_writing_into_the_logits_leaves_the_log_probs_alone(batch):
    ids, labels = batch
    model = Model()
    with scoring_head(model, labels, shift=True) as head:
        logits = model(ids).logits
    before = head.logps.detach().clone()
    logits.div_(3.0)
    assert torch.equal(head.logps, before)


class _Adapted(nn.Linear):
    pass


@pytest.mark.parametrize(
    "case", ["adapted", "replaced", "softcapped means", "other rows", "ZeRO-3"]
)
def test_a_head_that_is_not_served_makes_its_logits(batch, case, caplog, monkeypatch):
    ids, labels = batch
    monkeypatch.setattr("dpo_kernels.integrations.trl._logged", set())
    model = Model(final_logit_softcapping=2.0 if case == "softcapped means" else None)
    if case == "adapted":
        model.lm_head.__class__ = _Adapted
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


# LLaMA-Factory


def _modules(monkeypatch, **members: dict):
    """Modules of the given dotted names, and the packages above them."""
    for path, names in members.items():
        path = path.replace("__", ".")
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in sys.modules:
                module = types.ModuleType(name)
                module.__path__ = []
                module.__spec__ = types.SimpleNamespace(name=name)
                monkeypatch.setitem(sys.modules, name, module)
        for name, value in names.items():
            for made_here in (value, *vars(value).values()):
                if callable(made_here):
                    made_here.__module__ = path
            setattr(sys.modules[path], name, value)


@pytest.fixture
def llama_factory(monkeypatch):
    class CustomDPOTrainer:
        accelerator = types.SimpleNamespace(unwrap_model=lambda model: model)
        loss_type, ld_alpha = "sigmoid", None

        def concatenated_forward(self, model, batch, is_ref_model=False):
            raise NotImplementedError

    class CustomKTOTrainer:
        accelerator = CustomDPOTrainer.accelerator

        def forward(self, model, batch, prefix=""):
            raise NotImplementedError

    def get_batch_logps(logits, labels, label_pad_token_id=-100, ld_alpha=None):
        raise NotImplementedError

    _modules(
        monkeypatch,
        llamafactory__train__dpo__trainer={"CustomDPOTrainer": CustomDPOTrainer},
        llamafactory__train__kto__trainer={"CustomKTOTrainer": CustomKTOTrainer},
        llamafactory__train__trainer_utils={"get_batch_logps": get_batch_logps},
    )
    sys.modules["llamafactory"].__version__ = "0.9.5"
    with dpo_kernels.patch("llamafactory", verbose=False):
        yield CustomDPOTrainer(), CustomKTOTrainer()


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_llama_factory_dpo(llama_factory, batch, loss_type, served):
    ids, labels = batch
    trainer, model = llama_factory[0], Model(bias=True)
    trainer.loss_type = loss_type
    if not served:
        model.lm_head.__class__ = _Adapted
    inputs = {"input_ids": ids, "labels": labels}
    found = trainer.concatenated_forward(model, inputs)
    assert "labels" in inputs
    assert model.head_shapes == [(2 * P, T, 1 if served else V)]
    logits = model(ids).logits
    sums = reference.sequence_logps(logits, labels)
    means = reference.sequence_logps(logits, labels, average_log_prob=True)
    expected = (means if loss_type == "ipo" else sums).chunk(2)
    _close(found["chosen_logps"], expected[0])
    _close(found["rejected_logps"], expected[1])
    _close(found["chosen_logps_avg"], means[:P])
    _close(found["chosen_logits"].mean(), logits[:P].mean())
    _close(found["rejected_logits"].mean(), logits[P:].mean())
    ours = torch.cat((found["chosen_logps"], found["rejected_logps"]))
    for mine, truth in zip(_grads(model, ours), _grads(model, torch.cat(expected)), strict=True):
        _close(mine, truth)


def test_llama_factory_ld_alpha_is_the_policys_alone(llama_factory, batch):
    ids, labels = batch
    trainer, model = llama_factory[0], Model()
    trainer.ld_alpha = 0.3
    inputs = {"input_ids": ids, "labels": labels}
    from dpo_kernels.integrations.llama_factory import get_batch_logps

    for is_ref, alpha in ((False, 0.3), (True, None)):
        found = trainer.concatenated_forward(model, inputs, is_ref_model=is_ref)
        truth, _ = get_batch_logps(model(ids).logits, labels, ld_alpha=alpha)
        _close(torch.cat((found["chosen_logps"], found["rejected_logps"])), truth)


def test_llama_factory_kto(llama_factory, batch):
    ids, labels = batch
    trainer, model = llama_factory[1], Model()
    for prefix in ("", "kl_"):
        inputs = {f"{prefix}input_ids": ids, f"{prefix}labels": labels}
        inputs[f"{prefix}attention_mask"] = torch.ones_like(ids)
        logits, logps, means = trainer.forward(model, inputs, prefix)
        whole = model(ids).logits
        _close(logps, reference.sequence_logps(whole, labels))
        _close(means, reference.sequence_logps(whole, labels, average_log_prob=True))
        chosen = torch.tensor([True, False, True, True])
        _close(logits[chosen].nansum(), whole[chosen].sum())


# OpenRLHF


@pytest.fixture
def openrlhf(monkeypatch):
    def log_probs_from_logits(logits, labels, temperature=1.0):
        return reference.token_logps(logits, labels, temperature=temperature)

    def unpad_and_slice_tensor(sequences, attention_mask, ring_attn_group):
        # every token is one of the packed ones here
        rolled = sequences.roll(-1, 1).view(1, -1)
        return sequences.view(1, -1), None, rolled, 0, None

    class Actor(nn.Module):
        def __init__(self, model, packing_samples, temperature):
            super().__init__()
            self.model, self.temperature = model, temperature
            self.packing_samples = packing_samples

        def forward(
            self,
            sequences,
            action_mask=None,
            attention_mask=None,
            return_output=False,
            allgather_logits=False,
            return_logprobs=False,
            ring_attn_group=None,
            packed_seq_lens=None,
            return_entropy=False,
            **mm_inputs,
        ):
            shape, rolled = sequences.shape, sequences.roll(-1, 1)
            if self.packing_samples:
                module = sys.modules["openrlhf.models.actor"]
                sequences, _, rolled, _, _ = module.unpad_and_slice_tensor(
                    sequences, attention_mask, ring_attn_group
                )
            output = self.model(sequences, attention_mask=attention_mask)
            output["logits"] = output["logits"].float()
            if self.temperature != 1.0:
                output["logits"].div_(self.temperature)
            if action_mask is None and not return_logprobs:
                return output
            score = sys.modules["openrlhf.models.actor"].log_probs_from_logits
            log_probs = score(output["logits"], rolled).view(shape)[:, :-1]
            if action_mask is not None:
                log_probs = log_probs[:, -action_mask.shape[1] :] * action_mask
            return (log_probs, output) if return_output else log_probs

    own = {"unpad_and_slice_tensor": unpad_and_slice_tensor}
    _modules(
        monkeypatch,
        openrlhf__models__ring_attn_utils=own,
        openrlhf__models__utils={"log_probs_from_logits": log_probs_from_logits},
        openrlhf__models__actor={"Actor": Actor},
    )
    actor = sys.modules["openrlhf.models.actor"]
    actor.log_probs_from_logits = log_probs_from_logits
    actor.unpad_and_slice_tensor = unpad_and_slice_tensor
    sys.modules["openrlhf"].__version__ = "0.11.2"
    return Actor


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_openrlhf_actor(openrlhf, batch, packed, temperature):
    ids, _ = batch
    actor = openrlhf(Model(), packed, temperature)
    truth = actor(ids, return_logprobs=True)
    actor.model.head_shapes.clear()
    with dpo_kernels.patch("openrlhf", verbose=False):
        ours, output = actor(ids, return_logprobs=True, return_output=True)
        masked = actor(ids, torch.ones(2 * P, 3))
        assert {shape[-1] for shape in actor.model.head_shapes} == {1}
        assert output["logits"] is None
        # logits are still made for who wants them
        assert actor(ids, return_output=True)["logits"].shape[-1] == V
    _close(ours, truth)
    _close(masked, truth[:, -3:])
    for mine, theirs in zip(_grads(actor, ours), _grads(actor, truth), strict=True):
        _close(mine, theirs)


def test_openrlhf_head_that_is_not_served(openrlhf, batch):
    ids, _ = batch
    actor = openrlhf(Model(), False, 1.0)
    actor.model.lm_head.__class__ = _Adapted
    truth = actor(ids, return_logprobs=True)
    with dpo_kernels.patch("openrlhf", verbose=False):
        ours, output = actor(ids, return_logprobs=True, return_output=True)
    assert output["logits"].shape[-1] == V
    _close(ours, truth)
