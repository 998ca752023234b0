"""Released weights compute as an MSF what they compute in the models that they are of."""

import argparse
import dataclasses
import json
import math
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

from msf import MSF, MSFConfig, StageConfig, presets, sample
from msf.cli import main
from msf.embeddings import sincos_2d
from msf.images import save_image
from msf.importing import FORMATS, import_checkpoint
from msf.importing.checkpoint import read_checkpoint
from msf.importing.importer import HEADS as HEADS_OF
from msf.training.start import started_from
from published import CHANNELS, CLASSES, DEPTH, GRID, HEADS, PATCH, SIDE, WIDTH, Published

MODELS = {
    "dit": {},
    "sit": {},
    "lightningdit": {"learn_sigma": False, "rope": True, "rms": True, "swiglu": True},
    "repa": {"learn_sigma": False, "projectors": True},
}


def inputs(dtype=torch.float32):
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(4, CHANNELS, SIDE, SIDE, generator=draws, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0.0, 0.07, 0.5, 0.998]), torch.tensor([0, 2, 3, CLASSES])


def import_state(path, model, format="auto", heads=HEADS):
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, path)
    return import_checkpoint(path, format, heads=heads)


def error(got, expected):
    assert got.dtype == expected.dtype
    return float((got - expected).abs().max() / expected.abs().max())


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
    ],
    ids=",".join,
)
def test_each_option_of_lightningdit(options, tmp_path):
    source = Published(learn_sigma=False, **options)
    model = import_state(tmp_path / "x.safetensors", source, "lightningdit").model
    assert error(model.stages[0](*inputs()), source(*inputs())) < 1e-6


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
    ],
)
def test_a_setting_of_diffusers_that_does_not_fit_is_refused(key, value, message, tmp_path):
    tiny_diffusers(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path)


def test_a_format_that_does_not_fit_the_path_is_refused(tmp_path):
    save_file(Published().state_dict(), tmp_path / "x.safetensors")
    for name, format, message in (
        ("x.safetensors", "diffusers", "is no folder; give the one that diffusers wrote"),
        ("", "sit", "is a folder, which --format diffusers is for; sit is a file"),
        ("x.safetensors", "DiT", "format must be auto, dit, sit, .*, diffusers, got 'DiT'"),
    ):
        with pytest.raises(ValueError, match=message):
            import_checkpoint(tmp_path / name, format)


def test_folders_of_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        import_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match="must hold a DiTTransformer2DModel, holds UNet2DModel"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["DiT-S/2", "SiT-S/2"])
def test_files_of_torch_give_their_average_and_how_they_were_trained(name, legacy, tmp_path):
    model, average = Published(), Published()
    with torch.no_grad():
        average.final_layer.linear.bias.add_(1)
    values = {
        "model": {f"module.{name}": x for name, x in model.state_dict().items()},
        "ema": average.state_dict(),
        "opt": torch.optim.AdamW(model.parameters()).state_dict(),
        "args": argparse.Namespace(model=name, image_size=64, lr=1e-4, path_type="Linear"),
    }
    torch.save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    made = import_checkpoint(tmp_path / "x.pt", heads=HEADS)
    assert made.format == name[:3].lower() and "the learned variance is dropped" in made.notes
    bias = average.final_layer.linear.bias.unflatten(0, (-1, 2 * CHANNELS))[:, :CHANNELS]
    assert torch.equal(made.model.stages[0].output.bias, bias.flatten())
    del values["ema"]
    torch.save(values, tmp_path / "x.pt")
    bias = import_checkpoint(tmp_path / "x.pt", heads=HEADS).model.stages[0].output.bias
    assert torch.equal(bias + 1, made.model.stages[0].output.bias)


def test_formats_are_known_by_their_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    for format in ("lightningdit", "repa"):
        assert import_state(path, Published(**MODELS[format])).format == format
    with pytest.raises(ValueError, match="say which it is with --format dit, sit,"):
        import_state(path, Published())


def test_a_format_that_is_not_the_one_a_file_tells_is_noted(tmp_path):
    path = tmp_path / "x.pt"
    for format, state, told in (
        ("sit", {"args": argparse.Namespace(model="DiT-XL/2")}, "dit"),  # so do forks of DiT
        ("dit", {"config": {"model": {"model_type": "LightningDiT-B/1"}}}, "lightningdit"),
        ("sit", {"args": argparse.Namespace(model="SiT-XL/2", encoder_depth=8)}, "repa"),
    ):
        torch.save({"ema": Published().state_dict(), **state}, path)
        note = f"the file says that it is of format {told}"
        made = import_checkpoint(path, format, heads=HEADS)
        assert made.format == format and note in made.notes
        made = import_checkpoint(path, heads=HEADS)
        assert made.format == told and note not in made.notes


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


class Runs:
    """Its pickle makes a folder when it is loaded by a reader that runs what it holds."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_something_is_refused(legacy, tmp_path):
    values = {"ema": Published().state_dict(), "args": Runs(tmp_path / "run")}
    torch.save(values, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        ValueError, match=r"is a pickle that wants to run (posix|os)\.mkdir"
    ) as told:
        import_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Runs(tmp_path / "run")))
    with pytest.raises(ValueError, match=r"y\.pt: "):
        import_checkpoint(tmp_path / "y.pt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["x.pt", "old.pt", "x.safetensors"])
def test_files_that_are_cut_off_are_refused(name, tmp_path):
    path, state = tmp_path / name, Published().state_dict()
    if name == "x.safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=name == "x.pt")
    whole = path.read_bytes()
    for size in (len(whole) - 100, len(whole) // 2, 100, 4, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(f"{path}: ")) as told:
            import_checkpoint(path, "sit", heads=HEADS)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_files_with_another_bit_are_read_or_refused(legacy, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"ema": {"x": torch.ones(2)}}, path, _use_new_zipfile_serialization=not legacy)
    whole, refused = path.read_bytes(), 0
    for at in range(0, len(whole), 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            read_checkpoint(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.attn.proj.bias": None}, r"blocks.1.attn.proj.bias is missing"),
        ({"x_embedder.proj.weight": None}, r"x_embedder.proj.weight is missing"),
        ({"blocks.7.extra": torch.ones(3)}, r"blocks.3.adaLN_modulation.1.weight is missing"),
        ({"extra": torch.ones(3)}, "not part of a known model: extra$"),
        ({"t_embedder.mlp.2.bias": torch.ones(3)}, r"mlp.2.bias must be \(32,\), got \(3,\)"),
        ({"pos_embed": torch.ones(1, 16, 32)}, "pos_embed is not DiT's table"),
        ({"pos_embed": torch.ones(1, 15, 32)}, "must be of a square of tokens, got 15"),
        ({"final_layer.linear.weight": torch.ones(36, 32)}, "must have 12 rows, or twice as many"),
        ({"x_embedder.proj.bias": torch.full((32,), torch.nan)}, "must be finite"),
        ({"x_embedder.proj.bias": torch.ones(32, dtype=torch.int64)}, "must be of floats"),
        ({"pos_embed": torch.full((1, 16, 32), torch.nan)}, "pos_embed is not DiT's table"),
        ({"y_embedder.embedding_table.weight": torch.ones(1, 32)}, "of a class and of none"),
        ({"blocks.0.norm1.weight": torch.ones(32)}, r"blocks.0.norm2.weight is missing"),
        ({"blocks.0.norm1.bias": torch.ones(32)}, "cannot be imported: a norm with weight and bi"),
        ({"blocks.0.mlp.w12.weight": torch.ones(32)}, r"blocks.0.mlp.w3.weight is missing"),
        ({"blocks.0.attn.q_norm.bias": torch.ones(16)}, "cannot be imported: QK-norm by Layer"),
    ],
)
def test_other_tensors_are_refused_in_one_line(change, message, tmp_path):
    state = {k: x for k, x in {**Published().state_dict(), **change}.items() if x is not None}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: .*{message}") as told:
        import_checkpoint(tmp_path / "x.safetensors", "sit", heads=HEADS)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(32).to_sparse(), "must be a dense tensor, got one torch.sparse_coo"),
        (torch.ones(32, device="meta"), "must be a dense tensor, got one without values"),
    ],
)
def test_tensors_without_a_value_in_each_place_are_refused(x, message, tmp_path):
    torch.save({**Published().state_dict(), "x_embedder.proj.bias": x}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=f"x_embedder.proj.bias {message}"):
        import_checkpoint(tmp_path / "x.pt", "sit", heads=HEADS)


def test_a_flipped_bit_of_a_weight_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(Published().state_dict(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"the checksum of x/data/\d+ does not agree"):
        import_checkpoint(path, "sit", heads=HEADS)


def test_names_that_wrappers_gave_are_known(tmp_path):
    source = Published()
    expected = import_state(tmp_path / "x.safetensors", source, "sit").model.state_dict()
    wrapped = {f"module._orig_mod.{name}": x for name, x in source.state_dict().items()}
    torch.save(wrapped, tmp_path / "x.pt")
    made = import_checkpoint(tmp_path / "x.pt", "sit", heads=HEADS).model.state_dict()
    assert all(torch.equal(made[name], x) for name, x in expected.items())


def test_heads_that_the_file_contradicts_are_refused(tmp_path):
    tiny_diffusers(tmp_path)
    with pytest.raises(ValueError, match=f"has {HEADS} heads, which --heads {2 * HEADS} contrad"):
        import_checkpoint(tmp_path, heads=2 * HEADS)
    source = Published(**MODELS["lightningdit"])
    with pytest.raises(ValueError, match=f"has {HEADS} heads, which --heads {2 * HEADS} contrad"):
        import_state(tmp_path / "x.safetensors", source, heads=2 * HEADS)


def test_missing_tables_of_rope_are_told(tmp_path):
    state = Published(**MODELS["lightningdit"]).state_dict()
    state = {name: x for name, x in state.items() if "feat_rope" not in name}
    save_file(state, tmp_path / "x.safetensors")
    notes = import_checkpoint(tmp_path / "x.safetensors", heads=HEADS).notes
    assert notes == ["without RoPE, because the file has no tables of it (feat_rope)"]


@pytest.mark.parametrize("kind", [argparse.Namespace, dict])
def test_other_paths_are_refused(kind, tmp_path):
    for key, value in (("path_type", "GVP"), ("prediction", "score")):
        args = kind(model="SiT-S/2", **{key: value})
        torch.save({"ema": Published().state_dict(), "args": args}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=f"was trained with {key} {value}; only"):
            import_checkpoint(tmp_path / "x.pt", heads=HEADS)
    config = {"model": "LightningDiT-B/1", "transport": {"path_type": "GVP"}}
    torch.save({"ema": Published().state_dict(), "config": config}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="was trained with path_type GVP; only"):
        import_checkpoint(tmp_path / "x.pt", "lightningdit", heads=HEADS)


def test_the_command_writes_a_model_that_can_be_sampled(tmp_path, capsys):
    save_file(Published().state_dict(), tmp_path / "x.safetensors")
    options = ["--out", str(tmp_path / "dit"), "--heads", str(HEADS)]
    assert main(["import", str(tmp_path / "x.safetensors"), *options, "--format", "dit"]) == 0
    assert "predicts" in capsys.readouterr().out
    images = tmp_path / "images.safetensors"
    options = ["--num-images", "2", "--steps", "3", "--solver", "ddim", "--device", "cpu"]
    assert main(["sample", str(tmp_path / "dit"), "--out", str(images), *options]) == 0
    model = MSF.from_pretrained(tmp_path / "dit")
    assert sample(model, torch.tensor([0]), seeds=[0], steps=3).isfinite().all()
    for arguments, message in (
        ([str(tmp_path / "none.pt"), "--out", str(tmp_path / "new")], "No such file"),
        ([str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "dit")], "is there already"),
    ):
        assert main(["import", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_the_command_offers_the_formats_there_are():
    from msf.cli.commands import import_model

    assert ("auto", *FORMATS) == import_model.FORMATS


def test_an_imported_model_begins_the_base_of_one_with_residuals(tmp_path):
    source = import_state(tmp_path / "x.safetensors", Published(), "sit").model
    source.save_pretrained(tmp_path / "sit")
    stages = (source.config.stages[0], StageConfig(WIDTH, 1, HEADS, 4))
    config = dataclasses.replace(
        source.config, image_size=(16, 16), stages=stages, steps=(8, 4), upsample="bilinear"
    )
    torch.manual_seed(0)
    model = started_from(tmp_path / "sit", config, ())
    base, old = model.stages[0].state_dict(), source.stages[0].state_dict()
    assert base.keys() == old.keys() and all(torch.equal(base[name], old[name]) for name in old)
    assert model.untrained_stages == ("residual",)
    for change, message in (
        ({"time_range": (0.0, 1000.0)}, r"other time_range .*\(0.0, 1.0\) and not"),
        ({"stages": stages[::-1]}, "other stages than the model to train"),
    ):
        with pytest.raises(ValueError, match=message):
            started_from(tmp_path / "sit", dataclasses.replace(config, **change), ())


def test_the_page_shows_how_the_base_begins(tmp_path):
    save_file(Published().state_dict(), tmp_path / "x.safetensors")
    page = (Path(__file__).parents[1] / "docs" / "import.md").read_text()
    _, code = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    made = {"checkpoint": tmp_path / "x.safetensors", "folder": tmp_path / "sit"}
    exec(code, made)
    model = started_from(tmp_path / "sit", MSFConfig.from_json(made["config"].to_json()), ())
    assert model.untrained_stages == ("residual",)


def test_the_page_shows_how_an_import_is_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    import_state(Path("x.safetensors"), Published(), "sit").model.save_pretrained("sit-xl")
    page = (Path(__file__).parents[1] / "docs" / "import.md").read_text()
    exec(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)[0], {})
    save_image("photos/a.png", torch.zeros(3, SIDE, SIDE))
    command = re.findall(r"^msf (train --from sit-xl .*)$", page, re.M)[0]
    small = ["--steps", "1", "--batch-size", "2", "--device", "cpu", "--holdout", "0"]
    arguments = command.replace("flowers-256", "photos").replace("102", "0").split()
    assert main([*arguments, *small]) == 0, capsys.readouterr().err
    assert MSF.from_pretrained("runs/flowers").config.time_range == (0.0, 1.0)
