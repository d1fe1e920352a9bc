"""The CUDA kernels on CPU tensors: builds tests/simt and calls it through ctypes."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from ctypes import Structure, byref, c_bool, c_double, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
GRAD_INDEX = {"token": 0, "sequence": 1, "pair": 2}
ORDERS = {"forward": 0, "reversed": 1, "shuffled": 2}


def _fields(**types):
    return list(types.items())


class LogitTransform(Structure):
    _fields_ = _fields(scale=c_double, softcap=c_double, inv_temperature=c_double)


class TokenBatch(Structure):
    _fields_ = _fields(
        logits=c_void_p,
        dtype=c_int32,
        vocab=c_int64,
        seq_stride=c_int64,
        row_stride=c_int64,
        labels=c_void_p,
        label_seq_stride=c_int64,
        label_row_stride=c_int64,
        cu_seqlens=c_void_p,
        num_seqs=c_int64,
        seq_len=c_int64,
        ignore_index=c_int64,
        shift=c_bool,
        transform=LogitTransform,
        vocab_start=c_int64,
        vocab_total=c_int64,
    )


class PairLoss(Structure):
    _fields_ = _fields(
        reference_logps=c_void_p, beta=c_double, label_smoothing=c_double, weight=c_double
    )


OUTPUTS = (
    "logps",
    "row_max",
    "log_sum",
    "entropy",
    "mean_logits",
    "log_sum_sq_probs",
    "is_top1",
    "seq_logps",
    "seq_scale",
    "seq_counts",
    "rewards",
    "losses",
    "loss",
)


class ForwardOutputs(Structure):
    _fields_ = _fields(**dict.fromkeys(OUTPUTS, c_void_p), average=c_bool)


class Backward(Structure):
    _fields_ = _fields(
        logps=c_void_p,
        row_max=c_void_p,
        log_sum=c_void_p,
        seq_scale=c_void_p,
        grad=c_void_p,
        grad_index=c_int32,
        grad_stride=c_int64,
        grad_logits=c_void_p,
        grad_dtype=c_int32,
        grad_seq_stride=c_int64,
        grad_row_stride=c_int64,
        zero_unscored=c_bool,
    )


class Launch(Structure):
    _fields_ = _fields(
        blocks=c_int32,
        threads=c_int32,
        order=c_int32,
        seed=c_uint32,
        concurrent_blocks=c_int32,
    )


@dataclass
class Case:
    """One batch as the launchers see it; ``z`` are the logits after scale, softcap, temperature."""

    logits: Tensor  # [S, T, V], or [N, V] with cu_seqlens
    labels: Tensor
    cu_seqlens: Tensor | None = None
    shift: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0
    average: bool = False
    stats: bool = False
    pair: dict | None = None  # beta, label_smoothing, weight, reference
    shard: tuple[int, int] = (0, 0)  # vocab_start, vocab_total
    grid: dict = field(default_factory=dict)  # blocks, threads, order, seed, concurrent_blocks

    @property
    def num_seqs(self) -> int:
        return self.logits.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def tokens(self) -> int:
        return self.labels.numel()

    def launch(self) -> Launch:
        grid = {"blocks": 3, "threads": 64, "order": "forward", "seed": 0, "concurrent_blocks": 1}
        grid |= self.grid
        return Launch(**{**grid, "order": ORDERS[grid["order"]]})

    def batch(self) -> TokenBatch:
        packed = self.cu_seqlens is not None
        x, y = self.logits, self.labels
        return TokenBatch(
            logits=x.data_ptr(),
            dtype=DTYPES[x.dtype],
            vocab=x.shape[-1],
            seq_stride=0 if packed else x.stride(0),
            row_stride=x.stride(-2),
            labels=y.data_ptr(),
            label_seq_stride=0 if packed else y.stride(0),
            label_row_stride=y.stride(-1),
            cu_seqlens=self.cu_seqlens.data_ptr() if packed else None,
            num_seqs=self.num_seqs,
            seq_len=x.shape[-2],
            ignore_index=-100,
            shift=self.shift,
            transform=LogitTransform(self.scale, self.softcap, 1 / self.temperature),
            vocab_start=self.shard[0],
            vocab_total=self.shard[1],
        )


class Host:
    """The shared library of the shim."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.simt_last_error.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments):
        if getattr(self.library, name)(*arguments) != 0:
            raise RuntimeError(self.library.simt_last_error().decode())

    def workspace(self, case: Case) -> Tensor:
        """Poisoned: a launch relies on nothing that it did not write itself."""
        size = c_int64()
        batch = case.batch()
        self._call("simt_workspace_bytes", byref(batch), byref(size))
        return torch.full((size.value,), 0xFF, dtype=torch.uint8)

    def forward(self, case: Case, workspace: Tensor | None = None) -> dict[str, Tensor]:
        """Every output, poisoned before the launch."""
        n, s = case.tokens, case.num_seqs
        shapes = dict.fromkeys(OUTPUTS[:3], (n,))
        if case.stats:
            shapes |= dict.fromkeys(OUTPUTS[3:7], (n,))
        if not case.shard[1]:
            shapes |= dict.fromkeys(OUTPUTS[7:10], (s,))
        if case.pair is not None:
            shapes |= {"rewards": (s,), "losses": (s // 2,), "loss": ()}
        out = {name: torch.full(shape, math.nan) for name, shape in shapes.items()}
        if "seq_counts" in out:
            out["seq_counts"] = torch.full((s,), -1, dtype=torch.int64)
        if case.stats:
            out["is_top1"] = torch.full((n,), 77, dtype=torch.uint8)
        pair = None
        if case.pair is not None:
            reference = case.pair.get("reference")
            pair = PairLoss(
                reference_logps=None if reference is None else reference.data_ptr(),
                beta=case.pair["beta"],
                label_smoothing=case.pair.get("label_smoothing", 0.0),
                weight=case.pair.get("weight", 1.0),
            )
        pointers = {name: tensor.data_ptr() for name, tensor in out.items()}
        outputs = ForwardOutputs(**pointers, average=case.average)
        workspace = self.workspace(case) if workspace is None else workspace
        launch, batch = case.launch(), case.batch()
        self._call(
            "simt_forward",
            byref(batch),
            None if pair is None else byref(pair),
            byref(outputs),
            c_void_p(workspace.data_ptr()),
            byref(launch),
        )
        return out

    def backward(
        self,
        case: Case,
        out: dict[str, Tensor],
        grad: Tensor,
        index: str,
        grad_logits: Tensor,
        *,
        scale: Tensor | None,
        zero_unscored: bool = True,
    ) -> Tensor:
        packed = case.cu_seqlens is not None
        batch, launch = case.batch(), case.launch()
        backward = Backward(
            logps=out["logps"].data_ptr(),
            row_max=out["row_max"].data_ptr(),
            log_sum=out["log_sum"].data_ptr(),
            seq_scale=None if scale is None else scale.data_ptr(),
            grad=grad.data_ptr(),
            grad_index=GRAD_INDEX[index],
            grad_stride=0 if grad.numel() == 1 else grad.stride(0),
            grad_logits=grad_logits.data_ptr(),
            grad_dtype=DTYPES[grad_logits.dtype],
            grad_seq_stride=0 if packed else grad_logits.stride(0),
            grad_row_stride=grad_logits.stride(-2),
            zero_unscored=zero_unscored,
        )
        self._call("simt_backward", byref(batch), byref(backward), byref(launch))
        return grad_logits


def compile_host(output: Path, sources: tuple[str, ...], *flags: str) -> Path:
    """Builds files of tests/simt with the C++ compiler, or skips the test where there is none."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    command += ["-I", str(HERE / "include"), *flags, *(str(HERE / name) for name in sources)]
    built = subprocess.run([*command, "-lpthread", "-o", str(output)], capture_output=True)
    assert built.returncode == 0, built.stderr.decode()[-4000:]
    return output


__all__ = ["Case", "Host", "compile_host"]
