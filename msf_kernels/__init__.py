"""Fused operators for diffusion transformers.

Each operator has one schema, one gradient and one or more backends; see `backend`.
"""

from .adaln.op import adaln_modulate, gate_residual, gate_residual_adaln
from .attention.op import attention
from .attention.rope import rope_2d
from .bias_gelu.op import bias_gelu
from .cuda_support import build_config
from .dispatch import (
    BackendUnavailable,
    available_backends,
    backend,
    backends_of,
    chosen_backend,
    explain_choice,
    requested_backend,
)
from .euler.op import guided_euler_merge, guided_euler_step
from .interpolation.op import flow_interpolate
from .pyramid.op import pyramid_merge, pyramid_split
from .qk_norm_rope.op import qk_norm_rope
from .tokens.op import merge_tokens

OPERATORS = (
    "adaln_modulate",
    "gate_residual",
    "gate_residual_adaln",
    "attention",
    "qk_norm_rope",
    "bias_gelu",
    "pyramid_split",
    "pyramid_merge",
    "merge_tokens",
    "flow_interpolate",
    "guided_euler_step",
    "guided_euler_merge",
)

__all__ = [
    "OPERATORS",
    "BackendUnavailable",
    "adaln_modulate",
    "attention",
    "available_backends",
    "backend",
    "backends_of",
    "bias_gelu",
    "build_config",
    "chosen_backend",
    "explain_choice",
    "flow_interpolate",
    "gate_residual",
    "gate_residual_adaln",
    "guided_euler_merge",
    "guided_euler_step",
    "merge_tokens",
    "pyramid_merge",
    "pyramid_split",
    "qk_norm_rope",
    "requested_backend",
    "rope_2d",
]
