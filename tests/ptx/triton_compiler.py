"""Triton's compiler in a process of its own: requests and answers are lines of JSON.

The process of the tests has Triton's interpreter switched on, under which nothing compiles. The
driver is a stand-in: a target is named, and no GPU is asked for (ASTSource, Triton 3.2 and later).
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def serve() -> None:
    for line in sys.stdin:
        try:
            answer = compile_(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def compile_(request: dict) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import type_canonicalisation_dict

    kernel = getattr(importlib.import_module(request["module"]), request["name"])
    given, signature, constants = request["arguments"], {}, {}
    for parameter in kernel.params:
        kind, value = given.pop(parameter.name)
        if parameter.is_constexpr or (kind == "value" and value is None):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif kind == "tensor":
            signature[parameter.name] = f"*{type_canonicalisation_dict[value]}"
        else:
            signature[parameter.name] = parameter.annotation_type
    options = {name: value for name, (_, value) in given.items()}
    binary = triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget("cuda", request["arch"], 32),
        options=options,
    )
    return {
        "ptx": binary.asm["ptx"],
        "shared": binary.metadata.shared,
        "threads": 32 * binary.metadata.num_warps,
        "signature": signature,
    }


class Compiler:
    """The other end; started when first asked."""

    def __init__(self):
        self._process = None
        self._answers: dict[str, dict] = {}

    def __call__(self, **request) -> dict:
        line = json.dumps(request, sort_keys=True)
        if line not in self._answers:
            self._answers[line] = self._ask(line)
        return self._answers[line]

    def _ask(self, line: str) -> dict:
        if self._process is None:
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.ptx.triton_compiler"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"Triton does not compile it: {answer['error']}")
        return answer


if __name__ == "__main__":
    serve()
