"""Sampling with models that predict noise, against diffusers' schedulers and closed forms."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from models import tiny_model
from msf import SamplingConfig, sample
from msf.diffusion import denoise, previous, signal_levels, step_numbers
from msf.sampling_config import StageSampling

LABELS = torch.tensor([0, 1, 2])
MEAN, DEVIATION = 0.7, 0.3


def settings(steps, solver):
    return StageSampling(steps, 1.0, (0.0, 1.0), solver)


def noise_model(**changes):
    return tiny_model(0, prediction="noise", time_range=(0.0, 1.0), standardize=False, **changes)


def gaussian_noise(x, k, guided):
    """What is left of the noise in x_k, if data are N(MEAN, DEVIATION^2): its mean given x_k."""
    level = torch.from_numpy(signal_levels())[k.long()].float()[:, None]
    variance = level * DEVIATION**2 + 1 - level
    return (1 - level).sqrt() * (x - level.sqrt() * MEAN) / variance


def test_levels_are_those_of_the_linear_schedule():
    expected = DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02).alphas_cumprod
    # diffusers multiplies a thousand factors in float32, each of an error of half an ulp or so.
    np.testing.assert_allclose(signal_levels(), expected.numpy(), rtol=1000 * 2**-24)


def test_steps_are_spaced_as_those_of_dit():
    """DiT's respacing adds up strides of 999 / (n - 1), and rounds each."""
    assert step_numbers(1000) == list(range(999, -1, -1))
    assert step_numbers(4) == [999, 666, 333, 0]
    assert step_numbers(250)[:4] == [999, 995, 991, 987] and step_numbers(250)[-1] == 0


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [10, 1000])
def test_each_step_is_that_of_diffusers_with_the_same_noise(solver, steps):
    linear = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    linear |= {"timestep_spacing": "leading", "clip_sample": False}
    kind = DDIMScheduler if solver == "ddim" else DDPMScheduler
    scheduler, levels = kind(**linear), signal_levels()
    scheduler.alphas_cumprod = torch.from_numpy(levels)  # the schedule itself is compared above
    scheduler.set_timesteps(steps)
    numbers = scheduler.timesteps.tolist()
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, generator=draws, dtype=torch.float64)
    for k, following in zip(numbers[:40], [*numbers[1:], None]):
        noise = torch.randn(x.shape, generator=draws, dtype=torch.float64)
        options = {} if solver == "ddim" else {"generator": torch.Generator().manual_seed(k)}
        expected = scheduler.step(noise, k, x, **options).prev_sample
        last = following is None
        fresh = None
        if solver == "ddpm" and not last:
            generator = torch.Generator().manual_seed(k)
            fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        got = previous(x, noise, levels[k], 1.0 if last else levels[following], fresh)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        x = got


def test_ddim_follows_the_probability_flow():
    """Of a Gaussian it leads x at the quantile of the noise to that of the data, and the smaller
    the steps the closer."""
    x = torch.linspace(-2, 2, 9)[:, None]
    start = signal_levels()[999]
    spread = (start * DEVIATION**2 + 1 - start) ** 0.5
    expected = MEAN + DEVIATION * (x - start**0.5 * MEAN) / spread
    errors = []
    for steps in (125, 250, 500, 1000):
        got = denoise(gaussian_noise, x, settings(steps, "ddim"), draw=None)
        errors.append(float((got - expected).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4 and errors[-1] < 0.01


def test_ddpm_samples_the_gaussian():
    count, draws = 20_000, torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=draws)
    sampling = settings(1000, "ddpm")
    got = denoise(gaussian_noise, x, sampling, lambda k: torch.randn(count, 1, generator=draws))
    # Four standard errors, and 1 % for the steps' length: the posterior's variance is that of data
    # that are known, and too little by what is not (3.8 % of the deviation at 250 steps).
    assert abs(float(got.mean()) - MEAN) < 4 * DEVIATION / count**0.5 + 0.01 * DEVIATION
    assert abs(float(got.std()) / DEVIATION - 1) < 4 / (2 * count) ** 0.5 + 0.01


def test_images_of_a_noise_model_depend_on_their_seed_alone():
    model = noise_model()
    for solver in (None, "ddim"):
        how = {"steps": 5, "solver": solver, "guidance_scale": 2.0}
        all_three = sample(model, LABELS, seeds=[5, 6, 7], **how)
        assert all_three.isfinite().all()
        alone = sample(model, LABELS[1:2], seeds=[6], **how)
        torch.testing.assert_close(all_three[1:2], alone, rtol=1e-4, atol=1e-4)


def test_ddpm_is_the_default_of_noise_models_and_differs_from_ddim():
    model = noise_model()
    made = [
        sample(model, LABELS, seeds=range(3), steps=5, solver=s) for s in (None, "ddpm", "ddim")
    ]
    assert torch.equal(made[0], made[1]) and not torch.allclose(made[0], made[2])


def test_guidance_is_of_the_noise_at_the_times_of_its_interval():
    model = noise_model()
    kept = dict(seeds=range(3), steps=4, solver="ddim")
    plain = sample(model, LABELS, **kept)
    # Steps 999, 666, 333, 0 are at times 0.001 to 1: none of them is below that.
    none = sample(model, LABELS, guidance_scale=3.0, guidance_interval=(0.0, 0.0005), **kept)
    some = sample(model, LABELS, guidance_scale=3.0, guidance_interval=(0.0, 0.002), **kept)
    assert torch.equal(plain, none) and not torch.equal(plain, some)


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim", "ddpm"])
def test_solvers_are_for_what_is_predicted(solver):
    noise = solver.startswith("dd")
    model = (tiny_model(0) if noise else noise_model()).config
    needed = "euler or heun for a model that predicts velocity" if noise else "ddpm or ddim for"
    with pytest.raises(ValueError, match=f"solver must be {needed}.*, got '{solver}'"):
        SamplingConfig(solver=solver).stages(model)


def test_more_steps_than_the_diffusion_has_are_refused():
    with pytest.raises(ValueError, match=r"steps must be at most 1000 .* got 1001"):
        SamplingConfig(steps=1001).stages(noise_model().config)


def test_noise_models_are_not_trained():
    with pytest.raises(ValueError, match="only velocities are trained, this model predicts noise"):
        noise_model()(torch.zeros(1, 2, 8, 8), LABELS[:1])
