"""A promise of how many tokens are scored: nobody waits for a GPU, and to break it is never silent.

On a CPU the labels are looked at for nothing, so `nobody_looks` makes it plan as a GPU does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dpo_kernels as dk
from dpo_kernels.linear import plan
from dpo_kernels.losses import LOSSES
from tests.linear_helpers import CPU, GemmLog, HeadProblem, make_head
from tests.test_linear_mechanics import FROZEN, PACKED, room_of, scored_count

FUNCTIONS = ("linear_token_logps", "linear_token_stats", "linear_sequence_logps", "linear_dpo_loss")
# one tile, or several: of whole pairs, and of less
ROOMS = pytest.mark.parametrize("workspace_mb", [None, 0.02, 0.003], ids=["one", "some", "many"])


@pytest.fixture
def nobody_looks(monkeypatch):
    monkeypatch.delenv("DPO_KERNELS_VALIDATE", raising=False)
    monkeypatch.setattr(plan, "_free_to_look", lambda device: False)


def results_of(function: str, problem: HeadProblem, **options) -> dict[str, torch.Tensor]:
    """Every output, and the gradients of what is differentiable."""
    options["bias"] = problem.bias
    if function in ("linear_sequence_logps", "linear_dpo_loss"):
        options["cu_seqlens"] = problem.cu_seqlens
    if function == "linear_dpo_loss" and "reference_hidden" not in options:
        names = ("reference_chosen_logps", "reference_rejected_logps")
        options.update(zip(names, problem.reference_logps, strict=True))
    out = getattr(dk, function)(problem.hidden, problem.weight, problem.labels, **options)
    if isinstance(out, torch.Tensor):
        out = {"logps": out}
    elif isinstance(out, dk.TokenStats):
        out = out._asdict()
    else:
        output, *stats = out if isinstance(out, tuple) else (out,)
        out = {name: getattr(output, name) for name in ("loss", *vars(output))}
        for each in stats:
            out.update({f"token {name}": x for name, x in each._asdict().items()})
    first = next(iter(out.values()))
    weights = torch.linspace(0.5, 2, first.numel()).to(first).view(first.shape)
    gradients = torch.autograd.grad(first, problem.trainable, weights)
    return {**out, **{f"gradient {i}": x for i, x in enumerate(gradients)}}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


MIXES = {
    **{name: {"loss_type": name} for name in LOSSES},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "smoothed": {"label_smoothing": 0.2, "reduction": "sum", "average_log_prob": True},
    "none": {"reduction": "none"},
    "long": {"ld_alpha": 0.3, "use_weighting": True, "return_stats": True},
    "mix": {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]},
    "callable": {"loss_type": lambda c, r: (c - r - 1).square()},
    "stats": {"return_stats": True},
    "reference head": {"reference_hidden": True},
}


@pytest.mark.parametrize("name", MIXES)
@PACKED
@FROZEN
def test_losses(nobody_looks, frozen, packed, name):
    """The bound: what is scored, a little more, all rows, and more than there are."""
    problem = make_head(CPU, torch.float64, packed=packed, frozen=frozen)
    options = dict(MIXES[name])
    if "reference_hidden" in options:
        options["reference_hidden"] = problem.reference_hidden
    count, total = scored_count(problem), problem.labels.numel()
    for workspace_mb in (None, 0.02, 0.003):
        options["workspace_mb"] = workspace_mb
        want = results_of("linear_dpo_loss", problem, **options)
        for bound in (count, count + 2, total - 1, 10 * total):
            got = results_of("linear_dpo_loss", problem, max_scored_tokens=bound, **options)
            assert_same(got, want)


@pytest.mark.parametrize("function", FUNCTIONS[:-1])
@PACKED
@FROZEN
@ROOMS
def test_log_probs(nobody_looks, workspace_mb, frozen, packed, function):
    problem = make_head(CPU, torch.float64, packed=packed, frozen=frozen)
    if function != "linear_sequence_logps" and packed:
        pytest.skip("tokens by themselves have no sequences")
    shift = {"shift": True}
    want = results_of(function, problem, workspace_mb=workspace_mb, **shift)
    for extra in (0, 2, 1000):
        bound = scored_count(problem) + extra
        options = {"workspace_mb": workspace_mb, "max_scored_tokens": bound, **shift}
        assert_same(results_of(function, problem, **options), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@FROZEN
def test_bits_of_one_tile(nobody_looks, frozen, target, dtype):
    """Of the same rows in the same order they are the same; what enters besides is not seen."""
    problem = make_head(target, dtype, frozen=frozen)
    options = {"backend": target.backend, "return_stats": True}
    want = results_of("linear_dpo_loss", problem, **options)
    bound = scored_count(problem)
    got = results_of("linear_dpo_loss", problem, max_scored_tokens=bound, **options)
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@FROZEN
@PACKED
def test_as_many_rows_as_promised(nobody_looks, monkeypatch, packed, frozen):
    """In one tile the logits are made once; over several those of a trainable head are made twice,
    because nobody knows which pairs a tile holds, unless all rows of a padded batch enter."""
    log = GemmLog(monkeypatch)
    problem = make_head(pairs=5, packed=packed, frozen=frozen, bias=False)
    few, every = scored_count(problem) + 1, problem.labels.numel() - 1
    again, pair = 1 if frozen else 2, 2 * 6
    size = next(size for size in range(1000, 10**6, 100) if room_of(problem, size) == pair)
    assert few > pair
    for bound, workspace, times in (
        (few, None, 1),
        (few, size, again),
        (every + 1, None, 1),
        (every + 1, size, again if packed else 1),
    ):
        workspace_mb = None if workspace is None else workspace / 2**20
        options = {"max_scored_tokens": bound, "workspace_mb": workspace_mb}
        results_of("linear_dpo_loss", problem, **options)
        rows = min(bound, every)
        expected = {"logits_into": times * rows, "hidden_gradient": rows}
        assert log.rows() == (expected if frozen else {**expected, "add_weight_gradient": rows})


@PACKED
@FROZEN
@pytest.mark.parametrize("workspace_mb", [None, 0.003], ids=["one", "many"])
@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo"}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("short", ["by one", "none promised"])
def test_a_broken_promise_is_nan(
    nobody_looks, target, short, options, workspace_mb, frozen, packed
):
    """Where nobody looks: every number of every result and every gradient."""
    if target.backend == "cpu":
        pytest.skip("it looks at labels")
    problem = make_head(target, packed=packed, frozen=frozen)
    bound = scored_count(problem) - 1 if short == "by one" else 0
    options = {**options, "return_stats": True, "workspace_mb": workspace_mb}
    options["backend"] = target.backend
    made = results_of("linear_dpo_loss", problem, max_scored_tokens=bound, **options)
    assert made.pop("token is_top1").dtype == torch.bool
    for name, value in made.items():
        assert value.isnan().all(), name


@pytest.mark.parametrize("function", FUNCTIONS[:-1])
@FROZEN
def test_log_probs_of_a_broken_promise_are_nan(nobody_looks, frozen, function):
    problem = make_head(frozen=frozen)
    options = {"backend": "torch", "shift": True}
    bound = scored_count(problem) - 1
    made = results_of(function, problem, max_scored_tokens=bound, **options)
    made.pop("is_top1", None)
    for name, value in made.items():
        assert value.isnan().all(), name


@pytest.mark.parametrize("function", FUNCTIONS)
@FROZEN
def test_a_broken_promise_raises_where_it_costs_nothing(frozen, function):
    problem = make_head(frozen=frozen)
    count = scored_count(problem)
    options = {"shift": True}
    results_of(function, problem, max_scored_tokens=count, **options)
    with pytest.raises(ValueError, match=rf"^max_scored_tokens: .*{count} tokens.*{count - 1}"):
        results_of(function, problem, max_scored_tokens=count - 1, **options)


def test_a_broken_promise_raises_where_values_are_validated(nobody_looks, monkeypatch):
    problem = make_head()
    monkeypatch.setenv("DPO_KERNELS_VALIDATE", "1")
    with pytest.raises(ValueError, match=r"^max_scored_tokens: "):
        results_of("linear_dpo_loss", problem, max_scored_tokens=1)


@PACKED
@FROZEN
@pytest.mark.parametrize("bound", [0, 1, 100])
def test_nothing_scored(nobody_looks, bound, frozen, packed):
    """Is no broken promise, whatever was promised."""
    problem = make_head(CPU, torch.float64, packed=packed, frozen=frozen, scored=0.0)
    for options in ({}, {"loss_type": "hinge"}, {"reference_hidden": problem.reference_hidden}):
        want = results_of("linear_dpo_loss", problem, **options)
        got = results_of("linear_dpo_loss", problem, max_scored_tokens=bound, **options)
        assert_same(got, want)
        assert not any(value.any() for name, value in got.items() if name.startswith("gradient"))


@pytest.mark.parametrize("promised", [False, True], ids=["counted", "promised"])
@PACKED
@FROZEN
def test_answers_and_pairs_without_tokens(nobody_looks, target, frozen, packed, promised):
    """The kernels, to which such a sequence is an empty one, make the loss of the logits."""
    problem = make_head(target, pairs=4, length=6, packed=packed, frozen=frozen)
    for sequence in (0, 2, 6, 7):
        if problem.cu_seqlens is None:
            problem.labels[sequence] = -100
        else:
            first, past = problem.cu_seqlens[sequence : sequence + 2]
            problem.labels[first:past] = -100
    shared = {"cu_seqlens": problem.cu_seqlens, "backend": target.backend}
    logits = problem.hidden @ problem.weight.t() + problem.bias
    want = dk.dpo_loss(logits, problem.labels, *problem.reference_logps, **shared)
    wanted = torch.autograd.grad(want.loss, problem.trainable)
    for workspace_mb in (None, 0.02):
        options = {**shared, "bias": problem.bias, "workspace_mb": workspace_mb}
        if promised:
            options["max_scored_tokens"] = scored_count(problem) + 2
        arguments = (problem.hidden, problem.weight, problem.labels, *problem.reference_logps)
        out = dk.linear_dpo_loss(*arguments, **options)
        for name, value in vars(want).items():
            torch.testing.assert_close(getattr(out, name), value, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(out.loss, problem.trainable)
        torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def test_an_empty_batch(nobody_looks):
    hidden = torch.zeros(0, 3, 6, requires_grad=True)
    weight, labels = torch.ones(5, 6, requires_grad=True), torch.zeros(0, 3, dtype=torch.int64)
    out = dk.linear_dpo_loss(hidden, weight, labels, reference_free=True, max_scored_tokens=7)
    out.loss.backward()
    assert out.loss == 0 and hidden.grad.shape == (0, 3, 6) and not weight.grad.any()


def test_a_module_holds_it():
    problem = make_head()
    count = scored_count(problem)
    arguments = (problem.hidden, problem.weight, problem.labels, *problem.reference_logps)
    loss = dk.LinearDPOLoss(max_scored_tokens=np.int64(count))
    assert loss(*arguments).loss.isfinite()
    with pytest.raises(ValueError, match=r"^max_scored_tokens: "):
        dk.LinearDPOLoss(max_scored_tokens=count - 1)(*arguments)


def test_a_new_bound_compiles_no_new_graph_from_the_second_on(nobody_looks):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    problem = make_head(bias=False)
    count = scored_count(problem)

    @torch.compile(fullgraph=True, backend=counter)
    def step(bound):
        return dk.linear_dpo_loss(
            problem.hidden,
            problem.weight,
            problem.labels,
            *problem.reference_logps,
            max_scored_tokens=bound,
            backend="torch",
        ).loss

    want = results_of("linear_dpo_loss", problem, backend="torch")
    for bound in (count, count + 1, count + 2, count + 5):
        loss = step(bound)
        torch.testing.assert_close(loss, want["loss"])
        gradients = torch.autograd.grad(loss, (problem.hidden, problem.weight))
        for i, gradient in enumerate(gradients):
            torch.testing.assert_close(0.5 * gradient, want[f"gradient {i}"])
    assert step(count - 1).isnan()
    assert counter.frame_count <= 2
    torch._dynamo.reset()
