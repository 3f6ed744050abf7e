"""Triton's interpreter without work that it does anew for each call of a function of a kernel.

It looks through all names of `triton.language` for those to replace, however often the same function is called, and
lists all types for each array, and computes whether each sum overflows, for an assertion that is off: together two
thirds of a kernel's time where tensors are small. Results stay the same.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any


def install() -> None:
    """Make the interpreter quicker, in releases of Triton whose interpreter works that way."""
    import triton.language as tl
    from triton.runtime import interpreter

    names = (
        "_patch_builtin", "_patch_attr", "_patch_lang", "_LangPatchScope", "_get_np_dtype", "interpreter_builder",
    )  # fmt: skip
    if not all(hasattr(interpreter, name) for name in names):
        return
    keep_builtins(interpreter, tl)
    keep_languages(interpreter, tl)
    keep_dtypes(interpreter, tl)
    leave_out_overflow(interpreter)


def keep_builtins(interpreter: Any, tl: Any) -> None:
    """Look for the functions to replace once."""
    places = (tl, tl.core, tl.math, tl.core.tensor, getattr(tl.core, "tensor_descriptor_base", tl.core.tensor))
    builtins: dict[Any, list[tuple[str, Any]]] = {
        place: [(name, member) for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]
        for place in places
    }
    patch_builtin = interpreter._patch_builtin

    def patch_known(place: Any, *rest: Any) -> None:
        if place not in builtins:
            patch_builtin(place, *rest)
            return
        known = builtins[place]
        if known and getattr(place, known[0][0]) is known[0][1]:  # else a kernel is under way, and all are replaced
            for name, member in known:
                interpreter._patch_attr(place, name, member, *rest)

    interpreter._patch_builtin = patch_known


def keep_languages(interpreter: Any, tl: Any) -> None:
    """Replace nothing again where one function of a kernel calls another."""
    patch_lang = interpreter._patch_lang
    languages: dict[Any, list[Any]] = {}

    def patch_new(fn: Any) -> Any:
        if fn not in languages:
            modules = [value for value in fn.__globals__.values() if inspect.ismodule(value)]
            languages[fn] = [module for module in modules if module in (tl, tl.core)]
        found = languages[fn]
        if found and all(language.static_print is print for language in found):
            return interpreter._LangPatchScope()
        return patch_lang(fn)

    interpreter._patch_lang = patch_new


def keep_dtypes(interpreter: Any, tl: Any) -> None:
    """Keep NumPy's dtype of each type."""
    np_dtype = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def known_np_dtype(of: Any) -> Any:
        if isinstance(of.scalar, tl.core.pointer_type):
            return np_dtype(of)
        name = of.scalar.name
        if name not in known:
            known[name] = np_dtype(of)
        return known[name]

    interpreter._get_np_dtype = known_np_dtype


def leave_out_overflow(interpreter: Any) -> None:
    """Compute no conditions of overflow, in 64 bits for each sum and product, that nobody asserts."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
