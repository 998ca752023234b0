"""A folder of diffusers as an MSF, or why it cannot be one."""

import json
import math

import pytest
import torch
from diffusers import DiTTransformer2DModel

from msf.importing import FORMATS, import_checkpoint
from published import (
    CHANNELS,
    CLASSES,
    DEPTH,
    HEADS,
    PATCH,
    SIDE,
    WIDTH,
    error,
    inputs,
)


def tiny_diffusers(folder, **changes):
    """Save a model of diffusers, whose blocks embed time and class alike."""
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_layers=DEPTH)
    sizes |= dict(in_channels=CHANNELS, out_channels=2 * CHANNELS, sample_size=SIDE)
    sizes |= dict(patch_size=PATCH, num_embeds_ada_norm=CLASSES, norm_eps=1e-6)
    model = DiTTransformer2DModel(**{**sizes, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    first, *others = model.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_outputs_are_those_of_diffusers(tmp_path):
    source = tiny_diffusers(tmp_path)
    made = import_checkpoint(tmp_path)
    assert made.format == "diffusers" and made.model.config.stages[0].heads == HEADS
    x, _, y = inputs()
    for step in (0, 3, 40, 999):
        # Frequencies are rounded otherwise there: an angle errs by up to step / 2^24, twice.
        tolerance = 1e-6 + 2 * step / 2**24
        t = torch.full((4,), float(step))
        expected = source(x, timestep=t, class_labels=y).sample[:, :CHANNELS]
        assert error(made.model.stages[0](x, t, y), expected) < tolerance


def test_the_period_is_that_of_the_frequencies_of_diffusers():
    i = torch.arange(128, dtype=torch.float64)
    expected = torch.exp(-math.log(10_000) * i / 127)
    got = torch.exp(-math.log(FORMATS["diffusers"].time_period) * i / 128)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


@torch.no_grad()
def test_the_norm_of_diffusers_that_differs_is_told(tmp_path):
    source = tiny_diffusers(tmp_path, norm_eps=1e-5)
    made = import_checkpoint(tmp_path)
    assert any("eps 1e-06, as in DiT, where diffusers has 1e-05" in note for note in made.notes)
    x, _, y = inputs()
    t = torch.full((4,), 3.0)
    expected = source(x, timestep=t, class_labels=y).sample[:, :CHANNELS]
    assert 1e-7 < error(made.model.stages[0](x, t, y), expected) < 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn must be gelu-approximate, got geglu"),
        ({"attention_bias": False}, "attention_bias must be True, got False"),
    ],
)
def test_what_diffusers_adds_to_dit_is_refused(changes, message, tmp_path):
    tiny_diffusers(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path)


def test_blocks_that_embed_otherwise_are_refused(tmp_path):
    model = tiny_diffusers(tmp_path)
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias[0] += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"blocks\.\d\..*linear_1.bias differs from that of anoth"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "num_attention_heads",
            1,
            "16 for num_attention_heads x attention_head_dim, the weights 32",
        ),
        ("num_layers", 2, "has 2 for num_layers, the weights 3"),
        ("patch_size", 4, "has 4 for patch_size, the weights 2"),
        ("norm_eps", None, "norm_eps must be a number, got None"),
        ("sample_size", [8, 8], "sample_size must be a whole number, got"),
        ("sample_size", 0, r"image_size must be \(height, width\), both positive .* got \(0, 0\)"),
    ],
)
def test_a_setting_of_diffusers_that_does_not_fit_is_refused(key, value, message, tmp_path):
    tiny_diffusers(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path)


def test_folders_of_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        import_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="must hold a DiTTransformer2DModel, holds UNet2DModel"):
        import_checkpoint(tmp_path)


def test_heads_that_the_configuration_contradicts_are_refused(tmp_path):
    tiny_diffusers(tmp_path)
    with pytest.raises(ValueError, match=f"has {HEADS} heads, which --heads {2 * HEADS} contrad"):
        import_checkpoint(tmp_path, heads=2 * HEADS)
