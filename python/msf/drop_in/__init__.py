"""Our operators inside diffusion transformers that others wrote."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from . import diffusers, dit
from .probe import Probe
from .structure import Family, run

FAMILIES: tuple[Family, ...] = (*dit.FAMILIES, *diffusers.FAMILIES)
ROUNDINGS = ("fp32", "eager")


def accelerate(model: nn.Module, rounding: str = "fp32") -> nn.Module:
    """Let the blocks of a diffusion transformer run on our operators; return the model.

    The model is changed in place: each block, and the last layer, gets another ``forward``.
    Parameters, names and modules stay as they are, so checkpoints, optimizers, EMA copies and
    wrappers do not notice. Accelerate before or after `.cuda()` and FSDP2's `fully_shard` of whole
    blocks, and before FSDP1. A second call accelerates anew, with the rounding of that call.

    Known are the blocks of DiT (arXiv 2212.09748), SiT (arXiv 2401.08740), REPA (arXiv 2410.06940),
    LightningDiT (arXiv 2501.01423) and MPDiT, and diffusers' `DiTTransformer2DModel`, by names,
    kinds and shapes of what they are made of, whatever package they come from. One block of each
    kind then runs once beside its own forward, both on the CPU with random weights, and has to give
    the same. That draws no random number of the caller's.

    Args:
        model: any module that holds such blocks, wrapped or not.
        rounding: "fp32" replaces adaLN, gates, attention with its QK-norm, RoPE and bias, and bias
            and GELU of the MLP. All compute in float32 (float64 for float64) and round once, so in
            16 bits the output is nearer to the exact one, and is not that of the model bit for bit.
            "eager" replaces adaLN and gates alone, which round where the model does; attention and
            MLP stay the model's own. A gate then is bitwise the model's. In adaLN the statistics
            are sums in another order: of a normalised value that takes 16 bits, one in hundreds or
            thousands differs by its last bit, and in float32 any by a few. Where dtypes are mixed,
            as under autocast, "eager" rounds as "fp32" does. The gradients are the same in both.

    Raises:
        TypeError: the model is no module.
        ValueError: there is no such block, or one differs in what the message says; the model is
            then as it was.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    _check_module("accelerate", model)
    found = [
        (name or type(module).__name__, module, family)
        for name, module in model.named_modules()
        for family in FAMILIES
        if family.has(module)
    ]
    if not any(family.is_block for _, _, family in found):
        names = "; or ".join(", ".join(family.children) for family in FAMILIES if family.is_block)
        raise ValueError(
            f"msf.accelerate: {type(model).__name__} has no block of a known diffusion transformer,"
            f" which consists of {names}"
        )
    for name, module, family in found:
        other = module.__dict__.get("forward")
        if other is not None and not _is_ours(module):
            raise ValueError(f"msf.accelerate: {name} has a forward that replaces its class's")
        family.check(name, module)
    probe = Probe(model, rounding)
    for name, module, family in found:
        probe(name, module, family)
    for _, module, family in found:
        module.__dict__["forward"] = family.replacement(module, rounding)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`, exactly; return the model. One that is not accelerated stays as it is."""
    _check_module("restore", model)
    for module in model.modules():
        if _is_ours(module):
            del module.__dict__["forward"]
    return model


def _check_module(name: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"msf.{name}: model must be an nn.Module, got a {type(model).__name__}")


def _is_ours(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is run
