"""What a block must consist of; each check raises one line that says which module differs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from torch import nn

HOOKS = ("forward_pre", "forward", "backward_pre", "backward")


@dataclass(frozen=True)
class Family:
    """A Family is one kind of module and what runs in place of its forward.

    Args:
        children: names of modules that make a module one of it.
        absent: names of modules that it does not have.
        forward: takes the module, then what its own forward takes, then ``rounding``.
        check: takes the module's name and the module; raises ValueError where it does not match.
        inputs: makes what the module's forward takes, from the module, normal(*shape), the number
            of tokens, and the model's module of rotary positions, or None where it has none.
        norms: paths of what ``forward`` reads but does not call, whatever the rounding.
        read: paths of what a block does not call either with rounding "fp32".
    """

    children: tuple[str, ...]
    absent: tuple[str, ...]
    forward: Callable[..., Any]
    check: Callable[[str, nn.Module], None]
    inputs: Callable[..., tuple[Any, ...]]
    norms: tuple[str, ...]
    read: tuple[str, ...] = ()

    @property
    def is_block(self) -> bool:
        """Whether it is a block, not a model's last layer."""
        return bool(self.read)

    def has(self, module: nn.Module) -> bool:
        """Tell by the names of its modules whether a module is to be one of this family."""
        names = {name for name, _ in module.named_children()}
        return names.issuperset(self.children) and names.isdisjoint(self.absent)

    def replacement(self, module: nn.Module, rounding: str) -> partial[Any]:
        """Return what runs in place of the module's forward, as long as its parts stay."""
        paths = self.norms + (self.read if rounding == "fp32" else ())
        parts = [_part(module, path) for path in paths]
        own, ours = (
            list(inspect.signature(function).parameters)[1:]
            for function in (type(module).forward, self.forward)
        )
        names = dict(zip(own, ours[:-1]))  # the last is the rounding
        return partial(run, self.forward, module, parts, names, rounding)


Part = tuple[Any, str, Any, Any]  # a module, the name of an attribute, what that is, and runs


def _part(module: Any, path: str) -> Part:
    *parents, name = path.split(".")
    for parent in parents:
        module = getattr(module, parent)
    part = getattr(module, name, None)
    return module, name, part, _forward(part)


def _forward(part: Any) -> Any:
    return getattr(type(part), "forward", None)


def run(
    forward: Callable[..., Any],
    module: nn.Module,
    parts: Iterable[Part],
    names: Mapping[str, str],
    rounding: str,
    *args: Any,
    **options: Any,
) -> Any:
    """Run a family's forward, whose parameters are called as ``names`` says of the module's own.
    Raise ValueError where one of the module's parts, which are not called, is another than at the
    time of `accelerate`, or of another class, which its forward tells: a parametrization changes
    the class too."""
    for parent, name, part, its_forward in parts:
        now = getattr(parent, name, None)
        if now is not part:
            refuse_change(f"another {kind(now)}" if type(now) is type(part) else f"a {kind(now)}")
        if _forward(now) is not its_forward:
            refuse_change(f"a {kind(now)}")
    renamed = {names.get(name, name): value for name, value in options.items()}
    return forward(module, *args, **renamed, rounding=rounding)


def refuse_change(now: str) -> NoReturn:
    raise ValueError(
        f"an accelerated block reads the weights of its layers, and one is now {now}; call "
        "msf.restore before layers are replaced, wrapped or hooked"
    )


def refuse(where: str, what: str) -> NoReturn:
    raise ValueError(f"msf.accelerate: {where} {what}")


def check_children(where: str, module: nn.Module, known: Iterable[str]) -> None:
    """Check that a module has no more than the known ones, except for what does nothing."""
    for name, child in module.named_children():
        if name not in known and not does_nothing(child):
            refuse(f"{where}.{name}", f"is a {kind(child)}, which is not known in such a block")


def check_no_hooks(where: str, block: nn.Module) -> None:
    """Check that no module inside of the block has hooks or a forward of its own, because it may
    not be called any more."""
    for name, module in block.named_modules():
        if module is not block and (what := hooks_of(module)):
            hint = "; FSDP wraps whole blocks" if what == "hooks" else ""
            refuse(f"{where}.{name}", f"has {what}, which would not run{hint}")


def hooks_of(module: nn.Module) -> str:
    """Return what a call of a module runs besides its class's forward, or in its place, as who
    records activations or offloads weights sets it; "" for nothing."""
    if any(getattr(module, f"_{kind}_hooks") for kind in HOOKS):
        return "hooks"
    return "a forward of its own" if "forward" in module.__dict__ else ""


def check_linear(where: str, layer: Any, inputs: int, outputs: int) -> None:
    """Check that a layer is PyTorch's own, of these sizes, and its weight whole."""
    if type(layer) is not nn.Linear:
        refuse(where, f"is a {kind(layer)}, not an nn.Linear")
    if (layer.in_features, layer.out_features) != (inputs, outputs):
        got = f"{layer.in_features} to {layer.out_features}"
        refuse(where, f"goes from {got} features, not from {inputs} to {outputs}")
    if tuple(layer.weight.shape) != (outputs, inputs):
        refuse(where, "has a weight of another shape: accelerate before FSDP1 wraps the model")


def check_dropout(where: str, layer: Any) -> None:
    """Check that a layer, where there is one, leaves everything as it is."""
    if layer is not None and not does_nothing(layer):
        refuse(where, f"is a {layer}, and the operators drop nothing")


def check_norm(where: str, norm: Any, width: int) -> None:
    """Check that a norm is LayerNorm, or RMSNorm by whatever class, of the last dimension."""
    if not is_norm(norm):
        refuse(where, f"is a {kind(norm)}, neither LayerNorm nor RMSNorm with weight and eps")
    if norm_width(norm) != width:
        refuse(where, f"is of {norm_width(norm)} channels, not of {width}")


def norm_width(norm: Any) -> int | None:
    """Return how many channels a norm is of, None where it cannot be told."""
    if hasattr(norm, "normalized_shape"):
        return norm.normalized_shape[0] if len(norm.normalized_shape) == 1 else None
    weight = getattr(norm, "weight", None)
    return weight.shape[0] if weight is not None and weight.dim() == 1 else None


def is_norm(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm or is_rms(norm)


def is_rms(norm: Any) -> bool:
    """Tell whether a norm is RMSNorm: PyTorch's, or a class of that name with a weight and eps.

    Without an eps PyTorch's depends on the dtype, which the operators do not know.
    """
    return (
        "rmsnorm" in type(norm).__name__.lower()
        and [name for name, _ in norm.named_parameters()] == ["weight"]
        and isinstance(getattr(norm, "eps", None), float)
    )


def does_nothing(layer: nn.Module) -> bool:
    """Tell whether a layer leaves everything as it is; a class derived from these may not."""
    is_empty = type(layer) is nn.Identity or (type(layer) is nn.Dropout and layer.p == 0)
    return is_empty and not hooks_of(layer)


def kind(layer: Any) -> str:
    return type(layer).__name__
