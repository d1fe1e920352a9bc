"""Batches for the CUDA kernels on the host, and what float64 says of them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .host import Case, Host

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def make_case(
    dtype=torch.float32,
    vocab=1000,
    seqs=4,
    length=5,
    *,
    packed=False,
    offset=0,
    padding=0,
    masked=0.4,
    seed=0,
    **options,
) -> Case:
    """Logits at any offset from a 16-byte boundary, rows ``padding`` elements apart."""
    torch.manual_seed(seed)
    rows = seqs * length
    memory = torch.full((rows * (vocab + padding) + offset + 8,), float("nan")).to(dtype)
    start = offset + (-memory.data_ptr() % 16) // memory.element_size()
    logits = memory[start:][: rows * (vocab + padding)].view(rows, vocab + padding)[:, :vocab]
    logits.copy_(3 * torch.randn(rows, vocab))
    labels = torch.randint(vocab, (rows,))
    labels[torch.rand(rows) < masked] = -100
    if packed:
        # an empty sequence, one of a single token, and the rest
        bounds = [0, 0, 1, *range(1 + length, rows, length), rows]
        return Case(logits, labels, torch.tensor([*bounds[:seqs], rows]), **options)
    return Case(logits.unflatten(0, (seqs, length)), labels.view(seqs, length), **options)


def transformed(case: Case, x: Tensor) -> Tensor:
    x = x * case.scale
    if case.softcap:
        x = case.softcap * torch.tanh(x / case.softcap)
    return x / case.temperature


def sequences(case: Case) -> list[range]:
    if case.cu_seqlens is None:
        length = case.logits.shape[1]
        return [range(s * length, (s + 1) * length) for s in range(case.num_seqs)]
    bounds = case.cu_seqlens.tolist()
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def scored_rows(case: Case) -> tuple[Tensor, Tensor]:
    """Tokens that are scored, and the rows that score them."""
    labels = case.labels.flatten()
    starts = {s.start for s in sequences(case) if len(s) > 0}
    inside = {t for s in sequences(case) for t in s}
    tokens = [
        t
        for t in range(case.tokens)
        if labels[t] != -100 and t in inside and not (case.shift and t in starts)
    ]
    tokens = torch.tensor(tokens, dtype=torch.int64)
    return tokens, tokens - int(case.shift)


def oracle(case: Case, dtype=torch.float64) -> dict[str, Tensor]:
    logits = case.logits.flatten(0, -2).to(dtype)
    z = transformed(case, logits)
    tokens, rows = scored_rows(case)
    targets = case.labels.flatten()[tokens]
    log_probs = torch.log_softmax(z[rows], -1)
    picked = log_probs.gather(1, targets[:, None])[:, 0]
    probs = log_probs.exp()

    def spread(values: Tensor) -> Tensor:
        return torch.zeros(case.tokens, dtype=values.dtype).index_copy(0, tokens, values)

    out = {
        "logps": spread(picked),
        "row_max": spread(z[rows].amax(-1)),
        "log_sum": spread(z[rows].logsumexp(-1) - z[rows].amax(-1)),
        "entropy": spread(-(probs * log_probs.clamp(min=-1e30)).sum(-1)),
        "mean_logits": spread(z[rows].mean(-1)),
        "log_sum_sq_probs": spread((2 * log_probs).logsumexp(-1)),
        "is_top1": spread((z[rows].argmax(-1) == targets).to(torch.uint8)),
    }
    members = [
        torch.tensor([t for t in s if t in set(tokens.tolist())]).long() for s in sequences(case)
    ]
    counts = torch.tensor([len(m) for m in members])
    sums = torch.stack([out["logps"][m].sum() for m in members])
    scale = 1 / counts.clamp(min=1).to(dtype) if case.average else torch.ones(len(counts)).to(dtype)
    out |= {"seq_counts": counts, "seq_logps": sums * scale, "seq_scale": scale}
    if case.pair is not None:
        beta, smoothing = case.pair["beta"], case.pair.get("label_smoothing", 0.0)
        weight, reference = case.pair.get("weight", 1.0), case.pair.get("reference")
        leaf = out["seq_logps"].detach().clone().requires_grad_()
        ratios = leaf - (0 if reference is None else reference.to(dtype))
        chosen, rejected = ratios.chunk(2)
        d = beta * (chosen - rejected)
        log_sigmoid = torch.nn.functional.logsigmoid
        losses = -(1 - smoothing) * log_sigmoid(d) - smoothing * log_sigmoid(-d)
        loss = weight * losses.sum()
        (derivative,) = torch.autograd.grad(loss, leaf)
        out |= {"rewards": beta * ratios.detach(), "losses": losses.detach()}
        out |= {"loss": loss.detach(), "seq_scale": scale * derivative}
    return out


def assert_matches(case: Case, got: dict[str, Tensor]):
    """|ours - truth| <= |float32 torch - truth| + a few roundings of what was summed."""
    truth, torch32 = oracle(case), oracle(case, torch.float32)
    eps = torch.finfo(torch.float32).eps
    tokens, _ = scored_rows(case)
    largest = 1 + max(
        (float(truth[n][tokens].abs().max()) if len(tokens) else 0.0) for n in ("logps", "row_max")
    )
    for name, ours in got.items():
        want = truth[name]
        if not want.dtype.is_floating_point:
            assert torch.equal(ours.to(want.dtype), want), name
            continue
        assert torch.equal(ours.isnan(), want.isnan()), f"{name}: {ours} instead of {want}"
        infinite = want.isinf()
        assert torch.equal(ours[infinite].double(), want[infinite]), name
        finite = want.isfinite()
        allowed = (torch32[name].double() - want).abs()[finite] + 8 * eps * (
            want.abs()[finite] + largest
        )
        error = (ours.double() - want).abs()[finite]
        assert (error <= allowed).all(), f"{name}: {(error - allowed).max():.3e} beyond"


def gradients(
    host: Host, case: Case, got, index="sequence", *, in_place=False, padding=0, dtype=None
):
    """Ours and the float64 truth of (c * logps).sum(), for c looked up by ``index``."""
    torch.manual_seed(1)
    sizes = {"token": case.tokens, "sequence": case.num_seqs, "pair": case.num_seqs // 2}
    grad = torch.randn(sizes[index])
    shape = case.logits.shape
    if in_place:
        ours = case.logits
    else:
        memory = torch.full((*shape[:-1], shape[-1] + padding), float("nan"))
        memory = memory.to(dtype or case.logits.dtype)
        ours = memory[..., : shape[-1]]
    leaf = case.logits.detach().flatten(0, -2).double().requires_grad_()
    tokens, rows = scored_rows(case)
    z = torch.log_softmax(transformed(case, leaf)[rows], -1)
    picked = z.gather(1, case.labels.flatten()[tokens][:, None])[:, 0]
    owner = {t: s for s, members in enumerate(sequences(case)) for t in members}
    where = {
        "token": lambda t: t,
        "sequence": owner.get,
        "pair": lambda t: owner[t] % (case.num_seqs // 2),
    }[index]
    c = torch.tensor([float(grad[where(t)] * got["seq_scale"][owner[t]]) for t in tokens.tolist()])
    (truth,) = torch.autograd.grad((picked * c.double()).sum(), leaf)
    host.backward(case, got, grad, index, ours, scale=got["seq_scale"])
    if padding:
        assert memory[..., shape[-1] :].isnan().all(), "wrote beyond the row"
    return ours.flatten(0, -2), truth


def assert_gradient(ours: Tensor, truth: Tensor, slack: float = 1.0):
    finfo = torch.finfo(ours.dtype)
    bound = (finfo.eps / 2 + 16 * slack * 1.2e-7) * truth.abs()
    # float16 has subnormals down to 2^-24
    bound = bound + finfo.tiny * finfo.eps + slack * 1e-9
    assert ((ours.double() - truth).abs() <= bound).all(), (ours.double() - truth).abs().max()
