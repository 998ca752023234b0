import pytest
import torch

from msf.interpolation import logit_normal_times, uniform_times


@pytest.mark.parametrize("std", [1.0, 1.8])
def test_times_are_logit_normal(std):
    logits = logit_normal_times(20_000, std, generator=torch.Generator().manual_seed(0)).logit()
    # 5 standard errors of the mean and of the standard deviation.
    assert logits.mean().abs() < 5 * std / 20_000**0.5
    assert (logits.std() - std).abs() < 5 * std / 40_000**0.5


def test_times_are_uniform():
    n = 20_000
    times = uniform_times(n, generator=torch.Generator().manual_seed(0)).sort().values
    assert times[0] >= 0 and times[-1] < 1
    # Kolmogorov's distance is beyond 2 / sqrt(n) once in 1,500.
    assert (times - torch.arange(n) / n).abs().max() < 2 / n**0.5
