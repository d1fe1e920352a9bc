"""Preference pairs from the docstrings of Python's standard library.

The prompt is a function's signature and the chosen answer its own docstring. The rejected one is
the same docstring with its words shuffled, or the docstring of another function. The sources are
parsed, never imported.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .data import PreferencePair

_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_MIN_WORDS, _MAX_WORDS = 8, 48
_SHUFFLED_SHARE = 0.75


@dataclass(frozen=True)
class Documented:
    module: str  # top-level, without the underscore of a Python twin: _pyio and pyio are one
    signature: str
    docstring: str


@dataclass(frozen=True)
class Corpus:
    train: list[PreferencePair]
    held_out: list[PreferencePair]
    train_modules: frozenset[str]
    held_out_modules: frozenset[str]


def docstring_corpus(seed: int = 0, held_out_share: float = 0.15) -> Corpus:
    """Pairs whose train and held-out modules are disjoint; the same ones for the same library."""
    functions = list(documented_functions(Path(sysconfig.get_paths()["stdlib"])))
    rng = random.Random(seed)
    modules = sorted({function.module for function in functions})
    rng.shuffle(modules)
    held_out_modules: set[str] = set()
    wanted = held_out_share * len(functions)
    for module in modules:
        members = sum(function.module == module for function in functions)
        if members <= wanted:
            held_out_modules.add(module)
            wanted -= members
    parts = ([], [])
    for function in functions:
        parts[function.module in held_out_modules].append(function)
    train, held_out = (make_pairs(part, rng) for part in parts)
    return Corpus(
        train, held_out, frozenset(modules) - held_out_modules, frozenset(held_out_modules)
    )


def documented_functions(root: Path) -> Iterator[Documented]:
    """Functions under ``root`` whose docstring has a few words, each docstring once."""
    seen = set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED.intersection(parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        module = parts[0].lstrip("_")
        for signature, docstring in _functions(tree, ""):
            words = docstring.split()
            text = " ".join(words[:_MAX_WORDS])
            if len(words) >= _MIN_WORDS and text not in seen:
                seen.add(text)
                yield Documented(module, signature, text)


def _functions(node: ast.AST, owner: str) -> Iterator[tuple[str, str]]:
    """(signature, docstring) of every function below ``node``, in the order of the source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(child)
            if docstring:
                yield f"def {owner}{child.name}({ast.unparse(child.args)}):\n", docstring
            yield from _functions(child, owner)
        else:
            yield from _functions(child, owner)


def make_pairs(functions: list[Documented], rng: random.Random) -> list[PreferencePair]:
    """One pair a function, in random order; answers of others come from the same functions."""
    pairs = []
    for function in functions:
        if rng.random() < _SHUFFLED_SHARE:
            kind, rejected = "shuffled words", _shuffled(function.docstring, rng)
        else:
            kind, rejected = "another's docstring", _other(function, functions, rng)
        pairs.append(PreferencePair(function.signature, function.docstring, rejected, kind))
    rng.shuffle(pairs)
    return pairs


def _shuffled(text: str, rng: random.Random) -> str:
    words = text.split()
    # some texts repeat one word, and then no order differs
    for _ in range(8):
        rng.shuffle(words)
        if " ".join(words) != text:
            break
    return " ".join(words)


def _other(function: Documented, functions: list[Documented], rng: random.Random) -> str:
    while True:
        other = rng.choice(functions)
        if other.docstring != function.docstring or len(functions) == 1:
            return other.docstring
