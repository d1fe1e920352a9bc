"""The demo's training: a language-model warm-up, then DPO twice from the same weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..cli.measure import peak_extra_bytes, time_once
from ..cli.problems import IGNORE
from .data import PreferencePair
from .model import CausalTransformer, ModelConfig
from .tokenizer import Tokenizer

# steps whose memory is measured; their times are left out, because measuring disturbs them
_MEMORY_STEPS = 3
Advance = Callable[[str], object]


@dataclass(frozen=True)
class TrainingOptions:
    vocab_size: int = 8192
    seq_len: int = 64
    width: int = 128
    heads: int = 4
    layers: int = 2
    pairs: int = 16  # a batch
    warmup_steps: int = 100
    steps: int = 120
    warmup_lr: float = 2e-3
    lr: float = 5e-4
    beta: float = 0.1
    evaluations: int = 5
    seed: int = 0


@dataclass
class Split:
    """Encoded pairs: ``tokens`` and ``labels`` are ``[2N, T]``, the chosen answers first."""

    tokens: Tensor
    labels: Tensor
    kinds: list[str]
    cut: int = 0  # pairs of which something did not fit
    # [2N], empty until the model that DPO starts from is there
    reference_logps: Tensor = field(default_factory=lambda: torch.empty(0))

    def __len__(self) -> int:
        return len(self.kinds)

    def rows(self, pairs: Tensor) -> Tensor:
        return torch.cat((pairs, pairs + len(self)))


@dataclass
class Run:
    """What one DPO run leaves behind."""

    name: str
    losses: list[float] = field(default_factory=list)
    loss_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)
    accuracy: dict[int, float] = field(default_factory=dict)  # by step
    accuracy_by_kind: dict[str, float] = field(default_factory=dict)


def encode(pairs: list[PreferencePair], tokenizer: Tokenizer, seq_len: int, device: str) -> Split:
    """Prompts keep their end and answers their start, so that each has room in ``seq_len``."""
    tokens = torch.full((2 * len(pairs), seq_len), tokenizer.end)
    labels = torch.full_like(tokens, IGNORE)
    cut = 0
    for index, pair in enumerate(pairs):
        whole = tokenizer.encode(pair.prompt)
        prompt = [tokenizer.end, *whole[-(seq_len // 2 - 1) :]]
        longest = len(prompt)
        for row, answer in ((index, pair.chosen), (len(pairs) + index, pair.rejected)):
            ids = [*prompt, *tokenizer.encode(answer), tokenizer.end]
            longest = max(longest, len(ids))
            both = torch.tensor(ids[:seq_len])
            tokens[row, : len(both)] = both
            labels[row, len(prompt) : len(both)] = both[len(prompt) :]
        cut += longest > seq_len or len(whole) >= len(prompt)
    return Split(tokens.to(device), labels.to(device), [pair.kind for pair in pairs], cut)


def make_model(tokenizer: Tokenizer, options: TrainingOptions, device: str) -> CausalTransformer:
    torch.manual_seed(options.seed)
    config = ModelConfig(
        tokenizer.vocab_size, options.seq_len, options.width, options.heads, options.layers
    )
    return CausalTransformer(config).to(device)


def batches(split: Split, size: int, steps: int, seed: int):
    """``steps`` batches of pair numbers, every pair once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < size:
            order = torch.cat((order, torch.randperm(len(split), generator=generator)))
        yield order[:size].to(split.tokens.device)
        order = order[size:]


def _optimizer(model: CausalTransformer, lr: float, steps: int, ramp: int):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)

    def factor(step: int) -> float:
        return min((step + 1) / ramp, 1.0) * max(1.0 - step / steps, 0.1)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def warm_up(model: CausalTransformer, split: Split, options: TrainingOptions, advance: Advance):
    """Next-token cross-entropy on prompts and chosen answers: the model that DPO starts from."""
    optimizer, schedule = _optimizer(model, options.warmup_lr, options.warmup_steps, 10)
    for pairs in batches(split, 2 * options.pairs, options.warmup_steps, options.seed):
        tokens, labels = split.tokens[pairs], split.labels[pairs]
        # the prompt is text too; what follows the answer is not
        last = (labels != IGNORE).long().cumsum(-1).argmax(-1, keepdim=True)
        beyond = torch.arange(tokens.shape[1], device=tokens.device) > last
        targets = tokens.masked_fill(beyond, IGNORE)[:, 1:]
        rows = model(tokens)[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(rows, targets.flatten(), ignore_index=IGNORE)
        _step(loss.backward, model, optimizer, schedule)
        advance(f"loss {loss.item():.3f}")


def _backward(logits: Tensor, leaf: Tensor) -> None:
    logits.backward(leaf.grad)


def _step(backward: Callable, model, optimizer, schedule) -> None:
    optimizer.zero_grad(set_to_none=True)
    backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


@torch.no_grad()
def sequence_logps(model: CausalTransformer, split: Split, chunk: int = 32) -> Tensor:
    """``[2N]`` log-probs of all answers, by the plain implementation."""
    parts = zip(split.tokens.split(chunk), split.labels.split(chunk), strict=True)
    return torch.cat([reference.sequence_logps(model(tokens), labels) for tokens, labels in parts])


def preferred(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where chosen is ahead, 1/2 for a tie, 0 otherwise."""
    return (torch.sign(chosen - rejected) + 1) / 2


def preference_accuracy(model: CausalTransformer, split: Split) -> Tensor:
    """Per pair, whether the implicit reward, log pi - log ref, prefers the chosen answer."""
    return preferred(*(sequence_logps(model, split) - split.reference_logps).chunk(2))


def train(
    name: str,
    loss_function: Callable,
    start: CausalTransformer,
    train_split: Split,
    held_out: Split,
    options: TrainingOptions,
    advance: Advance,
) -> Run:
    """DPO from the weights of ``start``, which stay as they are."""
    model = copy.deepcopy(start)
    device = train_split.tokens.device
    optimizer, schedule = _optimizer(model, options.lr, options.steps, 10)
    run = Run(name)
    every = max(1, options.steps // options.evaluations)
    run.accuracy[0] = float(preference_accuracy(model, held_out).mean())
    order = batches(train_split, options.pairs, options.steps, options.seed + 1)
    for step, pairs in enumerate(order):
        started = time.perf_counter()
        rows = train_split.rows(pairs)
        labels, logps = train_split.labels[rows], train_split.reference_logps[rows]
        logits = model(train_split.tokens[rows])
        # a leaf between model and loss: what the loss costs, and nothing else, is measured
        leaf = logits.detach().requires_grad_()
        losses = []

        def loss_part(leaf=leaf, labels=labels, logps=logps, losses=losses):
            output = loss_function(leaf, labels, *logps.chunk(2), beta=options.beta)
            output.loss.backward()
            losses.append(output.loss.detach())

        if step < _MEMORY_STEPS:
            run.peaks.append(peak_extra_bytes(loss_part, device))
        else:
            run.loss_seconds.append(time_once(loss_part, device))
        _step(partial(_backward, logits, leaf), model, optimizer, schedule)
        run.losses.append(losses[0].item())
        if step >= _MEMORY_STEPS:
            run.step_seconds.append(time.perf_counter() - started)
        if (step + 1) % every == 0 or step + 1 == options.steps:
            correct = preference_accuracy(model, held_out)
            run.accuracy[step + 1] = float(correct.mean())
        last_accuracy = list(run.accuracy.values())[-1]
        advance(f"loss {run.losses[-1]:.3f}, held-out accuracy {last_accuracy:.1%}")
    for kind in sorted(set(held_out.kinds) - {""}):
        of_kind = torch.tensor([k == kind for k in held_out.kinds], device=correct.device)
        run.accuracy_by_kind[kind] = float(correct[of_kind].mean())
    return run
