"""Images that cannot be read."""

from typing import ClassVar

import pytest
import torch

from models import tiny_model
from msf.data import SPLITS, load_data
from msf.seeds import generator
from msf.training.batches import batches
from msf.training.ranks import ONE_PROCESS, Ranks
from msf.training.skipped import ReadableBatches, Skipped
from msf.training.stage import StageTrainer
from msf.training.train import train
from msf.training.validation import VALIDATION, Validation
from training_runs import MODEL, TRAINING, digest, interrupt_at, saved_step


def load(photos, split="train"):
    return load_data(str(photos), split=split, image_size=(8, 8), channels=1)


def grey(images):
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_the_next_readable_image_of_the_batch_takes_the_place(photos):
    data = load(photos)
    indices = torch.tensor([3, 0, 5, 2])
    expected = grey(data.images(indices))
    for index in (0, 5, 2):
        data.paths[index].write_bytes(b"no image")
    expected[1:] = [expected[0]] * 3  # after the last comes the first
    for _ in range(2):
        readable = ReadableBatches(data)
        images, labels, problems = readable[indices]
        assert grey(images) == expected
        assert labels.tolist() == [int(data.labels[3])] * 4
        assert sorted(problems) == [0, 2, 5]
        assert problems[5].startswith(f"{data.paths[5]}: cannot identify image file")
    images, _, problems = readable[torch.tensor([1, 2, 4])]
    assert grey(images) == grey(data.images(torch.tensor([1, 4, 4]))) and set(problems) == {2}
    with pytest.raises(ValueError, match=r"data: cannot read .*; replace or remove it$"):
        readable[torch.tensor([0, 5])]


def test_a_batch_holds_the_same_after_a_resume(photos):
    data = load(photos)
    data.paths[7].write_bytes(b"no image")
    skipped = Skipped(data.total)
    whole = [grey(images) for images, _ in batches(data, 16, 0, 24, 0, skipped=skipped)]
    assert [grey(images) for images, _ in batches(data, 16, 5, 24, 0)] == whole[5:]
    (problem,) = skipped._problems.values()
    assert problem.startswith(str(data.paths[7]))


def test_training_skips_and_names_them_and_resumes_bit_for_bit(
    photos, tmp_path, monkeypatch, capsys
):
    broken = load(photos).paths[11]
    broken.write_bytes(broken.read_bytes()[:40])
    arguments = (MODEL, TRAINING, str(photos))
    train(*arguments, tmp_path / "whole", progress=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data: skipped 1 of 250 images, as they cannot be read: {broken}: ")
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        with pytest.raises(Exception, match="continue with --resume"):
            train(*arguments, tmp_path / "run", progress=False)
    train(*arguments, tmp_path / "run", resume=True, progress=False)
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_pixels_damaged_on_the_way_are_skipped_too(photos, tmp_path, capsys):
    """Their file is as long as it was."""
    broken = load(photos).paths[11]
    content = broken.read_bytes()
    broken.write_bytes(content[:45] + bytes(len(content) - 45))
    train(MODEL, TRAINING, str(photos), tmp_path / "run", stages=["base"], progress=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"data: skipped 1 of 250 images, as they cannot be read: {broken}: ")


def test_more_than_one_in_a_hundred_is_an_error(photos, tmp_path):
    for path in load(photos).paths[:3]:
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot read 3 of 250 images, more than one in a hun"):
        train(MODEL, TRAINING, str(photos), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


class Two(Ranks):
    """Two processes, the other of which has met ``problems``."""

    problems: ClassVar[dict[int, str]] = {}

    def gather(self, value):
        return [value, self.problems]


def test_one_in_a_hundred_is_of_all_processes():
    ranks, skipped = Two(), Skipped(250)
    skipped.add({1: "a: broken", 2: "b: broken"})
    ranks.problems.update({2: "b: broken"})
    skipped.check_all(ranks)
    ranks.problems.update({3: "c: broken"})
    with pytest.raises(ValueError, match="cannot read 3 of 250 images, more than one in a hun"):
        skipped.check_all(ranks)


@pytest.mark.parametrize("split", SPLITS)
def test_an_empty_file_is_reported_whatever_its_split(photos, tmp_path, split, capsys):
    empty = load(photos, split).paths[0]
    empty.write_bytes(b"")
    assert empty not in load(photos, split).paths
    train(MODEL, TRAINING, str(photos), tmp_path / "run", stages=["base"], progress=False)
    assert f"skipped 1 of 250 images, as they cannot be read: {empty}: an empty file" in (
        capsys.readouterr().err
    )


def test_the_first_are_named_and_the_rest_counted(capsys):
    skipped = Skipped(1000, ["a", "b"])
    skipped.add({1: "c: broken"})
    skipped.add({1: "c: broken"})
    skipped.report(ONE_PROCESS, {1: "d: held out"})
    assert capsys.readouterr().err == (
        "data: skipped 4 of 1,000 images, as they cannot be read: a: an empty file, b: an empty "
        "file, c: broken and 1 more; replace or remove them\n"
    )


@torch.no_grad()
def test_unreadable_ones_do_not_count_in_the_loss_on_held_out_images(photos, monkeypatch):
    monkeypatch.setattr("msf.training.validation.BATCH", 4)
    held_out = load(photos, "features")
    trainer = StageTrainer(tiny_model(channels=1, num_classes=0), 0, TRAINING)

    def losses(part, indices):
        draws = generator(3, *VALIDATION, part, 0)
        return trainer.model.image_losses(held_out.images(indices), stage="base", generator=draws)[
            0
        ]

    # Broken are one of the first part and all of the second.
    parts = torch.randperm(len(held_out), generator=generator(3, *VALIDATION)).split(4)
    parts = [parts[0][[0, 2, 3]], *parts[2:]]
    expected = torch.cat([losses(part + (part > 0), own) for part, own in enumerate(parts)]).mean()
    broken = set(range(len(held_out))) - set(torch.cat(parts).tolist())
    assert len(broken) == 5
    for index in broken:
        held_out.paths[index].write_bytes(b"no image")
    validation = Validation(held_out, 3)
    for _ in range(2):
        assert validation.loss(trainer) == pytest.approx(expected.item(), rel=1e-6)
    assert validation.problems.keys() == broken


@pytest.mark.parametrize("some", [True, False])
def test_held_out_ones_are_named_and_end_no_training(photos, tmp_path, some, capsys):
    def trained(name):
        train(MODEL, TRAINING, str(photos), tmp_path / name, stages=["base"], progress=False)
        return digest(tmp_path / name), "validation_loss" in (
            tmp_path / name / "metrics.jsonl"
        ).read_text()

    weights, _ = trained("whole")
    broken = load(photos, "features").paths[: 4 if some else None]
    for path in broken:
        path.write_bytes(b"no image")
    assert trained("run") == (weights, some)
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines == (
        []
        if some
        else ["data: none of the held-out images can be read, so there is no validation loss"]
    )
    assert last.startswith(f"data: skipped {len(broken)} of 250 images, as they cannot be read: ")
    assert str(photos) in last


def test_too_many_met_in_training_leave_the_steps_before_them(
    photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("msf.training.train.STATISTICS_IMAGES", 16)
    data = load(photos)
    seen = torch.randperm(len(data), generator=generator(TRAINING.seed, 0))
    for index in seen[50:53].tolist():  # in the fourth batch, of 48 to 64
        assert index not in torch.randperm(len(data), generator=generator(TRAINING.seed))[:16]
        data.paths[index].write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot read 3 of 250 images, more than one in"):
        train(MODEL, TRAINING, str(photos), tmp_path / "run", progress=False)
    assert saved_step(tmp_path / "run", "base") == 3
    assert "could not save" not in capsys.readouterr().err
