"""Calls that are refused, and what the message must say: the name, what came, what was expected."""

from __future__ import annotations

import math

import torch

LOGITS = torch.zeros(4, 3, 5)
LABELS = torch.ones(4, 3, dtype=torch.int64)
REF = torch.zeros(2)
CU = torch.tensor([0, 3, 6, 9, 12])
PACKED = {"policy_logits": torch.zeros(12, 5), "labels": LABELS.flatten(), "cu_seqlens": CU}
BASE = {
    "policy_logits": LOGITS,
    "labels": LABELS,
    "reference_chosen_logps": REF,
    "reference_rejected_logps": REF,
}

# (arguments over BASE, error, what the message must say: the name, what came, what was expected)
BAD_CALLS = {
    "logits no tensor": (
        {"policy_logits": [[1.0]]},
        TypeError,
        ("policy_logits", "list", "tensor"),
    ),
    "logits integer": (
        {"policy_logits": LOGITS.long()},
        TypeError,
        ("policy_logits", "int64", "float32"),
    ),
    "logits float8": (
        {"policy_logits": LOGITS.to(torch.float8_e4m3fn)},
        TypeError,
        ("policy_logits", "float8", "float32"),
    ),
    "logits 1-D": (
        {"policy_logits": LOGITS[0, 0]},
        ValueError,
        ("policy_logits", "[5]", "vocabulary"),
    ),
    "logits 2-D": (
        {"policy_logits": LOGITS[0], "labels": LABELS[0]},
        ValueError,
        ("policy_logits", "[3, 5]", "three dimensions", "cu_seqlens"),
    ),
    "logits 4-D": (
        {"policy_logits": LOGITS[None], "labels": LABELS[None]},
        ValueError,
        ("policy_logits", "[1, 4, 3, 5]", "three dimensions"),
    ),
    "no vocabulary": (
        {"policy_logits": torch.zeros(4, 3, 0)},
        ValueError,
        ("policy_logits", "[4, 3, 0]", "vocabulary"),
    ),
    "odd number of rows": (
        {"policy_logits": LOGITS[:3], "labels": LABELS[:3]},
        ValueError,
        ("policy_logits", "3", "even"),
    ),
    "labels no tensor": ({"labels": [[1]]}, TypeError, ("labels", "list", "tensor")),
    "labels float": ({"labels": LABELS.float()}, TypeError, ("labels", "float32", "integer")),
    "labels bool": ({"labels": LABELS.bool()}, TypeError, ("labels", "bool", "integer")),
    "labels short": ({"labels": LABELS[:, 1:]}, ValueError, ("labels", "[4, 2]", "[4, 3]")),
    "labels elsewhere": ({"labels": LABELS.to("meta")}, ValueError, ("labels", "meta", "cpu")),
    "cu_seqlens list": (
        {**PACKED, "cu_seqlens": [0, 12]},
        TypeError,
        ("cu_seqlens", "list", "tensor"),
    ),
    "cu_seqlens float": (
        {**PACKED, "cu_seqlens": CU.float()},
        TypeError,
        ("cu_seqlens", "float32", "int64 or int32"),
    ),
    "cu_seqlens 2-D": (
        {**PACKED, "cu_seqlens": CU[None]},
        ValueError,
        ("cu_seqlens", "[1, 5]", "one dimension"),
    ),
    "cu_seqlens empty": (
        {**PACKED, "cu_seqlens": CU[:0]},
        ValueError,
        ("cu_seqlens", "[0]", "one dimension"),
    ),
    "cu_seqlens elsewhere": (
        {**PACKED, "cu_seqlens": CU.to("meta")},
        ValueError,
        ("cu_seqlens", "meta", "cpu"),
    ),
    "cu_seqlens with padded": (
        {"cu_seqlens": CU},
        ValueError,
        ("cu_seqlens", "3", "two dimensions"),
    ),
    "cu_seqlens odd": ({**PACKED, "cu_seqlens": CU[:-1]}, ValueError, ("cu_seqlens", "3", "even")),
    "cu_seqlens start": (
        {**PACKED, "cu_seqlens": CU + torch.tensor([1, 0, 0, 0, 0])},
        ValueError,
        ("cu_seqlens", "[1, 3, 6, 9, 12]", "from 0 to the number of rows, 12"),
    ),
    "cu_seqlens end": (
        {**PACKED, "cu_seqlens": torch.tensor([0, 3, 6, 9, 13])},
        ValueError,
        ("cu_seqlens", "[0, 3, 6, 9, 13]", "12"),
    ),
    "cu_seqlens falling": (
        {**PACKED, "cu_seqlens": torch.tensor([0, 6, 3, 9, 12])},
        ValueError,
        ("cu_seqlens", "[0, 6, 3, 9, 12]", "rise"),
    ),
    "reference missing": (
        {"reference_chosen_logps": None, "reference_rejected_logps": None},
        ValueError,
        ("reference_chosen_logps", "reference_logits", "reference_free"),
    ),
    "one reference missing": (
        {"reference_rejected_logps": None},
        ValueError,
        ("reference_rejected_logps", "both"),
    ),
    "reference not wanted": (
        {"reference_free": True},
        ValueError,
        ("reference_chosen_logps", "reference_free=True"),
    ),
    "reference twice": (
        {"reference_logits": LOGITS},
        ValueError,
        ("reference_logits", "beside", "one of them"),
    ),
    "reference shape": (
        {"reference_chosen_logps": torch.zeros(4)},
        ValueError,
        ("reference_chosen_logps", "[4]", "[2]"),
    ),
    "reference type": (
        {"reference_rejected_logps": [0.0, 0.0]},
        TypeError,
        ("reference_rejected_logps", "list", "tensor"),
    ),
    "reference integer": (
        {"reference_rejected_logps": REF.long()},
        TypeError,
        ("reference_rejected_logps", "int64", "floating"),
    ),
    "reference elsewhere": (
        {"reference_rejected_logps": REF.to("meta")},
        ValueError,
        ("reference_rejected_logps", "meta", "cpu"),
    ),
    "reference logits shape": (
        {
            "reference_chosen_logps": None,
            "reference_rejected_logps": None,
            "reference_logits": LOGITS[:, 1:],
        },
        ValueError,
        ("labels", "[4, 3]", "[4, 2]", "reference_logits"),
    ),
    "reference logits type": (
        {
            "reference_chosen_logps": None,
            "reference_rejected_logps": None,
            "reference_logits": LOGITS.long(),
        },
        TypeError,
        ("reference_logits", "int64", "float32"),
    ),
    "temperature zero": ({"temperature": 0.0}, ValueError, ("temperature", "0.0", "positive")),
    "temperature nan": ({"temperature": math.nan}, ValueError, ("temperature", "nan", "positive")),
    "temperature inf": ({"temperature": math.inf}, ValueError, ("temperature", "inf", "positive")),
    "temperature text": ({"temperature": "1"}, TypeError, ("temperature", "str", "number")),
    "reduction": ({"reduction": "avg"}, ValueError, ("reduction", "'avg'", "mean, sum, none")),
    "reduction None": ({"reduction": None}, ValueError, ("reduction", "None", "mean, sum, none")),
    "ignore_index": ({"ignore_index": -100.0}, TypeError, ("ignore_index", "float", "integer")),
    "ignore_index text": ({"ignore_index": "x"}, TypeError, ("ignore_index", "str", "integer")),
    "ld_alpha": ({"ld_alpha": -0.1}, ValueError, ("ld_alpha", "-0.1", "0 <= ld_alpha <= 1")),
    "ld_alpha above": ({"ld_alpha": 1.5}, ValueError, ("ld_alpha", "1.5", "0 <= ld_alpha <= 1")),
    "ld_alpha text": ({"ld_alpha": "x"}, TypeError, ("ld_alpha", "str", "number")),
    "backend": ({"backend": "gpu"}, ValueError, ("backend", "'gpu'", "cuda, triton, cpu, torch")),
    "in place": (
        {"policy_logits": LOGITS[:1].expand(4, 3, 5), "inplace_backward": True},
        ValueError,
        ("inplace_backward", "expanded"),
    ),
    "in place of a leaf": (
        {"policy_logits": LOGITS.clone().requires_grad_(), "inplace_backward": True},
        ValueError,
        ("inplace_backward", "leaf", "output of a model"),
    ),
    "reference logits not wanted": (
        {
            "reference_chosen_logps": None,
            "reference_rejected_logps": None,
            "reference_logits": LOGITS,
            "reference_free": True,
        },
        ValueError,
        ("reference_logits", "reference_free=True"),
    ),
    "temperature with a gradient": (
        {"temperature": torch.tensor(1.0, requires_grad=True)},
        TypeError,
        ("temperature", "Tensor", "number"),
    ),
    "ld_alpha with a gradient": (
        {"ld_alpha": torch.tensor(0.5, requires_grad=True)},
        TypeError,
        ("ld_alpha", "Tensor", "number"),
    ),
}

# options of the loss: refused by preference_loss, dpo_loss and the module's constructor alike
BAD_OPTIONS = {
    "beta zero": ({"beta": 0.0}, ValueError, ("beta", "0.0", "positive")),
    "beta negative": ({"beta": -0.1}, ValueError, ("beta", "-0.1", "positive")),
    "beta nan": ({"beta": math.nan}, ValueError, ("beta", "nan", "positive")),
    "beta inf": ({"beta": math.inf}, ValueError, ("beta", "inf", "positive")),
    "beta text": ({"beta": "0.1"}, TypeError, ("beta", "str", "number")),
    "beta tensor": ({"beta": torch.tensor(0.1)}, TypeError, ("beta", "Tensor", "number")),
    "loss_type": ({"loss_type": "dpo"}, ValueError, ("loss_type", "'dpo'", "sigmoid, ")),
    "loss_type in a list": (
        {"loss_type": ["sigmoid", "dpo"]},
        ValueError,
        ("loss_type", "'dpo'", "sigmoid, "),
    ),
    "loss_type empty": ({"loss_type": []}, ValueError, ("loss_type", "empty list", "loss")),
    "loss_weights": (
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]},
        ValueError,
        ("loss_weights", "each of 2 losses", "got 1"),
    ),
    "loss_type set": (
        {"loss_type": {"sigmoid", "ipo"}},
        TypeError,
        ("loss_type", "set", "list"),
    ),
    "loss_type None": ({"loss_type": None}, TypeError, ("loss_type", "NoneType", "name")),
    "loss_type nested": (
        {"loss_type": [["sigmoid"]]},
        TypeError,
        ("loss_type", "got list", "names"),
    ),
    "loss_type weighted twice": (
        {"loss_type": {"sigmoid": 0.5}, "loss_weights": [1.0]},
        ValueError,
        ("loss_weights", "dict"),
    ),
    "loss_weights number": (
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": 1.0},
        TypeError,
        ("loss_weights", "float", "list"),
    ),
    "loss_weights text": (
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": ["a", "b"]},
        TypeError,
        ("loss_weights", "str", "number"),
    ),
    "loss_weights with a gradient": (
        {"loss_type": ["sigmoid"], "loss_weights": [torch.tensor(0.5, requires_grad=True)]},
        TypeError,
        ("loss_weights", "Tensor", "number"),
    ),
    "loss_type weighted by a tensor": (
        {"loss_type": {"sigmoid": torch.tensor(0.5, requires_grad=True)}},
        TypeError,
        ("loss_type['sigmoid']", "Tensor", "number"),
    ),
    "smoothing one": ({"label_smoothing": 1.0}, ValueError, ("label_smoothing", "1.0", "< 1")),
    "smoothing negative": ({"label_smoothing": -0.1}, ValueError, ("label_smoothing", "-0.1")),
    "smoothing text": ({"label_smoothing": "x"}, TypeError, ("label_smoothing", "str", "number")),
    "smoothing robust": (
        {"loss_type": "robust", "label_smoothing": 0.5},
        ValueError,
        ("label_smoothing", "robust", "< 0.5", "0.5"),
    ),
    "smoothing exo_pair": (
        {"loss_type": "exo_pair"},
        ValueError,
        ("label_smoothing", "exo_pair", "> 0", "got 0"),
    ),
    "f_divergence": ({"f_divergence": "kl"}, ValueError, ("f_divergence", "'kl'", "reverse_kl")),
    "tau": ({"loss_type": "discopop", "discopop_tau": 0.0}, ValueError, ("discopop_tau", "0.0")),
    "gamma": ({"loss_type": "simpo", "simpo_gamma": None}, TypeError, ("simpo_gamma", "NoneType")),
    "alpha": (
        {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": "half"},
        TypeError,
        ("f_alpha_divergence_coef", "str", "number"),
    ),
    "tau dropped": ({"discopop_tau": 0.1}, ValueError, ("discopop_tau", "sigmoid", "0.1")),
    "gamma dropped": ({"simpo_gamma": 0.1}, ValueError, ("simpo_gamma", "sigmoid", "0.1")),
    "alpha dropped": (
        {"f_alpha_divergence_coef": 0.1},
        ValueError,
        ("f_alpha_divergence_coef", "reverse_kl", "0.1"),
    ),
}
