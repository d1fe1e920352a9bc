"""Small programs and what each of their threads may do on its own.

A program is a list of threads, each (block, GPU, operations); an operation is a tuple, see
`traces`.
"""

from __future__ import annotations

_ATOMICS = {
    "add": lambda old, x, y: old + x,
    "sub": lambda old, x, y: old - x,
    "exch": lambda old, x, y: x,
    # None: nothing is written
    "cas": lambda old, x, y: y if old == x else None,
}


def traces(ops, domain):
    """All (events, registers) of a thread whose reads may return any value of the domain."""
    labels = {op[1]: i for i, op in enumerate(ops) if op[0] == "label"}
    out = []

    def val(regs, x):
        return regs.get(x, 0) if isinstance(x, str) else x

    def go(pc, regs, events, steps):
        if steps > 60 or len(out) > 3000:
            raise NotImplementedError("a loop")
        if pc >= len(ops):
            out.append((events, regs))
            return
        op = ops[pc]
        k = op[0]
        if k == "st":
            _, sem, scope, loc, x = op
            go(pc + 1, regs, [*events, ("W", sem, scope, loc, val(regs, x), None)], steps + 1)
        elif k == "ld":
            _, sem, scope, r, loc = op
            for v in sorted(domain.get(loc, {0})):
                go(pc + 1, {**regs, r: v}, [*events, ("R", sem, scope, loc, v, None)], steps + 1)
        elif k in ("atom", "red"):
            _, sem, scope, what, r, loc, x, y = op
            for v in sorted(domain.get(loc, {0})):
                rs = {"acq_rel": "acquire", "acquire": "acquire"}.get(sem, "relaxed")
                ws = {"acq_rel": "release", "release": "release"}.get(sem, "relaxed")
                read = ("R", rs, scope, loc, v, "rmw")
                new = _ATOMICS[what](v, val(regs, x), val(regs, y))
                here = (
                    [read, ("W", ws, scope, loc, new, "rmw")]
                    if new is not None
                    else [("R", rs, scope, loc, v, None)]
                )
                go(pc + 1, {**regs, r: v} if r else regs, events + here, steps + 1)
        elif k == "fence":
            go(pc + 1, regs, [*events, ("F", op[1], op[2], None, None, None)], steps + 1)
        elif k == "bar":
            use = sum(e[0] == "B" and e[3][0] == op[1] for e in events)
            go(pc + 1, regs, [*events, ("B", None, None, (op[1], use), None, None)], steps + 1)
        elif k == "mov":
            go(pc + 1, {**regs, op[1]: val(regs, op[2])}, events, steps + 1)
        elif k in ("add", "sub", "mul"):
            f = {"add": int.__add__, "sub": int.__sub__, "mul": int.__mul__}[k]
            go(pc + 1, {**regs, op[1]: f(val(regs, op[2]), val(regs, op[3]))}, events, steps + 1)
        elif k == "label":
            go(pc + 1, regs, events, steps + 1)
        elif k == "goto":
            go(labels[op[1]], regs, events, steps + 1)
        elif k in ("beq", "bne"):
            taken = (val(regs, op[1]) == val(regs, op[2])) == (k == "beq")
            go(labels[op[3]] if taken else pc + 1, regs, events, steps + 1)
        else:
            raise ValueError(op)

    go(0, {}, [], 0)
    return out


def domains(threads, init):
    """Values each location can hold, to a fixed point."""
    domain = {l: {v} for l, v in init.items()}
    for _ in range(12):
        new = {l: set(s) for l, s in domain.items()}
        for t in threads:
            for events, _ in traces(t[2], domain):
                for kind, _, _, loc, v, _ in events:
                    if kind == "W":
                        new.setdefault(loc, {0}).add(v)
        if new == domain:
            return domain
        if max(len(s) for s in new.values()) > 8:
            return new
        domain = new
    return domain
