"""Exhaustive check of small programs against the PTX memory model.

The axioms are those of the PTX ISA, chapter 8 (causality order, coherence, FenceSC, atomicity, no
thin air, SC per location, causality), as Lustig, Sahasrabuddhe and Giroux formalise them in "A
Formal Analysis of the NVIDIA PTX Memory Consistency Model" (ASPLOS 2019). Everything here is of the
generic proxy. Every execution of a program is built: the values read, what each read reads from,
the order of morally strong writes and of fence.sc; the axioms decide which of them exist.
"""

from __future__ import annotations

import itertools
import time

from .litmus import domains, traces
from .relations import acyclic, compose, inverse, optional, rel, restrict, transitive

# seconds a program may take
BUDGET = 60.0
SCOPES = {"cta": 0, "cluster": 1, "gpu": 1, "sys": 2}


class Event:
    __slots__ = (
        "bar",
        "deps",
        "id",
        "index",
        "init",
        "kind",
        "loc",
        "rmw",
        "scope",
        "sem",
        "thread",
        "value",
    )

    def __init__(self, **k):
        self.loc = self.value = self.sem = self.scope = self.rmw = self.bar = None
        self.init, self.deps = False, ()
        for a, b in k.items():
            setattr(self, a, b)

    def __repr__(self):
        return f"{self.thread}:{self.kind}.{self.sem} {self.loc}={self.value}"


def executions(threads, init):
    """Yields (registers by thread, final values by location: a set of choices, events)."""
    locs = set(init)
    for t in threads:
        for op in t[2]:
            if op[0] == "st":
                locs.add(op[3])
            elif op[0] == "ld":
                locs.add(op[4])
            elif op[0] in ("atom", "red"):
                locs.add(op[5])
    init = {l: init.get(l, 0) for l in locs}
    domain = domains(threads, init)
    per = [traces(t[2], domain) for t in threads]
    limit = time.time() + BUDGET
    for combo in itertools.product(*per):
        if time.time() > limit:
            raise NotImplementedError("too many executions")
        written = {l: {v} for l, v in init.items()}
        for events, _ in combo:
            for kind, _, _, loc, v, _ in events:
                if kind == "W":
                    written[loc].add(v)
        if any(
            kind == "R" and v not in written[loc]
            for events, _ in combo
            for kind, _, _, loc, v, _ in events
        ):
            continue
        yield from candidate(threads, init, combo)


def candidate(threads, init, combo):
    ev = [
        Event(id=i, thread=-1, kind="W", loc=l, value=v, sem="weak", init=True, index=-1)
        for i, (l, v) in enumerate(init.items())
    ]
    po = []
    rmw = []
    for t, (events, _) in enumerate(combo):
        mine = []
        for index, (kind, sem, scope, loc, v, flag) in enumerate(events):
            e = Event(
                id=len(ev),
                thread=t,
                kind=kind,
                sem=sem,
                scope=scope,
                loc=loc if kind != "B" else None,
                value=v,
                index=index,
                bar=loc if kind == "B" else None,
                rmw=flag,
            )
            po += [(x.id, e.id) for x in mine]
            if kind == "W" and flag == "rmw":
                rmw.append((mine[-1].id, e.id))
            mine.append(e)
            ev.append(e)
    n = len(ev)
    PO = rel(n, po)
    reads = [e for e in ev if e.kind == "R"]
    choices = [
        [
            w.id
            for w in ev
            if w.kind == "W"
            and w.loc == r.loc
            and w.value == r.value
            and not (w.thread == r.thread and w.index > r.index)
        ]
        for r in reads
    ]
    if any(not c for c in choices):
        return
    mem = [e for e in ev if e.kind in "RW"]

    def is_(holds):
        return sum(1 << e.id for e in ev if holds(e))

    W, R, F = (is_(lambda e, k=k: e.kind == k) for k in ("W", "R", "F"))
    strong_w = is_(lambda e: e.kind == "W" and e.sem in ("relaxed", "release"))
    strong_r = is_(lambda e: e.kind == "R" and e.sem in ("relaxed", "acquire"))
    strong = strong_w | strong_r | F

    def includes(a, b):
        if a.scope is None or b.thread < 0:
            return False
        ta, tb = threads[a.thread], threads[b.thread]
        s = SCOPES[a.scope]
        return s == 2 or (s == 1 and ta[1] == tb[1]) or (s == 0 and ta[:2] == tb[:2])

    ms = []
    for a in ev:
        for b in ev:
            if a is b or a.init or b.init:
                continue
            one = a.thread == b.thread or (
                strong >> a.id & 1 and strong >> b.id & 1 and includes(a, b) and includes(b, a)
            )
            two = not (a.kind in "RW" and b.kind in "RW") or a.loc == b.loc
            if one and two and a.kind != "B" and b.kind != "B":
                ms.append((a.id, b.id))
    MS = rel(n, ms)
    sameloc = rel(n, [(a.id, b.id) for a in mem for b in mem if a.loc == b.loc and a is not b])
    POLOC = [a & b for a, b in zip(PO, sameloc, strict=False)]
    RMW = rel(n, rmw)
    fence_rel = is_(lambda e: e.kind == "F")  # fence.sc is a fence.acq_rel too
    release = [
        a | b
        for a, b in zip(
            restrict(
                compose(
                    n,
                    restrict(
                        optional(n, POLOC), left=is_(lambda e: e.kind == "W" and e.sem == "release")
                    ),
                    [1 << i for i in range(n)],
                ),
                right=strong_w,
            ),
            restrict(PO, fence_rel, strong_w),
            strict=False,
        )
    ]
    acquire = [
        a | b
        for a, b in zip(
            restrict(
                optional(n, POLOC), strong_r, is_(lambda e: e.kind == "R" and e.sem == "acquire")
            ),
            restrict(PO, strong_r, fence_rel),
            strict=False,
        )
    ]
    bars = [e for e in ev if e.kind == "B"]
    SBAR = rel(
        n,
        [
            (a.id, b.id)
            for a in bars
            for b in bars
            if a is not b
            and a.bar == b.bar
            and threads[a.thread][:2] == threads[b.thread][:2]
            and a.thread != b.thread
        ],
    )
    sc = [e for e in ev if e.kind == "F" and e.sem == "sc"]
    sc_pairs = [(a.id, b.id) for a, b in itertools.combinations(sc, 2) if MS[a.id] >> b.id & 1]
    base_co = [
        (e.id, w.id)
        for e in ev
        if e.init
        for w in ev
        if w.kind == "W" and not w.init and w.loc == e.loc
    ]
    ww = [
        (a.id, b.id)
        for a, b in itertools.combinations([e for e in ev if e.kind == "W" and not e.init], 2)
        if a.loc == b.loc
    ]
    for rf in itertools.product(*choices):
        RF = rel(n, [(w, r.id) for w, r in zip(rf, reads, strict=False)])
        if not acyclic(
            n, [a | b for a, b in zip(RF, restrict(PO, R, W), strict=False)]
        ) and not acyclic(n, RF):
            continue
        obs = [a & b for a, b in zip(MS, RF, strict=False)]
        while True:
            new = [a | b for a, b in zip(obs, compose(n, compose(n, obs, RMW), obs), strict=False)]
            if new == obs:
                break
            obs = new
        sync = [
            a & b for a, b in zip(MS, compose(n, compose(n, release, obs), acquire), strict=False)
        ]
        for ordered in fence_orders(sc, sc_pairs, PO):
            SCO = rel(n, ordered)
            if not acyclic(
                n,
                [
                    a | b
                    for a, b in zip(
                        SCO,
                        restrict(PO, is_(lambda e: e in sc), is_(lambda e: e in sc)),
                        strict=False,
                    )
                ],
            ):
                continue
            hop = [a | b | c for a, b, c in zip(sync, SCO, SBAR, strict=False)]
            pq = optional(n, PO)
            one = compose(n, hop, pq)
            base = compose(n, pq, transitive(n, one))
            cause = [
                a | b
                for a, b in zip(
                    base,
                    compose(n, obs, [x | y for x, y in zip(base, POLOC, strict=False)]),
                    strict=False,
                )
            ]
            # a fence.sc before another in causality order comes before it in the order of fences
            bad = False
            for a, b in sc_pairs:
                for x, y in ((a, b), (b, a)):
                    if cause[x] >> y & 1 and not SCO[x] >> y & 1:
                        bad = True
            if bad:
                continue
            if any(cause[f.id] >> f.id & 1 for f in sc):
                continue
            forced = [
                (a, b)
                for a in range(n)
                for b in range(n)
                if cause[a] >> b & 1 and W >> a & 1 and W >> b & 1 and sameloc[a] >> b & 1
            ]
            if any(a == b for a, b in forced):
                continue
            open_ = [
                (a, b)
                for a, b in ww
                if MS[a] >> b & 1 and (a, b) not in forced and (b, a) not in forced
            ]
            for co_choice in itertools.product((0, 1), repeat=len(open_)):
                CO = transitive(
                    n,
                    rel(
                        n,
                        base_co
                        + forced
                        + [p if o else p[::-1] for p, o in zip(open_, co_choice, strict=False)],
                    ),
                )
                if any(CO[i] >> i & 1 for i in range(n)):
                    continue
                FR = compose(n, inverse(n, RF), CO)
                FR = [x & ~(1 << i) for i, x in enumerate(FR)]
                # atomicity
                msfr, msco = (
                    [a & b for a, b in zip(MS, FR, strict=False)],
                    [a & b for a, b in zip(MS, CO, strict=False)],
                )
                if any(a & b for a, b in zip(compose(n, msfr, msco), RMW, strict=False)):
                    continue
                # an rmw that reads an initial value is atomic as well
                if not atomic_init(ev, rf, reads, CO, MS, rmw):
                    continue
                if not acyclic(
                    n,
                    [
                        (m & (a | b | c)) | p
                        for m, a, b, c, p in zip(MS, RF, CO, FR, POLOC, strict=False)
                    ],
                ):
                    continue
                rffr = compose(n, [a | b for a, b in zip(RF, FR, strict=False)], cause)
                if any(rffr[i] >> i & 1 for i in range(n)):
                    continue
                finals = {}
                for loc in init:
                    ws = [e for e in ev if e.kind == "W" and e.loc == loc]
                    finals[loc] = [e.value for e in ws if not any(CO[e.id] >> x.id & 1 for x in ws)]
                yield [regs for _, regs in combo], finals, ev


def fence_orders(sc, pairs, PO):
    """The ways to order the morally strong pairs of fence.sc, acyclic and with program order."""
    seen = set()

    def go(done, left):
        if not left:
            at = {f: i for i, f in enumerate(done)}
            key = tuple(p if at[p[0]] < at[p[1]] else p[::-1] for p in pairs)
            if key not in seen:
                seen.add(key)
                yield key
            return
        for f in left:
            if not any(PO[g] >> f & 1 for g in left if g != f):
                yield from go([*done, f], [g for g in left if g != f])

    yield from go([], [f.id for f in sc])


def atomic_init(ev, rf, reads, CO, MS, rmw):
    source = {r.id: w for w, r in zip(rf, reads, strict=False)}
    for r, w in rmw:
        s = source[r]
        for x in ev:
            strong = x.kind == "W" and x.loc == ev[w].loc and MS[w] >> x.id & 1
            between = CO[s] >> x.id & 1 and CO[x.id] >> w & 1
            if x.id not in (w, s) and strong and between:
                return False
    return True


# ------------------------------------------------------------- litmus files


def decide(init, threads, kind, expr):
    """Whether the condition holds: exists, ~exists or forall over the executions."""
    code = compile(expr, "condition", "eval")
    for regs, finals, ev in executions(threads, init):
        names = list(finals)
        for pick in itertools.product(*(finals[x] for x in names)):
            memory = dict(zip(names, pick, strict=False))
            hit = eval(
                code,
                {
                    "reg": lambda t, r, regs=regs: regs[t].get(r, 0),
                    "mem": lambda place, memory=memory: memory[place],
                },
            )
            if kind == "exists" and hit:
                return True, (regs, memory, ev)
            if kind == "~exists" and hit:
                return False, (regs, memory, ev)
            if kind == "forall" and not hit:
                return False, (regs, memory, ev)
    return kind != "exists", None
