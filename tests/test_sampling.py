from dataclasses import fields

import numpy as np
import pytest
import torch

from models import images, tiny_model
from msf import Pipeline, SamplingConfig, sample, sample_components
from msf.sampling import image_noise
from msf.sampling_config import SamplingFields

LABELS = torch.tensor([0, 1, 2, 3])


def test_noise_of_an_image_depends_on_its_seed_and_purpose_alone():
    noise = image_noise([7, 8, 2**62], (2, 4, 4), 1)
    assert torch.equal(noise[1:2], image_noise([8], (2, 4, 4), 1))
    assert not torch.equal(noise[1:2], image_noise([8], (2, 4, 4), 0))
    assert image_noise([], (2, 4, 4)).shape == (0, 2, 4, 4)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_images_do_not_depend_on_their_batch(levels):
    model = tiny_model(levels)
    options = {"steps": 3, "guidance_scale": 1.5, "prior_noise": 0.1 if levels else 0.0}
    together = sample(model, LABELS, seeds=range(4), **options)
    alone = torch.cat([sample(model, LABELS[i : i + 1], seeds=[i], **options) for i in range(4)])
    assert together.shape == (4, 2, 8, 8)
    # Other GEMM shapes sum in another order; the first step's rounding grows by the steps that
    # follow.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_components_merge_to_the_image(levels):
    model = tiny_model(levels)
    x, components = sample_components(model, LABELS, seeds=range(4))
    assert [tuple(f.shape[2:]) for f in components] == [
        model.config.stage_size(i) for i in range(levels + 1)
    ]
    torch.testing.assert_close(model.pyramid.merge(components), x)


def test_stage_settings_reach_their_stage():
    model, calls = tiny_model(), [0, 0]

    def count(index):
        def hook(stage, args):
            calls[index] += 1
            batches.append(len(args[0]))

        return hook

    batches = []
    for index, stage in enumerate(model.stages):
        stage.register_forward_pre_hook(count(index))
    sample(model, LABELS, seeds=range(4), steps=(3, 2), guidance_scale=(2.0, 1.0), solver="heun")
    # Heun evaluates twice a step but the last; only the guided stage runs the doubled batch.
    assert calls == [5, 3]
    assert batches == [8] * 5 + [4] * 3


def test_guidance_interval_skips_the_unconditional_half():
    model, batches = tiny_model(levels=0), []
    model.stages[0].register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    sample(model, LABELS, seeds=range(4), steps=4, guidance_scale=2.0, guidance_interval=(0.5, 1.0))
    assert batches == [4, 4, 8, 8]


def test_a_config_and_its_fields_say_the_same_and_fields_come_first():
    model, how = tiny_model(), {"steps": (3, 2), "guidance_scale": 2.0, "solver": "heun"}
    expected = sample(model, LABELS, seeds=range(4), **how)
    config = SamplingConfig(**how)
    assert torch.equal(sample(model, LABELS, seeds=range(4), config=config), expected)
    config = SamplingConfig(steps=1, guidance_scale=2.0)
    got = sample(model, LABELS, seeds=range(4), config=config, steps=(3, 2), solver="heun")
    assert torch.equal(got, expected)
    assert list(SamplingFields.__annotations__) == [field.name for field in fields(SamplingConfig)]
    with pytest.raises(TypeError, match=r"^sample: unknown fields step; known are steps, "):
        sample(model, LABELS, seeds=range(4), step=3)


def test_null_label_is_the_unconditional_model():
    model, null = tiny_model(), torch.full((4,), 3)
    guided = sample(model, null, seeds=range(4), guidance_scale=5.0)
    torch.testing.assert_close(guided, sample(model, null, seeds=range(4)), rtol=1e-4, atol=1e-4)


def test_given_base_is_kept():
    model, base = tiny_model(), images(4, (4, 4))
    x, components = sample_components(model, LABELS, seeds=range(4), base=base)
    assert torch.equal(components[0], base)
    assert torch.equal(x, sample(model, LABELS, seeds=range(4), base=base))


def test_projected_residual_pools_to_the_base():
    model = tiny_model(levels=2)
    x, components = sample_components(model, LABELS, seeds=range(4), project_residual=True)
    pooled = torch.nn.functional.avg_pool2d(x, 4)
    # Per level: the residual's mean, its subtraction and the merge round once each, on values up to
    # max|x|.
    bound = 2 * 3 * x.abs().max() * torch.finfo(torch.float32).eps
    assert (pooled - components[0]).abs().max() <= bound
    loose = sample(model, LABELS, seeds=range(4))
    assert (torch.nn.functional.avg_pool2d(loose, 4) - components[0]).abs().max() > 1000 * bound


def test_prior_noise_is_told_to_the_stage():
    model = tiny_model()
    given = []
    model.stages[1].register_forward_pre_hook(lambda _, args: given.append(args[4]))
    sample(model, LABELS, seeds=range(4), prior_noise=0.2)
    assert torch.equal(given[0], torch.full((4,), 0.2))


def test_other_size_than_trained():
    assert sample(tiny_model(), LABELS, seeds=range(4), size=(12, 16)).shape == (4, 2, 12, 16)


def test_a_seed_may_be_wider_than_64_bits():
    model = tiny_model()
    narrow, wide = sample(model, torch.tensor([0, 0]), seeds=[7, 7 + 2**100], steps=1)
    alone = sample(model, torch.tensor([0]), seeds=[7 + 2**100], steps=1)[0]
    torch.testing.assert_close(wide, alone, rtol=1e-4, atol=1e-4)
    assert (wide - narrow).abs().max() > 0.1


def test_without_classes_and_with_no_images():
    model = tiny_model(num_classes=0)
    assert sample(model, seeds=[1, 2]).shape == (2, 2, 8, 8)
    assert sample(tiny_model(), LABELS[:0], seeds=[]).shape == (0, 2, 8, 8)
    with pytest.raises(ValueError, match="guidance_scale must be 1 for a model without classes"):
        sample(model, seeds=[1], guidance_scale=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [0, 1, 2]}, "give a seed for every label, got 4 labels and 3 seeds"),
        ({"labels": LABELS.float()}, r"labels must be int64 \(4,\), got torch.float32 \(4,\)"),
        ({"seeds": [0, 1, 2, -3]}, "seeds must not be negative, got -3"),
        (
            {"labels": torch.tensor([0, 0, 0, 4])},
            r"labels must be in \[0, 3\), got 0 to 4 \(3 means no class\)",
        ),
        ({"labels": None}, r"labels must be \(B,\) in \[0, 3\)"),
        ({"steps": (1, 2, 3)}, "steps must be one value or 2, one a stage"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": (2, 0)}, "steps must be at least 1"),
        ({"steps": (2, 2.5)}, "steps must be a whole number, got 2.5"),
        ({"steps": 10**18}, "steps must be at most 100000, got 1000"),
        ({"steps": 10**5000}, r"steps must be below 2\*\*64 in size, got a number of 16610 bits"),
        ({"steps": "3"}, "steps must be a whole number, got '3'"),
        ({"guidance_scale": "2"}, "guidance_scale must be a number, got '2'"),
        ({"guidance_interval": ("0", "1")}, "guidance_interval must be a number, got '0'"),
        ({"solver": 7}, "solver must be one of .* got 7"),
        ({"prior_noise": "x"}, "prior_noise must be a number, got 'x'"),
        ({"prior_noise": float("nan")}, "prior_noise must be finite, got nan"),
        ({"size": 16}, "size must be a list or tuple, got 16"),
        ({"size": (16.0, 24.0)}, r"size\[0\] must be a whole number, got 16.0"),
        ({"size": (2**40, 8)}, r"image sides must be at most 65536, got \(1099511627776, 8\)"),
        ({"size": (2**16, 2**16)}, r"at most 67108864 pixels, got \(65536, 65536\)"),
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"guidance_interval": None}, r"guidance_interval must be \(low, high\), got None"),
        ({"guidance_interval": "01"}, r"guidance_interval must be \(low, high\), got '01'"),
        ({"guidance_interval": ((0, 1), "01")}, r"guidance_interval must be \(low, .*, got '01'"),
        ({"steps": b"2"}, "steps must be a whole number, got b'2'"),
        ({"guidance_interval": 0.5}, r"guidance_interval must be \(low, high\), got 0.5"),
        ({"guidance_interval": (0.5,)}, r"guidance_interval must be \(low, high\), got \(0.5,\)"),
        ({"guidance_scale": (1.0, float("nan"))}, "guidance_scale must be finite"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite"),
        (
            {"guidance_scale": 1e39},
            r"guidance_scale must be at most 3.4e\+38 in size, .*, got 1e\+39",
        ),
        ({"guidance_scale": 10**400}, r"guidance_scale must be finite, got 1000\d+\.\.\.0+$"),
        ({"guidance_interval": ((0, 1), (1, 0))}, "guidance_interval 0 <= low <= high <= 1"),
        ({"guidance_scale": (1.0,)}, "guidance_scale must be one value or 2"),
        ({"guidance_interval": ((0.0, 1.0),)}, "guidance_interval must be one value or 2"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval 0 <= low <= high <= 1"),
        ({"solver": "dopri5"}, "solver must be one of"),
        ({"prior_noise": 0.5}, r"prior_noise must be in \[0, 0.3\]"),
        ({"size": (8, 9)}, r"base: image sides must be multiples of 2 .* got \(8, 9\)"),
        (
            {"base": torch.full((4, 2, 4, 4), torch.nan)},
            "sample: base must be finite in float32, but holds NaN or infinity",
        ),
        ({"base": torch.full((4, 2, 4, 4), 1e300, dtype=torch.float64)}, "base must be finite in"),
        ({"base": torch.zeros(4, 2, 8, 8)}, r"base must be \(4, 2, 4, 4\), got \(4, 2, 8, 8\)"),
    ],
)
def test_bad_requests_are_one_clear_line_before_any_work(options, message):
    arguments, model = {"labels": LABELS, "seeds": range(4), **options}, tiny_model()
    model.stages[0].register_forward_pre_hook(lambda *_: pytest.fail("the base was generated"))
    with pytest.raises(ValueError, match=message):
        sample(model, arguments.pop("labels"), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [0, 1, 2, 3]}, r"labels must be a tensor \(B,\) of int64, got a list"),
        ({"base": [0.0]}, r"base must be a tensor \(4, 2, 4, 4\), got a list"),
        ({"base": np.zeros((4, 2, 4, 4))}, "base must be a tensor .* got a ndarray"),
        (
            {"base": torch.zeros(4, 2, 4, 4, dtype=torch.complex64)},
            r"base must be a tensor \(4, 2, 4, 4\) of real numbers, got torch.complex64",
        ),
        ({"config": {}}, "config must be of class SamplingConfig, got dict"),
        ({"generator": 0}, "unknown fields generator; known are steps, guidance_scale, "),
        ({"seeds": b"0123"}, "seeds must be a sequence of whole numbers, .* got b'0123'"),
        ({"seeds": 4}, "seeds must be a sequence of whole numbers, one an image, got 4"),
        ({"seeds": "0123"}, "seeds must be a sequence of whole numbers, one an image, got '0123'"),
        ({"seeds": [0.0, 1.0, 2.0, 3.0]}, "seeds must be a sequence of whole numbers"),
        ({"seeds": torch.rand(4)}, "seeds must be a sequence of whole numbers"),
        ({"seeds": torch.zeros(2, 2, dtype=torch.int64)}, r"got \[\[0, 0\], \[0, 0\]\]"),
    ],
)
def test_wrong_types_are_one_clear_line(options, message):
    arguments = {"labels": LABELS, "seeds": range(4), **options}
    with pytest.raises(TypeError, match=message) as error:
        sample(tiny_model(), arguments.pop("labels"), **arguments)
    assert "\n" not in str(error.value)


def test_what_is_no_model_is_one_clear_line():
    with pytest.raises(TypeError, match="sample: model must be an MSF, got a NoneType"):
        sample(None, LABELS, seeds=range(4))


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_of_a_wrapped_model_its_module_is_asked_for(wrapper):
    wrapped = wrapper(tiny_model(channels=1))
    message = f"model must be an MSF, got a {wrapper.__name__}; give its .module$"
    with pytest.raises(TypeError, match=f"^sample: {message}"):
        sample(wrapped, torch.tensor([0]), seeds=[0])
    with pytest.raises(TypeError, match=f"^Pipeline: {message}"):
        Pipeline(wrapped)
    sample(wrapped.module, torch.tensor([0]), seeds=[0])


def test_seeds_may_be_a_tensor():
    model = tiny_model()
    expected = sample(model, LABELS, seeds=[3, 1, 4, 5])
    assert torch.equal(sample(model, LABELS, seeds=torch.tensor([3, 1, 4, 5])), expected)
    with pytest.raises(TypeError, match=r"seeds must be .* whole numbers, .* got \[True"):
        sample(model, LABELS, seeds=[True, 1, 4, 5])


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"steps": np.int64(3)}, {"steps": 3}),
        ({"steps": np.array([3, 2])}, {"steps": (3, 2)}),
        ({"steps": torch.tensor([3, 2])}, {"steps": (3, 2)}),
        ({"guidance_scale": np.float32(2)}, {"guidance_scale": 2}),
        ({"guidance_scale": torch.tensor(2)}, {"guidance_scale": 2}),
        (
            {"guidance_scale": 2, "guidance_interval": np.array([[0, 1], [0.5, 1]])},
            {"guidance_scale": 2, "guidance_interval": ((0, 1), (0.5, 1))},
        ),
        ({"prior_noise": torch.tensor(0.25)}, {"prior_noise": 0.25}),
        ({"size": np.array([16, 24])}, {"size": (16, 24)}),
    ],
    ids=str,
)
def test_numbers_of_other_kinds_are_numbers(options, plain):
    model = tiny_model()
    x, expected = (sample(model, LABELS, seeds=range(4), **o) for o in (options, plain))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_a_model_of_another_dtype_makes_about_the_same_images(dtype, positions):
    model = tiny_model(positions=positions)
    options = {"seeds": range(4), "guidance_scale": 1.5, "prior_noise": 0.1}
    expected = sample(model, LABELS, **options)
    x = sample(model.to(dtype), LABELS, **options)
    assert x.dtype == torch.float32
    # bfloat16 has 8 bits: 1 % a layer.
    assert (x - expected).square().mean() < 0.05**2 * expected.square().mean()


def nan_weights(model):
    model.stages[0].output.weight.data.fill_(torch.nan)


def half_that_overflows(model):
    model.stages[1].output.weight.data.fill_(6e4)
    model.half()


@pytest.mark.parametrize("spoil", [nan_weights, half_that_overflows])
def test_a_model_that_makes_nan_is_an_error(spoil):
    model = tiny_model()
    spoil(model)
    with pytest.raises(ValueError, match=r"^sample: the model makes NaN or infinity; try it in fl"):
        sample(model, LABELS, seeds=range(4))


def test_projection_needs_nearest_upsampling():
    with pytest.raises(ValueError, match="project_residual needs upsample='nearest'"):
        sample(tiny_model(upsample="bilinear"), LABELS, seeds=range(4), project_residual=True)


@pytest.mark.parametrize("options", [{"prior_noise": 0.1}, {"project_residual": True}], ids=str)
def test_what_needs_a_residual_says_so(options):
    with pytest.raises(ValueError, match="need a residual, this model has none"):
        sample(tiny_model(0), LABELS, seeds=range(4), **options)


@pytest.mark.parametrize(("dropout", "never"), [(0.0, "no class"), (1.0, "any class")])
def test_guidance_needs_classes_and_their_absence_trained(dropout, never):
    model = tiny_model(label_dropout=dropout)
    line = (
        f"sample: guidance_scale must be 1 for a model with label_dropout {dropout:g}: "
        f"it was never trained with {never}"
    )
    with pytest.raises(ValueError) as caught:
        sample(model, torch.tensor([3 * int(dropout)]), seeds=[0], guidance_scale=2.0)
    assert str(caught.value) == line


@pytest.mark.parametrize(("dropout", "trained", "never"), [(0.0, 2, "no"), (1.0, 3, "any")])
def test_labels_that_were_never_trained_are_refused(dropout, trained, never):
    model, labels = tiny_model(label_dropout=dropout), torch.tensor([2, 3])
    line = f"sample: labels must be .* {dropout:g}: it was never trained with {never} class$"
    with pytest.raises(ValueError, match=line):
        sample(model, labels, seeds=[0, 1])
    assert sample(model, labels[labels == trained], seeds=[0]).isfinite().all()
