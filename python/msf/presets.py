"""The models we name: sizes, default steps, and how each is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .config import MSFConfig, StageConfig
from .training.config import TrainingConfig


@dataclass(frozen=True)
class Preset:
    model: MSFConfig
    training: TrainingConfig
    note: str


def small(
    size: int, classes: int, stages: tuple[StageConfig, ...], steps: tuple[int, ...]
) -> MSFConfig:
    """Grey pixels, for the data sets that a CPU can learn."""
    return MSFConfig(
        image_size=(size, size), channels=1, num_classes=classes, stages=stages, steps=steps
    )


def latents(
    size: int, stages: tuple[StageConfig, ...], steps: tuple[int, ...], **options: Any
) -> MSFConfig:
    """ImageNet at ``size`` pixels as latents (4, size / 8, size / 8) of the Stable Diffusion VAE.
    ImageNet at ``size`` pixels as latents (4, size / 8, size / 8) of the Stable Diffusion VAE."""
    return MSFConfig(
        image_size=(size // 8, size // 8),
        channels=4,
        num_classes=1000,
        stages=stages,
        steps=steps,
        **options,
    )


def small_presets() -> dict[str, Preset]:
    width = {"width": 128, "heads": 4}
    digits = TrainingConfig(
        steps=(1500, 1000),
        batch_size=256,
        learning_rate=1e-3,
        schedule="cosine",
        ema_decay=0.995,
        sample_every=500,
    )
    return {
        "digits": Preset(
            small(8, 10, (StageConfig(depth=4, patch=1, **width),) * 2, (16, 4)),
            digits,
            "8x8 digits of scikit-learn, minutes on a CPU",
        ),
    }


# The backbones of DiT (arXiv 2212.09748, table 1) with patch 2.
S = StageConfig(width=384, depth=12, heads=6)
B = StageConfig(width=768, depth=12, heads=12)
L = StageConfig(width=1024, depth=24, heads=16)
XL = StageConfig(width=1152, depth=28, heads=16)


def imagenet_presets() -> dict[str, Preset]:
    """A residual stage is lighter than its base and takes a tenth of its steps.

    The paper's abstracts give neither sizes nor steps. These are our choice, such that its two
    claims on cost hold against DiT-XL/2 at 250 steps; ``msf flops --preset NAME`` shows it.
    """
    claims = {
        "msf-xl-256": "v1's claim on cost: at most 50 % of DiT-XL/2's sampling",
        "msf-xl-512": "v2's claim on cost (4x): at most 25 % of DiT-XL/2's sampling",
    }
    presets = {}
    for size in (256, 512):
        for name, stages in {"s": (S, S), "b": (B, S), "l": (L, B), "xl": (XL, B)}.items():
            name = f"msf-{name}-{size}"
            presets[name] = Preset(
                latents(size, stages, (250, 25)),
                TrainingConfig(steps=(400_000, 400_000)),
                claims.get(name, f"ImageNet {size} latents"),
            )
        presets[f"dit-xl-{size}"] = Preset(
            latents(size, (XL,), (250,), positions="sincos", qk_norm=False),
            TrainingConfig(steps=(400_000,)),
            "DiT-XL/2 (N = 0), the baseline",
        )
    return presets


PRESETS = {**small_presets(), **imagenet_presets()}


def preset(name: str) -> Preset:
    """The preset of this name; ValueError lists the names."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
