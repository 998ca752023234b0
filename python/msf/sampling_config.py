"""The settings of sampling: one frozen dataclass, and what it says for each stage of a model."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, TypeVar

from .config import DIFFUSION_STEPS, MAX_STEPS, MSFConfig
from .parsing import MAX_FLOAT32, items_of, parse, parse_number, parse_whole

# By what a model predicts, the default first.
SOLVERS_OF = {"velocity": ("euler", "heun"), "noise": ("ddpm", "ddim")}
SOLVERS = tuple(solver for solvers in SOLVERS_OF.values() for solver in solvers)

T = TypeVar("T")
Interval = tuple[float, float]
OneOrEach: TypeAlias = T | Sequence[T]  # one value for all stages, or one a stage, base first


@dataclass(frozen=True)
class StageSampling:
    """A StageSampling says how one stage's velocity is integrated, in fields of
    ``SamplingConfig``."""

    steps: int
    guidance_scale: float
    guidance_interval: Interval
    solver: str

    def __post_init__(self) -> None:
        parse_whole(self.steps, "steps")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver must be one of {SOLVERS}, got {self.solver!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.steps > MAX_STEPS:
            raise ValueError(f"steps must be at most {MAX_STEPS}, got {self.steps}")
        low, high = self.guidance_interval
        if not (abs(self.guidance_scale) <= MAX_FLOAT32 and 0 <= low <= high <= 1):
            raise ValueError(
                "guidance_scale must be finite and guidance_interval 0 <= low <= high <= 1, "
                f"got {reprlib.repr(self.guidance_scale)} and {self.guidance_interval}"
            )


@dataclass(frozen=True)
class SamplingConfig:
    """A SamplingConfig says how ``sample`` generates images.

    steps, guidance_scale and guidance_interval are one value for all stages, or one a stage, base
    first.

    Args:
        steps: integration steps; the model's own, ``MSFConfig.steps``, by default.
        guidance_scale: classifier-free guidance (arXiv 2207.12598); 1 is none.
        guidance_interval: (low, high) in [0, 1], the times with guidance, noise being at 0.
        solver: "euler", the default, or "heun" (two evaluations a step but the last); of a model
            that predicts noise "ddpm", the default, or "ddim", see ``diffusion.denoise``.
        prior_noise: deviation of the noise added to every residual's prior, in standard deviations
            of the base.
        project_residual: make every scale, pooled, equal the scale below it up to rounding (nearest
            upsampling only).
    """

    steps: OneOrEach[int] | None = None
    guidance_scale: OneOrEach[float] = 1.0
    guidance_interval: OneOrEach[Interval] = (0.0, 1.0)
    solver: str | None = None
    prior_noise: float = 0.0
    project_residual: bool = False

    def __post_init__(self) -> None:
        for name, kind in (("prior_noise", float), ("project_residual", bool)):
            object.__setattr__(self, name, parse(getattr(self, name), kind, f"sample: {name}"))

    def stages(self, model: MSFConfig) -> list[StageSampling]:
        """Return what holds for each stage of ``model``; a ValueError says what does not fit it."""
        interval = self.guidance_interval
        if not any(items_of(end) for end in items_of(interval) or ()):  # one for all
            interval = [interval] * len(model.stages)  # type: ignore[list-item]
        steps = model.steps if self.steps is None else self.steps
        columns = (
            _one_each(model, "steps", steps, parse_whole),
            _one_each(model, "guidance_scale", self.guidance_scale, parse_number),
            _one_each(model, "guidance_interval", interval, _parse_interval),
        )
        default, _ = SOLVERS_OF[model.prediction]
        solver = default if self.solver is None else self.solver
        stages = [StageSampling(*row, solver) for row in zip(*columns)]
        for problem in self._problems(model, stages):
            raise ValueError(f"sample: {problem}")
        return stages

    def _problems(self, model: MSFConfig, stages: Sequence[StageSampling]) -> Iterator[str]:
        solver, fitting = stages[0].solver, SOLVERS_OF[model.prediction]
        if solver not in fitting:
            yield (
                f"solver must be {' or '.join(fitting)} for a model that predicts "
                f"{model.prediction}, got {solver!r}"
            )
        if model.prediction == "noise" and (steps := stages[0].steps) > DIFFUSION_STEPS:
            yield (
                f"steps must be at most {DIFFUSION_STEPS} for a model that predicts noise, "
                f"got {steps}"
            )
        guided = any(stage.guidance_scale != 1 for stage in stages)
        if guided and model.num_classes and model.label_dropout in (0, 1):
            never = "no class" if model.label_dropout == 0 else "any class"
            yield (
                f"guidance_scale must be 1 for a model with label_dropout {model.label_dropout:g}: "
                f"it was never trained with {never}"
            )
        if guided and not model.num_classes:
            yield "guidance_scale must be 1 for a model without classes"
        if not 0 <= self.prior_noise <= model.max_prior_noise:
            yield (
                f"prior_noise must be in [0, {model.max_prior_noise}], as in training, "
                f"got {self.prior_noise}"
            )
        if not model.levels and (self.prior_noise or self.project_residual):
            yield "prior_noise and project_residual need a residual, this model has none (N = 0)"
        if self.project_residual and model.upsample != "nearest":
            yield f"project_residual needs upsample='nearest', not {model.upsample!r}"


class SamplingFields(TypedDict, total=False):
    """SamplingFields are the fields of ``SamplingConfig`` as keyword arguments."""

    steps: OneOrEach[int] | None
    guidance_scale: OneOrEach[float]
    guidance_interval: OneOrEach[Interval]
    solver: str | None
    prior_noise: float
    project_residual: bool


def _one_each(
    model: MSFConfig, name: str, value: Any, parse_one: Callable[[Any, str], Any]
) -> list[Any]:
    """Return the parsed value of each stage, from one for all or one a stage."""
    count, items = len(model.stages), items_of(value)
    values = [value] * count if items is None else items
    if len(values) != count:
        raise ValueError(f"sample: {name} must be one value or {count}, one a stage, got {value}")
    return [parse_one(item, f"sample: {name}") for item in values]


def _parse_interval(value: Any, where: str) -> Any:
    ends = items_of(value)
    if ends is None or len(ends) != 2:
        raise ValueError(f"{where} must be (low, high), got {reprlib.repr(value)}")
    return tuple(parse_number(end, where) for end in ends)
