"""Tiny models whose every parameter matters: adaLN-Zero starts with gates that hide almost every
gradient."""

import torch

from msf import MSF, MSFConfig, StageConfig


def tiny_config(levels=1, **changes):
    stages = tuple(
        StageConfig(width=32, depth=2, heads=2, patch=1 + (i > 0)) for i in range(levels + 1)
    )
    values = {
        "image_size": (8, 8),
        "channels": 2,
        "num_classes": 3,
        "stages": stages,
        "steps": (2,) * (levels + 1),
    }
    return MSFConfig(**{**values, **changes})


def tiny_model(levels=1, seed=0, **changes):
    torch.manual_seed(seed)
    model = MSF(tiny_config(levels, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model.pyramid.mean.normal_(std=0.3)
        model.pyramid.std.uniform_(0.5, 1.5)
    return model.eval()


def images(count, size=(8, 8), channels=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, *size, generator=generator) * 2 - 1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)
