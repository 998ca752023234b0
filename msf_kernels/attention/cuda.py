"""Calls of the CUDA kernels in csrc/kernels/attention.cu and attention_backward.cu.

What bounds them, estimated and not measured: 64 samples of 256 tokens in 16 heads of 72, norm and
rotation inside, on an H200 with 132 multiprocessors at 1.755 GHz, each of which has 7.8 heads of
the 1,024. In microseconds:

                                              forward           backward
    device memory, 4.26 TB/s                       35                 71
    products, mma.sync at 62 % of the peak         34                117
    shared memory read for them, 128 B a clock     20                143
    exponentials, 16 a clock                       18                 36
    instructions, 4 a clock                        40                100

The forward reads 110 KB a head and writes 37; scores and outputs are 19 million operations, without
padding at 72 (4 x 16 + 8 deep, 9 x 8 wide). Two tiles of queries a warp halve what it reads of
shared memory, which would be first otherwise; the last 16 of an odd number of tiles go alone. In
the machine code for sm_90 a chunk of 32 queries and 32 keys takes some 270 instructions of a warp,
76 of them products, where no maximum grows, and 8 rows are normalised and rotated in 250, which is
40 % of all instructions. Where QK-norm bounds the scores no maximum is needed, which saves 45 of
the 270; but then the largest probability of a row is no power of two and is rounded, and a query
with a single key no longer gets its value as it is.

The backward has one tile a warp, as the gradients of 16 keys and of their values are 72 registers
already: so shared memory comes first. Five products instead of seven would read less, but need the
gradient of q summed over warps.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..cuda_support import extension
from ..cuda_support.launch import address, dtype, launch, parameter
from ..layout import aligned, contiguous, empty_like
from ..qk_norm_rope import cuda as qk_norm_rope
from ..qk_norm_rope.cuda import preparation, view
from ..qk_norm_rope.op import Gradients, new_gradients
from ..qk_norm_rope.preparation import Preparation
from .prepared import heads, prepared

HEAD_DIMS = (32, 64, 72, 80, 96, 128)  # those that the kernels are built for


def unsupported_reason(qkv: Tensor, num_heads: int, grad: Tensor | None = None) -> str | None:
    """Return why forward or, with `grad`, backward cannot take the arguments; None where it can."""
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {qkv.dtype}"
    head_dim = qkv.shape[2] // (3 * num_heads)
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if grad is None:
        return None
    shared = extension.shared_memory(qkv.device)
    if not extension.kernels().attention_backward_fits(_grid(qkv, num_heads), shared):
        tokens = f"{qkv.shape[1]} tokens of head_dim {head_dim}"
        return f"{tokens} do not fit {shared} bytes of shared memory"
    return None


def attention(
    qkv: Tensor, *options: Any, for_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    given = Preparation(*options)
    shared = extension.shared_memory(qkv.device)
    fits = extension.kernels().attention_fits(_grid(qkv, given.num_heads), shared)
    (q, k, v), inside = _heads(qkv, given, fits)
    out = empty_like(q)
    logsumexp = None
    if for_gradient:
        logsumexp = q.new_empty((q.shape[0], given.num_heads, q.shape[1]), dtype=torch.float32)
    launch(
        "attention",
        q,
        dtype(q),
        tuple(q.shape),
        view(q),
        view(k),
        view(v),
        preparation(inside),
        address(out),
        address(logsumexp),
        shared,
    )
    return out.flatten(2), logsumexp


def attention_backward(
    grad: Tensor, out: Tensor, logsumexp: Tensor, qkv: Tensor, *options: Any
) -> Gradients:
    given = Preparation(*options)
    (q, k, v), inside = _heads(qkv, given, fits=True)
    out, grad = (aligned(x).unflatten(-1, (given.num_heads, -1)) for x in (out, grad))
    logsumexp = logsumexp.contiguous()
    gradients = new_gradients(qkv, *inside.parameters)
    partials = None
    if any(x is not None for x in inside.parameters):
        partials = logsumexp.new_empty((5, given.num_heads, len(q), q.shape[3]))
    launch(
        "attention_backward",
        q,
        dtype(q),
        tuple(q.shape),
        view(q),
        view(k),
        view(v),
        view(out),
        view(grad),
        preparation(inside),
        address(logsumexp),
        address(gradients[0]),
        address(partials),
        tuple(map(parameter, gradients[1:])),
    )
    if inside.is_empty and not given.is_empty:
        grads = heads(gradients[0], given.num_heads)
        return qk_norm_rope.qk_norm_rope_backward(*grads, qkv, *given)
    return gradients


def _heads(qkv: Tensor, given: Preparation, fits: bool) -> tuple[tuple[Tensor, ...], Preparation]:
    """Return q, k and v (B, N, H, d), and what the kernels prepare of them: all where a head `fits`
    a block, but LayerNorm, which they do not have."""
    if fits and given.norm == "rms":
        return heads(qkv, given.num_heads), given.map(partial(contiguous, alignment=16))
    return prepared(qk_norm_rope.qk_norm_rope, qkv, given), given.map(lambda _: None)


def _grid(qkv: Tensor, num_heads: int) -> tuple[int, int, int, int]:
    """Return B, N, H and d as an msf::HeadGrid."""
    batch, tokens, width = qkv.shape
    return batch, tokens, num_heads, width // (3 * num_heads)
