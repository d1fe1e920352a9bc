"""DPO in a training loop of your own, with a causal language model of transformers.

    python own_loop.py --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl

Each line of the file is {"prompt": text, "chosen": text, "rejected": text}.
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
from torch import Tensor

from dpo_kernels import DPOOutput, linear_dpo_loss

IGNORED = -100


def collate(pairs: list[dict], tokenizer, max_length: int = 1024) -> dict[str, Tensor]:
    """A batch [2P, T]: the chosen answers, then the rejected; only answers have labels."""
    texts, labels = [], []
    for name in ("chosen", "rejected"):
        for pair in pairs:
            prompt = tokenizer(pair["prompt"])["input_ids"]
            answer = tokenizer(pair[name], add_special_tokens=False)["input_ids"]
            answer.append(tokenizer.eos_token_id)
            texts.append((prompt + answer)[-max_length:])
            labels.append(([IGNORED] * len(prompt) + answer)[-max_length:])
    length = max(map(len, texts))

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows])

    return {
        # what pads is not read: the mask says where it is
        "input_ids": padded(texts, 0),
        "attention_mask": padded([[1] * len(row) for row in texts], 0),
        "labels": padded(labels, IGNORED),
    }


def dpo(model, reference_model, batch: dict[str, Tensor], beta: float = 0.1) -> DPOOutput:
    """The loss from the hidden states before the head: the logits are never held."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model.model(**inputs).last_hidden_state
    with torch.no_grad():
        reference_hidden = reference_model.model(**inputs).last_hidden_state
    return linear_dpo_loss(
        hidden,
        model.lm_head.weight,
        batch["labels"],
        reference_hidden=reference_hidden,
        reference_weight=reference_model.lm_head.weight,
        beta=beta,
    )


def train(model, batches, *, learning_rate: float = 1e-6, beta: float = 0.1) -> list[float]:
    """One step a batch; returns the losses."""
    reference_model = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    losses = []
    for step, batch in enumerate(batches):
        output = dpo(model, reference_model, batch, beta)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.detach())
        if step % 10 == 0:
            # tensors until here: only a step that is printed waits for a GPU
            values = {name: f"{value.item():.4f}" for name, value in output.metrics().items()}
            print(f"step {step}: loss {losses[-1].item():.4f}, {values}")
    return [loss.item() for loss in losses]


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=8, help="a step")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
    with open(args.data) as file:
        pairs = [json.loads(line) for line in file]
    groups = (pairs[i : i + args.pairs] for i in range(0, len(pairs), args.pairs))
    batches = (
        {name: value.to(device) for name, value in collate(group, tokenizer).items()}
        for group in groups
    )
    train(model, batches, learning_rate=args.learning_rate)
    model.save_pretrained("trained")


if __name__ == "__main__":
    main()
