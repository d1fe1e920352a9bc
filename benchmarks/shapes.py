"""The shapes that are timed, named after models that people train.

Head sizes are those of the models' published config.json (hidden_size, vocab_size and, for
Gemma 2, final_logit_softcapping).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dpo_kernels.cli.problems import Shape

# model: (hidden size, vocabulary, softcap of the final logits)
MODELS = {
    "SmolLM2-135M": (576, 49152, None),
    "Qwen3-0.6B": (1024, 151936, None),
    "Qwen3-8B": (4096, 151936, None),
    "Llama-3-8B": (4096, 128256, None),
    "Gemma-2-9B": (3584, 256000, 30.0),
    "gpt-oss-20b": (2880, 201088, None),
}

# (prompt, chosen, rejected) in tokens: eight pairs at equal steps of length among the 200 English
# ones of data/dpo_en_demo.json in the LLaMA-Factory repository (Apache-2.0), a token taken as four
# bytes. 35% of their tokens are scored, and 43% in the whole file.
REAL_PAIRS = (
    *((137, 6, 5), (222, 12, 98), (226, 134, 233), (148, 101, 477)),
    *((734, 17, 127), (594, 325, 621), (867, 698, 464), (1428, 650, 622)),
)


def model_shape(
    model: str, pairs: int, tokens: int, *, from_hidden: bool = False, **options
) -> Shape:
    hidden, vocab, softcap = MODELS[model]
    if from_hidden:
        options = {"hidden": hidden, "softcap": softcap, **options}
    return Shape(pairs, tokens, vocab, model=model, **options)


def real_lengths(shape: Shape, scale: float = 1.0) -> Shape:
    """The shape with the lengths of real pairs, times ``scale``; padded to the longest."""
    pairs = [REAL_PAIRS[index * len(REAL_PAIRS) // shape.pairs] for index in range(shape.pairs)]
    pairs = [tuple(max(1, round(scale * length)) for length in pair) for pair in pairs]
    chosen = [(prompt, prompt + answer) for prompt, answer, _ in pairs]
    rejected = [(prompt, prompt + answer) for prompt, _, answer in pairs]
    lengths = (*chosen, *rejected)
    return replace(shape, lengths=lengths, tokens=max(end for _, end in lengths))


def half(device: str) -> torch.dtype:
    """bfloat16, or float16 on a GPU that has no bfloat16 (below sm_80)."""
    old = device == "cuda" and torch.cuda.get_device_capability() < (8, 0)
    return torch.float16 if old else torch.bfloat16


def logits_shapes(device: str, quick: bool) -> list[Shape]:
    """The most telling shape first: a run that is cut short has it."""
    if device != "cuda":
        sizes = [(2, 64, 0.5)] if quick else [(4, 256, 0.5), (4, 256, 1.0), (4, 256, 0.2)]
        dtypes = (torch.float32, torch.bfloat16)
        shapes = [
            model_shape("SmolLM2-135M", pairs, tokens, scored=scored, dtype=dtype)
            for pairs, tokens, scored in sizes
            for dtype in dtypes
        ]
        if quick:
            return shapes
        real = real_lengths(model_shape("SmolLM2-135M", 4, 512), 0.35)
        return [*shapes, *(replace(real, packed=packed) for packed in (False, True))]
    bf16 = {"dtype": half(device)}
    if quick:
        # fits in 15 GiB
        sizes = (("Llama-3-8B", 1024), ("SmolLM2-135M", 1024), ("SmolLM2-135M", 128))
        return [model_shape(model, 1, tokens, **bf16) for model, tokens in sizes]
    first = model_shape("Llama-3-8B", 4, 1024, **bf16)
    shapes = [first, *(replace(first, scored=scored) for scored in (1.0, 0.2))]
    shapes.append(real_lengths(model_shape("Llama-3-8B", 8, 2048, **bf16), 0.5))
    shapes.append(replace(first, packed=True))
    shapes += [model_shape(model, 4, 1024, **bf16) for model in MODELS if model != "Llama-3-8B"]
    others = {torch.float32, torch.float16} - {first.dtype}
    shapes += [replace(first, dtype=dtype) for dtype in sorted(others, key=str)]
    # an odd vocabulary: every row starts at another alignment
    shapes.append(Shape(4, 1024, 50257, model="GPT-2", **bf16))
    # few rows, and calls so short that Python shows
    shapes.append(model_shape("Llama-3-8B", 1, 8, scored=1.0, **bf16))
    shapes.append(model_shape("SmolLM2-135M", 2, 128, **bf16))
    return shapes


def linear_shapes(device: str, quick: bool) -> list[Shape]:
    if device != "cuda":
        pairs, tokens = (1, 64) if quick else (4, 512)
        return [
            model_shape(
                "SmolLM2-135M",
                pairs,
                tokens,
                from_hidden=True,
                dtype=dtype,
                trainable_head=head,
                reference_hidden=True,
            )
            for dtype in (torch.float32, torch.bfloat16)
            for head in (True, False)
        ]
    options = {"from_hidden": True, "dtype": half(device)}
    if quick:
        return [model_shape("SmolLM2-135M", 2, 512, **options)]
    first = model_shape("Llama-3-8B", 8, 2048, **options)
    shapes = [first, replace(first, trainable_head=False)]
    shapes += [
        model_shape(model, 8, 2048, **options) for model in ("Qwen3-0.6B", "Gemma-2-9B", "Qwen3-8B")
    ]
    shapes.append(replace(first, reference_hidden=True))
    shapes.append(replace(first, scored=0.2))
    return [*shapes, model_shape("gpt-oss-20b", 8, 2048, **options)]


def rehearsal(from_hidden: bool) -> list[Shape]:
    """Tiny shapes that take the way of the real ones."""
    hidden = 16 if from_hidden else None
    first = Shape(1, 8, 301, hidden=hidden, dtype=torch.bfloat16, model="rehearsal")
    return [first, replace(first, packed=True) if hidden is None else replace(first, scored=1.0)]


LOSS_TYPES = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "sppo_hard", "discopop")


def loss_shapes(device: str, quick: bool) -> list[Shape]:
    vocab = 8192 if device != "cuda" else 32000
    base = Shape(4, 64 if quick or device != "cuda" else 512, vocab)
    return [replace(base, loss_type=name) for name in (LOSS_TYPES[:2] if quick else LOSS_TYPES)]


def growth_shapes(device: str, quick: bool) -> dict[str, list[Shape]]:
    """By what grows: each list doubles one size, or shrinks the scored share."""
    gpu = device == "cuda"
    base = Shape(2, 512 if gpu else 64, 32768 if gpu else 8192, dtype=torch.bfloat16)
    if not gpu:
        base = replace(base, dtype=torch.float32)
    steps = range(3 if quick else 6)
    return {
        "tokens": [replace(base, tokens=base.tokens << i) for i in steps],
        "vocabulary": [replace(base, vocab=base.vocab << i) for i in steps],
        "pairs": [replace(base, pairs=base.pairs << i) for i in steps],
        "scored share": [
            replace(base, tokens=4 * base.tokens, scored=share)
            for share in ((0.125, 0.5, 1.0) if quick else (0.0625, 0.125, 0.25, 0.5, 1.0))
        ],
    }


def accuracy_shapes(quick: bool) -> list[Shape]:
    stds = (1.0, 15.0) if quick else (1.0, 5.0, 15.0)
    return [
        Shape(2, 64, 32000 if not quick else 4099, hidden=hidden, dtype=dtype, std=std)
        for hidden in (None, 256)
        for dtype in (torch.float32, torch.bfloat16)
        for std in stds
    ]
