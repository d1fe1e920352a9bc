"""Each loss and f-divergence against its formula in plain math, one pair at a time, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import dpo_kernels
from dpo_kernels import preference_loss, reference
from dpo_kernels.losses import LOSSES
from tests.helpers import make_problem

BETA, SMOOTHING, ALPHA, TAU, GAMMA = 0.3, 0.15, 0.6, 0.05, 0.7
PAIRS = 5


def ls(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


SCORES = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - math.exp(-x),
    "js_divergence": lambda x: math.log(2) + ls(x),
    "alpha_divergence": lambda x: (math.exp((ALPHA - 1) * x) - 1) / (ALPHA - 1),
}


class Pair:
    """What a formula may use: log-probs, ratios c and r, D under an f-divergence, lengths."""

    def __init__(self, w, l, ref_w, ref_l, n_w, n_l, divergence, e):
        score = SCORES[divergence]
        self.w, self.l, self.n_w, self.n_l, self.e = w, l, n_w, n_l, e
        self.ref_w, self.ref_l = ref_w, ref_l
        self.c, self.r = w - ref_w, l - ref_l
        self.s_c, self.s_r = score(self.c), score(self.r)
        self.x = BETA * (self.s_c - self.s_r)

    @property
    def mean_gap(self) -> float:
        return self.s_c / self.n_w - self.s_r / self.n_l


def exo_pair(p: Pair) -> float:
    q, other = sigmoid(p.x), sigmoid(-p.x)
    return q * (math.log(q) - math.log(1 - p.e)) + other * (math.log(other) - math.log(p.e))


def discopop(p: Pair) -> float:
    m = sigmoid(p.x / TAU)
    return -(1 - m) * ls(p.x) + m * math.exp(-p.x)


def smoothed(x: float, e: float) -> float:
    return -(1 - e) * ls(x) - e * ls(-x)


FORMULAS = {
    "sigmoid": lambda p: smoothed(p.x, p.e),
    "sigmoid_norm": lambda p: -ls(BETA * p.mean_gap),
    "hinge": lambda p: max(0.0, 1 - p.x),
    "ipo": lambda p: (p.mean_gap - 1 / (2 * BETA)) ** 2,
    "exo_pair": exo_pair,
    "nca_pair": lambda p: -ls(BETA * p.c) - ls(-BETA * p.c) / 2 - ls(-BETA * p.r) / 2,
    "robust": lambda p: (-(1 - p.e) * ls(p.x) + p.e * ls(-p.x)) / (1 - 2 * p.e),
    "bco_pair": lambda p: -ls(BETA * p.c) - ls(-BETA * p.r),
    "sppo_hard": lambda p: (p.c - 1 / (2 * BETA)) ** 2 + (p.r + 1 / (2 * BETA)) ** 2,
    "apo_zero": lambda p: 1 - sigmoid(BETA * p.c) + sigmoid(BETA * p.r),
    "apo_down": lambda p: sigmoid(BETA * p.c) + 1 - sigmoid(BETA * (p.c - p.r)),
    "discopop": discopop,
    "simpo": lambda p: -ls(BETA * (p.w / p.n_w - p.l / p.n_l) - GAMMA),
}


def aot(pairs: list[Pair]) -> list[float]:
    policy = sorted(p.w - p.l for p in pairs)
    ref = sorted(p.ref_w - p.ref_l for p in pairs)
    return [smoothed(BETA * (a - b), pairs[0].e) for a, b in zip(policy, ref, strict=True)]


def aot_unpaired(pairs: list[Pair]) -> list[float]:
    gaps = zip(sorted(p.c for p in pairs), sorted(p.r for p in pairs), strict=True)
    return [smoothed(BETA * (a - b), pairs[0].e) for a, b in gaps]


def sft(pairs: list[Pair]) -> list[float]:
    return [-sum(p.w for p in pairs) / sum(p.n_w for p in pairs)] * len(pairs)


BATCH_FORMULAS = {"aot": aot, "aot_unpaired": aot_unpaired, "sft": sft}
TAKES_SMOOTHING = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")
TAKES_DIVERGENCE = (
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
)
TAKES_LENGTHS = ("ipo", "sigmoid_norm", "simpo", "sft")
OWN_OPTIONS = {"discopop": {"discopop_tau": TAU}, "simpo": {"simpo_gamma": GAMMA}}
# only exo_pair needs smoothing; the others are checked with and without
CASES = [
    (name, divergence, smoothing)
    for name in LOSSES
    for divergence in (SCORES if name in TAKES_DIVERGENCE else ("reverse_kl",))
    for smoothing in (0.0, SMOOTHING)
    if (smoothing == 0 or name in TAKES_SMOOTHING) and (smoothing > 0 or name != "exo_pair")
]


def expected(name, logps, lengths, divergence, smoothing) -> list[float]:
    columns = zip(*(x.tolist() for x in (*logps, *lengths)), strict=True)
    pairs = [Pair(*values, divergence, smoothing) for values in columns]
    if name in BATCH_FORMULAS:
        return BATCH_FORMULAS[name](pairs)
    return [FORMULAS[name](p) for p in pairs]


def pair_logps(seed: int = 0):
    """[4, P] log-probs whose ratios are about 1 nat, and [2, P] lengths."""
    rng = torch.Generator().manual_seed(seed)
    logps = -8 + torch.randn(4, PAIRS, generator=rng, dtype=torch.float64)
    lengths = torch.randint(2, 9, (2, PAIRS), generator=rng)
    return logps, lengths


def options_of(name, divergence="reverse_kl", smoothing=0.0) -> dict:
    options = {"beta": BETA, "loss_type": name, "label_smoothing": smoothing}
    options |= {"f_divergence": divergence, **OWN_OPTIONS.get(name, {})}
    if divergence == "alpha_divergence":
        options["f_alpha_divergence_coef"] = ALPHA
    return options


def test_every_loss_has_a_formula_here():
    assert set(LOSSES) == set(FORMULAS) | set(BATCH_FORMULAS)


@pytest.mark.parametrize(("name", "divergence", "smoothing"), CASES)
def test_values(name, divergence, smoothing):
    logps, lengths = pair_logps()
    extra = {}
    if name in TAKES_LENGTHS:
        extra = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    losses, chosen, rejected = preference_loss(
        *logps, **options_of(name, divergence, smoothing), **extra
    )
    truth = expected(name, logps, lengths, divergence, smoothing)
    assert losses.tolist() == pytest.approx(truth, rel=1e-12, abs=1e-12)
    assert chosen.tolist() == pytest.approx((BETA * (logps[0] - logps[2])).tolist(), rel=1e-14)
    assert rejected.tolist() == pytest.approx((BETA * (logps[1] - logps[3])).tolist(), rel=1e-14)


@pytest.mark.parametrize(("name", "divergence", "smoothing"), CASES)
def test_derivatives(name, divergence, smoothing):
    """d loss / d logps of the mean, against central differences of the formula."""
    logps, lengths = pair_logps(1)
    extra = {}
    if name in TAKES_LENGTHS:
        extra = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    policy = logps[:2].clone().requires_grad_()
    losses, *rewards = preference_loss(
        *policy, *logps[2:], **options_of(name, divergence, smoothing), **extra
    )
    assert not any(r.requires_grad for r in rewards)
    (derivatives,) = torch.autograd.grad(losses.mean(), policy)
    # truncation h^2 f''' / 6 and rounding eps f / h are both below 1e-9
    h = 1e-5
    for side in range(2):
        for pair in range(PAIRS):
            values = []
            for sign in (1, -1):
                moved = logps.clone()
                moved[side, pair] += sign * h
                values.append(sum(expected(name, moved, lengths, divergence, smoothing)) / PAIRS)
            numeric = (values[0] - values[1]) / (2 * h)
            assert derivatives[side, pair].item() == pytest.approx(numeric, rel=1e-6, abs=1e-8)


# ipo squares: with the exponential divergences that is beyond float32
FAR_OUT = [
    *((name, "reverse_kl") for name in LOSSES),
    *((name, "js_divergence") for name, loss in LOSSES.items() if loss.f_divergence),
    *(
        (name, divergence)
        for name, loss in LOSSES.items()
        for divergence in ("forward_kl", "alpha_divergence")
        if loss.f_divergence and name != "ipo"
    ),
]


@pytest.mark.parametrize("name, divergence", FAR_OUT)
def test_losses_stay_finite_far_out(name, divergence):
    """At log-ratios of 300 nats either way, float32, values and derivatives."""
    policy = torch.tensor([[-300.0, 0.0], [0.0, -300.0]], requires_grad=True)
    losses, *_ = preference_loss(
        *policy,
        torch.zeros(2),
        torch.zeros(2),
        **{
            **options_of(name, smoothing=SMOOTHING if name in TAKES_SMOOTHING else 0.0),
            "f_divergence": divergence,
        },
    )
    (derivatives,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.isfinite().all() and derivatives.isfinite().all()


def test_discopop_of_a_lost_pair():
    """m is 0 long before exp(-y) overflows: what is left is the logistic loss."""
    policy = torch.tensor([-1000.0], requires_grad=True)
    zero = torch.zeros(1)
    losses, *_ = preference_loss(policy, zero, zero, zero, beta=0.5, loss_type="discopop")
    (derivative,) = torch.autograd.grad(losses.sum(), policy)
    assert losses.item() == 500.0 and derivative.item() == -0.5


def test_alpha_divergence_limits():
    """Reverse KL at a = 1; "alpha" is TRL's name for it."""
    logps, _ = pair_logps()
    plain = preference_loss(*logps, beta=BETA)[0]
    for coef in (1.0, 1 + 1e-8):
        limit = preference_loss(
            *logps, beta=BETA, f_divergence="alpha_divergence", f_alpha_divergence_coef=coef
        )[0]
        assert torch.allclose(limit, plain, rtol=1e-6)
    options = {"beta": BETA, "f_alpha_divergence_coef": ALPHA}
    a, b = (
        preference_loss(*logps, f_divergence=name, **options)[0]
        for name in ("alpha", "alpha_divergence")
    )
    assert torch.equal(a, b)


def test_mix():
    """Weighted sums of losses, each with what it takes; weights default to 1."""
    logps, lengths = pair_logps()
    names, weights = ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5]
    options = {"beta": BETA, "label_smoothing": SMOOTHING}
    options |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    each = [
        expected(n, logps, lengths, "reverse_kl", SMOOTHING if n == "sigmoid" else 0.0)
        for n in names
    ]
    for given, used in ((weights, weights), (None, [1.0] * 3)):
        losses, *_ = preference_loss(*logps, loss_type=names, loss_weights=given, **options)
        truth = [
            sum(w * v for w, v in zip(used, values, strict=True))
            for values in zip(*each, strict=True)
        ]
        assert losses.tolist() == pytest.approx(truth, rel=1e-12)


def test_mix_as_a_dict():
    """{name: weight}: the order is the dict's, the weights are not lost."""
    logps, lengths = pair_logps()
    options = {"beta": BETA, "chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}
    for module in (dpo_kernels, reference):
        a, *_ = module.preference_loss(*logps, loss_type={"sigmoid": 0.8, "ipo": 0.2}, **options)
        b, *_ = module.preference_loss(
            *logps, loss_type=["sigmoid", "ipo"], loss_weights=[0.8, 0.2], **options
        )
        assert torch.equal(a, b)


def test_mix_of_a_batch(target):
    """dpo_loss with a list of losses: the same sum, and the sum of the gradients."""
    problem = make_problem(target, vocab=11)
    weights = [0.7, 0.5, 2.0]
    options = {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": weights}
    ours = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *problem.reference, backend=target.backend, **options
    )
    parts = [
        reference.dpo_loss(problem.logits, problem.labels, *problem.reference, loss_type=name)
        for name in options["loss_type"]
    ]
    total = sum(w * part.loss for w, part in zip(weights, parts, strict=True))
    assert ours.loss.item() == pytest.approx(total.item(), rel=1e-5)
    grads = [torch.autograd.grad(x, problem.logits)[0] for x in (ours.loss, total)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


def test_weight_of_a_single_loss(target):
    problem = make_problem(target, vocab=11)
    arguments = (problem.logits, problem.labels, *problem.reference)
    one = dpo_kernels.dpo_loss(*arguments, backend=target.backend)
    half = dpo_kernels.dpo_loss(
        *arguments, loss_weights=[0.5], loss_type=["sigmoid"], backend=target.backend
    )
    assert half.loss.item() == pytest.approx(one.loss.item() / 2, rel=1e-6)


def test_callable(target):
    """Of (chosen log-ratios, rejected log-ratios), alone and in a mix, with its gradient."""

    def squared_hinge(chosen, rejected):
        return torch.relu(1 - (chosen - rejected)) ** 2

    logps, _ = pair_logps()
    losses, *_ = preference_loss(*logps, loss_type=squared_hinge)
    truth = [
        max(0.0, 1 - ((w - a) - (l - b))) ** 2 for w, l, a, b in zip(*logps.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(truth)

    problem = make_problem(target, vocab=11)
    options = {"loss_type": [squared_hinge, "sigmoid"], "loss_weights": [0.25, 1.0]}
    ours = dpo_kernels.dpo_loss(
        problem.logits, problem.labels, *problem.reference, backend=target.backend, **options
    )
    truth = reference.dpo_loss(problem.logits, problem.labels, *problem.reference, **options)
    assert ours.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    grads = [torch.autograd.grad(x.loss, problem.logits)[0] for x in (ours, truth)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TAKES_LENGTHS)
@pytest.mark.parametrize("shift", (True, False))
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
def test_lengths_are_scored_tokens(target, name, shift, packed):
    """With shift, a label on the first token of a sequence is not scored and not counted."""
    problem = make_problem(target, vocab=11, scored=0.8, packed=packed, seed=3)
    rows = problem.labels
    if packed:
        rows = [rows[a:b] for a, b in itertools.pairwise(problem.cu_seqlens.tolist())]
    for row in rows:
        row[0] = 1
    counts = [sum(x != -100 for x in row.tolist()[shift:]) for row in rows]
    wide = problem.logits.detach().double()
    sums = reference.sequence_logps(wide, problem.labels, shift=shift, **problem.layout)
    logps = [*sums.chunk(2), *(x.double() for x in problem.reference)]
    # sft divides by the tokens of all chosen answers together, the others each answer by its own
    lengths = torch.tensor(counts).clamp(min=0 if name == "sft" else 1).chunk(2)
    refs = () if name in ("simpo", "sft") else problem.reference
    out = dpo_kernels.dpo_loss(
        problem.logits,
        problem.labels,
        *refs,
        shift=shift,
        reduction="none",
        backend=target.backend,
        **problem.layout,
        **options_of(name),
    )
    truth = expected(name, logps, lengths, "reverse_kl", 0.0)
    assert out.loss.tolist() == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("name", TAKES_LENGTHS)
def test_averaged_log_probs_are_not_divided_again(target, name):
    """average_log_prob: the log-probs are means already."""
    problem = make_problem(target, vocab=11, seed=4)
    refs = () if name in ("simpo", "sft") else problem.reference
    out = dpo_kernels.dpo_loss(
        problem.logits,
        problem.labels,
        *refs,
        average_log_prob=True,
        reduction="none",
        backend=target.backend,
        **options_of(name),
    )
    means = reference.sequence_logps(
        problem.logits.detach().double(), problem.labels, average_log_prob=True
    ).chunk(2)
    zeros = torch.zeros_like(means[0])
    given = [x.double() for x in refs] or [zeros, zeros]
    ones = torch.ones_like(means[0])
    truth = expected(name, [*means, *given], [ones, ones], "reverse_kl", 0.0)
    if name == "sft":
        truth = (-means[0]).tolist()
    assert out.loss.tolist() == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_from_logits(target, name):
    """dpo_loss gives preference_loss of its own sequence log-probs."""
    problem = make_problem(target, vocab=11, seed=5)
    smoothing = SMOOTHING if name in TAKES_SMOOTHING else 0.0
    refs = () if name in ("simpo", "sft") else problem.reference
    arguments = (problem.logits, problem.labels, *refs)
    options = options_of(name, smoothing=smoothing)
    ours = dpo_kernels.dpo_loss(*arguments, backend=target.backend, **options)
    truth = reference.dpo_loss(*arguments, **options)
    assert ours.losses.tolist() == pytest.approx(truth.losses.tolist(), rel=1e-4)
    grads = [torch.autograd.grad(x.loss, problem.logits)[0] for x in (ours, truth)]
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5)


def test_half_precision_log_probs_are_widened():
    logps, _ = pair_logps()
    for dtype in (torch.bfloat16, torch.float16):
        losses, *_ = preference_loss(*logps.to(dtype), beta=BETA)
        wide, *_ = preference_loss(*logps.to(dtype).float(), beta=BETA)
        assert losses.dtype == torch.float32 and torch.equal(losses, wide)


def test_reference_free():
    logps, _ = pair_logps()
    zeros = torch.zeros(PAIRS, dtype=torch.float64)
    free = preference_loss(logps[0], logps[1], None, None, reference_free=True)
    given = preference_loss(logps[0], logps[1], zeros, zeros)
    assert all(torch.equal(a, b) for a, b in zip(free, given, strict=True))
