"""The example calls of the operators and their gradients, on tensors without memory.

Signatures, alignment and launch parameters are those of real calls, and nothing runs where the
caller sees to it that a launch only compiles or is only recorded.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..examples import Example, New, Shape, examples
from ..library import NAMESPACE, by_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# The dtypes and layouts of a family that is not called in all DTYPES, or not in PLAIN alone.
DTYPES_OF = {"attention": ("bf16",)}
PLAIN = {"": torch.contiguous_format}
IMAGES = {"": torch.contiguous_format, "channels-last": torch.channels_last}
LAYOUTS = {"pyramid": IMAGES, "interpolation": IMAGES, "euler": IMAGES}


def calls(family: str, backend: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the name and call of every example, at its shapes, in each layout and dtype."""
    for example in examples(family):
        for layout, memory_format in LAYOUTS.get(family, PLAIN).items():
            for dtype in DTYPES_OF.get(family, DTYPES):
                new = partial(new_tensor, call_dtype=DTYPES[dtype], memory_format=memory_format)
                audited = [(True, shape) for shape in example.audited]
                audited += [(False, shape) for shape in example.audited_forward]
                for gradients, shape in audited:
                    sizes = "x".join(map(str, shape))
                    words = example.name, sizes, layout, dtype, "" if gradients else "forward"
                    call = partial(run, family, backend, example, new, shape, gradients)
                    yield ", ".join(filter(None, words)), call


def run(
    family: str, backend: str, example: Example, new: New, shape: Shape, gradients: bool
) -> None:
    """Run the example on a backend and, if `gradients`, the gradients that it has.

    Raises:
        NotImplementedError: CUDA does not take the arguments.
    """
    with Kernels(importlib.import_module(f"msf_kernels.{family}.{backend}"), backend, gradients):
        call, inputs = example.draw(new, shape)
        leaves = [tensor.requires_grad_() for tensor in inputs[: example.gradients * gradients]]
        outputs = call(*inputs)
        if leaves:
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])


class Kernels(TorchDispatchMode):
    """Kernels sends operators to a family's kernels, though tensors have no memory."""

    def __init__(self, module: ModuleType, backend: str, gradients: bool) -> None:
        super().__init__()
        self.module = module
        self.gradients = gradients
        # Triton compiles also what it declines, because its compiler gets that wrong: so the audit
        # sees it. CUDA has no kernel for what it declines.
        self.reason_of = getattr(module, "unsupported_reason", None) if backend == "cuda" else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace != NAMESPACE:
            return func(*args, **(kwargs or {}))
        if self.reason_of and (reason := by_name(func._opname, self.reason_of)(*args)):
            raise NotImplementedError(reason)
        function = getattr(self.module, func._opname)
        if "for_gradient" not in inspect.signature(function).parameters:
            return function(*args)
        return function(*args, for_gradient=self.gradients)


def new_tensor(
    *shape: int,
    call_dtype: torch.dtype,
    memory_format: torch.memory_format,
    dtype: torch.dtype | None = None,
) -> Tensor:
    form = memory_format if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype or call_dtype, device="meta", memory_format=form)
