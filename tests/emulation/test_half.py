"""__half and __nv_bfloat16 convert bit for bit as torch does on the CPU.

A NaN stays a NaN, whose bits are CUDA's; those of torch depend on the CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .semantics import launch

FORMATS = [("half", torch.float16), ("bfloat16", torch.bfloat16)]


def run(kernel: str, values: Tensor, out: Tensor) -> Tensor:
    assert values.numel() % 1024 == 0
    launch(kernel, values, out, grid=(values.numel() // 1024,), block=(1024,))
    return out


def patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit format, ascending from the smallest of each sign."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize(("name", "dtype"), FORMATS)
def test_all_patterns_to_float(name: str, dtype: torch.dtype) -> None:
    values = patterns(dtype)
    got, exact = run(f"widen_{name}", values, torch.empty(2**16)), values.float()
    numbers = ~exact.isnan()
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got.view(torch.int32)[numbers], exact.view(torch.int32)[numbers])


@pytest.mark.parametrize(("name", "dtype"), FORMATS)
def test_float_to_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    numbers = patterns(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    ties = ((numbers[1:] + numbers[:-1]) / 2).float()  # halfway between neighbours
    around = [ties, *(ties.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf))]
    special = torch.tensor([0.0, -0.0, 65504, 65519.996, 65520, 1e30, 3.4e38, 1e-45, -1e-45])
    edges = torch.cat([special, torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan])])
    random = torch.randint(-(2**31), 2**31, (2**17,)).to(torch.int32).view(torch.float32)
    values = torch.cat([numbers.float(), *around, edges, random])
    values = torch.cat([values, torch.zeros(-values.numel() % 1024)])

    got = run(f"narrow_{name}", values, torch.empty(values.numel(), dtype=dtype))
    exact = values.to(dtype)
    assert torch.equal(got.isnan(), values.isnan())
    assert (got.view(torch.int16)[got.isnan()] == 0x7FFF).all()
    differ = got.view(torch.int16) != exact.view(torch.int16)
    assert not values[differ & ~values.isnan()].tolist()
