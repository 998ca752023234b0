"""The precision in which a device computes matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def bf16_instructions() -> list[str]:
    """Return the names of the instructions by which this CPU computes in bfloat16.

    Without any it is emulated: 115 against 1,319 GFLOP/s on one core.
    """
    found = {
        # Not every torch has these private names; no answer counts as no.
        "AVX512-BF16": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)(),
        "AMX": getattr(torch.cpu, "_is_amx_tile_supported", bool)(),
    }
    return [name for name, present in found.items() if present]


def computes_bf16(device: torch.device) -> bool:
    """Return whether ``device`` has bfloat16 in hardware; a GPU before Ampere emulates it too."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(bf16_instructions())


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return bfloat16 autocast, or a disabled one: ``precision`` is as in ``TrainingConfig``.

    It keeps no casts of weights: inside another autocast they would outlive the weights' next step,
    and a step casts each weight once anyway.
    """
    enabled = precision == "bf16" or (precision == "auto" and computes_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let float32 matrix products round their factors to TF32, as Ampere and newer GPUs can, or
    not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
