"""TRL's real trainers, unpatched against patched and against FusedDPOTrainer, on tiny models."""

# the imports below the skips need the packages they look for
# ruff: noqa: E402

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

for _package in ("trl", "transformers", "peft", "datasets", "accelerate"):
    pytest.importorskip(_package, reason=f"{_package} is missing: make test-integrations")

import datasets
import peft
import transformers
from trl.kernels import ChunkedLogProbFunction

from dpo_kernels.integrations import trl as integration
from dpo_kernels.integrations.trl_dpo import FusedDPOTrainer
from dpo_kernels.losses import F_DIVERGENCES, LOSSES, make_options
from tests import trl_runs
from tests.trl_runs import Run, compared, lora, lora_model, make_model

pytestmark = pytest.mark.integrations


@pytest.fixture(autouse=True, scope="module")
def _quiet_and_single_threaded():
    """Tiny models gain nothing from threads and lose much to their switching."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


LOSS_TYPES = {
    "sigmoid": {},
    # an option that a loss does not use is ignored by TRL
    "hinge": {"label_smoothing": 0.1},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.1},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.1},
    "sft": {},
    "sigmoid_norm": {"beta": 2.0},
}

SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}

_PROMPT_TUNING = functools.partial(
    peft.PromptTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=3
)

RUNS = {
    **{name: Run({"loss_type": [name], **rest}) for name, rest in LOSS_TYPES.items()},
    "ld_alpha": Run({"ld_alpha": 0.3}),
    "ld_alpha, ipo": Run({"ld_alpha": 0.3, "loss_type": ["ipo"]}),
    "wpo": Run({"use_weighting": True}),
    "js": Run({"f_divergence_type": "js_divergence"}),
    # its score grows like exp of the log-ratio: a reference further off would only blow up rounding
    "forward_kl": Run(
        {"f_divergence_type": "forward_kl"}, reference=functools.partial(trl_runs.moved, scale=3e-3)
    ),
    "alpha": Run({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}),
    # what the loss does not use, TRL ignores
    "unused tau": Run({"discopop_tau": 0.1}),
    "unused coefficient": Run({"f_alpha_divergence_coef": 1.0}),
    "unused divergence": Run(
        {
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.7,
            "loss_type": ["sft"],
        }
    ),
    "js, sft": Run({"f_divergence_type": "js_divergence", "loss_type": ["sft"]}),
    "mix": Run({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    # TRL smooths robust and leaves sigmoid as it is
    "smoothed mix": Run({"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.2}),
    "wpo mix": Run({"use_weighting": True, "loss_type": ["sigmoid", "bco_pair"]}),
    "lora": Run(peft_config=lora),
    "lora, reference adapter": Run(model=lora_model),
    "lora, lm_head trained": Run(peft_config=functools.partial(lora, modules_to_save=["lm_head"])),
    "prompt tuning": Run(peft_config=_PROMPT_TUNING),
    "precomputed": Run({"precompute_ref_log_probs": True}, evaluate=True),
    "precomputed, lora, ld_alpha": Run(
        {"precompute_ref_log_probs": True, "ld_alpha": 0.3}, peft_config=lora
    ),
    "accumulation": Run({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "checkpointing": Run({"gradient_checkpointing": True}),
    "checkpointing, lora": Run({"gradient_checkpointing": True}, peft_config=lora),
    "tied": Run(model=functools.partial(make_model, tie_word_embeddings=True)),
    "gemma2": Run(model=functools.partial(make_model, "gemma2")),
    "cohere": Run(model=functools.partial(make_model, "cohere")),
    "granite": Run(model=functools.partial(make_model, "granite")),
    "mixtral": Run(model=functools.partial(make_model, "mixtral")),
    "chat, evaluation": Run(conversational=True, evaluate=True),
    "truncated at the start": Run({"max_length": 12, "truncation_mode": "keep_end"}),
}

# what this package refuses and TRL takes
LEFT_TO_TRL = {
    "beta of 0": Run({"loss_type": ["sft"], "beta": 0.0}),
    "robust past a half": Run({"loss_type": ["robust"], "label_smoothing": 0.6}),
}
RUNS |= LEFT_TO_TRL


@functools.cache
def _unpatched(name: str) -> list[dict[str, float]]:
    return compared(trl_runs.train(RUNS[name], "trl"))


def _assert_same_training(ours: list[dict], theirs: list[dict]) -> None:
    assert [sorted(row) for row in ours] == [sorted(row) for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for key in other:
            # a rounding of the log-probs counts as the slope of the loss has it, and the slope of a
            # squared loss (sppo_hard, 95 here) grows with its root
            bound = 1e-4 * max(1.0, other[key]) ** 0.5 if key.endswith("loss") else 1e-3
            if key == "grad_norm":
                bound *= max(1.0, other[key])
            assert mine[key] == pytest.approx(other[key], rel=1e-6, abs=bound), key


@pytest.mark.parametrize("mode", ["patched", "fused"])
@pytest.mark.parametrize("name", RUNS)
def test_training_is_trls(caplog, name, mode):
    """Every step's loss and every logged metric, name and value."""
    integration._logged.clear()
    ours = compared(trl_runs.train(RUNS[name], mode))
    assert ("leaves" in caplog.text) == (mode == "fused" and name in LEFT_TO_TRL)
    theirs = _unpatched(name)
    # three training rows and the summary, and something was learnt
    assert len(theirs) >= trl_runs.STEPS + 1 and theirs[0]["loss"] != theirs[1]["loss"]
    _assert_same_training(ours, theirs)


@pytest.mark.parametrize("other", ["sigmoid", "sft"])
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_options_that_a_loss_ignores_are_left_out(name, other):
    """Every option of TRL off its default: this package refuses one that no loss takes."""
    # TRL refuses a divergence beside any other loss
    divergent = all(LOSSES[loss].f_divergence or loss == "sft" for loss in (name, other))
    settings = {
        "beta": 0.2,
        "loss_types": [name, other],
        "loss_weights": [0.7, 0.3],
        "label_smoothing": 0.1,
        "ld_alpha": 0.3,
        "use_weighting": False,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.7,
        "args": types.SimpleNamespace(discopop_tau=0.1),
    }
    for divergence in F_DIVERGENCES if divergent else ("reverse_kl",):
        trainer = types.SimpleNamespace(**{**settings, "f_divergence_type": divergence})
        options = make_options(**FusedDPOTrainer._loss_options(trainer))
        assert options.loss_weights == (0.7, 0.3) and options.beta == 0.2
        assert (options.discopop_tau == 0.1) == (name == "discopop")
        assert options.label_smoothing == (0.1 if name in SMOOTHED else 0.0)
        takes_divergence = any(LOSSES[loss].f_divergence for loss in (name, other))
        assert options.f_divergence == (divergence if takes_divergence else "reverse_kl")
        takes_coefficient = takes_divergence and divergence == "alpha_divergence"
        assert (options.f_alpha_divergence_coef == 0.7) == takes_coefficient


def test_all_of_trls_loss_types_are_run():
    documented = trl_runs.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    named = {name.strip("'`.[], ") for name in documented.replace(",", " ").split()}
    assert set(LOSS_TYPES) <= named and len(LOSS_TYPES) == 15
    from trl.trainer import dpo_trainer

    source = inspect.getsource(dpo_trainer)
    assert {n for n in LOSS_TYPES if f'loss_type == "{n}"' in source} == set(LOSS_TYPES)
    assert source.count('loss_type == "') == len(LOSS_TYPES)


def test_the_patch_serves_every_call(monkeypatch, caplog):
    """None of the runs above would notice if TRL's own function still ran."""

    def forbidden(*args, **kwargs):
        raise AssertionError("TRL's own fused head was called")

    monkeypatch.setattr(ChunkedLogProbFunction, "apply", forbidden)
    for mode in ("patched", "fused"):
        trl_runs.train(Run(peft_config=lora), mode)
        trl_runs.train(Run({"use_weighting": True, "precompute_ref_log_probs": True}), mode)
    with pytest.raises(AssertionError, match="TRL's own"):
        trl_runs.train(Run(), "trl")
    assert "leaves" not in caplog.text


TWO_RANKS = """
import os, torch
torch.set_num_threads(1)
from tests import test_integrations_trl as tests
from tests.trl_runs import Run, compared, train
run = Run({"per_device_train_batch_size": 2})
rows = {mode: compared(train(run, mode)) for mode in ("trl", "patched", "fused")}
if os.environ["RANK"] == "0":
    for mode in ("patched", "fused"):
        tests._assert_same_training(rows[mode], rows["trl"])
    print("the same", rows["trl"][0]["num_tokens"])
"""


def test_two_processes(tmp_path):
    """DistributedDataParallel over gloo: every metric is gathered over the ranks as by TRL."""
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [*command, "--nproc_per_node=2", str(script)],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same" in done.stdout


@pytest.mark.parametrize("config", [{}, {"loss_type": "apo_zero_unpaired"}], ids=["kto", "apo"])
def test_kto(config):
    ours, theirs = (compared(trl_runs.train_kto(patched, **config)) for patched in (True, False))
    assert "rewards/chosen" in theirs[0]
    _assert_same_training(ours, theirs)


def test_sft():
    ours, theirs = (compared(trl_runs.train_sft(patched)) for patched in (True, False))
    assert "mean_token_accuracy" in theirs[0]
    _assert_same_training(ours, theirs)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
@pytest.mark.parametrize("mode", ["patched", "fused"])
def test_bf16_is_closer_to_fp32(mode, autocast):
    """TRL rounds every logit to bf16, this package none, and nothing else differs from fp32."""
    dtype = torch.float32 if autocast else torch.bfloat16
    config = {"learning_rate": 0.0, "bf16": autocast}
    run = Run(config, model=functools.partial(_exact_backbone, dtype), reference=_with_another_head)
    truth_run = dataclasses.replace(
        run,
        config={"learning_rate": 0.0},
        model=functools.partial(_exact_backbone, torch.float32),
    )
    truth, ours, theirs = (
        compared(trl_runs.train(*arguments))
        for arguments in ((truth_run, "trl"), (run, mode), (run, "trl"))
    )

    def error(rows, key):
        return sum(abs(row[key] - true[key]) for row, true in zip(rows[:-1], truth, strict=False))

    for key in ("loss", "logps/chosen", "logps/rejected", "rewards/margins", "logits/chosen"):
        assert error(ours, key) < error(theirs, key) / 3, key


def _with_another_head(model):
    reference = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        weight = reference.get_output_embeddings().weight
        weight.add_((0.2 * torch.randn(weight.shape)).bfloat16().to(weight.dtype))
        weight.copy_(weight.bfloat16())
    return reference


def _exact_backbone(dtype):
    """Hidden states of plus and minus one, which bf16 holds exactly, under logits that spread."""
    model = make_model()
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                parameter.copy_(torch.randn_like(parameter).sign())
            elif "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.get_output_embeddings().weight.normal_(std=2.0)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("mode", ["patched", "fused"])
def test_policy_equal_to_reference_is_exactly_ln_2(mode, precomputed, dtype):
    run = Run(
        {"learning_rate": 0.0, "precompute_ref_log_probs": precomputed},
        model=functools.partial(make_model, dtype=dtype),
        peft_config=functools.partial(peft.LoraConfig, r=4, target_modules=["q_proj"]),
    )
    rows = trl_runs.train(run, mode)
    for row in rows[:-1]:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert row["rewards/margins"] == 0.0


@pytest.fixture
def starts_with_its_completion():
    """Pairs without prompt: their first token is counted as completion and never scored."""
    rng = torch.Generator().manual_seed(4)
    ids = torch.randint(5, trl_runs.VOCAB, (4, 7), generator=rng)
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": mask.clone()}


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_the_count_of_an_unscored_token(starts_with_its_completion, loss_type):
    """TRL 1.16 divides by one token too many: the patch keeps its number, the trainer does not."""
    run = Run({"loss_type": [loss_type], "beta": 0.5, "max_steps": 1})
    _, trainer = trl_runs.train_and_keep(run, "trl")
    _, fused = trl_runs.train_and_keep(run, "fused")
    fused.model.load_state_dict(trainer.model.state_dict())
    inputs = starts_with_its_completion
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, inputs)
        with integration.patched_trl():
            patched = trainer.compute_loss(trainer.model, inputs)
        ours = fused.compute_loss(fused.model, inputs)
        right = _truth(trainer, inputs, loss_type)
    assert float(patched) == pytest.approx(float(theirs), abs=1e-5)
    assert float(ours) == pytest.approx(right, abs=1e-5)
    assert abs(right - float(theirs)) > 1e-3


def _truth(trainer, inputs, loss_type) -> float:
    """The loss by its formula, from whole logits in float64, divided by what is scored."""
    scores = []
    for model in (trainer.model, trainer.ref_model):
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.double()
        logps = logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        scores.append((logps * inputs["completion_mask"][:, 1:]).sum(-1))
    chosen, rejected = ((scores[0] - scores[1]) / inputs["completion_mask"][:, 1:].sum(-1)).chunk(2)
    if loss_type == "ipo":
        return float(((chosen - rejected - 1 / (2 * 0.5)) ** 2).mean())
    return float(torch.log1p(torch.exp(-0.5 * (chosen - rejected))).mean())
