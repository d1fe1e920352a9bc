"""The formulas of dpo_kernels.scaling against counted collectives and measured peaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dpo_kernels as dk
from benchmarks import scaling as tables
from dpo_kernels import scaling
from dpo_kernels.__main__ import main
from dpo_kernels.cli.memory import size
from dpo_kernels.parallel import groups
from dpo_kernels.scaling import Collective, Step
from tests.test_sharded_heads import RANKS, SIZE, VOCAB
from tests.test_sharded_heads import run as run_sharded

ROOT = Path(__file__).parents[1]
MIB = 2**20

# peaks: all of it in a process of its own, after a call of every kind has loaded its libraries
SHAPE = {"pairs": 4, "tokens": 128, "vocab": 32768, "hidden": 512}
PROGRAM = """
import json, sys
import torch
from dpo_kernels import dpo_loss, linear_dpo_loss, reference
from dpo_kernels.cli.measure import peak_extra_bytes

pairs, tokens, vocab, size = json.loads(sys.argv[1]).values()
dtype = getattr(torch, sys.argv[2])

def calls(tokens, vocab):
    labels = torch.randint(vocab, (2 * pairs, tokens))
    given = (labels, *torch.zeros(2, pairs))
    logits = torch.randn(2 * pairs, tokens, vocab).to(dtype).requires_grad_()
    # in place an intermediate result is overwritten
    made = [logits.view_as(logits)]
    def gradient(loss, *inputs):
        return lambda: torch.autograd.grad(loss().loss, inputs)
    yield "naive, logits", gradient(lambda: reference.dpo_loss(logits, *given), logits)
    yield "fresh", gradient(lambda: dpo_loss(logits, *given), logits)
    yield "in place", gradient(lambda: dpo_loss(made[0], *given, inplace_backward=True), made[0])
    del logits
    made.clear()
    hidden = torch.randn(2 * pairs, tokens, size).to(dtype).requires_grad_()
    for trainable in (False, True):
        weight = (0.05 * torch.randn(vocab, size)).to(dtype).requires_grad_(trainable)
        inputs = (hidden, weight) if trainable else (hidden,)
        name = "trainable" if trainable else "frozen"
        naive = lambda: reference.dpo_loss(hidden @ weight.t(), *given)
        if not trainable:
            yield "naive, hidden", gradient(naive, *inputs)
        yield name, gradient(lambda: linear_dpo_loss(hidden, weight, *given), *inputs)

for _, call in calls(8, 512):
    call()
print(json.dumps({name: peak_extra_bytes(call, "cpu") for name, call in calls(tokens, vocab)}))
"""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def peaks(request):
    """(the step, measured peaks)."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(SHAPE), request.param]
    # as in test_linear_memory.py
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    if None in measured.values():
        pytest.skip("this kernel lets no process reset its peak")
    return Step(**SHAPE, dtype=getattr(torch, request.param)), measured


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peaks_are_as_modelled(peaks):
    step, measured = peaks
    modelled = {
        "naive, logits": step.naive_from_logits(),
        "fresh": step.from_logits(),
        "in place": step.from_logits(inplace=True),
        "naive, hidden": step.naive_from_hidden(),
        "frozen": step.from_hidden(False),
        "trainable": step.from_hidden(True),
    }
    assert modelled.keys() == measured.keys()
    for name, bytes_ in modelled.items():
        # what libraries, threads and allocators keep of their own, as in test_linear_memory.py
        assert abs(measured[name] - bytes_) < 0.1 * bytes_ + 64 * MIB, name


def counted(call) -> list[Collective]:
    """The collectives over groups that ``call`` makes, with what they carry."""
    made: list[Collective] = []
    gather, add = groups.all_gather_into, groups.dist.all_reduce

    def counting_gather(out, local, group):
        made.append(Collective("all_gather", out.nbytes))
        return gather(out, local, group)

    def counting_add(local, group):
        made.append(Collective("all_reduce", local.nbytes))
        return add(local, group=group)

    groups.all_gather_into, groups.dist.all_reduce = counting_gather, counting_add
    try:
        call()
    finally:
        groups.all_gather_into, groups.dist.all_reduce = gather, add
    return made


PAIRS, TOKENS, PROMPT, HIDDEN, COLUMNS = 3, 16, 5, 32, 512
# MiB: room for one pair's tokens, not for two
WORKSPACE = 0.25


def traffic_cases(rank: int) -> dict:
    group = dist.group.WORLD
    torch.manual_seed(0)
    labels = torch.randint(RANKS * COLUMNS, (2 * PAIRS, TOKENS))
    labels[:, :PROMPT] = -100
    logits = torch.randn(2 * PAIRS, TOKENS, COLUMNS, requires_grad=True)
    hidden = torch.randn(2 * PAIRS, TOKENS, HIDDEN, requires_grad=True)
    weight = torch.randn(COLUMNS, HIDDEN)
    given = torch.zeros(2, PAIRS)

    def train(loss):
        return lambda: loss().loss.backward()

    options = {"vocab_group": group, "workspace_mb": WORKSPACE}
    made = {
        "vocabulary, logits": train(lambda: dk.dpo_loss(logits, labels, *given, vocab_group=group)),
        "sequence, logits": train(
            lambda: dk.dpo_loss(logits, labels % COLUMNS, *given, shift=False, sequence_group=group)
        ),
    }
    for name in ("frozen", "trainable"):
        own = weight.clone().requires_grad_(name == "trainable")
        made[f"vocabulary, {name}"] = train(
            lambda own=own: dk.linear_dpo_loss(hidden, own, labels, *given, **options)
        )
    return {name: counted(call) for name, call in made.items()}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = traffic_cases(rank)
    for mode in ("frozen", "trainable"):
        results[f"sharded, {mode}"] = run_sharded(f"loss {mode} all shard", rank)["bytes"]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def traffic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(rank_main, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def test_collectives_are_as_modelled(traffic):
    """Number, kind and bytes; nothing in a backward, which the counted calls have made too."""
    answers = TOKENS - PROMPT
    shape = (PAIRS, TOKENS, RANKS * COLUMNS, HIDDEN, torch.float32, answers / TOKENS, RANKS)
    step = Step(*shape, workspace_mb=WORKSPACE)
    expected = {
        "vocabulary, logits": scaling.vocab_group_from_logits(step.rows, RANKS),
        "sequence, logits": scaling.sequence_group(PAIRS, RANKS),
    }
    for name, trainable in (("frozen", False), ("trainable", True)):
        from_hidden = (step.scored_rows, HIDDEN, RANKS, step.tiles(trainable))
        expected[f"vocabulary, {name}"] = scaling.vocab_group_from_hidden(*from_hidden)
    assert 1 < step.tiles(False) < step.tiles(True)
    for rank in traffic:
        assert {name: rank[name] for name in expected} == expected


@pytest.mark.parametrize("trainable", [False, True])
def test_a_sharded_heads_collectives_are_as_modelled(traffic, trainable):
    """Of a weight and of a bias, which is a head of hidden size 1."""
    modelled = [
        c
        for size in (SIZE, 1)
        for c in scaling.sharded_head(VOCAB, size, RANKS, torch.float32, trainable)
    ]
    for rank in traffic:
        assert rank[f"sharded, {'trainable' if trainable else 'frozen'}"] == sum(
            c.bytes for c in modelled
        )


def test_the_calculator_prints_the_formulas(capsys):
    shape = {"pairs": 4, "tokens": 1000, "vocab": 32000, "hidden": 64, "scored": 0.5}
    options = {**shape, "tp": 2, "cp": 2, "dtype": "float32"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["memory", *arguments]) == 0
    printed = capsys.readouterr().out
    step = Step(4, 1000, 32000, 64, torch.float32, 0.5, 2, 2)
    for figure in (step.naive_from_logits(), step.from_logits(), step.from_hidden(True)):
        assert size(figure) in printed
    assert "4, 0.02 TFLOP" in printed and "modelled" in printed
    assert size(scaling.sequence_group(4, 2)[0].sent(2)) in printed


@pytest.mark.parametrize("wrong", ["--tp 0", "--scored 0", "--scored 1.5", "--dtype int8"])
def test_the_calculator_refuses(wrong, capsys):
    with pytest.raises(SystemExit):
        main(["memory", *wrong.split()])
    assert wrong.split()[0] in capsys.readouterr().err


def test_the_tables_of_the_docs_are_the_formulas():
    assert tables.main(["--check"]) == 0
