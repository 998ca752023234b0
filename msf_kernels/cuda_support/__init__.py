"""What callers of the CUDA kernels share, and whether the compiled kernels can run."""

from .extension import build_config, unsupported_reason

__all__ = ["build_config", "unsupported_reason"]
