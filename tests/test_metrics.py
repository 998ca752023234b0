"""The distances and shares of an evaluation."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msf.evaluation import frechet_distance, in_manifold, kid, metrics, precision


def gaussian(n, mean, cov):
    """(n, D) features whose sample mean and covariance are exactly ``mean`` and ``cov``."""
    x = torch.randn(n, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T.cov()), x.T, upper=False)
    return (torch.linalg.cholesky(cov) @ whitened).T + mean


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_frechet_distance_of_commuting_covariances():
    a, b = tensor(1, 4, 9), tensor(4, 1, 0.25)
    mean = tensor(1, -2, 0.5)
    expected = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    value = frechet_distance(gaussian(50, torch.zeros(3), a.diag()), gaussian(70, mean, b.diag()))
    assert value == pytest.approx(float(expected), rel=1e-10)


def test_frechet_distance_of_one_feature():
    a, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([[2.0], [6.0]])
    # Of Gaussians on a line: (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2.
    assert frechet_distance(a, b) == pytest.approx(4**2 + (2**0.5 - 8**0.5) ** 2, rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = tensor([2, 1], [1, 3]), tensor([5, -2], [-2, 1])
    # The root of a 2x2 matrix has the trace sqrt(tr + 2 sqrt(det)).
    root = ((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()
    expected = a.trace() + b.trace() - 2 * root
    zero = torch.zeros(2)
    value = frechet_distance(gaussian(40, zero, a), gaussian(30, zero, b))
    assert value == pytest.approx(float(expected), rel=1e-10)


def test_frechet_distance_is_a_distance_of_shapes():
    a = torch.randn(60, 5, dtype=torch.float64)
    b = 2 * torch.randn(80, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 1
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    value = frechet_distance(a, b)
    assert value > 1
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(a @ rotation + 3, b @ rotation + 3) == pytest.approx(value, rel=1e-10)


def test_frechet_distance_with_fewer_images_than_features():
    a = torch.randn(10, 30, dtype=torch.float64)
    # Both covariances are singular; a shift leaves them equal. A root of rounding is 1e-8.
    assert frechet_distance(a, a + 1) == pytest.approx(30, abs=1e-5)


def test_kid_is_the_unbiased_estimate():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    xx = [k(x[i], x[j]) for i in range(5) for j in range(5) if i != j]
    yy = [k(y[i], y[j]) for i in range(4) for j in range(4) if i != j]
    xy = [k(a, b) for a in x for b in y]
    assert kid(x, y) == pytest.approx(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy), rel=1e-12)


def test_kid_is_zero_on_average_for_one_distribution():
    values = tensor(*(kid(torch.randn(40, 4), torch.randn(30, 4)) for _ in range(300)))
    assert values.mean().abs() < 4 * values.std() / 300**0.5
    assert (values < 0).any()
    assert kid(torch.randn(200, 4), torch.randn(200, 4) + 1) > 10 * values.std()


def test_manifold_of_points_on_a_line():
    points = tensor([0], [1], [2], [10])  # radii at k=1: 1, 1, 1, 8
    queries = tensor([-1.01], [-1], [3], [4], [18], [18.01])
    assert in_manifold(points, queries, k=1).tolist() == [False, True, True, True, True, False]
    # At k=2 the radii are 2, 1, 2, 9.
    assert in_manifold(points, tensor([-2], [-2.01], [19]), k=2).tolist() == [True, False, True]


def test_precision_and_recall_of_lost_and_of_invented_modes():
    a, b, far = torch.randn(100, 2), torch.randn(100, 2) + 100, torch.randn(100, 2) - 100
    both = torch.cat([a, b])

    def both_ways(real, generated):
        return precision(real, generated), precision(generated, real)

    assert both_ways(both, a) == (1.0, 0.5)
    assert both_ways(a, both) == (0.5, 1.0)
    assert both_ways(both, both) == (1.0, 1.0)
    assert both_ways(both, far) == (0.0, 0.0)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 8)


def test_gaussian_is_the_same_from_blocks(small_blocks):
    x = 1e4 + torch.randn(61, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    mean, covariance = metrics.fit_gaussian(x)
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-14, atol=0)
    # Rounding of x itself, 1e4 * 2^-53 a value of about 1, moves products by 1e-12.
    np.testing.assert_allclose(covariance, np.cov(x.numpy(), rowvar=False), rtol=0, atol=1e-11)
    single = x.float()
    assert torch.equal(
        metrics.fit_gaussian(single).covariance, metrics.fit_gaussian(single.double()).covariance
    )


def test_frechet_distance_by_the_matrix_root_of_scipy():
    a, b = torch.randn(300, 40).relu() + 0.3, 1.2 * torch.randn(200, 40).relu()
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.numpy().mean(0, dtype=np.float64), np.cov(x.numpy(), rowvar=False)) for x in (a, b)
    )
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_kid_is_the_same_from_blocks(monkeypatch):
    a, b = torch.randn(45, 3), torch.randn(20, 3) + 0.2
    whole = kid(a, b), kid(a, a)
    monkeypatch.setattr(metrics, "BLOCK", 8)
    assert (kid(a, b), kid(a, a)) == pytest.approx(whole, rel=1e-12)
    # Of a set with itself the images are compared with themselves between the sets alone.
    assert kid(a, a) < 0


def test_kid_of_subsets():
    a, b = torch.randn(30, 6), torch.randn(30, 6)
    # All subsets are all images.
    mean, std = metrics.kid_of_subsets(a, b)
    assert mean == pytest.approx(kid(a, b), abs=1e-12) and std < 1e-12
    mean, std = metrics.kid_of_subsets(a, torch.cat([b, b + 1]))
    assert std > 1e-3
    random = np.random.RandomState(2020)  # torch-fidelity's
    drawn = [
        kid(a[random.choice(30, 30, False)], torch.cat([b, b + 1])[random.choice(60, 30, False)])
        for _ in range(100)
    ]
    assert (mean, std) == pytest.approx((np.mean(drawn), np.std(drawn)), rel=1e-12)


def test_manifolds_are_the_same_from_blocks(small_blocks):
    real = torch.randn(53, 2, dtype=torch.float64)
    generated = torch.randn(30, 2, dtype=torch.float64) * 0.7 + 0.5
    between = (generated[:, None] - real).norm(dim=2)
    real_radii, radii = (
        (x[:, None] - x).norm(dim=2).sort(1).values[:, 3] for x in (real, generated)
    )
    inside = (between <= real_radii).any(1)
    assert torch.equal(in_manifold(real, generated), inside) and 0 < inside.sum() < 30
    recall = float((between <= radii[:, None]).any(0).double().mean())
    expected = (float(inside.double().mean()), recall)
    assert (precision(real, generated), precision(generated, real)) == expected
    together = metrics.pairwise(real, generated)
    assert together[1:] == expected
    assert together.kid == pytest.approx(kid(real, generated), rel=1e-12)
    assert metrics.pairwise(real, real)[1:] == (1, 1)


@pytest.mark.parametrize("metric", [frechet_distance, kid, in_manifold, metrics.pairwise])
def test_no_matrix_of_all_images_is_made(metric, small_blocks):
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            results = result if isinstance(result, tuple) else (result,)
            sizes = [x.numel() for x in results if isinstance(x, torch.Tensor)]
            largest = max(largest, *sizes, 0)
            return result

    a, b = torch.randn(400, 2), torch.randn(300, 2)
    with Sizes():
        metric(a, b)
    assert a.numel() <= largest <= a.numel() * 2  # of a block 8 * 8, of neighbours 400 * 3


def test_inception_score():
    classes = 100 * torch.eye(4)
    sure = classes.repeat(5, 1)
    # p(y|x) is one class, p(y) all four alike.
    assert metrics.inception_score(sure, torch.eye(4)) == pytest.approx(4, rel=1e-12)
    assert metrics.inception_score(classes[:1].repeat(9, 1), torch.eye(4)) == pytest.approx(1)
    # Logits of 0 and ln 3, either way: KL of (1/4, 3/4) from (1/2, 1/2).
    unsure = torch.tensor([[0, 1.0], [1.0, 0]], dtype=torch.float64)
    entropy = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    weight = torch.eye(2, dtype=torch.float64) * np.log(3)
    assert metrics.inception_score(unsure, weight) == pytest.approx(np.exp(entropy), rel=1e-12)
    # Logits far apart leave probabilities of 0.
    assert metrics.inception_score(1e4 * sure, torch.eye(4)) == pytest.approx(4)


def test_inception_score_is_the_mean_over_splits_of_5000():
    a, b = 100 * torch.eye(2)
    in_order = torch.cat([a.repeat(5000, 1), b.repeat(5000, 1), a.repeat(7, 1)])
    assert metrics.inception_score(in_order, torch.eye(2)) == pytest.approx(1)
    mixed = torch.stack([a, b]).repeat(5000, 1)
    assert metrics.inception_score(mixed, torch.eye(2)) == pytest.approx(2)


@pytest.mark.parametrize("metric", [frechet_distance, kid, precision])
def test_metrics_refuse_wrong_shapes(metric):
    with pytest.raises(
        ValueError, match=r"must be \(n, D\) and \(m, D\), got \(9, 2\) and \(9, 3\)"
    ):
        metric(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="images in each set, got 1 and 9"):
        metric(torch.zeros(1, 2), torch.zeros(9, 2))


@pytest.mark.parametrize("metric", [frechet_distance, kid, precision])
def test_metrics_refuse_what_is_no_tensor(metric):
    for pair in ((torch.zeros(9, 2), np.zeros((9, 2))), (np.zeros((9, 2)), torch.zeros(9, 2))):
        with pytest.raises(TypeError, match=r"features must be tensors \(n, D\), got a ndarray"):
            metric(*pair)
    with pytest.raises(TypeError, match=r"of real numbers, got torch.complex64$"):
        metric(torch.zeros(9, 2), torch.zeros(9, 2, dtype=torch.complex64))


def test_a_distance_is_never_negative():
    features = torch.randn(40, 8, dtype=torch.float64)
    assert 0 <= frechet_distance(features, features) < 1e-5
    assert frechet_distance(torch.ones(4, 3), torch.ones(4, 3)) == 0


METRICS = [
    *(frechet_distance, kid, in_manifold, precision),
    *(metrics.pairwise, metrics.kid_of_subsets, metrics.inception_score),
]


@pytest.mark.parametrize("metric", METRICS)
def test_nan_is_an_error_in_every_metric(metric):
    features = torch.randn(8, 3, dtype=torch.float64)
    for value in (torch.nan, 1e160):  # whose square is infinite
        broken = features.clone()
        broken[2, 1] = value
        for pair in ((features, broken), (broken, features)):
            with pytest.raises(ValueError, match=r"must be finite in float32, but hold NaN or inf"):
                metric(*pair)


@pytest.mark.parametrize("count", [0, 1])
def test_a_gaussian_is_of_two_images(count):
    with pytest.raises(ValueError, match=f"^fit_gaussian: needs 2 images, got {count}$"):
        metrics.fit_gaussian(torch.zeros(count, 3))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_nan_is_an_error_in_gaussians(broken):
    features = torch.randn(8, 3)
    good = metrics.fit_gaussian(features)
    features[2, 1] = broken
    with pytest.raises(ValueError, match=r"^fit_gaussian: features must be finite, but hold NaN"):
        metrics.fit_gaussian(features)
    for name in ("mean", "covariance"):
        bad = good._replace(**{name: torch.full_like(getattr(good, name), broken)})
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="means and covariances must be finite, but hold"):
                metrics.gaussian_distance(*pair)


def test_inception_score_of_nothing():
    with pytest.raises(ValueError, match="needs 1 images in each set, got 0 and 4"):
        metrics.inception_score(torch.zeros(0, 4), torch.eye(4))
