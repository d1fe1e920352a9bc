"""What tests compile, once for all: in folders of build/ named by everything that goes in."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def folder(name: str, words: Iterable[str], sources: Iterable[Path]) -> Path:
    """build/``name``/<digest of the words and of what the sources hold>."""
    digest = hashlib.sha256("\0".join(words).encode())
    for path in sorted(sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    made = ROOT / "build" / name / digest.hexdigest()[:16]
    made.mkdir(parents=True, exist_ok=True)
    return made


@contextlib.contextmanager
def _alone(path: Path):
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(path: Path, make: Callable[[Path], object]) -> Path:
    """``path``, by ``make(part)`` if it is not there; another process that asks waits for it.

    ``part`` is renamed when it is done, so that what an interrupt leaves is never taken for it.
    """
    with _alone(path):
        if not path.exists():
            part = path.with_name(f"{os.getpid()}-{path.name}")
            make(part)
            part.replace(path)
    return path
