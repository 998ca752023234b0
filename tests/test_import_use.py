"""An imported model is sampled, trained on, and begins the base of one with residuals."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msf import MSF, MSFConfig, StageConfig, sample
from msf.cli import main
from msf.images import save_image
from msf.importing import FORMATS
from msf.training.start import started_from
from published import HEADS, SIDE, WIDTH, Published, import_state


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
