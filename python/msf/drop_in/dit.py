"""The blocks and last layers of DiT, SiT, REPA, LightningDiT and MPDiT.

A block is x + gate * attention(modulated norm of x), then the same with an MLP (arXiv 2212.09748,
figure 3). MPDiT computes the six modulations once for all blocks; LightningDiT may rotate q and k,
norm them, have no shifts, RMSNorm or SwiGLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
    norm_width,
    refuse,
)

DROPOUTS = ("attn_drop", "proj_drop")
ATTENTION = ("qkv", "q_norm", "k_norm", "proj", *DROPOUTS)


def dit_block(block: Any, x: Tensor, c: Tensor, feat_rope: Any = None, *, rounding: str) -> Tensor:
    """Run a block on x (B, N, D) with the condition c (B, C)."""
    return _block(block, x, _modulations(block.adaLN_modulation(c), x), feat_rope, rounding)


def mpdit_block(
    block: Any, x: Tensor, time_modulation: Sequence[Tensor], *, rounding: str
) -> Tensor:
    """Run a block on x (B, N, D) with six modulations (B, D)."""
    return _block(block, x, time_modulation, None, rounding)


def final_layer(layer: Any, x: Tensor, c: Tensor, *, rounding: str) -> Tensor:
    """Return patches of x (B, N, D), normalised and modulated by the condition c (B, C)."""
    shift, scale = layer.adaLN_modulation(c).chunk(2, dim=-1)
    return layer.linear(ops.adaln(layer.norm_final, x, shift, scale, rounding))


def mpdit_final_layer(
    layer: Any, x: Tensor, time_modulation: Sequence[Tensor], *, rounding: str
) -> Tensor:
    """Return patches of x (B, N, D) with shift and scale of the blocks' MLPs."""
    _, _, _, shift, scale, _ = time_modulation
    return layer.linear(ops.adaln(layer.norm_final, x, shift, scale, rounding))


def _modulations(modulation: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Return shift, scale and gate of attention and MLP, with shifts of zero where there are
    none."""
    if modulation.shape[-1] == 6 * x.shape[-1]:
        return modulation.chunk(6, dim=-1)
    scale, gate, mlp_scale, mlp_gate = modulation.chunk(4, dim=-1)
    zero = modulation.new_zeros(1, x.shape[-1])
    return zero, scale, gate, zero, mlp_scale, mlp_gate


def _block(
    block: Any, x: Tensor, modulations: Sequence[Tensor], rope: Any, rounding: str
) -> Tensor:
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulations
    h = ops.adaln(block.norm1, x, shift, scale, rounding)
    branch = _attention(block.attn, h, rope, rounding)
    x, h = ops.gate_adaln(block.norm2, x, branch, gate, mlp_shift, mlp_scale, rounding)
    return ops.gate(x, _mlp(block.mlp, h, rounding), mlp_gate, rounding)


def _attention(attn: Any, h: Tensor, rope: Any, rounding: str) -> ops.Branch:
    if rounding == "eager":
        return (attn(h) if rope is None else attn(h, rope=rope)), None
    for module in (attn, rope) if rope is not None else (attn,):
        ops.check_not_called(module)
    for name in DROPOUTS:
        ops.check_drops_nothing(getattr(attn, name, None))
    norms = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    out = ops.self_attention(h, *ops.weights(attn.qkv), attn.num_heads, *norms, rope)
    return ops.last_product(attn.proj, out)


def _mlp(mlp: Any, h: Tensor, rounding: str) -> ops.Branch:
    if rounding == "eager" or not _has_gelu(mlp):
        return mlp(h), None
    return ops.gelu_mlp(mlp.fc1, mlp.act.approximate, mlp.fc2, h)


def _has_gelu(mlp: Any) -> bool:
    """Tell whether an MLP is two Linear layers with a GELU in between, and nothing else."""
    if any(map(has_hooks, mlp.modules())):
        return False
    layers = dict(mlp.named_children())
    ends = [layers.pop(name, None) for name in ("fc1", "fc2")]
    return (
        isinstance(layers.pop("act", None), nn.GELU)
        and all(type(layer) is nn.Linear for layer in ends)
        and all(map(does_nothing, layers.values()))
    )


def check_block(where: str, block: Any) -> None:
    """Raise ValueError where a block is not one of these."""
    check_children(where, block, ("norm1", "attn", "norm2", "mlp", "adaLN_modulation"))
    check_no_hooks(where, block)
    width = norm_width(block.norm1)
    if width is None:
        refuse(f"{where}.norm1", f"is a {kind(block.norm1)} of no known size")
    check_norm(f"{where}.norm1", block.norm1, width)
    check_norm(f"{where}.norm2", block.norm2, width)
    _check_attention(f"{where}.attn", block.attn, width)
    if _has_gelu(block.mlp):
        hidden = block.mlp.fc1.out_features
        check_linear(f"{where}.mlp.fc1", block.mlp.fc1, width, hidden)
        check_linear(f"{where}.mlp.fc2", block.mlp.fc2, hidden, width)
    if hasattr(block, "adaLN_modulation"):
        _check_modulation(f"{where}.adaLN_modulation", block.adaLN_modulation, width, (6, 4))


def check_final_layer(where: str, layer: Any) -> None:
    """Raise ValueError where a last layer is not one of these."""
    check_children(where, layer, ("norm_final", "linear", "adaLN_modulation"))
    check_no_hooks(where, layer)
    if not isinstance(layer.linear, nn.Linear):
        refuse(f"{where}.linear", f"is a {kind(layer.linear)}, not an nn.Linear")
    width = layer.linear.in_features
    check_norm(f"{where}.norm_final", layer.norm_final, width)
    if hasattr(layer, "adaLN_modulation"):
        _check_modulation(f"{where}.adaLN_modulation", layer.adaLN_modulation, width, (2,))


def _check_attention(where: str, attn: Any, width: int) -> None:
    check_children(where, attn, ATTENTION)
    heads = getattr(attn, "num_heads", None)
    if not isinstance(heads, int) or heads < 1:
        refuse(where, f"has num_heads {heads!r}, not a whole number")
    for name in "qkv", "proj":
        if not isinstance(getattr(attn, name, None), nn.Linear):
            refuse(f"{where}.{name}", f"is a {kind(getattr(attn, name, None))}, not an nn.Linear")
    inner = attn.proj.in_features
    check_linear(f"{where}.qkv", attn.qkv, width, 3 * inner)
    check_linear(f"{where}.proj", attn.proj, inner, width)
    if inner % heads:
        refuse(where, f"has {inner} channels, which {heads} heads do not divide")
    for name in DROPOUTS:
        check_dropout(f"{where}.{name}", getattr(attn, name, None))


def _check_modulation(
    where: str, modulation: nn.Module, width: int, parts: tuple[int, ...]
) -> None:
    layers = [layer for layer in modulation.modules() if isinstance(layer, nn.Linear)]
    got = layers[-1].out_features if layers else None
    if got not in [n * width for n in parts]:
        right = " or ".join(f"{n} x {width}" for n in parts)
        refuse(where, f"gives {got} modulations, not {right}")


def _condition(module: Any, normal: Any) -> Tensor:
    """Make a condition (2, C)."""
    first = next(m for m in module.adaLN_modulation.modules() if isinstance(m, nn.Linear))
    return normal(2, first.in_features)


def _block_inputs(block: Any, normal: Any, tokens: int, rope: Any) -> tuple[Any, ...]:
    ropes = () if rope is None else (rope,)
    return normal(2, tokens, norm_width(block.norm1)), _condition(block, normal), *ropes


def _final_inputs(layer: Any, normal: Any, tokens: int, _: Any) -> tuple[Any, ...]:
    return normal(2, tokens, layer.linear.in_features), _condition(layer, normal)


def _mpdit_inputs(module: Any, normal: Any, tokens: int, _: Any) -> tuple[Any, ...]:
    width = norm_width(module.norm1 if hasattr(module, "norm1") else module.norm_final)
    return normal(2, tokens, width), tuple(normal(2, width) for _ in range(6))


BLOCK, LAST, OWN = (
    ("norm1", "attn", "norm2", "mlp"),
    ("norm_final", "linear"),
    ("adaLN_modulation",),
)
NORMS, LAST_NORM = ("norm1", "norm2"), ("norm_final",)
READ = ("mlp", "attn", *(f"attn.{name}" for name in ATTENTION))

FAMILIES = (
    Family((*BLOCK, *OWN), (), dit_block, check_block, _block_inputs, NORMS, READ),
    Family(BLOCK, OWN, mpdit_block, check_block, _mpdit_inputs, NORMS, READ),
    Family((*LAST, *OWN), (), final_layer, check_final_layer, _final_inputs, LAST_NORM),
    Family(LAST, OWN, mpdit_final_layer, check_final_layer, _mpdit_inputs, LAST_NORM),
)
