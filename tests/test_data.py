import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from msf.data import SPLITS, load_data
from msf.data.textures import COLUMNS


def load(source, split="train", image_size=(8, 8), channels=1):
    return load_data(str(source), split=split, image_size=image_size, channels=channels)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes of 60 images, red and blue, in every format."""
    suffixes = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".PNG"]
    for name, channel in (("blue", 2), ("red", 0)):
        for i in range(60):
            pixels = np.zeros((8, 10, 3), np.uint8)
            pixels[..., channel] = 255
            save(tmp_path / name / f"{i}{suffixes[i % 6]}", pixels)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "red" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def test_digits_splits_are_disjoint_complete_and_stratified():
    splits = [load("digits", split) for split in SPLITS]
    indices = torch.cat([split.indices for split in splits])
    assert indices.sort().values.tolist() == list(range(1797))
    assert [len(split) for split in splits] == [1077, 362, 358]
    counts = torch.stack([split.labels.bincount(minlength=10) for split in splits])
    shares = torch.tensor([[0.6], [0.2], [0.2]]) * counts.sum(0)  # of every class
    assert (counts - shares).abs().max() <= 2


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits, data = load_digits(), load("digits", "test")
    images, labels = data.batch(torch.arange(len(data)))
    assert images.dtype == torch.float32 and labels.dtype == torch.int64
    assert np.array_equal((images[:, 0] + 1) * 8, digits.images[data.indices])
    assert np.array_equal(labels, digits.target[data.indices])
    assert data.class_names == tuple("0123456789") and data.num_classes == 10


@pytest.mark.parametrize("size", [(16, 16), (32, 24)])
def test_texture_crops_stay_in_their_columns(size):
    from skimage.data import grass

    height, width = size
    borders = sorted(COLUMNS.values())
    assert all(a[1] <= b[0] for a, b in pairwise(borders))
    for split, (left, right) in COLUMNS.items():
        data = load("textures", split, size)
        crops = data._corners[data.labels == data.class_names.index("grass")]
        assert crops[:, 1].min() == 0 and crops[:, 2].min() == 0
        assert crops[:, 1].max() + height <= 512
        assert left + crops[:, 2].max() + width <= right
        where = int((data.labels < 1).sum()) + len(crops) - 1
        _, row, column = crops[-1].tolist()
        expected = grass()[row : row + height, left + column : left + column + width]
        image, label = data[where]
        assert label == 1 and image.shape == (1, *size)
        torch.testing.assert_close(image[0], torch.from_numpy(expected / 127.5 - 1).float())


def test_texture_train_crops_are_at_every_position_and_test_crops_apart():
    left, right = COLUMNS["train"]
    assert len(load("textures", "train", (32, 32))) == 3 * (512 - 31) * (right - left - 31)
    test = load("textures", "test", (16, 16))
    painted = torch.zeros(3, 512, 512)
    for texture, row, column in test._corners.tolist():
        painted[texture, row : row + 16, column : column + 16] += 1
    assert painted.max() == 1 and len(test) == 3 * 32 * 12


def test_batch_agrees_with_items(folder):
    for source, size, channels in (("digits", 8, 1), ("textures", 16, 1), (folder, 8, 3)):
        data = load(source, "train", (size, size), channels)
        indices = torch.tensor([5, 0, len(data) - 1, 5])
        images, labels = data.batch(indices)
        assert images.shape == (4, channels, size, size) and images.dtype == torch.float32
        for i, image, label in zip(indices.tolist(), images, labels):
            assert torch.equal(data[i][0], image) and data[i][1] == label
        assert torch.equal(data[-1][0], images[2])
        with pytest.raises(IndexError):
            data[len(data)]


def test_folder_splits_partition_the_images_and_do_not_move(folder):
    splits = {split: load(folder, split, channels=3) for split in SPLITS}
    paths = [path for data in splits.values() for path in data.paths]
    assert len(paths) == len(set(paths)) == 120
    assert len(splits["train"]) > 60 and len(splits["features"]) > 1 and len(splits["test"]) > 1
    before = splits["test"].paths
    save(folder / "red" / "another.png", np.zeros((8, 8, 3), np.uint8))
    after = load(folder, "test", channels=3).paths
    assert [path for path in after if path.name != "another.png"] == before
    moved = folder.rename(folder.with_name("elsewhere"))
    names = [path.name for path in load(moved, "test", channels=3).paths]
    assert names == [path.name for path in after]


@pytest.mark.parametrize("source", ["digits", "textures", "folder"])
def test_another_split_of_the_same_is_what_would_be_loaded(folder, source, monkeypatch):
    source = str(folder) if source == "folder" else source
    data, expected = load(source, "train"), load(source, "features")
    count = len(data)
    monkeypatch.setattr("msf.data.folder.list_images", lambda _: pytest.fail("listed anew"))
    data.flip = True
    other = data.of_split("features")
    assert type(other) is type(data) and other.flip and other.split == expected.split
    assert other.files == expected.files and torch.equal(other.labels, expected.labels)
    at = torch.arange(0, len(other), 7)
    assert torch.equal(other.read(at), expected.read(at))
    assert len(data) == count  # and the first stays what it was


def test_folder_labels_are_its_subfolders(folder):
    data = load(folder, "train", channels=3)
    assert data.class_names == ("blue", "red")
    images, labels = data.batch(torch.arange(len(data)))
    assert torch.equal((images[:, 0] > images[:, 2]).all((1, 2)), labels == 1)


def train_name(tmp_path, suffix=".png"):
    """A file name that the hash sends to the train split."""
    from msf.data.splits import split_of

    names = (f"a/{i}{suffix}" for i in range(100))
    return tmp_path / next(name for name in names if split_of(name) == "train")


@pytest.mark.parametrize("scale", [1, 3, 0.5])
def test_folder_crops_the_centre(tmp_path, scale):
    thirds = np.repeat(np.array([0, 200, 0], np.uint8), int(8 * scale))
    save(train_name(tmp_path), np.tile(thirds, (int(8 * scale), 1)))
    image, _ = load(tmp_path)[0]
    # The middle third is 200 everywhere, but for the blur of the resampling at its borders.
    inner = image if scale == 1 else image[:, :, 2:-2]
    torch.testing.assert_close(inner, torch.full_like(inner, 200 / 127.5 - 1), atol=0.06, rtol=0)


def test_folder_follows_the_orientation_tag(tmp_path):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    save(train_name(tmp_path), pixels, exif=exif)
    image, _ = load(tmp_path)[0]
    assert (image[0, :4] == -1).all() and (image[0, 4:] == 1).all()


def test_folder_converts_between_grey_and_colour(tmp_path):
    save(train_name(tmp_path), np.full((8, 8, 4), 128, np.uint8))
    assert load(tmp_path, channels=1)[0][0].shape == (1, 8, 8)
    assert load(tmp_path, channels=3)[0][0].shape == (3, 8, 8)


def test_unreadable_images_are_named(tmp_path):
    path = train_name(tmp_path, ".png")
    save(path, np.zeros((8, 8), np.uint8))
    data = load(tmp_path)
    content = path.read_bytes()
    for broken in (b"", b"text", content[: len(content) // 2]):
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match=r"cannot read .*\.png: .*; replace or remove"
        ) as error:
            data[0]
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    save(path, np.zeros((8, 8), np.uint16))
    with pytest.raises(ValueError, match="only 8-bit images are, not mode I;16"):
        data[0]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("digits", {"split": "validation"}, "split must be one of train, features, test"),
        (
            "digits",
            {"image_size": (8, 0)},
            r"must be \(height, width\), both positive, got \(8, 0\)",
        ),
        ("digits", {"image_size": (8, 16)}, "digits are 8x8 with 1 channel, got 8x16"),
        ("digits", {"channels": 3}, "with 3 channels"),
        ("textures", {"channels": 3}, "textures have 1 channel"),
        ("textures", {"split": "features", "image_size": (8, 78)}, "at most 512x77"),
        ("textures", {"image_size": (513, 8)}, "at most 512x230"),
        ("no/such/folder", {}, "'no/such/folder' is neither 'digits', 'textures' nor"),
    ],
)
def test_bad_requests_get_one_line(source, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load(source, **options)
    assert "\n" not in str(error.value)


def test_bad_folders_get_one_line(tmp_path):
    with pytest.raises(ValueError, match="no subfolders; make one a class"):
        load(tmp_path)
    save(train_name(tmp_path), np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="too few images: none falls into the test split"):
        load(tmp_path, "test")
    with pytest.raises(
        ValueError, match=r"1 \(grey\) or 3 \(RGB\) channels, the model takes 2; msf encode"
    ):
        load(tmp_path, channels=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no image \(\.bmp, "):
        load(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="nor an existing folder"):
        load(file)


@pytest.mark.parametrize(
    ("source", "module", "package"),
    [
        ("digits", "sklearn.datasets", "scikit-learn"),
        ("textures", "skimage", "scikit-image"),
        ("folder", "PIL.Image", "Pillow"),
    ],
)
def test_missing_packages_are_named(source, module, package, monkeypatch, folder):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs {package}; run in the checkout: pip install"):
        load(folder if source == "folder" else source, channels=1)
