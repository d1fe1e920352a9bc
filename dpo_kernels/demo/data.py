"""Preference pairs, and the reader of TRL's preference format.

A line is a JSON object with ``chosen`` and ``rejected``, and usually ``prompt``: all strings, or
all lists of ``{"role": ..., "content": ...}``. Without ``prompt``, what chosen and rejected share
at their start is the prompt. Other keys are ignored.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

_LISTED_ERRORS = 20


class DataError(ValueError):
    """A file that cannot be used; the message names every bad line by its number."""


@dataclass(frozen=True)
class PreferencePair:
    prompt: str
    chosen: str
    rejected: str
    kind: str = ""  # how the rejected answer came about, where that is known


def read_preferences(path: Path) -> list[PreferencePair]:
    """The pairs of a JSONL file; blank lines are skipped. Raises DataError for anything wrong."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    pairs, errors = [], []
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            pairs.append(parse_line(line))
        except DataError as error:
            errors.append(f"{path}:{number}: {error}")
    if errors:
        more = len(errors) - _LISTED_ERRORS
        listed = errors[:_LISTED_ERRORS] + ([f"and {more} more bad lines"] if more > 0 else [])
        raise DataError("\n".join(listed))
    if not pairs:
        raise DataError(f"{path}: no pairs in it")
    return pairs


def parse_line(line: bytes) -> PreferencePair:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON at column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise DataError("not usable JSON: nested too deeply") from error
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, got {_kind(row)}")
    for key in ("chosen", "rejected"):
        if key not in row:
            raise DataError(f"{key!r} is missing; found {_names(row)}")
    given = {key: row[key] for key in ("prompt", "chosen", "rejected") if row.get(key) is not None}
    for key in ("chosen", "rejected"):
        if key not in given:
            raise DataError(f"{key!r}: expected text or messages, got null")
    if all(isinstance(value, str) for value in given.values()):
        parts = given
    elif all(isinstance(value, list) for value in given.values()):
        parts = {key: _messages(key, value) for key, value in given.items()}
    else:
        kinds = ", ".join(f"{key} is {_kind(value)}" for key, value in given.items())
        raise DataError(f"expected strings, or lists of messages, in all columns; {kinds}")
    prompt, chosen, rejected = _split_prompt(parts)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            where = "" if "prompt" in parts else " after the prompt that both answers share"
            raise DataError(f"{key!r}: nothing in it{where}")
    # one string a message: they are joined only after the shared prompt is found
    return PreferencePair("".join(prompt), "".join(chosen), "".join(rejected))


def _split_prompt(parts: dict) -> tuple:
    chosen, rejected = parts["chosen"], parts["rejected"]
    if "prompt" in parts:
        return parts["prompt"], chosen, rejected
    shared = len(os.path.commonprefix([chosen, rejected]))
    if isinstance(chosen, str):
        # answers begin at a word: half a word is no prompt
        while shared > 0 and not chosen[shared - 1].isspace():
            shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _messages(key: str, messages: list) -> list[str]:
    """One string a message, its role included."""
    texts = []
    for index, message in enumerate(messages):
        where = f"{key}[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{where}: expected a message, got {_kind(message)}")
        for field in ("role", "content"):
            if field not in message:
                raise DataError(f"{where}: {field!r} is missing; found {_names(message)}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str):
            raise DataError(f"{where}: role is {_kind(role)}, expected a string")
        texts.append(f"<{role}>\n{_content(where, content)}\n")
    return texts


def _content(where: str, content) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}: content is {_kind(content)}, expected a string")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise DataError(f"{where}: content has a part that is not text")
    return "".join(part["text"] for part in content)


def _names(row: dict) -> str:
    return ", ".join(map(repr, row)) or "nothing"


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
