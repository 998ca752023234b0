"""Which VAEs are taken, and what their encoder makes of images."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from msf.cli import main
from msf.data.latent_index import FORMAT, LatentIndex, Vae
from msf.encoding.encode import encode
from msf.encoding.vae import WEIGHTS, Autoencoder, problem
from vaes import save_vae


def test_an_infinite_log_variance_is_not_hidden_by_its_clamp(vae, tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_bytes((vae / "config.json").read_bytes())
    weights = load_file(vae / WEIGHTS)
    weights["quant_conv.bias"][7] = torch.inf
    save_file(weights, folder / WEIGHTS)
    moments = Autoencoder(folder).moments(torch.zeros(1, 3, 32, 32))
    assert moments[:, :, 7].isinf().all() and moments[:, :, :7].isfinite().all()
    assert problem(moments) and not problem(moments[:, :, :7])


def empty(folder):
    folder.mkdir()


def pickle_only(folder):
    save_vae(folder)
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def config(folder, **changes):
    save_vae(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def without_a_weight(folder):
    save_vae(folder)
    weights = load_file(folder / WEIGHTS)
    del weights["encoder.conv_in.weight"]
    save_file(weights, folder / WEIGHTS)


def cut(folder):
    save_vae(folder)
    (folder / WEIGHTS).write_bytes(b"x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, r"vae: holds no VAE \(config.json is missing\); give the folder of"),
        (
            empty,
            r"vae: holds no VAE \(config.json is missing\); .* of a pipeline its subfolder",
        ),
        (pickle_only, "diffusion_pytorch_model.bin is a pickle, which may run code; save the VAE"),
        (lambda folder: config(folder, _class_name="VQModel"), 'AutoencoderKL, holds "VQModel"'),
        (without_a_weight, "vae: encoder.conv_in.weight is missing in diffusion_pytorch_model.saf"),
        (cut, r"vae: not a readable VAE \("),
        (
            lambda folder: config(folder, latents_mean=[0.1] * 4, latents_std=[2.0] * 4),
            "vae: standardises each channel of its latents .* set both to null in its config.json$",
        ),
        (
            lambda folder: save_vae(folder, in_channels=1),
            r"3 channels \(RGB\), takes 1 and",
        ),
    ],
)
def test_what_is_no_vae_is_one_line(photos, tmp_path, make, message, capfd):
    make(tmp_path / "vae")
    with pytest.raises(ValueError, match=message) as error:
        encode(photos, tmp_path / "vae", 32, tmp_path / "x")
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


def test_a_vae_of_other_latents_is_told_by_what_differs(vae, tmp_path):
    index = LatentIndex(
        format=FORMAT,
        source="photos",
        fingerprint="f",
        vae=Vae(sha256="0" * 64, scaling_factor=0.5, shift_factor=0.25),
        image_size=32,
        latent_shape=(4, 16, 16),
        class_names=(),
        found=1,
    )
    Autoencoder(vae).check_decodes(index)  # though the weights are others
    other = Autoencoder(save_vae(tmp_path / "other", scaling_factor=0.3))
    with pytest.raises(ValueError) as error:
        other.check_decodes(index)
    assert str(error.value) == (
        f"{tmp_path / 'other'}: does not fit the latents that the model was trained on: "
        "scaling_factor is 0.3 (not 0.5); give their VAE"
    )
    with pytest.raises(
        ValueError, match=r"the number of pixels a side is 32 \(not 64\); give their VAE$"
    ):
        Autoencoder(vae).check_decodes(replace(index, image_size=64))


@pytest.mark.parametrize("size", [0, 31, -2])
def test_the_size_is_a_multiple_of_the_vaes_factor(photos, vae, tmp_path, size):
    with pytest.raises(ValueError, match=f"--size must be a multiple of 2, .*, got {size}$"):
        encode(photos, vae, size, tmp_path / "x")


def test_diffusers_is_asked_for_where_it_is_missing(photos, vae, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    command = ["encode", str(photos), "--vae", str(vae), "--size=32", "--out", str(tmp_path / "x")]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("msf encode: a VAE needs diffusers (")
    assert line.endswith("); run in the checkout: pip install '.[latents]'")
