"""Example calls of qk_norm_rope, with bias, norm and rotation or some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..examples import Example, New, Shape
from .op import qk_norm_rope, qk_norm_rope_backward
from .preparation import Preparation


def inputs(new: New, shape: Shape, parameters: str, rope: bool) -> dict[str, Tensor]:
    """Make qkv of heads (B, N, H, d), a bias and weights of these names, and a table of angles."""
    batch, tokens, heads, head_dim = shape
    made = {"qkv": new(batch, tokens, 3 * heads * head_dim)}
    wide = compute_dtype(new(1))  # as parameters are under autocast
    for name in parameters.split():
        if "bias" in name:
            length = 3 * heads * head_dim if name == "qkv_bias" else head_dim
            made[name] = 0.1 * new(length, dtype=wide)
        else:
            made[name] = 1 + 0.1 * new(head_dim, dtype=wide)
    if rope:
        angles = 3 * new(tokens, head_dim // 2, dtype=torch.float32)
        made["rope"] = torch.stack((angles.cos(), angles.sin()))
    return made


def packed_inputs(new: New, shape: Shape) -> dict[str, Tensor]:
    """Make inputs, and the gradients (B, N, H, d) that a library's attention returns."""
    grads = {name: new(*shape) for name in ("grad_q", "grad_k", "grad_v")}
    return grads | inputs(new, shape, "qkv_bias q_weight k_weight", rope=True)


def packed_gradients(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, qkv: Tensor, **options: Any
) -> Tensor:
    """Return qkv's gradient from those of q, k and v, as behind the attention of a library."""
    given = preparation(**options)
    grad_qkv: Tensor = qk_norm_rope_backward(grad_q, grad_k, grad_v, qkv, *given)[0]
    return grad_qkv


def preparation(
    num_heads: int, eps: float = 1e-6, norm: str = "rms", **tensors: Tensor | None
) -> Preparation:
    """Return a Preparation with these tensors and no others."""
    options: dict[str, Any] = {"num_heads": num_heads, "eps": eps, "norm": norm}
    # Of torch 2.6 a graph has neither | of dictionaries nor _replace.
    return Preparation(**{**dict.fromkeys(Preparation._fields), **options, **tensors})


def options(shape: Shape) -> dict[str, Any]:
    return {"num_heads": shape[2]}


BOTH = "q_weight k_weight"

# Parameters, and whether there is RoPE, by what a variant of attention is called for it.
PREPARATIONS = {
    "norm-rope": (BOTH, True),
    "rope": ("", True),
    "norm": (BOTH, False),
    "q_norm-rope": ("q_weight", True),
    "q_norm": ("q_weight", False),
    "k_norm": ("k_weight", False),
    "bias-norm-rope": (f"qkv_bias {BOTH}", True),
    "bias": ("qkv_bias", False),
    "layer_norm-rope": (BOTH, True),
    "bias-layer_norm-rope": (f"qkv_bias {BOTH} q_norm_bias k_norm_bias", True),
}


def with_norm(function: Callable[..., Any], variant: str) -> Callable[..., Any]:
    """Return the operator's function with the norm of a variant."""
    return partial(function, norm="layer") if "layer_norm" in variant else function


def examples() -> Iterator[Example]:
    audited = {
        "norm-rope": ((64, 256, 16, 64), (64, 256, 16, 72)),
        "bias-norm-rope": ((64, 256, 16, 64), (64, 256, 16, 72)),
        "rope": ((64, 256, 16, 72),),
        "norm": ((64, 256, 16, 72),),
        "layer_norm-rope": ((64, 256, 16, 72),),
        "bias-layer_norm-rope": ((64, 256, 16, 64), (64, 256, 16, 72)),
    }
    for variant, (parameters, rope) in PREPARATIONS.items():
        yield Example(
            op="qk_norm_rope",
            function=with_norm(qk_norm_rope, variant),
            inputs=partial(inputs, parameters=parameters, rope=rope),
            shape=(2, 6, 2, 4),
            options=options,
            gradients=1 + len(parameters.split()),
            variant="" if variant == "norm-rope" else variant,
            audited=audited.get(variant, ()),
        )
    yield Example(
        op="qk_norm_rope",
        function=packed_gradients,
        inputs=packed_inputs,
        shape=(2, 6, 2, 4),
        options=options,
        variant="packed gradients",
        audited=((64, 256, 16, 64), (64, 256, 16, 72)),
    )


EXAMPLES = tuple(examples())
