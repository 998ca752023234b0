"""The weights of a model as its files hold them."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WRAPPERS = (
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "parametrizations",
)


@torch.no_grad()
def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state under the parameters' own names, though a compiled, wrapped or parametrized
    part has others; of a parametrization it is the weight that it makes, and what FSDP2 has
    sharded is whole, for which all its processes call this."""
    made = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, ParametrizationList)
    }
    inside = tuple(f"{path}." for path in made)
    state = {k: x for k, x in model.state_dict().items() if not k.startswith(inside)}
    # Making a weight in training mode would change the spectral norm's estimate.
    state |= {path: copy.deepcopy(module).eval()() for path, module in made.items()}
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): whole(x).contiguous()
        for name, x in state.items()
    }


@torch.no_grad()
def initialize(module: nn.Module, name: str, fill: Callable[[Tensor], Tensor]) -> None:
    """Let ``fill``, as of ``nn.init``, set a weight; one that a parametrization makes is assigned.

    Raise ValueError where nothing can be assigned: there is no ``right_inverse``, or a hook, as of
    pruning, makes the weight.
    """
    kind = type(module).__name__
    if not is_parametrized(module, name):
        if any(parameter.startswith(f"{name}_") for parameter in module._parameters):
            raise ValueError(f"reset_parameters: a hook makes {name} of a {kind}; remove it first")
        fill(getattr(module, name))
        return
    directions = list(getattr(module.parametrizations, name).parameters(recurse=False))[1:]
    before = [direction.clone() for direction in directions]
    try:
        setattr(module, name, fill(torch.empty_like(getattr(module, name))))
    except RuntimeError as error:
        raise ValueError(f"reset_parameters: {name} of a {kind}: {error}") from None
    if fill is nn.init.zeros_:
        # weight_norm would make 0 / 0 of it: zero is a length of 0 in any direction but none.
        for direction, value in zip(directions, before):
            direction.copy_(value)


def whole(x: Tensor) -> Tensor:
    """Return x, or all of it where FSDP2 has sharded it, for which all processes call this."""
    # A DTensor is known by what it has, because not every torch is built with them.
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def weight_of(layer: nn.Module) -> Tensor | None:
    """Return the weight of a layer, or of one that another in its place wraps, None without any in
    floats, as of a quantised one. In FSDP1 it is no parameter of the layer."""
    weights = (getattr(module, "weight", None) for module in layer.modules())
    return next((x for x in weights if isinstance(x, Tensor) and x.is_floating_point()), None)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """Return what a layer takes: quantised ones take float32."""
    weight = weight_of(layer)
    return torch.float32 if weight is None else weight.dtype


def check_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless both have the same names with the same shapes."""
    for name in {**expected, **state}:
        if name not in state and any(other.startswith(f"{name}_") for other in state):
            raise ValueError(f"save_pretrained: a hook makes {name}; remove it first")
        right, got = (
            list(tensors[name].shape) if name in tensors else "none"
            for tensors in (expected, state)
        )
        if right != got:
            raise ValueError(
                f"save_pretrained: the shape of {name} must be {right}, got {got}; save in "
                "FullyShardedDataParallel.summon_full_params where that is what wraps the model"
            )


def check_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raise ValueError unless all that ``file`` holds are floats of 16 to 64 bits, finite in
    float32."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{file}: {name} must be of float16, bfloat16, float32 or float64, "
                f"got {tensor.dtype}"
            )
        if tensor.numel() and not torch.stack(torch.aminmax(tensor.float())).isfinite().all():
            raise ValueError(f"{file}: {name} must be finite, but holds NaN or infinity")


def tensor_checksum(tensors: Mapping[str, Tensor], beside: str) -> str:
    """Return the CRC-32 of tensors on the CPU, their names and the text ``beside`` them."""
    value = zlib.crc32(beside.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
