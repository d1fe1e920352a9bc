"""What the build left out and why: the text behind "unavailable" for the compiled backends."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PACKAGE = Path(__file__).parent


def left_out() -> dict[str, str]:
    """setup.py's record: reasons by what is missing ("module", "cuda", "targets")."""
    try:
        return json.loads((PACKAGE / "_build.json").read_text())
    except OSError:
        return {}


def why_no_module(error: ImportError) -> str:
    """Which of the causes it is that there is no compiled module, and what cures it."""
    built = sorted(path.name for path in PACKAGE.glob("_C*.so"))
    ours = [name for name in built if name.removeprefix("_C") in EXTENSION_SUFFIXES]
    if ours:
        return f"the compiled module {ours[0]} did not load: {error}"
    reason = left_out().get("module")
    if reason:
        return f"the package was installed without its compiled module: {reason}"
    if built:
        return (
            f"the compiled module is for another Python ({', '.join(built)}), this is "
            f"{platform.python_version()}: install dpo_kernels with this one"
        )
    if not (PACKAGE.parent / "setup.py").is_file():
        return f"the package was installed without its compiled module: {error}"
    cure = "`pip install -e .` there builds it"
    elsewhere = installed_elsewhere()
    if elsewhere is None:
        return f"nothing was built in the source folder {PACKAGE.parent}: {cure}"
    return (
        f"the source folder {PACKAGE.parent}, where nothing was built, hides the dpo_kernels "
        f"installed in {elsewhere}: run from another folder, or {cure}"
    )


def installed_elsewhere() -> Path | None:
    """The folder of an installed copy that this package is imported instead of."""
    for distribution in metadata.distributions(name="dpo_kernels"):
        folder = Path(str(distribution.locate_file("dpo_kernels")))
        if folder.is_dir() and folder.resolve() != PACKAGE.resolve():
            return folder.parent
    return None


def why_no_cuda() -> str:
    return f"the package was built without CUDA: {left_out().get('cuda', 'no nvcc')}"
