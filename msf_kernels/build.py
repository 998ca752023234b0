"""Tells what this installation was built with."""

from __future__ import annotations

from typing import Any


def build_config() -> dict[str, Any]:
    """Describe the build of the compiled extension ``msf_kernels._C``.

    Returns:
        ``{"extension": True, "version", "cxx_compiler", "cuda", "cuda_compiler",
        "cuda_architectures"}``: ``cuda`` is whether nvcc took part, ``cuda_compiler`` its version
        or None, ``cuda_architectures`` what it compiles for, e.g. ``["80", "90a"]``.
        Without the extension ``{"extension": False, "reason": ...}``; it is then optional, since
        the reference and Triton backends need no compiled code.
    """
    try:
        import msf_kernels._C as _C
    except ImportError as error:
        return {"extension": False, "reason": str(error)}
    return {"extension": True, **_C.build_config()}
