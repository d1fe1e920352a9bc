"""From hidden states: how many GEMMs on which rows, autograd's contracts, compilation, refusals."""

from __future__ import annotations

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels import reference
from dpo_kernels.dispatch import backend_module
from dpo_kernels.linear import gemm, passes, plan
from dpo_kernels.linear.workspace import Head, HeadOptions, Workspace
from dpo_kernels.sequences import SequenceLayout
from dpo_kernels.types import RowOptions
from tests.helpers import Target
from tests.linear_helpers import CPU, GemmLog, make_head, with_gradients

FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def scored_count(problem, shift=True) -> int:
    layout = {"shift": shift, "cu_seqlens": problem.cu_seqlens}
    return int((reference.scored_labels(problem.labels, **layout) != -100).sum())


def space_of(problem, workspace: int) -> Workspace:
    rows = RowOptions(-100, True, 1.0, 0.0, 1.0)
    options = HeadOptions(rows, problem.hidden.dtype, "exact", workspace, "")
    layout = SequenceLayout(problem.labels, problem.cu_seqlens, -100, True)
    return Workspace(Head.of(problem.weight, None, options), layout, options, True)


def room_of(problem, workspace: int) -> int:
    """Rows of a tile in a workspace of so many bytes."""
    return space_of(problem, workspace).plan.tile_rows


@pytest.fixture
def log(monkeypatch) -> GemmLog:
    return GemmLog(monkeypatch)


@pytest.mark.parametrize("workspace_mb", [None, 0.02])
@PACKED
@pytest.mark.parametrize("reference_kind", ["logps", "shared head", "own head"])
@FROZEN
def test_three_gemms_or_two_on_the_scored_rows_only(
    log, frozen, reference_kind, packed, workspace_mb
):
    problem = make_head(packed=packed, frozen=frozen, bias=False)
    args, options = (), {"cu_seqlens": problem.cu_seqlens, "workspace_mb": workspace_mb}
    if reference_kind == "logps":
        args = problem.reference_logps
    else:
        options["reference_hidden"] = problem.reference_hidden
    if reference_kind == "own head":
        options["reference_weight"] = problem.weight.detach().clone()
    with_gradients(dk.linear_dpo_loss, problem, *args, **options)
    rows = scored_count(problem)
    expected = {"logits_into": rows * (1 if reference_kind == "logps" else 2)}
    expected["hidden_gradient"] = rows
    if not frozen:
        expected["add_weight_gradient"] = rows
    assert log.rows() == expected


def test_only_a_pair_larger_than_the_workspace_is_computed_again(log):
    """Pairs of 2, 10 and 4 scored rows with room for 7: the second alone makes a fourth GEMM."""
    problem = make_head(pairs=3, length=6, scored=2.0, bias=False)
    lengths = [1, 5, 2, 1, 5, 2]
    for row, length in zip(problem.labels, lengths, strict=True):
        row[length + 1 :] = -100
    workspace = next(size for size in range(1000, 10**6, 100) if room_of(problem, size) == 7)
    options = {"workspace_mb": workspace / 2**20}
    with_gradients(dk.linear_dpo_loss, problem, *problem.reference_logps, **options)
    made = log.rows()
    assert made["hidden_gradient"] == made["add_weight_gradient"] == 16
    assert made["logits_into"] == 16 + 10


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "aot"}, {"reduction": "none"}, {"loss_type": lambda c, r: (c - r).square()}],
    ids=["aot", "none", "callable"],
)
def test_four_gemms_where_slopes_come_late(log, options):
    problem = make_head(bias=False)
    with_gradients(dk.linear_dpo_loss, problem, *problem.reference_logps, **options)
    rows = scored_count(problem)
    expected = {"logits_into": 2 * rows, "hidden_gradient": rows, "add_weight_gradient": rows}
    assert log.rows() == expected


@FROZEN
def test_gemms_of_logps(log, frozen):
    problem = make_head(frozen=frozen, bias=False)
    logps = dk.linear_sequence_logps(problem.hidden, problem.weight, problem.labels)
    logps.square().sum().backward()
    rows = scored_count(problem)
    once, twice = {"logits_into": rows}, {"logits_into": 2 * rows}
    backward = {"hidden_gradient": rows}
    weight = {} if frozen else {"add_weight_gradient": rows}
    assert log.rows() == {**(once if frozen else twice), **backward, **weight}


@pytest.mark.parametrize("workspace_mb", [None, 0.02], ids=["one tile", "tiles"])
@pytest.mark.parametrize("reference_kind", ["logps", "head", "none"])
@PACKED
@FROZEN
def test_the_kernels_make_the_sigmoid_loss(
    monkeypatch, frozen, packed, reference_kind, workspace_mb
):
    """Not torch, as it makes the others; nor is anything of a token kept."""

    def refuse(*args):
        raise AssertionError("the loss in torch")

    problem = make_head(packed=packed, frozen=frozen)
    arguments, options = problem.reference_logps, {"workspace_mb": workspace_mb, **problem.head}
    if reference_kind == "head":
        arguments, options["reference_hidden"] = (), problem.reference_hidden
    elif reference_kind == "none":
        arguments, options["reference_free"] = (), True
    monkeypatch.setattr(passes, "pair_output", refuse)
    for loss in ({}, {"label_smoothing": 0.1, "reduction": "sum"}, {"average_log_prob": True}):
        with_gradients(dk.linear_dpo_loss, problem, *arguments, **options, **loss)
    with pytest.raises(AssertionError, match="in torch"):
        dk.linear_dpo_loss(
            problem.hidden, problem.weight, problem.labels, *arguments, **options, ld_alpha=0.5
        )


@PACKED
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_rows_that_score_nothing_beside_a_pair_without_a_number(packed, loss_type):
    """A frozen head's gradients are scaled by NaN, and theirs stay 0; a pair outgrows the tile."""
    problem = make_head(packed=packed, frozen=True)
    logps = problem.reference_logps[0].clone()
    logps[1] = torch.nan
    options = {**problem.head, "workspace_mb": 0.003, "loss_type": loss_type}
    _, (gradient,) = with_gradients(
        dk.linear_dpo_loss, problem, logps, problem.reference_logps[1], **options
    )
    labels = reference.scored_labels(problem.labels, shift=True, cu_seqlens=problem.cu_seqlens)
    scored = (labels != -100).flatten().roll(-1)
    gradient = gradient.flatten(0, -2)
    assert gradient[scored].isnan().any() and not gradient[~scored].any()


def test_no_grad_makes_only_the_forward(log):
    problem = make_head()
    with torch.no_grad():
        out = dk.linear_dpo_loss(
            problem.hidden, problem.weight, problem.labels, *problem.reference_logps
        )
    assert not out.loss.requires_grad
    assert log.rows() == {"logits_into": scored_count(problem)}


@pytest.mark.parametrize("wanted", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_only_the_gradients_asked_for(wanted):
    """Every combination of hidden, weight and bias, in the fused loss and under a user's loss."""
    problem = make_head(CPU, torch.float64)
    for leaf, want in zip(problem.leaves, wanted, strict=True):
        leaf.requires_grad_(bool(want))

    def run(module, own_loss: bool):
        options = {**problem.head}
        if own_loss:
            logps = module.linear_sequence_logps(
                problem.hidden, problem.weight, problem.labels, **options
            )
            return logps.square().sum()
        return module.linear_dpo_loss(
            problem.hidden, problem.weight, problem.labels, *problem.reference_logps, **options
        ).loss

    for own_loss in (False, True):
        ours, truth = run(dk, own_loss), run(reference, own_loss)
        assert ours.requires_grad == any(wanted)
        if not any(wanted):
            continue
        got = torch.autograd.grad(ours, problem.trainable)
        want = torch.autograd.grad(truth, problem.trainable)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("casts", [False, True], ids=["copied", "written at once"])
@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@FROZEN
def test_gradients_of_another_dtype_than_the_logits(monkeypatch, frozen, dtype, backend, casts):
    """What a GPU does to feed its matrix units: float32 logits, dlogits in half precision."""
    module = backend_module(backend)
    reason = module.unavailable() or module.refuses(torch.device("cpu"), dtype)
    if reason is not None:
        pytest.skip(reason)
    if casts and not module.CASTS_GRADIENT:
        pytest.skip(f"{backend} writes gradients in the dtype of the logits only")
    monkeypatch.setattr(gemm, "gradient_dtype", lambda compute, precision, device: compute)
    monkeypatch.setattr(module, "CASTS_GRADIENT", casts)
    problem = make_head(CPU, dtype, frozen=frozen)
    options = {"backend": backend, "workspace_mb": 0.02}
    ours, got = with_gradients(
        dk.linear_dpo_loss, problem, *problem.reference_logps, **problem.head, **options
    )
    wide = problem.to(torch.float64)
    truth, want = with_gradients(
        reference.linear_dpo_loss, wide, *wide.reference_logps, **wide.head
    )
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, want, strict=True):
        # rounded as dlogits, as a sum and as a result
        assert (a.double() - b).abs().max() < 4 * torch.finfo(dtype).eps * b.abs().max()


def test_without_onednn(monkeypatch):
    """Where torch has no oneDNN, torch.mm makes the same numbers."""
    results = []
    for has in (True, False):
        monkeypatch.setattr(gemm, "_has_onednn", lambda has=has: has)
        problem = make_head()
        results.append(
            with_gradients(dk.linear_dpo_loss, problem, *problem.reference_logps, **problem.head)
        )
    torch.testing.assert_close(results[0][0].loss, results[1][0].loss)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b)


@PACKED
@FROZEN
@pytest.mark.parametrize("average", [False, True], ids=["sums", "means"])
def test_a_policy_that_equals_log_probs_given_for_it(target, average, packed, frozen):
    """Those of linear_sequence_logps, as trainers compute them ahead: exactly ln 2."""
    for seed in range(8):
        problem = make_head(target, packed=packed, frozen=frozen, seed=seed)
        head = (problem.hidden, problem.weight, problem.labels)
        options = {**problem.head, "average_log_prob": average, "backend": target.backend}
        with torch.no_grad():
            logps = dk.linear_sequence_logps(*head, **options)
        output = dk.linear_dpo_loss(*head, *logps.chunk(2), **options)
        assert output.loss.item() == torch.tensor(2.0).log().item()
        assert not output.chosen_rewards.any() and not output.rejected_rewards.any()


@PACKED
@FROZEN
@pytest.mark.parametrize("workspace_mb", [None, 0.01])
def test_no_host_knows_what_is_scored(monkeypatch, log, frozen, packed, workspace_mb):
    """While a CUDA graph is captured every row goes through, and the results are the same."""

    def run():
        return with_gradients(
            dk.linear_dpo_loss,
            problem,
            **problem.head,
            reference_hidden=problem.reference_hidden,
            workspace_mb=workspace_mb,
        )

    problem = make_head(CPU, torch.float64, frozen=frozen, packed=packed)
    known, want = run()
    log.rows()
    monkeypatch.setattr(plan, "_captures_graph", lambda device: True)
    unknown, got = run()
    assert log.rows()["hidden_gradient"] == problem.labels.numel() - 1
    torch.testing.assert_close(unknown.loss, known.loss, rtol=1e-12, atol=0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_columns_behind_the_vocabulary_are_written():
    """cuBLAS loads whole vectors, the last of a row with what lies behind it; initcheck saw it."""
    problem = make_head(CPU, torch.bfloat16, vocab=1003)
    space = space_of(problem, 1 << 20)
    room = space._room(space.gradient_dtype)
    assert room.shape == (space.count, 1003)
    assert room._base.shape[1] > 1003
    assert not room._base[:, 1003:].any()


@pytest.mark.gpu
@FROZEN
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cuda_graph(backend, frozen):
    """Captured, replayed on other inputs, and equal to an eager call on those."""
    target = Target(backend, "cuda")
    problem = make_head(target, torch.bfloat16, frozen=frozen, vocab=1024, hidden_size=64)

    def step():
        return with_gradients(
            dk.linear_dpo_loss, problem, *problem.reference_logps, **problem.head, backend=backend
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, gradients = step()
    other = make_head(target, torch.bfloat16, frozen=frozen, vocab=1024, hidden_size=64, seed=1)
    with torch.no_grad():
        problem.hidden.copy_(other.hidden)
        problem.labels.copy_(other.labels)
    graph.replay()
    eager, expected = step()
    torch.testing.assert_close(out.loss, eager.loss, rtol=1e-4, atol=1e-4)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


@FROZEN
def test_a_reference_is_not_rounded_to_the_dtype_of_the_policy(frozen):
    """float32 beside a bfloat16 policy: the reference's log-probs are those it has by itself."""
    policy, other = make_head(dtype=torch.bfloat16, frozen=frozen), make_head(seed=1)
    head = {"reference_weight": other.weight.detach(), "reference_bias": other.bias.detach()}
    output, _ = with_gradients(
        dk.linear_dpo_loss, policy, bias=policy.bias, reference_hidden=other.hidden, **head
    )
    alone = dk.linear_sequence_logps(other.hidden, other.weight, policy.labels, bias=other.bias)
    rewards = torch.cat((output.chosen_rewards, output.rejected_rewards))
    logps = torch.cat((output.chosen_logps, output.rejected_logps))
    torch.testing.assert_close(rewards, 0.1 * (logps - alone.detach()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": "robust"}, {"average_log_prob": True}, {"reduction": "sum"}],
    ids=str,
)
def test_small_gradients_in_float16(monkeypatch, options):
    """On a GPU float16 holds the rows of hidden times gradients that are far below 1, and made
    before GradScaler's factor is known."""
    monkeypatch.setattr(gemm, "gradient_dtype", lambda compute, precision, device: compute)
    problem = make_head(CPU, torch.float16, pairs=8, length=64, scored=1.0)
    wide, options = problem.to(torch.float64), {**options, "beta": 1e-3}

    def gradients(function, problem, **rest):
        arguments = (problem.hidden, problem.weight, problem.labels, *problem.reference_logps)
        loss = function(*arguments, **problem.head, **options, **rest).loss
        return torch.autograd.grad(loss * 2.0**16, problem.trainable)

    got = gradients(dk.linear_dpo_loss, problem, backend="torch")
    want = gradients(reference.linear_dpo_loss, wide)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() < 4 * torch.finfo(torch.float16).eps * b.abs().max()
