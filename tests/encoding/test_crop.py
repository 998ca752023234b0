"""ADM's crop of the centre."""

import numpy as np
import pytest
from PIL import Image

from msf.data.decode import centre_crop


def grey(values):
    return Image.fromarray(np.asarray(values, dtype=np.uint8))


def crop(values, size):
    return np.array(centre_crop(grey(values), size)).tolist()


@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((4, 4), (0, 4), (0, 4)),
        ((4, 7), (0, 4), (1, 5)),  # of an odd rest the last column more
        ((7, 4), (1, 5), (0, 4)),
        ((4, 6), (0, 4), (1, 5)),
        ((6, 4), (1, 5), (0, 4)),
    ],
)
def test_an_image_that_fits_is_cropped_alone(shape, rows, columns):
    values = np.random.default_rng(0).integers(0, 256, shape)
    assert crop(values, 4) == values[slice(*rows), slice(*columns)].tolist()


def test_twice_the_size_is_halved_by_averages():
    values = np.arange(64).reshape(8, 8) * 4
    # The mean of a 2x2 block is that of its corners: half a row and half a column on.
    expected = values[::2, ::2] + (8 * 4 + 4) // 2
    assert crop(values, 4) == expected.tolist()


def test_tall_and_wide_are_halved_and_lose_their_ends():
    wide = np.zeros((8, 16), int)
    wide[:, 4:12] = np.kron([[100, 20], [200, 60]], np.ones((4, 4), int))
    expected = [[100, 100, 20, 20]] * 2 + [[200, 200, 60, 60]] * 2
    assert crop(wide, 4) == expected
    assert crop(wide.T, 4) == np.transpose(expected).tolist()


def test_four_times_the_size_is_halved_twice():
    blocks = np.random.default_rng(0).integers(0, 256, (4, 4))
    assert crop(np.kron(blocks, np.ones((4, 4), int)), 4) == blocks.tolist()
    # Of 9 rows 4 remain, each the mean of those whose centres lie in its 9/4: 0-1, 2-4, 5-6, 7-8.
    ramp = np.repeat(np.arange(9)[:, None] * 20, 9, axis=1)
    assert [row[0] for row in crop(ramp, 4)] == [10, 60, 110, 150]


def bicubic_weights(distances):
    """Keys' kernel with a = -1/2, which is Pillow's."""
    x = np.abs(distances)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@pytest.mark.parametrize("size", [4, 6])
def test_tiny_and_odd_images_are_resized_by_bicubic_interpolation(size):
    """From 2 pixels up to 4, and from 8 down to 6, whose kernel is 8 / 6 as wide."""
    source = {4: 2, 6: 8}[size]
    values = np.random.default_rng(1).integers(60, 190, (source, source)).astype(float)
    scale = source / size
    centres = (np.arange(size) + 0.5) * scale - 0.5
    weights = bicubic_weights((np.arange(source) - centres[:, None]) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    expected = weights @ values @ weights.T
    # Pillow rounds the values of one pass before the other: an error of a half each.
    assert np.abs(np.array(crop(values, size)) - expected).max() <= 1.6


def test_a_side_is_rounded_to_whole_pixels():
    assert centre_crop(grey(np.zeros((5, 9))), 4).size == (4, 4)  # by way of 4 x 7.2
    values = np.zeros((5, 9), int)
    values[:, 3:6] = 200  # the middle third of 7 columns, of which the crop has 1 to 4
    found = np.array(crop(values, 4))[0]
    assert found[2] > 150 and found[0] < 60
