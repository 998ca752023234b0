import warnings
from functools import partial

import pytest
import torch

from models import generator, images, tiny_config, tiny_model
from msf import MSF, StageConfig


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_every_stage_has_a_loss_and_reaches_every_parameter(levels):
    model = tiny_model(levels).train()
    losses = model.training_losses(images(8), torch.arange(8) % 3, generator=generator())
    assert tuple(losses) == (*model.config.stage_names, "total")
    torch.testing.assert_close(
        losses["total"], sum(losses[name] for name in model.config.stage_names)
    )
    losses["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_one_stage_alone_leaves_the_other_untouched():
    model = tiny_model()
    losses = model.training_losses(images(4), torch.zeros(4, dtype=torch.int64), stage="residual")
    assert tuple(losses) == ("residual", "total")
    losses["total"].backward()
    assert all(p.grad is None for p in model.stages[0].parameters())
    with pytest.raises(ValueError, match=r"stage must be one of \('base', 'residual'\), got 'top'"):
        model.training_losses(images(4), torch.zeros(4, dtype=torch.int64), stage="top")


def test_untrained_loss_is_the_variance_of_the_velocity():
    # Zero output against data - noise, both of unit variance: 1 + 1.
    torch.manual_seed(0)
    model = MSF(tiny_config(channels=1))
    x = torch.randn(512, 1, 8, 8, generator=generator())
    model.pyramid.measure([x])
    losses = model.training_losses(x, torch.zeros(512, dtype=torch.int64), generator=generator(1))
    # The standard error of a mean of n products of Gaussians is below 4 / sqrt(n); n = 512 * 16 at
    # least.
    assert abs(losses["base"].item() - 2) < 5 * 4 / 8192**0.5
    assert abs(losses["residual"].item() - 2) < 5 * 4 / 8192**0.5


def test_losses_repeat_with_the_generator():
    model, y = tiny_model(), torch.tensor([0, 1, 2, 0])
    first, again, other = (
        model.training_losses(images(4), y, generator=generator(seed))["total"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_dropped_labels_become_the_null_class():
    model = tiny_model(label_dropout=1.0)
    model.training_losses(images(4), torch.tensor([0, 1, 2, 0]))["total"].backward()
    used = model.stages[0].label_embedding.weight.grad.abs().sum(1) > 0
    assert used.tolist() == [False, False, False, True]


def test_labels_as_they_were_trained():
    labels = torch.tensor([0, 2])
    assert tiny_model().trained_labels(labels) is labels
    assert tiny_model(label_dropout=1.0).trained_labels(labels).tolist() == [3, 3]
    assert tiny_model(num_classes=0).trained_labels(labels) is None


def test_prior_is_the_standardised_noised_upsampled_image_below():
    model, x = tiny_model(), images(2, (4, 4))
    noise, prior_noise = torch.randn(x.shape, generator=generator()), torch.tensor([0.0, 0.3])
    prior = model.prior(x, prior_noise, noise)
    low = model.pyramid.standardize_base(x) + prior_noise.view(2, 1, 1, 1) * noise
    assert torch.equal(prior, low.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize(("times", "share"), [("uniform", 0.1), ("logit-normal", 0.014)])
def test_losses_of_images_are_at_the_times_of_the_configuration(times, share):
    model, x, y = tiny_model(times=times), images(2000), torch.arange(2000) % 3
    losses, t = model.image_losses(x, y, stage="base", generator=generator())
    assert losses.shape == t.shape == (2000,)
    # How many lie below 0.1 is binomial; logit(0.1) is 2.197 deviations of a normal below its mean.
    deviation = (share * (1 - share) / 2000) ** 0.5
    assert (t < 0.1).float().mean().item() == pytest.approx(share, abs=5 * deviation)
    mean = model(x, y, stage="base", generator=generator())["base"]
    assert mean.item() == pytest.approx(losses.mean().item(), rel=1e-6)


def test_a_model_that_does_not_standardise_asks_for_no_statistics(recwarn):
    model = MSF(tiny_config(standardize=False))
    model(images(2), torch.tensor([0, 1]))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="set them with pyramid.measure"):
        MSF(tiny_config())(images(2), torch.tensor([0, 1]))


def test_trains_on_non_square_images_without_labels():
    model = tiny_model(image_size=(8, 16), num_classes=0)
    assert model.training_losses(images(2, (8, 16)))["total"].isfinite()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"labels must be \(B,\) in \[0, 3\), got None"),
        (torch.tensor([0, 3]), r"labels must be in \[0, 3\), got 0 to 3"),
        (torch.tensor([-1, 0]), r"got -1 to 0"),
        (torch.tensor([0]), r"labels must be int64 \(2,\), got torch.int64 \(1,\)"),
        (torch.tensor([0.0, 1.0]), "got torch.float32"),
    ],
)
def test_bad_labels_are_one_clear_line(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().training_losses(images(2), labels)


def test_what_cannot_be_looked_at_asserts_the_range_of_labels(monkeypatch):
    """As on a GPU, where looking would be waiting."""
    monkeypatch.setattr("msf.model.has_values", lambda x: False)
    with pytest.raises(RuntimeError, match=r"^labels must be in \[0, 3\)"):
        tiny_model()(images(2), torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 2, 8, 8, dtype=torch.float64), "x must be float32 .*, got torch.float64"),
        (
            torch.zeros(2, 2, 8, 8, dtype=torch.bfloat16),
            r"got torch.bfloat16; where FSDP casts it, .*\(cast_root_forward_inputs=False\), in",
        ),
        ([[0.0]], r"x must be float32 \(B, C, H, W\), got a list"),
        (None, r"x must be float32 \(B, C, H, W\), got a NoneType"),
        (torch.zeros(2, 8, 8), r"x must be \(B, 2, H, W\) .* got \(2, 8, 8\)"),
        (torch.zeros(2, 2, 6, 8), r"image sides must be multiples of \d .* got \(6, 8\)"),
    ],
)
def test_bad_images_are_one_clear_line(x, message):
    model = tiny_model(0, stages=(StageConfig(width=32, depth=1, heads=2, patch=4),))
    with pytest.raises(ValueError, match=message):
        model.training_losses(x, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_loss_is_about_the_same_in_other_dtypes(dtype):
    x, y, model = images(4), torch.tensor([0, 1, 2, 0]), tiny_model()
    losses = [
        m.training_losses(x, y, generator=generator())["total"] for m in (model, model.to(dtype))
    ]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)


def test_what_is_no_configuration_builds_no_model():
    with pytest.raises(TypeError, match=r"^MSF: config must be of class MSFConfig, got dict$"):
        MSF({})


def test_what_is_no_generator_is_one_clear_line():
    model, x, y = tiny_model(), images(2), torch.tensor([0, 1])
    for call in (model, partial(model.image_losses, stage="base")):
        with pytest.raises(TypeError, match=r"^generator must be of class Generator, got int$"):
            call(x, y, generator=0)


def test_untrained_stages_are_known():
    torch.manual_seed(0)
    model = MSF(tiny_config())
    assert model.untrained_stages == ("base", "residual")
    torch.nn.init.ones_(model.stages[0].output.weight)
    assert model.untrained_stages == ("residual",)
    for index in range(2):
        model.stages[index] = torch.nn.DataParallel(model.stages[index])
    assert model.untrained_stages == ("residual",)
    model.reset_parameters()
    assert model.untrained_stages == ("base", "residual")


def test_a_call_of_the_model_is_its_loss():
    model, x, y, calls = tiny_model(), images(2), torch.tensor([0, 1]), []
    model.register_forward_hook(lambda module, args, output: calls.append(output))
    losses = model.training_losses(x, y, generator=generator())
    assert len(calls) == 1  # so DistributedDataParallel and torch.compile see a training step
    called = model(x, y, generator=generator())
    assert called.keys() == {"base", "residual", "total"}
    assert all(torch.equal(called[name], losses[name]) for name in called)


def test_unmeasured_statistics_are_said_once():
    model = MSF(tiny_config(num_classes=0))
    for each in (model, MSF(tiny_config(num_classes=0)).training_losses):
        with pytest.warns(UserWarning, match=r"pyramid\.measure\(batches\) before") as warned:
            each(images(2))
        assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images(2))
        tiny_model(num_classes=0)(images(2))
