import pytest
import torch

from models import tiny_config
from msf import SamplingConfig
from msf.solver import evaluations, integrate

MEAN, STD = 0.7, 0.2


def gaussian_velocity(x, t, guided):
    """E[data - noise | x_t = x] for data of N(MEAN, STD^2)."""
    t = t.view(-1, 1)
    variance = (1 - t) ** 2 + (t * STD) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN), None


def settings(**fields):
    (stage,) = SamplingConfig(**fields).stages(tiny_config(levels=0))
    return stage


def error(solver, steps):
    # The flow maps noise z to MEAN + STD z exactly.
    noise = torch.linspace(-2, 2, 9)[:, None]
    x = integrate(gaussian_velocity, noise, settings(steps=steps, solver=solver))
    return (x - (MEAN + STD * noise)).abs().max()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solver_converges_to_the_gaussian_at_its_order(solver, order):
    ratio = error(solver, 32) / error(solver, 64)
    assert 2**order * 0.85 < ratio < 2**order * 1.15
    assert error(solver, 256) < 0.05 * 4 ** (1 - order)


def constant_velocity(calls):
    def velocity(x, t, guided):
        calls.append((round(float(t[0]), 6), guided))
        return torch.full_like(x, 3.0), torch.full_like(x, 1.0) if guided else None

    return velocity


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_guidance_extrapolates_from_the_unconditional_velocity(solver):
    sampling = settings(steps=8, guidance_scale=2.5, solver=solver)
    x = integrate(constant_velocity([]), torch.zeros(2, 3), sampling)
    assert torch.equal(x, torch.full((2, 3), 1 + 2.5 * (3 - 1)))


def test_outside_the_interval_the_unconditional_half_is_not_asked_for():
    calls = []
    sampling = settings(steps=4, guidance_scale=2.0, guidance_interval=(0.25, 0.5))
    x = integrate(constant_velocity(calls), torch.zeros(1, 2), sampling)
    assert calls == [(0.0, False), (0.25, True), (0.5, True), (0.75, False)]
    assert torch.equal(x, torch.full((1, 2), (3 + 5 + 5 + 3) / 4))


def test_guidance_scale_one_is_never_guided():
    calls = []
    integrate(constant_velocity(calls), torch.zeros(1, 2), settings(steps=2))
    assert [guided for _, guided in calls] == [False, False]


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_velocity_is_asked_for_as_often_as_said_and_never_at_the_end(solver):
    calls = []
    integrate(constant_velocity(calls), torch.zeros(1, 2), settings(steps=4, solver=solver))
    assert len(calls) == evaluations(4, solver)
    assert max(t for t, _ in calls) == 0.75
