"""The models we name: sizes, default steps, and how each is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .config import MSFConfig, StageConfig
from .training.config import TrainingConfig


@dataclass(frozen=True)
class Preset:
    model: MSFConfig
    training: TrainingConfig
    note: str


def latents(
    size: int, stages: tuple[StageConfig, ...], steps: tuple[int, ...], **options: Any
) -> MSFConfig:
    """Build a model of ImageNet at ``size`` pixels, as latents (4, size / 8, size / 8) of Stable
    Diffusion's VAE."""
    return MSFConfig(
        image_size=(size // 8, size // 8),
        channels=4,
        num_classes=1000,
        stages=stages,
        steps=steps,
        **options,
    )


def pixels(
    size: int, classes: int, stages: tuple[StageConfig, ...], steps: tuple[int, ...], **options: Any
) -> MSFConfig:
    """Build a model of grey images of ``size`` pixels."""
    return MSFConfig(
        image_size=(size, size),
        channels=1,
        num_classes=classes,
        stages=stages,
        steps=steps,
        **options,
    )


def cpu_training(*steps: int) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch_size=128,
        learning_rate=2e-3,
        schedule="cosine",
        ema_decay=0.995,
        sample_every=1000,
    )


def cpu_presets() -> dict[str, Preset]:
    """Return what is small enough to train on a CPU. ``textures-16`` and its baseline train on
    equal FLOPs."""
    fine = StageConfig(width=128, depth=4, heads=4, patch=2)
    coarse = replace(fine, patch=4)
    return {
        "digits": Preset(
            pixels(
                8,
                10,
                (fine, fine),
                (16, 4),
                # Digits stand in the middle of their image and a generated base is close to a true
                # one: with absolute positions and little noise on the base, the residual's loss
                # after 1,200 steps was 0.26; with RoPE and noise up to 0.3 it was 0.38.
                positions="sincos",
                max_prior_noise=0.1,
                qk_norm=False,  # made no difference, but for 10 % of the time
                time_std=1.8,  # nearly uniform times
            ),
            cpu_training(4000, 1000),
            "8x8 digits of scikit-learn: two to three and a half minutes on two cores",
        ),
        "textures-16": Preset(
            pixels(16, 3, (fine, fine), (32, 8)),
            cpu_training(1800, 600),
            "16x16 crops of brick, grass and gravel: ten minutes on one core",
        ),
        "textures-16-sit": Preset(
            pixels(16, 3, (fine,), (16,)),
            cpu_training(1037),
            "N = 0: the baseline of textures-16",
        ),
        "textures-32": Preset(
            pixels(32, 3, (fine, coarse), (32, 8)),
            cpu_training(20_000, 20_000),
            "32x32 crops: hours on one core, or a GPU",
        ),
    }


# The backbones of DiT (arXiv 2212.09748, table 1) with patch 2.
S = StageConfig(width=384, depth=12, heads=6)
B = StageConfig(width=768, depth=12, heads=12)
L = StageConfig(width=1024, depth=24, heads=16)
XL = StageConfig(width=1152, depth=28, heads=16)


def imagenet_training(*steps: int, **options: Any) -> TrainingConfig:
    """Return MSF's recipe, but for ``options``. A checkpoint of XL writes 14 GB, which would not be
    worth it as often as sample grids are."""
    return TrainingConfig(steps=steps, flip=True, checkpoint_every=5000, **options)


def imagenet_presets() -> dict[str, Preset]:
    """Return the models of ImageNet: a residual stage is lighter than its base and takes a tenth of
    its steps. They train on mirrored images too, as DiT does.

    SiT (arXiv 2401.08740) is a rectified flow on DiT's architecture. Its code draws times
    uniformly, embeds them as they are, takes latents as the VAE's scaling factor leaves them, and
    neither clips gradients nor warms up; it trained for 7 million steps in the end. MSF's own
    recipe draws logit-normal times, standardises, clips to 1 and warms up for 100 steps.

    The paper's abstracts give neither sizes nor steps. These are our choice, such that its two
    claims on cost hold against DiT-XL/2 at 250 steps; ``msf flops --preset NAME`` shows it.
    """
    claims = {
        "msf-xl-256": "as arXiv 2501.13349v1 claims, at most 50 % of DiT-XL/2's cost",
        "msf-xl-512": "as arXiv 2501.13349v2 claims (4x), at most 25 % of DiT-XL/2's cost",
    }
    presets = {}
    for size in (256, 512):
        for name, stages in {"s": (S, S), "b": (B, S), "l": (L, B), "xl": (XL, B)}.items():
            name = f"msf-{name}-{size}"
            presets[name] = Preset(
                latents(size, stages, (250, 25)),
                imagenet_training(400_000, 400_000),
                claims.get(name, f"ImageNet {size} latents"),
            )
        sit = latents(size, (XL,), (250,), positions="sincos", qk_norm=False)
        presets[f"sit-xl-{size}"] = Preset(
            replace(sit, times="uniform", standardize=False, time_range=(0.0, 1.0)),
            imagenet_training(400_000, warmup=0, clip=0.0, spike=0.0),
            "SiT-XL/2 (DiT-XL/2 with N = 0), trained as published",
        )
        presets[f"sit-xl-{size}-msf"] = Preset(
            sit,
            imagenet_training(400_000),
            "SiT-XL/2, trained as MSF is: the baseline",
        )
    return presets


PRESETS = {**cpu_presets(), **imagenet_presets()}


def preset(name: str) -> Preset:
    """Return the preset of this name; a ValueError lists the names."""
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
