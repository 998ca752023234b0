import pytest
from PIL import Image

from training_runs import run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run from start to end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out)
    return out


@pytest.fixture
def photos(tmp_path):
    """Ten classes of 25 images, every one of another grey."""
    for index in range(250):
        folder = tmp_path / "photos" / str(index // 25)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), index).save(folder / f"{index}.png")
    return tmp_path / "photos"
