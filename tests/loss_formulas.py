"""Each loss and f-divergence as a formula in plain math, one pair at a time, in float64."""

from __future__ import annotations

import math

import torch

from dpo_kernels.losses import LOSSES

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
