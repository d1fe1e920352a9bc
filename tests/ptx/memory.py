"""The memory a kernel may touch, by address, and what is known of each granule of it.

Regions are addresses of this process: CPU tensors stand in for device memory. Every access must lie
inside one region, be aligned to its size and, if it writes, be allowed to. A granule (the smallest
element of its region) of a shadowed region is initialised or not, and has a history (races.py).
"""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import dataclass

import numpy as np

from .numbers import UNSIGNED

# bits of generic addresses that say "shared" and "local" (PTX ISA, 5.1: windows of generic memory)
SHARED_WINDOW = 1 << 56
LOCAL_WINDOW = 1 << 57
WINDOW_MASK = LOCAL_WINDOW | SHARED_WINDOW

# the address space of this process as one array of each width; nothing is touched through it that
# is not in a region
_FIRST = 4096
_FLAT = np.frombuffer((ctypes.c_ubyte * ((1 << 47) - _FIRST)).from_address(_FIRST), np.uint8)
_VIEWS = {size: _FLAT.view(dtype) for size, dtype in UNSIGNED.items()}


class Fault(Exception):
    """What stops a kernel on a GPU, or leaves its further behaviour undefined."""


@dataclass
class Region:
    name: str
    base: int
    size: int
    writable: bool = False
    initialised: bool = True
    # whether a granule's initialisation and accesses are followed
    shadowed: bool = False
    granule: int = 4
    # whether a launch has to write all of it
    output: bool = False


def fetch(addresses, size: int):
    return _VIEWS[size][(addresses - _FIRST) // size]


def put(addresses, size: int, values) -> None:
    _VIEWS[size][(addresses - _FIRST) // size] = values


class Memory:
    def __init__(self, regions: list[Region]):
        regions = sorted((r for r in regions if r.size > 0), key=lambda r: r.base)
        for a, b in itertools.pairwise(regions):
            if a.base + a.size > b.base:
                raise ValueError(f"{a.name} and {b.name} overlap")
        self.regions = regions
        self.base = np.array([r.base for r in regions], np.int64)
        self.end = np.array([r.base + r.size for r in regions], np.int64)
        self.writable = np.array([r.writable for r in regions], bool)
        self.granule = np.array([r.granule for r in regions], np.int64)
        self.first = np.full(len(regions), -1, np.int64)
        granules, initialised = 0, []
        for i, r in enumerate(regions):
            if r.shadowed:
                self.first[i] = granules
                count = -(-r.size // r.granule)
                initialised.append(np.full(count, r.initialised))
                granules += count
        self.granules = granules
        self.initialised = np.concatenate(initialised) if initialised else np.zeros(0, bool)

    def locate(self, addresses, size: int, writes: bool, text: str):
        """The region of every access; raises Fault for one that is not allowed."""
        if (addresses & (size - 1)).any():
            at = int(addresses[(addresses & (size - 1)) != 0][0])
            raise Fault(f"misaligned: address % {size} = {at % size}: {text}")
        i = np.searchsorted(self.base, addresses, "right") - 1
        outside = (i < 0) | (addresses + size > self.end[i])
        if outside.any():
            at, near = int(addresses[outside][0]), int(i[outside][0])
            where = "before every region"
            if near >= 0:
                r = self.regions[near]
                where = f"at byte {at - r.base} of {r.name}, which has {r.size}"
            raise Fault(f"out of bounds: {size} bytes {where}: {text}")
        if writes and not self.writable[i].all():
            r = self.regions[int(i[~self.writable[i]][0])]
            raise Fault(f"write to {r.name}, which is only read: {text}")
        return i

    def granules_of(self, region, addresses, size: int):
        """(granules, which access each belongs to) of the accesses to shadowed regions."""
        first = self.first[region]
        followed = np.flatnonzero(first >= 0)
        if len(followed) == 0:
            return followed, followed
        region, addresses = region[followed], addresses[followed]
        granule = self.granule[region]
        start = first[followed] + (addresses - self.base[region]) // granule
        if (granule == granule[0]).all():
            count = max(size // int(granule[0]), 1)
            if count == 1:
                return start, followed
            every = (start[:, None] + np.arange(count)).ravel()
            return every, np.repeat(followed, count)
        counts = np.maximum(size // granule, 1)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(start, counts) + within, np.repeat(followed, counts)

    def name_of(self, granule: int) -> str:
        """The region of a granule, without the number of a block or row."""
        shadowed = [(f, r) for f, r in zip(self.first, self.regions, strict=True) if f >= 0]
        return max((f, r.name) for f, r in shadowed if f <= granule)[1]

    def never_written(self) -> list[str]:
        """Regions of outputs with a granule that is still uninitialised."""
        left = []
        for first, r in zip(self.first.tolist(), self.regions, strict=True):
            if first >= 0 and r.output:
                count = int((~self.initialised[first : first - (-r.size // r.granule)]).sum())
                if count:
                    left.append(f"{count} of {r.name}")
        return left
