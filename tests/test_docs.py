"""docs/ names what there is, its plain example trains, and docstrings name every argument."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dpo_kernels
from dpo_kernels.losses import F_DIVERGENCES, LOSSES
from dpo_kernels.types import DPOOutput

DOCS = Path(__file__).parent.parent / "docs"
FUNCTIONS = [
    value for name in dpo_kernels.__all__ if inspect.isfunction(value := getattr(dpo_kernels, name))
]
WITH_ARGUMENTS = [function for function in FUNCTIONS if "\nArgs:" in inspect.getdoc(function)]


@pytest.mark.parametrize("function", WITH_ARGUMENTS, ids=lambda function: function.__name__)
def test_docstring_names_every_argument(function):
    text = inspect.getdoc(function)
    section = re.search(r"\nArgs:\n(.*?)(\n\n|\Z)", text, flags=re.DOTALL)[1]
    entries = re.findall(r"^    (\w[^:]*):", section, flags=re.MULTILINE)
    told = {name for entry in entries for name in entry.split(", ")}
    parameters = set(inspect.signature(function).parameters)
    others = {name for name in told if name.lower() == "the others"}
    assert told - others <= parameters
    if not others:
        missing = {name for name in parameters - told if not re.search(rf"\b{name}\b", text)}
        assert not missing


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^::: dpo_kernels\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert set(shown) - {"losses", "linear"} == set(dpo_kernels.__all__)
    assert len(shown) == len(set(shown))


def test_the_reference_has_every_loss():
    text = (DOCS / "api.md").read_text().split("::: dpo_kernels.losses")[1]
    functions = [loss.function for loss in LOSSES.values()] + list(F_DIVERGENCES.values())
    assert re.findall(r"^ +- (\w+)$", text, re.MULTILINE) == [f.__name__ for f in functions]


def test_metrics_are_documented():
    output = DPOOutput(*(torch.zeros(1) for _ in range(6)))
    told = re.findall(r"``(\w+/\w+)``", inspect.getdoc(DPOOutput.metrics))
    assert told == list(output.metrics())


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_what_pages_import_exists(path):
    text = path.read_text()
    named = re.findall(r"^from (dpo_kernels[\w.]*) import (\w+)$", text, re.MULTILINE)
    named += re.findall(r"_component_: (dpo_kernels[\w.]*)\.(\w+)", text)
    for module, name in named:
        assert hasattr(importlib.import_module(module), name)
    # pages are made of files
    for name in re.findall(r'--8<-- "(.*)"', text):
        assert (DOCS / name).is_file()


@pytest.mark.parametrize("path", sorted(DOCS.glob("examples/*.py")), ids=lambda path: path.name)
def test_examples_are_on_a_page(path):
    assert f'--8<-- "examples/{path.name}"' in (DOCS / "examples.md").read_text()
    assert ast.get_docstring(ast.parse(path.read_text()))


class TinyModel(nn.Module):
    """The attributes of a causal language model of transformers that the example uses."""

    def __init__(self, vocab: int = 40, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.mixer = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def model(self, input_ids, attention_mask):
        x = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        # every token sees those before it
        return SimpleNamespace(last_hidden_state=torch.tanh(self.mixer(x.cumsum(1))))


class Letters:
    """A tokenizer of letters, with a token that begins every text."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        begin = [2] if add_special_tokens else []
        return {"input_ids": begin + [3 + ord(letter) - ord("a") for letter in text]}


def test_own_loop_trains():
    example = runpy.run_path(str(DOCS / "examples" / "own_loop.py"))
    pairs = [
        {"prompt": "ab", "chosen": "cde", "rejected": "xyzxy"},
        {"prompt": "b", "chosen": "cd", "rejected": "zy"},
    ]
    batch = example["collate"](pairs, Letters())
    assert batch["input_ids"].shape == (4, 9)
    # the letters of the answer and its end
    assert (batch["labels"] != -100).sum(-1).tolist() == [4, 3, 6, 3]
    assert batch["labels"][1].tolist() == [-100, -100, 5, 6, 1, -100, -100, -100, -100]
    assert batch["attention_mask"].sum(-1).tolist() == [7, 5, 9, 5]
    short = example["collate"](pairs, Letters(), max_length=4)
    assert short["labels"][2].tolist() == batch["labels"][2, 5:].tolist()

    torch.manual_seed(0)
    losses = example["train"](TinyModel(), [batch] * 30, learning_rate=1e-2)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.3
