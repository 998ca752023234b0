"""Intervals by resampling."""

import numpy as np
import pytest
import torch

from msf.evaluation import frechet_distance
from msf.evaluation.intervals import DISTANCE, PROPORTION, figure, subsets


def test_subsets_keep_pairs():
    for subset in subsets(50, 20, seed=0):
        assert len(subset) == len(subset.unique()) == 40
        assert torch.equal(subset[::2] + 1, subset[1::2]) and (subset[::2] % 2 == 0).all()
    first, second = (subsets(50, 1, seed)[0].tolist() for seed in (0, 1))
    assert first == subsets(50, 1, seed=0)[0].tolist() != second


def test_interval_of_a_mean_is_the_textbook_one():
    x = torch.randn(400, dtype=torch.float64)
    chosen = subsets(400, 2000, seed=0)
    interval = figure(lambda i: float(x[i].mean()), 400, chosen)
    half_width = 1.96 * float(x.std()) / 400**0.5
    assert interval.value == float(x.mean())
    # Pairs are resampled, whose spread is known to 1 / sqrt(2 * 200) = 5 %; quantiles add 3 %.
    assert interval.value - interval.low == pytest.approx(half_width, rel=0.2)
    assert interval.high - interval.value == pytest.approx(half_width, rel=0.2)


def test_interval_ends_where_the_values_do():
    chosen = subsets(20, 100, seed=0)
    x = (torch.arange(20) < 19).double()  # a share of 0.95 +- 0.1
    share = figure(lambda i: float(x[i].mean()), 20, chosen)
    assert share.high > 1
    clipped = figure(lambda i: float(x[i].mean()), 20, chosen, PROPORTION)
    assert (clipped.value, clipped.low, clipped.high) == (share.value, share.low, 1.0)
    distance = figure(lambda i: float(1 - x[i].mean()), 20, chosen, DISTANCE)
    assert distance.low == 0 < distance.value < distance.high


def test_interval_covers_what_repeated_experiments_give():
    def experiment(seed):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 120, 6, generator=generator, dtype=torch.float64)
        return a + 0.5, b

    expected = np.mean([frechet_distance(*experiment(seed)) for seed in range(1000, 1300)])
    covered = 0
    for seed in range(60):
        a, b = experiment(seed)
        interval = figure(
            lambda i, a=a, b=b: frechet_distance(a[i], b[i]), 120, subsets(120, 100, seed)
        )
        assert interval.low < interval.value < interval.high
        covered += interval.low <= expected <= interval.high
    # 95 % of 60 is 57; fewer than 51 has a probability of 0.4 % at 93 % coverage.
    assert covered >= 51


def test_interval_of_a_biased_figure_is_around_it():
    # At its floor a distance is all bias, and larger on every subset.
    a, b = torch.randn(2, 100, 20, dtype=torch.float64)
    interval = figure(lambda i: frechet_distance(a[i], b[i]), 100, subsets(100, 100, seed=0))
    below, above = interval.value - interval.low, interval.high - interval.value
    assert 0.5 < below / above < 2


def test_the_value_lies_in_its_interval():
    values = iter([5.0, 9.0, 9.0, 9.1, 9.2])  # subsets that all lie above the value
    found = figure(lambda _: next(values), 10, subsets(10, 4, seed=0))
    assert found.low <= found.value == 5.0 <= found.high
