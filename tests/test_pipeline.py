import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

import msf
from latent_folders import VAE, write_latents
from models import tiny_model
from msf.images import to_uint8
from msf.training.config import RUN_FILE, RunConfig
from training_runs import TRAINING
from vaes import save_vae


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures.images])


def test_pictures_are_samples_of_pixels():
    model = tiny_model(channels=1)
    made = msf.Pipeline(model)([2, 0], seeds=[5, 6], steps=1)
    expected = to_uint8(msf.sample(model, torch.tensor([2, 0]), seeds=[5, 6], steps=1))
    assert made.images[0].mode == "L" and made.images[0].size == (8, 8)
    assert np.array_equal(pixels(made), expected[:, 0].numpy())


def test_without_classes_there_is_one_of_each_seed():
    pipe = msf.Pipeline(tiny_model(channels=3, num_classes=0))
    assert len(pipe(seeds=[1, 2, 3]).images) == 3 and pipe().images[0].mode == "RGB"


def test_a_model_that_is_half_trained_is_refused():
    model = tiny_model(channels=1)
    with torch.no_grad():
        model.stages[1].output.weight.zero_()
        model.stages[1].output.bias.zero_()
    with pytest.raises(ValueError, match=r"^Pipeline: not trained yet: residual$"):
        msf.Pipeline(model)


def test_a_folder_gives_names_and_its_latents_are_decoded(tmp_path):
    pytest.importorskip("diffusers", reason="needs diffusers (the latents extra)")
    from msf.encoding.vae import Autoencoder

    model = tiny_model(channels=4)
    model.save_pretrained(tmp_path / "run")
    run = RunConfig("data", TRAINING, class_names=("cat", "dog", "owl"))
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps(dataclasses.asdict(run)))
    vae = save_vae(tmp_path / "vae")
    pipe = msf.Pipeline.from_pretrained(tmp_path / "run", vae=vae)
    latents = msf.sample(model, torch.tensor([1, 2]), seeds=[0, 1])
    expected = to_uint8(Autoencoder(vae).decode(latents)).permute(0, 2, 3, 1)
    assert np.array_equal(pixels(pipe(["dog", 2])), expected.numpy())
    with pytest.raises(ValueError, match=r"'cow'; names of classes are cat, dog, owl$"):
        pipe(["cow"])
    with pytest.raises(ValueError, match="makes latents of 4 channels, not pictures; give the vae"):
        msf.Pipeline.from_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match="decodes latents of 4 channels, the model makes 1"):
        msf.Pipeline(tiny_model(channels=1), Autoencoder(vae))


def test_the_vae_is_that_of_the_latents_the_model_was_trained_on(tmp_path, capsys):
    pytest.importorskip("diffusers", reason="needs diffusers (the latents extra)")
    from msf.encoding.vae import Autoencoder

    tiny_model(channels=4).save_pretrained(tmp_path / "run")
    vae, data = save_vae(tmp_path / "vae"), tmp_path / "data"
    run = RunConfig(str(data), TRAINING)
    (tmp_path / "run" / RUN_FILE).write_text(json.dumps(dataclasses.asdict(run)))

    def told(**changes):
        write_latents(data, classes=3, image_size=16, vae=dataclasses.replace(VAE, **changes))
        msf.Pipeline.from_pretrained(tmp_path / "run", vae=vae)
        return capsys.readouterr().err

    assert told(sha256=Autoencoder(vae).vae.sha256) == ""
    assert told(sha256="5" * 64) == (
        f"{vae}: its weights are not those of the VAE that made the model's latents, whose sha256 "
        "begins with 55555555\n"
    )
    with pytest.raises(ValueError, match="vae: does not fit the latents that the model was train"):
        told(scaling_factor=0.1)


def test_a_model_of_the_hub_has_names_of_classes(tmp_path, monkeypatch):
    """What is not among the files asked for is not fetched."""
    hub = pytest.importorskip("huggingface_hub")
    tiny_model(channels=1).save_pretrained(tmp_path / "there")
    run = RunConfig("digits", TRAINING, class_names=("cat", "dog", "owl"))
    (tmp_path / "there" / RUN_FILE).write_text(json.dumps(dataclasses.asdict(run)))

    def download(name, revision, allow_patterns):
        shutil.copytree(tmp_path / "there", tmp_path / "here")
        for file in (tmp_path / "here").iterdir():
            if file.name not in allow_patterns:
                file.unlink()
        return tmp_path / "here"

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert msf.Pipeline.from_pretrained("someone/tiny").class_names == ("cat", "dog", "owl")


@pytest.mark.parametrize("names", [["cat"], ["cat", "dog", "cat"], ["cat", "dog", "owl", "ox"]])
def test_names_are_one_a_class(names):
    """Else a name would be that of another class."""
    line = f"^Pipeline: class_names must be 3 different ones, one a class, got {', '.join(names)}$"
    with pytest.raises(ValueError, match=line):
        msf.Pipeline(tiny_model(channels=1), class_names=names)


@pytest.mark.parametrize("label", ["dog", 1, np.int64(1), torch.tensor(1)])
def test_one_label_may_stand_alone(label):
    pipe = msf.Pipeline(tiny_model(channels=1), class_names=("cat", "dog", "owl"))
    assert np.array_equal(pixels(pipe(label)), pixels(pipe([1])))


@pytest.mark.parametrize("label", ["cow", 1.5, True, b"a", {1: 2}])
def test_one_that_is_none_is_named_whole(label):
    pipe = msf.Pipeline(tiny_model(channels=1), class_names=("cat", "dog", "owl"))
    with pytest.raises(
        (ValueError, TypeError), match=rf"^Pipeline: .* {re.escape(repr(label))}(;|$)"
    ):
        pipe(label)


@pytest.mark.parametrize("label", [1.5, None, [1], True])
def test_what_is_no_label_is_refused(label):
    with pytest.raises(TypeError, match=r"^Pipeline: labels must be classes' numbers or names, "):
        msf.Pipeline(tiny_model(channels=1))([label])


def test_truth_is_no_label():
    for labels in (torch.tensor(True), torch.tensor([True]), np.array([True])):
        with pytest.raises(TypeError, match=r"^Pipeline: labels must be .*, got .*True"):
            msf.Pipeline(tiny_model(channels=1))(labels)


def test_a_vae_and_names_of_other_kinds_are_one_clear_line():
    with pytest.raises(TypeError, match=r"^Pipeline: vae must be of class Autoencoder, got int$"):
        msf.Pipeline(tiny_model(channels=1), 3)
    for names, line in ((3, " must be a list or tuple, got 3"), ([1], r"\[0\] must be a string")):
        with pytest.raises(ValueError, match=f"^Pipeline: class_names{line}"):
            msf.Pipeline(tiny_model(channels=1), class_names=names)
