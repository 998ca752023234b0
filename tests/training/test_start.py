"""Fine-tuning: training that begins with the weights of another model."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from models import images, tiny_config, tiny_model
from msf import MSF, preset, sample
from msf.cli import main
from msf.importing import import_checkpoint
from msf.training.config import RUN_FILE, RunConfig
from msf.training.start import KEPT, started_from
from msf.training.train import train
from published import HEADS, Published
from training_runs import MODEL, TRAINING, saved_step

SHORT = dataclasses.replace(TRAINING, steps=(2, 2))


def saved(folder, names=(), **changes):
    """Save a tiny model with classes of these names in ``folder``."""
    model = tiny_model(**changes)
    model.save_pretrained(folder)
    run = RunConfig("data", TRAINING, class_names=tuple(names))
    (folder / RUN_FILE).write_text(json.dumps(dataclasses.asdict(run)))
    return model


def labels_of(model, index=0):
    return model.stages[index].label_embedding.weight


def test_all_but_statistics_is_kept(tmp_path):
    source = saved(tmp_path, names="abc")
    model = started_from(tmp_path, source.config, ["a", "b", "c"])
    new, old = model.state_dict(), source.state_dict()
    kept = {name for name in old if torch.equal(new[name], old[name])}
    assert kept == {name for name in old if not name.startswith("pyramid.")}


def test_classes_keep_the_embedding_of_their_name_and_new_ones_begin_as_no_class(tmp_path):
    source = saved(tmp_path, names="abc")
    model = started_from(tmp_path, tiny_config(num_classes=4), ["c", "new", "a", "other"])
    assert torch.equal(labels_of(model, 1), labels_of(source, 1)[[2, 3, 0, 3, 3]])


@pytest.mark.parametrize(("classes", "rows"), [(3, [0, 1, 2, 3]), (2, [3, 3, 3])])
def test_classes_without_names_are_told_by_their_number(tmp_path, classes, rows):
    source = saved(tmp_path)
    model = started_from(tmp_path, tiny_config(num_classes=classes), "abc"[:classes])
    assert torch.equal(labels_of(model), labels_of(source)[rows])


def test_where_no_class_was_never_trained_new_ones_begin_as_the_mean(tmp_path):
    source = saved(tmp_path, names="abc", label_dropout=0.0)
    model = started_from(tmp_path, tiny_config(num_classes=1), ["new"])
    mean = labels_of(source)[:3].mean(0)
    torch.testing.assert_close(labels_of(model), torch.stack([mean, mean]))


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 2)])
def test_with_or_without_classes_images_of_no_class_stay_what_they_were(tmp_path, before, after):
    source = saved(tmp_path, num_classes=before)
    model = started_from(tmp_path, tiny_config(num_classes=after), "ab"[:after])
    model.pyramid.load_state_dict(source.pyramid.state_dict())
    old, new = (
        sample(m, torch.full((2,), n) if n else None, seeds=[0, 1])
        for m, n in ((source, before), (model.eval(), after))
    )
    torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_any_other_size_may_be_trained(tmp_path):
    saved(tmp_path)
    model = started_from(tmp_path, tiny_config(image_size=(16, 24)), "abc")
    model.pyramid.measure([images(2, (16, 24))])
    y = torch.tensor([0, 1])
    assert model.training_losses(images(2, (16, 24)), y)["total"].isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": 0}, "has other stages than the model to train, "),
        ({"channels": 1}, "has other channels than the model to train, 2 and not 1; these must"),
        ({"positions": "sincos"}, "has other positions than the model to train, rope and not"),
    ],
)
def test_other_models_are_refused_in_one_line(tmp_path, change, message):
    saved(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: {message}")) as raised:
        started_from(tmp_path, tiny_config(**change), "abc")
    assert "\n" not in str(raised.value)


def test_the_recipe_of_sit_trains_on_what_is_imported_of_it(tmp_path):
    save_file(Published().state_dict(), tmp_path / "x.safetensors")
    imported = import_checkpoint(tmp_path / "x.safetensors", "sit", heads=HEADS).model.config
    ours = preset("sit-xl-256").model
    for name in {*KEPT, "times", "label_dropout"} - {"stages", "channels"}:
        assert getattr(ours, name) == getattr(imported, name), name


@pytest.fixture
def wide_photos(tmp_path):
    """Two classes, one of them of the digits', of 30 images of 16 pixels."""
    for index in range(60):
        folder = tmp_path / "photos" / ("7", "face")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), index * 4).save(folder / f"{index}.png")
    return tmp_path / "photos"


def test_one_stage_is_tuned_on_other_images_of_another_size(whole, wide_photos, tmp_path, capsys):
    out, before = tmp_path / "tuned", tmp_path / "before"
    shutil.copytree(whole, before)
    options = [
        *("--from", str(before), "--data", str(wide_photos), "--out", str(out), "--quiet"),
        *("--image-size", "16", "--num-classes", "2", "--stage", "residual", "--resume"),
        *("--steps", "4", "--learning-rate", "1e-3", "--device", "cpu"),
    ]
    assert main(["train", *options]) == 0
    model, source = MSF.from_pretrained(out), MSF.from_pretrained(before)
    assert model.config == dataclasses.replace(source.config, image_size=(16, 16), num_classes=2)
    run = json.loads((out / RUN_FILE).read_text())
    assert (run["start"], run["trained"]) == (str(before), ["residual"])
    assert torch.equal(labels_of(model), labels_of(source)[[7, 10, 10]])
    weights = [m.stages[1].output.weight for m in (model, source)]
    assert not torch.equal(*weights)
    assert not torch.equal(model.pyramid.mean, source.pyramid.mean)

    # Without its source the run knows its settings.
    shutil.rmtree(before)
    alone = ["train", *options[2:6], "--quiet", "--resume", "--device", "cpu"]
    assert main([*alone, "--stage", "residual", "--steps", "5"]) == 0
    assert saved_step(out, "residual") == 5
    model = MSF.from_pretrained(out)

    # Later the base, which has weights but was not trained here; and no longer, once it is lost.
    base = [*alone[1:], "--stage", "base"]
    assert main(["train", *base]) == 0
    assert saved_step(out, "base") == 5
    after = MSF.from_pretrained(out)
    assert torch.equal(after.stages[1].output.weight, model.stages[1].output.weight)
    assert not torch.equal(labels_of(after), labels_of(model))
    for file in (out / "state-base.safetensors", *(out / "checkpoints").glob("base-*")):
        file.unlink()
    capsys.readouterr()
    assert main(["train", *base]) == 2
    assert "state-base.safetensors is missing" in capsys.readouterr().err


def test_resuming_does_not_begin_anew(whole, tmp_path):
    out = tmp_path / "run"
    train(MODEL, SHORT, "digits", out, start=whole, progress=False)
    tuned = load_file(out / "model.safetensors")
    longer = dataclasses.replace(TRAINING, steps=(3, 2))
    train(MODEL, longer, "digits", out, start=whole, resume=True, progress=False)
    resumed = load_file(out / "model.safetensors")
    once = tmp_path / "once"
    train(MODEL, longer, "digits", once, start=whole, progress=False)
    assert all(torch.equal(x, resumed[k]) for k, x in load_file(once / "model.safetensors").items())
    assert not torch.equal(tuned["stages.0.output.weight"], resumed["stages.0.output.weight"])
    with pytest.raises(
        ValueError, match=f"began with {whole}, not with elsewhere; leave out --from"
    ):
        train(MODEL, longer, "digits", out, start="elsewhere", resume=True, progress=False)


def test_a_run_is_not_given_another_beginning(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match="began with new weights, not with "):
        train(MODEL, TRAINING, "digits", tmp_path / "run", start=whole, resume=True)
    options = ["--from", str(tmp_path / "none"), "--data", "digits", "--out", str(tmp_path / "x")]
    assert main(["train", *options]) == 2
    assert "none: no such folder; give a trained model's folder" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
