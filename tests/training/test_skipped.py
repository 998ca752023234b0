"""Images that cannot be read."""

from typing import ClassVar

import pytest
import torch

from msf.data import SPLITS, load_data
from msf.seeds import generator
from msf.training.batches import batches
from msf.training.ranks import Ranks
from msf.training.skipped import ReadableBatches, Skipped
from msf.training.train import train
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
    assert skipped._names().startswith(str(data.paths[7])) and len(skipped._problems) == 1


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


def test_the_first_are_named_and_the_rest_counted():
    skipped = Skipped(1000, ["a", "b"])
    skipped.add({1: "c: broken", 2: "d: broken"})
    skipped.add({1: "c: broken"})
    assert skipped._names() == "a: an empty file, b: an empty file, c: broken and 1 more"
    assert skipped._count() == "4 of 1,000 images"


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
