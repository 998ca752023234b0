"""Generation: the base from noise, then every residual from noise and what lies below it."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .config import MSFConfig
from .flow import Velocity, check_settings, integrate
from .model import MSF
from .parsing import items_of, parse, parse_number, parse_whole
from .seeds import generator

Interval = tuple[float, float]


@overload
def sample(
    model: MSF,
    labels: Tensor | None = None,
    *,
    seeds: Sequence[int] | Tensor,
    steps: int | Sequence[int] | None = None,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_interval: Interval | Sequence[Interval] = (0.0, 1.0),
    solver: str = "euler",
    prior_noise: float = 0.0,
    project_residual: bool = False,
    base: Tensor | None = None,
    size: tuple[int, int] | None = None,
    return_components: Literal[False] = False,
) -> Tensor: ...


@overload
def sample(
    model: MSF,
    labels: Tensor | None = None,
    *,
    seeds: Sequence[int] | Tensor,
    steps: int | Sequence[int] | None = None,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_interval: Interval | Sequence[Interval] = (0.0, 1.0),
    solver: str = "euler",
    prior_noise: float = 0.0,
    project_residual: bool = False,
    base: Tensor | None = None,
    size: tuple[int, int] | None = None,
    return_components: Literal[True],
) -> tuple[Tensor, list[Tensor]]: ...


@torch.no_grad()
def sample(
    model: MSF,
    labels: Tensor | None = None,
    *,
    seeds: Sequence[int] | Tensor,
    steps: int | Sequence[int] | None = None,
    guidance_scale: float | Sequence[float] = 1.0,
    guidance_interval: Interval | Sequence[Interval] = (0.0, 1.0),
    solver: str = "euler",
    prior_noise: float = 0.0,
    project_residual: bool = False,
    base: Tensor | None = None,
    size: tuple[int, int] | None = None,
    return_components: bool = False,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Generate images (B, C, H, W), float32, in the units of the training data.

    steps, guidance_scale and guidance_interval are one value for all stages, or one a stage, base
    first.

    Args:
        labels: (B,) int64 in [0, num_classes]; ``num_classes`` means no class; None for a model
            without.
        seeds: one non-negative int an image, in a sequence or a tensor (B,). An image depends on
            its seed, not on the batch that it is made in (up to rounding: a matrix product's
            depends on its shape).
        steps: the configuration's by default.
        guidance_interval: (low, high) in [0, 1], noise being at 0.
        solver: "euler" or "heun" (two evaluations a step but the last).
        prior_noise: deviation of the noise added to every residual's prior, in the base's standard
            deviations.
        project_residual: make every scale, pooled, equal the scale below it up to rounding
            (nearest upsampling only).
        base: f_0 (B, C, h, w) in data units, to generate only the residuals above it.
        size: (H, W) of the images, the configuration's by default.
        return_components: return (images, [f_0 .. f_N]), components as ``pyramid.split`` gives
            them.

    Raises:
        ValueError: a wrong shape, range or combination.
        TypeError: a model that is no MSF, labels or a base that are no tensors, seeds that are no
            whole numbers.
    """
    # Not by its class: a compiled model is another's.
    if not isinstance(getattr(model, "config", None), MSFConfig):
        raise TypeError(f"sample: model must be an MSF, got a {type(model).__name__}")
    config, device = model.config, model.pyramid.mean.device
    seeds = _whole_numbers(seeds)
    size = config.image_size if size is None else parse(size, tuple[int, int], "sample: size")
    prior_noise = parse_number(prior_noise, "sample: prior_noise")
    _check(model, labels, seeds, base, size)
    integration = stage_settings(
        config,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        solver=solver,
        prior_noise=prior_noise,
        project_residual=project_residual,
    )
    labels = None if labels is None else labels.to(device)
    x = None if base is None else base.to(device, torch.float32)
    components = [] if x is None else [x]
    for i in range(len(components), len(model.stages)):
        below = x
        velocity = _velocity(model, i, labels, below, seeds, prior_noise)
        shape = (config.channels, *config.stage_size(i, size))
        noise = image_noise(seeds, shape, i).to(device)
        solve = partial(integrate, velocity, noise, patch=config.stages[i].patch, **integration[i])
        if below is None:
            x = model.pyramid.unstandardize(i, solve())
            components.append(x)
            continue
        x = solve(last=model.pyramid.last_step(below, i, config.stages[i].patch))
        if project_residual:
            x = model.pyramid.project(x, below)
        components.append(x - model.pyramid.upsample(below))
    assert x is not None  # there is always a base
    return (x, components) if return_components else x


def stage_settings(
    config: MSFConfig,
    *,
    steps: int | Sequence[int] | None,
    guidance_scale: float | Sequence[float],
    guidance_interval: Interval | Sequence[Interval],
    solver: str,
    prior_noise: float,
    project_residual: bool,
) -> list[dict[str, Any]]:
    """What ``integrate`` is given for every stage, by the arguments of ``sample``; ValueError where
    these do not fit the model."""
    if not any(items_of(end) for end in items_of(guidance_interval) or ()):  # one for all
        guidance_interval = [guidance_interval] * len(config.stages)  # type: ignore[list-item]
    settings = _per_stage(
        len(config.stages),
        steps=(config.steps if steps is None else steps, parse_whole),
        guidance_scale=(guidance_scale, parse_number),
        guidance_interval=(guidance_interval, _parse_interval),
    )
    for stage in settings:
        stage["solver"] = solver
        check_settings(**stage)
    if not config.num_classes and any(stage["guidance_scale"] != 1 for stage in settings):
        raise ValueError("sample: guidance_scale must be 1 for a model without classes")
    if not 0 <= prior_noise <= config.max_prior_noise:
        raise ValueError(
            f"sample: prior_noise must be in [0, {config.max_prior_noise}], as in training, "
            f"got {prior_noise}"
        )
    if not config.levels and (prior_noise or project_residual):
        raise ValueError(
            "sample: prior_noise and project_residual need a residual, this model has none (N = 0)"
        )
    if project_residual and config.upsample != "nearest":
        raise ValueError(
            f"sample: project_residual needs upsample='nearest', not {config.upsample!r}"
        )
    return settings


def image_noise(seeds: Sequence[int], shape: tuple[int, ...], *purpose: int) -> Tensor:
    """(B, *shape) standard normal on the CPU; a row depends on its seed and ``purpose`` alone."""
    noise = torch.empty(len(seeds), *shape)
    for row, seed in zip(noise, seeds):
        row.normal_(generator=generator(seed, *purpose))
    return noise


def _velocity(
    model: MSF,
    index: int,
    labels: Tensor | None,
    below: Tensor | None,
    seeds: Sequence[int],
    prior_noise: float,
) -> Velocity:
    """Stage ``index`` as a velocity field on its component, given the image ``below`` it."""
    stage, null, batch = model.stages[index], model.config.num_classes, len(seeds)
    prior = deviation = None
    if below is not None:
        noise = image_noise(seeds, tuple(below.shape[1:]), index, 1).to(below.device)
        deviation = torch.full((batch,), prior_noise, device=below.device)
        prior = model.prior(below, deviation, noise)

    def twice(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.cat([value, value])

    def tokens(*inputs: Tensor | None) -> Tensor:
        v: Tensor = stage(*inputs, as_tokens=True)
        # Beside the float32 state the step takes 16 bits as they are, but no float64.
        return v.float() if v.dtype == torch.float64 else v

    def velocity(x: Tensor, t: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        if not guided or labels is None:
            return tokens(x, t, labels, prior, deviation), None
        y = torch.cat([labels, torch.full_like(labels, null)])
        v_cond, v_uncond = tokens(twice(x), twice(t), y, twice(prior), twice(deviation)).chunk(2)
        return v_cond, v_uncond

    return velocity


def _per_stage(
    stages: int, **settings: tuple[Any, Callable[[Any, str], Any]]
) -> list[dict[str, Any]]:
    """[{name: value}] a stage from {name: (one value or one a stage, what parses one value)}."""
    rows: list[dict[str, Any]] = [{} for _ in range(stages)]
    for name, (value, parse_one) in settings.items():
        items = items_of(value)
        values = [value] * stages if items is None else items
        if len(values) != stages:
            raise ValueError(
                f"sample: {name} must be one value or {stages}, one a stage, got {value}"
            )
        for row, item in zip(rows, values):
            row[name] = parse_one(item, f"sample: {name}")
    return rows


def _parse_interval(value: Any, where: str) -> Any:
    """Its ends as floats; what has none is ``check_settings``'s to refuse."""
    ends = items_of(value)
    return value if ends is None else tuple(parse_number(end, where) for end in ends)


def _whole_numbers(seeds: Sequence[int] | Tensor) -> list[int]:
    values = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    try:
        return [operator.index(seed) for seed in values]
    except TypeError:
        raise TypeError(
            "sample: seeds must be a sequence of whole numbers, one an image, "
            f"got {reprlib.repr(values)}"
        ) from None


def _check(
    model: MSF,
    labels: Tensor | None,
    seeds: Sequence[int],
    base: Tensor | None,
    size: tuple[int, int],
) -> None:
    config = model.config
    config.check_size(size)
    if isinstance(labels, Tensor):
        labels = labels.cpu()  # where their range is checked
        if labels.dim() == 1 and len(labels) != len(seeds):
            raise ValueError(
                "sample: give a seed for every label, "
                f"got {len(labels)} labels and {len(seeds)} seeds"
            )
    model.check_labels(labels, len(seeds), null=True)
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"sample: seeds must not be negative, got {min(seeds)}")
    expected = (len(seeds), config.channels, *config.stage_size(0, size))
    if base is not None and not isinstance(base, Tensor):
        raise TypeError(f"sample: base must be a tensor {expected}, got a {type(base).__name__}")
    if base is not None and tuple(base.shape) != expected:
        raise ValueError(f"sample: base must be {expected}, got {tuple(base.shape)}")
