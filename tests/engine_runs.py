"""Two ranks under FSDP2 or DeepSpeed's ZeRO-3, of which ``engine_runs.py ENGINE FOLDER`` is one.

Rank 0 leaves ``trl.json``, what the trainers of TRL logged, and ``own.pt``, what a training loop of
one's own made under ZeRO-3.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import logsigmoid

import dpo_kernels as dk
from tests import trl_runs
from tests.test_training_distributed import share
from tests.trl_runs import Run, lora, make_model

RANKS, STEPS, BATCH = 2, 3, 4

TRL_RUNS = {
    "full": Run(),
    "lora": Run(peft_config=lora),
    "lora, lm_head trained": Run(peft_config=functools.partial(lora, modules_to_save=["lm_head"])),
    "tied": Run(model=functools.partial(make_model, tie_word_embeddings=True)),
    "wpo": Run({"use_weighting": True}),
    "accumulation, checkpointing": Run(
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    ),
}
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    # parameters as small as these would never be partitioned
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
ENGINES = {
    "fsdp2": {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        },
    },
    "zero3": {"deepspeed": ZERO3},
}


def one_of(run: Run, ranks: int, **config) -> Run:
    """``run`` on one of so many ranks, with the batch of all of them the same."""
    batch = BATCH // ranks // run.config.get("gradient_accumulation_steps", 1)
    return replace(run, config={**run.config, **config, "per_device_train_batch_size": batch})


def let_accelerate_shard_on_a_cpu() -> None:
    """accelerate has FSDP for accelerators alone, though nothing in it or in torch needs one."""
    of_accelerate = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        of_accelerate(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def trl_rows(engine: str) -> dict[str, list[dict[str, float]]]:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    rows = {}
    for name, run in TRL_RUNS.items():
        for mode in ("patched", "fused"):
            # what it has of the last run would partition the next model while it is made
            unset_hf_deepspeed_config()
            logged, trainer = trl_runs.train_and_keep(one_of(run, RANKS, **ENGINES[engine]), mode)
            assert all(is_sharded(p) for p in trainer.model.parameters()), name
            rows[f"{name}, {mode}"] = trl_runs.compared(logged)
    unset_hf_deepspeed_config()
    return rows


def is_sharded(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor) or parameter.numel() < parameter.ds_numel


class Model(nn.Module):
    """A Llama with a head that is used, not called; with ``outside`` the caller makes the loss."""

    def __init__(self, function: str, frozen: bool, outside: bool = False):
        super().__init__()
        self.llama, self.function, self.outside = make_model(), function, outside
        self.llama.lm_head.weight.requires_grad_(not frozen)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.llama.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden if self.outside else self.loss(hidden, labels)

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight = self.llama.lm_head.weight
        if self.function == "loss":
            options = {"reference_free": True, "beta": 0.3}
            return dk.linear_dpo_loss(hidden, weight, labels, **options).loss
        chosen, rejected = dk.linear_sequence_logps(hidden, weight, labels).chunk(2)
        return -logsigmoid(0.3 * (chosen - rejected)).mean()


OWN_CASES = [(function, frozen) for function in ("loss", "logps") for frozen in (False, True)]


def own_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(step)
    ids = torch.randint(3, trl_runs.VOCAB, (8, 6), generator=rng)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=rng) < 0.3, -100)
    if step == 1:
        # the pairs of the second rank
        labels[1::2] = -100
    return ids, labels


def own_training(function: str, frozen: bool, rank: int | None) -> tuple[list, list]:
    """(losses, parameters) of a training under ZeRO-3, or with ``rank`` None of one process."""
    model = Model(function, frozen)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    engine = None if rank is None else wrapped(model, optimizer)
    losses = []
    for step in range(STEPS):
        batch = own_batch(step)
        if engine is None:
            optimizer.zero_grad()
            loss = model(*batch)
            loss.backward()
            optimizer.step()
            loss = loss.detach()
        else:
            loss = engine(*share(batch, rank))
            engine.backward(loss)
            engine.step()
            loss = loss.detach() / RANKS
            dist.all_reduce(loss)
        losses.append(float(loss))
    parameters = list(model.parameters())
    if engine is None:
        return losses, parameters
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        return losses, [p.detach().clone() for p in parameters]


def wrapped(model: nn.Module, optimizer):
    import deepspeed

    config = {**ZERO3, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0}
    config = {name: value for name, value in config.items() if value != "auto"}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def error_outside_the_forward() -> str:
    """Of the backward of a loss that was made behind the forward that DeepSpeed wraps."""
    model = Model("loss", frozen=False, outside=True)
    engine = wrapped(model, torch.optim.SGD(model.parameters(), lr=0.01))
    ids, labels = share(own_batch(0), dist.get_rank())
    loss = model.loss(engine(ids, labels), labels)
    try:
        engine.backward(loss)
    except RuntimeError as error:
        return str(error)
    return "none"


def main(engine: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if engine == "fsdp2":
        let_accelerate_shard_on_a_cpu()
    else:
        import deepspeed

        # gloo alone: DeepSpeed's own all-reduce, in shared memory, has to be compiled first
        deepspeed.comm.torch.build_shm_op = lambda: None
    rows = trl_rows(engine)
    own = {}
    if engine == "zero3":
        rank = dist.get_rank()
        own = {case: own_training(*case, rank=rank) for case in OWN_CASES}
        own["outside"] = error_outside_the_forward()
    if dist.get_rank() == 0:
        (folder / "trl.json").write_text(json.dumps(rows))
        torch.save(own, folder / "own.pt")
    dist.destroy_process_group()


def launch(engine: str, folder: Path) -> tuple[dict, dict]:
    """(rows of TRL's trainers, results of own trainings) of two ranks, as torchrun starts them."""
    root = Path(__file__).parents[1]
    environment = {
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc_per_node={RANKS}", __file__, engine, str(folder)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "leaves" not in done.stderr, "something was left to TRL"
    return json.loads((folder / "trl.json").read_text()), torch.load(folder / "own.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
