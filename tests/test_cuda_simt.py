"""The CUDA kernels, executed on the host by tests/simt, against log_softmax in float64.

Vocabularies: 1 (no others to sum), 7 (less than a vector), 1000 (one ragged segment), 1024 (a
segment of 16-bit elements, two of float32), 4099 (odd: most rows are misaligned). 35000 float32
have more segments than a warp has lanes. Two warps a block, so that a row has several and most
rows are shared.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import dpo_kernels

from .simt.cases import (
    FLOATS,
    assert_gradient,
    assert_matches,
    gradients,
    make_case,
    oracle,
    scored_rows,
)
from .simt.host import Case, Host, compile_host


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Host:
    library = tmp_path_factory.mktemp("simt") / "libsimt.so"
    return Host(compile_host(library, ("simt.cpp", "driver.cpp"), "-shared", "-fPIC"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 1000, 1024, 4099])
def test_forward_and_backward(host, dtype, vocab):
    pair = {"beta": 0.3, "label_smoothing": 0.1, "weight": 0.5, "reference": torch.randn(4) - 20}
    case = make_case(dtype, vocab, shift=True, pair=pair, stats=True)
    got = host.forward(case)
    assert_matches(case, got)
    assert_gradient(*gradients(host, case, got))
    without = host.forward(dataclasses.replace(case, stats=False))
    assert all(torch.equal(without[name], got[name]) for name in without)


@pytest.mark.parametrize("offset", [0, 1, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_address_changes_no_bit(host, dtype, offset):
    """The same rows at another alignment, the gradient's alignment different again."""
    aligned = make_case(dtype, 2059, 2, 4, padding=(-2059) % 8, seed=3)
    moved = make_case(dtype, 2059, 2, 4, padding=offset, offset=offset, seed=3)
    one, two = host.forward(aligned), host.forward(moved)
    assert_matches(moved, two)
    for name in one:
        assert torch.equal(one[name], two[name]), name
    for padding in (0, 3):
        a, truth = gradients(host, aligned, one)
        b, _ = gradients(host, moved, two, padding=padding)
        assert_gradient(b, truth)
        assert torch.equal(a, b)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("index", ["token", "sequence", "pair"])
def test_packed(host, shift, index):
    case = make_case(packed=True, shift=shift, vocab=300, average=True, pair={"beta": 2.0})
    got = host.forward(case)
    assert_matches(case, got)
    assert_gradient(*gradients(host, case, got, index))


def test_rows_outside_every_sequence_score_nothing(host):
    case = make_case(vocab=40, packed=True, masked=0.0)
    case.cu_seqlens = torch.tensor([2, 5, 9])
    got = host.forward(case)
    assert_matches(case, got)
    assert_gradient(*gradients(host, case, got))


@pytest.mark.parametrize("blocks", [1, 2, 5, 40])
def test_split_rows_and_grids_change_no_bit(host, blocks):
    """More segments than lanes; shares from many rows to a fraction of a segment's row."""
    case = make_case(torch.float32, 35000, 2, 2, masked=0.0, stats=True)
    one = host.forward(dataclasses.replace(case, grid={"blocks": 1, "threads": 32}))
    assert_matches(case, one)
    got = host.forward(dataclasses.replace(case, grid={"blocks": blocks, "threads": 64}))
    assert all(torch.equal(one[name], got[name]) for name in one)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_agrees_with_the_cpu_kernels(host, dtype):
    if reason := dpo_kernels.available_backends()["cpu"]:
        pytest.skip(reason)
    case = make_case(dtype, 4099, stats=True, shift=True, temperature=0.8)
    got = host.forward(case)
    cpu = dpo_kernels.token_stats(
        case.logits, case.labels, shift=True, temperature=0.8, backend="cpu"
    )
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1"):
        want = getattr(cpu, name).flatten()
        torch.testing.assert_close(got[name].to(want.dtype), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_of_the_vocabulary(host, dtype):
    """Merged they are the whole, whichever warps shared their rows; tests/test_shard_kernels.py."""
    case = make_case(dtype, 9001, 2, 4, masked=0.2)
    case.labels[0] = torch.tensor([0, 4499, 4500, 9000])
    whole, z, parts = host.forward(case), 0.0, []
    for logits, start in zip(case.logits.split([4500, 4501], -1), (0, 4500), strict=True):
        shard = dataclasses.replace(case, logits=logits, shard=(start, 9001), stats=True)
        got = host.forward(shard)
        for order, concurrent in (("reversed", 1), ("shuffled", 3)):
            grid = {"blocks": 4, "threads": 96, "order": order, "concurrent_blocks": concurrent}
            again = host.forward(dataclasses.replace(shard, grid=grid))
            assert all(torch.equal(again[name], got[name]) for name in got)
        z = z + got["logps"]
        parts.append(got["row_max"].double() + got["log_sum"])
    tokens, _ = scored_rows(case)
    ours = (z - torch.stack(parts).logsumexp(0))[tokens]
    torch.testing.assert_close(ours, whole["logps"][tokens].double(), rtol=2e-6, atol=2e-6)
    assert torch.equal(z[tokens], case.logits.flatten(0, 1)[tokens, case.labels.flatten()[tokens]])


@pytest.mark.parametrize("order", ["forward", "reversed", "shuffled"])
@pytest.mark.parametrize("concurrent", [1, 3])
def test_schedule_changes_no_bit(host, order, concurrent):
    case = make_case(vocab=4099, pair={"beta": 0.1}, stats=True, shift=True)
    one = host.forward(case)
    for seed in range(3):
        grid = {"blocks": 4, "threads": 96, "order": order, "seed": seed}
        got = host.forward(dataclasses.replace(case, grid=grid | {"concurrent_blocks": concurrent}))
        assert all(torch.equal(one[name], got[name]) for name in one)


def test_a_pair_alone_has_the_bits_it_has_in_a_batch(host):
    """Odd vocabulary: its rows lie at other alignments in the batch."""
    batch = make_case(torch.bfloat16, 3001, 6, 700, masked=0.99, pair={"beta": 0.1}, shift=True)
    got = host.forward(batch)
    memory = batch.logits[[2, 5]].clone()
    alone = dataclasses.replace(batch, logits=memory, labels=batch.labels[[2, 5]].clone())
    one = host.forward(alone)
    assert torch.equal(one["seq_logps"], got["seq_logps"][[2, 5]])
    assert torch.equal(one["losses"][0], got["losses"][2])
    assert torch.equal(one["logps"].view(2, -1), got["logps"].view(6, -1)[[2, 5]])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_in_place(host, dtype):
    case = make_case(dtype, 4099, offset=3)
    got = host.forward(case)
    fresh, truth = gradients(host, case, got)
    over, _ = gradients(host, case, got, in_place=True)
    assert_gradient(fresh, truth)
    assert torch.equal(fresh, over)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("vocab", [1, 1000, 4099])
def test_gradient_of_another_dtype(host, vocab, softcap, dtype):
    """The float32 gradient, rounded once: at any alignment of the one and the other."""
    for padding, offset in ((0, 0), (3, 2)):
        case = make_case(vocab=vocab, offset=offset, padding=padding, softcap=softcap)
        got = host.forward(case)
        whole, _ = gradients(host, case, got)
        cast, _ = gradients(host, case, got, padding=padding, dtype=dtype)
        assert torch.equal(cast, whole.to(dtype))


def test_gradients_that_no_kernel_writes(host):
    case = make_case(torch.bfloat16, vocab=5)
    got = host.forward(case)
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(RuntimeError, match="a gradient has the dtype of the logits"):
            gradients(host, case, got, dtype=dtype)


def test_unscored_rows_are_left_alone_on_request(host):
    case = make_case(vocab=50, masked=0.5)
    got = host.forward(case)
    ours = torch.full_like(case.logits, 7.0)
    host.backward(case, got, torch.ones(1), "token", ours, scale=None, zero_unscored=False)
    _, rows = scored_rows(case)
    untouched = torch.ones(case.tokens, dtype=torch.bool).index_fill(0, rows, False)
    assert (ours.flatten(0, 1)[untouched] == 7).all()
    assert (ours.flatten(0, 1)[rows] != 7).all()


@pytest.mark.parametrize(
    "transform",
    [
        {"scale": 0.25, "temperature": 0.7},
        {"scale": -1.5},
        {"softcap": 5.0},
        {"softcap": 2.0, "scale": -3.0, "temperature": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocab", [1, 1030])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_transforms(host, dtype, vocab, transform):
    case = make_case(dtype, vocab, stats=True, **transform)
    got = host.forward(case)
    assert_matches(case, got)
    without = host.forward(dataclasses.replace(case, stats=False))
    assert all(torch.equal(without[name], got[name]) for name in without)
    # 1 - tanh^2 loses the digits that tanh has near 1, as torch's own gradient does
    assert_gradient(*gradients(host, case, got), slack=200.0 if case.softcap else 1.0)


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_special_values(host, softcap):
    """-inf is legal, +inf and NaN make their row NaN, a foreign label is never an offset."""
    case = make_case(vocab=1100, seqs=2, length=4, masked=0.0, stats=True, softcap=softcap)
    rows = case.logits.flatten(0, 1)
    labels = case.labels.flatten()
    rows[0, 500:] = -torch.inf
    labels[0] = 3
    rows[1, labels[1]] = -torch.inf
    rows[2] = -torch.inf
    rows[2, labels[2]] = 1.0
    rows[3, 17] = torch.nan
    labels[3] = 3
    rows[4] = 1e4 + rows[4]
    rows[5] = -torch.inf
    labels[6], labels[7] = 1100, -7
    whole = dataclasses.replace(case, labels=labels.clamp(0, 1099).view(2, 4))
    truth = oracle(whole)
    got = host.forward(case)
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1"):
        want, ours = truth[name][[0, 1, 2, 4]], got[name][[0, 1, 2, 4]]
        torch.testing.assert_close(ours.double(), want.double(), rtol=1e-5, atol=1e-5)
    bad = [3, 6, 7] if softcap else [3, 5, 6, 7]
    for name in ("logps", "log_sum", "entropy", "log_sum_sq_probs"):
        assert got[name][bad].isnan().all(), name
    if not softcap:
        assert got["logps"][1] == -torch.inf
        assert got["logps"][2] == 0.0
    ours = torch.full_like(case.logits, 7.0)
    host.backward(case, got, torch.ones(1), "token", ours, scale=None)
    assert ours.flatten(0, 1)[bad].isnan().all()
    assert ours.flatten(0, 1)[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("filler", ["min", "-inf"])
def test_masked_vocabulary(host, dtype, filler):
    """Whole spans of the lowest number, or of -inf, on either side of the logits that count.

    The product of the lowest number and log2(e) overflows.
    """
    case = make_case(dtype, 9001, 2, 2, masked=0.0, stats=True)
    rows, low = case.logits.flatten(0, 1), torch.finfo(dtype).min
    rows[:, :4500] = rows[:, 4600:] = low if filler == "min" else -torch.inf
    case.labels.copy_(torch.tensor([[4500, 4510], [4599, 4550]]))
    if filler == "min":
        rows[3] = low
    got, truth = host.forward(case), oracle(case)
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        torch.testing.assert_close(got[name].double(), truth[name], rtol=1e-5, atol=1e-5)
    assert got["is_top1"].tolist() == truth["is_top1"].tolist()
    ours, gradient = gradients(host, case, got)
    assert_gradient(ours, gradient)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_offset_costs_nothing(host, temperature):
    """All sums are relative to a product that is rounded; what it lost must come back."""
    case = make_case(vocab=5000, seqs=2, length=4, masked=0.0)
    case.logits.copy_(torch.round(case.logits * 64) / 64)
    moved = dataclasses.replace(case, logits=case.logits + 8192)
    assert torch.equal(moved.logits - 8192, case.logits)
    case.temperature = moved.temperature = temperature
    one, two = host.forward(case), host.forward(moved)
    # z itself is rounded once where it is not the logit
    slack = 2e-6 if temperature == 1.0 else 2e-3
    torch.testing.assert_close(two["logps"], one["logps"], rtol=2e-6, atol=slack)
    if temperature == 1.0:
        assert torch.equal(two["row_max"], one["row_max"] + 8192)
        torch.testing.assert_close(two["log_sum"], one["log_sum"], rtol=2e-6, atol=slack)
    a, truth = gradients(host, case, one)
    b, _ = gradients(host, moved, two)
    torch.testing.assert_close(b, a, rtol=2 * slack, atol=1e-9)
    assert_gradient(a, truth)


def test_more_rows_than_runs(host):
    """Runs of more than 32 rows, most of them without a scored one."""
    rows, vocab = 40000, 3
    case = make_case(torch.bfloat16, vocab, 4, rows // 4, masked=0.999, shift=True)
    assert_matches(case, host.forward(case))
    packed = make_case(torch.bfloat16, vocab, 4, rows // 4, masked=0.999, packed=True)
    assert_matches(packed, host.forward(packed))


def test_first_of_equal_maxima_is_top1(host):
    case = make_case(vocab=2100, seqs=1, length=6, masked=0.0, stats=True)
    rows = case.logits.flatten(0, 1)
    labels = case.labels.flatten()
    maxima = [(5, 2000), (5, 2000), (1030, 1031), (1030, 1031), (2099, 2099), (0, 0)]
    picked = [5, 2000, 1030, 1031, 2099, 1]
    for row, places in zip(rows, maxima, strict=True):
        row[list(places)] = 50.0
    labels.copy_(torch.tensor(picked))
    assert host.forward(case)["is_top1"].tolist() == [1, 0, 1, 0, 1, 0]


def test_long_sequences_are_summed_in_chunks(host):
    case = make_case(vocab=3, seqs=2, length=1400, masked=0.3, pair={"beta": 0.01})
    assert_matches(case, host.forward(case))


def test_a_workspace_serves_other_shapes(host):
    """As the allocator hands it on: whatever one launch left in it, the next relies on none."""
    large = make_case(vocab=9000, seqs=4, length=6, pair={"beta": 0.1}, stats=True)
    small = make_case(torch.bfloat16, vocab=5, seqs=2, length=3, pair={"beta": 0.1})
    workspace = host.workspace(large)
    for case in (large, small, large, small):
        assert_matches(case, host.forward(case, workspace))


def test_nothing_scored_and_nothing_at_all(host):
    masked = make_case(vocab=9, masked=1.1, pair={"beta": 0.1}, average=True)
    got = host.forward(masked)
    assert_matches(masked, got)
    ours, _ = gradients(host, masked, got)
    assert (ours == 0).all()
    empty = Case(torch.empty(2, 0, 9), torch.empty(2, 0, dtype=torch.int64), pair={"beta": 0.1})
    got = host.forward(empty)
    assert got["seq_logps"].tolist() == [0.0, 0.0]
    assert got["loss"].item() == pytest.approx(0.693147, abs=1e-6)
    nothing = Case(torch.empty(0, 3, 9), torch.empty(0, 3, dtype=torch.int64), pair={"beta": 0.1})
    assert host.forward(nothing)["loss"].item() == 0.0


@pytest.mark.parametrize(
    "change", [{"scale": 0.0}, {"temperature": float("inf")}, {"softcap": float("nan")}], ids=str
)
def test_what_the_launchers_refuse(host, change):
    with pytest.raises(RuntimeError, match="transform: expected"):
        host.forward(dataclasses.replace(make_case(vocab=5), **change))
    with pytest.raises(RuntimeError, match="dtype: expected"):
        host.forward(make_case(torch.float64, vocab=5))
