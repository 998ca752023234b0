"""Tolerances that follow from the arithmetic. `exact` is always a float64 result.

All errors are relative L2: |got - exact| / |exact|.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# A sum of n rounded terms errs by about sqrt(n) * eps (a random walk); 4 is the factor for unlucky
# draws and for the few operations after the sum.
WALK = 4


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE).to(dtype)


def exactly(*tensors: Tensor) -> list[Tensor]:
    """The same numbers in float64, to compute the exact result and its gradients from."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def relative_error(got: Tensor, exact: Tensor) -> float:
    norm = exact.norm().item()
    return (got.double() - exact).norm().item() / (norm or 1.0)


def rounding_error(exact: Tensor, dtype: torch.dtype) -> float:
    """The error of the best possible answer in `dtype`."""
    return relative_error(exact.to(dtype), exact)


def assert_rounded_once(
    got: Tensor, exact: Tensor, *, terms: int = 1, condition: float = 1.0
) -> None:
    """`got` was computed in float32 (float64 for float64) and rounded once.

    Its error is at most 5 % more than that of rounding the exact answer, plus that of float32 sums
    of `terms` terms, which a subtraction before them may amplify by `condition`. Besides, no
    single element may be further off than its last bit and the error of those sums.
    """
    assert got.shape == exact.shape
    compute = torch.float64 if got.dtype == torch.float64 else torch.float32
    arithmetic = WALK * math.sqrt(terms) * condition * torch.finfo(compute).eps
    error, bound = relative_error(got, exact), 1.05 * rounding_error(exact, got.dtype) + arithmetic
    assert error <= bound, f"relative L2 error {error:.3e} exceeds {bound:.3e}"
    if exact.numel():
        last_bit = torch.finfo(got.dtype).eps * (exact.abs() + torch.finfo(got.dtype).tiny)
        excess = (got.double() - exact).abs() - last_bit - arithmetic * exact.abs().max()
        assert (excess <= 0).all(), f"one element is {excess.max():.3e} beyond its last bit"


def assert_as_good_as(got: Tensor, native: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The error of `got` is at most `factor` times that of PyTorch at the same dtype."""
    assert got.shape == exact.shape and got.dtype == native.dtype
    floor = max(relative_error(native, exact), rounding_error(exact, got.dtype))
    error = relative_error(got, exact)
    assert error <= factor * floor, f"relative L2 error {error:.3e} exceeds {factor} x {floor:.3e}"


def assert_sum_as_good_as(got: Tensor, exact: Tensor, terms: Tensor, exact_terms: Tensor) -> None:
    """`got` is a sum over terms whose errors are those of PyTorch's, `terms`.

    Independent errors walk at random, so that of the sum is about as long as that of all terms
    together. It has few directions, often one, where the terms share an error: so this is no ratio
    to the error of PyTorch's own sum, which one lucky draw makes small.
    """
    assert got.shape == exact.shape
    bound = WALK * (terms.double() - exact_terms).norm() + torch.finfo(got.dtype).eps * exact.norm()
    error = (got.double() - exact).norm()
    assert error <= bound, f"L2 error {error:.3e} exceeds {bound:.3e}"
