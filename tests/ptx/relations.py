"""Relations on n events as lists of bit sets: bit b of r[a] says that a is related to b."""

from __future__ import annotations


def compose(n, a, b):
    out = [0] * n
    for i in range(n):
        x, m = 0, a[i]
        while m:
            j = (m & -m).bit_length() - 1
            x |= b[j]
            m &= m - 1
        out[i] = x
    return out


def transitive(n, a):
    r = list(a)
    for k in range(n):
        for i in range(n):
            if r[i] >> k & 1:
                r[i] |= r[k]
    return r


def optional(n, a):
    return [x | 1 << i for i, x in enumerate(a)]


def inverse(n, a):
    out = [0] * n
    for i in range(n):
        m = a[i]
        while m:
            j = (m & -m).bit_length() - 1
            out[j] |= 1 << i
            m &= m - 1
    return out


def acyclic(n, a):
    r = transitive(n, a)
    return not any(r[i] >> i & 1 for i in range(n))


def rel(n, pairs):
    r = [0] * n
    for a, b in pairs:
        r[a] |= 1 << b
    return r


def restrict(r, left=None, right=None):
    return [
        (x & (right if right is not None else -1)) if (left is None or left >> i & 1) else 0
        for i, x in enumerate(r)
    ]
