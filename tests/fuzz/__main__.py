"""``python -m tests.fuzz --minutes 10``: new random examples until the time is over.

Each round has another seed, printed, and ends at the first fault, shrunk to the smallest call that
shows it. ``--sanitize address`` or ``thread`` runs an instrumented build of the CPU kernels.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time

from tests.fuzz import sanitized


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; random if none")
    parser.add_argument("--examples", type=int, default=300, help="of each property in a round")
    parser.add_argument("--sanitize", choices=tuple(sanitized.FLAGS), default=None)
    parser.add_argument("-k", default="", help="only the properties that pytest -k would take")
    options = parser.parse_args()
    environment = {**os.environ, "DPO_KERNELS_FUZZ_EXAMPLES": str(options.examples)}
    command = [*sanitized.command(options.sanitize), "-m", "pytest", "-x", "-q"]
    command += ["-p", "no:cacheprovider"]
    if options.sanitize:
        environment |= sanitized.environment(options.sanitize)
        command += ["-p", "tests.fuzz.sanitized"]
        # the interpreter has none of the instrumented kernels
        options.k = f"({options.k}) and not triton" if options.k else "not triton"
    command += ["tests/fuzz/test_fuzz.py", "-k", options.k]
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    deadline = time.monotonic() + 60 * options.minutes
    rounds = 0
    while rounds == 0 or time.monotonic() < deadline:
        print(f"round {rounds}: --seed {seed}", flush=True)
        done = subprocess.run([*command, f"--hypothesis-seed={seed}"], env=environment, check=False)
        if done.returncode:
            return done.returncode
        rounds, seed = rounds + 1, seed + 1
    print(f"nothing found in {rounds} rounds of {options.examples} examples a property")
    return 0


if __name__ == "__main__":
    sys.exit(main())
