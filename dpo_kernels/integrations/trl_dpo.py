"""A DPOTrainer that makes the whole loss, head included, in one function.

Behind patch_trl a trainable head costs four GEMMs, because TRL makes its loss after the log-probs.
Here the reference is scored first and the loss is made where the head is, inside the model's
forward: three GEMMs (two for a frozen head), the same metrics, and nothing waits for them on a GPU
until they are logged.
"""

from __future__ import annotations

import contextlib
import functools
import types
from typing import Any

import torch
import transformers
from accelerate.utils import is_peft_model
from packaging.version import Version
from torch import Tensor
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..compat import is_dtensor
from ..functional import preference_loss
from ..linear import linear_dpo_loss, linear_sequence_logps, linear_token_logps
from ..linear.sharded import whole
from ..losses import LOSSES, make_options
from ..sequences import SequenceLayout
from .heads import logit_scale_of
from .trl import head_in_trls_dtype, head_not_served, log_once

# TRL smooths the labels of these alone
_SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
_NOT_MODEL_INPUTS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class FusedDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer with the loss of linear_dpo_loss: same arguments, metrics and results.

    ipo and sigmoid_norm divide by the numbers of scored tokens; TRL 1.16 counts one token too many
    where a sequence starts with its completion. What cannot be fused (a quantised head), and
    what linear_dpo_loss refuses (a beta of 0), is left to DPOTrainer, with one logged reason.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._install_heads()

    def _install_heads(self) -> None:
        models = [self.model.get_base_model() if is_peft_model(self.model) else self.model]
        if self.ref_model is not None:
            models.append(self.accelerator.unwrap_model(self.ref_model))
        for model in models:
            if not getattr(model, "_has_dpo_head", False):
                add_dpo_head(model)
                model._has_dpo_head = True

    def _not_fused(self) -> str | None:
        """Why DPOTrainer has to make this loss, or None."""
        try:
            make_options(**self._loss_options())
        except ValueError as error:
            return str(error)
        model = self.accelerator.unwrap_model(self.model)
        head = model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        text_config = model.config.get_text_config()
        if text_config is not model.config and Version(transformers.__version__) < Version("5"):
            return "vision-language models need transformers >= 5"
        if is_dtensor(weight):
            return None
        return head_not_served(weight, bias)

    def _compute_loss(self, model, inputs, return_outputs):
        reason = self._not_fused()
        if reason is not None:
            log_once("FusedDPOTrainer leaves the loss to DPOTrainer", reason)
            return super()._compute_loss(model, inputs, return_outputs)
        mode = "train" if self.model.training else "eval"
        model_kwargs, labels = _model_inputs(inputs)
        if self.precompute_ref_logps:
            reference_logps = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            of_adapter = is_peft_model(self.model) and self.ref_model is None
            reference_logps = self._score_reference(
                self.model if of_adapter else self.ref_model, model_kwargs, labels
            )
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        head = functools.partial(self._policy_head, reference_logps)
        out = model(**model_kwargs, **routed, labels=labels, dpo_head=head)
        loss = out["loss"]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * out["aux_loss"]
        self._record(mode, out, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**model_kwargs, **routed)

    def compute_ref_log_probs(self, model, inputs):
        self._install_heads()
        if self._not_fused() is not None:
            return super().compute_ref_log_probs(model, inputs)
        return self._score_reference(model, *_model_inputs(inputs))

    def _precompute_ref_logps(self, dataset, name, batch_size):
        # what other kernels cached under the model's hash differs in the last digits
        of_trl = self._precompute_model_hash
        self._precompute_model_hash = f"{of_trl}-dpo_kernels"
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = of_trl

    def _score_reference(self, model, model_kwargs: dict, labels: Tensor) -> tuple[Tensor, Tensor]:
        adapter: contextlib.AbstractContextManager = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            name = "ref" if "ref" in unwrapped.peft_config else None
            adapter = use_adapter(unwrapped, adapter_name=name)
        checkpointing = self.args.gradient_checkpointing_kwargs
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, checkpointing),
            adapter,
            self.accelerator.autocast(),
        ):
            out = model(**model_kwargs, labels=labels, dpo_head=self._reference_head)
        return out["logps"].chunk(2)

    def _reference_head(self, hidden, labels, weight, **head) -> dict[str, Tensor]:
        if self.ld_alpha is None:
            return {"logps": linear_sequence_logps(hidden, weight, labels, **head)}
        logps = linear_token_logps(hidden, weight, labels, shift=True, **head)
        layout = SequenceLayout(labels, None, -100, shift=True)
        return {"logps": layout.sequence_logps(logps.flatten(), False, self.ld_alpha)}

    def _policy_head(self, reference_logps, hidden, labels, weight, **head) -> dict[str, Tensor]:
        out, stats = linear_dpo_loss(
            hidden,
            weight,
            labels,
            *reference_logps,
            return_stats=True,
            **self._loss_options(),
            **head,
        )
        scored = labels[:, 1:] != -100
        counts = scored.sum(-1)
        chosen, rejected = counts.chunk(2)
        chosen_logits, rejected_logits = stats.mean_logits.sum(-1).chunk(2)
        return {
            "loss": out.loss,
            "pairs": torch.stack(
                (
                    out.chosen_rewards,
                    out.rejected_rewards,
                    (out.chosen_rewards > out.rejected_rewards).float(),
                    out.chosen_rewards - out.rejected_rewards,
                    out.chosen_logps,
                    out.rejected_logps,
                ),
                dim=-1,
            ),
            "sums": torch.stack(
                (stats.entropy.sum(), chosen_logits.sum(), rejected_logits.sum())
            ).float(),
            "counts": torch.stack(
                (counts.sum(), chosen.sum(), rejected.sum(), stats.is_top1.chunk(2)[0].sum())
            ),
        }

    def _loss_options(self) -> dict[str, Any]:
        """TRL's settings as make_options takes them: an option that no loss uses is left out."""
        names = list(self.loss_types)
        known = [LOSSES[name] for name in names if name in LOSSES]
        smoothing = self.label_smoothing if any(name in _SMOOTHED for name in names) else 0.0
        divergence = self.f_divergence_type
        if not any(loss.f_divergence for loss in known):
            divergence = "reverse_kl"
        divergences: dict[str, Any] = {"f_divergence": divergence}
        if divergence == "alpha_divergence":
            divergences["f_alpha_divergence_coef"] = self.f_alpha_divergence_coef
        tau = {"discopop_tau": self.args.discopop_tau} if "discopop" in names else {}
        if smoothing and "sigmoid" in names:
            plain = functools.partial(_plain_sigmoid, beta=self.beta, **divergences)
            names = [plain if name == "sigmoid" else name for name in names]
        return {
            "beta": self.beta,
            "loss_type": names,
            "loss_weights": self.loss_weights,
            "label_smoothing": smoothing,
            "ld_alpha": self.ld_alpha,
            "use_weighting": self.use_weighting,
            **divergences,
            **tau,
        }

    def _record(self, mode: str, out: dict[str, Tensor], inputs: dict) -> None:
        """Appends TRL's metrics as tensors: three gathers of a few numbers, no synchronisation."""
        metrics = self._metrics[mode]
        accelerator = self.accelerator
        sums = accelerator.gather_for_metrics(out["sums"][None]).sum(0)
        tokens = inputs["attention_mask"].sum()
        counts = torch.cat((out["counts"], tokens[None]))
        counts = accelerator.gather_for_metrics(counts[None]).sum(0)
        pairs = accelerator.gather(out["pairs"]).mean(0)
        scored, chosen, rejected, correct, tokens = counts.unbind()
        if mode == "train":
            self._total_train_tokens = self._total_train_tokens + tokens // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        values = {
            "entropy": _ratio(sums[0], scored),
            "logits/chosen": _ratio(sums[1], chosen),
            "logits/rejected": _ratio(sums[2], rejected),
            "mean_token_accuracy": _ratio(correct, chosen),
            "rewards/chosen": pairs[0],
            "rewards/rejected": pairs[1],
            "rewards/accuracies": pairs[2],
            "rewards/margins": pairs[3],
            "logps/chosen": pairs[4],
            "logps/rejected": pairs[5],
        }
        if self.aux_loss_enabled:
            aux_loss = out["aux_loss"].detach()
            values["aux_loss"] = accelerator.gather_for_metrics(aux_loss).mean()
        for name, value in values.items():
            metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        if isinstance(self._total_train_tokens, Tensor):
            self._total_train_tokens = int(self._total_train_tokens)
        if "num_tokens" in metrics:
            metrics["num_tokens"] = [self._total_train_tokens]
        names = [name for name, values in metrics.items() if isinstance(values[0], Tensor)]
        if names:
            means = torch.stack([torch.stack(metrics[name]).float().mean() for name in names])
            for name, value in zip(names, means.tolist(), strict=True):
                metrics[name] = [value]
        super().log(logs, start_time)


def _model_inputs(inputs: dict) -> tuple[dict, Tensor]:
    """What the model's forward takes, and the labels, -100 where nothing is scored."""
    model_kwargs = {k: v for k, v in inputs.items() if k not in _NOT_MODEL_INPUTS}
    model_kwargs["use_cache"] = False
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    # behind the virtual tokens of prompt learning, a first token would be scored
    labels[:, 0] = -100
    return model_kwargs, labels


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count.clamp(min=1), 0.0)


def _plain_sigmoid(chosen: Tensor, rejected: Tensor, **options) -> Tensor:
    zeros = torch.zeros_like(chosen)
    return preference_loss(chosen, rejected, zeros, zeros, **options)[0]


def add_dpo_head(model) -> None:
    """``model(..., labels=labels, dpo_head=f)`` runs the backbone and returns what f returns.

    ``f(hidden, labels, weight, bias=, logit_scale=, logit_softcap=)`` returns a dict of tensors, to
    which a mixture of experts adds ``aux_loss``. Without ``dpo_head`` the forward is what it was.
    """
    inner_forward = model.forward
    text_config = model.config.get_text_config()
    scaling = {
        "logit_scale": logit_scale_of(text_config),
        "logit_softcap": getattr(text_config, "final_logit_softcapping", None),
    }

    # generate checks its arguments against the signature
    @functools.wraps(type(model).forward)
    def forward(self, *args, dpo_head=None, labels=None, **kwargs):
        if dpo_head is None:
            given = {} if labels is None else {"labels": labels}
            return inner_forward(*args, **given, **kwargs)
        # the trainer gives the two together
        assert labels is not None
        outputs = self.base_model(*args, **kwargs)
        head = self.get_output_embeddings()
        # what TRL shards but by FSDP2 and ZeRO-3, it shards for tensor parallelism
        weight = whole("weight", head.weight, tensor_parallel=True)
        bias = whole("bias", getattr(head, "bias", None), tensor_parallel=True)
        hidden = outputs.last_hidden_state.to(weight.device)
        weight, bias, precision = head_in_trls_dtype(hidden, weight, bias)
        with precision:
            out = dpo_head(hidden, labels.to(weight.device), weight, bias=bias, **scaling)
        if kwargs.get("output_router_logits"):
            out["aux_loss"] = _load_balancing_loss(self, outputs, kwargs.get("attention_mask"))
        return out

    model.forward = types.MethodType(forward, model)


def _load_balancing_loss(model, outputs, attention_mask) -> Tensor:
    # every family of mixtures takes this loss from Mixtral
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or model.num_experts
    chosen = config.num_experts_per_tok
    return load_balancing_loss_func(outputs.router_logits, experts, chosen, attention_mask)
