"""Every promise names the test that holds it, and the test exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROMISES = [
    line for line in (ROOT / "docs" / "promises.md").read_text().splitlines() if line[:2] == "- "
]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def functions_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda line: line[2:60])
def test_its_test_exists(promise):
    named = NAMED.findall(promise)
    assert named, "a promise that no test holds"
    for path, name in named:
        assert name in functions_in(path), f"{path}::{name}"


def test_there_are_promises():
    assert len(PROMISES) >= 25
