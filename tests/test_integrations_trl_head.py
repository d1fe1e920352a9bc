"""The function that patch_trl binds against TRL's own: values, gradients, what it leaves to TRL."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import logging

import pytest
import torch

for _package in ("trl", "transformers", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

from trl.kernels import ChunkedLogProbFunction

from dpo_kernels.integrations import trl as integration

pytestmark = pytest.mark.integrations

N, H, V = 11, 16, 53


@pytest.fixture(autouse=True)
def _reasons_are_logged_again():
    yield
    integration._logged.clear()


def _call(dtype=torch.float32, bias=False, **changes):
    """Arguments of apply, by name."""
    rng = torch.Generator().manual_seed(0)
    arguments = {
        "hidden": torch.randn(N, H, generator=rng).to(dtype).requires_grad_(),
        "weight": torch.randn(V, H, generator=rng).to(dtype).requires_grad_(),
        "bias": torch.randn(V, generator=rng).to(dtype).requires_grad_() if bias else None,
        "targets": torch.randint(0, V, (N,), generator=rng),
        "temperature": 1.0,
        "chunk_size": 32768,
        "final_logit_softcapping": None,
        "logit_scale": 1.0,
        "outputs": integration.OUTPUTS,
    }
    return {**arguments, **changes}


def _ours(arguments):
    return integration.FusedLogProbs(ChunkedLogProbFunction).apply(*arguments.values())


def _theirs(arguments):
    return ChunkedLogProbFunction.apply(*arguments.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"final_logit_softcapping": 4.0, "logit_scale": 0.5, "temperature": 2.0},
    ],
    ids=["plain", "temperature", "softcap and scale"],
)
def test_values_and_gradients_are_trls(options, bias):
    """Also through the entropy, as GRPO's regulariser might."""
    results = []
    for function in (_ours, _theirs):
        arguments = _call(bias=bias, **options)
        out = function(arguments)
        assert [x.dtype for x in out] == [torch.float32] * 4 + [torch.bool]
        loss = (out[0] * torch.linspace(-1, 2, N)).sum() + (out[1] * torch.linspace(1, 3, N)).sum()
        leaves = [arguments[k] for k in ("hidden", "weight", "bias") if arguments[k] is not None]
        results.append((*out, *torch.autograd.grad(loss, leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_entropy_alone_has_its_gradient_under_autocast():
    grads = []
    for function in (_ours, _theirs):
        arguments = _call()
        arguments["weight"].requires_grad_(False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            entropy = function(arguments)[1]
        grads.append(torch.autograd.grad(entropy.sum(), arguments["hidden"])[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [(), *[(name,) for name in integration.OUTPUTS]])
def test_what_is_not_asked_is_none(wanted):
    ours = _ours(_call(outputs=("log_probs", *wanted)))
    theirs = _theirs(_call(outputs=("log_probs", *wanted)))
    assert [x is None for x in ours] == [x is None for x in theirs]


def test_only_log_probs_and_entropy_have_gradients():
    log_probs, entropy, *rest = _ours(_call())
    assert log_probs.requires_grad and entropy.requires_grad
    assert not any(x.requires_grad for x in rest)
    with torch.no_grad():
        assert not any(x.requires_grad for x in _ours(_call()))


def test_no_rows_are_a_differentiable_zero():
    arguments = _call()
    full = arguments["hidden"]
    arguments |= {"hidden": full[:0], "targets": arguments["targets"][:0]}
    out = _ours(arguments)
    assert all(x.shape == (0,) for x in out)
    grads = torch.autograd.grad(out[0].sum() + out[1].sum(), [full, arguments["weight"]])
    assert all(g.abs().max() == 0 for g in grads)


def test_only_the_first_maximum_is_top_1():
    weight = torch.zeros(V, H)
    weight[[3, 8], 0] = 1.0
    hidden = torch.zeros(3, H)
    hidden[:, 0] = 1.0
    arguments = _call(hidden=hidden, weight=weight, targets=torch.tensor([3, 8, 0]))
    assert _ours(arguments)[4].tolist() == [True, False, False]


@pytest.mark.parametrize("case", ["bf16", "autocast", "float32 hidden states, bf16 head"])
def test_mixed_precision_is_nearer_the_truth_than_trls(case):
    """Truth: float64 of what the matrix units are given."""
    arguments = _call(torch.bfloat16 if case == "bf16" else torch.float32)
    if case.startswith("float32"):
        arguments["weight"] = arguments["weight"].detach().bfloat16().requires_grad_()
    rounded = [
        arguments[k]
        .detach()
        .to(torch.bfloat16 if case != "float32 hidden states, bf16 head" else arguments[k].dtype)
        for k in ("hidden", "weight")
    ]
    leaves = [x.double().requires_grad_() for x in rounded]
    truth = (leaves[0] @ leaves[1].t()).log_softmax(-1)
    truth = truth.gather(-1, arguments["targets"][:, None])[:, 0]
    derivatives = torch.linspace(-1, 2, N)
    grads = torch.autograd.grad((truth * derivatives).sum(), leaves)
    errors = []
    for function in (_ours, _theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
            logps = function(arguments)[0]
        ours = torch.autograd.grad(
            (logps * derivatives).sum(), [arguments["hidden"], arguments["weight"]]
        )
        assert [g.dtype for g in ours] == [arguments["hidden"].dtype, arguments["weight"].dtype]
        pairs = [(logps, truth), *zip(ours, grads, strict=True)]
        errors.append([float((a.double() - b).abs().max()) for a, b in pairs])
    assert errors[0][0] <= min(errors[1][0], 1e-4)
    # a gradient is rounded to the dtype of its tensor, ours as theirs
    for ours, theirs, grad in zip(errors[0][1:], errors[1][1:], grads, strict=True):
        assert ours <= theirs + 2**-8 * float(grad.abs().max())


class _Sharded(torch.nn.Parameter):
    pass


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": _Sharded(torch.randn(V, H))}, "_Sharded"),
        ({"outputs": ("log_probs", "kurtosis")}, "kurtosis"),
        ({"extra": 1}, "10 arguments"),
    ],
)
def test_what_is_not_served_goes_to_trl_with_one_logged_reason(monkeypatch, caplog, change, reason):
    seen = []
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", lambda *args: seen.append(args) or "TRL's")
    arguments = _call(**change)
    with caplog.at_level(logging.WARNING, "dpo_kernels"):
        assert _ours(arguments) == _ours(arguments) == "TRL's"
    assert seen == [tuple(arguments.values())] * 2
    assert [reason in record.message for record in caplog.records] == [True]


def test_a_fallback_gives_trls_values():
    arguments = _call(weight=_Sharded(torch.randn(V, H)))
    for ours, theirs in zip(_ours(arguments), _theirs(arguments), strict=True):
        assert torch.equal(ours, theirs)
