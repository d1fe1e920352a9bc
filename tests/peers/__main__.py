"""Runs peers' suites as they are and with ours in place: ``python -m tests.peers FOLDER``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .hub import make_hub

ROOT = Path(__file__).parent.parent.parent


class Suite(NamedTuple):
    trainer: str  # of dpo_kernels.patch
    tests: tuple[str, ...]
    own_sources: bool  # its package has to be put on the path (Liger's pytest settings do that)


SUITES = {
    "Liger-Kernel": Suite("liger", ("test/chunked_loss/test_dpo_loss.py",), False),
    "trl": Suite(
        "trl",
        tuple(f"tests/test_{name}_trainer.py" for name in ("dpo", "kto", "sft", "grpo", "rloo")),
        True,
    ),
}


def outcomes(suite: Suite, checkout: Path, hub: Path, patched: bool, extra: list[str]) -> dict:
    """{"outcomes": {test: outcome}, "calls": calls of ours, "where": what was tested}."""
    path = hub / "outcomes.json"
    sources = [checkout, _named(checkout, hub)] if suite.own_sources else []
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*sources, ROOT / "tests/peers/plugin", ROOT))),
        "PEER_TRAINER": suite.trainer,
        "PEER_PATCHED": "1" if patched else "0",
        "PEER_OUTCOMES": str(path),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(hub / "cache"),
        "OMP_NUM_THREADS": "1",
        # Liger compiles a graph for every shape; without, it is the same in torch's own ops
        "TORCH_COMPILE_DISABLE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "dpo_kernels_in_place"]
    command += ["-p", "no:cacheprovider", "--rootdir", str(checkout), "-o", "addopts="]
    # a file that needs a package which is not here is as little use to the others
    command += ["--continue-on-collection-errors"]
    tests = [str(checkout / test) for test in suite.tests if (checkout / test).exists()]
    done = subprocess.run(
        [*command, *tests, *extra], cwd=hub, env=variables, capture_output=True, text=True
    )
    found = json.loads(path.read_text()) if path.exists() else {"outcomes": {}}
    if not found["outcomes"]:
        raise RuntimeError(f"pytest ended without outcomes:\n{done.stdout}\n{done.stderr}")
    path.unlink()
    return found


def _named(checkout: Path, folder: Path) -> Path:
    """A folder that tells Python which version the checkout is, as an installed one does."""
    name, version = checkout.name, (checkout / "VERSION").read_text().strip()
    metadata = folder / f"{name}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def compare(name: str, suite: Suite, checkout: Path, extra: list[str]) -> int:
    """Prints what the patch changed; the number of tests that it broke."""
    with tempfile.TemporaryDirectory() as folder:
        hub = Path(folder)
        make_hub(hub)
        before = outcomes(suite, checkout, hub, False, extra)
        after = outcomes(suite, checkout, hub, True, extra)
    theirs, ours = before["outcomes"], after["outcomes"]
    passed = {test for test, outcome in theirs.items() if outcome == "passed"}
    broken = sorted(test for test in passed if ours.get(test) != "passed")
    mended = [test for test, outcome in ours.items() if outcome == "passed" and test not in passed]
    print(f"{name}: {after['where']}")
    print(f"  as it is: {_counts(theirs)}; with ours: {_counts(ours)}, {after['calls']} calls")
    for test in broken:
        print(f"  broken: {test}")
    for test in mended:
        print(f"  passes with ours alone: {test}")
    if not after["calls"]:
        print("  our functions were not called")
    return len(broken) + (not after["calls"])


def _counts(found: dict[str, str]) -> str:
    kinds = sorted(set(found.values()), reverse=True)
    return ", ".join(f"{list(found.values()).count(kind)} {kind}" for kind in kinds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("folder", type=Path, help=f"with {' or '.join(SUITES)} in it")
    parser.add_argument("pytest", nargs="*", help="for pytest, after --: -k loss")
    options = parser.parse_args()
    present = [name for name in SUITES if (options.folder / name).exists()]
    if not present:
        parser.error(f"expected a folder with {' or '.join(SUITES)}, got {options.folder}")
    failed = 0
    for name in present:
        checkout = (options.folder / name).resolve()
        failed += compare(name, SUITES[name], checkout, options.pytest)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
