"""Calls to make: batches in every layout, dtype and magnitude, and options of every kind."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair")
LOSSES += ("sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "simpo")
SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")
DIVERGING = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
UNREFERENCED = ("sft", "simpo")

# around the widths of vectors (8, 16), of their unrolled loops and of segments
WIDE = (127, 129, 513, 1023, 2049, 4097, 8193)
vocabularies = st.one_of(st.integers(1, 70), st.sampled_from(WIDE))


@dataclass
class Batch:
    """``x`` [.., last] is what the kernels see, ``labels`` and ``cu_seqlens`` its layout."""

    x: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    bounds: list[int]
    vocab: int
    scoring: dict = field(default_factory=dict)

    @property
    def rows(self) -> Tensor:
        """[rows, last] in float64."""
        return self.x.detach().double().reshape(-1, self.x.shape[-1])

    @property
    def eps(self) -> float:
        return torch.finfo(torch.promote_types(self.x.dtype, torch.float32)).eps

    def _repr_pretty_(self, printer, cycle) -> None:
        # hypothesis prints it: short enough to read, enough to see what is special
        printer.text(
            f"Batch({self.x.dtype}, {list(self.x.shape)}, strides {list(self.x.stride())}, "
            f"bounds {self.bounds}, labels {self.labels.flatten().tolist()[:40]}, "
            f"max {self.x.detach().abs().max() if self.x.numel() else 0}, {self.scoring})"
        )


@st.composite
def strided(draw, values: Tensor) -> Tensor:
    """``values`` with gaps of NaN behind every dimension, perhaps the first two swapped."""
    gaps = [draw(st.integers(0, 3)) for _ in range(values.dim())]
    sizes = [size + gap for size, gap in zip(values.shape, gaps, strict=True)]
    offset = draw(st.integers(0, 3))
    swap = values.dim() == 3 and draw(st.booleans())
    if swap:
        sizes[0], sizes[1] = sizes[1], sizes[0]
    filler = math.nan if values.is_floating_point() else 10**6
    memory = values.new_full((math.prod(sizes) + offset,), filler)[offset:].view(sizes)
    view = memory.transpose(0, 1) if swap else memory
    return view[tuple(slice(0, size) for size in values.shape)].copy_(values)


@st.composite
def batches(draw, *, dtypes=DTYPES, width=None, pairs=True, wild=True, most=7) -> Batch:
    """A batch of pairs (or of any sequences); ``width``: the size of x's last dimension, if not V.

    ``wild``: magnitudes up to the dtype's largest and -inf in the vocabulary, at a label only where
    no loss is made of it. ``most``: tokens of a sequence.
    """
    dtype = draw(st.sampled_from(dtypes))
    vocab = draw(vocabularies)
    num_seqs = draw(st.integers(1, 3)) * 2 if pairs else draw(st.integers(1, 5))
    packed = draw(st.booleans())
    longest = draw(st.integers(1, most))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    lengths = [longest] * num_seqs
    if packed:
        lengths = torch.randint(0, longest + 1, (num_seqs,), generator=rng).tolist()
    bounds = [sum(lengths[:i]) for i in range(num_seqs + 1)]
    shape = (bounds[-1],) if packed else (num_seqs, longest)
    x = torch.randn(*shape, width or vocab, generator=rng, dtype=torch.float64)
    x *= draw(st.sampled_from((0.0, 1e-3, 1.0, 3.0, 30.0)))
    labels = torch.randint(vocab, shape, generator=rng)
    ignore = draw(st.sampled_from((-100, -1, 0, vocab - 1, 10**6)))
    masked = torch.rand(shape, generator=rng) >= draw(st.sampled_from((0.0, 0.3, 0.8, 1.0)))
    labels = labels.masked_fill(masked, ignore)
    shift = draw(st.booleans())
    temperature = draw(st.sampled_from((1.0, 1.0, 0.25, 1.7)))
    if wild and x.numel():
        kinds = KINDS if pairs else (*KINDS, "masked labels")
        kind = draw(st.sampled_from(kinds))
        rows = x.view(-1, x.shape[-1])
        _wild(draw, kind, rows, labels.flatten(), shift, dtype, temperature, rng)
    labels = labels.to(draw(st.sampled_from((torch.int64, torch.int64, torch.int32))))
    x = draw(strided(x.to(dtype))).requires_grad_()
    labels = draw(strided(labels))
    cu_seqlens = None
    if packed:
        cu_seqlens = torch.tensor(bounds, dtype=draw(st.sampled_from((torch.int64, torch.int32))))
    scoring = {"ignore_index": ignore, "shift": shift, "temperature": temperature}
    return Batch(x, labels, cu_seqlens, bounds, vocab, scoring)


KINDS = ("tame", "tame", "offset", "masked", "finfo.min", "largest")


def _wild(draw, kind, x, labels, shift, dtype, temperature, rng) -> None:
    """In place, on rows [N, V]."""
    vocab = x.shape[1]
    if kind == "offset":
        x += draw(st.sampled_from((-1e4, 1e3, 1e4)))
    if kind in ("masked", "finfo.min", "masked labels"):
        out = torch.rand(x.shape, generator=rng) < draw(st.sampled_from((0.1, 0.9)))
        for row in range(x.shape[0]):
            label = int(labels[min(row + shift, labels.numel() - 1)])
            label = label if 0 <= label < vocab else 0
            # a row that is -inf everywhere has no distribution
            out[row, label if kind != "masked labels" else (label + 1) % vocab] = False
            if kind == "masked labels" and vocab > 1:
                out[row, label] = True
        # what the oracle, in float64, still holds once divided by the temperature
        lowest = torch.finfo(dtype).min * (min(temperature, 1.0) if dtype == torch.float64 else 1.0)
        x.masked_fill_(out, lowest if kind == "finfo.min" else -math.inf)
    if kind == "largest":
        # what is finite must stay so once divided by the temperature
        largest = min(torch.finfo(dtype).max, 1e300) * min(temperature, 1.0) * 0.99
        spots = torch.rand(x.shape, generator=rng) < 0.3
        signs = torch.randint(0, 2, x.shape, generator=rng) * 2.0 - 1
        x.copy_(torch.where(spots, signs.double() * largest, x))


@st.composite
def loss_options(draw) -> dict:
    """Keywords of the loss that its types take."""
    names = draw(st.lists(st.sampled_from(LOSSES), min_size=1, max_size=3, unique=True))
    options = {"loss_type": names[0] if len(names) == 1 else names}
    if len(names) > 1 and draw(st.booleans()):
        options["loss_weights"] = draw(
            st.lists(st.sampled_from((0.5, 1.0, 2.0)), min_size=len(names), max_size=len(names))
        )
    options["beta"] = draw(st.sampled_from((0.01, 0.1, 0.5, 2.0)))
    if "exo_pair" in names or (set(names) & set(SMOOTHED) and draw(st.booleans())):
        options["label_smoothing"] = draw(st.sampled_from((1e-3, 0.1, 0.4)))
    if set(names) & set(DIVERGING):
        options["f_divergence"] = draw(st.sampled_from(DIVERGENCES))
        if options["f_divergence"] == "alpha_divergence":
            options["f_alpha_divergence_coef"] = draw(st.sampled_from((0.0, 0.5, 2.0)))
    if "simpo" in names:
        options["simpo_gamma"] = draw(st.sampled_from((0.0, 0.5, 1.5)))
    if "discopop" in names:
        options["discopop_tau"] = draw(st.sampled_from((0.05, 0.5)))
    return options


pair_options = st.fixed_dictionaries(
    {
        "average_log_prob": st.booleans(),
        "ld_alpha": st.sampled_from((None, None, 0.0, 0.1, 0.5, 1.0)),
        "use_weighting": st.sampled_from((False, False, True)),
        "reduction": st.sampled_from(("mean", "sum", "none")),
    }
)


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def names_of(options: dict) -> list[str]:
    names = options["loss_type"]
    return [names] if isinstance(names, str) else names


def filled_in(options: dict, means: bool) -> dict:
    """What the oracle wants: every option, its default where it was not drawn."""
    names = names_of(options)
    defaults = {
        "label_smoothing": 0.0,
        "f_divergence": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "discopop_tau": 0.05,
        "simpo_gamma": 0.5,
    }
    weights = options.get("loss_weights") or [1.0] * len(names)
    mix = list(zip(names, weights, strict=True))
    return {**defaults, **options, "mix": mix, "means": means}
