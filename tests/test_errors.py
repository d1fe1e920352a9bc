"""Every bad argument is refused before a kernel runs, by a message that names it, says what came
and what was expected."""

from __future__ import annotations

import math

import pytest
import torch

import dpo_kernels
from dpo_kernels import BackendUnavailableError, DPOLoss, dispatch, dpo_loss, ops, preference_loss
from dpo_kernels.backends.batch import GradOutput, TokenBatch
from dpo_kernels.dispatch import BACKENDS, available_backends
from dpo_kernels.losses import LOSSES

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


def assert_refused(case, call) -> None:
    arguments, error, parts = case
    with pytest.raises(error) as raised:
        call(arguments)
    message = str(raised.value)
    assert message.startswith(parts[0]) or parts[0] in message.split(":")[0]
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


@pytest.mark.parametrize("name", BAD_CALLS)
def test_dpo_loss_refuses(name):
    assert_refused(BAD_CALLS[name], lambda changed: dpo_loss(**{**BASE, **changed}))


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_refused(name):
    case = BAD_OPTIONS[name]
    assert_refused(case, lambda changed: preference_loss(REF, REF, REF, REF, **changed))
    assert_refused(case, lambda changed: dpo_loss(**BASE, **changed))
    assert_refused(case, lambda changed: DPOLoss(**changed))


@pytest.mark.parametrize("name", LOSSES)
def test_options_a_loss_does_not_take(name):
    """Rejected, never dropped."""
    smoothing = 0.1 if name == "exo_pair" else 0.0
    refused = []
    for options in (
        {"label_smoothing": 0.1},
        {"f_divergence": "js_divergence"},
        {"chosen_lengths": torch.ones(2), "rejected_lengths": torch.ones(2)},
    ):
        arguments = {"loss_type": name, "label_smoothing": smoothing, **options}
        try:
            preference_loss(REF, REF, REF, REF, **arguments)
        except ValueError as error:
            assert "does not take" in str(error)
            refused.append(next(iter(options)))
    loss = LOSSES[name]
    taken = {
        "label_smoothing": loss.label_smoothing,
        "f_divergence": loss.f_divergence,
        "chosen_lengths": loss.lengths,
    }
    assert refused == [option for option, takes in taken.items() if not takes]


@pytest.mark.parametrize("function", ("token_logps", "token_stats", "sequence_logps"))
def test_other_functions_refuse(function):
    def call(changed):
        getattr(dpo_kernels, function)(**{"logits": LOGITS, "labels": LABELS, **changed})

    for case in (
        ({"logits": None}, TypeError, ("logits", "NoneType", "tensor")),
        ({"logits": LOGITS.int()}, TypeError, ("logits", "int32", "float32")),
        ({"logits": LOGITS[0, 0]}, ValueError, ("logits", "[5]", "vocabulary")),
        ({"labels": None}, TypeError, ("labels", "NoneType", "tensor")),
        ({"labels": LABELS.float()}, TypeError, ("labels", "float32", "integer")),
        ({"labels": LABELS[1:]}, ValueError, ("labels", "[3, 3]", "[4, 3]")),
        ({"temperature": -1.0}, ValueError, ("temperature", "-1.0", "positive")),
        ({"ignore_index": None}, TypeError, ("ignore_index", "NoneType", "integer")),
        ({"backend": "numpy"}, ValueError, ("backend", "'numpy'", "torch")),
    ):
        assert_refused(case, call)


HIDDEN_BASE = {
    "hidden": torch.zeros(4, 3, 6),
    "weight": torch.zeros(5, 6),
    "labels": LABELS,
}


@pytest.mark.parametrize("frozen", (False, True), ids=("trainable", "frozen"))
@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_refused_from_hidden_states(name, frozen):
    """By one rule on every path, whether or not the head is trained."""

    def call(changed):
        weight = torch.zeros(5, 6, requires_grad=not frozen)
        references = {"reference_chosen_logps": REF, "reference_rejected_logps": REF}
        dpo_kernels.linear_dpo_loss(**{**HIDDEN_BASE, **references, "weight": weight, **changed})

    assert_refused(BAD_OPTIONS[name], call)


def test_reference_hidden_refused():
    def call(changed):
        dpo_kernels.linear_dpo_loss(**{**HIDDEN_BASE, **changed})

    free = {"reference_hidden": HIDDEN_BASE["hidden"], "reference_free": True}
    assert_refused((free, ValueError, ("reference_hidden", "reference_free=True")), call)
    missing = ("reference_chosen_logps", "reference_hidden", "reference_free")
    assert_refused(({}, ValueError, missing), call)


@pytest.mark.parametrize("function", ("token_logps", "sequence_logps"))
def test_in_place_refused(function):
    def call(changed):
        getattr(dpo_kernels, function)(labels=LABELS, inplace_backward=True, **changed)

    leaf, expanded = LOGITS.clone().requires_grad_(), LOGITS[:1].expand(4, 3, 5)
    assert_refused(({"logits": leaf}, ValueError, ("inplace_backward", "leaf")), call)
    assert_refused(({"logits": expanded}, ValueError, ("inplace_backward", "expanded")), call)


def test_preference_loss_refuses_tensors():
    def call(changed):
        names = ("policy_chosen_logps", "policy_rejected_logps")
        names += ("reference_chosen_logps", "reference_rejected_logps")
        preference_loss(**{**dict.fromkeys(names, REF), **changed})

    for case in (
        ({"policy_chosen_logps": [0.0]}, TypeError, ("policy_chosen_logps", "list", "tensor")),
        ({"policy_rejected_logps": None}, TypeError, ("policy_rejected_logps", "NoneType")),
        ({"policy_rejected_logps": REF.long()}, TypeError, ("policy_rejected_logps", "int64")),
        ({"policy_rejected_logps": REF[:1]}, ValueError, ("policy_rejected_logps", "[1]", "[2]")),
        ({"policy_chosen_logps": REF[None]}, ValueError, ("policy_chosen_logps", "[1, 2]")),
        ({"reference_chosen_logps": REF[:1]}, ValueError, ("reference_chosen_logps", "[1]", "[2]")),
        ({"reference_chosen_logps": None}, ValueError, ("reference_chosen_logps", "both")),
        ({"chosen_lengths": REF, "loss_type": "ipo"}, ValueError, ("chosen_lengths", "both")),
        (
            {"chosen_lengths": REF[:1], "rejected_lengths": REF, "loss_type": "ipo"},
            ValueError,
            ("chosen_lengths", "[1]", "[2]"),
        ),
    ):
        assert_refused(case, call)


def test_callable_must_return_one_loss_a_pair():
    for function, came in ((lambda c, r: (c - r).sum(), "[]"), (lambda c, r: 0.0, "float")):
        case = ({"loss_type": function}, ValueError, ("loss_type", came, "[2]"))
        assert_refused(case, lambda changed: preference_loss(REF, REF, REF, REF, **changed))
        assert_refused(case, lambda changed: dpo_loss(**BASE, **changed))


def test_module_refuses_unknown_options():
    for options in ({"betta": 0.1}, {"cu_seqlens": CU}, {"reference_logits": LOGITS}):
        name = next(iter(options))
        with pytest.raises(TypeError, match=f"^{name}: dpo_loss takes .*temperature"):
            DPOLoss(**options)


# values of labels


@pytest.mark.parametrize("bad", (5, -1, 2**40, -(2**63)))
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_label_out_of_range(target, bad, packed):
    """On a CPU it raises with its position; on a GPU its row is NaN, never read out of bounds."""
    arguments = {k: v.to(target.device) for k, v in (PACKED if packed else BASE).items()}
    refs = (REF.to(target.device),) * 2
    labels = arguments["labels"] = arguments["labels"].clone()
    labels.view(-1)[7] = bad
    logits = arguments.pop("policy_logits").requires_grad_()
    position = r"\[(0, )?7\]" if packed else r"\[2, 1\]"
    options = {"cu_seqlens": arguments.get("cu_seqlens"), "backend": target.backend}

    def sequences():
        return dpo_kernels.sequence_logps(logits, labels, **options)

    def tokens():
        return dpo_kernels.token_logps(logits, labels, backend=target.backend)

    def pairs():
        return dpo_loss(logits, labels, *refs, **options).losses

    if target.device == "cpu":
        for call in (sequences, tokens, pairs):
            with pytest.raises(
                ValueError, match=rf"^labels{position}: .*0 <= label < 5, got {bad}$"
            ):
                call()
        return
    out = tokens()
    assert out.view(-1).isnan().nonzero().tolist() == [[7]]
    grad = torch.autograd.grad(out.sum(), logits)[0].view(12, 5)
    assert grad.isnan().any(-1).nonzero().tolist() == [[7]] and grad[7].isnan().all()
    assert sequences().isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("bad", (5, -1, 2**40, -(2**63)))
@pytest.mark.parametrize("shift", (False, True))
def test_torch_backend_never_indexes_with_a_bad_label(bad, shift):
    """Called as on a GPU, where nobody has looked at the labels: a row of NaN, the others as ever.

    There an index out of bounds ends the CUDA context, and every later call of the process.
    """
    module = dispatch.backend_module("torch")
    logits = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    outputs = []
    for label in (1, bad):
        labels = LABELS.clone()
        labels[2, 1] = label
        batch = TokenBatch(logits, labels, None, -100, shift)
        out = ops.make_outputs(batch, stats=True)
        module.forward(batch, None, out)
        grad_logits = torch.empty_like(logits)
        grad_output = GradOutput(torch.ones(12), 1, "token", None)
        module.backward(batch, out.tokens, grad_output, grad_logits, True)
        outputs.append((out.tokens[0].view(4, 3), grad_logits))
    (clean, clean_grad), (logps, grad) = outputs
    row = 1 - shift
    assert logps.isnan().nonzero().tolist() == [[2, 1]]
    assert grad.isnan().all(-1).nonzero().tolist() == [[2, row]]
    logps[2, 1], grad[2, row] = clean[2, 1], clean_grad[2, row]
    assert torch.equal(logps, clean) and torch.equal(grad, clean_grad)


def test_label_out_of_range_where_nothing_is_scored(target):
    """With shift the first label of a sequence scores nothing, whatever it holds."""
    labels = LABELS.clone().to(target.device)
    labels[:, 0] = 10**12
    out = dpo_kernels.sequence_logps(LOGITS.to(target.device), labels, backend=target.backend)
    assert out.tolist() == pytest.approx([-2 * math.log(5)] * 4)


@pytest.mark.gpu
def test_validation_on_a_gpu(monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_VALIDATE", "1")
    labels = LABELS.clone().cuda()
    labels[2, 1] = 5
    with pytest.raises(ValueError, match=r"^labels\[2, 1\]: .*got 5"):
        dpo_kernels.token_logps(LOGITS.cuda(), labels)


def test_bad_cu_seqlens_on_every_backend(target):
    if target.device != "cpu":
        pytest.skip("on a GPU the values of cu_seqlens are not waited for")
    for bounds in ([0, 3, 6, 9, 13], [1, 3, 6, 9, 12], [0, 6, 3, 9, 12], [0, 3, 6, 9, 11]):
        with pytest.raises(ValueError, match=r"^cu_seqlens: expected to rise from 0"):
            dpo_kernels.sequence_logps(
                PACKED["policy_logits"],
                PACKED["labels"],
                cu_seqlens=torch.tensor(bounds),
                backend=target.backend,
            )


# backends


def test_the_kernels_are_available():
    """Nothing of the suite skips for want of a backend, except what needs a GPU."""
    reasons = available_backends()
    assert set(reasons) == set(BACKENDS)
    assert {name: reasons[name] for name in ("cpu", "torch", "triton")} == dict.fromkeys(
        ("cpu", "torch", "triton")
    )
    if not torch.cuda.is_available():
        assert reasons["cuda"]


@pytest.fixture
def fresh_dispatch(monkeypatch):
    monkeypatch.setattr(dispatch, "_resolved", {})
    monkeypatch.delenv("DPO_KERNELS_BACKEND", raising=False)


def test_backend_by_name_serves_or_says_why(fresh_dispatch):
    if available_backends()["cuda"] is None:
        pytest.skip("the cuda backend is available here")
    reason = available_backends()["cuda"]
    with pytest.raises(BackendUnavailableError) as raised:
        dpo_kernels.token_logps(LOGITS, LABELS, backend="cuda")
    assert "'cuda'" in str(raised.value) and reason in str(raised.value)
    with pytest.raises(BackendUnavailableError, match=r"'triton'.*float64"):
        dpo_kernels.token_logps(LOGITS.double(), LABELS, backend="triton")


@pytest.mark.gpu
def test_cpu_backend_refuses_gpu_tensors(fresh_dispatch):
    with pytest.raises(BackendUnavailableError, match=r"'cpu'.*cuda"):
        dpo_kernels.token_logps(LOGITS.cuda(), LABELS.cuda(), backend="cpu")


@pytest.mark.parametrize("backend", ("torch", "cpu"))
def test_environment_chooses(fresh_dispatch, monkeypatch, backend):
    monkeypatch.setenv("DPO_KERNELS_BACKEND", backend)
    calls = []
    module = dispatch.backend_module(backend)
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda *args: calls.append(1) or forward(*args))
    dpo_kernels.token_logps(LOGITS, LABELS)
    assert calls == [1]
    # an argument comes first
    other = {"torch": "cpu", "cpu": "torch"}[backend]
    dpo_kernels.token_logps(LOGITS, LABELS, backend=other)
    assert calls == [1]


def test_environment_is_checked(fresh_dispatch, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"^DPO_KERNELS_BACKEND: 'fast' .*cuda, triton"):
        dpo_kernels.token_logps(LOGITS, LABELS)


def test_automatic_choice_falls_back_and_says_so_once(fresh_dispatch, monkeypatch, caplog):
    monkeypatch.setattr(dispatch.backend_module("cpu"), "unavailable", lambda: "not built")
    for _ in range(3):
        out = dpo_kernels.token_logps(LOGITS, LABELS)
    assert out[0, 0].item() == pytest.approx(-math.log(5))
    messages = [r.getMessage() for r in caplog.records if r.name == "dpo_kernels"]
    assert len(messages) == 1
    assert "torch backend" in messages[0] and "cpu: not built" in messages[0]


def test_automatic_choice_on_the_cpu_is_silent(fresh_dispatch, caplog):
    module = dispatch.resolve("", torch.device("cpu"), torch.float32)
    assert module is dispatch.backend_module("cpu")
    assert not [r for r in caplog.records if r.name == "dpo_kernels"]
