"""Which files are imported, as what, and why others are refused."""

import argparse
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from msf.importing import import_checkpoint
from msf.importing.checkpoint import read_checkpoint
from published import (
    CHANNELS,
    HEADS,
    MODELS,
    Published,
    import_state,
    inputs,
)


def test_a_format_that_does_not_fit_the_path_is_refused(tmp_path):
    save_file(Published().state_dict(), tmp_path / "x.safetensors")
    for name, format, message in (
        ("x.safetensors", "diffusers", "is no folder; give the one that diffusers wrote"),
        ("", "sit", "is a folder, which --format diffusers is for; sit is a file"),
        ("x.safetensors", "DiT", "format must be auto, dit, sit, .*, diffusers, got 'DiT'"),
    ):
        with pytest.raises(ValueError, match=message):
            import_checkpoint(tmp_path / name, format)


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
    for qk_norm in (False, True):  # which SiT and REPA may have too
        with pytest.raises(ValueError, match="say which it is with --format dit, sit,"):
            import_state(path, Published(qk_norm=qk_norm))


@pytest.mark.parametrize("option", ["rope", "rms", "swiglu"])
def test_a_format_that_is_not_that_of_the_tensors_is_noted(option, tmp_path):
    source = Published(learn_sigma=False, **{option: True})
    note = "the file says that it is of format lightningdit"
    for format in ("dit", "sit", "repa", "lightningdit"):
        made = import_state(tmp_path / "x.safetensors", source, format)
        assert made.format == format and (note in made.notes) == (format != "lightningdit")


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
        ({"blocks.0.attn.q_norm.bias": torch.ones(16)}, r"attn.q_norm.weight is missing"),
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
    source = Published(**MODELS["lightningdit"])
    with pytest.raises(ValueError, match=f"has {HEADS} heads, which --heads {2 * HEADS} contrad"):
        import_state(tmp_path / "x.safetensors", source, heads=2 * HEADS)


def test_missing_tables_of_rope_are_told(tmp_path):
    state = Published(**MODELS["lightningdit"]).state_dict()
    state = {name: x for name, x in state.items() if "feat_rope" not in name}
    save_file(state, tmp_path / "x.safetensors")
    notes = import_checkpoint(tmp_path / "x.safetensors", heads=HEADS).notes
    assert notes == ["without RoPE, because the file has no tables of it (feat_rope)"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["x_embedder.proj.bias", "blocks.0.attn.qkv.weight"])
def test_a_tensor_in_float64_makes_no_model_of_two_dtypes(name, tmp_path):
    source = Published(**MODELS["sit"])
    expected = import_state(tmp_path / "x.safetensors", source, "sit").model
    state = source.state_dict()
    torch.save({**state, name: state[name].double()}, tmp_path / "x.pt")
    made = import_checkpoint(tmp_path / "x.pt", "sit", heads=HEADS).model
    assert torch.equal(made.stages[0](*inputs()), expected.stages[0](*inputs()))


def test_tensors_that_required_gradients_are_read_in_silence(tmp_path, recwarn, request):
    torch.save(dict(Published().requires_grad_().named_parameters()), tmp_path / "x.pt")
    torch.set_warn_always(True)  # PyTorch says it once a process
    request.addfinalizer(lambda: torch.set_warn_always(False))
    model = import_checkpoint(tmp_path / "x.pt", "sit", heads=HEADS).model
    assert all(x.is_leaf and x.requires_grad for x in model.parameters())
    assert not recwarn.list


def test_two_tensors_of_one_name_are_refused(tmp_path):
    state, name = Published().state_dict(), "x_embedder.proj.bias"
    torch.save({**state, f"module.{name}": state[name]}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: holds {name} twice, as module\.{name} too$"):
        import_checkpoint(tmp_path / "x.pt", "sit", heads=HEADS)


def test_settings_of_several_lines_are_told_in_one(tmp_path):
    args = argparse.Namespace(path_type=torch.ones(2, 2))
    torch.save({"ema": Published().state_dict(), "args": args}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"was trained with path_type tensor.*; only") as told:
        import_checkpoint(tmp_path / "x.pt", "sit", heads=HEADS)
    assert "\n" not in str(told.value)


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
