"""Triton runs attention: short heads whole, with what prepares them; longer ones in steps."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from ..dtypes import compute_dtype
from ..layout import aligned, empty_like
from ..qk_norm_rope import triton as qk_norm_rope
from ..qk_norm_rope.op import Gradients, new_gradients
from ..qk_norm_rope.preparation import Preparation
from ..qk_norm_rope.triton import pointers, views
from ..triton_support import interpreted
from ..triton_support.launch import WGMMA_UNSUPPORTED_REASON, launch
from ..triton_support.rows import sum_partials
from .prepared import heads, prepared
from .triton_heads import head_backward_kernel, head_forward_kernel
from .triton_kernels import backward_kernel, delta_kernel, forward_kernel
from .triton_tile import Tile

MAX_HEAD_DIM = 128  # The tiles of a larger one would not fit the shared memory of every GPU.


def unsupported_reason(qkv: Tensor, num_heads: int) -> str | None:
    """Return why forward and backward cannot take the arguments, None where they can."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    if interpreted():
        return None
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim is at most {MAX_HEAD_DIM}, got {head_dim}"
    if WGMMA_UNSUPPORTED_REASON and has_wgmma(qkv.device):
        return WGMMA_UNSUPPORTED_REASON
    return None


def attention(
    qkv: Tensor, *options: Any, for_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    given = Preparation(*options)
    batch, tokens, width = qkv.shape
    out = qkv.new_empty((batch, tokens, given.num_heads, width // (3 * given.num_heads)))
    lse = None
    if for_gradient:
        lse = qkv.new_empty((batch, given.num_heads, tokens), dtype=compute_dtype(qkv))
    if fits_whole(out, given, backward=False):
        q, k, v = heads(qkv, given.num_heads)
        tensors = {"q": q, "k": k, "v": v, "out": out}
        _launch_whole(head_forward_kernel, tensors, given, lse_ptr=lse)
    else:
        q, k, v = prepared(qk_norm_rope.qk_norm_rope, qkv, given)
        tensors = {"q": q, "k": k, "v": v, "out": out}
        _launch_tiles(forward_kernel, tensors, lse_ptr=lse)
    return out.flatten(2), lse


def attention_backward(
    grad: Tensor, out: Tensor, logsumexp: Tensor, qkv: Tensor, *options: Any
) -> Gradients:
    given = Preparation(*options)
    grad, out = (aligned(x).unflatten(-1, (given.num_heads, -1)) for x in (grad, out))
    logsumexp = logsumexp.contiguous()
    if fits_whole(out, given, backward=True):
        return _whole_backward(grad, out, logsumexp, qkv, given)
    q, k, v = prepared(qk_norm_rope.qk_norm_rope, qkv, given)
    if given.is_empty:
        gradients = new_gradients(qkv, *given.parameters)
        grad_q, grad_k, grad_v = heads(gradients[0], given.num_heads)
    else:
        grad_q, grad_k, grad_v = (empty_like(x) for x in (q, k, v))
    delta = torch.empty_like(logsumexp)
    _launch_tiles(delta_kernel, {"grad": grad, "out": out}, backward=True, delta_ptr=delta)
    tensors = {"grad": grad, "q": q, "k": k, "v": v}
    tensors |= {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    arrays = {"lse_ptr": logsumexp, "delta_ptr": delta}
    _launch_tiles(backward_kernel, tensors, backward=True, kinds=2, **arrays)
    if given.is_empty:
        return gradients
    return qk_norm_rope.qk_norm_rope_backward(grad_q, grad_k, grad_v, qkv, *given)


def _whole_backward(
    grad: Tensor, out: Tensor, logsumexp: Tensor, qkv: Tensor, given: Preparation
) -> Gradients:
    q, k, v = heads(qkv, given.num_heads)
    gradients = new_gradients(qkv, *given.parameters)
    _, grad_bias, grad_q_weight, grad_k_weight, *_ = gradients
    grad_q, grad_k, grad_v = heads(gradients[0], given.num_heads)
    tensors = {"grad": grad, "q": q, "k": k, "v": v, "out": out}
    tensors |= {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    batch, _, num_heads, dim = q.shape
    sums = logsumexp.new_empty((5, batch * num_heads, dim))
    arrays = {"lse_ptr": logsumexp, "sums_ptr": sums}
    _launch_whole(head_backward_kernel, tensors, given, **arrays)
    width = num_heads * dim
    if given.qkv_bias is not None:
        sum_partials([(sums[:3].view(3 * batch, width), grad_bias.view(3, width))])
    if grad_q_weight.numel() or grad_k_weight.numel():
        # First over the batch, by a program for each 32 channels of all heads: d alone has three.
        of_heads = sums.new_empty((2, width))
        sum_partials([(sums[3:].view(2 * batch, width), of_heads)])
        pairs = zip(of_heads.view(2, num_heads, dim), (grad_q_weight, grad_k_weight))
        sum_partials([(total, gradient[None]) for total, gradient in pairs if gradient.numel()])
    return gradients


def fits_whole(x: Tensor, given: Preparation, backward: bool) -> bool:
    """Tell whether a program has all tokens of a head of x (B, N, H, d), in 16 bits.

    It does not have LayerNorm. In the backward without wgmma the operands would lie in registers
    too, and spill 200 bytes.
    """
    short = x.shape[1] <= 64 and x.element_size() == 2 and given.norm == "rms"
    return short and (has_wgmma(x.device) or not backward)


def _launch_whole(
    kernel: Any,
    tensors: dict[str, Tensor],
    given: Preparation,
    **arrays: Tensor | None,
) -> None:
    """Start a program for each head of the tensors (B, N, H, d)."""
    batch, tokens, num_heads, dim = tensors["q"].shape
    arguments = views(**tensors)
    _launch(
        kernel,
        tensors["q"].device,
        batch * num_heads,
        Tile.of_head(tokens, dim, arguments.pop("UNIT")),
        **arguments,
        **pointers(given),
        **arrays,
        extent=(tokens, num_heads),
        eps=given.eps,
    )


def _launch_tiles(
    kernel: Any,
    tensors: dict[str, Tensor],
    *,
    backward: bool = False,
    kinds: int = 1,
    **arrays: Tensor | None,
) -> None:
    """Start `kinds` programs for each tile of the tensors' tokens (B, N, H, d)."""
    x = next(iter(tensors.values()))
    batch, tokens, num_heads, dim = x.shape
    arguments = views(**tensors)
    unit = arguments.pop("UNIT")
    tile = Tile.of(tokens, dim, unit, x.element_size(), backward, has_wgmma(x.device))
    programs = kinds * batch * num_heads * triton.cdiv(tokens, tile.block)
    _launch(kernel, x.device, programs, tile, **arguments, **arrays, extent=(tokens, num_heads))


def _launch(kernel: Any, device: torch.device, programs: int, tile: Tile, **arguments: Any) -> None:
    """Start a kernel.

    Attention agrees with the reference to the rounding of its dtype, so multiply-adds are fused.
    """
    options = {"TILE": tile, "num_stages": tile.stages, **arguments}
    launch(kernel, device, programs, warps=tile.warps, fused=True, **options)


def has_wgmma(device: torch.device) -> bool:
    """Tell whether the GPU is of sm_90 to sm_11x.

    Tensors without memory are taken for those of the GPU that Triton compiles for. The interpreter,
    which is slow at each step, gets the large tiles of such a GPU.
    """
    if device.type == "cuda":
        return 9 <= torch.cuda.get_device_capability(device)[0] < 12
    return interpreted() or 90 <= driver.active.get_current_target().arch < 120
