"""benchmarks.train_parity end to end on a tiny model, and what it says of inputs it cannot use."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import csv
import json

import pytest

for _package in ("trl", "transformers", "peft", "datasets", "accelerate", "matplotlib"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

from benchmarks import train_parity
from benchmarks.train_run import HELD_OUT
from tests import trl_runs

pytestmark = pytest.mark.integrations


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """(folder of a model, JSONL of pairs)."""
    folder = tmp_path_factory.mktemp("model")
    trl_runs.make_model().save_pretrained(folder)
    trl_runs.make_tokenizer().save_pretrained(folder)
    data = folder / "pairs.jsonl"
    rows = list(trl_runs.make_pairs(8, conversational=True))
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return folder, data


@pytest.fixture
def made(monkeypatch):
    """The runs that are made; in this process, where a process each would only cost time."""
    runs = []

    def run_here(options, settings, mode, contender):
        runs.append((mode, contender))
        rows = train_parity.run(settings, mode, contender)
        train_parity.write_run(options.out, settings, mode, contender, rows)
        return train_parity.finished_run(options.out, settings, mode, contender)

    monkeypatch.setattr(train_parity, "run_apart", run_here)
    return runs


def _arguments(inputs, out, *more):
    model, data = inputs
    inputs = ["--model", str(model), "--data", str(data), "--held-out", "2"]
    return [*inputs, "--steps", "3", "--out", str(out), *more]


def test_runs_rows_plot_and_resuming(inputs, made, tmp_path):
    assert train_parity.main(_arguments(inputs, tmp_path)) == 0
    every = [(mode, kind) for mode in ("lora", "full") for kind in ("trl", "patched", "fused")]
    assert made == every
    with (tmp_path / "train_parity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["mode"], r["contender"], int(r["step"])) for r in rows] == [
        (mode, kind, step) for mode, kind in every for step in (1, 2, 3)
    ]
    for row in rows:
        assert 0 < float(row["loss_part_s"]) < float(row["step_s"])
        assert float(row["peak_bytes"]) >= 0
        assert {"cpu", "torch", "trl", "transformers", "commit", "data"} <= set(row)
        # no folder of whoever measured it
        assert "/" not in row["model"] + row["data"]
        assert int(row["tokens"]) > 0
        # asked once, of the trained model
        held_out = [row[f"held_out_{name}"] for name in HELD_OUT]
        assert all(held_out) if row["step"] == "3" else not any(held_out)
    for mode in ("lora", "full"):
        by_trl, *by_us = (float(r["held_out_loss"]) for r in rows[2::3] if r["mode"] == mode)
        assert by_us == pytest.approx([by_trl] * 2, rel=1e-4)
    assert (tmp_path / "train_parity.png").stat().st_size > 10_000

    made.clear()
    (tmp_path / "full-fused.json").unlink()
    assert train_parity.main(_arguments(inputs, tmp_path)) == 0
    assert made == [("full", "fused")]
    assert train_parity.main(_arguments(inputs, tmp_path, "--mode", "lora", "--seed", "1")) == 0
    assert made[1:] == every[:3]


def test_no_rows_when_the_losses_differ(inputs, made, tmp_path, monkeypatch):
    run = train_parity.run

    def wrong(settings, mode, contender):
        rows = run(settings, mode, contender)
        if contender == "patched":
            rows[2]["loss"] += 2e-3
        return rows

    monkeypatch.setattr(train_parity, "run", wrong)
    arguments = ("--mode", "lora", "--contenders", "trl", "patched")
    assert train_parity.main(_arguments(inputs, tmp_path, *arguments)) == 1
    assert not (tmp_path / "train_parity.csv").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "pairs.jsonl:2: not JSON"),
        ('{"prompt": "a", "chosen": "b"}', "pairs.jsonl:2: no 'rejected'"),
        ('{"prompt": 1, "chosen": "b", "rejected": "c"}', "pairs.jsonl:2: 'prompt' is neither"),
        ("[]", "pairs.jsonl:2: no 'prompt'"),
    ],
)
def test_malformed_data(inputs, tmp_path, capsys, line, message):
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line)
    assert train_parity.main(_arguments((inputs[0], data), tmp_path)) == 2
    assert message in capsys.readouterr().out


def test_missing_inputs(inputs, tmp_path, capsys):
    model, data = inputs
    (tmp_path / "empty").mkdir()
    for bad, message in (
        ((tmp_path / "nowhere", data), "no such file or folder"),
        ((tmp_path / "empty", data), "no config.json and no GGUF"),
        ((model, tmp_path / "none.jsonl"), "no such file"),
    ):
        assert train_parity.main(_arguments(bad, tmp_path)) == 2
        assert message in capsys.readouterr().out
    assert train_parity.main(_arguments(inputs, tmp_path, "--held-out", "8")) == 2
    assert "--held-out 8: the data has 8 pairs in all" in capsys.readouterr().out
