"""Multi-scale latent factorization (arXiv 2501.13349): diffusion transformers a scale at a time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import MSFConfig, StageConfig
from .presets import PRESETS, Preset, preset
from .sampling_config import SamplingConfig
from .training.config import TrainingConfig

if TYPE_CHECKING:
    from .drop_in import accelerate, restore
    from .model import MSF
    from .pipeline import Pipeline
    from .pyramid import Pyramid
    from .sampling import Sample, sample, sample_components

__all__ = [
    "MSF",
    "PRESETS",
    "MSFConfig",
    "Pipeline",
    "Preset",
    "Pyramid",
    "Sample",
    "SamplingConfig",
    "StageConfig",
    "TrainingConfig",
    "accelerate",
    "preset",
    "restore",
    "sample",
    "sample_components",
]

# Torch takes seconds to import: these do so only when used, so that `msf --help` answers at once.
_NEED_TORCH = {
    "MSF": "model",
    "Pipeline": "pipeline",
    "Pyramid": "pyramid",
    "Sample": "sampling",
    "accelerate": "drop_in",
    "restore": "drop_in",
    "sample": "sampling",
    "sample_components": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_NEED_TORCH[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
