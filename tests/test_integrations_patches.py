"""Patches of functions that take logits, at their recorded seams; some trainers are stand-ins.

Signatures: NeMo-RL 7ea279a (2026-08-22), verl 0.9.1, torchtune 0.6.1, TRL 1.13 and 1.14.
"""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.distributed as dist

import dpo_kernels
from dpo_kernels import reference
from dpo_kernels.integrations import torchtune, trl_seams, verl
from dpo_kernels.integrations.transformers_loss import DPOLossFunction

P, T, V = 2, 6, 31


@pytest.fixture
def batch():
    """Logits with a gradient, and ids."""
    rng = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(2 * P, T, V, generator=rng)).requires_grad_()
    return logits, torch.randint(0, V, (2 * P, T), generator=rng)


def _close(ours, truth):
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def _package(monkeypatch, *paths: str) -> list[types.ModuleType]:
    made = []
    for path in paths:
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            module = sys.modules.get(name) or types.ModuleType(name)
            module.__path__ = []
            module.__spec__ = types.SimpleNamespace(name=name)
            module.__version__ = "1"
            monkeypatch.setitem(sys.modules, name, module)
        made.append(sys.modules[path])
    return made


@pytest.fixture
def one_rank():
    """The group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_nemo_rl_calls_ours_and_its_own_for_the_rest(monkeypatch, batch, caplog, one_rank):
    logits, ids = batch

    def get_next_token_logprobs_from_logits(
        input_ids,
        next_token_logits,
        seq_index=None,
        vocab_parallel_rank=None,
        vocab_parallel_group=None,
        context_parallel_group=None,
        sampling_params=None,
        chunk_size=None,
    ):
        return "theirs", vocab_parallel_rank, chunk_size

    own = get_next_token_logprobs_from_logits
    own.__module__ = "nemo_rl.distributed.model_utils"
    loss, utils = _package(monkeypatch, "nemo_rl.algorithms.loss.utils", own.__module__)
    loss.get_next_token_logprobs_from_logits = own
    utils.get_next_token_logprobs_from_logits = own
    monkeypatch.setattr("dpo_kernels.integrations.trl._logged", set())
    with dpo_kernels.patch("nemo_rl", verbose=False):
        assert utils.get_next_token_logprobs_from_logits is not own
        # Megatron passes the groups of one rank too
        ours = loss.get_next_token_logprobs_from_logits(
            input_ids=ids,
            next_token_logits=logits,
            vocab_parallel_rank=0,
            vocab_parallel_group=one_rank,
            context_parallel_group=one_rank,
            chunk_size=4,
        )
        with caplog.at_level("WARNING", "dpo_kernels"):
            theirs = loss.get_next_token_logprobs_from_logits(
                ids, logits, torch.arange(3), vocab_parallel_rank=1, chunk_size=4
            )
    _close(ours, reference.token_logps(logits, ids, shift=True)[:, 1:])
    assert theirs == ("theirs", 1, 4)
    assert "seq_index" in caplog.text
    assert loss.get_next_token_logprobs_from_logits is own


@pytest.mark.parametrize("inplace", [True, False])
def test_verl(batch, inplace):
    logits, ids = batch
    flat = (logits * 1.0).view(-1, V)
    before = flat.detach().clone()
    logps = verl.logprobs_from_logits(flat, ids.flatten(), inplace_backward=inplace)
    truth = reference.token_logps(logits, ids).flatten()
    _close(logps, truth)
    (ours,) = torch.autograd.grad(logps.sum(), logits, retain_graph=False)
    (expected,) = torch.autograd.grad(truth.sum(), logits)
    _close(ours, expected)
    # in place, the logits' memory is their gradient's
    assert torch.equal(flat, before) is not inplace


def test_verl_leaves_logits_that_it_was_not_asked_to_overwrite(batch):
    """Callers with [B, T, V] say nothing of it, and compute entropies from the logits later."""
    logits, ids = batch
    made = logits * 1.0
    logps = verl.logprobs_from_logits(made, ids)
    entropy = -(made.softmax(-1) * made.log_softmax(-1)).sum()
    (logps.sum() + entropy).backward()
    assert logits.grad.isfinite().all()


def test_verl_at_its_seam(monkeypatch, batch):
    logits, ids = batch

    def logprobs_from_logits(logits, labels, inplace_backward=True):
        return "theirs"

    functional, actor = _package(monkeypatch, "verl.utils.torch_functional", "verl.workers.actor")
    logprobs_from_logits.__module__ = functional.__name__
    functional.logprobs_from_logits = actor.logprobs_from_logits = logprobs_from_logits
    with dpo_kernels.patch("verl", verbose=False):
        _close(actor.logprobs_from_logits(logits, ids), reference.token_logps(logits, ids))
    assert functional.logprobs_from_logits is actor.logprobs_from_logits is logprobs_from_logits


def test_torchtune_is_patched_by_its_yaml(monkeypatch, batch, capsys):
    """The component patches what the recipe calls, and is the loss."""
    logits, ids = batch

    def get_batch_log_probs(logits, labels, label_pad_token_id=-100, return_average_logprobs=False):
        return "theirs"

    processing, rlhf = _package(monkeypatch, "torchtune.rlhf.sequence_processing", "torchtune.rlhf")
    get_batch_log_probs.__module__ = processing.__name__
    processing.get_batch_log_probs = rlhf.get_batch_log_probs = get_batch_log_probs
    loss = torchtune.patched_dpo_loss(beta=0.2)
    try:
        assert isinstance(loss, torchtune.DPOLoss) and loss.beta == 0.2
        assert "get_batch_log_probs" in capsys.readouterr().err
        _close(rlhf.get_batch_log_probs(logits, ids), reference.sequence_logps(logits, ids))
        # a recipe may build its loss more than once
        torchtune.patched_dpo_loss()
    finally:
        dpo_kernels.patching.active("torchtune").undo()
    assert rlhf.get_batch_log_probs is get_batch_log_probs


# TRL's older heads and its log-softmax


class _TwoResults:
    """As TRL 1.13 and 1.14 have it, from whole logits."""

    calls = 0

    @classmethod
    def apply(cls, hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale):
        cls.calls += 1
        logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
        logits = logits * logit_scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logps = (logits / temperature).log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, targets[:, None])[:, 0], entropy


@pytest.mark.parametrize("with_entropy", [False, True], ids=["logged", "in the loss"])
def test_two_results(with_entropy):
    rng = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=rng, requires_grad=True) for shape in ((7, 5), (V, 5), (V,))
    )
    targets = torch.randint(0, V, (7,), generator=rng)
    call = (hidden, weight, bias, targets, 0.7, 16, 3.0, 0.5)
    assert len(call) == len(trl_seams.TWO_RESULTS)
    _TwoResults.calls = 0
    results, grads = [], []
    for function in (trl_seams.LogProbsAndEntropy(_TwoResults), _TwoResults):
        logps, entropy = function.apply(*call)
        loss = logps.sum() + (entropy.sum() if with_entropy else 0.0)
        grads.append(torch.autograd.grad(loss, (hidden, weight, bias)))
        results.append((logps, entropy))
        if function is not _TwoResults:
            # the gradient of an entropy is TRL's own
            assert _TwoResults.calls == with_entropy
    for ours, theirs in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        _close(ours, theirs)


def test_two_results_leaves_a_strange_call_to_trl():
    seen = []
    original = types.SimpleNamespace(apply=lambda *args, **kwargs: seen.append(args) or (1, 2))
    function = trl_seams.LogProbsAndEntropy(original)
    assert function.apply("hidden", "weight") == (1, 2)
    quantized = torch.zeros(V, 5, dtype=torch.int8)
    labels = torch.zeros(7, dtype=torch.int64)
    call = (torch.zeros(7, 5), quantized, None, labels, 1.0, 8, None, 1.0)
    assert function.apply(*call) == (1, 2)
    assert seen == [("hidden", "weight"), call]


def test_selective_log_softmax(batch):
    logits, ids = batch
    calls = []
    selected = trl_seams.selective_log_softmax(lambda *args: calls.append(args) or "theirs")
    _close(selected(logits, ids), reference.token_logps(logits, ids))
    assert selected(logits.detach().bfloat16(), ids).dtype == torch.float32
    assert not calls
    # several indices a row are TRL's
    several = ids[..., None].repeat(1, 1, 3)
    assert selected(logits, several) == "theirs"
    assert calls == [(logits, several)]


def test_selective_log_softmax_of_1_14(batch):
    logits, ids = batch
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    labels = ids.masked_fill(~mask, -100)
    stats = reference.token_stats(logits, labels, temperature=0.7)
    selected = trl_seams.selective_log_softmax(None)
    _close(selected(logits, ids, temperature=0.7, row_mask=mask), stats.logps)
    both = trl_seams.selective_log_softmax_and_entropy(lambda *args: ("theirs", args))
    logps, entropy = both(logits, ids, False, temperature=0.7, row_mask=mask)
    _close(logps, stats.logps)
    _close(entropy, stats.entropy)
    # the gradient of an entropy is TRL's own
    assert both(logits, ids, temperature=0.7) == ("theirs", (logits, ids, True, 0.7, None))
    with torch.no_grad():
        assert both(logits, ids)[0] != "theirs"


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("0.24.0", {"LigerFusedLinearDPOLoss", "selective_log_softmax"}),
        ("1.12.0", {"LigerFusedLinearDPOLoss", "selective_log_softmax"}),
        ("1.13.0", {"FusedLinearDPOLoss", "_ChunkedLogProbFunction", "selective_log_softmax"}),
        (
            "1.14.2",
            {
                "_ChunkedLogProbFunction",
                "selective_log_softmax",
                "selective_log_softmax_and_entropy",
            },
        ),
        ("1.15.0", {"_ChunkedLogProbFunction", "_use_triton", "DTensor"}),
        ("2.0.0.dev0", {"_ChunkedLogProbFunction", "_use_triton", "DTensor"}),
    ],
)
def test_seams_of_trls_generations(version, names):
    found = {seam.where.partition(":")[2] for seam in trl_seams.seams(version)}
    assert found == {*names, "hash_module"}
    with pytest.raises(ImportError, match=r"needs trl >= 0.24"):
        trl_seams.seams("0.23.1")


def test_loss_function_of_transformers(batch):
    logits, ids = batch
    given = {"reference_chosen_logps": torch.zeros(P), "reference_rejected_logps": torch.ones(P)}
    function = DPOLossFunction(beta=0.3, loss_type="ipo")
    # as a model calls it
    loss = function(logits=logits, labels=ids, vocab_size=V, num_items_in_batch=None, **given)
    truth = reference.dpo_loss(logits, ids, *given.values(), beta=0.3, loss_type="ipo")
    _close(loss, truth.loss)
    assert set(function.output.metrics()) == set(truth.metrics())
