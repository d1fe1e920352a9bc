"""The examples of docs/ with the real packages, as a user starts them, on a tiny model."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import ast
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

for _package in ("trl", "transformers", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

import torch
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from tests import trl_runs

pytestmark = pytest.mark.integrations

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
STEPS = 3
PAIRS = 8
TRAINER = [
    *("--max_steps", str(STEPS), "--logging_steps", "1", "--learning_rate", "1e-3"),
    *("--bf16", "False", "--report_to", "none", "--save_strategy", "no"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """The arguments that name a model and its data."""
    folder = tmp_path_factory.mktemp("inputs")
    trl_runs.make_model().save_pretrained(folder / "model")
    trl_runs.make_tokenizer().save_pretrained(folder / "model")
    trl_runs.make_pairs(PAIRS).to_json(folder / "pairs.jsonl")
    return ["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl")]


def start(folder: Path, *command: str, **env: str) -> str:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_trl(
    folder: Path, name: str, *arguments: str, launcher=(), variables=None, first=()
) -> dict:
    """``first``: what the example takes in front of the arguments of TRL."""
    runner = ("-m", "tests.run_example", str(folder / "report.json"))
    command = (*launcher, *runner, str(EXAMPLES / name), *first, *TRAINER, *arguments)
    start(folder, *command, **(variables or {}))
    report = json.loads((folder / "report.json").read_text())
    assert len(report["losses"]) == STEPS
    # the trainer logs four digits
    assert report["losses"][0] == pytest.approx(math.log(2), abs=1e-4)
    assert report["losses"][-1] < report["losses"][0]
    # policy and reference, every step
    assert report["tiles"] >= 2 * STEPS
    return report


def test_own_loop(tmp_path, inputs):
    told = start(tmp_path, str(EXAMPLES / "own_loop.py"), *inputs, "--pairs", "4")
    assert told.startswith("step 0: loss 0.6931")
    assert load_file(tmp_path / "trained" / "model.safetensors")


def test_trl_lora(tmp_path, inputs):
    arguments = [*inputs, "--output_dir", str(tmp_path / "trained"), "--use_cpu"]
    run_trl(tmp_path, "trl_lora.py", *arguments)
    assert load_file(tmp_path / "trained" / "adapter_model.safetensors")


def test_launch(tmp_path, inputs):
    """TRL's own command, which knows nothing of the package."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(inputs[3], data)
    arguments = ["--model_name_or_path", inputs[1], "--dataset_name", str(data), "--use_cpu"]
    arguments += ["--output_dir", str(tmp_path / "trained")]
    run_trl(tmp_path, "launch.py", *arguments, first=("trl", "trl.scripts.dpo"))
    assert load_file(tmp_path / "trained" / "model.safetensors")


def fsdp2_variables() -> dict[str, str]:
    """What accelerate sets for the command that trl_fsdp2.py begins with."""
    text = ast.get_docstring(ast.parse((EXAMPLES / "trl_fsdp2.py").read_text()))
    command = text.split("\n\n")[1].replace("\\\n", "")
    words = shlex.split(command)
    assert words[:2] == ["accelerate", "launch"]
    parsed, *_ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(words[2:])
    )
    variables = prepare_multi_gpu_env(parsed)
    return {k: v for k, v in variables.items() if k.startswith(("FSDP_", "ACCELERATE_"))}


def test_trl_fsdp2(tmp_path, inputs):
    """Two ranks end where one process ends that has the pairs of both."""
    reports, weights = {}, {}
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for name, pairs, options, launcher, variables in (
        ("alone", 4, ["--use_cpu"], (), {}),
        ("ranks", 2, [], ranks, {"GLOO_SOCKET_IFNAME": "lo", **fsdp2_variables()}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        arguments = [*inputs, "--output_dir", str(folder / "trained"), *options]
        # steps in proportion to the gradient, so that one of another size shows
        arguments += ["--per_device_train_batch_size", str(pairs), "--optim", "sgd"]
        arguments += ["--learning_rate", "0.05"]
        reports[name] = run_trl(
            folder, "trl_fsdp2.py", *arguments, launcher=launcher, variables=variables
        )
        weights[name] = load_file(folder / "trained" / "model.safetensors")
    assert reports["alone"]["sharded"] == 0
    assert reports["ranks"]["sharded"] == reports["ranks"]["parameters"] > 0
    assert reports["ranks"]["losses"] == pytest.approx(reports["alone"]["losses"], rel=1e-3)
    start = load_file(Path(inputs[1]) / "model.safetensors")
    for name, alone in weights["alone"].items():
        # a few roundings of the largest weight a step
        rounding = 4 * STEPS * torch.finfo(torch.float32).eps * float(alone.abs().max())
        assert (alone - start[name]).abs().max() > 10 * rounding, f"{name} was not trained"
        torch.testing.assert_close(weights["ranks"][name], alone, rtol=0, atol=rounding)
