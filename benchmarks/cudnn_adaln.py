"""A peer: cuDNN's adaLN, from the package nvidia-cudnn-frontend.

The code follows the samples of NVIDIA/cudnn-frontend. cuDNN's heuristics list several plans for a
graph, and `build()` takes the first that compiles, untimed. Here all are built and timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .timing import Replay, Stopwatch, Work, interleave, stopwatch_of

EPS = 1e-6
CALLS, ROUNDS = 10, 5  # enough to tell plans a tenth apart; the benchmark times the best


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return LN(x) * (1 + scale) + shift."""
    return AdaLN.apply(x, 1 + scale[:, None], shift[:, None].contiguous())


class AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        y, mean = torch.empty_like(x), x.new_empty((*x.shape[:2], 1), dtype=torch.float32)
        rstd = torch.empty_like(mean)
        epsilon = torch.full((1, 1, 1), EPS)
        executor(x.shape, x.dtype, x.device, False)(x, scale, bias, epsilon, y, mean, rstd)
        ctx.save_for_backward(x, scale, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, mean, rstd = ctx.saved_tensors
        grads = torch.empty_like(x), torch.empty_like(scale), torch.empty_like(scale)
        executor(x.shape, x.dtype, x.device, True)(grad, x, scale, mean, rstd, *grads)
        return grads


@cache
def executor(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, backward: bool
) -> Callable[..., None]:
    """Return a call of the fastest plan. It takes the inputs in order, then the outputs."""
    import cudnn

    handle = cudnn.create_handle()
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    kinds = cudnn.data_type
    graph = cudnn.pygraph(
        handle=handle, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT
    )
    x = torch.randn(shape, dtype=dtype, device=device)
    row, statistic = x[:, :1].contiguous(), x[..., :1].float().contiguous()
    if backward:
        inputs, outputs = [x, x, row, statistic, statistic], [x, row, row]
        ins = [graph.tensor_like(t) for t in inputs]
        given = dict(zip(("grad", "input", "scale", "mean", "inv_variance"), ins))
        outs = graph.adalayernorm_backward(name="adaln", **given)
    else:
        inputs, outputs = [x, row, row, torch.full((1, 1, 1), EPS)], [x, statistic, statistic]
        ins = [graph.tensor_like(t) for t in inputs]
        given = dict(zip(("input", "scale", "bias", "epsilon"), ins))
        phase = cudnn.norm_forward_phase.TRAINING
        outs = graph.adalayernorm(name="adaln", norm_forward_phase=phase, **given)
    for out, like in zip(outs, outputs):
        out.set_output(True).set_data_type(like.dtype)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.B, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans(cudnn.build_plan_policy.ALL)
    names = [*ins, *outs]
    pack = dict(zip(names, [*inputs, *map(torch.empty_like, outputs)]))
    execute = fastest(plans(graph, pack, handle, device), pack, stopwatch_of(device))
    return lambda *tensors: execute(dict(zip(names, tensors)))


Plan = Callable[[Mapping[Any, Tensor]], None]


def plans(graph: Any, pack: Mapping[Any, Tensor], handle: Any, device: torch.device) -> list[Plan]:
    """Return the plans that can be built and run on this pack, each with a workspace.

    Raise RuntimeError if there is none.
    """
    import cudnn

    found: list[Plan] = []
    for index in range(graph.get_execution_plan_count()):
        try:
            size = graph.get_workspace_size_plan_at_index(index)
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            plan = partial(
                graph.execute_plan_at_index, workspace=workspace, index=index, handle=handle
            )
            plan(pack)
        except (RuntimeError, cudnn.cudnnGraphNotSupportedError):
            continue
        found.append(plan)
    if not found:
        raise RuntimeError("cuDNN has no plan that can run this")
    return found


def fastest(found: list[Plan], pack: Mapping[Any, Tensor], stopwatch: Stopwatch) -> Plan:
    replays = [Replay(Work([partial(plan, pack)] * CALLS)) for plan in found]
    timings = interleave(replays, ROUNDS, stopwatch)
    return min(zip(timings, found), key=lambda pair: pair[0].median_us)[1]
