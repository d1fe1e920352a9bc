"""What a wheel and an sdist hold, and what is said when the compiled module is not there."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dpo_kernels

from .build_helpers import EXTENSION_SUFFIX, ROOT, build, copy_project, fake_cxx, run

for _module in ("setuptools", "pybind11", "ninja"):
    pytest.importorskip(_module, reason="setup.py without pip needs dpo_kernels[build]")

LOAD_ERROR = "from dpo_kernels.backends import native; print(native.load_error())"


@pytest.fixture
def project(tmp_path) -> Path:
    return copy_project(tmp_path / "project")


def load_error(project: Path, **variables: str) -> str:
    done = run(project, "-c", LOAD_ERROR, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def packaged() -> set[str]:
    """The files of the package that users need, as the source tree has them."""
    found = (ROOT / "dpo_kernels").rglob("*")
    kept = (path for path in found if path.suffix in (".py", ".pyi") or path.name == "py.typed")
    return {str(path.relative_to(ROOT)) for path in kept}


def test_wheel_holds_the_package_and_nothing_else(project, tmp_path):
    variables = {"CXX": str(fake_cxx(tmp_path)), "DPO_KERNELS_CUDA_ARCHS": ""}
    done = run(project, "setup.py", "-q", "bdist_wheel", **variables)
    assert done.returncode == 0, done.stderr
    (path,) = (project / "dist").glob("*.whl")
    wheel = zipfile.ZipFile(path)
    metadata = [name for name in wheel.namelist() if ".dist-info/" in name]
    built = {f"dpo_kernels/_C{EXTENSION_SUFFIX}", "dpo_kernels/_build.json"}
    assert set(wheel.namelist()) == packaged() | built | set(metadata)

    (name,) = (name for name in metadata if name.endswith("/METADATA"))
    text = wheel.read(name).decode()
    assert re.search(r"^Version: (.*)$", text, re.MULTILINE)[1] == dpo_kernels.__version__
    required = re.findall(r"^Requires-Dist: ([\w.-]+)(.*)$", text, re.MULTILINE)
    assert [name for name, rest in required if "extra ==" not in rest] == ["torch"]
    assert "Home-page" not in text and "Project-URL" not in text


def test_sdist_builds_and_holds_all_of_csrc(project, tmp_path):
    done = run(project, "setup.py", "-q", "sdist")
    assert done.returncode == 0, done.stderr
    (path,) = (project / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    held = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert packaged() | sources <= held
    assert not any(name.startswith(("tests/", "build/")) for name in held)
    done = build(unpacked, CXX=str(fake_cxx(tmp_path)), DPO_KERNELS_CUDA_ARCHS="")
    assert done.returncode == 0, done.stderr


def test_source_folder_where_nothing_was_built(project):
    said = load_error(project)
    # the tests may run where the package is installed from another folder
    hides = f"the source folder {project}, where nothing was built, hides the dpo_kernels "
    nothing = f"nothing was built in the source folder {project}: `pip install -e .` there builds"
    assert said.startswith((hides, nothing))


def test_source_folder_that_hides_an_installed_copy(project, tmp_path):
    site = tmp_path / "site"
    (site / "dpo_kernels").mkdir(parents=True)
    (site / "dpo_kernels-0.1.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: dpo_kernels\nVersion: 0.1.0\n"
    (site / "dpo_kernels-0.1.0.dist-info" / "METADATA").write_text(metadata)
    said = load_error(project, PYTHONPATH=str(site))
    assert f"hides the dpo_kernels installed in {site}: run from another folder" in said


def test_module_of_another_python(project):
    (project / "dpo_kernels" / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    said = load_error(project)
    assert said.startswith("the compiled module is for another Python (_C.cpython-27-")


def test_module_that_does_not_load(project):
    name = f"_C{EXTENSION_SUFFIX}"
    (project / "dpo_kernels" / name).write_text("no library")
    said = load_error(project)
    assert said.startswith(f"the compiled module {name} did not load: ")
    assert "file too short" in said or "invalid ELF header" in said or "not a mach-o" in said


def test_installed_without_a_record(project):
    (project / "setup.py").unlink()
    said = load_error(project)
    assert said.startswith("the package was installed without its compiled module: ")


def test_build_for_cpu_says_why_there_is_no_cuda():
    module = pytest.importorskip("dpo_kernels._C")
    if module.cuda_archs:
        pytest.skip("this build has the CUDA kernels")
    reason = dpo_kernels.available_backends()["cuda"]
    assert reason.startswith("the package was built without CUDA: ")


@pytest.mark.parametrize(
    ("arguments", "absent", "said"),
    [
        ([], ["rich", "matplotlib"], "python -m dpo_kernels needs rich: pip install rich"),
        (
            ["demo"],
            ["rich", "matplotlib"],
            "python -m dpo_kernels demo needs rich and matplotlib: pip install rich matplotlib",
        ),
        (
            ["demo"],
            ["matplotlib"],
            "python -m dpo_kernels demo needs matplotlib: pip install matplotlib",
        ),
    ],
)
def test_command_line_says_what_to_install(arguments, absent, said):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r})); "
        f"from dpo_kernels.__main__ import main; sys.exit(main({arguments!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, said + "\n")


def test_workflows_cover_the_oldest_and_the_pinned_torch():
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    for name in ("test.yml", "wheels.yml"):
        text = (ROOT / ".github" / "workflows" / name).read_text()
        versions = re.findall(r'"([\d.]+)"', re.search(r"torch: \[(.*)\]", text)[1])
        assert versions[0].startswith(oldest + ".") and versions[-1] == pinned
