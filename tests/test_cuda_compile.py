"""The CUDA sources compile for every target, without spilled registers or local memory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import sass
from dpo_kernels.backends import native
from dpo_kernels.backends.batch import ForwardOutputs, TokenBatch
from tests.build_helpers import find_nvcc, nvcc_code_flags
from tests.ptx import cuda_build

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("80", "90", "100", "120")


def resources(log: str) -> dict[str, dict[str, int]]:
    """Per kernel what ptxas -v says of it."""
    kernels = {}
    for block in re.split(r"Compiling entry function '", log)[1:]:
        numbers = {
            "stack": r"(\d+) bytes stack frame",
            "spill stores": r"(\d+) bytes spill stores",
            "spill loads": r"(\d+) bytes spill loads",
            "registers": r"Used (\d+) registers",
        }
        name = block.split("'")[0]
        kernels[name] = {key: int(re.search(p, block)[1]) for key, p in numbers.items()}
    return kernels


@pytest.fixture
def usual() -> str:
    """The PTX for sm_90, which tests/ptx executes."""
    if reason := cuda_build.unavailable():
        pytest.skip(reason)
    return cuda_build.ptx(90)


def test_device_code_calls_no_host_function(usual, tmp_path):
    """Whatever <math.h> nvcc finds and whatever -I says, the kernels are the same.

    nvcc makes the float overloads of std::log1p, std::expm1 and others functions of the device only
    when libstdc++'s <math.h> was the one that its headers included. With another (the C library's,
    or one of our own in a folder given by -I) they are host functions, and nvcc compiles a call of
    one to a value that nobody computed: log-probs were NaN on the first GPU that ran them.
    """
    (tmp_path / "math.h").write_text(
        "#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS\n"
        "#include_next <math.h>\n"
        "#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS\n"
    )
    # a <math.h> in csrc would come before ours, and change the PTX as well
    folders = "-I", str(ROOT / "csrc"), "-I", str(tmp_path)
    assert cuda_build.compile_ptx(90, tmp_path / "other.ptx", *folders) == usual
    # a function that was not inlined or has no body would be called, or trap
    assert not re.search(r"^\s*(@\S+\s+)?(call|trap)\b", usual, re.MULTILINE)


def test_no_rounding_is_left_to_ptxas(usual):
    """Every float operation in the PTX says how it rounds, so ptxas may not join two into an FMA.

    It did, in some kernels and not in others: on the first GPU that ran them the log-probs beside
    statistics had other bits than alone, and a common offset of 1e4 cost the entropy its digits,
    where ``a * max - b`` with ``b = a * max`` was no longer 0. The executed PTX showed neither.
    """
    operations = re.findall(r"\b(?:add|sub|mul|fma|mad)[.\w]*\.f(?:16|32|64)\b", usual)
    assert len(operations) > 1000
    left_open = {o for o in operations if not re.search(r"\.r[nzmp]\b", o)}
    assert left_open == set()


def test_no_header_hides_one_of_the_system():
    headers = {path.name for path in (ROOT / "csrc").glob("*.h")}
    system = "assert ctype errno fenv float limits locale math signal string threads time types"
    assert not headers & {f"{name}.h" for name in system.split()}


def test_device_code_uses_no_math_of_namespace_std():
    host_only = {"arguments.cuh"}
    names = r"std::(f?abs|f?max|f?min|exp\w*|log\w*|tanh|pow|sqrt|fma|ldexp|isnan|isinf|isfinite)\("
    for path in (ROOT / "csrc" / "scalar_math.h", *(ROOT / "csrc" / "cuda").glob("*.cuh")):
        if path.name not in host_only:
            assert not re.search(names, path.read_text()), path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(tmp_path, architecture):
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc in CUDA_HOME, on PATH or among the installed packages")
    built = getattr(native.MODULE, "cuda_archs", "").split(";")
    if architecture in built and sass.unavailable() is None:
        pytest.skip("tests/test_cuda_costs.py asks it of the code in the extension")
    command = [nvcc, *nvcc_code_flags(), "-Xptxas", "-v", "-DDPO_KERNELS_WITH_CUDA"]
    command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall"]
    command += ["-c", str(ROOT / "csrc" / "cuda" / "launchers.cu"), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = resources(done.stdout + done.stderr)
    # forward: 3 dtypes, statistics or not, softcap or not; backward: 3 dtypes and two of 16 bits
    # for float32 logits, softcap or not
    assert len(kernels) == 22
    table = "\n".join(f"{name}: {used}" for name, used in kernels.items())
    for used in kernels.values():
        assert used["stack"] == used["spill stores"] == used["spill loads"] == 0, table


def test_no_torch_under_csrc():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_no_launch_syntax_in_device_code():
    """What makes it possible to run them on the host (tests/simt)."""
    for path in (ROOT / "csrc" / "cuda").glob("*.cuh"):
        assert "<<<" not in path.read_text(), path


def test_build_finds_nvcc():
    """With nvcc at hand the module holds the CUDA kernels; the nvcc on PATH may be a wrapper."""
    if find_nvcc() is None:
        pytest.skip("no nvcc in CUDA_HOME, on PATH or among the installed packages")
    if os.environ.get("DPO_KERNELS_CUDA_ARCHS") == "":
        pytest.skip("the build was asked to leave CUDA out")
    assert native.MODULE.cuda_archs


def test_launchers_report_cuda_errors():
    """The kernel's name and CUDA's own word reach Python: here for a device that does not exist."""
    if not native.MODULE.cuda_archs:
        pytest.skip("the package was built without nvcc")
    labels = torch.zeros(2, 3, dtype=torch.int64)
    batch = native.native_batch(TokenBatch(torch.zeros(2, 3, 8), labels, None, -100, True))
    tokens = ForwardOutputs(torch.zeros(3, 6), None, None, None, None, None, None, False)
    out = native.native_outputs(batch, tokens)
    with pytest.raises(RuntimeError, match="cuda_forward: cudaError"):
        native.MODULE.cuda_forward(batch, None, out, 0, 4096, 0)
