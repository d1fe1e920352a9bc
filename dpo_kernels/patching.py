"""One call that puts this package into a trainer, and takes it out again.

    import dpo_kernels
    dpo_kernels.patch("trl")

A trainer is changed at its seams: names that are looked up when a loss is made. The module that
TRAINERS names for it declares them; here they are found, checked, bound and undone. No trainer is
imported before patch() is called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch


class Trainer(NamedTuple):
    package: str  # as import names it
    distribution: str  # as pip names it
    adapter: str  # whose seams(version) are bound


TRAINERS = {
    "trl": Trainer("trl", "trl", "trl_seams"),
    "llamafactory": Trainer("llamafactory", "llamafactory", "llama_factory"),
    "openrlhf": Trainer("openrlhf", "openrlhf", "openrlhf"),
    "torchtune": Trainer("torchtune", "torchtune", "torchtune"),
    "nemo_rl": Trainer("nemo_rl", "nemo-rl", "nemo_rl"),
    "verl": Trainer("verl", "verl", "verl"),
    "liger": Trainer("liger_kernel", "liger-kernel", "liger"),
    # a script, no package: patch() finds it where it is given, or as the program that runs
    "deepspeed_chat": Trainer("", "", "deepspeed_chat"),
}


@dataclass(frozen=True)
class Seam:
    """A name of a trainer, and what takes its place.

    Args:
        where: ``module:name``, or ``module:Class.name``.
        replace: makes the replacement from what is there.
        parameters: the names that it takes, in order: a trainer that takes others is refused. None:
            the trainer does not call it.
        gain: what the replacement is good for, as printed.
        owner: package that what is there has to come from, if not that of the module.
        optional: a trainer without it is patched at its other seams.
        module: the module of ``where``, if it cannot be imported by its name.
        shared: whether other modules that imported the name get the replacement as well.
    """

    where: str
    replace: Callable[[Any], Any]
    parameters: tuple[str, ...] | None
    gain: str
    owner: str | None = None
    optional: bool = False
    module: ModuleType | None = None
    shared: bool = True


class Binding(NamedTuple):
    seam: Seam
    holder: Any  # the module or class that has the name
    name: str
    original: Any
    replacement: Any


class Patch:
    """What patch() replaced; ``undo()``, or the end of a with statement, puts it back."""

    def __init__(self, trainer: str, version: str | None, bindings: Sequence[Binding]):
        self.trainer = trainer
        self.version = version
        self.bindings = list(bindings)
        self.parts: list[Patch] = []  # of a patch of every trainer that is installed
        self.left_out: list[str] = []  # what is as it was, and why
        self.undone = False

    def undo(self) -> None:
        """Binds every name back to what was there. Does nothing the second time.

        Raises:
            RuntimeError: something else was bound to one of them since; nothing is changed then.
        """
        patches = [patched for patched in (self, *self.parts) if not patched.undone]
        for patched in patches:
            for seam, holder, name, _, replacement in patched.bindings:
                if vars(holder).get(name) is not replacement:
                    raise RuntimeError(
                        f"{seam.where} was bound again after patch({patched.trainer!r}); "
                        "undo that first"
                    )
        for patched in patches:
            for seam, holder, name, original, replacement in reversed(patched.bindings):
                _bind(seam, holder, name, replacement, original)
            patched.undone = True
            if _active.get(patched.trainer) is patched:
                del _active[patched.trainer]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<dpo_kernels patch of {self}>"

    def __str__(self) -> str:
        if self.parts:
            return "\n".join([*(str(part) for part in self.parts), *self.left_out])
        named = f"{self.trainer} {self.version or ''}".rstrip()
        lines = [f"  {seam.where}: {seam.gain}" for seam, *_ in self.bindings]
        if not lines:
            lines = ["  nothing: it was replaced before"]
        state = "replaced, and put back" if self.undone else "replaced"
        left = [f"  as it was: {reason}" for reason in self.left_out]
        return "\n".join([f"{named}: {state}", *lines, *left])


# trainer -> the patch that holds it
_active: dict[str, Patch] = {}


def active(trainer: str) -> Patch | None:
    return _active.get(trainer)


def patch(trainer: str | None = None, *, module: Any = None, verbose: bool = True) -> Patch:
    """Replaces the log-probs and losses of a trainer by this package's.

    What was imported from the trainer before is replaced too. A trainer that is patched already
    stays as it is, and the patch that comes back then undoes nothing. In a trainer that starts
    processes of its own (Ray), it has to be called in each of them.

    Args:
        trainer: "trl", "llamafactory", "openrlhf", "torchtune", "nemo_rl", "verl", "liger" or
            "deepspeed_chat"; None: every one that is installed, but deepspeed_chat.
        module: for "deepspeed_chat", the imported script; by default the program that runs.
        verbose: prints what was replaced, on the first rank.

    Returns:
        A Patch, which says what was replaced. ``undo()``, or the end of a with statement over it,
        puts it back.

    Raises:
        ValueError: a name that is none of these.
        ImportError: the trainer is not installed, or has no function that this package knows.
        RuntimeError: another package has replaced such a function already.
    """
    if trainer is not None and trainer not in TRAINERS:
        raise ValueError(f"trainer: expected one of {', '.join(TRAINERS)}, got {trainer!r}")
    if module is not None and trainer != "deepspeed_chat":
        raise ValueError(f'module: only trainer="deepspeed_chat" takes one, got {trainer=}')
    patched = _patch_installed() if trainer is None else _patch_one(trainer, module)
    if verbose and os.environ.get("RANK", "0") == "0":
        print(f"dpo_kernels: {patched}", file=sys.stderr)
    return patched


def _patch_installed() -> Patch:
    found = [
        name
        for name, trainer in TRAINERS.items()
        if trainer.package and importlib.util.find_spec(trainer.package) is not None
    ]
    everything = Patch("every installed trainer", None, ())
    for name in found:
        try:
            everything.parts.append(_patch_one(name))
        except ImportError as error:
            everything.left_out.append(f"{name}: as it was ({error})")
        except RuntimeError:
            everything.undo()
            raise
    if not everything.parts:
        packages = ", ".join(trainer.package for trainer in TRAINERS.values() if trainer.package)
        reasons = everything.left_out or [f"none of {packages} is installed"]
        raise ImportError("patch() found nothing to patch: " + "; ".join(reasons))
    return everything


def _patch_one(name: str, module: Any = None) -> Patch:
    trainer = TRAINERS[name]
    version = _version(name, trainer)
    if name in _active:
        return Patch(name, version, ())
    adapter = importlib.import_module(f".integrations.{trainer.adapter}", __package__)
    seams = adapter.seams(version) if trainer.package else adapter.seams(module)
    found, missing = [], []
    for seam in seams:
        try:
            found.append(_prepare(seam, name, version))
        except ImportError as error:
            if not seam.optional:
                raise
            missing.append(str(error))
    if not found:
        raise ImportError(f"patch({name!r}) found nothing to patch: " + "; ".join(missing))
    patched = Patch(name, version, [binding for binding in found if binding is not None])
    patched.left_out = missing
    if patched.bindings:
        # after every check, so that a patch is whole or not there
        for seam, holder, attribute, original, replacement in patched.bindings:
            _bind(seam, holder, attribute, original, replacement)
        _active[name] = patched
    return patched


def _version(name: str, trainer: Trainer) -> str | None:
    if not trainer.package:
        return None
    if importlib.util.find_spec(trainer.package) is None:
        raise ImportError(
            f"patch({name!r}) needs {trainer.package}: pip install {trainer.distribution}"
        )
    try:
        return importlib.metadata.version(trainer.distribution)
    except importlib.metadata.PackageNotFoundError:
        # a checkout on the path
        return getattr(importlib.import_module(trainer.package), "__version__", None)


def _prepare(seam: Seam, trainer: str, version: str | None) -> Binding | None:
    """The seam as it is found, checked, and its replacement; None if that is there already."""
    named = f"{trainer} {version or ''}".rstrip()
    path, _, attribute = seam.where.partition(":")
    holder: Any = seam.module
    if holder is None:
        try:
            holder = importlib.import_module(path)
        except ImportError as error:
            raise ImportError(f"{named}: {path} cannot be imported: {error}") from error
    *classes, name = attribute.split(".")
    for part in classes:
        holder = getattr(holder, part, None)
    original = vars(holder).get(name) if holder is not None else None
    if original is None and isinstance(holder, ModuleType):
        # a lazy module has its names on request
        original = getattr(holder, name, None)
    if original is None:
        raise ImportError(f"{named} has no {path}.{attribute} to replace")
    owner = seam.owner or path.partition(".")[0]
    comes_from = (getattr(original, "__module__", None) or "").partition(".")[0]
    if comes_from == __package__:
        return None
    if comes_from != owner:
        raise RuntimeError(
            f"{path}.{attribute} is not {trainer}'s own but {original!r}; undo that patch first"
        )
    found = _parameters(original) if seam.parameters is not None else ()
    if found != (seam.parameters or ()):
        raise ImportError(
            f"{named} has another {path}.{attribute} than this package knows: it takes "
            f"{', '.join(found)}; expected {', '.join(seam.parameters or ())}"
        )
    return Binding(seam, holder, name, original, seam.replace(original))


def _parameters(function: Any) -> tuple[str, ...]:
    if inspect.isclass(function) and issubclass(function, torch.autograd.Function):
        return tuple(inspect.signature(function.forward).parameters)[1:]
    return tuple(inspect.signature(function).parameters)


def _bind(seam: Seam, holder: Any, name: str, old: Any, new: Any) -> None:
    """Binds the name, in the modules that imported it too where the seam is shared."""
    setattr(holder, name, new)
    if isinstance(holder, ModuleType) and seam.shared:
        for path, module in list(sys.modules.items()):
            namespace = getattr(module, "__dict__", None)
            # this package's own functions have the names of those that they replace
            ours = path.partition(".")[0] == __package__
            if not ours and isinstance(namespace, dict) and namespace.get(name) is old:
                namespace[name] = new
