"""python -m dpo_kernels: what it prints, what it writes, and when it must fail."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
import torch

import dpo_kernels
from dpo_kernels.__main__ import main
from dpo_kernels.cli import measure
from dpo_kernels.cli.rows import COLUMNS
from dpo_kernels.dispatch import BACKENDS, available_backends, backend_module

TINY = ["bench", "--quick", "--shape", "2", "8", "301", "--repetitions", "2", "--backend", "torch"]


def run_cli(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    # interpreted Triton kernels and threads that wait for a busy core make every command slow
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "dpo_kernels", *arguments],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1", **variables},
        timeout=300,
    )


@pytest.fixture
def break_torch(monkeypatch):
    """Scales one tensor of the torch backend's forward or backward."""

    def apply(what: str, factor: float) -> None:
        module = backend_module("torch")
        forward, backward = module.forward, module.backward

        def broken_forward(batch, pair, out):
            result = forward(batch, pair, out)
            target = {"loss": out.loss, "logps": out.seqs[0], "gradient": None}[what]
            if target is not None:
                target.mul_(factor)
            return result

        def broken_backward(batch, tokens, grad_output, grad_logits, zero_unscored):
            result = backward(batch, tokens, grad_output, grad_logits, zero_unscored)
            grad_logits.mul_(factor if what == "gradient" else 1.0)
            return result

        monkeypatch.setattr(module, "forward", broken_forward)
        monkeypatch.setattr(module, "backward", broken_backward)

    return apply


def test_environment_names_every_backend_and_why_not():
    done = run_cli(DPO_KERNELS_VALIDATE="1")
    assert done.returncode == 0, done.stderr
    for name in (*BACKENDS, "torch", "python", "DPO_KERNELS_BACKEND", "DPO_KERNELS_CUDA_ARCHS"):
        assert name in done.stdout
    assert torch.__version__ in done.stdout
    assert "\x1b" not in done.stdout, "escape codes outside a terminal"
    if not torch.cuda.is_available():
        assert "unavailable: no GPU is visible to torch, and TRITON_INTERPRET" in done.stdout


def test_parity_passes_from_the_command_line():
    done = run_cli("parity")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all passed" in done.stdout
    for name, reason in available_backends().items():
        if name != "triton" and reason is None:
            assert f"{name}, cpu, bfloat16, packed" in done.stdout


# float64 sees a break of any size; float32's own rounding is 1e-7
@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
@pytest.mark.parametrize("what", ["loss", "logps", "gradient"])
def test_parity_fails_on_a_broken_backend(break_torch, capsys, what, factor):
    break_torch(what, factor)
    assert main(["parity", "--backend", "torch"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_parity_fails_when_the_backend_asked_for_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(backend_module("cuda"), "unavailable", lambda: "it is on holiday")
    assert main(["parity", "--backend", "cuda"]) == 1
    assert "it is on holiday" in capsys.readouterr().out


def test_bench_prints_a_table_and_appends_complete_rows(tmp_path, capsys):
    path = tmp_path / "rows" / "bench.csv"
    for _ in range(2):
        assert main([*TINY, "--csv", str(path)]) == 0
    assert "against the reference" in capsys.readouterr().out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    # the reference forward and forward + backward, ours and in place; twice
    assert len(rows) == 2 * 5
    for row in rows:
        assert tuple(row) == COLUMNS
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["shape"] == "4x8x301"
        assert row["scored_tokens"] == "16"
        assert all(row[name] for name in ("cpu", "torch", "commit", "measured_at"))
    assert {row["contender"] for row in rows} == {"reference", "dpo_kernels, torch"}


def test_bench_reports_no_time_of_a_contender_that_fails_parity(break_torch, tmp_path, capsys):
    break_torch("gradient", 1.01)
    path = tmp_path / "bench.csv"
    assert main([*TINY, "--csv", str(path)]) == 1
    out = capsys.readouterr().out
    assert "red: logits out of bounds" in out
    with path.open() as file:
        rows = {(r["contender"], r["mode"]): r for r in csv.DictReader(file)}
    for (contender, _), row in rows.items():
        assert (row["median_ms"] == "") == contender.startswith("dpo_kernels")
        assert (row["status"] == "ok") == (row["median_ms"] != "")


@pytest.mark.parametrize(
    "arguments", [["bench", "--shape", "0", "8", "8"], ["bench", "--dtype", "int8"], ["nonsense"]]
)
def test_bad_arguments_are_rejected(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_interleaved_counts_rounds_and_leaves_out_the_first():
    calls = []
    timed = [measure.Timed(name, lambda number, name=name: calls.append(name)) for name in "ab"]
    measure.interleaved(timed, "cpu", 5)
    assert calls == ["a", "b"] * 6
    for timing in (one.timing() for one in timed):
        assert timing.repetitions == 5
        assert timing.p20 <= timing.median <= timing.p80


def test_an_interrupt_keeps_the_rounds_that_were_timed():
    def run(number):
        if number == 3:
            raise KeyboardInterrupt

    timed = measure.Timed("a", run)
    with pytest.raises(KeyboardInterrupt):
        measure.interleaved([timed], "cpu", 5)
    assert timed.timing().repetitions == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_extra_bytes_sees_what_is_allocated_and_freed():
    size = 48 << 20

    def run():
        # two at once, then one more: the peak is two
        first, second = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
        del first, second
        torch.ones(size, dtype=torch.uint8)

    for _ in range(2):
        peak = measure.peak_extra_bytes(run, "cpu")
        if peak is None:
            pytest.skip("this kernel lets no process reset its peak")
        assert 2 * size * 0.97 < peak < 2 * size * 1.1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_extra_bytes_sees_a_gradient_whose_memory_was_kept():
    """The pool keeps freed gradients; the next call allocates as much all the same."""
    logits = torch.zeros(2, 64, 32768, requires_grad=True)
    labels = torch.ones(2, 64, dtype=torch.int64)

    def run():
        torch.autograd.grad(dpo_kernels.sequence_logps(logits, labels).sum(), logits)

    run()
    peak = measure.peak_extra_bytes(run, "cpu")
    if peak is None:
        pytest.skip("this kernel lets no process reset its peak")
    assert logits.nbytes * 0.9 < peak < logits.nbytes * 1.3
