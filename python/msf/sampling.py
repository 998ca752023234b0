"""Generation: the base from noise, then every residual from noise and what lies below it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_kind, check_real
from .config import MSFConfig
from .diffusion import denoise
from .model import MSF
from .modes import default_device, has_values, no_memory, own_casts
from .parsing import any_whole, items_of, parse
from .sampling_config import SamplingConfig, SamplingFields, StageSampling
from .seeds import generator
from .solver import Velocity, integrate
from .transformer import unpatchify
from .weights import plain_state

if TYPE_CHECKING:
    from typing_extensions import Unpack

STEP_NOISE = (0, 3)  # the purpose of what a step of the diffusion adds, and its number


class Sample(NamedTuple):
    """A Sample has images (B, C, H, W) and their components [f_0 .. f_N] as ``Pyramid.split`` gives
    them, all float32 in the units of the training data."""

    images: Tensor
    components: list[Tensor]


def sample(
    model: MSF,
    labels: Tensor | None = None,
    *,
    seeds: Sequence[int] | Tensor,
    config: SamplingConfig | None = None,
    base: Tensor | None = None,
    size: tuple[int, int] | None = None,
    **fields: Unpack[SamplingFields],
) -> Tensor:
    """Generate images (B, C, H, W), float32, in the units of the training data.

    Under torch.compile the noise is drawn outside of its graphs, so ``fullgraph`` is refused.

    Args:
        model: one that FSDP2 has sharded is whole in each process meanwhile, and all call this.
        labels: (B,) int64 in [0, num_classes]; ``num_classes`` means no class; None for a model
            without.
        seeds: one non-negative int an image, in a sequence or a tensor (B,). An image depends on
            its seed, not on the batch that it is made in (up to rounding: a matrix product's
            depends on its shape).
        config: how to sample.
        base: f_0 (B, C, h, w) in data units, to generate only the residuals above it.
        size: (H, W) of the images, the model's by default.
        fields: fields of ``SamplingConfig``, in place of those of ``config``.

    Raises:
        ValueError: a wrong shape, range or combination, or a model that makes NaN or infinity.
        TypeError: a model that is no MSF, labels or a base that are no tensors, seeds that are no
            whole numbers.
    """
    made = sample_components(
        model, labels, seeds=seeds, config=config, base=base, size=size, **fields
    )
    return made.images


@default_device()
@own_casts()
@torch.no_grad()
def sample_components(
    model: MSF,
    labels: Tensor | None = None,
    *,
    seeds: Sequence[int] | Tensor,
    config: SamplingConfig | None = None,
    base: Tensor | None = None,
    size: tuple[int, int] | None = None,
    **fields: Unpack[SamplingFields],
) -> Sample:
    """Generate what ``sample`` does, and keep the components that the images are made of."""
    check_model(model, "sample")
    model = _gathered(model)
    device, pyramid = model.pyramid.mean.device, model.pyramid
    seeds = _whole_numbers(seeds)
    size = model.config.image_size if size is None else parse(size, tuple[int, int], "sample: size")
    _check(model, labels, seeds, base, size)
    config = SamplingConfig() if config is None else config
    check_kind(config, SamplingConfig, "sample: config")
    if unknown := fields.keys() - SamplingFields.__annotations__.keys():
        known = ", ".join(SamplingFields.__annotations__)
        raise TypeError(f"sample: unknown fields {', '.join(sorted(unknown))}; known are {known}")
    config = replace(config, **fields)
    stages = config.stages(model.config)

    labels = None if labels is None else labels.to(device)
    x = None if base is None else base.to(device, torch.float32)
    components = [] if x is None else [x]
    for i in range(len(components), len(stages)):
        below, patch = x, model.config.stages[i].patch
        noise = image_noise(seeds, (model.config.channels, *model.config.stage_size(i, size)), i)
        velocity = _velocity(model, i, labels, below, seeds, config.prior_noise)
        if model.config.prediction == "noise":
            x = _denoised(velocity, noise.to(device), stages[i], patch, seeds)
        else:
            last = None if below is None else pyramid.last_step(below, i, patch)
            x = integrate(velocity, noise.to(device), stages[i], patch=patch, last=last)
        if below is None:
            x = pyramid.unstandardize_base(x)
            components.append(x)
        else:
            x = pyramid.project(x, below) if config.project_residual else x
            components.append(x - pyramid.upsample(below))
    assert x is not None  # there is always a base
    if not _is_finite(x):
        raise ValueError(
            "sample: the model makes NaN or infinity; try it in float32 (--precision fp32)"
        )
    return Sample(x, components)


def check_model(model: Any, caller: str) -> None:
    """Raise TypeError unless ``model`` is an MSF. It is known by its config, because a compiled one
    is of another class."""
    if isinstance(getattr(model, "config", None), MSFConfig):
        return
    inner = getattr(getattr(model, "module", None), "config", None)
    hint = "; give its .module" if isinstance(inner, MSFConfig) else ""
    raise TypeError(f"{caller}: model must be an MSF, got a {type(model).__name__}{hint}")


def _gathered(model: MSF) -> MSF:
    """Return a copy with whole weights of a model that FSDP2 or FSDP1 has sharded as a whole: its
    own call, which is the loss, would gather them for that alone. Return any other as it is."""
    if not any(hasattr(model, name) for name in ("unshard", "_fsdp_wrapped_module")):
        return model
    with no_memory():
        copy = MSF(model.config)
    copy.load_state_dict(plain_state(model), assign=True)
    return copy


def image_noise(seeds: Sequence[int], shape: tuple[int, ...], *purpose: int) -> Tensor:
    """Draw normals (B, *shape) on the CPU; a row depends on its seed and ``purpose`` alone."""
    draw = _drawn_outside_graphs if torch.compiler.is_compiling() else _drawn
    return draw(seeds, shape, *purpose)


def _drawn(seeds: Sequence[int], shape: tuple[int, ...], *purpose: int) -> Tensor:
    noise = torch.empty(len(seeds), *shape, dtype=torch.float32)
    for row, seed in zip(noise, seeds):
        row.normal_(generator=generator(seed, *purpose))
    return noise


# A graph cannot hold the generators. torch.compiler.disable would import the compiler, which takes
# as long as the rest of a command's start.
_drawn_outside_graphs = torch._disable_dynamo(_drawn)


def _denoised(
    noise: Velocity, x: Tensor, sampling: StageSampling, patch: int, seeds: Sequence[int]
) -> Tensor:
    """Return the data (B, C, H, W) that noise x becomes by a model whose tokens are ``noise``; what
    a step adds anew is drawn as x was."""
    size = (x.shape[2], x.shape[3])

    def guided_noise(x: Tensor, step: Tensor, guided: bool) -> Tensor:
        cond, uncond = (v if v is None else v.float() for v in noise(x, step, guided))
        assert cond is not None
        if uncond is not None:
            cond = uncond + sampling.guidance_scale * (cond - uncond)
        return unpatchify(cond, patch, size)

    def draw(step: int) -> Tensor:
        return image_noise(seeds, tuple(x.shape[1:]), *STEP_NOISE, step).to(x.device)

    return denoise(guided_noise, x, sampling, draw)


def _velocity(
    model: MSF,
    index: int,
    labels: Tensor | None,
    below: Tensor | None,
    seeds: Sequence[int],
    prior_noise: float,
) -> Velocity:
    """Return the velocity, or the noise, that stage ``index`` predicts, given the image ``below``
    it (B, C, h, w)."""
    stage, null = model.stages[index], model.config.num_classes
    given: tuple[Tensor, ...] = ()
    if below is not None:
        noise = image_noise(seeds, tuple(below.shape[1:]), index, 1).to(below.device)
        deviation = torch.full((len(seeds),), prior_noise, dtype=torch.float32, device=below.device)
        given = model.prior(below, deviation, noise), deviation

    def tokens(*inputs: Tensor | None) -> Tensor:
        v: Tensor = stage(*inputs, as_tokens=True)
        # Beside the float32 state the step takes 16 bits as they are, but no float64.
        return v.float() if v.dtype == torch.float64 else v

    def velocity(x: Tensor, t: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        if not guided or labels is None:
            return tokens(x, t, labels, *given), None
        y = torch.cat([labels, torch.full_like(labels, null)])
        x, t, *twice = (torch.cat([value, value]) for value in (x, t, *given))
        v_cond, v_uncond = tokens(x, t, y, *twice).chunk(2)
        return v_cond, v_uncond

    return velocity


def _whole_numbers(seeds: Sequence[int] | Tensor) -> list[int]:
    values = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    items = items_of(values)
    try:
        if items is not None:
            return [any_whole(seed, "seed") for seed in items]
    except ValueError:
        pass
    raise TypeError(
        "sample: seeds must be a sequence of whole numbers, one an image, "
        f"got {reprlib.repr(values)}"
    )


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
        labels = labels.cpu()  # their range is only checked there
        if labels.dim() == 1 and len(labels) != len(seeds):
            raise ValueError(
                "sample: give a seed for every label, "
                f"got {len(labels)} labels and {len(seeds)} seeds"
            )
    model.check_labels(labels, len(seeds), null=True)
    if labels is not None:
        for problem in _untrained_labels(config, labels):
            raise ValueError(f"sample: {problem}")
    if any(seed < 0 for seed in seeds):
        raise ValueError(f"sample: seeds must not be negative, got {min(seeds)}")
    expected = (len(seeds), config.channels, *config.stage_size(0, size))
    if base is None:
        return
    check_real(base, f"sample: base must be a tensor {expected}")
    if tuple(base.shape) != expected:
        raise ValueError(f"sample: base must be {expected}, got {tuple(base.shape)}")
    if not _is_finite(base.to(torch.float32)):
        raise ValueError("sample: base must be finite in float32, but holds NaN or infinity")


def _untrained_labels(config: MSFConfig, labels: Tensor) -> Iterator[str]:
    if not has_values(labels):
        return
    null, dropout = config.num_classes, config.label_dropout
    line = f"for a model with label_dropout {dropout:g}: it was never trained with"
    if dropout == 0 and (labels == null).any():
        yield f"labels must be below {null} (no class) {line} no class"
    if dropout == 1 and (labels != null).any():
        yield f"labels must be {null} (no class) {line} any class"


def _is_finite(x: Tensor) -> bool:
    """Return whether all of x is finite, as far as that can be looked at."""
    return not has_values(x) or bool(x.isfinite().all())
