"""One module of each kind, run beside what shall replace its forward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from msf_kernels import backend

from .structure import Family, refuse

# What rounds to float32 in between, as angles and some norms do, is off by some 1e-7 of the output.
TOLERANCE = 1e-5
TOKENS = 17  # a prime, which windows of attention do not divide


class Probe:
    """A Probe runs modules of a model beside what shall replace their forward.

    Names and shapes cannot tell in which order a forward takes its modulations, or whether it has a
    mask. Both run on the CPU in float64 with the same random weights, because the model's may be
    zero, in parts, or on no device at all.
    """

    def __init__(self, model: nn.Module, rounding: str) -> None:
        ropes = (m for m in model.modules() if hasattr(m, "freqs_cos") and hasattr(m, "freqs_sin"))
        self.rope = next(ropes, None)
        self.rounding = rounding
        self.seen: set[Any] = set()

    def __call__(self, where: str, module: nn.Module, family: Family) -> None:
        """Raise ValueError where the module computes something else, or cannot run."""
        if (kind := _kind(module)) in self.seen:
            return
        self.seen.add(kind)
        try:
            problem = self._difference(module, family)
        except Exception as error:
            line = str(error).partition("\n")[0]
            problem = f"does not run beside what would replace it: {line}"
        if problem is not None:
            refuse(where, problem)

    @torch.no_grad()
    def _difference(self, module: nn.Module, family: Family) -> str | None:
        """Say what the module does otherwise in evaluation or in training; None for nothing."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

        tensors = _tensors(module, self.rope, normal)
        inputs = family.inputs(module, normal, TOKENS, self.rope)

        def run(forward: Callable[..., Tensor], **options: str) -> tuple[Tensor, Tensor]:
            torch.random.default_generator.manual_seed(0)  # blocks may drop labels
            beside = _Beside(module, self.rope, forward)
            return functional_call(beside, tensors, inputs, options), torch.get_rng_state()

        # A forward may have been compiled by its author, which would take long here.
        dynamo = "torch._dynamo" in sys.modules
        eager = torch.compiler.set_stance("force_eager") if dynamo else nullcontext()
        with eager, torch.random.fork_rng([]), torch.autocast("cpu", enabled=False):
            for training in False, True:
                with _mode(module, training):
                    with backend("reference"):
                        got, drawn = run(family.forward, rounding=self.rounding)
                    expected, expected_drawn = run(type(module).forward)
                if not torch.equal(drawn, expected_drawn):
                    return "draws random numbers, as dropout does, and what replaces it does not"
                error = float((got - expected).norm() / expected.norm())
                if not error < TOLERANCE:
                    return f"computes something else than its kind: {error:.1g} of its output"
        return None


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    modes = {m: m.training for m in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def _kind(module: nn.Module) -> Any:
    """Return what modules that compute the same have in common: the classes and settings of all
    they consist of, shapes of parameters, and the very buffers."""
    parts = tuple((name, type(m), _settings(m)) for name, m in module.named_modules())
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return parts, shapes, tuple(map(id, module.buffers()))


def _settings(module: nn.Module) -> str:
    """Return a module's own attributes. What cannot be told by its text has its address there, so
    that a module with such a one is of a kind of its own."""
    own = sorted(vars(module).keys() - vars(nn.Module()).keys() - {"forward"})  # which is ours
    return repr([(name, _value(vars(module)[name])) for name in own])


def _value(x: Any) -> Any:
    """Return tensors by identity, and objects whose text may be their address by class and
    attributes."""
    if isinstance(x, Tensor):
        return id(x)
    return (
        (type(x), vars(x)) if type(x).__repr__ is object.__repr__ and hasattr(x, "__dict__") else x
    )


class _Beside(nn.Module):
    """A _Beside lets another function run as a module's forward, without the module's hooks."""

    def __init__(
        self, module: nn.Module, rope: nn.Module | None, function: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.module, self.rope, self.function = module, rope, function

    def forward(self, *inputs: Any, **options: str) -> Tensor:
        return self.function(self.module, *inputs, **options)


def _tensors(
    module: nn.Module, rope: nn.Module | None, normal: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Make parameters, buffers and rotary angles for a _Beside."""
    tensors = {
        f"module.{name}": buffer.detach().to("cpu", torch.float64)
        for name, buffer in module.named_buffers()
        if buffer.is_floating_point()
    }
    for name, parameter in module.named_parameters():
        fan_in = parameter.shape[1:].numel()
        tensors[f"module.{name}"] = normal(*parameter.shape) * (
            2 / fan_in**0.5 if fan_in > 1 else 0.5
        )
    if rope is not None:
        freqs: Any = rope.freqs_cos
        angles = normal(TOKENS, freqs.shape[1] // 2).repeat_interleave(2, 1)
        tensors |= {"rope.freqs_cos": angles.cos(), "rope.freqs_sin": angles.sin()}
    return tensors
