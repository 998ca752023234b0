"""Benchmarks of attention from packed qkv, forward and backward, with QK-norm and RoPE or without.

The peers are what a user puts together: views of q, k and v, a compiled norm and rotation, and an
attention chosen by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from msf_kernels.attention import flash_attn
from msf_kernels.attention.examples import EXAMPLES
from msf_kernels.examples import Example, New, Shape

from ..arms import compiled, needs_gpu, peer
from ..registry import Benchmark
from .qk_norm_rope import norm_and_rotate

# (B, N, H, d). First come some 16384 tokens of DiT-XL or L, in images of 256 and 512 pixels, base
# and residual, with and without class tokens, with heads 72 and 64 wide. Then come larger images, 4
# times as many tokens, and batch 1 of small models.
SHAPES: tuple[Shape, ...] = (
    *((16384 // tokens, tokens, 16, dim) for dim in (72, 64) for tokens in (256, 64, 1024)),
    *((16320 // tokens, tokens, 16, dim) for dim in (72, 64) for tokens in (80, 272)),
    *((4, 4096, 16, dim) for dim in (72, 64)),
    (256, 256, 16, 72),
    (1, 80, 4, 72),
    (1, 64, 6, 64),
)


def inputs(example: Example, new: New, shape: Shape) -> dict[str, Tensor]:
    """Return the example's inputs, with weights in qkv's dtype.

    That dtype then also bounds their gradients, which are sums over numbers rounded to it.
    """
    made = example.inputs(new, shape)
    weights = {name: x.to(made["qkv"].dtype) for name, x in made.items() if "weight" in name}
    return made | weights


Front = Callable[[Tensor, Tensor, Tensor], Tensor]
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def split(
    qkv: Tensor, options: tuple[Tensor, ...], num_heads: int, front: Front
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v (B, N, H, d), with q and k prepared where there are weights."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    if options:
        q_weight, k_weight, rope = options
        q, k = front(q, q_weight, rope), front(k, k_weight, rope)
    return q, k, v


def attend(
    qkv: Tensor,
    *options: Tensor,
    num_heads: int,
    front: Front = norm_and_rotate,
    core: Core = F.scaled_dot_product_attention,
) -> Tensor:
    heads = split(qkv, options, num_heads, front)
    q, k, v = (part.transpose(1, 2) for part in heads)
    return core(q, k, v).transpose(1, 2).flatten(2)


def flash_attn_func(qkv: Tensor, *options: Tensor, num_heads: int) -> Tensor:
    _, module = flash_attn.installed()
    out = module.flash_attn_func(*split(qkv, options, num_heads, compiled_front))
    # Generation 3 of flash-attn returned the logsumexp too for a while.
    return (out[0] if isinstance(out, tuple) else out).flatten(2)


compiled_front = compiled(norm_and_rotate)
chosen = partial(attend, front=compiled_front)
PEERS = (
    peer("sdpa-flash", chosen, scope=partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)),
    *(
        peer(f"sdpa-{name}", chosen, needs_gpu, partial(sdpa_kernel, backend))
        for name, backend in (
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
        )
    ),
    peer("flex", partial(chosen, core=compiled(flex_attention)), needs_gpu),
    peer("flash-attn-func", flash_attn_func, flash_attn.unsupported_device_reason),
)


def flops(qkv: Tensor, *_: Tensor, num_heads: int, products: int) -> int:
    """Return the FLOPs of these matrix products, 2 N^2 d a head each."""
    return products * 2 * qkv.shape[1] * qkv.numel() // 3


def moved(qkv: Tensor, *options: Tensor, num_heads: int) -> int:
    """Return the bytes moved: qkv, weights and angles are read, the output is written."""
    return qkv.nbytes + qkv.nbytes // 3 + sum(option.nbytes for option in options)


def moved_backward(qkv: Tensor, *options: Tensor, num_heads: int) -> int:
    """Return the bytes that a backward moves.

    It reads what a forward moves, the output's gradient and the logsumexp, and writes gradients.
    """
    batch, tokens, _ = qkv.shape
    written = qkv.nbytes + sum(weight.nbytes for weight in options[:2])
    logsumexp = 4 * batch * tokens * num_heads
    forward = moved(qkv, *options, num_heads=num_heads)
    return forward + qkv.nbytes // 3 + logsumexp + written


def sizes(shape: Shape, prepared: bool) -> tuple[int, ...]:
    _, tokens, _, head_dim = shape
    return tokens, head_dim, int(prepared)


def benchmarks() -> Iterator[Benchmark]:
    # In 16 bits q, k, the probabilities and the output are rounded; eager norms round q and k
    # twice. A backward also rounds the gradient of the scores, its product and the result. All of
    # it counts twice, as the gradients of weights sum terms that cancel while errors do not.
    examples = {example.variant: example for example in EXAMPLES}
    for variant, prepared in (("", False), ("norm-rope", True)):
        forward = Benchmark(
            example=replace(examples[variant], inputs=partial(inputs, examples[variant])),
            eager=attend,
            bytes=moved,
            flops=partial(flops, products=2),
            terms=256,
            roundings=6,
            own_roundings=4,
            sizes=partial(sizes, prepared=prepared),
            peers=PEERS,
            dtypes=(torch.bfloat16,),  # all that most of these kernels take, besides float16
            shapes=SHAPES,
        )
        yield forward
        yield replace(
            forward,
            gradients=forward.example.gradients,
            bytes=moved_backward,
            flops=partial(flops, products=5),
            roundings=16,
            own_roundings=16,
        )


BENCHMARKS = list(benchmarks())
