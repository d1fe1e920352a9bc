"""A real transformers model with our loss_function: in a loop of one's own, and in Trainer."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import pytest
import torch

for _package in ("trl", "transformers", "peft", "datasets"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

import peft
import transformers

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
        function.attach(model)
        logps = {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
        return model(ids, attention_mask=torch.ones_like(ids), labels=labels, **logps).loss

    def plain(model, ids, labels, chosen, rejected):
        options = {"beta": 0.2, "label_smoothing": 0.1}
        return reference.dpo_loss(model(ids).logits, labels, chosen, rejected, **options).loss

    losses = _train(ours)
    torch.testing.assert_close(losses, _train(plain), rtol=1e-4, atol=1e-5)
    assert len(set(losses)) == 10
    assert float(function.output.metrics()["rewards/margins"]) != 0


PAIRS, LENGTH, RATE = 8, 12, 0.5


def _pairs() -> list[dict[str, torch.Tensor]]:
    """Pairs of ``[2, T]``, the chosen first, with as many tokens to score as the pair's number."""
    rng = torch.Generator().manual_seed(3)
    pairs = []
    for i in range(PAIRS):
        ids = torch.randint(5, trl_runs.VOCAB, (2, LENGTH), generator=rng)
        labels = ids.clone()
        labels[:, : LENGTH - 1 - i] = -100
        chosen, rejected = torch.randn(2, generator=rng)
        logps = {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
        pairs.append({"input_ids": ids, "labels": labels, **logps})
    return pairs


def _collate(pairs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([pair[name] for pair in pairs]) for name in pairs[0]}
    for name in ("input_ids", "labels"):
        batch[name] = batch[name].transpose(0, 1).flatten(0, 1)
    return batch


def _trained(model, folder, pairs_at_once: int, **config) -> torch.Tensor:
    """The head of the model after one step of SGD over every pair."""
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=pairs_at_once,
            gradient_accumulation_steps=PAIRS // pairs_at_once,
            max_steps=1,
            optim="sgd",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **config,
        ),
        train_dataset=_pairs(),
        eval_dataset=_pairs(),
        data_collator=_collate,
    )
    trainer.train()
    return trainer.model.get_output_embeddings().weight.detach()


def _head_of_one_step() -> torch.Tensor:
    model = trl_runs.make_model()
    batch = _collate(_pairs())
    given = batch["reference_chosen_logps"], batch["reference_rejected_logps"]
    loss = reference.dpo_loss(model(batch["input_ids"]).logits, batch["labels"], *given, beta=0.2)
    (gradient,) = torch.autograd.grad(loss.loss, model.lm_head.weight)
    return model.lm_head.weight.detach() - RATE * gradient


@pytest.mark.parametrize("pairs_at_once", [PAIRS, 2])
@pytest.mark.parametrize("wrapped", [False, True], ids=["full", "peft"])
def test_trainer_takes_the_mean_over_pairs(tmp_path, pairs_at_once, wrapped):
    """Whatever the accumulation: the pairs count alike, though their tokens differ in number."""
    model = trl_runs.make_model()
    if wrapped:
        options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, **options))
    DPOLossFunction(beta=0.2).attach(model)
    head = _trained(model, tmp_path, pairs_at_once, eval_strategy="steps", eval_steps=1)
    wanted = _head_of_one_step()
    start = trl_runs.make_model().lm_head.weight.detach()
    assert float((wanted - start).abs().max()) > 1e-2
    # a few roundings of the largest weight
    bound = 4 * torch.finfo(torch.float32).eps * float(wanted.abs().max())
    torch.testing.assert_close(head, wanted, rtol=0, atol=bound)


def test_trainer_without_attach_is_refused(tmp_path):
    model = trl_runs.make_model()
    model.loss_function = DPOLossFunction(beta=0.2)
    with pytest.raises(ValueError, match=r"^num_items_in_batch: .*got .*72.*attach\(model\)"):
        _trained(model, tmp_path, 2)


def test_labels_that_are_shifted_already_are_refused():
    model = trl_runs.make_model()
    DPOLossFunction(reference_free=True).attach(model)
    ids = _pairs()[0]["input_ids"]
    with pytest.raises(ValueError, match=r"^shift_labels: expected None.*got \[2, 12\]"):
        model(ids, labels=ids, shift_labels=ids)


def test_attach_takes_models_of_transformers():
    with pytest.raises(TypeError, match=r"^model: expected .* transformers.*got Linear"):
        DPOLossFunction().attach(torch.nn.Linear(2, 2))
