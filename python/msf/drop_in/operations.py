"""What accelerated blocks are made of: our operators on the weights of other people's layers.

B, N, D, H, d are batch, tokens, channels, heads, channels of a head. A branch is what attention or
an MLP adds to the stream: its last product (B, N, D), and the bias (D,) that the gate adds to it,
or None where the product has it already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msf_kernels import (
    adaln_modulate,
    attention,
    bias_gelu,
    gate_residual,
    gate_residual_adaln,
)

from ..rotary import in_halves, qk_in_halves
from ..transformer import handed_on
from .structure import does_nothing, hooks_of, is_norm, is_rms, kind, refuse_change

Branch = tuple[Tensor, Tensor | None]


def adaln(norm: Any, x: Tensor, shift: Tensor, scale: Tensor, rounding: str) -> Tensor:
    """Return norm(x) * (1 + scale) + shift; shift and scale are (B, D) or (1, D)."""
    if not _is_fused(norm, rounding):
        return norm(x) * (1 + scale[:, None]) + shift[:, None]
    shift, scale = _with_weights(norm, shift, scale)
    rounding = _possible(rounding, x, shift, scale)
    return adaln_modulate(x, shift, scale, rounding=rounding, **_norm_options(norm))


def gate(x: Tensor, branch: Branch, gate: Tensor, rounding: str) -> Tensor:
    """Return x + gate * branch."""
    y, bias = branch
    rounding = _possible(rounding, x, y, gate, bias)
    return gate_residual(x, y, gate, y_bias=bias, rounding=rounding)


def gate_adaln(
    norm: Any,
    x: Tensor,
    branch: Branch,
    gate_of_branch: Tensor,
    shift: Tensor,
    scale: Tensor,
    rounding: str,
) -> tuple[Tensor, Tensor]:
    """Return what `gate` makes of x, and what `adaln` makes of that."""
    if not _is_fused(norm, rounding):
        x = gate(x, branch, gate_of_branch, rounding)
        return x, adaln(norm, x, shift, scale, rounding)
    y, bias = branch
    shift, scale = _with_weights(norm, shift, scale)
    rounding = _possible(rounding, x, y, gate_of_branch, shift, scale, bias)
    return gate_residual_adaln(
        x,
        y,
        gate_of_branch,
        shift,
        scale,
        y_bias=bias,
        rounding=rounding,
        **_norm_options(norm),
    )


def weights(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer that is not called. Raise ValueError where it has come to
    be more than these: another in its place, as LoRA puts, or hooks."""
    check_not_called(layer, isinstance(layer, nn.Linear))
    return layer.weight, handed_on(layer.bias)


def check_not_called(layer: Any, is_known: bool = True) -> None:
    """Raise ValueError where a layer that is not called has come to be one of another kind, or to
    have hooks."""
    if what := hooks_of(layer):
        refuse_change(f"a {kind(layer)} with {what}")
    if not is_known:
        refuse_change(f"a {kind(layer)}")


def check_drops_nothing(layer: Any) -> None:
    """Raise ValueError where a dropout that is not called has come to drop, or to have hooks."""
    if layer is not None:
        check_not_called(layer)
        if not does_nothing(layer):
            refuse_change(f"a {layer}")


def last_product(layer: Any, x: Tensor) -> Branch:
    """Return the branch that ends with this layer, whose bias the gate adds."""
    weight, bias = weights(layer)
    return F.linear(x, weight), bias


def gelu_mlp(first: Any, approximate: str, second: Any, x: Tensor) -> Branch:
    """Return the branch of an MLP of two layers with a GELU in between."""
    weight, bias = weights(first)
    return last_product(second, bias_gelu(F.linear(x, weight), bias, approximate=approximate))


def self_attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    q_norm: Any = None,
    k_norm: Any = None,
    rope: Any = None,
) -> Tensor:
    """Return softmax attention (B, N, H * d) of x (B, N, D).

    Args:
        weight, bias: (3 * H * d, D) and (3 * H * d,) or None, laid out [q | k | v].
        q_norm, k_norm: modules that norm each head of q and k; None or Identity for none.
        rope: a module that rotates the pairs (2i, 2i + 1), with buffers ``freqs_cos`` and
            ``freqs_sin`` (N, d), in which both of a pair have the same angle; None for none.
    """
    width = weight.shape[0] // 3
    head_dim = width // num_heads
    table, given, options = None, {}, {}
    if rope is not None:
        table = torch.stack((rope.freqs_cos[:, ::2], rope.freqs_sin[:, ::2])).float()
    if not is_fused_qk_norm(q_norm, k_norm):
        qkv = _normed(F.linear(x, weight, bias), num_heads, q_norm, k_norm, rope is not None)
        return attention(qkv, num_heads=num_heads, rope=table)
    if is_norm(q_norm):
        options = _norm_options(q_norm)
        given = {  # in one, as torch 2.6 compiles no | of dictionaries
            "q_weight": q_norm.weight,
            "k_weight": k_norm.weight,
            "q_norm_bias": _bias(q_norm),
            "k_norm_bias": _bias(k_norm),
        }
    if rope is not None:
        given = {name: in_halves(x, head_dim) for name, x in given.items() if x is not None}
        weight = qk_in_halves(weight, head_dim)
        bias = None if bias is None else qk_in_halves(bias, head_dim)
    product = F.linear(x, weight)
    return attention(product, num_heads=num_heads, qkv_bias=bias, rope=table, **given, **options)


def is_fused_qk_norm(q_norm: Any, k_norm: Any) -> bool:
    """Tell whether the operator has this QK-norm: none, or LayerNorm or RMSNorm with weights and
    the same eps."""
    norms = q_norm, k_norm
    if all(is_norm(norm) and norm.weight is not None for norm in norms):
        alike = _norm_options(q_norm) == _norm_options(k_norm)
        return alike and not any(map(hooks_of, norms))
    return all(norm is None or does_nothing(norm) for norm in norms)


def _normed(qkv: Tensor, num_heads: int, q_norm: Any, k_norm: Any, in_halves: bool) -> Tensor:
    """Return qkv (B, N, 3 * H * d) with q and k normed by modules, and perhaps in halves."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    q, k = q_norm(q).to(v.dtype), k_norm(k).to(v.dtype)  # under autocast a LayerNorm widens
    if in_halves:
        pairs, halves = (-1, 2), (2, -1)
        q, k = (x.unflatten(-1, pairs).transpose(-1, -2) for x in (q, k))
        v = v.unflatten(-1, halves)
    return torch.stack((q, k, v), 2).flatten(2)


def _is_fused(norm: Any, rounding: str) -> bool:
    """Tell whether the operators have this norm; weights are folded, which rounds otherwise."""
    if rounding == "eager" and getattr(norm, "weight", None) is not None:
        return False
    check_not_called(norm, is_norm(norm))
    return True


def _norm_options(norm: Any) -> dict[str, Any]:
    return {"eps": norm.eps, "norm": "rms" if is_rms(norm) else "layer"}


def _bias(norm: Any) -> Tensor | None:
    """Return the bias of a norm, which RMSNorm does not have."""
    return getattr(norm, "bias", None)


def _with_weights(norm: Any, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the modulation that does what the norm's weight and bias and this one do.

    (n * weight + bias) * (1 + scale) + shift = n * (1 + scale') + shift', in float32 because the
    difference weight * (1 + scale) - 1 would lose digits of 16 bits.
    """
    if norm.weight is None:
        return shift, scale
    wide = torch.promote_types(scale.dtype, torch.float32)
    factor = 1 + scale.to(wide)
    if (bias := _bias(norm)) is not None:
        shift = shift + bias.to(wide) * factor
    return shift, norm.weight.to(wide) * factor - 1


def _possible(rounding: str, *tensors: Tensor | None) -> str:
    """Return the rounding, "fp32" where dtypes are mixed: PyTorch's then follows autocast."""
    return rounding if len({x.dtype for x in tensors if x is not None}) == 1 else "fp32"
