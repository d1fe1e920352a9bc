"""One training run of benchmarks.train_parity: TRL's DPOTrainer on a real model, measured by step.

The loss part of a step is all that is not the backbone: from its hidden states to the loss and the
metrics, of policy and reference, and in the backward from the loss to the gradient of the hidden
states.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

CONTENDERS = ("trl", "patched", "fused")
MODES = ("lora", "full")
# what TRL logs and a run keeps, by step
LOGGED = (
    *("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("rewards/accuracies", "logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy"),
)

# and what of the pairs that it was not trained on, at the end
HELD_OUT = ("loss", "rewards/accuracies", "rewards/margins")


class InputError(Exception):
    """A model or a data file that cannot be used; the message says why."""


@dataclass(frozen=True)
class RunSettings:
    """What a run depends on besides its mode and contender."""

    model: str
    data: str
    steps: int
    batch: int
    max_length: int
    learning_rate: float
    dtype: str
    seed: int
    held_out: int


def read_pairs(path: Path) -> list[dict]:
    """The rows of a JSONL file: prompt, chosen and rejected, each a text or a list of messages."""
    if not path.is_file():
        raise InputError(f"--data {path}: no such file")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not JSON: {error}") from error
        for name in ("prompt", "chosen", "rejected"):
            if not isinstance(row, dict) or name not in row:
                raise InputError(f"{path}:{number}: no {name!r}; expected prompt, chosen, rejected")
            if not isinstance(row[name], str) and not _is_conversation(row[name]):
                raise InputError(
                    f"{path}:{number}: {name!r} is neither a text nor a list of role and content"
                )
        rows.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
    if not rows:
        raise InputError(f"--data {path}: no pairs in it")
    return rows


def split_pairs(rows: list[dict], held_out: int) -> tuple[list[dict], list[dict]]:
    """(pairs to train on, the last ones, to ask in the end)."""
    count = len(rows) - held_out
    if count < 1:
        raise InputError(f"--held-out {held_out}: the data has {len(rows)} pairs in all")
    return rows[:count], rows[count:]


def _is_conversation(value) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and {"role", "content"} <= set(message) for message in value
    )


def locate_model(path: Path) -> tuple[Path, dict[str, str]]:
    """(folder, arguments of from_pretrained) of a model's folder or of a GGUF file."""
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, {"gguf_file": path.name}
    if path.is_dir() and (path / "config.json").is_file():
        return path, {}
    found = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(found) == 1:
        return path, {"gguf_file": found[0].name}
    what = (
        "no such file or folder" if not path.exists() else "no config.json and no GGUF file in it"
    )
    if len(found) > 1:
        what = f"{len(found)} GGUF files in it, name one"
    raise InputError(f"--model {path}: {what}")


def load_model(path: Path, dtype: torch.dtype):
    """(model, tokenizer); nothing is downloaded."""
    import transformers

    folder, options = locate_model(path)
    options = {**options, "local_files_only": True}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"--model {path}: {error}") from error
    return _without_quantizer(model), tokenizer


def _without_quantizer(model):
    """A model read from a GGUF holds plain weights, but is marked as one that cannot be trained."""
    if getattr(model, "hf_quantizer", None) is None:
        return model
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config).to(model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain


class Meter:
    """Times the parts of every training step, and how far it raises the memory in use."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[dict[str, float]] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self, tokens: int) -> None:
        self._tokens = tokens
        self._before = self._reset_peak()
        self._start = self.now()
        self._backbone = self._backward = 0.0

    def watch_backbone(self, model) -> None:
        """Times every forward of a backbone and marks when the gradient has reached its output."""
        backbone = model.base_model
        forward = backbone.forward

        def timed(*args, **kwargs):
            start = self.now()
            outputs = forward(*args, **kwargs)
            self._backbone += self.now() - start
            if outputs.last_hidden_state.requires_grad:
                outputs.last_hidden_state.register_hook(self._gradient_has_arrived)
            return outputs

        backbone.forward = timed

    def loss_made(self, loss: torch.Tensor) -> None:
        self._loss_part = self.now() - self._start - self._backbone
        loss.register_hook(self._backward_begins)

    def _backward_begins(self, grad) -> None:
        self._backward_start = self.now()

    def _gradient_has_arrived(self, grad) -> None:
        self._backward = self.now() - self._backward_start

    def step_made(self) -> None:
        """Forward and backward are done; the optimizer is not in it."""
        self.steps.append(
            {
                "step_s": self.now() - self._start,
                "loss_part_s": self._loss_part + self._backward,
                "peak_bytes": max(self._peak() - self._before, 0),
                "tokens": self._tokens,
            }
        )

    def _reset_peak(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def run(settings: RunSettings, mode: str, contender: str) -> list[dict[str, float]]:
    """One row a step: what TRL logs, and what the meter measured; held-out figures in the last."""
    import datasets
    import peft
    from trl import DPOConfig, DPOTrainer

    from dpo_kernels.integrations.trl import FusedDPOTrainer, patched_trl

    datasets.disable_progress_bars()
    cuda = torch.cuda.is_available()
    meter = Meter(torch.device("cuda" if cuda else "cpu"))
    base = FusedDPOTrainer if contender == "fused" else DPOTrainer

    class Measured(base):
        def training_step(self, model, inputs, *args, **kwargs):
            meter.begin(int(inputs["attention_mask"].sum()))
            loss = super().training_step(model, inputs, *args, **kwargs)
            meter.step_made()
            return loss

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if torch.is_grad_enabled():
                meter.loss_made(loss)
            return loss

    pairs, held_out = (
        datasets.Dataset.from_list(part)
        for part in split_pairs(read_pairs(Path(settings.data)), settings.held_out)
    )
    model, tokenizer = load_model(Path(settings.model), getattr(torch, settings.dtype))
    reference = copy.deepcopy(model) if mode == "full" else None
    for one in (model, reference):
        if one is not None:
            meter.watch_backbone(one)
    config = {
        "per_device_train_batch_size": settings.batch,
        "per_device_eval_batch_size": settings.batch,
        "max_steps": settings.steps,
        "max_length": settings.max_length,
        "learning_rate": settings.learning_rate * (10 if mode == "lora" else 1),
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "seed": settings.seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not cuda,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    adapter = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    patch = patched_trl() if contender == "patched" else contextlib.nullcontext()
    with patch, tempfile.TemporaryDirectory() as folder:
        trainer = Measured(
            model=model,
            ref_model=reference,
            args=DPOConfig(output_dir=folder, **config),
            train_dataset=pairs,
            eval_dataset=held_out if settings.held_out else None,
            processing_class=tokenizer,
            peft_config=adapter if mode == "lora" else None,
        )
        trainer.train()
        measured = trainer.evaluate() if settings.held_out else {}
    logged = [row for row in trainer.state.log_history if "rewards/margins" in row]
    rows = [
        {"step": number, **{name: row[name] for name in LOGGED}, **step}
        for number, (row, step) in enumerate(zip(logged, meter.steps, strict=True), 1)
    ]
    for row in rows:
        for name in HELD_OUT:
            row[f"held_out_{name}"] = measured.get(f"eval_{name}") if row is rows[-1] else None
    return rows
