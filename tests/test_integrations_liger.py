"""The object with Liger's call signature against the real LigerFusedLinearDPOLoss."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

pytest.importorskip("liger_kernel", reason="liger-kernel is missing: make test-integrations")

from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss as Theirs

import dpo_kernels
from dpo_kernels import reference
from dpo_kernels.integrations.liger import LigerFusedLinearDPOLoss as Ours

pytestmark = pytest.mark.integrations

P, T, H, V = 3, 7, 16, 41
NAMES = (
    "chosen_logps",
    "rejected_logps",
    "chosen_logits_mean",
    "rejected_logits_mean",
    "nll_loss",
    "chosen_rewards",
    "rejected_rewards",
)

LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.2},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.2},
}


def _inputs(dtype=torch.float32, bias=True):
    """(lin_weight, _input, target, bias, ref_input, ref_weight, ref_bias), as TRL passes them."""
    rng = torch.Generator().manual_seed(0)

    def tensor(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    target = torch.randint(0, V, (2 * P, T), generator=rng)
    for row, (start, end) in enumerate([(0, 7), (3, 6), (2, 7), (1, 3), (4, 7), (6, 7)]):
        target[row, :start] = -100
        target[row, end:] = -100
    return [
        tensor(V, H).requires_grad_(),
        tensor(2 * P, T, H).requires_grad_(),
        target,
        tensor(V).requires_grad_() if bias else None,
        tensor(2 * P, T, H),
        tensor(V, H),
        tensor(V) if bias else None,
    ]


def _run(cls, options, inputs):
    extra = {"compiled": False} if cls is Theirs else {}
    loss, metrics = cls(**options, **extra)(*inputs)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    # a gradient that is not 1, as gradient accumulation makes
    return loss, metrics, torch.autograd.grad(loss * 0.5, leaves)


def _assert_same(options, inputs):
    ours, theirs = (_run(cls, options, inputs) for cls in (Ours, Theirs))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    assert len(ours[1]) == len(theirs[1]) == len(NAMES)
    for name, mine, other in zip(NAMES, ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, torch.as_tensor(other), rtol=1e-5, atol=1e-5, msg=name)
        assert not mine.requires_grad
    for mine, other in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_signatures():
    for function in ("__init__", "forward"):
        ours, theirs = (
            {n: p.default for n, p in inspect.signature(getattr(cls, function)).parameters.items()}
            for cls in (Ours, Theirs)
        )
        assert list(ours.items()) == list(theirs.items())
    assert set(LOSSES) == Theirs._SUPPORTED_LOSS_TYPES


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_values_and_gradients(loss_type, bias):
    _assert_same({"loss_type": loss_type, "beta": 0.2, **LOSSES[loss_type]}, _inputs(bias=bias))


@pytest.mark.parametrize(
    "options",
    [
        {"average_log_prob": True},
        {"use_ref_model": False},
        {"compute_nll_loss": True, "alpha": 0.3},
        {"compute_nll_loss": True, "loss_type": "apo_zero", "use_ref_model": False},
        {"compute_nll_loss": True, "average_log_prob": True, "alpha": 0.3},
        {"compute_nll_loss": True, "average_log_prob": True, "use_ref_model": False},
        {"compute_nll_loss": True, "average_log_prob": True, "loss_type": "discopop"},
    ],
    ids=str,
)
def test_options(options):
    _assert_same({"beta": 0.2, **options}, _inputs())


def test_another_ignore_index():
    inputs = _inputs()
    inputs[2] = inputs[2].masked_fill(inputs[2] == -100, -1)
    _assert_same({"ignore_index": -1}, inputs)


@pytest.mark.parametrize("frozen", [0, 1], ids=["head", "hidden states"])
def test_frozen(frozen):
    inputs = _inputs(bias=False)
    inputs[frozen].requires_grad_(False)
    _assert_same({}, inputs)


def test_without_gradients():
    inputs = _inputs()
    with torch.no_grad():
        ours, theirs = Ours()(*inputs), Theirs(compiled=False)(*inputs)
    torch.testing.assert_close(ours[0], theirs[0])
    assert not ours[0].requires_grad


def test_ipo_which_liger_refuses():
    """Per-token log-ratios (arXiv:2310.12036, eq. 17), from whole logits in float64."""
    with pytest.raises(ValueError, match="ipo"):
        Theirs(loss_type="ipo")
    inputs = _inputs()
    weight, hidden, target, bias, ref_hidden, ref_weight, ref_bias = inputs
    loss, _, (grad_weight, *_) = _run(Ours, {"loss_type": "ipo", "beta": 0.2}, inputs)
    double = weight.detach().double().requires_grad_()
    sums = [
        reference.linear_sequence_logps(h.double(), w, target, bias=b.double(), shift=False)
        for h, w, b in ((hidden, double, bias), (ref_hidden, ref_weight.double(), ref_bias))
    ]
    chosen, rejected = ((sums[0] - sums[1]) / (target != -100).sum(-1)).chunk(2)
    truth = ((chosen - rejected - 1 / (2 * 0.2)) ** 2).mean()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    (expected,) = torch.autograd.grad(truth * 0.5, double)
    torch.testing.assert_close(grad_weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_bf16_is_nearer_the_truth_than_liger():
    inputs = _inputs(torch.bfloat16)
    double = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    truth, _ = Theirs(compiled=False)(*double)
    (ours, _, grads), (theirs, _, their_grads) = (_run(cls, {}, inputs) for cls in (Ours, Theirs))
    assert abs(float(ours - truth)) < abs(float(theirs - truth))
    assert [g.dtype for g in grads] == [g.dtype for g in their_grads]


def test_a_sequence_without_scored_tokens_is_finite():
    """Liger's averages are NaN there."""
    inputs = _inputs()
    inputs[2][1] = -100
    loss, metrics, grads = _run(Ours, {"average_log_prob": True}, inputs)
    assert all(torch.isfinite(x).all() for x in (loss, *metrics, *grads))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sigmoid", "label_smoothing": 0.1},
        {"loss_type": "exo_pair"},
        {"loss_type": "robust", "label_smoothing": 0.5},
        {"loss_type": "dpo"},
    ],
    ids=str,
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=r"label_smoothing|loss_type"):
        Ours(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo"}, "Unsupported loss_type"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be > 0 for loss_type='exo_pair'"),
        (
            {"loss_type": "robust", "label_smoothing": -0.1},
            "label_smoothing must lie in [0.0, 0.5) for loss_type='robust'",
        ),
    ],
    ids=str,
)
def test_messages_that_users_match_are_ligers(options, message):
    for cls in (Ours, Theirs):
        with pytest.raises(ValueError, match=re.escape(message)):
            cls(**options)


def test_patch_binds_it_wherever_it_is_imported():
    import liger_kernel.chunked_loss as package

    with dpo_kernels.patch("liger", verbose=False):
        assert package.LigerFusedLinearDPOLoss is package.dpo_loss.LigerFusedLinearDPOLoss is Ours
    assert package.LigerFusedLinearDPOLoss is Theirs


def test_trl_before_1_14_builds_it_by_name():
    """TRL 0.24 passes five options by keyword, as the tensors from the bias on; 0.29 to 1.13 two
    options, and seven tensors by position."""
    inputs = _inputs()
    old = Ours(
        ignore_index=-100,
        beta=0.2,
        use_ref_model=True,
        average_log_prob=False,
        loss_type="apo_zero",
    )
    keywords = dict(zip(("bias", "ref_input", "ref_weight", "ref_bias"), inputs[3:], strict=True))
    by_keyword = old(*inputs[:3], **keywords)
    by_position = Ours(beta=0.2, loss_type="apo_zero")(*inputs)
    assert torch.equal(by_keyword[0], by_position[0])
    # what TRL does with the metrics
    chosen_logps, *_, chosen_rewards, rejected_rewards = by_position[1]
    assert chosen_logps.shape == (chosen_rewards > rejected_rewards).shape == (P,)
