"""What may import what: the oracle shares no code with what it checks."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import dpo_kernels
from dpo_kernels.linear.arguments import LinearDPOArguments

PACKAGE = Path(dpo_kernels.__file__).parent
# the commands and the demo compare with the oracle; dpo_kernels re-exports it as a public name
MAY_USE_THE_ORACLE = ("cli", "demo")
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module of the package that a file imports, anywhere in it, as dotted names."""
    parents = ("dpo_kernels", *path.parent.parts)
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # one dot is the file's own package, every further one a package up
            base = parents[: len(parents) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("dpo_kernels")}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_production_never_imports_the_oracle(path):
    if path.parts[0] in MAY_USE_THE_ORACLE or path == Path("__init__.py"):
        return
    assert "dpo_kernels.reference" not in imported(path)


def test_the_oracle_shares_no_code():
    """Its results come in the same types; nothing else of the package reaches it."""
    assert imported(Path("reference.py")) == {
        "dpo_kernels.types",
        "dpo_kernels.types.DPOOutput",
        "dpo_kernels.types.TokenStats",
    }


def test_imports_are_found():
    """The walk sees relative imports, absolute ones, and those inside functions."""
    assert "dpo_kernels.reference" in imported(Path("__init__.py"))
    assert "dpo_kernels.backends.batch" in imported(Path("backends/torch.py"))
    assert "dpo_kernels.sequences" in imported(Path("backends/torch.py"))
    assert "dpo_kernels.cli.parity" in imported(Path("__main__.py"))


@pytest.mark.parametrize("package", ("linear", "backends/triton"))
def test_private_names_stay_inside_their_package(package):
    """``from .x import _name`` only between files of one folder."""
    for path in MODULES:
        for name in imported(path):
            *module, last = name.split(".")
            if last.startswith("_") and last not in ("_C", "__version__"):
                assert path.parent.parts == tuple(module[1 : 1 + len(path.parent.parts)])


def test_the_overloads_of_linear_dpo_loss_take_its_keywords():
    """A keyword that they lack is an error to a type checker, though the call runs."""
    parameters = inspect.signature(dpo_kernels.linear_dpo_loss).parameters.values()
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert keywords.pop("return_stats") == "bool"
    typed = {k: v.__forward_arg__ for k, v in LinearDPOArguments.__annotations__.items()}
    assert typed == keywords
