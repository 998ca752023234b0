"""The cost of a model, from its configuration: parameters and multiply-accumulates (MACs).

The "Gflops" of the DiT paper are GMACs. Counted are the matrix products, as customary: not norms,
activations, softmax, position tables or the pyramid. Guidance evaluates a model twice a step and is
left out: it doubles both sides of every comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .config import MSFConfig
from .embeddings import FREQUENCIES

# DiT-XL/2 (arXiv 2212.09748): GMACs of a forward by image size in pixels, and sampling steps.
DIT_XL_2 = {256: 118.64, 512: 524.60}
DIT_STEPS = 250

# Dense bfloat16 TFLOP/s by NVIDIA's data sheets; the first name that a device's name has counts.
PEAK_TERAFLOPS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
}


@dataclass(frozen=True)
class StageCost:
    """A StageCost is the cost of one stage; ``macs`` is one image's in one forward, unguided."""

    name: str
    size: tuple[int, int]
    tokens: int
    parameters: int
    macs: int
    steps: int

    @property
    def macs_per_image(self) -> int:
        return self.macs * self.steps


def stage_costs(config: MSFConfig, steps: Sequence[int] | None = None) -> list[StageCost]:
    """Return a `StageCost` a stage, base first, at the configuration's image size and, by default,
    steps.

    Raise ValueError for ``steps`` that a configuration cannot have.
    """
    if steps is not None:
        config = replace(config, steps=tuple(steps))
    return [_stage_cost(config, index, n) for index, n in enumerate(config.steps)]


def peak_teraflops(device_name: str) -> float | None:
    """Return the dense bfloat16 TFLOP/s that the maker promises of a GPU, None if not known."""
    peaks = (peak for name, peak in PEAK_TERAFLOPS.items() if name in device_name)
    return next(peaks, None)


def dit_baseline(config: MSFConfig) -> tuple[int, float] | None:
    """Return (image size in pixels, GMACs to sample one image with DiT-XL/2), or None.

    DiT works on 4-channel latents at an eighth of 256 or 512 pixels; there is no other figure.
    """
    height, width = config.image_size
    pixels = 8 * height
    if config.channels != 4 or height != width or pixels not in DIT_XL_2:
        return None
    return pixels, DIT_XL_2[pixels] * DIT_STEPS


def _stage_cost(config: MSFConfig, index: int, steps: int) -> StageCost:
    stage, size = config.stages[index], config.stage_size(index)
    tokens = (size[0] // stage.patch) * (size[1] // stage.patch)
    parameters = macs = 0
    for rows, inputs, outputs in _linear_layers(config, index, tokens):
        parameters += (inputs + 1) * outputs
        macs += rows * inputs * outputs
    macs += stage.depth * 2 * tokens**2 * stage.width  # q k^T and its product with v
    if config.num_classes:
        parameters += (config.num_classes + 1) * stage.width
    if config.qk_norm:
        parameters += stage.depth * (4 if config.qk_norm == "layer" else 2) * stage.head_dim
    return StageCost(config.stage_names[index], size, tokens, parameters, macs, steps)


def _linear_layers(config: MSFConfig, index: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Yield (rows, inputs, outputs) of every linear layer of a stage, for one image."""
    stage = config.stages[index]
    width, hidden = stage.width, stage.hidden
    pixels, has_prior = stage.patch**2 * config.channels, index > 0
    yield tokens, pixels * (2 if has_prior else 1), width
    for _ in range(2 if has_prior else 1):  # time, and the noise on the prior
        yield 1, FREQUENCIES, width
        yield 1, width, width
    for _ in range(stage.depth):
        yield 1, width, 6 * width
        yield tokens, width, 3 * width
        yield tokens, width, width
        yield tokens, width, hidden * (2 if config.mlp == "swiglu" else 1)
        yield tokens, hidden, width
    yield 1, width, 2 * width
    yield tokens, width, pixels
