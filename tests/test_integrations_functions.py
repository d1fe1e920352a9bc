"""Other trainers' functions: signatures as recorded, behaviour re-derived in float64."""

from __future__ import annotations

import importlib
import inspect
import math

import pytest
import torch

from dpo_kernels import reference
from dpo_kernels.integrations import (
    deepspeed_chat,
    llama_factory,
    nemo_rl,
    openrlhf,
    original,
    torchtune,
)

P, T, V = 3, 9, 37

_FOUR = [
    "policy_chosen_logps",
    "policy_rejected_logps",
    "reference_chosen_logps",
    "reference_rejected_logps",
]

# parameter names in order, with the defaults of those that have one: original f8b8c0f,
# LLaMA-Factory 0.9.5, OpenRLHF 0.11.2, torchtune 0.6.1, DeepSpeed-Chat 27a8782, NeMo-RL 7ea279a
SIGNATURES = [
    (
        original.preference_loss,
        [*_FOUR, "beta", "label_smoothing", "ipo", "reference_free"],
        {"label_smoothing": 0.0, "ipo": False, "reference_free": False},
    ),
    (
        original._get_batch_logps,
        ["logits", "labels", "average_log_prob"],
        {"average_log_prob": False},
    ),
    (
        llama_factory.get_batch_logps,
        ["logits", "labels", "label_pad_token_id", "ld_alpha"],
        {"label_pad_token_id": -100, "ld_alpha": None},
    ),
    (
        openrlhf.log_probs_from_logits,
        ["logits", "labels", "temperature"],
        {"temperature": 1.0},
    ),
    (
        openrlhf.DPOLoss,
        ["beta", "label_smoothing", "ipo"],
        {"label_smoothing": 0.0, "ipo": False},
    ),
    (openrlhf.DPOLoss.forward, ["self", *_FOUR], {}),
    (
        torchtune.get_batch_log_probs,
        ["logits", "labels", "label_pad_token_id", "return_average_logprobs"],
        {"label_pad_token_id": -100, "return_average_logprobs": False},
    ),
    (torchtune.DPOLoss, ["beta", "label_smoothing"], {"beta": 0.1, "label_smoothing": 0.0}),
    (torchtune.DPOLoss.forward, ["self", *_FOUR], {}),
    (deepspeed_chat.get_batch_logps, ["logits", "input_ids", "label_mask"], {}),
    (
        nemo_rl.get_next_token_logprobs_from_logits,
        [
            "input_ids",
            "next_token_logits",
            "seq_index",
            "vocab_parallel_rank",
            "vocab_parallel_group",
            "context_parallel_group",
            "sampling_params",
            "chunk_size",
        ],
        dict.fromkeys(
            [
                "seq_index",
                "vocab_parallel_rank",
                "vocab_parallel_group",
                "context_parallel_group",
                "sampling_params",
                "chunk_size",
            ]
        ),
    ),
    (
        nemo_rl.DPOLossFn,
        ["cfg", "use_fused_linear_logprobs"],
        {"use_fused_linear_logprobs": False},
    ),
    (
        nemo_rl.DPOLossFn.__call__,
        ["self", "next_token_logprobs", "data", "global_valid_seqs", "global_valid_toks"],
        {},
    ),
]


@pytest.mark.parametrize(
    ("function", "names", "defaults"), SIGNATURES, ids=lambda x: getattr(x, "__qualname__", "")
)
def test_signature(function, names, defaults):
    parameters = inspect.signature(function).parameters
    assert list(parameters) == names
    given = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    assert given == defaults


@pytest.fixture
def batch():
    """Logits with a gradient, input ids, and labels that score a stretch of each row."""
    rng = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2 * P, T, V, generator=rng)).requires_grad_()
    ids = torch.randint(0, V, (2 * P, T), generator=rng)
    labels = ids.clone()
    for row, (start, end) in enumerate([(2, 9), (4, 6), (1, 8), (3, 5), (4, 9), (5, 6)]):
        labels[row, :start] = -100
        labels[row, end:] = -100
    return logits, ids, labels


def _truth(logits, labels) -> torch.Tensor:
    """Per-token log-probs in float64, a loop over rows: nothing shared with what is tested."""
    out = torch.zeros(labels.shape, dtype=torch.float64)
    for row in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[row, t] != -100:
                z = logits[row, t - 1].detach().double()
                out[row, t] = z[labels[row, t]] - math.log(z.exp().sum())
    return out


def _close(ours, truth):
    torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-5, atol=1e-5)


def test_batch_log_probs(batch):
    logits, ids, labels = batch
    truth = _truth(logits, labels)
    counts = (labels != -100).sum(-1)
    _close(original._get_batch_logps(logits, labels), truth.sum(-1))
    _close(original._get_batch_logps(logits, labels, True), truth.sum(-1) / counts)
    _close(torchtune.get_batch_log_probs(logits, labels), truth.sum(-1))
    averaged = torchtune.get_batch_log_probs(logits, labels, return_average_logprobs=True)
    _close(averaged, truth.sum(-1) / counts)
    other = labels.masked_fill(labels == -100, -1)
    _close(torchtune.get_batch_log_probs(logits, other, -1), truth.sum(-1))
    mask = (labels != -100).int()
    _close(deepspeed_chat.get_batch_logps(logits, ids, mask), truth.sum(-1))
    logps, lengths = llama_factory.get_batch_logps(logits, labels)
    _close(logps, truth.sum(-1))
    assert torch.equal(lengths, counts)


@pytest.mark.parametrize(
    "score",
    [
        lambda z, ids, labels: original._get_batch_logps(z, labels),
        lambda z, ids, labels: torchtune.get_batch_log_probs(z, labels),
        lambda z, ids, labels: llama_factory.get_batch_logps(z, labels)[0],
        lambda z, ids, labels: deepspeed_chat.get_batch_logps(z, ids, (labels != -100).long()),
    ],
    ids=["original", "torchtune", "llama_factory", "deepspeed_chat"],
)
def test_batch_log_probs_have_gradients(batch, score):
    logits, ids, labels = batch
    weights = torch.linspace(-1, 2, 2 * P)
    (ours,) = torch.autograd.grad((score(logits, ids, labels) * weights).sum(), logits)
    double = logits.detach().double().requires_grad_()
    truth = reference.sequence_logps(double, labels)
    (expected,) = torch.autograd.grad((truth * weights).sum(), double)
    _close(ours, expected)


def test_llama_factory_ld_alpha(batch):
    """Tokens beyond the shorter answer's length weigh less, in positions from the first one."""
    logits, _, labels = batch
    # a hole in an answer, as the later turns of a conversation make: positions count, not tokens
    labels[0, 5] = -100
    truth = _truth(logits, labels)
    scored = labels != -100
    expected = []
    for row in range(2 * P):
        partner = (row + P) % (2 * P)
        shared = min(int(scored[row].sum()), int(scored[partner].sum()))
        start = int(scored[row].nonzero()[0])
        expected.append(
            truth[row, : start + shared].sum() + 0.3 * truth[row, start + shared :].sum()
        )
    logps, _ = llama_factory.get_batch_logps(logits, labels, ld_alpha=0.3)
    _close(logps, torch.stack(expected))
    assert not torch.allclose(logps, llama_factory.get_batch_logps(logits, labels)[0])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_openrlhf_log_probs(batch, temperature, dtype, packed):
    logits, ids, _ = batch
    logits = logits.detach().to(dtype)
    if packed:
        logits, ids = logits.flatten(0, 1), ids.flatten()
    before = logits.clone()
    ours = openrlhf.log_probs_from_logits(logits, ids, temperature=temperature)
    assert torch.equal(logits, before)
    assert ours.shape == ids.shape and ours.dtype == torch.float32
    truth = (logits.double() / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    _close(ours, truth)


def _four(dtype=torch.float32):
    rng = torch.Generator().manual_seed(1)
    return [
        (-30 + 8 * torch.randn(5, generator=rng)).to(dtype).requires_grad_(i < 2) for i in range(4)
    ]


def _dpo(four, beta, smoothing):
    gap = ((four[0] - four[1]) - (four[2] - four[3])).detach().double()
    better = -torch.log(1 / (1 + (-beta * gap).exp()))
    worse = -torch.log(1 / (1 + (beta * gap).exp()))
    return (1 - smoothing) * better + smoothing * worse


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_losses(smoothing):
    four = _four()
    truth = _dpo(four, 0.3, smoothing)
    chosen = 0.3 * (four[0] - four[2]).detach()
    rejected = 0.3 * (four[1] - four[3]).detach()
    results = [
        original.preference_loss(*four, 0.3, smoothing),
        torchtune.DPOLoss(0.3, smoothing)(*four),
    ]
    mean, *rewards = openrlhf.DPOLoss(0.3, smoothing)(*four)
    assert mean.shape == ()
    _close(mean, truth.mean())
    results.append((None, *rewards))
    for losses, chosen_rewards, rejected_rewards in results:
        if losses is not None:
            _close(losses, truth)
        _close(chosen_rewards, chosen)
        _close(rejected_rewards, rejected)
        assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
    mean.backward()
    gap = ((four[0] - four[1]) - (four[2] - four[3])).detach().double()
    derivative = 0.3 * (torch.sigmoid(0.3 * gap) - (1 - smoothing)) / 5
    _close(four[0].grad, derivative)
    _close(four[1].grad, -derivative)


def test_ipo_losses():
    four = _four()
    gap = ((four[0] - four[1]) - (four[2] - four[3])).detach().double()
    truth = (gap - 1 / 0.6) ** 2
    _close(original.preference_loss(*four, 0.3, ipo=True)[0], truth)
    _close(openrlhf.DPOLoss(0.3, ipo=True)(*four)[0], truth.mean())


def test_original_reference_free():
    """The loss leaves the reference out; the rewards still take it, as the original's do."""
    four = _four()
    losses, chosen_rewards, _ = original.preference_loss(*four, 0.3, reference_free=True)
    free = [*four[:2], torch.zeros(5), torch.zeros(5)]
    _close(losses, _dpo(free, 0.3, 0.0))
    _close(chosen_rewards, 0.3 * (four[0] - four[2]).detach())


def test_torchtune_component():
    """As torchtune builds a YAML's ``_component_``: by dotted path, the other keys as arguments."""
    config = {"_component_": "dpo_kernels.integrations.torchtune.DPOLoss", "beta": 0.05}
    module, _, name = config.pop("_component_").rpartition(".")
    loss = getattr(importlib.import_module(module), name)(**config)
    losses, *_ = loss(*_four())
    _close(losses, _dpo(_four(), 0.05, 0.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchtune.DPOLoss(beta=-1.0),
        lambda: openrlhf.DPOLoss(0.0),
        lambda: openrlhf.DPOLoss(0.1, label_smoothing=0.1, ipo=True),
        lambda: original.preference_loss(*_four(), 0.1, label_smoothing=0.1, ipo=True),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(ValueError, match=r"beta|label_smoothing"):
        make()


class _Config:
    """As NeMo-RL's pydantic config: attributes."""

    def __init__(self, **fields):
        self.__dict__.update(
            {
                "reference_policy_kl_penalty": 0.2,
                "preference_loss_weight": 1.0,
                "sft_loss_weight": 0.0,
                "preference_average_log_probs": False,
                "sft_average_log_probs": False,
                **fields,
            }
        )


def _nemo_data(ids, labels):
    rng = torch.Generator().manual_seed(2)
    return {
        "input_ids": ids,
        "token_mask": (labels != -100).float(),
        # the second pair is padding of the batch
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]),
        "reference_policy_logprobs": -3 + torch.randn(ids.shape, generator=rng),
    }


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_nemo_rl_loss(batch, average, sft_weight):
    logits, ids, labels = batch
    data = _nemo_data(ids, labels)
    config = _Config(
        sft_loss_weight=sft_weight,
        preference_average_log_probs=average,
        sft_average_log_probs=average,
    )
    logps = nemo_rl.get_next_token_logprobs_from_logits(ids, logits)
    assert logps.shape == (2 * P, T - 1)
    loss, metrics = nemo_rl.DPOLossFn(config)(
        logps, data, torch.tensor(4.0), torch.tensor(data["token_mask"].sum())
    )

    # entry t of the log-probs, and of the reference's, is of token t + 1
    truth = _truth(logits, labels)[:, 1:]
    mask = data["token_mask"][:, 1:].double()
    ratio = ((truth - data["reference_policy_logprobs"][:, :-1]) * mask).sum(-1)
    likelihood = (truth * mask).sum(-1)
    if average:
        ratio, likelihood = ratio / mask.sum(-1), likelihood / mask.sum(-1)
    pair_losses = [-math.log(1 / (1 + math.exp(-0.2 * (ratio[i] - ratio[i + 1])))) for i in (0, 4)]
    preference, sft = sum(pair_losses) / 2, -float(likelihood[0] + likelihood[4]) / 2
    expected = {
        "loss": preference + sft_weight * sft,
        "sft_loss": sft if sft_weight else 0.0,
        "preference_loss": preference,
        "accuracy": sum(float(ratio[i] > ratio[i + 1]) for i in (0, 4)) / 2,
        "rewards_chosen_mean": float(ratio[0] + ratio[4]) / 2,
        "rewards_rejected_mean": float(ratio[1] + ratio[5]) / 2,
        "num_valid_samples": 2.0,
    }
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert all(isinstance(value, float) for value in metrics.values())
    assert float(loss) == pytest.approx(expected["loss"], rel=1e-5)
    (grad,) = torch.autograd.grad(loss, logits)
    # the pair that is padding has no gradient
    assert grad[2:4].abs().max() == 0 and grad[0].abs().max() > 0


def test_nemo_rl_takes_a_dict_and_the_framework_finds_its_kind():
    loss = nemo_rl.DPOLossFn(vars(_Config()), use_fused_linear_logprobs=True)
    assert loss.use_fused_linear_logprobs
    assert "sequence" in str(loss.loss_type).lower() and "logprob" in str(loss.input_type).lower()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"vocab_parallel_group": object()}, "vocab_parallel_group"),
        ({"context_parallel_group": object()}, "context_parallel_group"),
        ({"seq_index": torch.arange(3)}, "seq_index"),
        ({"sampling_params": _Config(top_k=5, top_p=1.0)}, "sampling_params"),
        ({"sampling_params": _Config(top_k=None, top_p=0.9)}, "sampling_params"),
    ],
)
def test_nemo_rl_refuses_what_it_does_not_serve(batch, options, name):
    logits, ids, _ = batch
    with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
        nemo_rl.get_next_token_logprobs_from_logits(ids, logits, **options)
