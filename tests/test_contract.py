"""What autograd, in-place use, threads and batches may rely on."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dpo_kernels
from dpo_kernels.backends import cpu
from tests.helpers import CPU, LAYOUTS, assert_same_bits, make_problem
from tests.test_parity import gradient

packings = pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
# the fused sigmoid, and a loss on top of the sequence log-probs
LOSSES = ("sigmoid", "ipo")
losses = pytest.mark.parametrize("loss_type", LOSSES)


def loss_of(problem, backend, logits=None, **options):
    logits = problem.logits if logits is None else logits
    options = {**problem.layout, "backend": backend, **options}
    return dpo_kernels.dpo_loss(logits, problem.labels, *problem.reference, **options)


# upstream gradients


@losses
@packings
def test_expanded_upstream_gradient(target, packed, loss_type):
    """Stride 0, as .sum().backward() hands it over, equals the same gradient in memory."""
    problem = make_problem(target, packed=packed)
    options = {**problem.layout, "backend": target.backend}
    outputs = {
        "losses": loss_of(problem, target.backend, reduction="none", loss_type=loss_type).loss,
        "sequences": dpo_kernels.sequence_logps(problem.logits, problem.labels, **options),
        "tokens": dpo_kernels.token_logps(problem.logits, problem.labels, backend=target.backend),
    }
    for out in outputs.values():
        full = torch.full_like(out, 0.25)
        for upstream in (full[(0,) * out.dim()].expand(out.shape), full[:1].expand(out.shape)):
            grads = (
                torch.autograd.grad(out, problem.logits, (upstream,), retain_graph=True),
                torch.autograd.grad(out, problem.logits, (full,), retain_graph=True),
            )
            assert_same_bits(grads[0][0], grads[1][0])
    total = outputs["tokens"].sum()
    expected = torch.autograd.grad(
        outputs["tokens"], problem.logits, torch.ones_like(outputs["tokens"]), retain_graph=True
    )
    assert_same_bits(gradient(problem, total), expected[0])


def test_partly_expanded_and_strided_upstream_gradient(target):
    problem = make_problem(target, pairs=2, length=4)
    out = dpo_kernels.token_logps(problem.logits, problem.labels, backend=target.backend)
    row = torch.randn(4, device=target.device)
    for upstream in (row.expand(4, 4), row.expand(4, 4).t(), torch.randn(4, 8).to(row)[:, ::2]):
        grads = [
            torch.autograd.grad(out, problem.logits, g, retain_graph=True)[0]
            for g in (upstream, upstream.contiguous())
        ]
        assert_same_bits(*grads)


def test_zero_upstream_gradient_and_unused_outputs(target):
    """Of a token's logp that no loss uses nothing comes back, not even NaN."""
    problem = make_problem(target, scored=1.0)
    out = dpo_kernels.token_logps(problem.logits, problem.labels, backend=target.backend)
    upstream = torch.zeros_like(out)
    upstream[1, 2] = 1.0
    grad = gradient(problem, out, upstream)
    assert grad.any(-1).nonzero().tolist() == [[1, 2]]
    stats = dpo_kernels.token_stats(problem.logits, problem.labels, backend=target.backend)
    assert [value.requires_grad for value in stats] == [True, False, False, False, False]


@losses
@packings
def test_two_backward_passes(target, packed, loss_type):
    """retain_graph: the second pass gives the same gradient, and .grad adds up."""
    problem = make_problem(target, packed=packed)
    loss = loss_of(problem, target.backend, loss_type=loss_type).loss
    loss.backward(retain_graph=True)
    first = problem.logits.grad.clone()
    problem.logits.grad = None
    loss.backward(retain_graph=True)
    assert_same_bits(problem.logits.grad, first)
    loss.backward()
    assert_same_bits(problem.logits.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_upstream_scale_is_applied(target):
    problem = make_problem(target)
    loss = loss_of(problem, target.backend).loss
    one = torch.autograd.grad(loss, problem.logits, retain_graph=True)[0]
    eight = torch.autograd.grad(8 * loss, problem.logits, retain_graph=True)[0]
    # a power of two rounds nothing
    assert_same_bits(eight, 8 * one)


def test_no_gradient_wanted(target):
    problem = make_problem(target)
    with torch.no_grad():
        assert not loss_of(problem, target.backend).loss.requires_grad
    out = loss_of(problem, target.backend, problem.logits.detach())
    assert not out.loss.requires_grad


@losses
def test_gradient_reaches_what_made_the_logits(target, loss_type):
    """Through a head and a sliced vocabulary, against plain autograd."""
    problem = make_problem(target, vocab=9)
    hidden = torch.randn(4, 4, 6, device=target.device)
    weight = torch.randn(12, 6, device=target.device, requires_grad=True)
    grads = []
    for loss in (dpo_kernels.dpo_loss, dpo_kernels.reference.dpo_loss):
        options = {"loss_type": loss_type}
        if loss is dpo_kernels.dpo_loss:
            options["backend"] = target.backend
        logits = (hidden @ weight.t())[..., :9]
        out = loss(logits, problem.labels, *problem.reference, **options)
        grads.append(torch.autograd.grad(out.loss, weight)[0])
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    (
        lambda p, b: loss_of(p, b).loss,
        lambda p, b: dpo_kernels.sequence_logps(p.logits, p.labels, backend=b).sum(),
        lambda p, b: dpo_kernels.token_logps(p.logits, p.labels, backend=b).sum(),
    ),
    ids=("dpo_loss", "sequence_logps", "token_logps"),
)
def test_double_backward_raises(target, function):
    """Rather than leave a gradient penalty out without a word."""
    problem = make_problem(target)
    loss = function(problem, target.backend)
    (grad,) = torch.autograd.grad(loss, problem.logits, create_graph=True)
    penalty = grad.square().sum() + problem.logits.sum()
    with pytest.raises(RuntimeError, match="double backward"):
        penalty.backward()


def test_double_backward_through_a_checkpoint(target):
    """It unpacks what is saved once only."""
    problem = make_problem(target)

    def loss(logits):
        return dpo_kernels.sequence_logps(logits, problem.labels, backend=target.backend).sum()

    (plain,) = torch.autograd.grad(loss(problem.logits), problem.logits)
    out = checkpoint(loss, problem.logits, use_reentrant=False)
    (grad,) = torch.autograd.grad(out, problem.logits, create_graph=True)
    assert torch.equal(grad, plain)


@losses
def test_inference_mode(target, loss_type):
    problem = make_problem(target)
    expected = loss_of(problem, target.backend, loss_type=loss_type)
    with torch.inference_mode():
        out = loss_of(problem, target.backend, loss_type=loss_type)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.chosen_rewards, expected.chosen_rewards)


# in place


@losses
@packings
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("strided", (False, True), ids=("contiguous", "sliced"))
def test_in_place_backward(target, dtype, packed, strided, loss_type):
    """The logits' memory holds the fresh backward's bits, their version has moved, once only."""
    layout = "sliced vocabulary" if strided else "contiguous"
    problem = make_problem(target, dtype, packed=packed, layout=layout)
    options = {"loss_type": loss_type, "label_smoothing": 0.1 if loss_type == "sigmoid" else 0.0}
    fresh = gradient(problem, loss_of(problem, target.backend, **options).loss)

    # the padding of the larger tensor must survive
    storage = torch.full((*problem.logits.shape[:-1], problem.vocab + 3), 7.0).to(problem.logits)
    storage[..., : problem.vocab] = problem.logits.detach()
    storage.requires_grad_()
    logits = (storage * 1)[..., : problem.vocab]
    whole = logits._base
    version = logits._version
    loss = loss_of(problem, target.backend, logits, inplace_backward=True, **options).loss
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    assert_same_bits(grad, fresh)
    assert_same_bits(logits.detach(), fresh)
    assert logits._version > version
    assert (whole[..., problem.vocab :] == 7.0).all()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("function", ("token_logps", "sequence_logps"))
@packings
def test_in_place_backward_of_log_probs(target, function, packed):
    """token_logps and sequence_logps overwrite the logits they scored, with the same bits."""
    if packed and function == "token_logps":
        pytest.skip("token_logps has no cu_seqlens")
    problem = make_problem(target, packed=packed)
    call = getattr(dpo_kernels, function)
    options = {"backend": target.backend, **(problem.layout if packed else {})}
    fresh = gradient(problem, call(problem.logits, problem.labels, **options).square().sum())
    logits = problem.logits * 1
    out = call(logits, problem.labels, inplace_backward=True, **options).square().sum()
    (grad,) = torch.autograd.grad(out, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr()
    assert_same_bits(grad, fresh)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_in_place_backward_spoils_no_other_use_silently(target):
    """Whoever saved the logits for another backward is told."""
    problem = make_problem(target)
    logits = problem.logits * 1
    other = logits.square().sum()
    loss_of(problem, target.backend, logits, inplace_backward=True).loss.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_in_place_backward_of_copied_logits(target):
    """Logits without unit stride are copied: it is the copy that is overwritten."""
    problem = make_problem(target)
    fresh = gradient(problem, loss_of(problem, target.backend).loss)
    transposed = problem.logits.detach().transpose(1, 2).contiguous().transpose(1, 2)
    transposed.requires_grad_()
    before = transposed.detach().clone()
    loss = loss_of(problem, target.backend, transposed, inplace_backward=True).loss
    assert_same_bits(torch.autograd.grad(loss, transposed)[0], fresh)
    assert_same_bits(transposed.detach(), before)


@pytest.mark.parametrize("dim", (0, 1))
def test_in_place_backward_refuses_expanded_logits(dim):
    shape = [2, 3, 5]
    shape[dim] = 1
    logits = torch.zeros(shape, requires_grad=True).expand(2, 3, 5)
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"inplace_backward: .*expanded"):
        dpo_kernels.dpo_loss(logits, labels, reference_free=True, inplace_backward=True)


def test_in_place_backward_refuses_overlapping_logits():
    logits = torch.zeros(30).as_strided((2, 3, 5), (12, 4, 1)).requires_grad_()
    labels = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"inplace_backward: .*overlapping"):
        dpo_kernels.dpo_loss(logits, labels, reference_free=True, inplace_backward=True)


def test_expanded_logits_have_a_gradient(target):
    """Fresh gradients have memory of their own, so expanded logits are fine there."""
    row = torch.randn(1, 1, 5, device=target.device, requires_grad=True)
    labels = torch.tensor([[0, 1, 2], [3, 4, 0]], device=target.device)
    grads = []
    for loss, options in (
        (dpo_kernels.dpo_loss, {"backend": target.backend}),
        (dpo_kernels.reference.dpo_loss, {}),
    ):
        out = loss(row.expand(2, 3, 5), labels, reference_free=True, **options)
        grads.append(torch.autograd.grad(out.loss, row)[0])
    assert torch.allclose(*grads, atol=1e-6)


# bits


def results(problem, backend, **options):
    out = loss_of(problem, backend, reduction="none", **options)
    stats = dpo_kernels.token_stats(problem.logits, problem.labels, backend=backend)
    return (
        out.losses,
        out.chosen_logps,
        out.rejected_logps,
        *stats,
        gradient(problem, out.loss.sum()),
        gradient(problem, stats.logps.sum()),
    )


def assert_all_same_bits(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert_same_bits(x, y)


@packings
def test_same_bits_twice(target, packed):
    problem = make_problem(target, pairs=3, packed=packed, seed=20)
    assert_all_same_bits(results(problem, target.backend), results(problem, target.backend))


def alone(problem, pair: int, length: int | None = None):
    """Pair number ``pair``, padded with masked rows of NaN to ``length``."""
    rows = [pair, pair + len(problem.reference[0])]
    logits, labels = problem.logits.detach()[rows], problem.labels[rows]
    if length is not None:
        more = length - labels.shape[1]
        logits = torch.nn.functional.pad(logits, (0, 0, 0, more), value=float("nan"))
        labels = torch.nn.functional.pad(labels, (0, more), value=-100)
    out = problem.with_logits(logits)
    out.labels = labels
    out.reference = tuple(x[pair : pair + 1] for x in problem.reference)
    return out


# 67: a row in one segment; 33000: in several, which a small batch may spread over several blocks
@pytest.mark.parametrize("vocab", (67, 33_000))
def test_same_bits_alone_and_in_a_batch(target, vocab):
    """And whatever padding the longest sequence of a batch brings."""
    if target.backend == "torch":
        pytest.skip("torch picks the order of its sums by the shape of the batch")
    length = 4 if vocab == 67 else 2
    problem = make_problem(target, pairs=3, length=length, vocab=vocab, scored=1.0, seed=21)
    whole = loss_of(problem, target.backend, reduction="none")
    grad = gradient(problem, whole.loss.sum())
    for pair, padded_to in ((0, None), (2, None), (1, length + 3)):
        one = alone(problem, pair, padded_to)
        out = loss_of(one, target.backend, reduction="none")
        for name in ("losses", "chosen_logps", "rejected_logps", "chosen_rewards"):
            assert_same_bits(getattr(out, name), getattr(whole, name)[pair : pair + 1])
        assert_same_bits(gradient(one, out.loss.sum())[:, :length], grad[[pair, pair + 3]])


def test_same_bits_padded_and_packed(target):
    if target.backend == "torch":
        pytest.skip("torch picks the order of its sums by the shape of the batch")
    padded = make_problem(target, pairs=2, length=6, scored=0.8, seed=22)
    lengths = torch.tensor([6, 3, 5, 1], device=target.device)
    inside = torch.arange(6, device=target.device) < lengths[:, None]
    padded.labels[~inside] = -100
    packed = padded.with_logits(padded.logits.detach()[inside])
    packed.labels = padded.labels[inside]
    packed.cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    outs = [loss_of(p, target.backend, reduction="none") for p in (padded, packed)]
    assert_same_bits(outs[0].losses, outs[1].losses)
    grads = [gradient(p, out.loss.sum()) for p, out in zip((padded, packed), outs, strict=True)]
    assert_same_bits(grads[0][inside], grads[1])


@pytest.fixture(params=("openmp", "own"))
def workers(request):
    """Whose threads the CPU kernels work on: those of torch's OpenMP runtime, or their own."""
    if request.param == "openmp" and not cpu.openmp_parallel():
        pytest.skip("this torch brings no GNU OpenMP runtime along")
    cpu.MODULE.cpu_share_openmp(cpu.openmp_parallel() if request.param == "openmp" else 0)
    yield request.param
    cpu.MODULE.cpu_share_openmp(cpu.openmp_parallel())


# 1 and 2 scored rows of 200000 classes are split over the threads, 40 of 500 are not
@pytest.mark.parametrize(("length", "vocab"), ((1, 200_000), (2, 33_000), (20, 500)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_same_bits_for_any_number_of_threads(threads, workers, length, vocab, dtype):
    problem = make_problem(CPU, dtype, pairs=1, length=length, vocab=vocab, scored=1.0, seed=23)
    expected = None
    for count in (1, 2, 3, 7):
        threads(count)
        values = results(problem, "cpu", shift=False)
        expected = expected or values
        assert_all_same_bits(values, expected)


def test_same_bits_whatever_the_layout(target):
    """Alignment, and so the width of loads, changes nothing."""
    problems = [make_problem(target, layout=x, vocab=131, seed=24) for x in LAYOUTS]
    first, *others = (results(p, target.backend) for p in problems)
    for other in others:
        assert_all_same_bits(other, first)


# processes and threads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_fork(threads, workers, monkeypatch):
    """A child of a process that has used the kernels' threads can use them too."""
    # poisoning fills memory with torch's own threads, which do not survive a fork
    monkeypatch.undo()
    threads(2)
    problem = make_problem(length=40, vocab=3000, seed=25)
    loss = loss_of(problem, "cpu").loss
    expected = gradient(problem, loss)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # a deadlock ends here
            signal.alarm(20)
            out = loss_of(problem, "cpu")
            # numpy's comparison, for the same reason
            same = (gradient(problem, out.loss).numpy() == expected.numpy()).all()
            os.write(write, b"1" if same and out.loss.item() == loss.item() else b"0")
        finally:
            os._exit(0)
    os.close(write)
    answer = os.read(read, 1)
    os.waitpid(child, 0)
    os.close(read)
    assert answer == b"1"
    assert_same_bits(gradient(problem, loss_of(problem, "cpu").loss), expected)


def test_several_python_threads(threads, workers):
    """The GIL is released, so calls overlap: each gives the bits it gives alone."""
    threads(2)
    # large enough that each call is worth two threads
    problems = [make_problem(length=8 + n, vocab=20_000 + n, seed=n) for n in range(8)]
    expected = [results(p, "cpu") for p in problems]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(results, p, "cpu") for p in problems * 3]
            for future, wanted in zip(futures, expected * 3, strict=True):
                assert_all_same_bits(future.result(timeout=60), wanted)
    finally:
        sys.setswitchinterval(interval)


def test_logits_of_another_thread_survive_until_backward():
    """A huge-page gradient outlives the call that made it."""
    problem = make_problem(length=16, vocab=40_000, seed=26)
    grads = [gradient(problem, loss_of(problem, "cpu").loss) for _ in range(3)]
    assert len({g.data_ptr() for g in grads}) == 3
    kept = grads.pop().clone()
    assert_same_bits(grads[0], kept)
    # the memory is the tensor's own, writable
    grads[0].mul_(2.0)
    assert_same_bits(grads[0], 2 * kept)
    assert_same_bits(grads[1], kept)


# autocast


@losses
def test_autocast(target, loss_type):
    """bfloat16 logits of an autocast head, float32 results; autocast itself changes no bit."""
    problem = make_problem(target, vocab=9)
    hidden = torch.randn(4, 4, 6, device=target.device)
    weight = torch.randn(9, 6, device=target.device, requires_grad=True)
    with torch.autocast(target.device, torch.bfloat16):
        logits = torch.nn.functional.linear(hidden, weight)
        inside = loss_of(problem, target.backend, logits, loss_type=loss_type)
    assert logits.dtype == torch.bfloat16
    assert inside.loss.dtype == torch.float32
    outside = loss_of(problem, target.backend, logits, loss_type=loss_type)
    assert_same_bits(inside.loss, outside.loss)
    grads = [torch.autograd.grad(x.loss, weight, retain_graph=True)[0] for x in (inside, outside)]
    assert_same_bits(*grads)
    with torch.autocast(target.device, torch.bfloat16):
        again = loss_of(problem, target.backend, logits.float(), loss_type=loss_type)
        assert again.loss.dtype == torch.float32
