"""What Triton's interpreter is spared in tests: half of its time, without which nothing changes."""

from dataclasses import replace

from triton import language as tl
from triton.runtime import interpreter

_patch = interpreter._patch_lang


def spare() -> None:
    """Patch the language once a launch, and compute no overflows.

    The interpreter replaces the builtins of its language anew at each call of a device function. It
    computes whether integers overflow for the sake of an assertion that only debug mode makes.
    """
    interpreter._patch_lang = _patch_once
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def _patch_once(function):
    modules = (value for value in function.__globals__.values() if value is tl or value is tl.core)
    return _patch(function) if any(tl.core.is_builtin(module.load) for module in modules) else None
