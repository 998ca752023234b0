"""The files of a model: what comes back, and what is refused."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode

from models import generator, images, tiny_model
from msf import MSF, StageConfig


def test_save_and_load_round_trip(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    loaded = MSF.from_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert loaded.config == model.config and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


SPOILS = {
    "nan": lambda tensors: tensors["stages.0.output.bias"].fill_(float("nan")),
    "infinity": lambda tensors: tensors["pyramid.mean"].fill_(-float("inf")),
    "flat": lambda tensors: tensors["pyramid.std"].zero_(),
    "integers": lambda tensors: tensors.update(
        {"stages.0.output.bias": tensors["stages.0.output.bias"].int()}
    ),
    "complex": lambda tensors: tensors.update(
        {"stages.0.output.bias": tensors["stages.0.output.bias"].to(torch.complex64)}
    ),
    "8 bits": lambda tensors: tensors.update(
        {"stages.0.output.bias": tensors["stages.0.output.bias"].to(torch.float8_e5m2)}
    ),
}
COMPLEX = pytest.mark.skipif(
    torch.complex64 not in safetensors.torch._SIZE, reason="this safetensors has no complex numbers"
)


def broken(directory, what):
    tiny_model().save_pretrained(directory)
    weights, config = directory / "model.safetensors", directory / "config.json"
    if what == "no weights":
        weights.unlink()
    elif what == "no config":
        config.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "not safetensors":
        weights.write_bytes(b"\x80\x04 a pickle, say")
    elif what == "another size":
        values = json.loads(config.read_text())
        values["stages"][0]["width"] = 64
        config.write_text(json.dumps(values))
    elif what in SPOILS:
        tensors = load_file(weights)
        SPOILS[what](tensors)
        save_file(tensors, weights)
    elif what == "bad config":
        config.write_text("{")


@pytest.mark.filterwarnings("error")  # which would be lines too
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no weights", "no model.safetensors here"),
        ("no config", "no config.json here"),
        ("truncated", "not a readable safetensors file"),
        ("not safetensors", "not a readable safetensors file"),
        ("another size", "does not fit config.json: size mismatch"),
        ("nan", "model.safetensors: stages.0.output.bias must be finite, but holds NaN"),
        ("infinity", "model.safetensors: pyramid.mean must be finite, but holds NaN or infinity"),
        ("flat", "model.safetensors: pyramid.std must be positive"),
        (
            "integers",
            r"stages.0.output.bias must be of float16, .* or float64, got torch\.int32",
        ),
        pytest.param("complex", r"float32 or float64, got torch\.complex64", marks=COMPLEX),
        ("8 bits", "stages.0.output.bias must be of float16, .* got torch.float8_e5m2"),
        ("bad config", "not valid JSON"),
    ],
)
def test_bad_checkpoints_are_one_clear_line(tmp_path, what, message):
    broken(tmp_path, what)
    with pytest.raises(ValueError, match=message) as error:
        MSF.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_are_not_read_under_fake_mode(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with FakeTensorMode(), pytest.raises(ValueError, match="cannot read weights under Fake"):
        MSF.from_pretrained(tmp_path)


def test_weights_that_cannot_be_loaded_are_not_saved(tmp_path):
    model, file = tiny_model(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    before = file.read_bytes()
    torch.nn.init.constant_(model.stages[0].output.bias, float("nan"))
    with pytest.raises(ValueError, match=r"safetensors: stages.0.output.bias must be finite, but"):
        model.save_pretrained(tmp_path)
    assert file.read_bytes() == before


def test_a_configuration_beyond_its_weights_takes_no_memory(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    stage = StageConfig(width=2**16, depth=1000, heads=2**12)  # of hundreds of terabytes
    config = replace(model.config, stages=(stage, stage))
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(
        ValueError, match=r"model.safetensors: does not fit config\.json: Missing key"
    ):
        MSF.from_pretrained(tmp_path)


def test_compiled_and_wrapped_stages_save_plain_names(tmp_path):
    model, plain = tiny_model(), tiny_model()
    model.stages[0] = torch.compile(model.stages[0], backend="eager")
    model.stages[1] = torch.nn.DataParallel(model.stages[1])
    model.save_pretrained(tmp_path)
    loaded = MSF.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.state_dict().values(), plain.state_dict().values()))


def test_parametrized_layers_save_the_weights_they_make(tmp_path):
    model, x, y = tiny_model().train(), images(2), torch.tensor([0, 1])
    parametrizations = torch.nn.utils.parametrizations
    parametrizations.weight_norm(model.stages[0].time_embedding[0])
    parametrizations.spectral_norm(model.stages[0].label_embedding)
    parametrizations.spectral_norm(model.stages[1].blocks[0].mlp[0])
    model.stages[1] = torch.compile(model.stages[1], backend="eager")
    model.stages[0].time_embedding[0].parametrizations.weight.original0.data.mul_(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded = MSF.from_pretrained(tmp_path)
    losses = [m.eval()(x, y, generator=generator())["total"] for m in (model, loaded)]
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], tiny_model()(x, y, generator=generator())["total"])
