"""Tells whether the compiled CUDA kernels can run; the modules here are what callers share."""

from .extension import build_config, unsupported_reason

__all__ = ["build_config", "unsupported_reason"]
