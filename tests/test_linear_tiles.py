"""How many rows a tile of logits has, and which pairs meet in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dpo_kernels as dk
from dpo_kernels.linear import gemm, workspace
from dpo_kernels.linear.plan import make_plan
from dpo_kernels.linear.workspace import Head, HeadOptions, TileSize, Workspace, tile_size
from dpo_kernels.sequences import SequenceLayout
from dpo_kernels.types import RowOptions
from tests.linear_helpers import GemmLog, make_head, with_gradients

ROWS = RowOptions(-100, False, 1.0, 0.0, 1.0)
LLAMA, SMOLLM = (128256, 4096), (49152, 576)
GIB = 1 << 30


def options_of(
    dtype: torch.dtype = torch.bfloat16, workspace_bytes: int = 0, **rest
) -> HeadOptions:
    return HeadOptions(ROWS, dtype, "exact", workspace_bytes, "", **rest)


def size_on_gpu(
    monkeypatch, shape, memory: int, options: HeadOptions, trainable: bool = True
) -> TileSize:
    """Without a GPU: all that is asked of the weight is its shape and device."""
    device = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    monkeypatch.setattr(gemm, "_capability", lambda _: (9, 0))
    weight: Any = SimpleNamespace(shape=shape, device=torch.device("cuda"))
    return tile_size(weight, options, trainable)


@pytest.mark.parametrize(
    "memory, trainable, rows, most",
    # of a bfloat16 head: float32 logits and their gradient in bfloat16
    [
        (140 * GIB, True, 4096, 12200),
        (80 * GIB, True, 4096, 6970),
        (24 * GIB, True, 2090, 2090),
        (80 * GIB, False, 1024, 1024),
        (8 * GIB, False, 697, 697),
    ],
)
def test_a_default_tile_on_a_gpu(monkeypatch, memory, trainable, rows, most):
    """Enough rows for the GEMMs, more for a pair that has more, and a sixteenth of the memory."""
    size = size_on_gpu(monkeypatch, LLAMA, memory, options_of(), trainable)
    assert size.rows == pytest.approx(rows, rel=0.01)
    assert size.most_rows == pytest.approx(most, rel=0.01)
    assert size.most_rows * 6 * LLAMA[0] <= memory // 16


def test_a_workspace_that_was_asked_for_is_all_used(monkeypatch):
    size = size_on_gpu(monkeypatch, SMOLLM, 80 * GIB, options_of(workspace_bytes=6 * GIB))
    assert size.rows == size.most_rows == pytest.approx(6 * GIB / (6 * SMOLLM[0]), rel=0.01)


def test_the_environment_sets_what_no_call_names(monkeypatch):
    name = "DPO_KERNELS_WORKSPACE_MB"
    problem = make_head(bias=False)

    def tiles(**options) -> int:
        with monkeypatch.context() as patched:
            log = GemmLog(patched)
            with_gradients(dk.linear_dpo_loss, problem, *problem.reference_logps, **options)
            return sum(name == "add_weight_gradient" for name, _ in log.calls)

    assert tiles() == 1
    monkeypatch.setenv(name, "0.005")
    assert tiles() > 1
    assert tiles(workspace_mb=64) == 1
    for wrong in ("much", "-1", "nan", "1e15"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(ValueError, match=name):
            tiles()


def test_ranks_agree_on_both_sizes(monkeypatch):
    agreed = options_of(tile_rows=512, most_rows=700)
    assert size_on_gpu(monkeypatch, SMOLLM, 80 * GIB, agreed)[:2] == (512, 700)


def plan_of(lengths: list[int], rows: int, most_rows: int, promised: int | None = None):
    """Of packed sequences that score all of their tokens: the chosen answers, then the others."""
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    layout = SequenceLayout(torch.zeros(sum(lengths), dtype=torch.int64), bounds, -100, False)
    return make_plan(layout, promised, rows, most_rows, True)


def sizes(plan) -> list[int]:
    return [group.rows.stop - group.rows.start for group in plan.groups]


@pytest.mark.parametrize(
    "lengths, rows, most_rows, tile_rows, groups",
    [
        # all fit
        ([3, 3, 3, 3, 3, 3], 20, 20, 20, [18]),
        # eight equal pairs, of which five would fit: four and four take less memory
        ([5] * 16, 59, 100, 59, [40, 40]),
        # the largest pair has a tile of its size, and the others may fill it
        ([2, 30, 2, 2, 30, 2], 10, 100, 60, [4, 60, 4]),
        ([2, 30, 2, 2, 30, 2], 10, 40, 40, [4, 60, 4]),
        # evening out makes one more here: it is left alone
        ([4, 4, 1, 4, 4, 1], 10, 10, 10, [8, 10]),
        # pairs that score nothing
        ([0, 0, 0, 0], 10, 10, 10, []),
    ],
)
def test_pairs_of_a_tile(lengths, rows, most_rows, tile_rows, groups):
    plan = plan_of(lengths, rows, most_rows)
    assert (plan.tile_rows, sizes(plan)) == (tile_rows, groups)


def test_no_group_outgrows_a_tile_but_a_pair():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        pairs = int(torch.randint(1, 9, (), generator=generator))
        lengths = torch.randint(0, 30, (2 * pairs,), generator=generator).tolist()
        rows = int(torch.randint(1, 60, (), generator=generator))
        most = rows + int(torch.randint(0, 30, (), generator=generator))
        plan = plan_of(lengths, rows, most)
        assert sum(sizes(plan)) == sum(lengths)
        assert min(rows, most) <= plan.tile_rows <= most
        for group, size in zip(plan.groups, sizes(plan), strict=True):
            scoring = [
                p for p in range(*group.pairs.indices(pairs)) if lengths[p] + lengths[pairs + p]
            ]
            assert size <= plan.tile_rows or len(scoring) == 1


def test_a_tile_is_as_large_as_what_it_holds():
    problem = make_head(pairs=5, length=8, scored=1.0)
    layout = SequenceLayout(problem.labels, problem.cu_seqlens, -100, True)
    options = options_of(torch.float32, tile_rows=40)
    space = Workspace(Head.of(problem.weight, None, options), layout, options, True, True)
    # 14 rows a pair
    assert (space.count, sizes(space.plan)) == (70, [28, 28, 14])
    tile = space.fill(problem.hidden.detach().flatten(0, 1), space.plan.groups[0].rows)
    # where pairs are torn apart, as for log-probs, there are two tiles
    assert tile.batch.logits.untyped_storage().nbytes() == 35 * 72 * 4
    space.release()
    assert space._logits is None


@pytest.mark.parametrize("most_rows, gemms", [(8, 4), (22, 3)])
def test_a_long_pair_takes_three_gemms_where_a_tile_may_grow(monkeypatch, most_rows, gemms):
    problem = make_head(pairs=2, length=12, scored=1.0, bias=False)
    size = TileSize(8, most_rows, 16)
    monkeypatch.setattr(workspace, "tile_size", lambda *_: size)
    log = GemmLog(monkeypatch)
    with_gradients(dk.linear_dpo_loss, problem, *problem.reference_logps)
    assert sum(log.rows().values()) == gemms * 2 * 2 * 11
