"""The CPU kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and ThreadSanitizer, and
a test of that test: each must object to a fault put into the kernels.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fuzz import sanitized

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not shutil.which(sanitized.compiler()), reason="no C++ compiler")

# what each sanitizer must notice: a line of the kernels and what it is made into
FAULTS = {
    "address": (
        "backward.cpp",
        "(end - begin) * sizeof(T)",
        "(end - begin + 1) * sizeof(T)",
    ),
    "thread": (
        "threads.cpp",
        "helper_left_.wait(lock, [&] { return job.active == 0; });",
        "helper_left_.wait(lock, [&] { return job.active >= 0; });",
    ),
}


def link(kind: str, objects, program: Path) -> Path:
    words = [*sanitized.command_line(kind), *map(str, objects), "-o", str(program)]
    subprocess.run(words, check=True)
    return program


@pytest.fixture(scope="module", params=FAULTS)
def compiled(request, tmp_path_factory) -> tuple[str, dict[str, Path]]:
    """(sanitizer, the object files by the name of their source)."""
    kind = request.param
    objects = {f"{path.stem}.cpp": path for path in sanitized.objects(kind)}
    driver = tmp_path_factory.mktemp("driver") / "main.o"
    source = ROOT / "tests/cpu_driver/main.cpp"
    subprocess.run([*sanitized.command_line(kind), "-c", source, "-o", driver], check=True)
    return kind, objects | {"main.cpp": driver}


def execute(program: Path) -> subprocess.CompletedProcess:
    # address space randomisation of more bits than ThreadSanitizer maps stops it before main
    prefix = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run([*prefix, str(program)], capture_output=True, text=True)


def execute_or_skip(program: Path) -> subprocess.CompletedProcess:
    done = execute(program)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot map its memory here")
    return done


def test_kernels(tmp_path, compiled):
    sanitizer, objects = compiled
    done = execute_or_skip(link(sanitizer, objects.values(), tmp_path / "main"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "baseline" in done.stdout.split()


def test_a_fault_is_noticed(tmp_path, compiled):
    sanitizer, objects = compiled
    name, right, wrong = FAULTS[sanitizer]
    text = (ROOT / "csrc/cpu" / name).read_text()
    assert text.count(right) == 1
    # beside its headers
    faulty, faulty_object = tmp_path / name, tmp_path / "faulty.o"
    faulty.write_text(text.replace(right, wrong).replace('"../', '"'))
    include = f"-I{ROOT / 'csrc/cpu'}"
    compile_one = [*sanitized.command_line(sanitizer), include, "-c", faulty, "-o", faulty_object]
    subprocess.run(compile_one, check=True)
    done = execute_or_skip(
        link(sanitizer, (objects | {name: faulty_object}).values(), tmp_path / "main")
    )
    assert done.returncode != 0
    assert "Sanitizer" in done.stderr, done.stderr[-4000:]
