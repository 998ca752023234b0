"""The arms of a transformer of `msf`: our operators, or the same weights in plain PyTorch.

A plain arm is the model's own code with its fused operators replaced by what a user writes, so that
torch.compile sees nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import msf_kernels

from .arms import Arm, Function


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, norm: str) -> Tensor:
    normalise: Any = F.layer_norm if norm == "layer" else F.rms_norm
    return normalise(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


# In plain PyTorch a matmul adds its bias itself, and what follows leaves it alone.
def gate_and_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *, y_bias: Tensor, norm: str
) -> tuple[Tensor, Tensor]:
    x = x + gate[:, None] * y
    return x, modulate(x, shift, scale, norm=norm)


def attend(
    qkv: Tensor,
    *,
    num_heads: int,
    qkv_bias: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_bias: Tensor | None,
    rope: Tensor | None,
    eps: float,
    norm: str,
) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    q = norm_of_head(q, q_weight, q_norm_bias, eps, norm)
    k = norm_of_head(k, k_weight, k_norm_bias, eps, norm)
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def norm_of_head(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str
) -> Tensor:
    if weight is None:
        return x
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    (cos, sin), (first, second) = rope, x.chunk(2, -1)  # in float32, as the table is
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def gelu(x: Tensor, bias: Tensor, *, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


PLAIN: dict[str, Callable[..., Any]] = {
    "adaln_modulate": modulate,
    "gate_residual_adaln": gate_and_modulate,
    "attention": attend,
    "bias_gelu": gelu,
    "SkipBiasLinear.forward": nn.Linear.forward,
}


def compiling(mode: str) -> Callable[[Function], Function]:
    """Return a function that compiles a module's forward in a mode of torch.compile.

    The forward of a class is compiled once for all its modules: those whose tensors have the same
    shapes share one graph.
    """

    def prepare(function: Function) -> Function:
        def run(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        # Dynamo keeps what it compiled with the code object and does not ask which attention of
        # PyTorch was chosen: with one code for all, cuDNN's arm would run the graph of flash's.
        run.__code__ = run.__code__.replace()
        return torch.compile(run, mode=mode, dynamic=False, fullgraph=True)

    return prepare


@contextmanager
def scope(ours: bool, attention: SDPBackend | None) -> Iterator[None]:
    """Choose the operators that a module runs with, while it runs and while it is compiled.

    Args:
        ours: whether they are those of msf_kernels, each on the backend that it chooses itself.
        attention: the attention that PyTorch uses; None leaves the choice to PyTorch.
    """
    with ExitStack() as stack:
        if not ours:
            for name, function in PLAIN.items():
                stack.enter_context(mock.patch(f"msf.transformer.{name}", function))
            stack.enter_context(msf_kernels.backend("reference"))
        if attention is not None:
            stack.enter_context(sdpa_kernel(attention))
        # The key of this cache leaves out which attention was chosen, as Dynamo does.
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        yield


def arm(
    name: str, *, ours: bool = False, attention: SDPBackend | None = None, mode: str | None = None
) -> Arm:
    """Return an arm of models. `mode` is torch.compile's; None does not compile."""
    as_it_is = Arm(name, ours, scope=partial(scope, ours, attention))
    if mode is None:
        return as_it_is
    return replace(
        as_it_is,
        prepare=compiling(mode),
        makes_graphs=mode == "reduce-overhead",
        unsupported_reason=_compiles_in_seconds,
    )


def _compiles_in_seconds(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "to compile a model for a CPU takes minutes"


EAGER = arm("eager")
ARMS = (
    EAGER,
    arm("compile-flash", attention=SDPBackend.FLASH_ATTENTION, mode="default"),
    arm("compile-cudnn", attention=SDPBackend.CUDNN_ATTENTION, mode="default"),
    arm("compile-graphs", mode="reduce-overhead"),
    arm("ours", ours=True),
    arm("ours-compile", ours=True, mode="default"),
    arm("ours-graphs", ours=True, mode="reduce-overhead"),
)
