"""Triton's interpreter, made twice as fast."""

from __future__ import annotations

import functools

from dpo_kernels.compat import triton_unsuitable


def patch_once() -> None:
    """The functions that a kernel calls find the language as its launch has patched it.

    Every call of one patches the whole of triton.language again, though a launch has done it and
    undoes it: half of an interpreted kernel's time.
    """
    if triton_unsuitable() is not None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    # private to Triton: where it has another name, tests are only slower
    if patch is None:
        return

    @functools.wraps(patch)
    def unless_patched(fn):
        names = fn.__globals__.values()
        languages = [x for x in (tl, tl.core) if any(name is x for name in names)]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return patch(fn)
        return None

    interpreter._patch_lang = unless_patched
