"""The tolerances accept the right computation and reject every planted bug."""

import math

import pytest
import torch
from torch import Tensor

from numerics import assert_as_good_as, assert_rounded_once, normal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-6


def layer_norm(x: Tensor, *, eps: float = EPS, correction: int = 0, factor: float = 1.0) -> Tensor:
    """Layer norm with knobs for bugs: in float32 for 16-bit dtypes, rounded once."""
    wide = x if x.dtype == torch.float64 else x.float()
    variance = wide.var(-1, keepdim=True, correction=correction)
    y = (wide - wide.mean(-1, keepdim=True)) / (variance + eps).sqrt()
    return (factor * y).to(x.dtype)


def skip_last_row(y: Tensor, value: float) -> Tensor:
    y = y.clone()
    y[:, -1] = value
    return y


BUGS = {
    "wrong eps": lambda x: layer_norm(x, eps=10 * EPS),
    "no eps": lambda x: layer_norm(x, eps=0.0),
    "unbiased variance": lambda x: layer_norm(x, correction=1),
    "scale 0.1 % off": lambda x: layer_norm(x, factor=1.001),
    "last row left zero": lambda x: skip_last_row(layer_norm(x), 0.0),
    "last row left NaN": lambda x: skip_last_row(layer_norm(x), math.nan),
    "one element wrong": lambda x: layer_norm(x).index_put(
        [torch.tensor(0)] * 3, layer_norm(x)[0, 0, 0] * 1.05
    ),
}


@pytest.fixture(params=DTYPES)
def x(request: pytest.FixtureRequest) -> Tensor:
    # A standard deviation of 0.01 puts eps = 1e-6 at 1 % of the variance, where it can be seen.
    return (normal(4, 16, 48) * 0.01).to(DTYPES[request.param])


def test_the_right_norm_passes(x: Tensor) -> None:
    assert_rounded_once(layer_norm(x), layer_norm(x.double()), terms=x.shape[-1])


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_fails(x: Tensor, bug: str) -> None:
    with pytest.raises(AssertionError, match=r"relative L2 error|one element"):
        assert_rounded_once(BUGS[bug](x), layer_norm(x.double()), terms=x.shape[-1])


def test_rounding_in_between_fails() -> None:
    x = (normal(4, 16, 48) * 0.01).bfloat16()
    y = (x - x.mean(-1, keepdim=True)) * (x.var(-1, keepdim=True, correction=0) + EPS).rsqrt()
    with pytest.raises(AssertionError, match="relative L2 error"):
        assert_rounded_once(y, layer_norm(x.double()), terms=x.shape[-1])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return (q @ k.mT * scale).softmax(-1) @ v


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_as_good_as(dtype: torch.dtype) -> None:
    q, k, v = normal(3, 4, 32, 16, dtype=dtype)
    exact = softmax_attention(q.double(), k.double(), v.double(), 0.25)
    native = softmax_attention(q, k, v, 0.25)
    right = softmax_attention(q.float(), k.float(), v.float(), 0.25).to(dtype)
    assert_as_good_as(right, native, exact)
    wrong_scale = softmax_attention(q, k, v, 1 / 16)
    last_key_skipped = softmax_attention(q, k[:, :-1], v[:, :-1], 0.25)
    for wrong in (wrong_scale, last_key_skipped, skip_last_row(right, math.nan)):
        with pytest.raises(AssertionError, match="relative L2 error"):
            assert_as_good_as(wrong, native, exact)
