"""The blocks of diffusers' DiTTransformer2DModel, whose modulation belongs to the first norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import operations as ops
from .structure import (
    Family,
    check_children,
    check_dropout,
    check_linear,
    check_no_hooks,
    check_norm,
    does_nothing,
    has_hooks,
    kind,
    refuse,
)

ATTENTION = ("processor", "to_q", "to_k", "to_v", "to_out", "to_out.0", "to_out.1")


def diffusers_block(
    block: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    *,
    rounding: str,
) -> Tensor:
    """Run a block on hidden_states (B, N, D) at timestep (B,) for class_labels (B,).

    Raise ValueError for a mask and other arguments that DiTTransformer2DModel does not pass.
    """
    if attention_mask is not None or cross_attention_kwargs:
        raise ValueError("an accelerated block takes neither masks nor attention arguments")
    x, norm = hidden_states, block.norm1
    condition = norm.emb(timestep, class_labels, hidden_dtype=x.dtype)
    modulations = norm.linear(norm.silu(condition)).chunk(6, dim=1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulations
    h = ops.adaln(norm.norm, x, shift, scale, rounding)
    branch = _attention(block.attn1, h, rounding)
    x, h = ops.gate_adaln(block.norm3, x, branch, gate, mlp_shift, mlp_scale, rounding)
    return ops.gate(x, _mlp(block.ff, h, rounding), mlp_gate, rounding)


def _attention(attn: Any, h: Tensor, rounding: str) -> ops.Branch:
    if rounding == "eager":
        return attn(h), None
    ops.check_not_called(attn)
    ops.check_drops_nothing(attn.to_out[1])
    parts, biases = zip(*map(ops.weights, (attn.to_q, attn.to_k, attn.to_v)), strict=True)
    weight = torch.cat(parts)
    bias = None if attn.to_q.bias is None else torch.cat(biases)
    return ops.last_product(attn.to_out[0], ops.self_attention(h, weight, bias, attn.heads))


def _mlp(ff: Any, h: Tensor, rounding: str) -> ops.Branch:
    if rounding == "eager" or not _has_gelu(ff):
        return ff(h), None
    gelu, _, second = ff.net
    return ops.gelu_mlp(gelu.proj, gelu.approximate, second, h)


def _has_gelu(ff: Any) -> bool:
    """Tell whether an MLP is a layer that applies a GELU, and another one."""
    if any(map(has_hooks, ff.modules())):
        return False
    if len(ff.net) != 3 or not does_nothing(ff.net[1]) or type(ff.net[2]) is not nn.Linear:
        return False
    gelu = ff.net[0]
    has_proj = type(getattr(gelu, "proj", None)) is nn.Linear
    return has_proj and getattr(gelu, "approximate", None) in ("tanh", "none")


def check_block(where: str, block: Any) -> None:
    """Raise ValueError where a block is not one of DiTTransformer2DModel."""
    if getattr(block, "norm_type", None) != "ada_norm_zero":
        refuse(where, f"has norm_type {getattr(block, 'norm_type', None)!r}, not 'ada_norm_zero'")
    check_children(where, block, ("norm1", "attn1", "norm3", "ff"))
    check_no_hooks(where, block)
    norm, width = block.norm1, block.norm1.linear.in_features
    check_children(f"{where}.norm1", norm, ("emb", "silu", "linear", "norm"))
    if getattr(norm, "emb", None) is None:
        refuse(f"{where}.norm1", "has no embedding of its own, emb")
    check_linear(f"{where}.norm1.linear", norm.linear, width, 6 * width)
    check_norm(f"{where}.norm1.norm", norm.norm, width)
    check_norm(f"{where}.norm3", block.norm3, width)
    _check_attention(f"{where}.attn1", block.attn1, width)
    if _has_gelu(block.ff):
        hidden = block.ff.net[2].in_features
        check_linear(f"{where}.ff.net.0.proj", block.ff.net[0].proj, width, hidden)
        check_linear(f"{where}.ff.net.2", block.ff.net[2], hidden, width)


def _check_attention(where: str, attn: Any, width: int) -> None:
    check_children(where, attn, ("to_q", "to_k", "to_v", "to_out"))
    if kind(attn.processor) not in ("AttnProcessor", "AttnProcessor2_0"):
        refuse(where, f"has a {kind(attn.processor)}, not diffusers' own AttnProcessor")
    inner = attn.to_q.out_features
    for name in "to_q", "to_k", "to_v":
        check_linear(f"{where}.{name}", getattr(attn, name), width, inner)
    check_linear(f"{where}.to_out.0", attn.to_out[0], inner, width)
    check_dropout(f"{where}.to_out.1", attn.to_out[1])


def _inputs(block: Any, normal: Any, tokens: int, _: Any) -> tuple[Any, ...]:
    x = normal(2, tokens, block.norm1.linear.in_features)
    timestep, labels = (torch.tensor(values, device="cpu") for values in ([3, 700], [0, 1]))
    return x, None, None, None, timestep, None, labels


FAMILIES = (
    Family(
        ("norm1", "attn1", "norm3", "ff"),
        (),
        diffusers_block,
        check_block,
        _inputs,
        norms=("norm1", "norm1.norm", "norm3"),
        read=("ff", "attn1", *(f"attn1.{name}" for name in ATTENTION)),
    ),
)
