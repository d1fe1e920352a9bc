"""The last-arriver protocols of both backends against the PTX memory model, and each weakening.

Asked of every program: can the last to arrive at a counter read another's store as it was before?
Each protocol names the code it models. ``membar.gl`` (__threadfence) is fence.sc.gpu, atomicAdd is
atom.relaxed.gpu, __ldcg and plain accesses are weak.
"""

from __future__ import annotations

import pytest

from .axioms import decide

GPU = 0


def store(place, value=1):
    return ("st", "weak", None, place, value)


def load(register, place):
    return ("ld", "weak", None, register, place)


def count(sem="relaxed", scope="gpu"):
    return ("atom", sem, scope, "add", "r", "counter", 1, None)


def fence(sem="sc", scope="gpu"):
    return ("fence", sem, scope)


def bar(name):
    """bar.sync or bar.warp.sync; threads of one block meet at a name."""
    return ("bar", name)


def rows(*, before=True, after=True, sem="sc", scope="gpu", warp_sync=True, warps=3):
    """csrc/cuda/forward.cuh, a row shared by warps of any blocks.

    Lane 0 of each warp stores its part, fences, counts and fences; then __syncwarp, and the lanes
    of the warp that was last load all parts.
    """
    threads = []
    for w in range(warps):
        ops = [store(f"part{w}")]
        ops += [fence(sem, scope)] if before else []
        ops += [count()]
        ops += [fence(sem, scope)] if after else []
        threads.append((w, GPU, ops))
    last = warps - 1
    loads = [load(f"r{w}", f"part{w}") for w in range(last)]
    if warp_sync:
        threads[last][2].append(bar("warp"))
    threads.append((last, GPU, ([bar("warp")] if warp_sync else []) + loads))
    stale = " or ".join(f"reg({warps},'r{w}') == 0" for w in range(last))
    return {}, threads, "~exists", f"reg({last},'r') == {last} and ({stale})"


def blocks(atomic, *, before=(), after=(), enter=True, leave=True, n=2):
    """csrc/cuda/epilogue.cuh and `arrive` of backends/triton/epilogue.py.

    Any thread of a block stores, bar.sync, thread 0 counts, bar.sync, and any thread of the block
    that was last loads.
    """
    into, out = [bar("in")] if enter else [], [bar("out")] if leave else []
    threads = []
    for b in range(n):
        threads.append((b, GPU, [*into, *before, atomic, *after, *out]))
        if b < n - 1:
            threads.append((b, GPU, [store(f"x{b}"), *into]))
    counting = 2 * (n - 1)
    loads = [load(f"r{b}", f"x{b}") for b in range(n - 1)]
    threads.append((n - 1, GPU, [*into, *out, *loads]))
    stale = " or ".join(f"reg({counting + 1},'r{b}') == 0" for b in range(n - 1))
    return {}, threads, "~exists", f"reg({counting},'r') == {n - 1} and ({stale})"


def reset(sem="sc"):
    """The last stores 0 in the counter, which no arrival then misses and the next launch finds."""

    def arrival():
        taken = ("bne", "r", 1, "end")
        return [fence(sem), count(), fence(sem), taken, store("counter", 0), ("label", "end")]

    return {}, [(0, GPU, arrival()), (1, GPU, arrival())], "forall", "mem('counter') == 0"


SC, WEAK = fence(), fence("acq_rel")
HOLDS = {
    "rows, 2 warps": rows(warps=2),
    "rows, 3 warps": rows(),
    "rows, fence.acq_rel would do": rows(sem="acq_rel"),
    "epilogue": blocks(count(), before=[SC], after=[SC]),
    "epilogue, fence.acq_rel would do": blocks(count(), before=[WEAK], after=[WEAK]),
    "the counter is 0 after the launch": reset(),
    "and with fence.acq_rel": reset("acq_rel"),
    "arrive, 2 programs": blocks(count("acq_rel")),
    "arrive, 3 programs": blocks(count("acq_rel"), n=3),
}
FAILS = {
    "rows without the fence before": rows(before=False, warps=2),
    "rows without the fence after": rows(after=False, warps=2),
    "rows without __syncwarp": rows(warp_sync=False, warps=2),
    "rows, fences of a block only": rows(scope="cta", warps=2),
    "rows, fence.acq_rel without the one before": rows(before=False, sem="acq_rel", warps=2),
    "rows, fence.acq_rel without the one after": rows(after=False, sem="acq_rel", warps=2),
    "epilogue without the first __syncthreads": blocks(
        count(), before=[SC], after=[SC], enter=False
    ),
    "epilogue without the second __syncthreads": blocks(
        count(), before=[SC], after=[SC], leave=False
    ),
    "epilogue without the fence before": blocks(count(), after=[SC]),
    "epilogue without the fence after": blocks(count(), before=[SC]),
    "arrive, relaxed": blocks(count()),
    "arrive, release only": blocks(count("release")),
    "arrive, acquire only": blocks(count("acquire")),
    "arrive, of its block only": blocks(count("acq_rel", "cta")),
    "arrive without the barrier before": blocks(count("acq_rel"), enter=False),
    "arrive without the barrier after": blocks(count("acq_rel"), leave=False),
}


@pytest.mark.parametrize("name", HOLDS)
def test_excludes_the_stale_read(name):
    holds, _ = decide(*HOLDS[name])
    assert holds


@pytest.mark.parametrize("name", FAILS)
def test_weakened_it_does_not(name):
    holds, witness = decide(*FAILS[name])
    assert not holds and witness is not None


# classic tests whose outcome the PTX ISA and the paper give
X, Y = "x", "y"
LITMUS = {
    # (threads, condition, whether some execution meets it)
    "message passing, weak": (
        [(0, GPU, [store(X), store(Y)]), (1, GPU, [load("a", Y), load("b", X)])],
        "reg(1,'a') == 1 and reg(1,'b') == 0",
        True,
    ),
    "store buffering, fence.sc": (
        [
            (0, GPU, [("st", "relaxed", "gpu", X, 1), SC, ("ld", "relaxed", "gpu", "a", Y)]),
            (1, GPU, [("st", "relaxed", "gpu", Y, 1), SC, ("ld", "relaxed", "gpu", "b", X)]),
        ],
        "reg(0,'a') == 0 and reg(1,'b') == 0",
        False,
    ),
    "store buffering, fence.acq_rel": (
        [
            (0, GPU, [("st", "relaxed", "gpu", X, 1), WEAK, ("ld", "relaxed", "gpu", "a", Y)]),
            (1, GPU, [("st", "relaxed", "gpu", Y, 1), WEAK, ("ld", "relaxed", "gpu", "b", X)]),
        ],
        "reg(0,'a') == 0 and reg(1,'b') == 0",
        True,
    ),
    "coherence of one place": (
        [
            (0, GPU, [("st", "relaxed", "gpu", X, 1)]),
            (1, GPU, [("ld", "relaxed", "gpu", "a", X), ("ld", "relaxed", "gpu", "b", X)]),
        ],
        "reg(1,'a') == 1 and reg(1,'b') == 0",
        False,
    ),
}


@pytest.mark.parametrize("name", LITMUS)
def test_the_model_itself(name):
    threads, condition, possible = LITMUS[name]
    found, _ = decide({}, threads, "exists", condition)
    assert found == possible
