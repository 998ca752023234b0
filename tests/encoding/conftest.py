import numpy as np
import pytest
from PIL import Image

from vaes import save_vae


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture
def photos(tmp_path):
    """Two classes of 55 images of noise, of several sizes."""
    rng = np.random.default_rng(0)
    for index in range(110):
        folder = tmp_path / "photos" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = 32 + index % 3, 32 + index % 5
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Four shards: of 32, 32, 32 and 14 images."""
    monkeypatch.setattr("msf.encoding.encode.SHARD_IMAGES", 32)
