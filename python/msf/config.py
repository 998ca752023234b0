"""The configuration of an MSF model: one frozen dataclass, written to and read from JSON."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .parsing import MAX_FLOAT32, check_fields, parse_dataclass, parse_object

UPSAMPLE_MODES = ("nearest", "bilinear")
POSITIONS = ("rope", "sincos", "both")
NORMS = ("layer", "rms")
QK_NORMS = (True, False, "layer")
MLPS = ("gelu", "swiglu")
PREDICTIONS = ("velocity", "noise")
DIFFUSION_STEPS = 1000  # of a model that predicts noise
TIMES = ("logit-normal", "uniform")

# These are far beyond what can be trained: a slip is told before it takes all memory, or for ever.
MAX_STEPS = 100_000
MAX_SIDE = MAX_CHANNELS = MAX_WIDTH = 2**16
MAX_PIXELS = 2**26
MAX_CLASSES = 2**20
MAX_STAGES = 17  # every one halves the sides, and 2**16 sixteen times is 1
MAX_DEPTH = 1000
MAX_HIDDEN = 2**18
MIN_PROBABILITY = 2**-24  # torch.rand draws multiples of it, and so no smaller probability


@dataclass(frozen=True)
class StageConfig:
    """A StageConfig describes one diffusion transformer. ``patch`` is in pixels (or latents) of the
    stage's own scale, ``mlp_ratio`` the hidden channels of an MLP over ``width``."""

    width: int
    depth: int
    heads: int
    patch: int = 2
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Return the channels between the two products of an MLP."""
        return round(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class MSFConfig:
    """An MSFConfig describes a multi-scale factorization (arXiv 2501.13349): ``stages[0]`` makes
    the base, the other stages a residual each.

    With N = ``levels`` = ``len(stages) - 1``, stage i works at ``image_size / 2**(N - i)``. N = 0
    is a plain single-stage DiT, the baseline.

    ``num_classes`` 0 means training without labels. ``max_prior_noise`` is the most noise that a
    residual's prior gets in training, in standard deviations of the base. ``times`` are drawn in
    training "logit-normal", with the deviation ``time_std``, or "uniform". ``standardize`` False
    leaves components as they are: statistics are not measured. ``steps`` are the sampler's
    defaults, one number a stage.

    What else published models differ in: ``prediction`` "noise" is DDPM's (arXiv 2006.11239), of
    one stage that is sampled and not trained, and whose times are the numbers of its diffusion
    steps. A time t in [0, 1], noise being at 0, is embedded as the number that far from the first
    to the second of ``time_range``, by sinusoids of wavelengths up to 2 pi ``time_period``.
    ``rope_theta`` is the base of RoPE's frequencies. ``norm`` is LayerNorm or "rms" (arXiv
    1910.07467), ``mlp`` has a GELU or is "swiglu" (arXiv 2002.05202), three products a token.
    ``qk_norm`` is RMS norm of q and k, or LayerNorm with "layer".
    """

    image_size: tuple[int, int]
    channels: int
    num_classes: int
    stages: tuple[StageConfig, ...]
    steps: tuple[int, ...]
    upsample: str = "nearest"
    positions: str = "rope"
    qk_norm: bool | str = True
    norm: str = "layer"
    mlp: str = "gelu"
    label_dropout: float = 0.1
    max_prior_noise: float = 0.3
    time_std: float = 1.0
    times: str = "logit-normal"
    standardize: bool = True
    prediction: str = "velocity"
    time_range: tuple[float, float] = (0.0, 1000.0)
    time_period: float = 10_000.0
    rope_theta: float = 100.0

    def __post_init__(self) -> None:
        check_fields(self)
        for problem in self._problems():
            raise ValueError(f"MSFConfig: {problem}")

    def _problems(self) -> Iterator[str]:
        if not self.stages:
            yield "stages is empty; give one StageConfig for the base and one for each residual"
        if len(self.stages) > MAX_STAGES:
            yield f"stages must be at most {MAX_STAGES}, got {len(self.stages)}"
        count = len(self.stages)
        if len(self.steps) != count or not all(1 <= n <= MAX_STEPS for n in self.steps):
            yield (
                f"steps must be {count} positive numbers, one a stage, of at most {MAX_STEPS}, "
                f"got {reprlib.repr(self.steps)}"
            )
        if not all(1 <= side <= MAX_SIDE for side in self.image_size):
            yield (
                f"image_size must be (height, width), both positive and at most {MAX_SIDE}, "
                f"got {self.image_size}"
            )
        if not 1 <= self.channels <= MAX_CHANNELS:
            yield f"channels must be at least 1 and at most {MAX_CHANNELS}, got {self.channels}"
        if not 0 <= self.num_classes <= MAX_CLASSES:
            yield (
                f"num_classes must be at least 0 and at most {MAX_CLASSES}, got {self.num_classes}"
            )
        if self.upsample not in UPSAMPLE_MODES:
            yield f"upsample must be one of {UPSAMPLE_MODES}, got {self.upsample!r}"
        if self.positions not in POSITIONS:
            yield f"positions must be one of {POSITIONS}, got {self.positions!r}"
        if self.qk_norm not in QK_NORMS:
            yield f"qk_norm must be true, false or 'layer', got {self.qk_norm!r}"
        if self.norm not in NORMS:
            yield f"norm must be one of {NORMS}, got {self.norm!r}"
        if self.mlp not in MLPS:
            yield f"mlp must be one of {MLPS}, got {self.mlp!r}"
        if self.prediction not in PREDICTIONS:
            yield f"prediction must be one of {PREDICTIONS}, got {self.prediction!r}"
        if self.prediction == "noise" and self.levels:
            yield f"prediction 'noise' is for a single stage, got {count} stages"
        if self.time_period <= 1 or self.rope_theta <= 1:
            yield (
                "time_period and rope_theta must be above 1, "
                f"got {self.time_period} and {self.rope_theta}"
            )
        first, second = self.time_range
        if first == second:
            yield f"time_range must be from one time to another, got {self.time_range}"
        if abs(second - first) > MAX_FLOAT32:
            yield f"time_range must be no wider than {MAX_FLOAT32:.1e}, got {self.time_range}"
        if self.times not in TIMES:
            yield f"times must be one of {TIMES}, got {self.times!r}"
        if self.time_std <= 0:
            yield f"time_std must be positive, got {self.time_std}"
        if 0 < min(self.label_dropout, 1 - self.label_dropout) < MIN_PROBABILITY:
            yield (
                "label_dropout must be 0, 1, or from 2**-24 to 1 - 2**-24, which it can draw, "
                f"got {self.label_dropout}"
            )
        if not 0 <= self.label_dropout <= 1 or self.max_prior_noise < 0:
            yield (
                "label_dropout must be in [0, 1] and max_prior_noise at least 0, "
                f"got {self.label_dropout} and {self.max_prior_noise}"
            )
        for name, stage in zip(self.stage_names, self.stages):
            yield from _stage_problems(name, stage)
        yield from self._size_problems(self.image_size)

    def _size_problems(self, size: tuple[int, ...]) -> Iterator[str]:
        if math.prod(size) > MAX_PIXELS:
            yield f"an image must have at most {MAX_PIXELS} pixels, got {tuple(size)}"
        for index, stage in enumerate(self.stages):
            scale = 2 ** (self.levels - index)
            multiple = stage.patch * scale
            if any(side < 1 or side % multiple for side in size):
                yield (
                    f"{self.stage_names[index]}: image sides must be multiples of {multiple} "
                    f"(patch {stage.patch} at 1/{scale} scale), got {tuple(size)}"
                )

    def check_size(self, size: tuple[int, ...]) -> None:
        """Raise a ValueError where images of ``size`` (H, W) are too large, or a stage's patch does
        not divide them at its scale."""
        if len(size) != 2:
            raise ValueError(f"an image's size must be (height, width), got {tuple(size)}")
        if any(side > MAX_SIDE for side in size):
            raise ValueError(f"image sides must be at most {MAX_SIDE}, got {tuple(size)}")
        for problem in self._size_problems(size):
            raise ValueError(problem)

    @property
    def levels(self) -> int:
        """Return N, how many residuals there are above the base."""
        return len(self.stages) - 1

    @property
    def stage_names(self) -> tuple[str, ...]:
        return component_names(self.levels)

    def stage_size(self, index: int, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Return (height, width) at which stage ``index`` works on images of ``size``."""
        height, width = size or self.image_size
        scale = 2 ** (self.levels - index)
        return height // scale, width // scale

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MSFConfig:
        """Invert ``to_dict``; lists may stand for tuples. A ValueError names what is wrong."""
        return parse_dataclass(cls, values, "MSFConfig")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> MSFConfig:
        return cls.from_dict(parse_object(text, "MSFConfig"))


def _stage_problems(name: str, stage: StageConfig) -> Iterator[str]:
    for field, value in asdict(stage).items():
        if value <= 0:
            yield f"{name}: {field} must be positive, got {value}"
    for field, maximum in (("width", MAX_WIDTH), ("depth", MAX_DEPTH)):
        if (value := getattr(stage, field)) > maximum:
            yield f"{name}: {field} must be at most {maximum}, got {value}"
    if not 1 <= stage.width * stage.mlp_ratio <= MAX_HIDDEN:
        yield (
            f"{name}: width * mlp_ratio must be from 1 to {MAX_HIDDEN}, "
            f"got {stage.width} * {stage.mlp_ratio}"
        )
    if stage.width % stage.heads or stage.head_dim % 4:
        yield (f"{name}: width / heads must be a multiple of 4, got {stage.width} / {stage.heads}")


def component_names(levels: int) -> tuple[str, ...]:
    """Return the names of the base and the residuals, which are those of their stages too."""
    if levels == 1:
        return ("base", "residual")
    return ("base", *(f"residual_{i}" for i in range(1, levels + 1)))
