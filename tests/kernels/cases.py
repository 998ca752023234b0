"""One small call of every operator and option, for the checks that all operators share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import msf_kernels as msf
from numerics import DEVICE, normal


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[..., Any]  # takes the inputs that a gradient would be of
    shapes: tuple[tuple[int | str, ...], ...]  # of these inputs; "B" is the batch size
    gradient: bool = True  # whether the operator has one

    @property
    def op(self) -> str:
        return self.name.split("-")[0]

    def inputs(self, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
        sizes = ([batch if size == "B" else size for size in shape] for shape in self.shapes)
        return [normal(*shape, dtype=dtype).requires_grad_(self.gradient) for shape in sizes]

    def outputs(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        result = self.call(*inputs)
        return (result,) if isinstance(result, Tensor) else result


ROPE = msf.rope_2d(2, 3, 4, device=DEVICE)


def _eager(op: Callable[..., Any]) -> Callable[..., Any]:
    return partial(op, rounding="eager")


def _attention(qkv: Tensor, q: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    return msf.attention(qkv, num_heads=2, q_weight=q, k_weight=k)


def _rotated(qkv: Tensor, q: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    return msf.attention(qkv, num_heads=2, q_weight=q, k_weight=k, rope=ROPE)


def _prepared(
    qkv: Tensor, q: Tensor | None = None, k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return msf.qk_norm_rope(qkv, num_heads=2, q_weight=q, k_weight=k, rope=ROPE)


def _merge(mode: str, mean: bool = False, std: bool = False) -> Callable[..., Tensor]:
    def merge(base: Tensor, residual: Tensor) -> Tensor:
        return msf.pyramid_merge(
            base,
            residual,
            mode=mode,
            mean=STATISTICS if mean else None,
            std=STATISTICS if std else None,
        )

    return merge


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    return msf.pyramid_split(x, mode="bilinear", mean=STATISTICS, std=STATISTICS)


def _tokens(base: Tensor, skip: Tensor, position: Tensor | None = None) -> Tensor:
    return msf.merge_tokens(base, skip, position, grid=(2, 3))


def _interpolate(data: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    t = torch.linspace(0.1, 0.8, data.shape[0], device=DEVICE)
    return msf.flow_interpolate(data, noise, t)


def _euler(x: Tensor, v_cond: Tensor, v_uncond: Tensor) -> Tensor:
    return msf.guided_euler_step(x, v_cond, v_uncond, *TABLE[1])


def _heun_of_tokens(x: Tensor, v_cond: Tensor, v_uncond: Tensor, start: Tensor) -> Tensor:
    scale, dt = TABLE.unbind(1)
    return msf.guided_euler_step(x, v_cond, v_uncond, scale, dt, step=STEP, start=start, patch=2)


def _last_step(x: Tensor, v_cond: Tensor, v_uncond: Tensor, base: Tensor) -> Tensor:
    return msf.guided_euler_merge(x, v_cond, v_uncond, *TABLE[1], base)


def _last_step_of_tokens(x: Tensor, v_cond: Tensor, v_uncond: Tensor, base: Tensor) -> Tensor:
    statistics = {"mean": STATISTICS, "std": STATISTICS}
    merge = {"mode": "bilinear", "clamp": (-1.0, 1.0), **statistics}
    scale, dt = TABLE.unbind(1)
    return msf.guided_euler_merge(x, v_cond, v_uncond, scale, dt, base, step=STEP, patch=2, **merge)


# Made once, because a graph cannot capture a copy from the host.
TABLE, STEP = torch.tensor([[1.0, 0.5], [3.0, 0.25]], device=DEVICE), torch.tensor(1, device=DEVICE)
STATISTICS = torch.tensor([0.5, 2.0, -1.5], device=DEVICE)
ROWS, BROADCAST, TOKENS = ("B", 5), (1, 5), ("B", 3, 5)
QKV, WEIGHT = ("B", 6, 24), (4,)
HALF, FULL, PATCHES = ("B", 3, 2, 3), ("B", 3, 4, 6), ("B", 6, 12)
COARSE, FINE = ("B", 6, 20), ("B", 24, 5)

CASES = [
    Case("adaln_modulate", msf.adaln_modulate, (TOKENS, ROWS, ROWS)),
    Case("adaln_modulate-broadcast", msf.adaln_modulate, (TOKENS, BROADCAST, BROADCAST)),
    Case("adaln_modulate-eager", _eager(msf.adaln_modulate), (TOKENS, ROWS, ROWS)),
    Case("gate_residual", msf.gate_residual, (TOKENS, TOKENS, ROWS)),
    Case("gate_residual-broadcast", msf.gate_residual, (TOKENS, TOKENS, BROADCAST)),
    Case("gate_residual-eager", _eager(msf.gate_residual), (TOKENS, TOKENS, ROWS)),
    Case("gate_residual_adaln", msf.gate_residual_adaln, (TOKENS, TOKENS, ROWS, ROWS, ROWS)),
    Case(
        "gate_residual_adaln-broadcast",
        msf.gate_residual_adaln,
        (TOKENS, TOKENS, BROADCAST, ROWS, BROADCAST),
    ),
    Case(
        "gate_residual_adaln-eager",
        _eager(msf.gate_residual_adaln),
        (TOKENS, TOKENS, ROWS, ROWS, ROWS),
    ),
    Case("attention", _attention, (QKV,)),
    Case("attention-rope", _rotated, (QKV,)),
    Case("attention-q_norm", _attention, (QKV, WEIGHT)),
    Case("attention-k_norm", lambda qkv, k: _attention(qkv, None, k), (QKV, WEIGHT)),
    Case("attention-norm-rope", _rotated, (QKV, WEIGHT, WEIGHT)),
    Case("qk_norm_rope", _prepared, (QKV, WEIGHT, WEIGHT)),
    Case("qk_norm_rope-rope", _prepared, (QKV,)),
    Case("qk_norm_rope-q_norm", _prepared, (QKV, WEIGHT)),
    Case(
        "qk_norm_rope-k_norm",
        lambda qkv, k: msf.qk_norm_rope(qkv, num_heads=2, k_weight=k),
        (QKV, WEIGHT),
    ),
    Case("pyramid_split-nearest", msf.pyramid_split, (FULL,)),
    Case("pyramid_split-bilinear", lambda x: msf.pyramid_split(x, mode="bilinear"), (FULL,)),
    Case("pyramid_split-standardised", _split, (FULL,)),
    Case("pyramid_merge-nearest", _merge("nearest"), (HALF, FULL)),
    Case("pyramid_merge-nearest-mean", _merge("nearest", mean=True), (HALF, FULL)),
    Case("pyramid_merge-bilinear", _merge("bilinear", mean=True, std=True), (HALF, FULL)),
    Case("merge_tokens", _tokens, (COARSE, FINE)),
    Case("merge_tokens-position", _tokens, (COARSE, FINE, (24, 5))),
    Case("flow_interpolate", _interpolate, (FULL, FULL)),
    Case("guided_euler_step", _euler, (FULL, FULL, FULL)),
    Case("guided_euler_step-tokens", _heun_of_tokens, (FULL, PATCHES, PATCHES, FULL)),
    Case(
        "guided_euler_step-floats",
        lambda x, v_cond, v_uncond: msf.guided_euler_step(x, v_cond, v_uncond, 3.0, 0.25),
        (FULL, FULL, FULL),
    ),
    Case(
        "guided_euler_step-unguided",
        lambda x, v: msf.guided_euler_step(x, v, None, 3.0, 0.25),
        (FULL, FULL),
    ),
    Case("guided_euler_merge", _last_step, (FULL, FULL, FULL, HALF), gradient=False),
    Case(
        "guided_euler_merge-tokens",
        _last_step_of_tokens,
        (FULL, PATCHES, PATCHES, HALF),
        gradient=False,
    ),
]
