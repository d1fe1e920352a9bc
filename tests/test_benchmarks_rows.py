"""What is made of rows: comparisons, the check of contributed ones, the report."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import analysis, check_rows, compare, report
from dpo_kernels.cli.rows import COLUMNS, read_rows, write_rows

ROOT = Path(__file__).parent.parent
H100 = ROOT / "benchmarks" / "results" / "gpu" / "nvidia_h100_80gb_hbm3.csv"


def row(contender="dpo_kernels, cpu", median=10.0, **values) -> dict[str, str]:
    base = dict.fromkeys(COLUMNS, "")
    base |= {"benchmark": "logits", "contender": contender, "mode": "forward", "status": "ok"}
    base |= {"shape": "8x256x49152", "dtype": "float32", "device": "cpu", "precision": "exact"}
    base |= {"median_ms": str(median), "p20_ms": str(0.98 * median), "p80_ms": str(1.02 * median)}
    return base | {name: str(value) for name, value in values.items()}


def compared(tmp_path, before, after) -> int:
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path, rows in zip(paths, (before, after), strict=True):
        write_rows(path, rows, append=False)
    return compare.main([str(path) for path in paths])


@pytest.mark.parametrize(
    ("after", "status"),
    [
        (row(median=10.0), 0),
        # within the margin
        (row(median=10.4), 0),
        # beyond it, but the spreads overlap
        (row(median=12.0, p20_ms=10.1), 0),
        (row(median=12.0), 1),
        (row(median=8.0), 0),
        (row(status="red: loss out of bounds", median=12.0), 1),
    ],
)
def test_compare_exits_1_beyond_noise(tmp_path, after, status):
    peer = row("reference", 100.0)
    assert compared(tmp_path, [row(), peer], [after, peer]) == status


def test_compare_takes_the_drift_of_the_machine_out(tmp_path):
    before = [row(), row("reference", 100.0)]
    assert compared(tmp_path, before, [row(median=12.0), row("reference", 120.0)]) == 0
    assert compared(tmp_path, before, [row(median=12.0), row("reference", 100.0)]) == 1
    assert compared(tmp_path, before, [row(shape="1x1x1")]) == 2


def contributed(**values) -> dict[str, str]:
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    whole = {"loss_error": 1e-7, "loss_bound": 1e-6, "gradient_error": 1e-7}
    whole |= {"gradient_bound": 1e-6, "times_floor": 1.1, "commit": head, "torch": "2.13.0"}
    whole |= {"python": "3.12", "gpu": "1 x A GPU, sm_90, 79 GiB", "device": "cuda", "cpu": "a CPU"}
    return row(**{"contender": "dpo_kernels, triton", **whole, **values})


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({}, None),
        ({"loss_error": 1e-5}, "the loss is off by 1e-05"),
        ({"gradient_error": "nan"}, "the gradient is off by nan"),
        ({"loss_error": ""}, "no parity of the loss"),
        ({"commit": "0123456789ab"}, "is not in this repository"),
        ({"commit": "0123456789ab-dirty"}, "the tree was changed"),
        ({"torch": ""}, "torch is empty"),
        ({"times_floor": ""}, "no floor"),
        ({"times_floor": 0.5}, "faster than the machine"),
        ({"gpu": "none visible to torch"}, "no GPU is named"),
        ({"p80_ms": 1.0}, "p20, median and p80"),
        ({"contender": "TRL"}, "no version of trl"),
        ({"status": "out of memory"}, "a figure beside a status"),
    ],
)
def test_contributed_rows_are_checked(tmp_path, values, fault):
    path = tmp_path / "rows.csv"
    write_rows(path, [contributed(**values)], append=False)
    found = check_rows.check(path)
    assert (found == []) if fault is None else any(fault in line for line in found), found


def test_rows_measured_twice_or_of_other_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    write_rows(path, [contributed(), contributed()], append=False)
    assert any("measured twice" in line for line in check_rows.check(path))
    path.write_text("a,b\n1,2\n")
    assert "columns are missing" in check_rows.check(path)[0]
    with pytest.raises(ValueError, match="other columns"):
        write_rows(path, [contributed()], append=True)


def test_where_we_lose_finds_time_memory_floor_and_missing_figures():
    rows = [
        row(median=10.0, times_floor=1.1, peak_extra_bytes=200 << 20),
        # fast is no answer to exact
        row("dpo_kernels, cpu, fast", 1.0, precision="fast"),
        row("TRL", 8.0, peak_extra_bytes=300 << 20),
        row("Liger", 20.0, peak_extra_bytes=50 << 20),
        row(mode="in place", median=30.0, times_floor=3.0),
        row("dpo_kernels, cuda", status="red: loss out of bounds", median_ms=""),
    ]
    found = [loss.what for loss in analysis.where_we_lose(rows)]
    assert found == [
        "no figure: red: loss out of bounds",
        "Liger takes 50 MiB, ours 200 MiB",
        "3.00x of the floor",
        "TRL is 1.25x faster",
    ]
    assert analysis.where_we_lose([row(), row("TRL", 11.0)]) == []


def test_exponents_are_fitted():
    assert analysis.exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert analysis.exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)
    assert analysis.exponent([1], [5]) is None


def test_the_report_of_the_committed_gpu_rows_says_where_we_lose():
    page = report.render(read_rows(H100))
    assert "cut-cross-entropy takes 1259 MiB, ours 6301 MiB" in page
    assert "prefers-color-scheme: dark" in page
    assert "NVIDIA H100 80GB HBM3" in page


def test_the_committed_gpu_rows_hold_nothing_of_the_red_backend():
    rows = read_rows(H100)
    assert len(rows) > 100
    assert not [row for row in rows if "cuda" in row["contender"]]
    assert {row["commit"] for row in rows} == {"29565794c508"}


def test_growth_says_where_memory_ended(tmp_path):
    shape = {"benchmark": "growth, tokens", "mode": "forward + backward", "scored_tokens": 64}
    rows = [
        row("reference", 1.0, **{**shape, "shape": "4x64x8192"}, peak_extra_bytes=1 << 20),
        row("reference", 2.0, **{**shape, "shape": "4x128x8192"}, peak_extra_bytes=2 << 20),
        row("reference", status="out of memory", median_ms="", **{**shape, "shape": "4x256x8192"}),
    ]
    page = report.render(rows)
    assert "<td>1.00</td><td>1.00</td><td>out of memory</td>" in page
