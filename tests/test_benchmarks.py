"""python -m benchmarks and what reads its rows: suites, resuming, the GPU command, comparisons."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, session, shapes, suites
from benchmarks.__main__ import main
from dpo_kernels.cli import contenders, measure, runner
from dpo_kernels.cli.console import make_console
from dpo_kernels.cli.contenders import Contender, plain
from dpo_kernels.cli.problems import Shape
from dpo_kernels.cli.rows import COLUMNS, read_rows
from dpo_kernels.dispatch import BACKENDS

ROOT = Path(__file__).parent.parent


def tiny(benchmark="logits", names=("reference",), vocab=301, **options) -> suites.Group:
    who = tuple(Contender(name, plain) for name in names)
    return suites.Group(benchmark, Shape(1, 8, vocab), who, repetitions=2, **options)


def run_session(path, groups, *, resume=False, budget=1e6):
    console = make_console()
    one = session.Session(console, "cpu", session.Clock(budget), resume=resume)
    one.run([(path, group) for group in groups])
    return one


def test_rows_are_written_and_resumed(tmp_path):
    path = tmp_path / "rows.csv"
    first, second = tiny(), tiny(vocab=302)
    assert len(run_session(path, [first]).rows) == 2
    # only what is missing is measured
    resumed = run_session(path, [first, second], resume=True)
    assert {row["shape"] for row in resumed.rows} == {"2x8x302"}
    assert len(read_rows(path)) == 4
    # a contender more: its group is not whole
    assert len(run_session(path, [tiny(names=("reference", "b"))], resume=True).rows) == 4
    # without --resume the file is begun anew
    run_session(path, [second])
    assert {row["shape"] for row in read_rows(path)} == {"2x8x302"}


def test_a_group_that_fails_costs_its_own_rows(tmp_path, monkeypatch):
    make_problem = runner.make_problem

    def fail(shape, device):
        if shape.vocab == 301:
            raise ValueError("no such thing")
        return make_problem(shape, device)

    monkeypatch.setattr(runner, "make_problem", fail)
    done = run_session(tmp_path / "rows.csv", [tiny(), tiny(vocab=302)])
    assert done.failed == ["logits: 2x8x301 float32 50% scored: ValueError: no such thing"]
    assert len(done.rows) == 2


def test_nothing_is_begun_when_the_time_is_up(tmp_path, capsys):
    assert run_session(tmp_path / "rows.csv", [tiny()], budget=1).rows == []
    assert "the time is up: 1 of 1 groups are not run" in capsys.readouterr().out


def test_on_a_gpu_important_shapes_come_first_and_compilers_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    options = suites.Options("cuda")
    work = [g for suite in ("logits", "linear") for g in suites.groups_for(suite, options)]
    work.sort(key=lambda group: group.rank)
    compiling = [any(c.compiles for c in group.contenders) for group in work]
    assert compiling == sorted(compiling) and any(compiling)
    assert all(
        c.compiles == late for g, late in zip(work, compiling, strict=True) for c in g.contenders
    )
    assert {g.benchmark for g in work[:4]} == {"logits", "linear"}
    assert {g.shape.trainable_head for g in work[:4] if g.benchmark == "linear"} == {True, False}
    assert {g.shape.model for g in work} >= set(shapes.MODELS)


def test_a_gpu_without_bfloat16_gets_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (7, 5))
    for quick in (True, False):
        found = [*shapes.logits_shapes("cuda", quick), *shapes.linear_shapes("cuda", quick)]
        assert torch.bfloat16 not in {shape.dtype for shape in found}


def test_real_lengths_are_those_of_the_pairs():
    shape = shapes.real_lengths(Shape(8, 1, 100))
    assert shape.scored_tokens == sum(c + r for _, c, r in shapes.REAL_PAIRS)
    whole = sum(2 * p + c + r for p, c, r in shapes.REAL_PAIRS)
    assert sum(end for _, end in shape.spans) == whole
    assert shape.scored_tokens / whole == pytest.approx(0.35, abs=0.01)


def test_interpreted_kernels_are_not_timed(monkeypatch):
    monkeypatch.setattr(contenders, "available_backends", lambda: dict.fromkeys(BACKENDS))
    assert "triton" not in contenders.backends_for("cpu", torch.float32)
    assert contenders.backends_for("cpu", torch.float32, "triton") == ["triton"]


def test_an_excluded_backend_has_a_row_and_no_figure():
    options = suites.Options("cpu", rehearse=True, peers=False, exclude=("torch", "cpu", "triton"))
    group = suites.groups_for("linear", options)[0]
    rows = []
    group.run("cpu", rows.append, lambda note: None)
    own = [row for row in rows if row["contender"].startswith("dpo_kernels")]
    assert own and {row["status"] for row in own} == {
        "not served: left out: it failed its smoke test"
    }


def run_python(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**clean, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes_rows_and_a_report(tmp_path):
    words = ["-m", "benchmarks", "logits", "linear", "overhead", "--rehearse", "--device", "cpu"]
    done = run_python(*words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left: " in done.stdout
    for suite in ("logits", "linear", "overhead"):
        rows = read_rows(tmp_path / f"{suite}_cpu.csv")
        assert tuple(rows[0]) == COLUMNS
        own = [row for row in rows if row["contender"].startswith("dpo_kernels")]
        assert own and all(row["status"] == "ok" and row["median_ms"] for row in own)
        assert (tmp_path / f"{suite}.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "Where we lose" in page and "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", ""), "the report refers to another file"


@pytest.mark.parametrize("arguments", [["nonsense"], ["train"], ["logits", "--device", "tpu"]])
def test_bad_arguments_are_rejected(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


class FakeGpu:
    """Device and host clocks: a call takes 2 ms of Python and 1 ms on the device."""

    def __init__(self, monkeypatch):
        self.host, self.device = 0.0, 0.0
        fake = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = fake.device = max(fake.device, fake.host)

            def synchronize(self):
                fake.host = max(fake.host, self.at)

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(measure, "_cycles", [])

    def synchronize(self):
        self.host = max(self.host, self.device)

    def sleep(self, cycles):
        self.device = max(self.device, self.host) + cycles * 1e-9

    def call(self, number):
        self.host += 2e-3
        self.device = max(self.device, self.host) + 1e-3


def test_gpu_times_leave_out_python_and_call_times_have_it(monkeypatch):
    fake = FakeGpu(monkeypatch)
    one = measure.Timed("x", fake.call)
    measure.interleaved([one], "cuda", 5)
    timing = one.timing()
    assert timing.median == pytest.approx(1e-3)
    assert timing.call == pytest.approx(2e-3)


def step_codes(monkeypatch, codes):
    """Commands of gpu.Run.step are not run: ``codes`` maps a part of their name to a status."""
    seen = []

    def step(self, name, command, limit_s, **options):
        seen.append((name, command))
        code = next((c for part, c in codes.items() if part in name), 0)
        if code:
            self.red.append(f"{name}: exit {code}")
        return code == 0

    monkeypatch.setattr(gpu.Run, "step", step)
    monkeypatch.setattr(gpu, "backends", lambda device: ["cuda", "triton"])
    monkeypatch.setattr(gpu, "rows_file", lambda device, out: out / "rows.csv")
    monkeypatch.setattr(gpu, "memory_gib", lambda: 79)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    return seen


def test_gpu_phases_do_not_wait_for_each_other(monkeypatch, tmp_path):
    seen = step_codes(monkeypatch, {"build": 1, "smoke cuda": 1, "tests": 1})
    assert gpu.main(["--out", str(tmp_path)]) == 1
    names = [name for name, _ in seen]
    assert names[0] == "build 90" and names[3] == "time"
    assert set(names[1:3]) == {"smoke cuda", "smoke triton"}
    # what failed its smoke test is not timed, everything else is
    timing = dict(seen)["time"]
    assert timing[timing.index("--exclude") + 1 :] == ["cuda"]
    # a process for each backend, and none of them stops at the first failure
    tests = [command for name, command in seen if name.startswith("tests ")]
    selections = {command[command.index("-k") + 1] for command in tests}
    others = "not cuda-gpu and not triton-gpu and not torch-gpu"
    assert selections == {"cuda-gpu", "triton-gpu", "torch-gpu", others}
    assert all("-x" not in command for command in tests)
    assert sum(name.startswith("sanitizer") for name in names) == 8


def test_gpu_exit_status(monkeypatch, tmp_path):
    step_codes(monkeypatch, {})
    assert gpu.main(["--out", str(tmp_path)]) == 0
    for codes, words, status in (
        ({"build": 1}, [], 1),
        ({"build": 1}, ["--build-may-fail"], 0),
        ({"time": 1}, [], 1),
        ({"sanitizer triton memcheck": 9}, [], 1),
    ):
        step_codes(monkeypatch, codes)
        assert gpu.main(["--out", str(tmp_path), *words]) == status


def test_gpu_says_which_packages_it_lacks(monkeypatch, tmp_path, capsys):
    """After a plain install there is nothing to build with, nor to test with."""
    seen = step_codes(monkeypatch, {})
    lacking = ("pybind11", "hypothesis")
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name in lacking else name)
    assert gpu.main(["--out", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "red: build: needs pybind11: pip install -e '.[test]'" in told
    assert "red: tests: needs hypothesis: pip install -e '.[test]'" in told
    names = [name for name, _ in seen]
    assert "time" in names and not any(name.startswith(("build", "tests")) for name in names)
    assert gpu.main(["--out", str(tmp_path), "--build-may-fail", "--skip", "tests"]) == 0


def test_gpu_rehearsal_says_what_it_did(tmp_path):
    words = ["-m", "benchmarks.gpu", "--device", "cpu", "--skip", "build", "tests", "time"]
    done = run_python(*words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "smoke cpu: exit 0" in done.stdout
    assert "ok {'loss_error'" in (tmp_path / "smoke_cpu.log").read_text()


def test_the_notebook_runs_against_the_rehearsal(tmp_path, monkeypatch):
    """Its code cells, one after another, on the rows of a rehearsal."""
    displayed = []
    fake = types.ModuleType("IPython.display")
    fake.display, fake.Markdown, fake.Image = displayed.append, str, bytes
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setenv("DPO_CHECKOUT", str(ROOT))
    monkeypatch.setenv("DPO_DEVICE", "cpu")
    monkeypatch.setenv("DPO_OUT", str(tmp_path))
    monkeypatch.setenv("DPO_INSTALL", "0")
    monkeypatch.setenv("DPO_ARGUMENTS", "--skip build smoke tests sanitizer --budget 240")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    notebook = json.loads((ROOT / "benchmarks" / "gpu.ipynb").read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["status"] == 0
    tables = [shown for shown in displayed if isinstance(shown, str)]
    pictures = [shown for shown in displayed if isinstance(shown, bytes)]
    assert any("faster" in table and "dpo_kernels, " in table for table in tables)
    assert pictures and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert (tmp_path / "report.html").exists()
    with (tmp_path / "rehearsal.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(names["rows"])
