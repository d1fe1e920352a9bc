"""OpenRLHF's Actor and DPOTrainer.fit, on one process.

A strategy stands in DeepspeedStrategy's place; another makes DeepSpeed's engines as that does.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import tempfile
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from openrlhf.models.actor import Actor
from openrlhf.trainer.dpo_trainer import DPOTrainer
from torch.utils.data import DataLoader

from tests import trl_runs

from . import memory
from .report import STEPS, report

LENGTH = 24


class Strategy:
    """What the trainer asks of DeepSpeedStrategy, without DeepSpeed; keeps what is logged."""

    accumulated_gradient = 1
    ring_attn_group = None

    def __init__(self, args):
        self.args = args
        self.logged = []

    def is_rank_0(self):
        return False

    def prepare(self, policy, reference, optimizer):
        pass

    def backward(self, loss, model, optimizer):
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler):
        optimizer.step()
        optimizer.zero_grad()

    def get_grad_norm(self, model):
        squares = (p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        return float(sum(squares)) ** 0.5

    def all_reduce(self, values):
        self.logged.append({name: float(value) for name, value in values.items()})
        return values

    def print(self, *_):
        pass


class EngineStrategy(Strategy):
    """With DeepSpeed's engines around the models, ZeRO-2 around the policy's."""

    def __init__(self, args):
        super().__init__(args)
        # its own all-reduce, in shared memory, has to be compiled first
        deepspeed.comm.torch.build_shm_op = lambda: None
        if not dist.is_initialized():
            store = f"file://{tempfile.mkdtemp()}/store"
            dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
            os.environ["LOCAL_RANK"] = "0"

    def prepare(self, policy, reference, optimizer):
        config = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
        reference.model, *_ = deepspeed.initialize(model=reference.model, config=config)
        policy.model, *_ = deepspeed.initialize(
            model=policy.model,
            optimizer=optimizer,
            config={**config, "zero_optimization": {"stage": 2}},
        )

    def backward(self, loss, model, optimizer):
        model.model.backward(loss)

    def optimizer_step(self, optimizer, model, scheduler):
        model.model.step()

    def get_grad_norm(self, model):
        return float(model.model.get_global_grad_norm())


def pairs(count: int) -> list[tuple]:
    """Batches of one pair as the trainer's collate function makes them, right-padded."""
    rng = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids = torch.randint(5, trl_runs.VOCAB, (2, 1, LENGTH), generator=rng)
        masks = torch.ones_like(ids)
        bounds = ((2, 8), (12, 24), (12, 24))
        prompt, *ends = (int(torch.randint(*b, (), generator=rng)) for b in bounds)
        ids[1, :, :prompt] = ids[0, :, :prompt]
        for answer, end in enumerate(ends):
            ids[answer, :, end:], masks[answer, :, end:] = 0, 0
        batches.append((ids[0], masks[0], ids[1], masks[1], [prompt]))
    return batches


def actor(model, path: str, packed: bool) -> Actor:
    model.save_pretrained(path)
    # it loads 16-bit models alone, whose losses have too few digits to compare
    return Actor(path, attn_implementation="eager", packing_samples=packed).float()


def train(
    packed: bool = False, nll: float = 0.0, strategy_class=Strategy
) -> list[dict[str, float]]:
    torch.manual_seed(0)
    model = trl_runs.make_model()
    with tempfile.TemporaryDirectory() as folder:
        policy, reference = (
            actor(made, f"{folder}/{name}", packed)
            for name, made in (("policy", model), ("reference", trl_runs.moved(model)))
        )
    args = SimpleNamespace(
        model=SimpleNamespace(
            label_smoothing=0.1, ipo_enable=False, aux_loss_coef=0.0, nll_loss_coef=nll
        ),
        ds=SimpleNamespace(packing_samples=packed),
        logger=SimpleNamespace(
            wandb=SimpleNamespace(key=None), tensorboard_dir=None, logging_steps=1
        ),
        train=SimpleNamespace(batch_size=1),
        eval=SimpleNamespace(steps=-1),
        ckpt=SimpleNamespace(save_steps=-1),
    )
    strategy = strategy_class(args)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    strategy.prepare(policy, reference, optimizer)
    trainer = DPOTrainer(
        policy,
        reference,
        strategy,
        tokenizer=SimpleNamespace(pad_token_id=0),
        optim=optimizer,
        train_dataloader=DataLoader(pairs(STEPS), batch_size=None),
        eval_dataloader=None,
        scheduler=SimpleNamespace(get_last_lr=lambda: [2e-3]),
        beta=0.1,
        max_epochs=1,
    )
    trainer.fit(args)
    return strategy.logged


def forward_and_backward():
    """One forward of the Actor, as the DPO trainer calls it, and its gradient."""
    policy = Actor(memory.make_model())
    # which it has only where it loads the model itself
    policy.packing_samples = False
    ids, labels = memory.make_batch()

    def call():
        logps, _ = policy(
            ids, attention_mask=torch.ones_like(ids), return_output=True, return_logprobs=True
        )
        (logps * (labels[:, 1:] != -100)).sum().backward()

    return call


def main() -> None:
    version = importlib.metadata.version("openrlhf")
    row = functools.partial(report, "openrlhf", version=version, vocabulary=trl_runs.VOCAB)
    row("DPO", train=train)
    row("DPO and NLL", train=functools.partial(train, nll=0.2))
    row("DPO, packed samples", train=functools.partial(train, packed=True))
    row("DPO, DeepSpeed's engine", train=functools.partial(train, strategy_class=EngineStrategy))
    memory.report_peaks("openrlhf", version, forward_and_backward())


if __name__ == "__main__":
    main()
