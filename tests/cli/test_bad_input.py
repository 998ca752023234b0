"""Every bad input is one line, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msf import MSF
from msf.cli import main

from .helpers import STAGE, TINY, write_config

PLACES = {"run": "run", "image": "image.png", "tiny": "tiny.json"}
BAD_INPUT = {
    # What a model is made of
    "flops --preset digit": "preset must be one of digits, ",
    "flops --config {out}/none.json": "none.json: No such file or directory",
    "flops --config {image}": "not valid JSON",
    "flops --config {bad}/list.json": "list.json: must be a JSON object, got list",
    "flops --config {bad}/empty.json": 'must be {{"model": {{...}}, "training": {{...}}}}',
    "flops --config {bad}/key.json": "model: unknown keys size; known are image_size, ",
    "flops --config {bad}/missing.json": "model: keys channels, num_classes, stages, steps are",
    "flops --config {bad}/twice.json": "twice.json: not valid JSON: key 'a' is there more than",
    "flops --config {bad}/control.json": "model: unknown keys a\ufffd[2J\ufffdb; known are ",
    "flops --config {out}/a\nb.json": "a\ufffdb.json: No such file or directory",
    "flops --config {bad}/type.json": "model.stages[1].width must be a whole number, got '16'",
    "flops --config {bad}/size.json": "image sides must be multiples of 2",
    "flops --preset digits --steps 4 2 1": "steps must be 2 positive numbers, one a stage, of at",
    "flops --preset digits --steps 99999999999": "of at most 100000, got (99999999999, 9",
    "flops {out}/none": "none: no such folder; give a trained model's folder",
    "flops digits": "digits: no such folder; a preset is named by --preset digits",
    "flops {run} --preset digits": "exclude each other",
    "flops --steps 4": "--steps needs a model",
    # Checkpoints
    "sample {out} --out {out}/x.png": "no config.json here",
    "sample {bad}/truncated --out {out}/x.png": "not a readable safetensors file",
    "sample {bad}/corrupt --out {out}/x.png": "not a readable safetensors file",
    "sample {bad}/other --out {out}/x.png": "model.safetensors: does not fit config.json",
    "sample {bad}/config --out {out}/x.png": "config.json: MSFConfig: not valid JSON",
    "sample {bad}/half --out {out}/x.png": "not trained yet: residual; finish it with msf train",
    "flops {bad}/pipe": "pipe/config.json: is no file",
    "inspect {tiny}": "tiny.json: is no folder; expected a directory made by save_pretrained",
    "inspect {out}/none": "none: no such folder; expected a directory made by save_pretrained",
    "flops {tiny}": "tiny.json: is no folder; give a trained model's folder",
    "inspect {bad}/corrupt": "not a readable safetensors file",
    "evaluate {bad}/corrupt": "not a readable safetensors file",
    # Sampling
    "sample {run} --out {out}/x.png --labels 3,11": "no class is named or numbered '11'; choose",
    "sample {bad}/names --out {out}/x.png --labels a": "class_names must be 10, one a class, got 3",
    "inspect {bad}/names": "class_names must be 10, one a class, got 3",
    "sample {run} --out {out}/x.png --labels three": "no class is named or numbered 'three'",
    "sample {run} --out {out}/x.png --steps 4 2 1": "steps must be one value or 2, one a stage",
    "sample {run} --out {out}/x.png --steps 0": "steps must be at least 1, got 0",
    "sample {run} --out {out}/x.png --num-images 0": "--num-images must be at least 1, got 0",
    "sample {run} --out {out}/x.png --num-images 1000000000": "must be at most 10000 for --out",
    "sample {run} --out {out}/x --num-images 9999999": "must be at most 1000000 for --out",
    "sample {run} --out {out}/x.safetensors --num-images 99999999": "must be at most 16777216 for",
    "sample {run} --out {out}/x.png --labels 99999999999999999999": "or numbered '9999",
    "sample {run} --out {out}/x.png --seed -1": "--seed must be at least 0 and below 2^63, got -1",
    "evaluate {run} --seed 99999999999999999999": "--seed must be at least 0 and below 2^63",
    "sample {run} --out {out}/x.png --batch-size 0": "--batch-size must be at least 1, got 0",
    "sample {run} --out {out}/x.png --guidance-interval 1 0": "0 <= low <= high <= 1, got 1.0 and",
    "sample {run} --out {out}/x.png --guidance-scale nan": "must be finite, got nan",
    "sample {run} --out {out}/x.png --prior-noise 9": "prior_noise must be in [0, 0.3]",
    "sample {run} --out {out}/x.png --threads 0": "--threads must be 1 to 1024, got 0",
    "sample {run} --out {out}/x.png --solver rk4": "invalid choice: 'rk4'",
    "sample {run}": "the following arguments are required: --out; see msf sample --help",
    # Outputs
    "sample {run} --out=": "argument --out: must name a file or folder, got an empty string",
    "sample {run} --out {image}": "image.png: exists already; choose another --out or add",
    "sample {run} --out {run}": "run: holds files already; choose another --out or add --overwrite",
    "sample {run} --out {run} --overwrite": "run: holds other files too (README.md)",
    "sample {run} --out {bad}/mine --overwrite": "mine: holds other files too (holiday.png)",
    "factorize {image} --out {bad}/mine --overwrite": "mine: holds other files too (000000.png)",
    "sample {run} --out {tiny}": "tiny.json: is a file; --out must name a folder here",
    "sample {run} --out {image}/x.png": "image.png: is a file; --out must be in a folder",
    "sample {run} --out {image}/x": "image.png: is a file; --out must be in a folder",
    "factorize {image} --out {image}/x": "image.png: is a file; --out must be in a folder",
    "sample {run} --out {bad}/loop.png": "loop.png: Too many levels of symbolic links",
    "sample {run} --out {bad}/loop": "loop: Too many levels of symbolic links",
    "evaluate {run} --out {bad}/loop": "loop: Too many levels of symbolic links",
    "encode {bad}/photos --vae {run} --out {bad}/loop": "loop: Too many levels of symbolic links",
    "sample {run} --out {bad}/loop/x.png": "loop/x.png: Too many levels of symbolic links",
    "evaluate {run} --out {bad}/loop/y/x": "loop/y/x: Too many levels of symbolic links",
    "factorize {image} --out {bad}/loop/y/x": "loop/y/x: Too many levels of symbolic links",
    "encode {bad}/photos --vae {run} --out {bad}/loop/x": "loop/x: Too many levels of symbolic",
    "train --config {tiny} --data digits --out {bad}/loop/x": "loop/x: Too many levels of symbolic",
    "train --config {tiny} --data digits --out {bad}/loop": "loop: Too many levels of symbolic",
    "import {tiny} --out {bad}/loop": "loop: Too many levels of symbolic links",
    "evaluate {run} --out {bad}/pipe/config.json --overwrite": "config.json: is no file; --out mus",
    "sample {run} --out {run}/model.safetensors --overwrite": "which belongs to what is read here",
    "sample {run} --out {bad}/../run/state-base.safetensors --overwrite": "which belongs to what",
    "evaluate {run} --out {run}/training.json --overwrite": "would replace ",
    "evaluate {bad}/x.npz --reference {tiny} --inception {tiny} --out {tiny} --overwrite": "would",
    "factorize {bad}/own/base.png --out {bad}/own --overwrite": "own: would replace ",
    "train --config {tiny} --data digits --out {out}/\udce9": "\ufffd: its name is no UTF-8, as",
    "sample {bad}/\udce9 --out {out}/x.png": "\ufffd/model.safetensors: its name is no UTF-8, as",
    "sample {run} --out {bad}/lone.npz": "lone.npz.parts: is no folder, which parts of the output",
    "import {tiny} --out {run}": "run: is there already; choose another --out",
    "import {tiny} --out {image}": "image.png: is there already; choose another --out",
    "import {tiny} --out {image}/x": "image.png: is a file; --out must be in a folder",
    "import {tiny} --out {out}/x --heads 0": "--heads must be at least 1, got 0",
    "sample {run} --out {out}/x.jpg": "name a .npz file, a .png file, a .safetensors file or a fol",
    "sample {run} --out {out}/x.json": "the name of a new folder must not end in .json",
    "sample {run} --out {out}/x.txt": "the name of a new folder must not end in .txt",
    "sample {run} --out {out}/x.tar.gz": "the name of a new folder must not end in .gz",
    "sample {bad}/latents --out {out}/x.png": "latents of 4 channels, not pictures; decode them",
    "factorize {image} --out {run}": "run: holds files already",
    "evaluate {run} --out {tiny}/x/y": "tiny.json: is a file; --out must be in a folder",
    "evaluate {run} --out {tiny}": "tiny.json: exists already",
    "import {run} --out {out}/x": "run: holds weights of msf itself, which need no import",
    "import {run}/model.safetensors --out {out}/x --format sit": "s: holds weights of msf itself",
    "import {run}/state-base.safetensors --out {out}/x": "s: holds weights of msf itself",
    "import {bad}/index --out {out}/x": "holds no config.json; give a checkpoint, or a folder of",
    "import {bad}/no-class --out {out}/x": "holds what config.json gives no _class_name",
    # Images
    "factorize {bad}/pipe/config.json": "config.json: is no file",
    "factorize {tiny}": "tiny.json: not a readable image",
    "factorize {bad}/cut.png": "cut.png: not a readable image",
    "factorize {image} --levels 3 --out {out}/x": "12x20 (height x width) is not divisible by 8",
    "factorize {image} --levels 0 --out {out}/x": "--levels must be 1 to 16, got 0",
    "factorize {bad}/deep.png": "only 8-bit images are, not mode I;16); give an 8-bit PNG or JPEG",
    "factorize {image} --levels 99999999999999": "--levels must be 1 to 16, got 99999999999999",
    "factorize {out}/a\nb.png": "a b.png: no such file",
    "factorize {bad}/large.png": "large.png: not a readable image (image file is truncated)",
    "factorize {bad}/damaged.png": "damaged.png: not a readable image (",
    "factorize {run}": "run: is a folder; give an image file",
    "factorize {out}/none.png": "none.png: no such file",
    # Latents
    "encode {out}/none --vae {out} --out {out}/x": "none: no such folder; give a folder of images",
    "encode {bad}/photos --vae {out} --out {out}/x": "holds no VAE (config.json is missing); give",
    "encode {bad}/photos --vae {out} --out {out}/x --batch-size 0": "must be at least 1, got 0",
    "encode {bad}/photos --vae {out} --out {bad}/photos/k/x": "is in the folder of the data, ",
    "encode {bad}/photos --out {out}/x": "the following arguments are required: --vae",
    "inspect {bad}/index": "latents.json: not valid JSON",
    "train --config {tiny} --data {bad}/index --out {out}/x": "latents.json: not valid JSON",
    # Evaluation
    "evaluate {run} --batch-size 0": "--batch-size must be at least 1, got 0",
    "evaluate {run} --samples 3": "num_samples (--samples) must be at least ",
    "evaluate {run} --samples 1000001": "num_samples (--samples) must be at most 1000000, got 100",
    "evaluate {run} --data textures": "textures has 3 classes, the model 10",
    "evaluate {bad}/run-list": "training.json: must be a JSON object, got list",
    "sample {bad}/twice --out {out}/x.png": "class_names must be different, got 'a' twice",
    "evaluate {bad}/run-pipe": "training.json: is no file",
    "evaluate {bad}/run-data": "training.json: run.data must be a string, got 3",
    "evaluate {run} --prior-noise 9": "prior_noise must be in [0, 0.3]",
    "evaluate {run} --guidance-scale 1 2 3": "guidance_scale must be one value or 2, one a stage",
    "evaluate {run} --steps 1 2 3": "steps must be 2 positive numbers, one a stage",
    # Training
    "train --config {tiny} --data digits --out {run}": "not empty; continue its run with --resume",
    "train --config {tiny} --data digits --out {run} --resume --seed 1": "in training.seed; resume",
    "train --config {tiny} --data digits --out {out}/x --data-changed": "continues; add --resume",
    "train --config {tiny} --data digits --out {tiny}": "is a file; --out must be a folder",
    "train --config {tiny} --data digits --out {image}/x": "is a file; --out must be in a folder",
    "train --config {tiny} --data= --out {out}/x": "--data is empty; give digits, textures or a",
    "evaluate {run} --data=": "--data is empty; give digits, textures or a folder",
    "train --config {tiny} --data {bad}/loop --out {out}/x": "loop: Too many levels of symbolic",
    "evaluate {run} --data {bad}/loop/x": "loop/x: Too many levels of symbolic links",
    "train --from {bad}/loop --config {tiny} --data digits --out {out}/x": "loop: Too many levels",
    "train --config {tiny} --data nothing --out {out}/x": "neither 'digits', 'textures' nor",
    "train --config {tiny} --data {bad}/photos --out {out}/x": "cannot read",
    "train --config {tiny} --data {bad}/photos --out {bad}/photos/k": "choose another --out, outsi",
    "train --config {tiny} --data digits --out {out}/x --stage top": "one of base, residual",
    "train --config {tiny} --data digits --out {out}/x --num-classes 3": "num_classes set to 10",
    "train --config {tiny} --data digits --out {out}/x --batch-size 0": "batch_size must be at",
    "train --config {tiny} --data digits --out {out}/x --steps 1 2 3": "must be 2 numbers",
    "train --config {tiny} --data digits --out {out}/x --holdout 1": "must be in [0, 1), got 1.0",
    "train --config {tiny} --data digits --out {out}/x --holdout 0": "digits has splits of its own",
    "train --preset msf-s-256 --data digits --out {out}/x": "digits are 8x8 with 1 channel",
    "train --config {tiny} --data digits --out {bad}/run-list --resume": "must be a JSON object",
    "train --config {tiny} --data digits --out {bad}/run-data --resume": "data must be a string",
    "train --config {tiny} --data digits --out {bad}/config --resume": "MSFConfig: not valid",
    "train --config {tiny} --data digits --out {bad}/state --resume": "readable training",
    "train --data digits --out {out}/x --resume": "x: no such folder, so --resume has no settings",
    "train --data digits --out {out} --resume": "no config.json here, so --resume has no settings",
    "train --data digits --out {out}/x": "give --preset, --config, or --from a model's folder",
}


@pytest.fixture(scope="module")
def bad(workspace: Path) -> Path:
    """A folder of broken things."""
    bad = workspace / "bad"
    bad.mkdir()
    stages = [STAGE, {**STAGE, "width": "16"}]
    (bad / "list.json").write_text("[]")
    (bad / "empty.json").write_text("{}")
    (bad / "twice.json").write_text('{"a": 1, "a": 2}')
    (bad / "missing.json").write_text('{"model": {"image_size": [8, 8]}}')
    write_config(bad / "key.json", model={"size": 8})
    write_config(bad / "control.json", model={"a\x1b[2J\nb": 8})
    write_config(bad / "type.json", model={"stages": stages})
    write_config(bad / "size.json", model={"image_size": [8, 9]})
    for name in (
        *("truncated", "corrupt", "other", "config", "half", "state", "latents"),
        *("run-list", "run-data", "run-pipe", "pipe", "names", "twice", "\udce9"),
    ):
        shutil.copytree(workspace / "run", bad / name)
    weights = (workspace / "run" / "model.safetensors").read_bytes()
    (bad / "truncated" / "model.safetensors").write_bytes(weights[:-100])
    (bad / "corrupt" / "model.safetensors").write_bytes(b"\xff" * len(weights))
    (bad / "state" / "state-base.safetensors").write_bytes(b"")
    (bad / "config" / "config.json").write_text("{")
    (bad / "run-list" / "training.json").write_text("[]")
    (bad / "run-data" / "training.json").write_text(
        json.dumps({"data": 3, "training": TINY["training"]})
    )
    for pipe in ("pipe/config.json", "run-pipe/training.json"):
        (bad / pipe).unlink()
        os.mkfifo(bad / pipe)
    run = json.loads((workspace / "run" / "training.json").read_text())
    (bad / "names" / "training.json").write_text(json.dumps({**run, "class_names": list("abc")}))
    (bad / "twice" / "training.json").write_text(
        json.dumps({**run, "class_names": list("abcdefghia")})
    )
    config = MSF.from_pretrained(workspace / "run").config
    (bad / "other" / "config.json").write_text(replace(config, num_classes=9).to_json())
    half = MSF.from_pretrained(workspace / "run")
    torch.nn.init.zeros_(half.stages[1].output.weight)
    half.save_pretrained(bad / "half")
    latents = MSF(replace(config, channels=4))
    for stage in latents.stages:
        torch.nn.init.ones_(stage.output.weight)
    latents.save_pretrained(bad / "latents")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(bad / "deep.png")
    Image.new("L", (10_000, 10_000)).save(bad / "large.png")  # which Pillow warns of
    (bad / "large.png").write_bytes((bad / "large.png").read_bytes()[:200])
    image = (workspace / "image.png").read_bytes()
    (bad / "cut.png").write_bytes(image[:200])
    (bad / "damaged.png").write_bytes(image[:200] + bytes(len(image) - 200))
    (bad / "no-class").mkdir()
    (bad / "no-class" / "config.json").write_text("{}")
    (bad / "index").mkdir()
    (bad / "index" / "latents.json").write_text("{")
    (bad / "lone.npz.parts").touch()
    (bad / "mine").mkdir()
    for name in ("000000.png", "holiday.png"):
        (bad / "mine" / name).write_bytes(image)
    (bad / "own").mkdir()
    (bad / "own" / "base.png").write_bytes(image)
    (bad / "x.npz").touch()
    for name in ("loop", "loop.png"):
        (bad / name).symlink_to(name)
    for name in "abcdefghij":
        folder = bad / "photos" / name
        folder.mkdir(parents=True)
        for index in range(5):
            (folder / f"{index}.png").write_bytes(b"not an image")
    return bad


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line(
    command: str, workspace: Path, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: workspace / file for name, file in PLACES.items()}
    before = sorted(workspace.rglob("*"))
    try:
        status = main(command.format(**places, bad=bad, out=tmp_path).split(" "))
    except SystemExit as end:  # argparse's own
        status = end.code
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert captured.out == ""
    assert captured.err.startswith(f"msf {command.split()[0]}: ")
    assert not re.match(r"msf \w+: (sample|evaluat\w+): ", captured.err)
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert BAD_INPUT[command].format() in captured.err
    assert sorted(workspace.rglob("*")) == before
    assert not list(tmp_path.iterdir())
    assert not any(file.is_file() for file in tmp_path.rglob("*"))
