"""What is an image in a folder, and what is read of it."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from msf.data import SPLITS, load_data
from msf.data.decode import decode
from msf.data.listing import list_images
from msf.data.splits import split_of
from msf.training.config import read_run
from msf.training.train import train
from training_runs import MODEL, TRAINING


def save(path, pixels=128, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), pixels, np.uint8)).save(path, **options)


def every(root, channels=1, **options):
    """The names of the images of all splits."""
    names = []
    for split in SPLITS:
        data = load_data(str(root), split=split, image_size=(8, 8), channels=channels, **options)
        assert data.images(torch.arange(len(data))).shape[1:] == (channels, 8, 8)
        names += [os.path.relpath(path, root) for path in data.paths]
    return sorted(names)


@pytest.fixture
def folder(tmp_path):
    for index in range(80):
        save(tmp_path / "data" / "ab"[index % 2] / f"{index}.png")
    return tmp_path / "data"


def test_what_is_no_image_is_left_out(folder):
    before = every(folder)
    for name in ("a/._1.png", ".hidden.png", "a/.hidden.png", "__MACOSX/a/x.png", ".git/x.png"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no image")
    (folder / "a" / "f0.png").mkdir()
    (folder / "b" / "gone.png").symlink_to(folder / "nothing.png")
    assert every(folder) == before and len(before) == 80


def test_folders_inside_a_class_are_read(folder):
    save(folder / "a" / "f0.png" / "deep" / "x.png")
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "b" / "f0.png").mkdir()
    os.symlink(folder / "b", folder / "b" / "f0.png" / "up")
    classes, files, _ = list_images(folder)
    assert classes == ["a", "b"]
    assert {*files} == {*every(folder)} and len(files) == 81
    assert files["a/f0.png/deep/x.png"] == (folder / "a/f0.png/deep/x.png").stat().st_size
    (split,) = (
        split
        for split in SPLITS
        for data in [load_data(str(folder), split=split, image_size=(8, 8), channels=1)]
        if any(path.name == "x.png" for path in data.paths)
    )
    assert split == split_of("a/f0.png/deep/x.png")


def test_links_that_lead_nowhere_or_back_are_left_out(folder):
    before = every(folder)
    (folder / "self").symlink_to("self")
    (folder / "a" / "self.png").symlink_to("self.png")
    (folder / "a" / "self").symlink_to("self")
    (folder / "a" / "out").symlink_to(folder.parent)
    (folder / "a" / "file").symlink_to(folder / "a" / "0.png" / "x")
    (folder / "back").symlink_to(folder)  # no class of its own
    for one, other in (("l1", "l2"), ("l2", "l1")):
        save(folder / "a" / one / "x.png")
        (folder / "a" / one / "over").symlink_to(f"../{other}")
    (folder / "b" / "round").symlink_to(folder / "a" / "l1" / "round")
    (folder / "a" / "l1" / "round").symlink_to(folder / "b" / "round")
    added = ["a/l1/x.png", "a/l1/over/x.png", "a/l2/x.png", "a/l2/over/x.png"]
    assert every(folder) == sorted(before + added)


def test_splits_are_those_of_earlier_versions():
    splits = [split_of(f"red/{i}.png") for i in range(14)]
    assert [index for index, split in enumerate(splits) if split == "features"] == [0, 8]
    assert splits.count("train") == 12


@pytest.mark.parametrize(
    "suffix", [".gif", ".tif", ".TIFF", ".webp", ".bmp", ".jpg", ".jpeg", ".jfif"]
)
def test_formats(tmp_path, suffix):
    save(tmp_path / f"x{suffix}", 50)
    x = decode(tmp_path / f"x{suffix}", "L", (8, 8))
    assert ((x + 1) * 127.5 - 50).abs().max() <= 1  # JPEG and WebP lose some
    save(tmp_path / "data" / "a" / f"x{suffix}")
    assert list(list_images(tmp_path / "data")[1]) == [f"a/x{suffix}"]


def test_other_formats_are_none(tmp_path):
    """For PostScript Pillow would run Ghostscript."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    os.rename(tmp_path / "x.eps", tmp_path / "x.png")
    with pytest.raises(OSError, match="cannot identify image file"):
        decode(tmp_path / "x.png", "L", (8, 8))


def test_of_several_frames_the_first(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    for name in ("x.gif", "x.tif", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        x = decode(tmp_path / name, "L", (8, 8))
        assert ((x + 1) * 127.5 - 10).abs().max() <= 1


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM"])
def test_damaged_exif_beside_readable_pixels_is_ignored(tmp_path, exif):
    for name in ("x.jpg", "x.png", "x.webp"):
        save(tmp_path / name, 50, exif=exif)
        x = decode(tmp_path / name, "L", (8, 8))
        assert ((x + 1) * 127.5 - 50).abs().max() <= 1


def test_an_orientation_tag_that_raises_is_ignored(tmp_path, monkeypatch):
    def fail(image):
        raise SyntaxError("not a TIFF file (header b'garbage' not valid)")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", fail)
    save(tmp_path / "x.png", 50)
    assert ((decode(tmp_path / "x.png", "L", (8, 8)) + 1) * 127.5 - 50).abs().max() <= 1e-4
    content = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError):
        decode(tmp_path / "x.png", "L", (8, 8))


def zero_the_tail(content, rng):
    start = rng.integers(45, 9 * len(content) // 10)
    return content[:start] + bytes(len(content) - start)


def damage_five_bytes(content, rng):
    damaged = bytearray(content)
    for place in rng.integers(45, 9 * len(content) // 10, 5):  # among the pixels
        damaged[place] = rng.integers(256)
    return bytes(damaged)


def pixels_of(path):
    """What Pillow makes of a file; None where it refuses it."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    except Exception:  # its decoders raise whatever the broken file leads them to
        return None


@pytest.mark.filterwarnings("ignore::UserWarning")  # of damaged tags
@pytest.mark.parametrize("damage", [zero_the_tail, damage_five_bytes])
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "tiff_deflate.tif", "tiff_lzw.tif"])
def test_damaged_pixels_are_refused_where_pillow_refuses_them(tmp_path, name, damage):
    rng, path = np.random.default_rng(0), tmp_path / name
    options = {"compression": path.stem} if path.suffix == ".tif" else {}
    Image.fromarray(rng.integers(0, 128, (64, 64, 3), np.uint8)).save(path, **options)
    content, refused = path.read_bytes(), 0
    for _ in range(20):
        path.write_bytes(damage(content, rng))
        expected = pixels_of(path)
        try:
            x = decode(path, "RGB", (64, 64))
        except Exception:
            assert expected is None
            refused += 1
        else:
            assert np.array_equal(((x + 1) * 127.5).round().movedim(0, -1).numpy(), expected)
    assert refused


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L"])
@pytest.mark.parametrize("to", ["L", "RGB"])
def test_transparent_parts_show_white(tmp_path, mode, to):
    """A grey of 100, its left half transparent, its right half opaque."""
    image = Image.new("RGBA", (8, 8), (100, 100, 100, 255))
    image.paste((100, 100, 100, 0), (0, 0, 4, 8))
    options = {}
    if mode == "LA":
        image = image.convert(mode)
    elif mode == "PA":
        alpha = image.getchannel("A")
        image = image.convert("RGB").quantize(2)
        image.putalpha(alpha)
        assert image.mode == mode
    elif mode == "P":
        image = image.quantize(4)
    elif mode == "L":  # a grey that means transparent
        image = Image.new("L", (8, 8), 100)
        image.paste(7, (0, 0, 4, 8))
        options = {"transparency": 7}
    image.save(tmp_path / ("x.tif" if mode == "PA" else "x.png"), **options)
    x = decode(next(tmp_path.iterdir()), to, (8, 8))
    values = ((x + 1) * 127.5).round()
    assert (values[..., :4] == 255).all() and (values[..., 4:] == 100).all()


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (8, 8), (0, 100, 200, 51)).save(tmp_path / "x.png")
    x = decode(tmp_path / "x.png", "RGB", (8, 8))
    expected = torch.tensor([0.8 * 255, 0.2 * 100 + 0.8 * 255, 0.2 * 200 + 0.8 * 255])
    assert ((x[:, 0, 0] + 1) * 127.5 - expected).abs().max() <= 1


def test_names_that_are_no_utf8(folder, tmp_path, capsys):
    os.rename(folder / "b", os.fsencode(folder) + b"/b\xff")
    strange = os.fsdecode(os.fsencode(folder) + b"/b\xff/x\xfe.png")
    Image.new("L", (8, 8)).save(strange)
    assert len(every(folder)) == 81
    broken = load_data(str(folder), split="train", image_size=(8, 8), channels=1).paths[-1]
    broken.write_bytes(b"")
    config = replace(MODEL, num_classes=2)
    with pytest.raises(ValueError, match="cannot read 1 of 81 images") as error:
        train(config, TRAINING, str(folder), tmp_path / "run", progress=False)
    str(error.value).encode()
    assert "b�/" in str(error.value)
    broken.unlink()
    train(config, TRAINING, str(folder), tmp_path / "run", stages=["base"], progress=False)
    assert read_run(tmp_path / "run").class_names == ("a", "b\udcff")
    train(config, TRAINING, str(folder), tmp_path / "run", resume=True, progress=False)


def test_a_folder_of_images_has_no_classes(tmp_path, capsys):
    for index in range(120):
        save(tmp_path / "flat" / f"{index}.png", index)
    (tmp_path / "flat" / ".cache").mkdir()
    assert len(every(tmp_path / "flat")) == 120
    with pytest.raises(ValueError, match="no subfolders, the model 10 classes; make one a class"):
        every(tmp_path / "flat", num_classes=10)
    config = replace(MODEL, num_classes=0)
    train(config, TRAINING, str(tmp_path / "flat"), tmp_path / "run", stages=["base"])
    assert ": 120 images without classes, " in capsys.readouterr().err.splitlines()[0]


def test_training_says_how_many_images_there_are(folder, tmp_path, capsys):
    config = replace(MODEL, num_classes=2)
    save(folder / "x.png")
    save(folder / "y.png")
    (folder / "readme.txt").touch()
    for name in ("a/x.AVIF", "b/x.avif", "b/deep/x.ppm", "a/notes", "a/.DS_Store"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    train(config, TRAINING, str(folder), tmp_path / "run", stages=["base"])
    n = len(load_data(str(folder), split="train", image_size=(8, 8), channels=1))
    assert capsys.readouterr().err.splitlines()[0] == (
        f"data: {folder}: 80 images in 2 classes, {n} of them in the train split; "
        "ignored: 2 beside the class folders, 4 with other suffixes (.avif, none, .ppm)"
    )


def test_links_that_lead_nowhere_pipes_and_devices_are_counted(folder, tmp_path):
    before = list_images(folder)[1]
    (folder / "c").symlink_to(tmp_path / "unmounted" / "c")
    for index in range(1, 1500):
        (folder / "a" / f"g{index}.png").symlink_to(tmp_path / "unmounted" / f"{index}.png")
    (folder / "b" / "self.png").symlink_to("self.png")
    (folder / "b" / "up").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "b" / "pipe.png")
    (folder / "b" / "null.png").symlink_to("/dev/null")
    (folder / "b" / "good.png").symlink_to(folder / "a" / "0.png")
    for name in (".c", "a/._g1.png", "b/.self.png"):
        (folder / name).symlink_to("nothing")
    os.mkfifo(folder / "b" / ".pipe.png")
    _, files, left_out = list_images(folder)
    size = before["a/0.png"]
    assert files == before | {"b/good.png": size}
    assert left_out == [
        "1,501 links that lead nowhere",
        "1 link to a parent folder",
        "3 pipes or devices",
    ]


def test_where_all_links_lead_nowhere_the_error_says_so(tmp_path):
    for name in ("flat/a", "flat/b", "data/b/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"images inside; ignored: 2 links that lead nowhere$"):
        list_images(tmp_path / "flat")
    save(tmp_path / "data" / "a" / "x.png")
    (tmp_path / "data" / "a" / "notes.txt").touch()
    message = r"b holds no image \(.*\); ignored: 1 link that leads nowhere$"
    with pytest.raises(ValueError, match=message):
        list_images(tmp_path / "data")
    os.mkfifo(tmp_path / "flat" / "x.png")
    save(tmp_path / "flat" / "y.png")
    message = "num_classes set to 0; ignored: 2 links that lead nowhere, 1 pipe or device$"
    with pytest.raises(ValueError, match=message):
        every(tmp_path / "flat", num_classes=2)
