"""The trainers whose models score tokens in their heads: LLaMA-Factory, OpenRLHF.

They are stand-ins with the recorded signatures of LLaMA-Factory 0.9.5 and OpenRLHF 0.11.2;
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
from tests.test_integrations_heads import Adapted, Engine, Model, P, T, V, close, grads, make_batch


@pytest.fixture
def batch():
    return make_batch()


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
        model.lm_head.__class__ = Adapted
    inputs = {"input_ids": ids, "labels": labels}
    found = trainer.concatenated_forward(model, inputs)
    assert "labels" in inputs
    assert model.head_shapes == [(2 * P, T, 1 if served else V)]
    logits = model(ids).logits
    sums = reference.sequence_logps(logits, labels)
    means = reference.sequence_logps(logits, labels, average_log_prob=True)
    expected = (means if loss_type == "ipo" else sums).chunk(2)
    close(found["chosen_logps"], expected[0])
    close(found["rejected_logps"], expected[1])
    close(found["chosen_logps_avg"], means[:P])
    close(found["chosen_logits"].mean(), logits[:P].mean())
    close(found["rejected_logits"].mean(), logits[P:].mean())
    ours = torch.cat((found["chosen_logps"], found["rejected_logps"]))
    for mine, truth in zip(grads(model, ours), grads(model, torch.cat(expected)), strict=True):
        close(mine, truth)


def test_llama_factory_ld_alpha_is_the_policys_alone(llama_factory, batch):
    ids, labels = batch
    trainer, model = llama_factory[0], Model()
    trainer.ld_alpha = 0.3
    inputs = {"input_ids": ids, "labels": labels}
    from dpo_kernels.integrations.llama_factory import get_batch_logps

    for is_ref, alpha in ((False, 0.3), (True, None)):
        found = trainer.concatenated_forward(model, inputs, is_ref_model=is_ref)
        truth, _ = get_batch_logps(model(ids).logits, labels, ld_alpha=alpha)
        close(torch.cat((found["chosen_logps"], found["rejected_logps"])), truth)


@pytest.mark.parametrize("served", [True, False])
def test_llama_factory_kto(llama_factory, batch, served):
    ids, labels = batch
    trainer, model = llama_factory[1], Model()
    weight = model.lm_head.weight
    if not served:
        model.lm_head.__class__ = Adapted
    # as ZeRO-3 and FSDP1 do it, the weight is whole while the model runs, and then no more
    shard, gathered = torch.empty(0), weight.data
    model.register_forward_pre_hook(lambda *_: setattr(weight, "data", gathered))
    model.register_forward_hook(lambda *_: setattr(weight, "data", shard))
    for prefix in ("", "kl_"):
        inputs = {f"{prefix}input_ids": ids, f"{prefix}labels": labels}
        inputs[f"{prefix}attention_mask"] = torch.ones_like(ids)
        logits, logps, means = trainer.forward(model, inputs, prefix)
        whole = model(ids).logits
        close(logps, reference.sequence_logps(whole, labels))
        close(means, reference.sequence_logps(whole, labels, average_log_prob=True))
        chosen = torch.tensor([True, False, True, True])
        close(logits[chosen].nansum(), whole[chosen].sum())


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


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_openrlhf_actor(openrlhf, batch, packed, temperature, engine):
    ids, _ = batch
    model = Model()
    # DeepSpeed's strategy puts its engine into the Actor
    actor = openrlhf(Engine(model) if engine else model, packed, temperature)
    truth = actor(ids, return_logprobs=True)
    model.head_shapes.clear()
    with dpo_kernels.patch("openrlhf", verbose=False):
        ours, output = actor(ids, return_logprobs=True, return_output=True)
        masked = actor(ids, torch.ones(2 * P, 3))
        assert {shape[-1] for shape in model.head_shapes} == {1}
        assert output["logits"] is None
        # logits are still made for who wants them
        assert actor(ids, return_output=True)["logits"].shape[-1] == V
    close(ours, truth)
    close(masked, truth[:, -3:])
    for mine, theirs in zip(grads(actor, ours), grads(actor, truth), strict=True):
        close(mine, theirs)


def test_openrlhf_head_that_is_not_served(openrlhf, batch):
    ids, _ = batch
    actor = openrlhf(Model(), False, 1.0)
    actor.model.lm_head.__class__ = Adapted
    truth = actor(ids, return_logprobs=True)
    with dpo_kernels.patch("openrlhf", verbose=False):
        ours, output = actor(ids, return_logprobs=True, return_output=True)
    assert output["logits"].shape[-1] == V
    close(ours, truth)
