"""With rounding="eager" adaLN rounds where PyTorch does."""

from __future__ import annotations

import pytest
import torch

from msf_kernels import adaln_modulate, gate_residual, gate_residual_adaln
from numerics import DEVICE, WALK, normal

from .adaln import BF16, DTYPES, FP16, NORMS, eager_adaln, eager_gate, modulation

pytestmark = pytest.mark.operator("gate_residual_adaln")


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["fp32", "eager"])
def test_the_fused_pair_equals_the_two(
    dtypes: tuple[torch.dtype, torch.dtype], rounding: str
) -> None:
    dtype, other = dtypes
    if rounding == "eager":
        other = dtype
    x, y = normal(2, 5, 24, dtype=dtype), normal(2, 5, 24, dtype=other)
    gate, shift, scale = modulation(2, 24, other)
    y_bias = normal(24, dtype=other)
    x_out, h = gate_residual_adaln(x, y, gate, shift, scale, y_bias=y_bias, rounding=rounding)
    assert torch.equal(x_out, gate_residual(x, y, gate, y_bias=y_bias, rounding=rounding))
    assert torch.equal(h, adaln_modulate(x_out, shift, scale, rounding=rounding))


eager_dtypes = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])


@eager_dtypes
def test_eager_rounding_of_the_gate(dtype: torch.dtype) -> None:
    x, y, (gate, *_) = *normal(2, 3, 9, 64, dtype=dtype), modulation(3, 64, dtype)
    for y_bias in None, normal(64, dtype=dtype):
        expected = eager_gate(x, y, gate, y_bias)
        assert torch.equal(gate_residual(x, y, gate, y_bias=y_bias, rounding="eager"), expected)
        assert not torch.equal(gate_residual(x, y, gate, y_bias=y_bias), expected)


@eager_dtypes
@pytest.mark.parametrize("norm", NORMS)
def test_eager_rounding_of_the_norm_where_statistics_are_exact(
    dtype: torch.dtype, norm: str
) -> None:
    # Whole numbers of mean 0: sums below 2^24, the same in any order of summation.
    half = torch.randint(-127, 128, (3, 16, 32), device=DEVICE)
    x = torch.cat((half, -half), -1).to(dtype)
    shift, scale, _ = modulation(3, 64, dtype)
    expected = eager_adaln(x, shift, scale, norm=norm)
    assert torch.equal(adaln_modulate(x, shift, scale, rounding="eager", norm=norm), expected)
    assert not torch.equal(adaln_modulate(x, shift, scale, norm=norm), expected)


@eager_dtypes
@pytest.mark.parametrize("norm", NORMS)
def test_eager_rounding_of_the_norm(dtype: torch.dtype, norm: str) -> None:
    # Statistics summed in another order differ by some sqrt(D) * 2^-24, which takes a normalised
    # value across a rounding border, of which there is one in every `eps`, that seldom.
    channels = 384
    x = normal(2, 16, channels, dtype=dtype)
    shift, scale, _ = modulation(2, channels, dtype)
    got = adaln_modulate(x, shift, scale, rounding="eager", norm=norm)
    share = (got != eager_adaln(x, shift, scale, norm=norm)).double().mean().item()
    assert share <= 2 * WALK * channels**0.5 * 2**-24 / (torch.finfo(dtype).eps / 2)
