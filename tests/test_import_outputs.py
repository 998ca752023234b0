"""Released weights compute as an MSF what they compute in the models that they are of."""

import pytest
import torch

from msf import MSFConfig, StageConfig, presets
from msf.embeddings import sincos_2d
from msf.importing import import_checkpoint
from msf.importing.importer import HEADS as HEADS_OF
from published import (
    CHANNELS,
    CLASSES,
    DEPTH,
    GRID,
    HEADS,
    MODELS,
    PATCH,
    SIDE,
    WIDTH,
    Published,
    error,
    import_state,
    inputs,
)


def expected_output(source, format, x, t, y):
    """What our sampler would have from the model of that format, at our times."""
    if format == "repa":
        return -source(x, 1 - t, y)
    return source(x, t, y)


@torch.no_grad()
@pytest.mark.parametrize("format", MODELS)
def test_outputs_are_those_of_the_source(format, tmp_path):
    source = Published(**MODELS[format])
    model = import_state(tmp_path / "x.safetensors", source, format).model
    x, t, y = inputs()
    if format == "dit":
        t = torch.tensor([0.0, 70.0, 500.0, 999.0])
    expected = expected_output(source, format, x, t, y)
    assert error(model.stages[0](x, t, y), expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("format", MODELS)
def test_outputs_are_those_of_the_source_in_float64(format, tmp_path):
    source = Published(**MODELS[format]).double()
    quarters = sincos_2d(GRID, GRID, WIDTH, torch.device("cpu")).chunk(4, dim=1)
    source.pos_embed.copy_(torch.cat(quarters[::-1], dim=1)[None])  # rounded as ours are
    if format == "lightningdit":
        source.feat_rope.float()
    model = import_state(tmp_path / "x.safetensors", source, format).model
    x, t, y = inputs(torch.float64)
    expected = expected_output(source, format, x, t, y)
    # The rotations, of which the source has its own, are in float32.
    assert error(model.stages[0](x, t, y), expected) < (1e-6 if format == "lightningdit" else 1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"without_shift": True},
        {"rms": True, "without_shift": True},
        {"swiglu": True},
        {"qk_norm": True},
        {"qk_norm": True, "rope": True},
        {"qk_norm": True, "rms": True},
        {"qk_norm": True, "rms": True, "rope": True},
    ],
    ids=",".join,
)
def test_each_option_of_lightningdit(options, tmp_path):
    source = Published(learn_sigma=False, **options)
    model = import_state(tmp_path / "x.safetensors", source, "lightningdit").model
    assert error(model.stages[0](*inputs()), source(*inputs())) < 1e-6


@torch.no_grad()
def test_qk_norm_of_repa(tmp_path):
    source = Published(**MODELS["repa"], qk_norm=True)
    model = import_state(tmp_path / "x.safetensors", source, "repa").model
    assert model.config.qk_norm == "layer"
    x, t, y = inputs()
    assert error(model.stages[0](x, t, y), expected_output(source, "repa", x, t, y)) < 1e-6


def test_the_configuration_says_what_was_inferred(tmp_path):
    config = import_state(tmp_path / "x.safetensors", Published(), "sit").model.config
    assert config == MSFConfig(
        image_size=(SIDE, SIDE),
        channels=CHANNELS,
        num_classes=CLASSES,
        stages=(StageConfig(WIDTH, DEPTH, HEADS, PATCH, 48 / WIDTH),),
        steps=(250,),
        positions="sincos",
        qk_norm=False,
        times="uniform",
        standardize=False,
        time_range=(0.0, 1.0),
    )
    with pytest.raises(ValueError, match="no published model has width 32 and depth 3; give its"):
        import_checkpoint(tmp_path / "x.safetensors", "sit")


def test_heads_of_published_sizes_are_those_of_our_presets():
    for stage in (presets.S, presets.B, presets.L, presets.XL):
        assert HEADS_OF[stage.width, stage.depth] == stage.heads
