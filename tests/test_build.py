"""What is built with which compilers, what is rebuilt, and when the build must fail."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from . import build_helpers
from .build_helpers import ROOT, build, copy_project, fake_cxx, fake_toolkit, run, write_script

for _module in ("setuptools", "pybind11", "ninja"):
    pytest.importorskip(_module, reason="setup.py without pip needs dpo_kernels[build]")
if shutil.which("g++") is None and shutil.which("c++") is None:
    pytest.skip("no C++ compiler", allow_module_level=True)


@pytest.fixture
def project(tmp_path) -> Path:
    return copy_project(tmp_path / "project")


@pytest.fixture
def compilers(tmp_path) -> dict[str, str]:
    """Variables that select fake compilers, with the targets of nvcc 13.0."""
    home = fake_toolkit(tmp_path / "cuda", "13.0")
    return {"CXX": str(fake_cxx(tmp_path)), "CUDA_HOME": str(home)}


def ninja_file(project: Path) -> Path:
    (path,) = (project / "build").glob("*/build.ninja")
    return path


def targets(project: Path) -> list[str]:
    text = ninja_file(project).read_text().replace("$\n", "")
    return re.findall(r"-gencode=arch=compute_\d+,code=(\w+)", text)


def record(project: Path) -> dict[str, str]:
    return json.loads((project / "dpo_kernels" / "_build.json").read_text())


def to_rebuild(project: Path) -> set[str]:
    """The sources that ninja would compile again."""
    done = run(project, "-m", "ninja", "-n", "-v", "-f", str(ninja_file(project)))
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r" -c (\S+) ", done.stdout))


def includes(path: Path) -> set[Path]:
    """The project's files that one includes, directly or not."""
    found = set()
    for name in re.findall(r'#include "(.*)"', path.read_text()):
        header = (path.parent / name).resolve()
        found |= {header} | includes(header)
    return found


@pytest.mark.parametrize(
    ("release", "built", "lacking"),
    [
        ("11.0", ["sm_80", "compute_80"], "sm_90, sm_100, sm_120"),
        ("12.4", ["sm_80", "sm_90", "compute_90"], "sm_100, sm_120"),
        ("12.8", ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"], None),
        ("13.0", ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"], None),
    ],
)
def test_default_targets_are_those_nvcc_has(project, compilers, tmp_path, release, built, lacking):
    home = fake_toolkit(tmp_path / release, release)
    done = build(project, **{**compilers, "CUDA_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    assert targets(project) == built
    if lacking is None:
        assert record(project) == {}
    else:
        said = f"nvcc {release} has no {lacking}: those GPUs compile the PTX of {built[-2]}"
        assert record(project) == {"targets": said}
        assert said in done.stderr


def test_targets_asked_for_are_built(project, compilers):
    done = run(project, "setup.py", "ninja", DPO_KERNELS_CUDA_ARCHS="90;75", **compilers)
    assert done.returncode == 0, done.stderr
    # the PTX is that of the newest, in whichever order they were named
    assert targets(project) == ["sm_75", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("90;95", "but nvcc 13.0 has no sm_95"),
        ("sm_90", 'DPO_KERNELS_CUDA_ARCHS=sm_90: expected numbers, such as "80;90"'),
    ],
)
def test_targets_that_cannot_be_built_fail(project, compilers, asked, message):
    done = build(project, DPO_KERNELS_CUDA_ARCHS=asked, **compilers)
    assert done.returncode == 1
    assert message in done.stderr


def test_architectures_without_nvcc_fail(project, compilers, tmp_path):
    variables = {**compilers, "CUDA_HOME": "", "PATH": str(tmp_path)}
    done = build(project, DPO_KERNELS_CUDA_ARCHS="90", **variables)
    assert done.returncode == 1
    assert "DPO_KERNELS_CUDA_ARCHS=90, but nvcc" in done.stderr


def test_toolkit_without_its_runtime_is_named(project, compilers):
    home = Path(compilers["CUDA_HOME"])
    (home / "lib64" / "libcudart_static.a").unlink()
    done = build(project, PATH=str(home), **compilers)
    assert done.returncode == 0, done.stderr
    assert record(project) == {"cuda": f"{home}/bin/nvcc has no libcudart_static.a in its toolkit"}


def test_header_rebuilds_what_includes_it(project, compilers):
    assert build(project, **compilers).returncode == 0
    assert to_rebuild(project) == set()
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/cuda/*.cu")]
    for header in ("csrc/launchers.h", "csrc/cpu/rows.h", "csrc/cpu/threads.h"):
        path = project / header
        before = path.stat()
        path.write_text(path.read_text() + "\n")
        users = {s for s in sources if (ROOT / header).resolve() in includes(s)}
        assert users
        assert to_rebuild(project) == {str(source.relative_to(ROOT)) for source in users}
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_every_include_is_known_to_ninja(project, compilers):
    assert build(project, **compilers).returncode == 0
    done = run(project, "-m", "ninja", "-f", str(ninja_file(project)), "-t", "deps")
    known = {}
    for block in done.stdout.strip().split("\n\n"):
        source, *headers = (line.strip() for line in block.splitlines()[1:])
        known[source] = {str(Path(os.path.normpath(header))) for header in headers}
    assert "csrc/bindings.cpp" in known
    for source, headers in known.items():
        needed = {str(path.relative_to(ROOT)) for path in includes(ROOT / source)}
        assert needed == {header for header in headers if header.startswith("csrc/")}


def test_changed_flags_rebuild(project, compilers):
    assert build(project, **compilers).returncode == 0
    assert run(project, "setup.py", "ninja", CXXFLAGS="-O1", **compilers).returncode == 0
    assert "csrc/cpu/rows.cpp" in to_rebuild(project)
    # what no GPU target reaches is not built again for another
    changed = {**compilers, "DPO_KERNELS_CUDA_ARCHS": "80"}
    assert run(project, "setup.py", "ninja", **changed).returncode == 0
    kernels = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu")}
    assert to_rebuild(project) == {"csrc/bindings.cpp"} | kernels


def test_ccache_is_used_where_it_is(project, compilers, tmp_path):
    cache = write_script(tmp_path / "bin" / "ccache", '#!/bin/sh\nexec "$@"\n')
    path = os.pathsep.join((str(cache.parent), os.environ["PATH"]))
    assert build(project, PATH=path, **compilers).returncode == 0
    text = ninja_file(project).read_text().replace("$\n", "")
    commands = re.findall(r"rule (cxx|nvcc)\s+command = (\S+)", text)
    assert commands == [("cxx", str(cache)), ("nvcc", str(cache))]


def test_compilation_database_has_every_source(project, compilers):
    written = run(project, "setup.py", "-q", "ninja", **compilers)
    database = run(project, "-m", "ninja", "-f", written.stdout.strip(), "-t", "compdb")
    entries = json.loads(database.stdout)
    files = {entry["file"] for entry in entries}
    assert {"csrc/bindings.cpp", "csrc/cpu/rows.cpp", "csrc/cuda/launchers.cu"} <= files
    # csrc/math.h was once found where nvcc's headers meant the system's
    assert not any(" -I" in entry["command"] for entry in entries)


def test_without_a_compiler_the_package_has_its_other_backends(project, tmp_path):
    stale = project / "dpo_kernels" / f"_C{build_helpers.EXTENSION_SUFFIX}"
    stale.touch()
    done = build(project, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    reason = "no C++ compiler was found (looked for CXX, c++, g++ and clang++)"
    told = [line for line in done.stderr.splitlines() if line.startswith("dpo_kernels:")]
    assert told == [
        f"dpo_kernels: {reason}: installing without the compiled module, with Triton and PyTorch"
    ]
    assert not stale.exists()
    code = "import dpo_kernels, json; print(json.dumps(dpo_kernels.available_backends()))"
    backends = json.loads(run(project, "-c", code).stdout)
    assert backends["torch"] is None
    for name in ("cpu", "cuda"):
        said = f"the package was installed without its compiled module: {reason}"
        assert backends[name] == said


@pytest.mark.parametrize("mode", ["off", "require", "no"])
def test_build_modes(project, tmp_path, mode):
    done = build(project, PATH=str(tmp_path), DPO_KERNELS_BUILD=mode)
    if mode == "off":
        assert done.returncode == 0
        assert record(project) == {"module": "DPO_KERNELS_BUILD was off"}
    else:
        assert done.returncode == 1
        assert f"DPO_KERNELS_BUILD={mode}" in done.stderr


def test_compiler_that_is_not_there_fails(project):
    done = build(project, CXX="/no/such/c++")
    assert done.returncode == 1
    assert "CXX=/no/such/c++ was not found" in done.stderr


def test_compiler_that_fails_fails_the_build(project, tmp_path):
    broken = write_script(tmp_path / "c++", "#!/bin/sh\necho no >&2\nexit 1\n")
    done = build(project, CXX=str(broken), DPO_KERNELS_CUDA_ARCHS="")
    assert done.returncode == 1
    assert "the build failed" in done.stderr
    assert not list((project / "dpo_kernels").glob("_C*.so"))


# the two ways in which device code may call a function that is for the host alone
@pytest.mark.parametrize("qualifier", ["", "constexpr"])
def test_device_code_cannot_call_host_functions(project, tmp_path, qualifier):
    written = run(project, "setup.py", "ninja", DPO_KERNELS_CUDA_ARCHS="80")
    if written.returncode:
        pytest.skip(written.stderr)
    text = ninja_file(project).read_text().replace("$\n      ", "")
    command = re.search(r"rule nvcc\s+command = (.*)\$flags", text)[1]
    source = tmp_path / "kernel.cu"
    source.write_text(
        f"{qualifier} float on_host(float x) {{ return 2.0f * x; }}\n"
        "__host__ __device__ inline float f(float x) { return on_host(x); }\n"
        "__global__ void kernel(float* p) { p[0] = f(p[0]); }\n"
    )
    command = f"{command} -c {source} -o {tmp_path}/kernel.o"
    done = subprocess.run(command, shell=True, cwd=project, capture_output=True, text=True)
    assert done.returncode != 0
    assert "is not allowed" in done.stderr
