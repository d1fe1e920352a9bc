"""The CUDA kernels on the host under AddressSanitizer and ThreadSanitizer, and a test of that test:
with any one of their barriers and fences left out, ThreadSanitizer or the values must object.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from .simt.host import ROOT, compile_host

SITES = [
    f"{path.name}:{number}"
    for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if re.search(r"__(syncthreads|syncwarp|threadfence)\(\)", line)
]


def build(directory: Path, sanitizer: str) -> Path:
    flags = (f"-fsanitize={sanitizer}", "-DSIMT_FLOAT32_ONLY", "-g1")
    return compile_host(directory / "main", ("simt.cpp", "driver.cpp", "main.cpp"), *flags)


def execute(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    # address space randomisation of more bits than ThreadSanitizer maps stops it before main
    prefix = ["setarch", "-R"] if os.path.exists("/usr/bin/setarch") else []
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run(
        [*prefix, str(program), *arguments], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def thread_sanitized(tmp_path_factory) -> Path:
    program = build(tmp_path_factory.mktemp("tsan"), "thread")
    if "unexpected memory mapping" in execute(program).stderr:
        pytest.skip("ThreadSanitizer cannot map its memory here")
    return program


def test_no_byte_out_of_bounds(tmp_path):
    done = execute(build(tmp_path, "address,undefined"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr, done.stderr[-4000:]


def test_no_race_and_every_barrier_is_met(thread_sanitized):
    done = execute(thread_sanitized, "sites")
    assert done.returncode == 0, done.stderr[-4000:]
    assert sorted(done.stdout.split()) == sorted(SITES)


@pytest.mark.parametrize("site", SITES)
def test_every_barrier_is_needed(thread_sanitized, site):
    done = execute(thread_sanitized, "drop", site)
    assert done.returncode != 0, f"nothing failed without the barrier at {site}"
    assert re.search("data race|instead of|simt:", done.stderr), done.stderr[-4000:]
