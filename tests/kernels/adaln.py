"""The equations of adaLN in PyTorch, and what its tests call it with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from numerics import normal

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# dtypes of x, and of y and the modulation; under autocast x is the wider one.
DTYPES = (FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32), (FP32, BF16)


NORMS = {"layer": F.layer_norm, "rms": F.rms_norm}


def eager_adaln(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, norm: str = "layer"
) -> Tensor:
    return NORMS[norm](x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


def eager_gate(x: Tensor, y: Tensor, gate: Tensor, y_bias: Tensor | None = None) -> Tensor:
    return x + gate[:, None] * (y if y_bias is None else y + y_bias)


def modulation(rows: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Three strided views of one (B, 6 D) tensor, as a chunk of the modulation gives them."""
    views = normal(rows, 6 * channels, dtype=dtype).chunk(6, -1)[1:4]
    assert channels == 1 or rows == 1 or not views[0].is_contiguous()
    return tuple(view.detach().requires_grad_() for view in views)
