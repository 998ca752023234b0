"""npz files of images and statistics."""

import re
import zipfile

import numpy as np
import pytest
import torch

from inceptions import pixels
from msf.evaluation.archive import Archive
from msf.parts import write_npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_batches(save, tmp_path):
    images = pixels(7, seed=0)
    save(tmp_path / "x.npz", images, np.arange(7))
    archive = Archive(tmp_path / "x.npz")
    assert len(archive) == 7 and archive.shape == (7, 8, 12, 3)
    assert archive.pool is None and archive.spatial is None
    batches = list(archive.batches(3))
    assert [tuple(batch.shape) for batch in batches] == [
        (3, 3, 8, 12),
        (3, 3, 8, 12),
        (1, 3, 8, 12),
    ]
    assert torch.equal(torch.cat(batches), torch.from_numpy(images).permute(0, 3, 1, 2))


def test_files_of_msf_sample_are_read(tmp_path):
    images = pixels(7, seed=0)
    write_npz(
        tmp_path / "x.npz",
        {"arr_0": (7, [images[:4], images[4:]]), "arr_1": (7, [np.arange(7)])},
    )
    (batch,) = Archive(tmp_path / "x.npz").batches(10)
    assert torch.equal(batch, torch.from_numpy(images).permute(0, 3, 1, 2))


def test_no_more_than_a_batch_is_read_at_once(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", pixels(50, seed=0))
    lengths = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(
        zipfile.ZipExtFile, "read", lambda file, n=-1: lengths.append(n) or read(file, n)
    )
    batches = Archive(tmp_path / "x.npz").batches(4)
    next(batches)
    assert max(lengths) == 4 * 8 * 12 * 3 and min(lengths) > 0


def test_statistics(tmp_path):
    mu, sigma = np.random.rand(2048).astype(np.float32), np.eye(2048)
    np.savez(tmp_path / "x.npz", mu=mu, sigma=sigma)
    archive = Archive(tmp_path / "x.npz")
    assert archive.shape is None and len(archive) == 0 and archive.spatial is None
    assert torch.equal(archive.pool.mean, torch.from_numpy(mu).double())
    assert torch.equal(archive.pool.covariance, torch.eye(2048, dtype=torch.float64))
    arrays = {"mu_s": np.zeros(2023), "sigma_s": np.ones((2023, 2023))}
    np.savez(tmp_path / "y.npz", pixels(1, 0), mu=mu, sigma=sigma, **arrays)
    archive = Archive(tmp_path / "y.npz")
    assert archive.shape == (1, 8, 12, 3)
    assert archive.spatial.mean.shape == (2023,) and archive.spatial.covariance.sum() == 2023**2


GOOD = pixels(4, seed=1)
BAD = {
    "nothing": ({}, "must hold images (arr_0) or statistics (mu, sigma), holds nothing"),
    "others": ({"x": GOOD, "mu": np.zeros(2048)}, "statistics (mu, sigma), holds mu, x"),
    "floats": ({"arr_0": GOOD / 255}, "arr_0 must be (N, H, W, 3) uint8, got (4, 8, 12, 3) float"),
    "grey": ({"arr_0": GOOD[..., :1]}, "arr_0 must be (N, H, W, 3) uint8, got (4, 8, 12, 1) uint8"),
    "one": ({"arr_0": GOOD[0]}, "arr_0 must be (N, H, W, 3) uint8, got (8, 12, 3) uint8"),
    "none": ({"arr_0": GOOD[:0]}, "arr_0 holds no images, its shape is (0, 8, 12, 3)"),
    "columns": ({"arr_0": np.asfortranarray(GOOD)}, "got (4, 8, 12, 3) uint8, column by column"),
    "objects": ({"arr_0": np.array([GOOD, None], dtype=object)}, "got (2,) object"),
    "small": ({"mu": np.zeros(9), "sigma": np.eye(9)}, "mu must be (2048,), finite floats, got (9"),
    "whole": ({"mu": np.zeros(2048, int), "sigma": np.eye(2)}, "floats, got (2048,) int64; statis"),
    "nan": ({"mu": np.full(2048, np.nan), "sigma": np.eye(2)}, "mu must be (2048,), finite floats"),
    "triangle": (
        {"mu": np.zeros(2048), "sigma": np.tri(2048)},
        "sigma must be symmetric, as a covariance is",
    ),
    "negative": (
        {"mu": np.zeros(2048), "sigma": -np.eye(2048)},
        "sigma must hold variances on its diagonal, got -1",
    ),
    "code": (
        {"mu": np.array([None]), "sigma": np.eye(2)},
        "finite floats, got (1,) object; statis",
    ),
}


def refused(path, line):
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{re.escape(line)}") as error:
        list(Archive(path).batches(2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", BAD)
def test_other_arrays_are_refused_in_one_line(kind, tmp_path):
    arrays, line = BAD[kind]
    np.savez(tmp_path / "x.npz", **arrays)
    refused(tmp_path / "x.npz", line)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_refused_in_one_line(save, tmp_path):
    path = tmp_path / "x.npz"
    save(path, arr_0=pixels(40, seed=0))
    whole = path.read_bytes()
    for broken in (b"", b"images", whole[:1000], whole[:-100]):
        path.write_bytes(broken)
        refused(path, "not a readable npz file (File is not a zip file)")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    refused(path, "not a readable npz file (")


def test_a_member_shorter_than_its_header_says(tmp_path):
    np.save(tmp_path / "x.npy", pixels(40, seed=0))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", (tmp_path / "x.npy").read_bytes()[:-1])
    refused(tmp_path / "x.npz", "not a readable npz file (it ends before its arrays do)")


def test_members_that_are_no_arrays(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=GOOD)
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("mu", b"")
        archive.writestr("sigma", b"")
    assert Archive(tmp_path / "x.npz").pool is None
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0", b"")
    refused(tmp_path / "x.npz", "must hold images (arr_0) or statistics (mu, sigma), holds nothing")


def test_a_covariance_rounded_to_float32_is_one(tmp_path):
    rows = np.random.default_rng(0).standard_normal((9, 2048))
    sigma = (rows.T @ rows).astype(np.float32)
    sigma[0, 1] = np.nextafter(sigma[0, 1], 9)
    np.savez(tmp_path / "x.npz", mu=rows[0], sigma=sigma)
    assert Archive(tmp_path / "x.npz").pool.covariance[0, 1] == float(sigma[0, 1])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        Archive(tmp_path / "x.npz")
