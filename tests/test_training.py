"""Features of PyTorch that a training run leans on, each tried with the fused losses.

Truth is the same run without the feature, or with the loss in plain PyTorch.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dpo_kernels as dk
from tests.helpers import assert_same_bits

VOCAB, WIDTH = 37, 8


@pytest.fixture(autouse=True)
def one_thread(threads):
    # small problems: threads would only wait for each other
    threads(1)


class Model(nn.Module):
    """A body and a head; the loss from logits or from hidden states, inside its forward."""

    def __init__(self, fused: str = "hidden", frozen: bool = False, returns: str = "loss"):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight.requires_grad_(not frozen)
        self.fused, self.returns = fused, returns
        self.options = {"reference_free": True, "beta": 0.3}

    def hidden(self, ids):
        return torch.tanh(self.mix(self.body(ids)))

    def forward(self, ids, labels):
        hidden = self.hidden(ids)
        if self.fused == "hidden":
            output = dk.linear_dpo_loss(hidden, self.head.weight, labels, **self.options)
        elif self.fused == "logits":
            output = dk.dpo_loss(self.head(hidden), labels, **self.options)
        else:
            output = dk.reference.dpo_loss(self.head(hidden), labels, **self.options)
        if self.returns == "loss":
            return output.loss
        if self.returns == "output":
            return output
        if self.returns == "tuple":
            return output.loss, output.losses
        return {"loss": output.loss, "margins": output.chosen_rewards - output.rejected_rewards}


def data(seed: int = 0, pairs: int = 3, length: int = 6):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (2 * pairs, length), generator=rng)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=rng) < 0.3, -100)
    return ids, labels


def gradients(model) -> list:
    return [p.grad for p in model.parameters() if p.requires_grad]


def trained(fused: str, step=None, steps: int = 3, model=None, **options) -> list:
    """Gradients of every step and the parameters after it."""
    model = model or Model(fused, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []
    for i in range(steps):
        optimizer.zero_grad()
        if step is None:
            model(*data(i)).backward()
        else:
            step(model, *data(i))
        seen += [g.clone() for g in gradients(model)]
        optimizer.step()
    return [*seen, *(p.detach().clone() for p in model.parameters())]


def assert_close(ours: list, theirs: list, tolerance: float = 1e-5) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


paths = pytest.mark.parametrize("fused", ("logits", "hidden"))
heads = pytest.mark.parametrize("frozen", (False, True), ids=("trainable", "frozen"))


@paths
@heads
def test_training_is_that_of_the_naive_loss(fused, frozen):
    assert_close(trained(fused, frozen=frozen), trained("naive", frozen=frozen))


# what changes the pass backward


@paths
@heads
@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(fused, frozen, reentrant):
    """Around body and loss: everything is computed again, to the same bits."""

    def step(model, ids, labels):
        # a reentrant checkpoint needs an input with a gradient
        start = torch.ones((), requires_grad=True)
        run = lambda start: model(ids, labels) * start  # noqa: E731
        checkpoint(run, start, use_reentrant=reentrant).backward()

    for a, b in zip(
        trained(fused, step, frozen=frozen), trained(fused, frozen=frozen), strict=True
    ):
        assert_same_bits(a, b)


@paths
def test_checkpoint_around_the_body_only(fused):
    def step(model, ids, labels):
        body = model.hidden
        model.hidden = lambda ids: checkpoint(body, ids, use_reentrant=False)
        model(ids, labels).backward()
        model.hidden = body

    for a, b in zip(trained(fused, step), trained(fused), strict=True):
        assert_same_bits(a, b)


@paths
@heads
def test_accumulation(fused, frozen):
    """The gradient of a batch is the sum of those of its parts."""

    def step(model, ids, labels):
        for pair in range(3):
            rows = [pair, pair + 3]
            (model(ids[rows], labels[rows]) / 3).backward()

    assert_close(trained(fused, step, frozen=frozen), trained(fused, frozen=frozen))


@paths
@heads
def test_retain_graph(fused, frozen):
    """Two passes add up to twice the gradient: nothing is scaled in place."""

    def step(model, ids, labels):
        loss = model(ids, labels)
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward()

    assert_close(trained(fused, step, frozen=frozen), trained(fused, frozen=frozen))


@paths
def test_hooks_see_the_gradient(fused):
    """Of the tensor that enters the loss, of the parameter, and after it has accumulated."""
    model, seen = Model(fused), {}
    ids, labels = data()
    model.head.weight.register_hook(lambda grad: seen.update(parameter=grad.clone()))
    model.head.weight.register_post_accumulate_grad_hook(
        lambda weight: seen.update(accumulated=weight.grad.clone())
    )
    model.mix.register_full_backward_hook(lambda *_: seen.update(module=True))
    hidden = model.hidden(ids)
    hidden.register_hook(lambda grad: 2 * grad)
    model.hidden = lambda ids: hidden
    model(ids, labels).backward()
    plain = Model(fused)
    plain(ids, labels).backward()
    assert_same_bits(seen["parameter"], plain.head.weight.grad)
    assert_same_bits(seen["accumulated"], plain.head.weight.grad)
    assert seen["module"]
    assert_same_bits(model.mix.weight.grad, 2 * plain.mix.weight.grad)


@paths
def test_anomaly_mode(fused):
    with torch.autograd.detect_anomaly(check_nan=True):
        seen = trained(fused)
    for a, b in zip(seen, trained(fused), strict=True):
        assert_same_bits(a, b)
    model = Model(fused)
    with torch.autograd.detect_anomaly(check_nan=True):
        loss = model(*data()) * torch.tensor(float("nan"))
        with pytest.raises(RuntimeError, match="returned nan"):
            loss.backward()


@paths
@heads
def test_deterministic_mode(fused, frozen):
    """No operation of ours is one that torch calls nondeterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        seen = trained(fused, frozen=frozen)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(seen, trained(fused, frozen=frozen), strict=True):
        assert_same_bits(a, b)


# precision


@paths
@heads
def test_autocast(fused, frozen):
    """bfloat16 inside, float32 master weights and gradients, and close to the float32 run."""

    def step(model, ids, labels):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels)
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(g.dtype == torch.float32 for g in gradients(model))

    assert_close(trained(fused, step, frozen=frozen), trained(fused, frozen=frozen), 5e-2)


@paths
@heads
def test_grad_scaler_with_an_overflow(fused, frozen):
    """A scale that overflows float16 skips the step and halves; a smaller one trains."""
    model = Model(fused, frozen=frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    before = model.mix.weight.detach().clone()
    skipped = 0
    for i in range(3):
        with torch.autocast("cpu", torch.float16):
            loss = model(*data(i))
        scaler.scale(loss).backward()
        if i == 0:
            assert not model.mix.weight.grad.isfinite().all()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        skipped += scaler.get_scale() < scale
        scaler.update(2.0**10)
    assert skipped == 1
    assert model.mix.weight.isfinite().all()
    assert not torch.equal(model.mix.weight, before)


# processes and threads


def in_child(work) -> bytes:
    """What ``work`` returns in a forked child; b"" if it died or took more than 20 s."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            os.write(write, work())
        finally:
            os._exit(0)
    os.close(write)
    answer = os.read(read, 100)
    os.waitpid(child, 0)
    os.close(read)
    return answer


@paths
def test_fork(fused):
    """A child of a process that has trained computes what its parent does."""
    ids, labels = data(pairs=1)
    model = Model(fused)
    expected = model(ids, labels).item()

    def work():
        # torch's own matrix products on several threads do not survive a fork
        torch.set_num_threads(1)
        with torch.no_grad():
            return str(model(ids, labels).item()).encode()

    assert in_child(work) == str(expected).encode()


class Scored(torch.utils.data.Dataset):
    """Precomputes log-probs where a DataLoader's worker reads them, as reference models do."""

    def __len__(self):
        return 6

    def __getitem__(self, i):
        logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(i))
        return dk.token_logps(logits[None], torch.arange(5)[None])[0]


def test_dataloader_workers():
    loader = torch.utils.data.DataLoader(Scored(), batch_size=2, num_workers=2, timeout=60)
    alone = torch.stack([Scored()[i] for i in range(6)])
    assert_same_bits(torch.cat(list(loader)), alone)


@paths
def test_eight_threads_train_eight_models(fused, threads):
    """Backward runs on the thread that called it; each model ends with the bits it gets alone."""
    threads(2)
    expected = trained(fused)
    # made here: the seed is the process's
    models = [Model(fused) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for run in [pool.submit(trained, fused, model=model) for model in models]:
            for a, b in zip(run.result(timeout=60), expected, strict=True):
                assert_same_bits(a, b)


def test_ctrl_c_in_a_long_call():
    """KeyboardInterrupt comes when the kernel returns, and the next call is right."""
    logits = torch.randn(2, 300, 60_000)
    labels = torch.randint(60_000, (2, 300))
    expected = dk.token_logps(logits, labels)

    def interrupt():
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    # a shell has its background jobs ignore the signal
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                dk.token_logps(logits, labels)
    finally:
        signal.signal(signal.SIGINT, handler)
    thread.join()
    assert_same_bits(dk.token_logps(logits, labels), expected)


# memory


def resident() -> int:
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@paths
@heads
def test_memory_is_flat(fused, frozen):
    """5,000 calls with their backward over the four cases, and not a MiB more at the end."""
    model = Model(fused, frozen=frozen)
    batch = data(pairs=1, length=3)

    def calls(count):
        for _ in range(count):
            model(*batch).backward()
            model.zero_grad()

    calls(250)
    before = resident()
    calls(1000)
    # pages of the allocator's own come and go
    assert resident() - before < 1 << 20


def test_memory_of_large_gradients_is_flat():
    """Gradients of huge pages are given back."""
    logits = torch.randn(2, 64, 40_000, requires_grad=True)
    labels = torch.randint(40_000, (2, 64))

    def calls(count):
        for _ in range(count):
            dk.dpo_loss(logits, labels, reference_free=True).loss.backward()
            logits.grad = None

    calls(3)
    before = resident()
    calls(12)
    # one gradient takes 20 MiB
    assert resident() - before < 10 << 20
