"""What a step sees is a function of seed, step and part."""

import os
import resource
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from models import images as pictures
from models import tiny_model
from msf.data import ImageData, load_data
from msf.seeds import generator
from msf.training.batches import _Steps, batches
from msf.training.stage import StageTrainer
from training_runs import TRAINING


class Pixels(ImageData):
    """Images (1, 1, 2) of [index, index + 0.5]."""

    class_names = ("all",)

    def __init__(self, count, flip=False):
        self.labels, self.flip = torch.arange(count), flip

    def read(self, indices):
        return torch.stack([indices, indices + 0.5], -1)[:, None, None]


def seen(data, first=0, last=6, **options):
    return [images for images, _ in batches(data, 4, first, last, 7, **options)]


def indices(images):
    return images.amin((1, 2, 3)).tolist()


def test_without_flip_nothing_is_drawn():
    order = torch.randperm(10, generator=generator(7, 0))
    whole = seen(Pixels(10))
    assert torch.equal(whole[1], Pixels(10).images(order[4:8]))
    x = Pixels(10).read(torch.arange(10))
    assert torch.equal(Pixels(10).images(torch.arange(10), generator(0)), x)
    assert torch.equal(Pixels(10, flip=True).images(torch.arange(10)), x)


def test_half_of_the_images_are_mirrored_left_to_right():
    count = 10_000
    x = Pixels(count, flip=True).images(torch.arange(count), generator(0))
    mirrored = x[:, 0, 0, 0] > x[:, 0, 0, 1]
    plain = Pixels(count).read(torch.arange(count))
    assert torch.equal(x[mirrored], plain[mirrored].flip(-1))
    assert torch.equal(x[~mirrored], plain[~mirrored])
    # Five standard deviations of a share.
    assert abs(float(mirrored.double().mean()) - 0.5) < 5 * 0.5 / count**0.5


def test_a_resumed_run_sees_the_same_flips():
    data = Pixels(10, flip=True)
    whole = seen(data)
    resumed = seen(data, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))
    same = [torch.equal(a, b) for a, b in zip(whole, seen(Pixels(10)))]
    assert not all(same)
    labels = [labels for _, labels in batches(data, 4, 0, 6, 7)]
    assert [indices(images) for images in whole] == [part.tolist() for part in labels]


@pytest.mark.parametrize("slices", [2, 4])
def test_parts_make_the_whole_batch(slices):
    data = Pixels(10, flip=True)
    whole = [indices(images) for images in seen(data)]
    every = seen(data, slices=slices, own=range(slices))
    assert len(every) == 6 * slices
    for step in range(6):
        parts = every[step * slices : (step + 1) * slices]
        assert {len(part) for part in parts} == {4 // slices}
        assert indices(torch.cat(parts)) == whole[step]
    for part in range(slices):
        own = [x.tolist() for x in seen(data, slices=slices, own=(part,))]
        assert own == [x.tolist() for x in every[part::slices]]
    resumed = seen(data, first=2, slices=slices, own=(1,))
    assert [x.tolist() for x in resumed] == [x.tolist() for x in every[1::slices]][2:]


def test_parts_draw_of_their_own():
    flips = [
        [(x[:, 0, 0, 0] > x[:, 0, 0, 1]).tolist() for x in batch]
        for batch in (
            seen(Pixels(64, flip=True), last=16, slices=2, own=(part,)) for part in range(2)
        )
    ]
    assert flips[0] != flips[1] and any(step != flips[0][0] for step in flips[0])


def test_no_stage_draws_the_numbers_of_its_images(monkeypatch):
    """Noise of latents that is that of the diffusion too would teach the model to see it."""
    by_stages = set()

    def remembered(*key, **options):
        by_stages.add(key)
        return generator(*key, **options)

    monkeypatch.setattr("msf.training.stage.generator", remembered)
    for index in range(3):
        model = tiny_model(levels=2)
        trainer = StageTrainer(model, index, replace(TRAINING, steps=(8, 8, 8), accumulation=2))
        for _ in range(2):
            trainer.step(pictures(4), torch.zeros(4, dtype=torch.int64))
    by_images = {part.key for part in _Steps(64, 4, 0, 2, TRAINING.seed, 2, (0, 1))}
    assert len(by_stages) == 12 and len(by_images) == 4 and not by_stages & by_images


def test_batches_that_cannot_be_cut_are_one_line():
    with pytest.raises(ValueError, match=r"^batch_size must be a multiple of 3, .*, got 4$"):
        seen(Pixels(10), slices=3)
    with pytest.raises(ValueError, match=r"^data: 3 images are too few for 4 parts of a batch$"):
        seen(Pixels(3), slices=4)
    for size, line in (
        (-1, "at least 1, got -1"),
        (0, "at least 1, got 0"),
        ("3", "a whole .* '3'"),
    ):
        with pytest.raises(ValueError, match=f"^batch_size must be {line}$"):
            next(batches(Pixels(10), size, 0, 2, 0))
    # Of seven images a batch of eight has six, three a part.
    parts = list(batches(Pixels(7), 8, 0, 2, 0, slices=2, own=(0, 1)))
    assert [len(labels) for _, labels in parts] == [3, 3, 3, 3]


def test_an_unreadable_image_is_replaced_inside_its_part(photos):
    data = load_data(str(photos), split="train", image_size=(8, 8), channels=1)
    data.flip = True
    order = torch.randperm(len(data), generator=generator(0, 0))
    data.paths[int(order[1])].write_bytes(b"no image")
    for part, expected in ((0, [0, 2, 2, 3]), (1, [4, 5, 6, 7])):
        ((images, labels),) = batches(data, 8, 0, 1, 0, slices=2, own=(part,))
        chosen = order[expected]
        assert torch.equal(labels, data.labels[chosen])
        assert torch.equal(images, data.images(chosen))  # of one grey each


def test_what_is_drawn_does_not_depend_on_what_was_met_before(photos):
    """A resumed run may know that an image is unreadable, or meet it anew."""
    from msf.training.skipped import ReadableBatches

    data = load_data(str(photos), split="train", image_size=(8, 8), channels=1)
    data.paths[3].write_bytes(b"no image")
    given = []
    original = data.batch
    data.batch = lambda at, key: (given.append(torch.rand(1, generator=key)), original(at, key))[1]
    readable = ReadableBatches(data)
    for _ in range(2):
        readable.read(torch.tensor([2, 3]), (0, 1, 5, 0))
    assert len(given) == 3 and given[0] == given[1] == given[2]


def test_what_workers_are_told_takes_no_shared_memory():
    """Without room for it they, and this process, would wait for ever."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        assert all(len(ForkingPickler.dumps(part)) < 1000 for part in _Steps(64, 4, 0, 2, 7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_workers_that_could_not_open_their_files_are_not_started(monkeypatch):
    """They, or this process, might wait for ever."""
    monkeypatch.setattr("msf.training.batches.loader_workers", lambda: 2)
    data, limits = Pixels(10), resource.getrlimit(resource.RLIMIT_NOFILE)
    data.on_disk = True
    there = len(os.listdir("/dev/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (there + 47, limits[1]))
        with pytest.raises(
            ValueError,
            match=rf"2 processes .* \(ulimit -n\) from {there + 47} to at least {there + 48}",
        ):
            seen(data)
        resource.setrlimit(resource.RLIMIT_NOFILE, (there + 48, limits[1]))
        assert len(seen(data)) == 6
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
