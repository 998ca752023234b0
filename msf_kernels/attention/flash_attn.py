"""Calls of flash-attn, generation 2 or 3, by the functions below its autograd.

The functions here make up a `Library` (libraries.py).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from . import sdpa


@functools.cache
def installed() -> tuple[int, Any]:
    """Return the newest installed generation of flash-attn and its module of kernels.

    Raises:
        ImportError: there is none; the message says why.
    """
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        try:
            return 3, importlib.import_module("flash_attn_interface")
        except ImportError:
            pass
    try:
        found = version("flash-attn")
    except PackageNotFoundError:
        raise ImportError("flash-attn is not installed") from None
    if tuple(map(int, found.split(".")[:2])) < (2, 7):
        raise ImportError(f"flash-attn must be 2.7 or later, got {found}")
    return 2, importlib.import_module("flash_attn.flash_attn_interface")


@functools.cache
def unsupported_device_reason(device: torch.device) -> str | None:
    try:
        installed()
    except ImportError as error:
        return str(error)
    if reason := sdpa.unsupported_device_reason(device):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"this GPU is sm_{major}{minor}, flash-attn needs sm_80 or later"


def unsupported_args_reason(q: Tensor, *_: Tensor) -> str | None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn takes bfloat16 and float16, got {str(q.dtype).removeprefix('torch.')}"
    head_dim = q.shape[-1]
    if head_dim % 8 or head_dim > 256:
        return f"flash-attn takes a head_dim of 8, 16 ... 256, got {head_dim}"
    return None


# Generation 2 wants these arguments besides; generation 3 has them as defaults.
_WHOLE: dict[str, Any] = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    generation, module = installed()
    options = {**_WHOLE, "return_softmax": False} if generation == 2 else {}
    # Generation 2 declares that it writes q, k and v, which would count as a change of qkv.
    heads = (x.data for x in (q, k, v))
    out, logsumexp, *_ = module._flash_attn_forward(
        *heads, softmax_scale=q.shape[-1] ** -0.5, **options
    )
    return out, logsumexp


def backward(grad: Tensor, *saved: Tensor, into: Sequence[Tensor] = ()) -> Iterable[Tensor]:
    generation, module = installed()
    gradients = into or [grad.new_empty(grad.shape) for _ in range(3)]
    module._flash_attn_backward(
        grad,
        *saved,
        **dict(zip(("dq", "dk", "dv"), gradients)),
        softmax_scale=grad.shape[-1] ** -0.5,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **(_WHOLE if generation == 2 else {}),
    )
    return gradients
