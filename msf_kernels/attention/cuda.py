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

import torch
from torch import Tensor

from ..cuda_support import extension
from ..cuda_support.launch import address, dtype, launch, parameter
from ..layout import aligned, contiguous, empty_like
from ..qk_norm_rope import cuda as qk_norm_rope
from ..qk_norm_rope.cuda import preparation, view
from ..qk_norm_rope.op import Gradients, is_prepared, new_gradients
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
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    shared = extension.shared_memory(qkv.device)
    options = qkv_bias, q_weight, k_weight, rope
    whole = extension.kernels().attention_fits(_grid(qkv, num_heads), shared)
    if whole:
        q, k, v = heads(qkv, num_heads)
    else:
        q, k, v = prepared(qk_norm_rope.qk_norm_rope, qkv, *options, num_heads, eps)
    out = empty_like(q)
    logsumexp = q.new_empty((q.shape[0], num_heads, q.shape[1]), dtype=torch.float32)
    inside = [contiguous(option, 16) if whole else None for option in options]
    launch(
        "attention",
        q,
        dtype(q),
        tuple(q.shape),
        view(q),
        view(k),
        view(v),
        preparation(*inside, eps),
        address(out),
        address(logsumexp),
        shared,
    )
    return out.flatten(2), logsumexp


def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    qkv_bias: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    num_heads: int,
    eps: float,
) -> Gradients:
    q, k, v = heads(qkv, num_heads)
    out, grad = (aligned(x).unflatten(-1, (num_heads, -1)) for x in (out, grad))
    options = [contiguous(option, 16) for option in (qkv_bias, q_weight, k_weight, rope)]
    logsumexp = logsumexp.contiguous()
    gradients = new_gradients(qkv, qkv_bias, q_weight, k_weight)
    partials = None
    if is_prepared(qkv_bias, q_weight, k_weight):
        partials = logsumexp.new_empty((5, num_heads, len(q), q.shape[3]))
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
        preparation(*options, eps),
        address(logsumexp),
        address(gradients[0]),
        address(partials),
        tuple(map(parameter, gradients[1:])),
    )
    return gradients


def _grid(qkv: Tensor, num_heads: int) -> tuple[int, int, int, int]:
    """Return B, N, H and d as an msf::HeadGrid."""
    batch, tokens, width = qkv.shape
    return batch, tokens, num_heads, width // (3 * num_heads)
