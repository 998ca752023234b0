"""cuDNN's adaLN, of the package nvidia-cudnn-frontend, as a peer.

Written after the samples of NVIDIA/cudnn-frontend and unproven: no GPU with the package has run it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) * (1 + scale) + shift."""
    return AdaLN.apply(x, 1 + scale[:, None], shift[:, None].contiguous())


class AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        y, mean = torch.empty_like(x), x.new_empty((*x.shape[:2], 1), dtype=torch.float32)
        rstd = torch.empty_like(mean)
        epsilon = torch.full((1, 1, 1), EPS)
        executor(x.shape, x.dtype, False)(x, scale, bias, epsilon, y, mean, rstd)
        ctx.save_for_backward(x, scale, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, mean, rstd = ctx.saved_tensors
        grads = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        executor(x.shape, x.dtype, True)(grad, x, scale, mean, rstd, *grads)
        return grads


@cache
def executor(shape: torch.Size, dtype: torch.dtype, backward: bool) -> Callable[..., None]:
    """Executes on tensors, in the order of the operation's inputs, then of its outputs."""
    import cudnn

    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    kinds = cudnn.data_type
    graph = cudnn.pygraph(
        handle=handle, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT
    )
    x = torch.empty(shape, dtype=dtype, device="cuda")
    row, statistic = x[:, :1].contiguous(), x[..., :1].float().contiguous()
    if backward:
        ins = [graph.tensor_like(t) for t in (x, x, row, statistic, statistic)]
        given = dict(zip(("grad", "input", "scale", "mean", "inv_variance"), ins))
        outs = graph.adalayernorm_backward(name="adaln", **given)
        output_kinds = dtype, dtype, dtype
    else:
        ins = [graph.tensor_like(t) for t in (x, row, row, torch.full((1, 1, 1), EPS))]
        given = dict(zip(("input", "scale", "bias", "epsilon"), ins))
        phase = cudnn.norm_forward_phase.TRAINING
        outs = graph.adalayernorm(name="adaln", norm_forward_phase=phase, **given)
        output_kinds = dtype, torch.float32, torch.float32
    for out, kind in zip(outs, output_kinds):
        out.set_output(True).set_data_type(kind)
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device="cuda")

    def execute(*tensors: Tensor) -> None:
        graph.execute(dict(zip([*ins, *outs], tensors)), workspace, handle=handle)

    return execute
