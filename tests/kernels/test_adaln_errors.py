"""What adaLN refuses."""

from __future__ import annotations

import pytest

from msf_kernels import adaln_modulate, gate_residual, gate_residual_adaln
from numerics import normal

pytestmark = pytest.mark.operator("gate_residual_adaln")
x, y, row = normal(2, 3, 8), normal(2, 3, 8), normal(2, 8)
BAD = {
    "x is no tensor": (
        lambda: adaln_modulate(1.0, row, row),
        TypeError,
        "adaln_modulate: x must be a tensor, got float",
    ),
    "integers": (
        lambda: adaln_modulate(x.long(), row, row),
        TypeError,
        "adaln_modulate: x must be float64, float32, bfloat16 or float16, got int64",
    ),
    "x is 2-D": (
        lambda: adaln_modulate(row, row, row),
        ValueError,
        "adaln_modulate: x must be (B, N, D), got (2, 8)",
    ),
    "shift has another D": (
        lambda: adaln_modulate(x, row[:, :4], row),
        ValueError,
        "adaln_modulate: shift must be (B, D) = (2, 8), got (2, 4)",
    ),
    "scale has another B": (
        lambda: adaln_modulate(x, row, row.repeat(2, 1)),
        ValueError,
        "adaln_modulate: scale must be (B, D) = (2, 8), got (4, 8)",
    ),
    "y has another N": (
        lambda: gate_residual(x, y[:, :2], row),
        ValueError,
        "gate_residual: y must be (B, N, D) = (2, 3, 8), got (2, 2, 8)",
    ),
    "gate is 3-D": (
        lambda: gate_residual_adaln(x, y, row[:, None], row, row),
        ValueError,
        "gate_residual_adaln: gate must be (B, D) = (2, 8), got (2, 1, 8)",
    ),
    "float64 and float32": (
        lambda: gate_residual(x, y.float(), row),
        TypeError,
        "gate_residual: dtypes must agree, or be one 16-bit dtype and float32, "
        "got x float64, y float32, gate float64",
    ),
    "two 16-bit dtypes": (
        lambda: adaln_modulate(x.half(), row.bfloat16(), row.half()),
        TypeError,
        "adaln_modulate: dtypes must agree, or be one 16-bit dtype and float32, "
        "got x float16, shift bfloat16, scale float16",
    ),
    "y_bias has another D": (
        lambda: gate_residual(x, y, row, y_bias=row[0, :4]),
        ValueError,
        "gate_residual: y_bias must be (D,) = (8,), got (4,)",
    ),
    "y_bias has a batch": (
        lambda: gate_residual_adaln(x, y, row, row, row, y_bias=row),
        ValueError,
        "gate_residual_adaln: y_bias must be (D,) = (8,), got (2, 8)",
    ),
    "y_bias of another dtype": (
        lambda: gate_residual(x, y, row, y_bias=row[0].half()),
        TypeError,
        "gate_residual: y_bias must be float64 or float32, got float16",
    ),
    "eager rounding of a bias of another dtype": (
        lambda: gate_residual(
            x.half(), y.half(), row.half(), y_bias=row[0].float(), rounding="eager"
        ),
        TypeError,
        'gate_residual: with rounding="eager": y_bias must be float16, got float32',
    ),
    "eps is no number": (
        lambda: adaln_modulate(x, row, row, eps=None),
        TypeError,
        "adaln_modulate: eps must be a number, got NoneType",
    ),
    "eps is a bool": (
        lambda: adaln_modulate(x, row, row, eps=True),
        TypeError,
        "adaln_modulate: eps must be a number, got bool",
    ),
    "eps below zero": (
        lambda: adaln_modulate(x, row, row, eps=-1.0),
        ValueError,
        "adaln_modulate: eps must be at least 0 and finite, got -1.0",
    ),
    "eps that is no number of any size": (
        lambda: adaln_modulate(x, row, row, eps=float("nan")),
        ValueError,
        "adaln_modulate: eps must be at least 0 and finite, got nan",
    ),
    "another rounding": (
        lambda: adaln_modulate(x, row, row, rounding="bf16"),
        ValueError,
        "adaln_modulate: rounding must be one of fp32, eager, got 'bf16'",
    ),
    "another norm": (
        lambda: gate_residual_adaln(x, y, row, row, row, norm="batch"),
        ValueError,
        "gate_residual_adaln: norm must be one of layer, rms, got 'batch'",
    ),
    "eager rounding of two dtypes": (
        lambda: gate_residual(x.half(), y.half(), row.float(), rounding="eager"),
        TypeError,
        'gate_residual: with rounding="eager": gate must be float16, got float32',
    ),
    "another device": (
        lambda: adaln_modulate(x, row.to("meta"), row),
        ValueError,
        f"adaln_modulate: shift must be on the device of x, {x.device}, got meta",
    ),
}


@pytest.mark.parametrize(("call", "error", "line"), BAD.values(), ids=BAD)
def test_bad_input(call, error, line) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == line
