import pytest
import torch

from msf import Pyramid

EPS = torch.finfo(torch.float32).eps


def pixels(*shape, seed=0):
    """8-bit images: on their grid every average and difference is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator) / 128.0 - 1


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 8), (8, 20)])
def test_merge_of_split_is_the_image_exactly(levels, size):
    pyramid = Pyramid(levels, 3)
    x = pixels(2, 3, *size)
    components = pyramid.split(x)
    assert [tuple(f.shape[2:]) for f in components] == [
        (size[0] >> n, size[1] >> n) for n in range(levels, -1, -1)
    ]
    assert torch.equal(pyramid.merge(components), x)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_merge_of_split_is_the_image_for_any_floats(mode):
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 5
    pyramid = Pyramid(2, 3, mode)
    # A level rounds twice, x - u and u + (x - u); with |u| and |x - u| at most 2 max|x|, by half an
    # ulp each.
    bound = 2 * 2 * 2 * x.abs().max() * EPS / 2
    assert (pyramid.merge(pyramid.split(x)) - x).abs().max() <= bound


def test_residuals_pool_to_zero_and_the_merged_image_pools_to_its_base():
    pyramid = Pyramid(2, 3)
    components = pyramid.split(pixels(2, 3, 8, 8))
    merged = pyramid.merge(components)
    for residual in components[1:]:
        assert not torch.nn.functional.avg_pool2d(residual, 2).any()
    assert torch.equal(torch.nn.functional.avg_pool2d(merged, 4), components[0])


def test_projection_makes_the_pooled_image_the_base_and_changes_nothing_else():
    pyramid = Pyramid(1, 1)
    x, base = pixels(2, 1, 8, 8), pixels(2, 1, 4, 4, seed=1)
    projected = pyramid.project(x, base)
    assert torch.equal(torch.nn.functional.avg_pool2d(projected, 2), base)
    assert torch.equal(pyramid.split(projected)[1], pyramid.split(x)[1])
    with pytest.raises(ValueError, match="needs upsample='nearest'"):
        Pyramid(1, 1, "bilinear").project(x, base)


def test_measured_statistics_standardise_every_component():
    pyramid = Pyramid(1, 2)
    x = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([0.1, 3.0])[:, None, None] + torch.tensor([5.0, -1.0])[:, None, None]
    pyramid.measure(x.split(20))
    for f, _ in pyramid.stage_data(x):
        z = f.double().transpose(0, 1).flatten(1)
        assert z.mean(1).abs().max() < 1e-4
        assert (z.std(1, correction=0) - 1).abs().max() < 1e-5


def test_sampling_ends_where_the_standardised_components_began():
    pyramid = Pyramid(1, 3)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1
    pyramid.measure([x])
    base, _ = pyramid.split(x)
    below = pyramid.unstandardize_base(pyramid.standardize_base(base))
    torch.testing.assert_close(below, base)
    # A step of length 0 leaves the residual as it is.
    last_step = pyramid.last_step(below, 1, patch=2)
    z, _ = pyramid.stage_data(x)[1]
    torch.testing.assert_close(last_step(z, torch.zeros(4, 16, 12), None, 1.0, 0.0), x)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_stage_learns_its_component_above_the_merged_image_below(mode):
    pyramid, x = Pyramid(2, 3, mode), pixels(2, 3, 8, 8)
    pyramid.mean.normal_()
    pyramid.std.uniform_(0.5, 1.5)
    components = pyramid.split(x)
    for i, (f, below) in enumerate(pyramid.stage_data(x)):
        mean, std = pyramid.mean[i, :, None, None], pyramid.std[i, :, None, None]
        assert torch.equal(f, (components[i] - mean) / std)
        if i == 0:
            assert below is None
        else:
            assert torch.equal(below, pyramid.merge(components[:i]))


def test_flat_images_keep_a_finite_scale():
    pyramid = Pyramid(1, 1)
    pyramid.measure([torch.full((3, 1, 4, 4), 0.5)])
    assert pyramid.std.tolist() == [[1.0], [1.0]]
    with pytest.raises(ValueError, match="no images"):
        pyramid.measure([])


def test_what_is_not_finite_is_not_measured():
    pyramid = Pyramid(1, 1)
    with pytest.raises(ValueError, match="the images hold NaN or infinity"):
        pyramid.measure([torch.full((1, 1, 4, 4), float("nan"))])
    assert pyramid.mean.tolist() == [[0.0], [0.0]]


def test_wrong_kinds_are_one_clear_line():
    with pytest.raises(TypeError, match=r"x must be a tensor .*, got a tuple"):
        Pyramid(1, 1).measure([(torch.zeros(1, 1, 4, 4), torch.zeros(1))])
    with pytest.raises(TypeError, match="components must be a list of tensors, got one tensor"):
        Pyramid(1, 1).merge(torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("levels", [0, 1])
def test_complex_numbers_are_refused(levels):
    """PyTorch would drop the imaginary part."""
    pyramid, x = Pyramid(levels, 1), torch.zeros(1, 1, 4, 4, dtype=torch.complex64)
    for call in (pyramid.split, lambda x: pyramid.measure([x])):
        with pytest.raises(TypeError, match=r"^Pyramid.split: x must be .* real .*complex64$"):
            call(x)
    with pytest.raises(TypeError, match=r"^Pyramid.merge: components\[0\] must .*complex64$"):
        pyramid.merge([x])


@pytest.mark.parametrize("shape", [(1, 1, 6, 8), (1, 2, 8, 8), (1, 8, 8)])
def test_bad_images_are_one_clear_line(shape):
    with pytest.raises(ValueError, match=r"x must be \(B, 1, H, W\) with sides a multiple of 4"):
        Pyramid(2, 1).split(torch.zeros(shape))


def test_merge_counts_its_components():
    with pytest.raises(ValueError, match="expected 1 to 2 components, got 3"):
        Pyramid(1, 1).merge([torch.zeros(1, 1, 2, 2)] * 3)
