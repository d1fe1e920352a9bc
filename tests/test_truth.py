"""The derivation of DPO, end to end, on a problem small enough to enumerate every answer.

max_pi E[r(x, y)] - beta KL(pi || pi_ref) is solved in closed form, and minimising the loss of this
package over the preferences that r induces must arrive at the same policy.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import dpo_kernels

# two tokens an answer: with one, a normaliser over part of the vocabulary is a constant of the
# prompt, which cancels between two answers and would pass unnoticed
PROMPTS, VOCAB, LENGTH, BETA = 2, 3, 2, 0.5
ANSWERS = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
# a policy is a table of logits: one row at the start, one after each possible first token
ROWS = torch.stack((torch.zeros(len(ANSWERS), dtype=torch.int64), 1 + ANSWERS[:, 0]), dim=1)


def answer_logits(table: torch.Tensor) -> torch.Tensor:
    """[PROMPTS, 1 + VOCAB, VOCAB] to [PROMPTS, answers, LENGTH, VOCAB]."""
    return table[:, ROWS]


def answer_logps(table: torch.Tensor, normaliser: int = VOCAB) -> torch.Tensor:
    """log pi(y|x) of every answer, [PROMPTS, answers]; Z sums over ``normaliser`` tokens."""
    logits = answer_logits(table)
    picked = logits.gather(-1, ANSWERS.expand(PROMPTS, -1, -1).unsqueeze(-1)).squeeze(-1)
    return (picked - logits[..., :normaliser].logsumexp(-1)).sum(-1)


class Truth:
    """A random reference policy and reward, and the solution in closed form."""

    def __init__(self, seed: int = 0):
        rng = torch.Generator().manual_seed(seed)
        self.table = torch.randn(PROMPTS, 1 + VOCAB, VOCAB, generator=rng, dtype=torch.float64)
        self.rewards = torch.randn(PROMPTS, len(ANSWERS), generator=rng, dtype=torch.float64)
        self.ref = answer_logps(self.table)
        self.log_z = (self.ref + self.rewards / BETA).logsumexp(-1, keepdim=True)
        self.optimum = self.ref + self.rewards / BETA - self.log_z
        chosen, rejected = zip(*itertools.permutations(range(len(ANSWERS)), 2), strict=True)
        self.compare(torch.tensor(chosen), torch.tensor(rejected))

    def compare(self, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
        """Sets the ordered pairs of answers and p(chosen > rejected)."""
        self.chosen, self.rejected = chosen, rejected
        gaps = self.rewards[:, self.chosen] - self.rewards[:, self.rejected]
        # Bradley-Terry, for every prompt and ordered pair of answers
        self.preferences = gaps.sigmoid()

    def objective(self, logps: torch.Tensor) -> torch.Tensor:
        kl = (logps.exp() * (logps - self.ref)).sum(-1)
        return (logps.exp() * self.rewards).sum(-1) - BETA * kl

    def optimal_table(self) -> torch.Tensor:
        """A table of logits whose policy is the optimum."""
        joint = self.optimum.view(PROMPTS, VOCAB, VOCAB)
        return torch.cat((joint.logsumexp(-1).unsqueeze(1), joint), dim=1)


def fused_loss(truth: Truth, table: torch.Tensor, backend: str, **options) -> torch.Tensor:
    """The expected DPO loss of a table of logits, from the kernels."""
    logits = answer_logits(table)
    batch = torch.cat((logits[:, truth.chosen], logits[:, truth.rejected]), dim=1)
    total = table.new_zeros(())
    for prompt in range(PROMPTS):
        out = dpo_kernels.dpo_loss(
            batch[prompt],
            torch.cat((ANSWERS[truth.chosen], ANSWERS[truth.rejected])).to(table.device),
            truth.ref[prompt, truth.chosen].to(table),
            truth.ref[prompt, truth.rejected].to(table),
            beta=BETA,
            shift=False,
            reduction="none",
            backend=backend,
            **options,
        )
        total = total + (truth.preferences[prompt].to(table) * out.loss).sum()
    return total / truth.preferences.sum()


def reversed_ratio(truth: Truth, table: torch.Tensor, backend: str) -> torch.Tensor:
    """The sign that circulates: pi_ref / pi."""

    def loss(chosen, rejected):
        return -F.logsigmoid(BETA * (rejected - chosen))

    return fused_loss(truth, table, backend, loss_type=loss)


def partial_normaliser(truth: Truth, table: torch.Tensor, backend: str) -> torch.Tensor:
    """Z over all tokens but one, as of a kernel that loses the tail of the vocabulary."""
    ratios = answer_logps(table, normaliser=VOCAB - 1) - truth.ref
    gaps = BETA * (ratios[:, truth.chosen] - ratios[:, truth.rejected])
    return -(truth.preferences * F.logsigmoid(gaps)).sum() / truth.preferences.sum()


def minimise(truth: Truth, loss, backend: str) -> torch.Tensor:
    """log pi of the policy that gradient descent (L-BFGS) reaches from the reference."""
    table = truth.table.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(truth, table, backend)
        value.backward()
        return value

    optimizer.step(closure)
    return answer_logps(table.detach())


def assert_recovers_the_optimum(truth: Truth, loss, backend: str) -> None:
    found = minimise(truth, loss, backend)
    assert (found.exp() - truth.optimum.exp()).abs().max() < 1e-5
    rewards = BETA * (found - truth.ref) + BETA * truth.log_z
    assert (rewards - truth.rewards).abs().max() < 1e-4


def test_closed_form():
    truth = Truth()
    assert truth.ref.exp().sum(-1).tolist() == pytest.approx([1.0] * PROMPTS)
    assert truth.optimum.exp().sum(-1).tolist() == pytest.approx([1.0] * PROMPTS)
    # Z(x) again, as a sum over every answer
    z = (truth.ref.exp() * (truth.rewards / BETA).exp()).sum(-1)
    assert z.log().tolist() == pytest.approx(truth.log_z.squeeze(-1).tolist())
    # the optimum's value is beta log Z; any other policy falls short by beta KL(pi || pi*)
    best = truth.objective(truth.optimum)
    assert best.tolist() == pytest.approx((BETA * truth.log_z.squeeze(-1)).tolist())
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        other = torch.randn(truth.table.shape, generator=rng, dtype=torch.float64)
        other = answer_logps(truth.optimal_table() + 0.3 * other)
        kl = (other.exp() * (other - truth.optimum)).sum(-1)
        assert (truth.objective(other) < best).all()
        assert (best - truth.objective(other)).tolist() == pytest.approx((BETA * kl).tolist())


def test_reward_recovered_up_to_log_z():
    truth = Truth()
    recovered = BETA * (answer_logps(truth.optimal_table()) - truth.ref)
    offsets = truth.rewards - recovered
    assert offsets.flatten().tolist() == pytest.approx(
        (BETA * truth.log_z).expand_as(offsets).flatten().tolist()
    )
    # Z cancels in p(w > l) = sigmoid(r(w) - r(l)), and only there
    gaps = recovered[:, truth.chosen] - recovered[:, truth.rejected]
    assert torch.allclose(gaps.sigmoid(), truth.preferences, rtol=1e-12)
    assert offsets.abs().max() > 0.1


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("backend", ("cpu", "torch"))
def test_loss_recovers_the_optimum(backend, seed):
    assert_recovers_the_optimum(Truth(seed), fused_loss, backend)


@pytest.mark.parametrize("mutant", (reversed_ratio, partial_normaliser))
@pytest.mark.parametrize("backend", ("cpu", "torch"))
def test_mutants_do_not(backend, mutant):
    """The test above can fail: it does for the wrong sign and for a Z over part of the tokens."""
    with pytest.raises(AssertionError):
        assert_recovers_the_optimum(Truth(), mutant, backend)


def test_partial_sum_over_answers_is_no_z():
    """Closed form with a Z that leaves answers out: no distribution, and no such optimum."""
    truth = Truth()
    partial = (truth.ref + truth.rewards / BETA)[:, :-2].logsumexp(-1, keepdim=True)
    truth.optimum = truth.ref + truth.rewards / BETA - partial
    assert truth.optimum.exp().sum(-1).min() > 1.01
    with pytest.raises(AssertionError):
        assert_recovers_the_optimum(truth, fused_loss, "torch")


def test_optimum_is_stationary(target):
    """On every backend, float32: the gradient vanishes at the optimum and not at the reference."""
    truth = Truth()
    # it does for any two answers and both outcomes; these three begin with each of the tokens
    first, second = torch.tensor([0, 4]), torch.tensor([4, 8])
    truth.compare(torch.cat((first, second)), torch.cat((second, first)))

    def gradient(table):
        table = table.to(target.device, torch.float32).requires_grad_()
        return torch.autograd.grad(fused_loss(truth, table, target.backend), table)[0].abs().max()

    # 8 terms of at most 1 / 4, each with a few roundings of log-ratios up to 4
    assert gradient(truth.optimal_table()) < 32 * torch.finfo(torch.float32).eps
    assert gradient(truth.table) > 1e-2
