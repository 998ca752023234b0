"""What is special to attention in Triton: tiles, GPUs without wgmma, what it declines."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from msf_kernels import rope_2d
from msf_kernels.attention import reference
from msf_kernels.qk_norm_rope.examples import preparation
from numerics import DEVICE, assert_as_good_as, normal

pytest.importorskip("triton", minversion="3.5")
from msf_kernels.attention import triton as attention_triton
from msf_kernels.attention.triton_tile import Tile, pieces
from msf_kernels.triton_support import ptxas

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("grid", "head_dim"),
    [*((grid, dim) for grid in ((3, 7), (8, 10)) for dim in (64, 72, 96)), ((14, 15), 72)],
    ids=str,
)
def test_attention_of_gpus_without_wgmma(
    grid: tuple[int, int], head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_triton, "has_wgmma", lambda device: False)
    weights = {f"{x}_weight": (1 + 0.3 * normal(head_dim)).float() for x in "qk"}
    qkv, grad = (normal(1, grid[0] * grid[1], n * head_dim, dtype=torch.bfloat16) for n in (3, 1))
    given = preparation(1, **weights, rope=rope_2d(*grid, head_dim, device=DEVICE))

    def results(module: Any, qkv: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        outputs = module.attention(qkv, *given)
        return *outputs, *module.attention_backward(grad, *outputs, qkv, *given)

    native = results(reference, qkv, grad)
    exact = results(reference, qkv.double(), grad.double())
    got = results(attention_triton, qkv, grad)
    for tensors in zip(got, native, exact, strict=True):
        if tensors[0].numel():  # there are no biases
            assert_as_good_as(*tensors)


@pytest.mark.parametrize("wgmma", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_tiles_cover_all_tokens(element_size: int, backward: bool, wgmma: bool) -> None:
    for tokens in (1, 15, 16, 17, 64, 80, 100, 115, 192, 193, 256, 272, 273, 300, 1024):
        tile = Tile.of(tokens, 72, 8, element_size, backward, wgmma)
        covered = tile.steps * tile.step + tile.rest
        assert tokens <= covered < tokens + max(16, tile.step)
        assert tile.masked == (covered > tokens) and tile.rest < tile.step
        assert tile.block == 16 or tile.block < 2 * tokens


def test_pieces_cover_all_channels_and_waste_little() -> None:
    for channels in range(1, 300):
        cut = pieces(channels)
        firsts, widths = zip(*cut, strict=True)
        assert firsts == tuple(sum(widths[:i]) for i in range(len(widths)))
        assert list(widths) == sorted(set(widths), reverse=True) and len(cut) <= 2
        assert channels <= sum(widths) < channels + max(16, channels / 3)
    assert pieces(64) == ((0, 64),) and pieces(72) == ((0, 64), (64, 16))


@pytest.mark.parametrize("backward", [False, True])
def test_which_heads_are_whole_in_a_program(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wgmma in (False, True):
        monkeypatch.setattr(attention_triton, "has_wgmma", lambda device, wgmma=wgmma: wgmma)
        for tokens, dtype, norm in (
            *((64, BF16, "rms"), (65, BF16, "rms"), (64, torch.float32, "rms")),
            (64, BF16, "layer"),
        ):
            x, given = torch.empty(1, tokens, 2, 8, dtype=dtype), preparation(2, norm=norm)
            whole = (tokens, dtype, norm) == (64, BF16, "rms") and (wgmma or not backward)
            assert attention_triton.fits_whole(x, given, backward) == whole


def test_attention_of_a_gpu_has_a_largest_head_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_triton, "interpreted", lambda: False)
    line = "head_dim is at most 128, got 136"
    for dim, reason in {128: None, 136: line}.items():
        qkv = torch.empty(1, 2, 3 * 2 * dim)
        assert attention_triton.unsupported_reason(qkv, 2) == reason


def test_attention_needs_an_assembler_that_gets_wgmma_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_triton, "interpreted", lambda: False)
    monkeypatch.setattr(attention_triton, "WGMMA_UNSUPPORTED_REASON", "ptxas 12.8 is too old")
    for wgmma, reason in {False: None, True: "ptxas 12.8 is too old"}.items():
        monkeypatch.setattr(attention_triton, "has_wgmma", lambda device, wgmma=wgmma: wgmma)
        assert attention_triton.unsupported_reason(torch.empty(1, 2, 48), 2) == reason


@pytest.mark.parametrize(
    ("own", "newer", "named", "chosen"),
    [
        ("12.9", "13.4", False, None),
        ("12.8", "12.9", False, "newer"),
        ("12.8", "12.9", True, None),
        ("12.8", "12.8", False, None),
        ("12.8", None, False, None),
    ],
)
def test_the_newer_assembler_is_chosen_where_the_other_is_too_old(
    own: str, newer: str | None, named: bool, chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia = SimpleNamespace(ptxas=SimpleNamespace(version=own, path="own"))
    if newer:
        nvidia.ptxas_blackwell = SimpleNamespace(version=newer, path="newer")
    monkeypatch.setattr(ptxas, "knobs", SimpleNamespace(nvidia=nvidia))
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    if named:
        monkeypatch.setenv("TRITON_PTXAS_PATH", "own")
    before, reason = nvidia.ptxas, ptxas.choose()
    assert nvidia.ptxas == (chosen or before)
    if own == "12.9" or chosen:
        assert reason is None
    else:
        line = "ptxas 12.8 gets products on this GPU wrong: set TRITON_PTXAS_PATH to that of CUDA"
        assert reason == f"{line} 12.9 or later"
