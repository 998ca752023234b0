"""A folder of latents as data."""

import json
import math
import pickle
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latent_folders import SHAPE, VAE, moments, write_latents
from msf import MSF
from msf.cli import main
from msf.data import SPLITS, Latents, load_data
from msf.data.latent_index import read_index
from msf.data.splits import in_split
from msf.seeds import generator
from msf.training.batches import DRAWS, batches
from msf.training.identity import fingerprint
from msf.training.train import train
from training_runs import MODEL, TRAINING, digest

CONFIG = replace(MODEL, channels=4)


def load(folder, split="train", **options):
    values = {"image_size": (8, 8), "channels": 4, "holdout": 0.0, **options}
    return load_data(str(folder), split=split, **values)


def scaled(x):
    return (x - VAE.shift_factor) * VAE.scaling_factor


def test_without_a_generator_they_are_the_scaled_means(tmp_path):
    x, labels, _ = write_latents(tmp_path)
    data = load(tmp_path, flip=True)
    assert isinstance(data, Latents) and len(data) == data.total == 150
    at = torch.tensor([149, 0, 63, 64, 127, 128, 0])  # on both sides of the shards' borders
    images, found = data.batch(at)
    assert images.dtype == torch.float32
    assert torch.equal(images, scaled(x[at, 0, :4].float()))
    assert torch.equal(found, labels[at])
    assert data.summary() == "latents of 150 images in 10 classes, 150 of them in the train split"


def test_draws_have_the_stored_mean_and_deviation(tmp_path):
    x, _, _ = write_latents(tmp_path, count=1)
    data, count = load(tmp_path), 20_000
    draws = data.images(torch.zeros(count, dtype=torch.long), generator(0)).double()
    mean, std = x[0, 0].double().chunk(2)[0], (0.5 * x[0, 0].double().chunk(2)[1]).exp()
    std = VAE.scaling_factor * std
    # Of 256 values of each the largest error of a mean is hardly 5 standard errors, sd / sqrt(n),
    # and of a deviation 5 of sd / sqrt(2n).
    assert ((draws.mean(0) - scaled(mean)).abs() < 5 * std / count**0.5).all()
    assert ((draws.std(0) - std).abs() < 5 * std / (2 * count) ** 0.5).all()


def test_each_draw_is_mean_and_noise_of_its_generator(tmp_path):
    x, _, _ = write_latents(tmp_path)
    at = torch.tensor([3, 140])
    noise = torch.randn(2, *SHAPE, generator=generator(7, 1))
    mean, log_variance = x[at, 0].float().chunk(2, 1)
    expected = scaled(mean + (0.5 * log_variance).exp() * noise)
    assert torch.equal(load(tmp_path).images(at, generator(7, 1)), expected)


def test_with_flip_half_are_drawn_from_the_mirror_image(tmp_path):
    x = moments(2000)
    x[:, :, 4:] = -30  # next to no noise
    write_latents(tmp_path, 2000, x=x)
    data = load(tmp_path, flip=True)
    images = data.images(torch.arange(2000), generator(0))
    distances = torch.stack(
        [(images - scaled(x[:, version, :4].float())).abs().amax((1, 2, 3)) for version in (0, 1)]
    )
    assert (distances.amin(0) < 1e-5).all() and (distances.amax(0) > 0.1).all()
    # Five standard deviations of a share.
    share = float(distances.argmin(0).double().mean())
    assert abs(share - 0.5) < 5 * 0.5 / 2000**0.5


@pytest.mark.parametrize("holdout", [0.2, 0.5])
def test_splits_are_those_of_the_names(tmp_path, holdout):
    _, labels, hashes = write_latents(tmp_path)
    every = load(tmp_path).images(torch.arange(150))
    for split in SPLITS:
        data, chosen = load(tmp_path, split, holdout=holdout), in_split(hashes, split, holdout)
        assert torch.equal(data.labels, labels[chosen])
        assert torch.equal(data.images(torch.arange(len(data))), every[chosen])
        again = load(tmp_path, holdout=holdout).of_split(split)
        assert torch.equal(again.images(torch.arange(len(data))), every[chosen])
        assert torch.equal(again.labels, labels[chosen]) and again.split == split


def anonymous_memory():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous: +(\d+) kB", text)[1]) * 1024


def test_shards_are_mapped_and_not_read_into_memory(tmp_path):
    x = moments(64).repeat(32, 1, 1, 1, 1)
    write_latents(tmp_path, len(x), x=x)
    data = load(tmp_path)
    data.images(torch.arange(0, 2048, 64))  # which maps all of the shards
    before = anonymous_memory()
    for at in torch.arange(2048).split(64):
        data.images(at)
    # A fifth of what was read; of one batch at a time two thirds of a MB are made.
    assert anonymous_memory() - before < x.nbytes / 5 > 64 * x[0].nbytes
    assert len(data._shards) == 32
    sent = pickle.dumps(data)
    assert len(sent) < 100_000 and not pickle.loads(sent)._shards and not pickle.loads(sent).files


def test_workers_see_what_the_step_draws(tmp_path):
    write_latents(tmp_path)
    data = load(tmp_path, flip=True)
    whole = list(batches(data, 16, 0, 12, 3))
    resumed = list(batches(data, 16, 7, 12, 3))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[7:], resumed, strict=True))
    order = torch.randperm(150, generator=generator(3, 0))[:16]
    assert torch.equal(whole[0][0], data.images(order, generator(3, *DRAWS, 0, 0)))
    # The second epoch draws the same images anew.
    again = torch.randperm(150, generator=generator(3, 1))
    assert {int(i) for i in again[:16]} & {int(i) for i in order}
    assert not torch.equal(data.images(order, generator(3, *DRAWS, 9, 0)), whole[0][0])


def test_a_model_trains_on_them_and_resumes_bit_for_bit(tmp_path, capsys):
    write_latents(tmp_path / "data")
    training = replace(TRAINING, flip=True)
    arguments = (CONFIG, training, str(tmp_path / "data"))
    train(*arguments, tmp_path / "whole")
    assert "latents of 150 images in 10 classes, " in capsys.readouterr().err
    train(CONFIG, replace(training, steps=(5, 6)), arguments[2], tmp_path / "run", progress=False)
    train(*arguments, tmp_path / "run", resume=True, progress=False)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert not list((tmp_path / "run").glob("samples-*"))


def test_other_latents_are_not_those_of_the_run(tmp_path):
    folder, run = tmp_path / "data", tmp_path / "run"
    write_latents(folder)
    train(CONFIG, TRAINING, str(folder), run, stages=["base"], progress=False)
    write_latents(folder, x=moments(150, seed=1))
    with pytest.raises(ValueError, match=r"3 of 3 images that were looked at hold something else"):
        train(CONFIG, TRAINING, str(folder), run, resume=True, progress=False)


def test_the_index_tells_files_and_digests(tmp_path):
    write_latents(tmp_path)
    data, index = load(tmp_path), read_index(tmp_path)
    assert data.files == {file.name: file.stat().st_size for file in tmp_path.glob("*.safetensors")}
    assert data.digest(index.shards[1].name) == index.shards[1].sha256[:16]
    assert fingerprint(data.files)


def change(folder, **values):
    index = json.loads((folder / "latents.json").read_text())
    (folder / "latents.json").write_text(json.dumps({**index, **values}))


def tensors_of(folder, **changes):
    """Put other tensors into the first shard, of which the index then knows the size."""
    file = folder / "latents-00000.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor.numel()}, file)
    index = json.loads((folder / "latents.json").read_text())
    index["shards"][0]["bytes"] = file.stat().st_size
    change(folder, shards=index["shards"])


WRONG = {
    "shape": (
        lambda f: None,
        {"image_size": (16, 16)},
        "the latents in .* are 4x8x8, of images of 64 pixels, the model takes 4x16x16; train a "
        r"model of 4 channels and image_size \[8, 8\]$",
    ),
    "channels": (lambda f: None, {"channels": 3}, "are 4x8x8, .* the model takes 3x8x8; "),
    "classes": (lambda f: None, {"num_classes": 7}, "has 10 classes, the model 7; choose other"),
    "missing": (
        lambda f: (f / "latents-00001.safetensors").unlink(),
        {},
        r"latents-00001.safetensors is missing; restore it, or make it anew with the same msf enc",
    ),
    "size": (
        lambda f: (f / "latents-00002.safetensors").write_bytes(b"x"),
        {},
        "latents-00002.safetensors has 1 bytes, not ",
    ),
    "header": (
        lambda f: (f / "latents-00000.safetensors").write_bytes(
            b"\xff" * (f / "latents-00000.safetensors").stat().st_size
        ),
        {},
        "latents-00000.safetensors: not a readable shard",
    ),
    "labels": (
        lambda f: tensors_of(f, labels=torch.full((64,), 10)),
        {},
        "labels in .* must be of its 10 classes, got 0 to 10",
    ),
    "moments": (
        lambda f: tensors_of(f, moments=torch.zeros(64, 2, 4, 8, 8).half()),
        {},
        r"moments must be \[64, 2, 8, 8, 8\] of torch.float16, got \[64, 2, 4, 8, 8\] of torch.fl",
    ),
    "no hashes": (lambda f: tensors_of(f, hashes=torch.ones(0)), {}, "not a readable shard"),
    "no JSON": (lambda f: (f / "latents.json").write_text("{"), {}, "latents.json: not valid JSON"),
    "format": (lambda f: change(f, format=2), {}, "latents.json: format must be 1, got 2"),
    "kind": (lambda f: change(f, images="x"), {}, "index.images must be a whole number, got 'x'"),
    "sum": (lambda f: change(f, images=149), {}, "images must be those of all shards, got 149"),
    "key": (lambda f: change(f, more=1), {}, "index: unknown keys more; known are format, "),
    "negative": (lambda f: change(f, found=-1), {}, "sizes and numbers must be positive"),
    "place": (
        lambda f: change(f, shards=[{"name": "../x", "images": 1, "bytes": 1, "sha256": "0" * 64}]),
        {},
        "shards must be different ones of its own, got '../x'",
    ),
    "unfinished": (
        lambda f: change(f, found=1000),
        {},
        "has 3 of 16 shards; finish it with the same msf encode command",
    ),
    "split": (lambda f: None, {"holdout": 1e-6, "split": "test"}, "too few images: none falls"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_one_line(tmp_path, name):
    write_latents(tmp_path)
    break_it, options, message = WRONG[name]
    break_it(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, **options)
    assert "\n" not in str(error.value)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_shard_is_not_trained_on(tmp_path, capsys, resume):
    """By the statistics of a new run; by a worker process of one that continues."""
    data, run = tmp_path / "data", tmp_path / "run"
    write_latents(data)
    if resume:
        training = replace(TRAINING, steps=(2, 2))
        train(CONFIG, training, str(data), run, progress=False)
    flip_a_bit(data / "latents-00001.safetensors")
    config = tmp_path / "model.json"
    config.write_text(json.dumps({"model": asdict(CONFIG), "training": asdict(TRAINING)}))
    options = ["--resume", "--steps", 4, 4] if resume else ["--config", config]
    options += ["--data", data, "--out", run, "--quiet"]
    assert main(["train", *map(str, options)]) == 2
    assert capsys.readouterr().err.endswith(
        f"msf train: data: {data / 'latents-00001.safetensors'} is damaged; restore it, or make it "
        "anew with the same msf encode command\n"
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_names_its_file(tmp_path, value):
    x = moments(150)
    x[100, 0, 3, 5, 5] = value
    write_latents(tmp_path, x=x)
    data = load(tmp_path)
    data.images(torch.arange(100))
    with pytest.raises(ValueError, match=r"^data: .*/latents-00001.safetensors holds NaN or inf"):
        data.images(torch.arange(90, 110), generator(0))


def test_latents_without_classes(tmp_path):
    write_latents(tmp_path, classes=0)
    data = load(tmp_path)
    assert not data.has_classes and data.num_classes == 1 and "without classes" in data.summary()


def test_inspect_tells_what_is_in_it_and_verifies_checksums(tmp_path, capsys):
    write_latents(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for line in (
        r"of +photos, 64 pixels",
        r"shape +4x8x8",
        r"images +150",
        r"class names +0, 1, 2, .*9",
        r"scaling, shift +0.5, 0.25",
        r"problems +none",
    ):
        assert re.search(f"^{line}$", out, re.MULTILINE)
    file = tmp_path / "latents-00001.safetensors"
    flip_a_bit(file)
    (tmp_path / "latents-00002.safetensors").unlink()
    assert main(["inspect", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [
        f"{file} is damaged",
        f"{tmp_path / 'latents-00002.safetensors'} is missing",
    ]
    change(tmp_path, found=200)
    assert main(["inspect", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "; shards not made yet: 1" in out and re.search(r"^shards +3 of 4, ", out, re.MULTILINE)
    assert found["images"] == 150 and found["shards"] == 3
    assert math.isclose(found["vae"]["scaling_factor"], 0.5)


def test_evaluate_says_what_it_cannot_do(tmp_path, capsys):
    write_latents(tmp_path / "data")
    run = tmp_path / "run"
    train(CONFIG, TRAINING, str(tmp_path / "data"), run, progress=False)
    assert main(["evaluate", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"msf evaluate: {tmp_path / 'data'}: holds latents, and an evaluation compares pictures; "
        "msf sample --out FILE.safetensors writes latents for the VAE to decode\n"
    )


def test_evaluate_says_that_nothing_was_held_out(tmp_path, photos, capsys):
    run = tmp_path / "run"
    train(MODEL, replace(TRAINING, holdout=0.0), str(photos), run, progress=False)
    assert main(["evaluate", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"msf evaluate: {run}: nothing was held out of its training (holdout 0), so there are no "
        "new images to compare with; train with --holdout 0.2, say\n"
    )


def test_statistics_are_of_latents_as_they_are_drawn(tmp_path):
    """Posteriors as wide as the latents are: their means alone deviate less."""
    x = moments(150)
    x[:, :, SHAPE[0] :] = 0  # log-variances
    write_latents(tmp_path / "latents", x=x)
    out = tmp_path / "run"
    training = replace(TRAINING, steps=(2, 2), holdout=0.0)
    train(CONFIG, training, str(tmp_path / "latents"), out, stages=["base"], progress=False)
    pyramid = MSF.from_pretrained(out).pyramid
    data = load(tmp_path / "latents")
    draws = torch.cat([data.images(torch.arange(len(data)), generator(i)) for i in range(8)])
    means = data.images(torch.arange(len(data)))
    drawn, narrow = (pyramid.split(x)[1].std((0, 2, 3)) for x in (draws, means))
    # Of 150 x 64 values of a channel: 5 standard errors of a deviation, 1 / sqrt(2n).
    error = 5 / (2 * 150 * 64) ** 0.5
    torch.testing.assert_close(pyramid.std[1], drawn, rtol=error, atol=0)
    mean = means.mean((0, 2, 3))
    assert ((pyramid.mean[0] - mean).abs() < 5 * VAE.scaling_factor / (150 * 64) ** 0.5).all()
    assert (narrow < (1 - 2 * error) * drawn).all()
