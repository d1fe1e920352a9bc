"""The compiled module (csrc/bindings.cpp). Addresses are integers, 0 where there is no tensor.

The structs hold addresses, not tensors: whoever makes them keeps the tensors alive. What cannot be
right raises ValueError with the field's name.
"""

# the architectures compiled in, as "80;90"; "" without the CUDA kernels
cuda_archs: str

class TokenBatch:
    def __init__(
        self,
        logits: tuple[int, int, int],
        dtype: int,
        labels: tuple[int, int, int],
        cu_seqlens: int,
        shape: tuple[int, int, int],
        scoring: tuple[int, bool],
        transform: tuple[float, float, float],
        shard: tuple[int, int],
    ) -> None:
        """logits, labels: (address, sequence stride, row stride). dtype: 0 float32, 1 bfloat16,
        2 float16, 3 float64. shape: (num_seqs, seq_len, vocab). scoring: (ignore_index, shift).
        transform: (scale, softcap, 1 / temperature). shard: (vocab_start, vocab_total).
        """

class PairLoss:
    def __init__(
        self, reference_logps: int, beta: float, label_smoothing: float, weight: float
    ) -> None: ...

class ForwardOutputs:
    def __init__(
        self,
        batch: TokenBatch,
        tokens: int,
        stats: tuple[int, int],
        seqs: tuple[int, int],
        losses: tuple[int, int],
        average: bool,
    ) -> None:
        """stats: (stacked statistics, is_top1). seqs: (stacked sums, counts). losses: (of the
        pairs, of the batch). What is stacked is described in backends/batch.py.
        """

class Backward:
    def __init__(
        self,
        batch: TokenBatch,
        tokens: int,
        seq_scale: int,
        grad: tuple[int, int, int],
        grad_logits: tuple[int, int, int],
        grad_dtype: int,
        zero_unscored: bool,
    ) -> None:
        """grad: (address, index, stride), index 0 a token, 1 a sequence, 2 a pair. grad_logits:
        (address, sequence stride, row stride).
        """

# forward and backward return the number of a token whose label is outside [0, vocab), or -1
def cpu_forward(
    batch: TokenBatch, pair: PairLoss | None, out: ForwardOutputs, threads: int
) -> int: ...
def cpu_backward(batch: TokenBatch, bwd: Backward, threads: int) -> int: ...
def cpu_isa() -> str: ...
def cpu_set_isa(name: str | None) -> bool: ...
def cpu_share_openmp(gomp_parallel: int) -> None: ...

# only where cuda_archs is not empty
def cuda_device_problem(device: int) -> str: ...
def cuda_workspace_bytes(batch: TokenBatch) -> int: ...
def cuda_forward(
    batch: TokenBatch,
    pair: PairLoss | None,
    out: ForwardOutputs,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_backward(batch: TokenBatch, bwd: Backward, device: int, stream: int) -> None: ...
