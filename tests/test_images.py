import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models import images, tiny_model
from msf.cli.outputs import atomic_folder
from msf.files import atomic_write
from msf.images import component_grid, save_image, tile, titled, to_uint8


def test_eight_bit_images_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_image_reads_back(tmp_path, channels):
    x = images(1, (4, 6), channels)[0]
    save_image(tmp_path / "x.png", x)
    with Image.open(tmp_path / "x.png") as picture:
        pixels = torch.from_numpy(np.array(picture)).view(4, 6, channels).permute(2, 0, 1)
    assert torch.equal(pixels, to_uint8(x))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_latents_are_not_a_picture(tmp_path):
    with pytest.raises(
        ValueError, match=r"must be \(1 or 3, H, W\), got \(4, 8, 8\); decode latents"
    ):
        save_image(tmp_path / "x.png", torch.zeros(4, 8, 8))
    assert not list(tmp_path.iterdir())


def test_tile_places_images_row_by_row():
    x = images(3, (2, 2), 1)
    grid = tile(x, columns=2, zoom=1)
    assert grid.shape == (1, 6, 6)
    assert torch.equal(grid[:, :2, 3:5], x[1]) and torch.equal(grid[:, 3:5, :2], x[2])
    assert (grid[:, 3:, 3:] == 1).all() and (grid[:, 2] == 1).all()


def test_component_grid_shows_base_residual_and_merged():
    model, x = tiny_model(channels=1), images(4, channels=1)
    grid = component_grid(model, model.pyramid.split(x), zoom=4)
    height = 2 * 4 * (8 + 1)
    titles, pictures = grid.split([grid.shape[1] - height, height], dim=1)
    base, residual, merged = pictures.split(height + 4 * 4, dim=2)
    expected = model.pyramid.merge(model.pyramid.split(x))[0]
    assert torch.equal(merged[:, :32:4, :32:4], expected)
    assert torch.equal(base[:, 0, 0], base[:, 7, 7]) and not torch.equal(base, residual)
    for title in titles.split(height + 4 * 4, dim=2):
        words, rest = title.split([height, 4 * 4], dim=2)
        assert (words < 0).any() and (rest == 1).all()


def test_a_title_wider_than_its_picture_is_whole():
    title = "residual 8x8"
    narrow, wide = titled(-torch.ones(3, 2, 2), title), titled(-torch.ones(3, 2, 200), title)
    words, width = narrow[:, :-2], narrow.shape[2]
    assert torch.equal(words, wide[:, :-2, :width]) and (wide[:, :-2, width:] == 1).all()
    assert (narrow[:, -2:, :2] == -1).all() and (narrow[:, -2:, 2:] == 1).all()


def test_written_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "x.safetensors") as path:
        save_file({"x": torch.zeros(1)}, path)
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_errors_name_the_file_that_was_to_be_written(tmp_path):
    file = tmp_path / ("long" * 64 + ".png")
    with pytest.raises(OSError, match="too long") as error:
        save_image(file, images(1, channels=1)[0])
    assert error.value.filename == str(file)
    folder = tmp_path / ("long" * 64)
    with pytest.raises(OSError, match="too long") as error, atomic_folder(folder):
        pass
    assert error.value.filename == str(folder)


def test_failed_write_leaves_the_old_file(tmp_path):
    (tmp_path / "x.txt").write_text("old")
    with pytest.raises(OSError, match="disk"), atomic_write(tmp_path / "x.txt") as path:
        path.write_text("half")
        raise OSError("disk full")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.txt", "old")]


def test_nan_is_no_black_image(tmp_path):
    x = torch.zeros(1, 4, 4)
    x[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^to_uint8: x must be finite, but holds NaN"):
        save_image(tmp_path / "x.png", x)
    assert not list(tmp_path.iterdir())


def test_complex_numbers_are_no_image():
    with pytest.raises(
        TypeError, match=r"^to_uint8: x must be a tensor of real numbers, got torch"
    ):
        to_uint8(torch.zeros(1, 2, 2, dtype=torch.complex64))


def test_grid_of_another_size_than_the_configurations():
    model = tiny_model()
    components = model.pyramid.split(images(4, size=(16, 24)))
    grid = component_grid(model, components, zoom=1)
    assert grid.shape[1] > 2 * (16 + 1) and grid.isfinite().all()
