import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from msf.data import load_data
from msf.evaluation import Evaluator, frechet_distance
from msf.evaluation.evaluate import draw_like
from msf.evaluation.features import extract, train_feature_network


@pytest.mark.parametrize("replicates", [-1, 0, 1])
def test_an_interval_needs_replicates(replicates):
    with pytest.raises(ValueError, match=f"replicates must be at least 2, got {replicates}$"):
        Evaluator("digits", image_size=(8, 8), channels=1, replicates=replicates)


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator("digits", image_size=(8, 8), channels=1, num_samples=301, replicates=20)


@pytest.fixture(scope="module")
def train_images():
    return load_data("digits", split="train", image_size=(8, 8), channels=1)


@pytest.fixture
def real(train_images):
    """A perfect generator: real images, and on true bases the true images."""

    def generate(labels, seeds, true_images):
        if true_images is not None:
            return true_images
        # With replacement: a class may be asked for more often than there are images.
        same = (train_images.labels == labels[:, None]).float()
        generator = torch.Generator().manual_seed(seeds[0] + 1)
        return train_images.images(same.multinomial(1, generator=generator)[:, 0])

    return generate


def test_feature_network_is_accurate_deterministic_and_leaves_the_random_state(evaluator):
    test = load_data("digits", split="test", image_size=(8, 8), channels=1)
    images, labels = test.batch(torch.arange(len(test)))
    _, classes = extract(evaluator.network, images)
    assert (classes == labels).double().mean() >= 0.96
    features = load_data("digits", split="features", image_size=(8, 8), channels=1)
    before = torch.get_rng_state()
    same, other = (train_feature_network(features, seed=seed, steps=3) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    again = train_feature_network(features, seed=0, steps=3)
    assert torch.equal(extract(same, images)[0], extract(again, images)[0])
    assert not torch.equal(extract(same, images)[0], extract(other, images)[0])


def test_images_are_clamped(evaluator):
    images = 3 * torch.randn(4, 1, 8, 8)
    clamped, _ = extract(evaluator.network, images.clamp(-1, 1))
    assert torch.equal(extract(evaluator.network, images)[0], clamped)
    assert clamped.dtype == torch.float64


def test_draw_like_gives_different_images_of_the_same_labels(train_images):
    labels = torch.tensor([3, 3, 7, 0, 3])
    drawn = draw_like(labels, train_images, torch.Generator())
    assert torch.equal(train_images.labels[drawn], labels) and len(drawn.unique()) == 5
    with pytest.raises(ValueError, match="class '1' has 400 test images but only 109 for training"):
        draw_like(torch.ones(400, dtype=torch.int64), train_images, torch.Generator())


def test_generate_is_called_for_every_label(evaluator, real):
    calls = []

    def generate(labels, seeds, true_images):
        calls.append((labels, seeds, true_images))
        return real(labels, seeds, true_images)

    evaluator.evaluate(generate)
    free, bound = calls[:2], calls[2:]
    assert [len(labels) for labels, _, _ in calls] == [256, 44, 256, 44]
    assert all(x is None for *_, x in free)
    assert [x.shape[0] for *_, x in bound] == [256, 44]
    seeds = [seed for _, seeds, _ in free for seed in seeds]
    assert len(set(seeds)) == 300 and seeds == [seed for _, seeds, _ in bound for seed in seeds]
    test = load_data("digits", split="test", image_size=(8, 8), channels=1)
    everything, labels = test.batch(torch.arange(len(test)))
    for label, _, images in bound:
        found = (images[:, None] == everything[None]).all((2, 3, 4)).double().argmax(1)
        assert torch.equal(everything[found], images) and torch.equal(labels[found], label)


def test_real_images_are_at_the_floor_and_bad_ones_far_from_it(evaluator, real):
    good = evaluator.evaluate(real)
    assert good.fd_ratio.low < 1 < good.fd_ratio.high
    for key, value in good.generated.items():
        floor = good.real[key]
        assert max(value.low, floor.low) < min(value.high, floor.high), key
    assert good.generated["accuracy"].value > 0.93

    def blurred(*request):
        x = F.avg_pool2d(real(*request), 2)
        return F.interpolate(x, scale_factor=2)

    def mislabelled(labels, seeds, true_images):
        return real((labels + 1) % 10, seeds, true_images)

    def collapsed(labels, seeds, true_images):
        return real(labels % 2, seeds, true_images)

    blurred, mislabelled, collapsed = (
        evaluator.evaluate(generate, true_bases=False)
        for generate in (blurred, mislabelled, collapsed)
    )
    assert collapsed.generated["precision"].value > 0.5 > 2 * collapsed.generated["recall"].value
    assert blurred.fd_ratio.low > 10 and blurred.generated["kid"].low > good.generated["kid"].high
    assert blurred.generated["recall"].value < 0.5
    assert mislabelled.generated["accuracy"].value < 0.1


def test_gap_is_what_generated_bases_cost(evaluator, real):
    # Real images on true bases, noise without: the whole distance is the gap.
    def generate(labels, seeds, true_images):
        return torch.randn(len(labels), 1, 8, 8) if true_images is None else true_images

    bad, good = evaluator.evaluate(generate).bases, evaluator.evaluate(real).bases
    assert bad.gap.value == pytest.approx(bad.generated.value - bad.true.value)
    assert bad.gap.low > 5 * bad.real.value
    assert good.gap.low < 0 < good.gap.high
    # Copies of the reference are no nearer than other real images: a half meets the other half.
    assert good.true.value > 0.5 * good.real.value


def test_report_as_json_and_as_a_table(evaluator, real):
    report = evaluator.evaluate(real)
    numbers = json.loads(json.dumps(report.to_dict()))
    assert numbers["generated"]["fd"]["value"] == report.generated["fd"].value
    assert numbers["settings"]["num_samples"] == 300
    lines = report.table().splitlines()
    rows = [line for line in lines if line.startswith(("Frechet", "kernel", "prec", "rec", "acc"))]
    assert len(rows) == 6
    assert f"{report.generated['recall']}" in report.table()
    column = lines[0].index("real")
    assert all(row[column - 1] == " " and row[column] != " " for row in rows)

    short = evaluator.evaluate(real, true_bases=False, conditional=False)
    assert short.bases is None and set(short.real) == set(short.generated)
    assert "accuracy" not in short.generated and "bases" not in short.table()
    assert short.generated["fd"] == report.generated["fd"]


def test_bad_generators_get_one_line(evaluator):
    with pytest.raises(ValueError, match=r"must return \(256, 1, 8, 8\), got \(256, 3, 8, 8\)"):
        evaluator.evaluate(lambda labels, *_: torch.zeros(len(labels), 3, 8, 8))
    for wrong in (None, [], np.zeros((256, 1, 8, 8))):
        kind = rf"must return a tensor \(256, 1, 8, 8\), got a {type(wrong).__name__}"
        with pytest.raises(TypeError, match=kind):
            evaluator.evaluate(lambda *_, wrong=wrong: wrong)
    with pytest.raises(
        TypeError, match=r"a tensor \(256, .* of real numbers, got torch.complex64$"
    ):
        evaluator.evaluate(lambda *_: torch.zeros(256, 1, 8, 8, dtype=torch.complex64))
    bright = torch.full((256, 1, 8, 8), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"in \[-1, 1\], but their mean absolute value is 255; of"):
        evaluator.evaluate(lambda *_: bright)
    with pytest.raises(ValueError, match="generated images hold NaN or infinity"):
        evaluator.evaluate(lambda labels, *_: torch.full((len(labels), 1, 8, 8), torch.nan))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, r"num_samples \(--samples\) must be at least 8, got 0"),
        ({"num_samples": 7}, r"num_samples \(--samples\) must be at least 8, got 7"),
        ({"num_samples": "20"}, r"num_samples \(--samples\) must be a whole number, got '20'"),
        ({"num_samples": 20.0}, r"num_samples \(--samples\) must be a whole number, got 20.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": -3}, "batch_size must be at least 1, got -3"),
        ({"batch_size": "3"}, "batch_size must be a whole number, got '3'"),
        ({"replicates": 2.5}, "replicates must be a whole number, got 2.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"image_size": 8}, "image_size must be a list or tuple, got 8"),
        ({"holdout": "0.2"}, "holdout must be a number, got '0.2'"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=rf"^(evaluation|data): {message}$"):
        Evaluator("digits", **{"image_size": (8, 8), "channels": 1, **options})


@pytest.fixture(scope="module")
def many():
    """Twice the test split's 358 digits, and four more."""
    return Evaluator("digits", image_size=(8, 8), channels=1, num_samples=721, replicates=10)


def test_more_samples_than_test_images(many, real):
    test = load_data("digits", split="test", image_size=(8, 8), channels=1)
    counts, of_test = many.labels.bincount(), test.labels.bincount()
    assert len(many.labels) == len(many.seeds) == 720
    assert ((counts - 2 * of_test) >= 0).all() and (counts - 2 * of_test).sum() == 4
    calls = []

    def generate(labels, seeds, true_images):
        calls.append(true_images)
        return real(labels, seeds, true_images)

    report = many.evaluate(generate)
    assert report.real is report.fd_ratio is report.bases is None
    assert calls == [None] * 3
    assert report.settings["num_samples"] == 720 and report.settings["num_reference"] == 358
    # All of the test split is the reference, and all samples are compared with it.
    network = many.network
    reference, _ = extract(network, test.images(torch.arange(358)))
    parts = [
        extract(network, real(many.labels[i : i + 256], many.seeds[i : i + 256], None))[0]
        for i in (0, 256, 512)
    ]
    value = frechet_distance(torch.cat(parts), reference)
    # Float32 features of other batches round otherwise.
    assert report.generated["fd"].value == pytest.approx(value, rel=1e-6)
    assert report.generated["fd"].low < value < report.generated["fd"].high
    assert report.generated["accuracy"].value > 0.93
    lines = report.table().splitlines()
    assert "floor" not in report.table() and lines[0].split() == ["generated"]
    assert json.loads(json.dumps(report.to_dict()))["fd_ratio"] is None


def test_too_small_folder(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(30):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a" / f"{i}.png")
    with pytest.raises(
        ValueError, match=r"at least 8 images in the test split, .* has \d; .*about 100 or more"
    ):
        Evaluator(str(tmp_path), image_size=(8, 8), channels=1)


def test_folder_with_one_class_has_no_accuracy(tmp_path):
    (tmp_path / "all").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 12, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "all" / f"{i}.png")
    evaluator = Evaluator(str(tmp_path), image_size=(12, 8), channels=3, replicates=5)
    report = evaluator.evaluate(lambda labels, *_: torch.rand(len(labels), 3, 12, 8) * 2 - 1)
    assert set(report.generated) == {"fd", "kid", "precision", "recall"}
    assert report.generated["fd"].value > 0


def test_solid_images_have_no_floor(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(120):
            Image.new("L", (8, 8), 100).save(tmp_path / label / f"{i}.png")
    evaluator = Evaluator(str(tmp_path), image_size=(8, 8), channels=1, num_classes=2, replicates=2)
    line = (
        "^evaluation: the floor is 0: real images that are all alike, or too few, have no distance"
    )
    with pytest.raises(ValueError, match=line):
        evaluator.evaluate(lambda labels, *_: torch.zeros(len(labels), 1, 8, 8), true_bases=False)
