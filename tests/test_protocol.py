"""Images in npz files compared by ADM's protocol, and the features kept beside them."""

import shutil

import numpy as np
import pytest
import torch

from inceptions import pixels
from msf.evaluation import feature_files, metrics
from msf.evaluation.archive import Archive
from msf.evaluation.inception import extract, load_inception
from msf.evaluation.protocol import CONVENTIONS, compare
from msf.files import checksum


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images.npz of six and reference.npz of five images, of different sizes."""
    folder = tmp_path_factory.mktemp("npz")
    np.savez(folder / "images.npz", pixels(6, seed=0))
    np.savez_compressed(folder / "reference.npz", pixels(5, seed=1, size=(10, 10)))
    return folder


@pytest.fixture(scope="module")
def features(folder, inception_weights):
    network = load_inception(inception_weights)
    return [
        extract(network, torch.from_numpy(np.load(folder / name)["arr_0"]).permute(0, 3, 1, 2))
        for name in ("images.npz", "reference.npz")
    ]


def difference(a, b):
    """What stands for the distance of two Gaussians, whose eigenvalues take seconds."""
    return float((a.mean - b.mean).square().sum() + (a.covariance - b.covariance).trace())


@pytest.fixture(scope="module", autouse=True)
def quick_distance():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "gaussian_distance", difference)
        yield


@pytest.fixture(scope="module")
def compared(folder, inception_weights):
    return compare(
        Archive(folder / "images.npz"),
        Archive(folder / "reference.npz"),
        inception_weights,
        batch_size=4,
    )


def test_figures_are_those_of_the_features(compared, features, folder, inception_weights):
    generated, real = features
    weight = load_inception(inception_weights).fc.weight
    pairwise = metrics.pairwise(real.pool, generated.pool)
    mean, std = metrics.kid_of_subsets(generated.pool, real.pool)
    expected = {
        "fid": metrics.frechet_distance(generated.pool, real.pool),
        "sfid": metrics.frechet_distance(generated.spatial, real.spatial),
        "inception_score": metrics.inception_score(generated.pool, weight),
        "precision": pairwise.precision,
        "recall": pairwise.recall,
        "kid": pairwise.kid,
        "kid_of_subsets": mean,
        "kid_of_subsets_std": std,
    }
    # Convolutions of batches of 4 and of 6 round otherwise.
    assert compared.figures == pytest.approx(expected, rel=1e-4)
    assert list(compared.figures) == list(expected)
    assert abs(expected["fid"]) > 1 and abs(expected["sfid"]) > 1
    assert expected["inception_score"] > 1


def test_what_was_compared_and_how_is_said(compared, folder, inception_weights):
    assert compared.images == {
        "file": str(folder / "images.npz"),
        "sha256": checksum(folder / "images.npz"),
        "images": 6,
        "size": [8, 12],
        "statistics": [],
    }
    assert compared.reference["images"] == 5 and compared.reference["size"] == [10, 10]
    assert compared.weights["sha256"] == checksum(inception_weights)
    assert compared.to_dict()["conventions"] == CONVENTIONS
    digest = checksum(inception_weights)[:8]
    assert compared.notes == (
        f"the sha256 of the weights begins with {digest}, not with the 6726825d in the published "
        "file's name: FID only if they are the same",
        "images of 8x12 are compared with such of 10x10, all resized to 299x299",
        "6 images are compared, and FID is larger of fewer: published figures are mostly of 50,000",
    )


@pytest.fixture
def no_network(monkeypatch):
    """A network whose features are counted, and made of the images' means."""
    calls = []

    def extract(network, images):
        calls.append(len(images))
        x = images.float().mean((1, 2, 3))[:, None]
        return feature_files.Features(x + torch.arange(2048), x * torch.ones(2023))

    monkeypatch.setattr(feature_files, "extract", extract)
    return calls


def test_statistics_of_the_reference_come_first(folder, tmp_path, no_network, inception_weights):
    """As in ADM's reference batches, whose statistics are of all images and which hold 10,000."""
    shutil.copy(folder / "images.npz", tmp_path / "x.npz")
    images = Archive(tmp_path / "x.npz")
    statistics = {"mu": np.full(2048, 3.0), "sigma": 2 * np.eye(2048)}
    spatial = {"mu_s": np.full(2023, 5.0), "sigma_s": 7 * np.eye(2023)}
    held = {"arr_0": np.load(folder / "reference.npz")["arr_0"]}

    def figures(**arrays):
        np.savez(tmp_path / "r.npz", **arrays)
        found = compare(images, Archive(tmp_path / "r.npz"), inception_weights)
        return found.figures, found.notes[1:-1]  # the weights are ours, the images few

    alone, notes = figures(**statistics)
    assert set(alone) == {"fid", "inception_score"}
    ours = feature_files.features_of(images, None, checksum(inception_weights))
    mean, variance = ours.pool.double().mean(0), ours.pool.double().var(0)
    expected = (mean - 3).square().sum() + variance.sum() - 2 * 2048
    assert alone["fid"] == pytest.approx(float(expected), rel=1e-9)
    assert notes == (
        f"{tmp_path / 'r.npz'} has no images: no precision, recall and KID",
        f"{tmp_path / 'r.npz'} has statistics, but no mu_s and sigma_s: no sFID",
    )
    both, notes = figures(**statistics, **spatial)
    assert set(both) == {"fid", "sfid", "inception_score"} and len(notes) == 1
    mean, variance = ours.spatial.double().mean(0), ours.spatial.double().var(0)
    expected = (mean - 5).square().sum() + variance.sum() - 7 * 2023
    assert both["sfid"] == pytest.approx(float(expected), rel=1e-9)
    everything, notes = figures(**held, **statistics, **spatial)
    (sizes,) = notes
    assert "images of 8x12 are compared with such of 10x10" in sizes
    assert everything["fid"] == alone["fid"] and everything["sfid"] == both["sfid"]
    assert set(everything) > {"precision", "recall", "kid", "kid_of_subsets"}
    images_alone, _ = figures(**held)
    assert images_alone["fid"] != alone["fid"]
    assert images_alone["kid"] == everything["kid"]


def test_precision_is_of_the_images_and_recall_of_the_reference(
    tmp_path, no_network, inception_weights
):
    def flat(name, *greys):
        images = np.array(greys, np.uint8).reshape(-1, 1, 1, 1)
        np.savez(tmp_path / name, images.repeat(3, 3))
        return Archive(tmp_path / name)

    wide, narrow = flat("r.npz", 0, 50, 100, 150, 200), flat("x.npz", 100, 101, 102, 103)
    figures = compare(narrow, wide, inception_weights).figures
    # Every narrow one is in a ball of the wide ones; of those, 100 alone is near the narrow ones.
    assert (figures["precision"], figures["recall"]) == (1, 1 / 5)


def test_features_are_kept_and_known(folder, tmp_path, no_network, capsys):
    path = tmp_path / "x.npz"
    np.savez(path, pixels(6, seed=0))

    def features(weights="a" * 64):
        no_network.clear()
        found = feature_files.features_of(Archive(path), None, weights, batch_size=4)
        return found, no_network[:]

    first, calls = features()
    assert calls == [4, 2] and capsys.readouterr().err == ""
    again, calls = features()
    assert calls == [] and all(map(torch.equal, first, again)) and again.pool.shape == (6, 2048)
    file = tmp_path / "x.npz.features-aaaaaaaa.safetensors"
    assert {x.name for x in tmp_path.iterdir()} == {path.name, file.name}

    def made_anew(reason):
        found, calls = features()
        assert calls == [4, 2] and all(map(torch.equal, first, found))
        line = f"{file}: {reason}"
        assert capsys.readouterr().err.startswith(line)
        assert features()[1] == []

    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    made_anew("damaged; computing its features anew\n")
    file.write_bytes(whole[:-5])
    made_anew("not readable (")
    assert features("b" * 64)[1] == [4, 2]
    other = tmp_path / "x.npz.features-bbbbbbbb.safetensors"
    file.write_bytes(other.read_bytes())
    made_anew("of other images or weights; computing its features anew\n")
    np.savez(path, pixels(6, seed=5))
    first = feature_files._extracted(Archive(path), None, 4, "cpu", False)
    made_anew("of other images or weights; computing its features anew\n")


def test_features_that_cannot_be_kept_are_no_error(folder, no_network, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_files, "save_file", full)
    found = feature_files.features_of(Archive(folder / "images.npz"), None, "c" * 64)
    assert found.pool.shape == (6, 2048)
    line = "cannot be written ([Errno 28] No space left on device); the next evaluation computes"
    assert line in capsys.readouterr().err
    assert not list(folder.glob("*cccccccc*"))


def test_too_few_images(tmp_path, folder, no_network, inception_weights):
    np.savez(tmp_path / "x.npz", pixels(3, seed=0))
    few, enough = Archive(tmp_path / "x.npz"), Archive(folder / "images.npz")
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(ValueError, match=r"x\.npz: needs at least 4 images, holds 3$"):
            compare(*pair, inception_weights)
