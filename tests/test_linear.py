"""From hidden states: values and gradients against float64, for every layout, loss and option."""

from __future__ import annotations

import math

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels import reference
from dpo_kernels.losses import LOSSES
from tests.helpers import (
    DTYPES,
    IGNORE,
    Target,
    acc_eps,
    assert_rule,
    assert_same_bits,
    skip_if_refused,
)
from tests.linear_helpers import CPU, gradient_error, logp_error, make_head, with_gradients

# room for a handful of rows, so that a batch takes several tiles and groups; and for one row, so
# that every pair outgrows it
WORKSPACES = [None, 0.01, 1e-6]


def dpo_options(problem, reference_kind: str) -> tuple[tuple, dict]:
    if reference_kind == "logps":
        return problem.reference_logps, problem.head
    return (), {**problem.head, "reference_hidden": problem.reference_hidden}


@pytest.mark.parametrize("workspace_mb", WORKSPACES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_dpo_loss_obeys_the_rule(target, dtype, packed, frozen, workspace_mb):
    skip_if_refused(target, dtype)
    problem = make_head(target, dtype, packed=packed, frozen=frozen, seed=int(packed))
    args, options = dpo_options(problem, "logps" if packed else "hidden")
    ours, grads = with_gradients(
        dk.linear_dpo_loss,
        problem,
        *args,
        **options,
        workspace_mb=workspace_mb,
        backend=target.backend,
    )
    results = {}
    for name, kind in (("theirs", dtype), ("truth", torch.float64)):
        same = problem.to(kind)
        args, options = dpo_options(same, "logps" if packed else "hidden")
        results[name] = with_gradients(reference.linear_dpo_loss, same, *args, **options)
    (theirs, their_grads), (truth, true_grads) = results["theirs"], results["truth"]
    tokens = problem.labels.shape[-1]
    error = tokens * logp_error(problem, dtype)
    for name, tolerance in (
        ("chosen_logps", error),
        ("rejected_logps", error),
        ("chosen_rewards", error),
        ("losses", error),
        ("loss", error),
    ):
        got = [getattr(out, name) for out in (ours, theirs, truth)]
        assert_rule(name, *got, tolerance)
    # each pair weighs at most beta / P, each row or column of dlogits sums to at most 2 in size
    derivative = 0.1 / (problem.reference_logps[0].shape[0])
    hidden, weight = problem.hidden.detach().double(), problem.weight.detach().double()
    rows = int((problem.labels != IGNORE).sum())
    bounds = (
        2 * derivative * weight.abs().max(),
        rows * derivative * hidden.abs().max(),
        rows * derivative,
    )
    for leaf, got, their, true, bound in zip(
        problem.trainable, grads, their_grads, true_grads, bounds, strict=False
    ):
        assert got.dtype == dtype and got.shape == leaf.shape
        tolerance = gradient_error(true, torch.as_tensor(bound), target, dtype)
        # the coefficient of a pair errs as its log-ratio does
        assert_rule("gradient", got, their, true, tolerance + error * true.abs())


def _average(c, r):
    # couples the pairs, so its derivatives are known only when all log-probs are
    return (c - r - (c - r).mean()) ** 2


OPTIONS = [
    *({"loss_type": name} for name in LOSSES if name != "exo_pair"),
    {"loss_type": "exo_pair", "label_smoothing": 0.1},
    {"label_smoothing": 0.2},
    {"loss_type": ["sigmoid", "sft", "bco_pair"], "loss_weights": [1.0, 0.5, -0.25]},
    {"loss_type": _average},
    {"f_divergence": "forward_kl"},
    {"f_divergence": "js_divergence"},
    {"f_divergence": "alpha", "f_alpha_divergence_coef": 0.3},
    {"ld_alpha": 0.3},
    {"ld_alpha": 0.3, "average_log_prob": True},
    {"use_weighting": True},
    {"use_weighting": True, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    {"average_log_prob": True},
    {"loss_type": "simpo", "average_log_prob": True},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"reference_free": True},
    {"shift": False},
    {"logit_scale": 0.25, "logit_softcap": 5.0, "temperature": 0.7},
    {"logit_softcap": 30.0},
]


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
# a function's own name holds an address, and the processes of xdist must agree on the ids
@pytest.mark.parametrize("options", OPTIONS, ids=lambda x: str(x).split(" at 0x")[0])
def test_every_option_in_float64(options, packed, frozen):
    problem = make_head(CPU, torch.float64, packed=packed, frozen=frozen)
    losses = options.get("loss_type")
    args, head = dpo_options(problem, "hidden")
    if losses in ("sft", "simpo") or options.get("reference_free"):
        head.pop("reference_hidden")
    ours = dk.linear_dpo_loss(
        problem.hidden, problem.weight, problem.labels, *args, **head, **options, workspace_mb=0.01
    )
    truth = reference.linear_dpo_loss(
        problem.hidden, problem.weight, problem.labels, *args, **head, **options
    )
    grad_output = torch.linspace(0.5, 2.0, truth.loss.numel(), dtype=torch.float64)
    grad_output = grad_output.view(truth.loss.shape)
    got = torch.autograd.grad(ours.loss, problem.trainable, grad_output)
    want = torch.autograd.grad(truth.loss, problem.trainable, grad_output)
    fields = ("loss", "losses", "chosen_logps", "rejected_logps", "chosen_rewards")
    pairs = [(getattr(ours, name), getattr(truth, name)) for name in fields]
    for a, b in (*pairs, *zip(got, want, strict=True)):
        # a float64 computation in another order: some hundreds of roundings
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_token_stats_obey_the_rule(target, dtype, shift, frozen):
    skip_if_refused(target, dtype)
    problem = make_head(target, dtype, frozen=frozen)
    options = {"bias": problem.bias, "shift": shift, "logit_softcap": 8.0, "temperature": 0.9}
    ours = dk.linear_token_stats(
        problem.hidden, problem.weight, problem.labels, **options, backend=target.backend
    )
    alone = dk.linear_token_logps(
        problem.hidden, problem.weight, problem.labels, **options, backend=target.backend
    )
    assert_same_bits(ours.logps, alone)
    found = {}
    for name, kind in (("theirs", dtype), ("truth", torch.float64)):
        same = problem.to(kind)
        found[name] = reference.linear_token_stats(
            same.hidden, same.weight, same.labels, **{**options, "bias": same.bias}
        )
    error = logp_error(problem, dtype)
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        got = [getattr(x, name) for x in (ours, found["theirs"], found["truth"])]
        # the entropy's derivative with respect to a logit is at most log V
        assert_rule(name, *got, error * (1 + math.log(67)))
    assert torch.equal(ours.is_top1, found["truth"].is_top1)
    assert not ours.entropy.requires_grad


def test_any_number_of_leading_dimensions():
    problem = make_head(CPU, torch.float64)
    hidden, labels = problem.hidden.detach(), problem.labels
    for shape in ((6, 6), (3, 2, 6), (36,)):
        got = dk.linear_token_logps(
            hidden.reshape(*shape, -1).requires_grad_(), problem.weight, labels.reshape(shape)
        )
        want = reference.linear_token_logps(hidden, problem.weight, labels)
        torch.testing.assert_close(got, want.reshape(shape), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sequence_logps_under_a_loss_of_ones_own(packed, frozen, average):
    problem = make_head(CPU, torch.float64, packed=packed, frozen=frozen)

    def loss_of(function, **rest):
        logps = function(
            problem.hidden,
            problem.weight,
            problem.labels,
            **problem.head,
            average_log_prob=average,
            **rest,
        )
        return logps.sin().square().sum()

    got = torch.autograd.grad(
        loss_of(dk.linear_sequence_logps, workspace_mb=0.01), problem.trainable
    )
    want = torch.autograd.grad(loss_of(reference.linear_sequence_logps), problem.trainable)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_one_softmax_for_a_policy_that_equals_its_reference():
    """Exactly ln 2, whichever head the reference has and however the rows are tiled."""
    for frozen in (False, True):
        for workspace in WORKSPACES:
            for copied in (False, True):
                problem = make_head(CPU, torch.bfloat16, frozen=frozen, vocab=301, bias=False)
                out = dk.linear_dpo_loss(
                    problem.hidden,
                    problem.weight,
                    problem.labels,
                    reference_hidden=problem.hidden.detach().clone(),
                    reference_weight=problem.weight.detach().clone() if copied else None,
                    workspace_mb=workspace,
                )
                assert out.loss.item() == torch.tensor(math.log(2)).item()
                assert not out.chosen_rewards.any()


def test_reference_head_of_another_hidden_size():
    problem = make_head(CPU, torch.float64)
    small = make_head(CPU, torch.float64, hidden_size=10, seed=1)
    head = {
        "bias": problem.bias,
        "reference_hidden": small.hidden.detach(),
        "reference_weight": small.weight.detach(),
        "reference_bias": small.bias.detach(),
    }
    ours, got = with_gradients(dk.linear_dpo_loss, problem, **head, workspace_mb=0.01)
    truth, want = with_gradients(reference.linear_dpo_loss, problem, **head)
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-12, atol=0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("wide", ["policy", "reference"])
def test_reference_of_another_dtype(wide, frozen):
    """float64 for one model and float32 for the other: results are the policy's."""
    policy, other = torch.float32, torch.float64
    policy, other = (other, policy) if wide == "policy" else (policy, other)
    problem = make_head(CPU, policy, frozen=frozen, bias=False)
    head = {
        "reference_hidden": problem.reference_hidden.to(other),
        "reference_weight": problem.weight.detach().to(other),
    }
    args = (problem.hidden, problem.weight, problem.labels)
    ours, truth = dk.linear_dpo_loss(*args, **head), reference.linear_dpo_loss(*args, **head)
    assert ours.loss.dtype == policy
    torch.testing.assert_close(ours.loss.double(), truth.loss.double(), rtol=1e-5, atol=0)


def test_views_of_hidden_and_weight():
    """Strides as models leave them: slices of a longer sequence and of a padded vocabulary."""
    problem = make_head(CPU, torch.float32, bias=False)
    wide = torch.full((6, 9, 24), math.nan)
    wide[:, 2:8] = problem.hidden.detach()
    tall = torch.full((24, 80), math.nan)
    tall[:, 5:72] = problem.weight.detach().t()
    hidden = wide[:, 2:8].requires_grad_()
    weight = tall.t()[5:72].requires_grad_()
    options = {"reference_hidden": problem.reference_hidden}
    ours = dk.linear_dpo_loss(hidden, weight, problem.labels, **options)
    plain, grads = with_gradients(dk.linear_dpo_loss, problem, **options)
    torch.testing.assert_close(ours.loss, plain.loss)
    for a, b in zip(torch.autograd.grad(ours.loss, (hidden, weight)), grads, strict=True):
        torch.testing.assert_close(a, b)


EDGES = {
    "no pairs": {"pairs": 0},
    "nothing scored": {"scored": -1.0},
    "one row scored a sequence": {"length": 2, "scored": 2.0},
    "vocabulary of one tile's vector": {"vocab": 2},
    "hidden size 1": {"hidden_size": 1},
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(target, edge, frozen):
    problem = make_head(target, torch.float32, frozen=frozen, **EDGES[edge])
    args, options = dpo_options(problem, "hidden")
    ours, got = with_gradients(
        dk.linear_dpo_loss, problem, *args, **options, backend=target.backend
    )
    truth, want = with_gradients(reference.linear_dpo_loss, problem, *args, **options)
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    logps = dk.linear_sequence_logps(
        problem.hidden, problem.weight, problem.labels, bias=problem.bias, backend=target.backend
    )
    assert logps.shape == (problem.labels.shape[0],) and logps.requires_grad


def test_minus_infinite_bias_masks_the_vocabulary():
    problem = make_head(CPU, torch.float32)
    masked = [i for i in range(67) if i not in set(problem.labels.flatten().tolist())][:3]
    assert masked
    with torch.no_grad():
        problem.bias[masked] = -math.inf
    args, options = dpo_options(problem, "logps")
    ours, got = with_gradients(dk.linear_dpo_loss, problem, *args, **options)
    truth, want = with_gradients(reference.linear_dpo_loss, problem, *args, **options)
    torch.testing.assert_close(ours.loss, truth.loss)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_error_of_a_large_vocabulary_in_bfloat16(precision):
    """exact: a token within 1e-4 nat of the truth, 512 of them within 1e-3; fast is far from it."""
    rng = torch.Generator().manual_seed(0)
    rows, vocab, size = 512, 128256, 32
    hidden = torch.randn(1, rows, size, generator=rng).bfloat16()
    weight = (5 / math.sqrt(size) * torch.randn(vocab, size, generator=rng)).bfloat16()
    labels = torch.randint(vocab, (1, rows), generator=rng)
    logps = dk.linear_token_logps(hidden, weight, labels, precision=precision)
    wide = weight.double()
    truth = torch.cat(
        [
            reference.token_logps(part.double() @ wide.t(), y)
            for part, y in zip(hidden[0].split(64), labels[0].split(64), strict=True)
        ]
    )
    error = logps[0].double() - truth
    if precision == "exact":
        assert error.abs().max() < 1e-4
        assert error.sum().abs() < 1e-3
    else:
        assert 1e-3 < error.abs().max() < 0.2


def test_return_stats_are_those_of_token_stats():
    for frozen in (False, True):
        problem = make_head(CPU, torch.float32, frozen=frozen)
        args, options = dpo_options(problem, "logps")
        out, stats = dk.linear_dpo_loss(
            problem.hidden, problem.weight, problem.labels, *args, **options, return_stats=True
        )
        alone = dk.linear_token_stats(
            problem.hidden, problem.weight, problem.labels, bias=problem.bias, shift=True
        )
        for a, b in zip(stats, alone, strict=True):
            assert not a.requires_grad
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)
        assert out.loss.requires_grad


def test_float16_survives_a_loss_scale():
    """Gradients made in the forward must not underflow before GradScaler's factor arrives."""
    problem = make_head(CPU, torch.float16, pairs=2, bias=False)
    options = {"average_log_prob": True, "beta": 1e-3}
    scale = 2.0**14
    out = dk.linear_dpo_loss(
        problem.hidden, problem.weight, problem.labels, *problem.reference_logps, **options
    )
    got = torch.autograd.grad(out.loss * scale, problem.trainable)
    wide = problem.to(torch.float64)
    truth = reference.linear_dpo_loss(
        wide.hidden, wide.weight, wide.labels, *wide.reference_logps, **options
    )
    want = torch.autograd.grad(truth.loss * scale, wide.trainable)
    for a, b in zip(got, want, strict=True):
        error = (a.double() - b).abs().max() / b.abs().max()
        assert error < 4 * torch.finfo(torch.float16).eps


def test_module_is_the_function():
    problem = make_head(CPU, torch.float32)
    module = dk.LinearDPOLoss(beta=0.3, loss_type="ipo", precision="fast", workspace_mb=1)
    args, options = dpo_options(problem, "hidden")
    ours = module(problem.hidden, problem.weight, problem.labels, *args, **options)
    plain = dk.linear_dpo_loss(
        problem.hidden, problem.weight, problem.labels, *args, **options, beta=0.3, loss_type="ipo"
    )
    torch.testing.assert_close(ours.loss, plain.loss)
    assert "precision='fast'" in repr(module)
    with pytest.raises(TypeError, match="inplace_backward"):
        dk.LinearDPOLoss(inplace_backward=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_acc_dtype_of_results(dtype):
    problem = make_head(Target("torch", "cpu"), dtype)
    logps = dk.linear_token_logps(problem.hidden, problem.weight, problem.labels)
    assert logps.dtype == torch.float32 and acc_eps(dtype) == torch.finfo(torch.float32).eps
