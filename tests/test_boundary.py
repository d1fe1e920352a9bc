"""The boundary to compiled code: what does not fit raises before a pointer is followed."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from dpo_kernels import ops
from dpo_kernels.backends import native
from dpo_kernels.backends.batch import (
    ForwardOutputs,
    GradOutput,
    PairLoss,
    TokenBatch,
    check_backward,
    check_forward,
)

_C = pytest.importorskip("dpo_kernels._C")

PAIRS, LENGTH, VOCAB = 2, 3, 8
SEQS, TOKENS = 2 * PAIRS, 2 * PAIRS * LENGTH
PACKED = {
    "logits": torch.zeros(TOKENS, VOCAB),
    "labels": torch.zeros(TOKENS, dtype=torch.int64),
    "cu_seqlens": torch.arange(0, TOKENS + 1, LENGTH),
}


def batch_arguments(**changes) -> dict:
    return {
        "logits": torch.zeros(SEQS, LENGTH, VOCAB),
        "labels": torch.zeros(SEQS, LENGTH, dtype=torch.int64),
        "cu_seqlens": None,
        "ignore_index": -100,
        "shift": False,
        "scale": 1.0,
        "softcap": 0.0,
        "temperature": 1.0,
        "vocab_start": 0,
        "vocab_total": 0,
    } | changes


def dpo_arguments(**changes) -> dict:
    pair = {
        "average": False,
        "reference_logps": torch.zeros(SEQS),
        "beta": 0.1,
        "label_smoothing": 0.0,
        "mean": True,
    }
    return batch_arguments() | pair | {"backend": "cpu"} | changes


def backward_arguments(**changes) -> dict:
    grad = {
        "grad": torch.ones(TOKENS),
        "grad_index": "token",
        "seq_scale": None,
        "tokens": torch.zeros(3, TOKENS),
    }
    return batch_arguments() | grad | {"backend": "cpu"} | changes


def transposed(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape).transpose(-1, -2).contiguous().transpose(-1, -2)


WRONG_BATCHES = {
    "transposed vocabulary": ("logits", {"logits": transposed(SEQS, LENGTH, VOCAB)}),
    "logits of two dimensions": ("logits", {"logits": torch.zeros(TOKENS, VOCAB)}),
    "packed logits of three": (
        "(logits|cu_seqlens)",
        {"cu_seqlens": torch.tensor([0, 3, 6, 9, 12])},
    ),
    "a shard beyond the vocabulary": ("logits", {"vocab_start": 3, "vocab_total": VOCAB + 2}),
    "a shard before the vocabulary": ("logits", {"vocab_start": -1, "vocab_total": VOCAB}),
    "a shard larger than the vocabulary": ("logits", {"vocab_total": VOCAB - 1}),
    "a shard of no vocabulary": ("logits", {"vocab_start": 1}),
    "few labels": ("labels", {"labels": torch.zeros(SEQS, LENGTH - 1, dtype=torch.int64)}),
    "labels of another shape": ("labels", {"labels": torch.zeros(LENGTH, SEQS, dtype=torch.int64)}),
    "int32 labels": ("labels", {"labels": torch.zeros(SEQS, LENGTH, dtype=torch.int32)}),
    "int32 cu_seqlens": ("cu_seqlens", PACKED | {"cu_seqlens": PACKED["cu_seqlens"].int()}),
    "strided cu_seqlens": (
        "cu_seqlens",
        PACKED | {"cu_seqlens": PACKED["cu_seqlens"].repeat_interleave(2)[::2]},
    ),
    "cu_seqlens of two dimensions": (
        "cu_seqlens",
        PACKED | {"cu_seqlens": torch.tensor([[0], [TOKENS]])},
    ),
}
WRONG_PAIRS = {
    "short reference": ("reference_logps", {"reference_logps": torch.zeros(SEQS - 1)}),
    "float64 reference": ("reference_logps", {"reference_logps": torch.zeros(SEQS).double()}),
    "strided reference": ("reference_logps", {"reference_logps": torch.zeros(SEQS, 2)[:, 0]}),
    "odd number of sequences": (
        "labels",
        {
            "logits": torch.zeros(3, 1, VOCAB),
            "labels": torch.zeros(3, 1, dtype=torch.int64),
            "reference_logps": torch.zeros(3),
        },
    ),
}
WRONG_GRADIENTS = {
    "short grad": ("grad", {"grad": torch.ones(TOKENS - 1)}),
    "grad of pairs for sequences": ("grad", {"grad": torch.ones(PAIRS), "grad_index": "sequence"}),
    "short grad of pairs": ("grad", {"grad": torch.ones(3), "grad_index": "pair"}),
    "grad without elements": ("grad", {"grad": torch.ones(0)}),
    "short seq_scale": ("seq_scale", {"seq_scale": torch.ones(SEQS - 1)}),
    "float64 seq_scale": ("seq_scale", {"seq_scale": torch.ones(SEQS).double()}),
    "strided seq_scale": ("seq_scale", {"seq_scale": torch.ones(SEQS, 2)[:, 1]}),
    "two rows of tokens": ("tokens", {"tokens": torch.zeros(2, TOKENS)}),
    "bfloat16 tokens": ("tokens", {"tokens": torch.zeros(3, TOKENS).bfloat16()}),
    "tokens by column": ("tokens", {"tokens": transposed(3, TOKENS)}),
}


def cases(table: dict):
    return pytest.mark.parametrize(("name", "changes"), table.values(), ids=table.keys())


@cases(WRONG_BATCHES | WRONG_PAIRS)
def test_dpo_forward_refuses(name, changes):
    torch.ops.dpo_kernels.dpo_forward(**dpo_arguments())
    with pytest.raises((RuntimeError, ValueError), match=f"{name}: expected"):
        torch.ops.dpo_kernels.dpo_forward(**dpo_arguments(**changes))


@cases(WRONG_BATCHES)
def test_token_and_sequence_forward_refuse(name, changes):
    for op, option in (("token_forward", "stats"), ("sequence_forward", "average")):
        call = getattr(torch.ops.dpo_kernels, op)
        call(**batch_arguments(), **{option: True}, backend="cpu")
        with pytest.raises((RuntimeError, ValueError), match=f"{name}: expected"):
            call(**batch_arguments(**changes), **{option: True}, backend="cpu")


@cases(WRONG_BATCHES | WRONG_GRADIENTS)
def test_backward_refuses(name, changes):
    for op in (torch.ops.dpo_kernels.backward, torch.ops.dpo_kernels.backward_):
        op(**backward_arguments())
        with pytest.raises((RuntimeError, ValueError), match=f"{name}: expected"):
            op(**backward_arguments(**changes))


def test_an_empty_batch_has_a_loss():
    empty = {"logits": torch.zeros(0, 3, VOCAB), "labels": torch.zeros(0, 3, dtype=torch.int64)}
    *_, loss = ops.dpo_forward_op(**dpo_arguments(**empty, reference_logps=torch.zeros(0)))
    assert loss == 0


def own_batch(**changes) -> TokenBatch:
    return TokenBatch(**batch_arguments(**changes))


def outputs(**changes) -> ForwardOutputs:
    return ForwardOutputs(
        **{
            "tokens": torch.zeros(3, TOKENS),
            "stats": torch.zeros(3, TOKENS),
            "is_top1": torch.zeros(TOKENS, dtype=torch.bool),
            "seqs": torch.zeros(3, SEQS),
            "counts": torch.zeros(SEQS, dtype=torch.int64),
            "losses": torch.zeros(PAIRS),
            "loss": torch.zeros(()),
            "average": False,
        }
        | changes
    )


@pytest.mark.parametrize(
    ("name", "wrong"),
    (
        ("tokens", torch.zeros(3, TOKENS - 1)),
        ("stats", torch.zeros(2, TOKENS)),
        ("is_top1", torch.zeros(TOKENS, dtype=torch.int64)),
        ("seqs", torch.zeros(2, SEQS)),
        ("counts", torch.zeros(SEQS, dtype=torch.int32)),
        ("losses", torch.zeros(PAIRS, 2)[:, 0]),
        ("loss", torch.zeros((), dtype=torch.float64)),
        ("tokens", torch.zeros(3, TOKENS, device="meta")),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_outputs_that_do_not_fit(name, wrong):
    pair = PairLoss(None, 0.1, 0.0, 1.0)
    check_forward(own_batch(), pair, outputs())
    with pytest.raises(RuntimeError, match=f"{name}: expected contiguous"):
        check_forward(own_batch(), pair, outputs(**{name: wrong}))


def test_a_gradient_that_does_not_fit():
    batch, tokens = own_batch(), torch.zeros(3, TOKENS)
    grad_output = GradOutput(torch.ones(1), 0, "token", None)
    half = torch.zeros(SEQS, LENGTH, VOCAB).bfloat16()
    check_backward(batch, tokens, grad_output, half.float(), False)
    check_backward(batch, tokens, grad_output, half, True)
    with pytest.raises(RuntimeError, match="grad_logits: expected"):
        check_backward(batch, tokens, grad_output, half.double(), True)
    for wrong in (half, half.float()[1:], transposed(SEQS, LENGTH, VOCAB), half.float().to("meta")):
        with pytest.raises(RuntimeError, match="grad_logits: expected"):
            check_backward(batch, tokens, grad_output, wrong, False)


# the compiled module by itself

ADDRESS = torch.zeros(1 << 12, dtype=torch.float64).data_ptr()
STRIDED = (ADDRESS, LENGTH * VOCAB, VOCAB)


def native_batch(**changes):
    arguments = {
        "logits": STRIDED,
        "dtype": 0,
        "labels": (ADDRESS, LENGTH, 1),
        "cu_seqlens": 0,
        "shape": (SEQS, LENGTH, VOCAB),
        "scoring": (-100, False),
        "transform": (1.0, 0.0, 1.0),
        "shard": (0, 0),
    }
    return _C.TokenBatch(**arguments | changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    (
        ("logits", {"logits": (0, 24, 8)}),
        ("logits strides", {"logits": (ADDRESS, -24, 8)}),
        ("labels", {"labels": (0, 3, 1)}),
        ("label strides", {"labels": (ADDRESS, 3, -1)}),
        ("dtype", {"dtype": 4}),
        ("dtype", {"dtype": -1}),
        ("num_seqs", {"shape": (-1, LENGTH, VOCAB)}),
        ("seq_len", {"shape": (SEQS, -1, VOCAB)}),
        ("vocab", {"shape": (SEQS, LENGTH, -1)}),
        ("vocab_total", {"shard": (0, -1)}),
        ("vocab_total", {"shard": (0, VOCAB - 1)}),
        ("vocab_start", {"shard": (-1, VOCAB)}),
        ("vocab_start", {"shard": (3, VOCAB + 2)}),
        ("vocab_start", {"shard": (1, 0)}),
        (r"num_seqs \* seq_len", {"shape": (1 << 32, 1 << 32, 1)}),
        (r"tokens \* vocab", {"shape": (1 << 31, 1 << 31, 1 << 31)}),
    ),
)
def test_native_batch_refuses(name, changes):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        native_batch(**changes)


def native_outputs(batch, **changes):
    arguments = {
        "tokens": ADDRESS,
        "stats": (ADDRESS, ADDRESS),
        "seqs": (ADDRESS, ADDRESS),
        "losses": (ADDRESS, ADDRESS),
        "average": False,
    }
    return _C.ForwardOutputs(batch, **arguments | changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    (
        ("logps", {"tokens": 0}),
        ("statistics", {"stats": (0, ADDRESS)}),
        ("statistics", {"stats": (ADDRESS, 0)}),
        ("seq_logps", {"seqs": (0, ADDRESS)}),
        ("seq_logps", {"seqs": (ADDRESS, 0)}),
        ("seq_logps", {"seqs": (0, 0)}),
        ("rewards", {"losses": (0, ADDRESS)}),
        ("loss", {"losses": (ADDRESS, 0)}),
    ),
)
def test_native_forward_refuses(name, changes):
    batch, pair = native_batch(), _C.PairLoss(0, 0.1, 0.0, 1.0)
    with pytest.raises(ValueError, match=f"^{name}.*: expected"):
        _C.cpu_forward(batch, pair, native_outputs(batch, **changes), 1)


def test_a_shard_has_no_sums_over_sequences():
    shard = batch_arguments(vocab_start=1, vocab_total=VOCAB + 1)
    assert torch.ops.dpo_kernels.token_forward(**shard, stats=True, backend="cpu")
    with pytest.raises(RuntimeError, match="logits: expected a whole vocabulary"):
        torch.ops.dpo_kernels.sequence_forward(**shard, average=False, backend="cpu")
    with pytest.raises(RuntimeError, match="logits: expected a whole vocabulary"):
        torch.ops.dpo_kernels.dpo_forward(**dpo_arguments(vocab_total=VOCAB + 1))
    batch = native_batch(shard=(1, VOCAB + 1))
    with pytest.raises(ValueError, match=r"^vocab_total: expected 0"):
        _C.cpu_forward(batch, None, native_outputs(batch, losses=(0, 0)), 1)


@pytest.mark.parametrize(
    ("name", "changes"),
    (
        ("logps", {"tokens": 0}),
        ("grad", {"grad": (0, 0, 1)}),
        ("grad_index", {"grad": (ADDRESS, 3, 1)}),
        ("grad_stride", {"grad": (ADDRESS, 0, -1)}),
        ("grad_logits", {"grad_logits": (0, 24, 8)}),
        ("grad_logits strides", {"grad_logits": (ADDRESS, 24, -8)}),
        ("grad_dtype", {"grad_dtype": 4}),
    ),
)
def test_native_backward_refuses(name, changes):
    arguments = {
        "tokens": ADDRESS,
        "seq_scale": 0,
        "grad": (ADDRESS, 0, 1),
        "grad_logits": STRIDED,
        "grad_dtype": 0,
        "zero_unscored": True,
    }
    batch = native_batch()
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        _C.cpu_backward(batch, _C.Backward(batch, **arguments | changes), 1)


def test_native_functions_refuse_none():
    batch = native_batch()
    for call in (
        lambda: _C.cpu_forward(None, None, native_outputs(batch), 1),
        lambda: _C.cpu_forward(batch, None, None, 1),
        lambda: _C.cpu_backward(batch, None, 1),
        lambda: _C.ForwardOutputs(None, 0, (0, 0), (0, 0), (0, 0), False),
    ):
        with pytest.raises(TypeError):
            call()


# the stubs


def signatures_of_stubs() -> dict[str, list[tuple[str, str]]]:
    tree = ast.parse((Path(native.__file__).parents[1] / "_C.pyi").read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found[node.name] = next(x for x in node.body if isinstance(x, ast.FunctionDef))
    return {
        name: [
            *((a.arg, ast.unparse(a.annotation)) for a in node.args.args if a.arg != "self"),
            ("return", ast.unparse(node.returns)),
        ]
        for name, node in found.items()
    }


def signature_of_docstring(text: str) -> list[tuple[str, str]]:
    """pybind11 writes the signature into the first line; what it says of types is simplified."""
    text = text.splitlines()[0]
    text = re.sub(r"(typing\.)?SupportsInt( \| typing\.SupportsIndex)?", "int", text)
    text = re.sub(r"(typing\.)?SupportsFloat( \| typing\.SupportsIndex)?", "float", text)
    text = text.replace("dpo_kernels._C.", "")
    function = ast.parse(f"def {text}: ...").body[0]
    return [
        *((a.arg, ast.unparse(a.annotation)) for a in function.args.args if a.arg != "self"),
        ("return", ast.unparse(function.returns)),
    ]


def test_stubs_are_those_of_the_module():
    stubs = signatures_of_stubs()
    optional = {"pair": " | None", "name": " | None"}
    real = {}
    for name, value in inspect.getmembers(_C):
        if inspect.isclass(value):
            real[name] = signature_of_docstring(value.__init__.__doc__)
        elif callable(value) and not name.startswith("_"):
            real[name] = signature_of_docstring(value.__doc__)
    if not _C.cuda_archs:
        stubs = {name: value for name, value in stubs.items() if not name.startswith("cuda")}
    # a pointer may be None, which pybind11 does not say
    real = {
        name: [(a, t + optional.get(a, "")) for a, t in signature]
        for name, signature in real.items()
    }
    assert real == stubs
