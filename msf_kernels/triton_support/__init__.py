"""What Triton kernels share, in the modules beside this one, and whether they can run.

Nothing here imports Triton, which takes longer to import than all of this package does. A family's
kernels, and with them Triton, are imported when one of them is first called.
"""

from __future__ import annotations

import functools
import os

import torch

OLDEST = (3, 5)  # 3.4 cannot compile list comprehensions, which kernels of adaLN have


@functools.cache
def unsupported_reason(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on tensors of this device, None where they can."""
    if reason := compiler_unsupported_reason():
        return reason
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA GPU; set TRITON_INTERPRET=1 to run Triton on the CPU"
    if device.type != "cuda":
        return f"the tensors are on {device}; set TRITON_INTERPRET=1 to run Triton there"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"this GPU is sm_{major}{minor}; Triton's bfloat16 needs sm_80 or later"
    return None


def compiler_unsupported_reason() -> str | None:
    """Return why Triton cannot compile the kernels, for whatever GPU; None where it can."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed: {error}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"Triton must be {'.'.join(map(str, OLDEST))} or later, got {triton.__version__}"
    return None


def interpreted() -> bool:
    """Tell whether Triton interprets its kernels on the CPU, which it decides at its import."""
    return os.environ.get("TRITON_INTERPRET") == "1"
