"""What is special to attention in CUDA: what it is built for, heads that do not fit a block."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import msf_kernels
from msf_kernels import attention, rope_2d
from msf_kernels.attention import cuda, reference
from msf_kernels.cuda_support import extension
from msf_kernels.qk_norm_rope import cuda as qk_norm_rope
from msf_kernels.qk_norm_rope.examples import preparation
from msf_kernels.qk_norm_rope.preparation import Preparation
from numerics import (
    DEVICE,
    WALK,
    assert_as_good_as,
    assert_sum_as_good_as,
    normal,
    relative_error,
)

from .emulated import emulated

BF16, FP16 = torch.bfloat16, torch.float16
FORWARD_ALONE = 45_000  # bytes of shared memory, in which 80 tokens fit forward and not backward
STREAMED = 20_000


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module itself, below the choice of backends."""
    if DEVICE == "cpu":
        monkeypatch.setattr(extension, "emulation", emulated())


def limit(bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "shared_memory", lambda device: bytes_)


def drawn(
    grid: tuple[int, int], dim: int, names: str, dtype: torch.dtype, heads: int = 1
) -> Preparation:
    """A bias (b), norm weights (q and k) and rope, if `names` has them; LayerNorms' biases (l)."""
    made: dict[str, Any] = {}
    if "b" in names:
        made["qkv_bias"] = normal(3 * heads * dim, dtype=dtype)
    for name in "qk":
        if name in names:
            made[f"{name}_weight"] = (1 + 0.3 * normal(dim)).to(dtype)
            if "l" in names:
                made[f"{name}_norm_bias"] = normal(dim, dtype=dtype)
    if "r" in names:
        made["rope"] = rope_2d(*grid, dim, device=DEVICE)
    return preparation(heads, norm="layer" if "l" in names else "rms", **made)


def check_forward(qkv: Tensor, given: Preparation) -> tuple[Tensor, Tensor]:
    heads = given.num_heads
    got = cuda.attention(qkv, *given)
    native = reference.attention(qkv, *given)
    exact = reference.attention(qkv.double(), *given)
    assert_as_good_as(got[0], native[0], exact[0])
    # A logsumexp is as good as that of float32 sums of d products; PyTorch's may be exact by luck.
    arithmetic = WALK * (qkv.shape[2] / (3 * heads)) ** 0.5 * torch.finfo(torch.float32).eps
    error, floor = (relative_error(found[1], exact[1]) for found in (got, native))
    assert error <= 2 * floor + arithmetic
    return got


def check(qkv: Tensor, given: Preparation) -> None:
    out, logsumexp = check_forward(qkv, given)
    grad = normal(*out.shape, dtype=out.dtype)
    if cuda.unsupported_reason(qkv, given.num_heads, grad):
        return

    def gradients(module: Any, qkv: Tensor, grad: Tensor, *outputs: Tensor) -> list[Tensor]:
        found = module.attention_backward(grad, *outputs, qkv, *given)
        return [*found[0].chunk(3, -1), *(each for each in found[1:] if each.numel())]

    wide, exact_outputs = qkv.double(), reference.attention(qkv.double(), *given)
    got = gradients(cuda, qkv, grad, out, logsumexp)
    native = gradients(reference, qkv, grad, *reference.attention(qkv, *given))
    exact = gradients(reference, wide, grad.double(), *exact_outputs)
    for results in zip(got[:3], native, exact, strict=False):
        assert_as_good_as(*results)
    for one, right in zip(got[3:], exact[3:], strict=True):
        assert_sum_as_good_as(one, right, torch.cat(native[:3]), torch.cat(exact[:3]))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "names", ["", "b", "q", "k", "r", "qk", "kr", "qkr", "bqkr", "lk", "lbqkr"]
)
def test_what_q_and_k_pass(names: str, dtype: torch.dtype) -> None:
    qkv = normal(2, 24, 3 * 2 * 72, dtype=dtype)
    for weights in (dtype, torch.float32):
        check(qkv, drawn((4, 6), 72, names, weights, heads=2))


@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("names", ["", "bqkr"])
def test_every_head_dim_it_is_built_for(dim: int, names: str) -> None:
    # 37 tokens are two tiles of 16 and a part; 130 a second turn of a block's warps.
    for tokens in (37, 130):
        qkv = normal(1, tokens, 3 * dim, dtype=BF16)
        check(qkv, drawn((1, tokens), dim, names, torch.float32))


@pytest.mark.skipif(DEVICE == "cuda", reason="the emulation counts its products")
@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize("tokens", [16, 80, 256])
def test_no_product_is_padded(tokens: int, dim: int) -> None:
    qkv, flops = normal(1, tokens, 3 * dim, dtype=BF16), emulated().matrix_flops
    flops()
    out, logsumexp = cuda.attention(qkv, *preparation(1))
    product = 2 * tokens**2 * dim
    assert flops() == 2 * product
    if cuda.unsupported_reason(qkv, 1, out) is None:
        cuda.attention_backward(out, out, logsumexp, qkv, *preparation(1))
        assert flops() == 7 * product


@pytest.mark.parametrize(("dtype", "size"), [(FP16, 1.6), (BF16, 4.0)], ids=["fp16", "bf16"])
def test_scores_that_are_all_low(dtype: torch.dtype, size: float) -> None:
    """A key beyond the last would have a score of 0, and so exp(-logsumexp) for its weight."""
    q, k, v = normal(3, 1, 24, 72)
    check(torch.cat((0.1 * q - size, 0.1 * k + size, v), -1).to(dtype), preparation(1))


@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
@pytest.mark.parametrize(("names", "dtype"), [("", BF16), ("bqkr", FP16)], ids=["bf16", "fp16"])
def test_keys_that_stream(
    dim: int, names: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that do not fit a block: their keys arrive 64 at a time, for at most 128 queries."""
    limit(STREAMED, monkeypatch)
    for tokens in (128, 129, 300):
        assert not extension.kernels().attention_fits((1, tokens, 2, dim), STREAMED)
        qkv = normal(1, tokens, 3 * 2 * dim, dtype=dtype) * (1 if names else 4)
        check_forward(qkv, drawn((1, tokens), dim, names, torch.float32, heads=2))


@pytest.mark.parametrize("dim", cuda.HEAD_DIMS)
def test_q_and_k_are_prepared_bit_for_bit_as_by_qk_norm_rope(dim: int) -> None:
    """So a backward of another backend, which prepares them with that, sees what this has seen."""
    qkv = normal(2, 40, 3 * 2 * dim, dtype=BF16)
    given = drawn((4, 10), dim, "bqkr", torch.float32, heads=2)
    given.qkv_bias[4 * dim :] = 0  # that of v
    q, k = qk_norm_rope.qk_norm_rope(qkv, *given)
    prepared = torch.cat((q.flatten(2), k.flatten(2), qkv[..., 4 * dim :]), -1)
    no_angles = torch.stack((torch.ones(40, dim // 2), torch.zeros(40, dim // 2))).to(DEVICE)
    expected = cuda.attention(prepared, *preparation(2, rope=no_angles))
    assert all(map(torch.equal, cuda.attention(qkv, *given), expected))


def test_streamed_and_whole_heads_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without norm and rotation they do the same in the same order."""
    qkv = normal(2, 100, 3 * 2 * 72, dtype=BF16) * 3
    whole = cuda.attention(qkv, *preparation(2))
    limit(STREAMED, monkeypatch)
    assert all(map(torch.equal, cuda.attention(qkv, *preparation(2)), whole))


def test_what_it_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(dtype: torch.dtype, dim: int, **options: Any) -> str | None:
        return cuda.unsupported_reason(torch.empty(1, 80, 3 * 2 * dim, dtype=dtype), 2, **options)

    for dtype, dim in product((BF16, FP16), cuda.HEAD_DIMS):
        assert reason(dtype, dim) is None and reason(dtype, dim, grad=torch.empty(())) is None
    assert reason(torch.float32, 64) == "it takes bfloat16 and float16, got torch.float32"
    line = "head_dim must be one of 32, 64, 72, 80, 96, 128, got 40"
    assert reason(BF16, 40) == line
    limit(FORWARD_ALONE, monkeypatch)
    assert reason(BF16, 72) is None
    line = "80 tokens of head_dim 72 do not fit 45000 bytes of shared memory"
    assert reason(BF16, 72, grad=torch.empty(())) == line


def test_a_declined_backward_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(FORWARD_ALONE, monkeypatch)
    qkv = normal(1, 80, 3 * 72, dtype=BF16).requires_grad_()
    with msf_kernels.backend("cuda"):
        out = attention(qkv, num_heads=1)
        with pytest.raises(msf_kernels.BackendUnavailable, match="80 tokens of head_dim 72 do not"):
            out.sum().backward()


def test_outputs_are_repeatable_bit_for_bit() -> None:
    qkv = normal(2, 70, 3 * 2 * 72, dtype=BF16)
    given = drawn((7, 10), 72, "bqkr", torch.float32, heads=2)
    out, logsumexp = cuda.attention(qkv, *given)
    grad = torch.randn_like(out)
    first, second = (cuda.attention_backward(grad, out, logsumexp, qkv, *given) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_strided_inputs_and_gradients() -> None:
    wide = normal(2, 9, 500, dtype=BF16)
    views = (
        wide[..., 2:434],
        wide.mT.contiguous().mT[..., :432],
        wide[:1, :, :432].expand(3, 9, 432),
    )
    for qkv in views:
        results = []
        for x in (qkv, qkv.contiguous()):
            x = x.detach().requires_grad_()
            with msf_kernels.backend("cuda"):
                out = attention(x, num_heads=2)
                one = torch.ones((), dtype=BF16, device=DEVICE).expand_as(out)
                results.append((out, *torch.autograd.grad(out, x, one)))
        assert all(map(torch.equal, *results))


def test_the_operator() -> None:
    weight = torch.ones(32, device=DEVICE, requires_grad=True)
    qkv = normal(2, 5, 3 * 2 * 32, dtype=BF16).requires_grad_()
    with msf_kernels.backend("cuda"):
        given = preparation(2, q_weight=weight)
        torch.library.opcheck(torch.ops.msf.attention.default, (qkv, *given))
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        options = {"num_heads": 2, "q_weight": weight}
        assert torch.equal(compiled(qkv, **options), attention(qkv, **options))


def test_empty_batch() -> None:
    qkv, weight = normal(0, 5, 3 * 64, dtype=BF16), torch.ones(64, device=DEVICE)
    bias = torch.ones(3 * 64, device=DEVICE)
    given = preparation(1, qkv_bias=bias, q_weight=weight)
    out, logsumexp = cuda.attention(qkv, *given)
    assert out.shape == (0, 5, 64) and logsumexp.shape == (0, 1, 5)
    found = cuda.attention_backward(out, out, logsumexp, qkv, *given)
    assert found[0].shape == qkv.shape and not found[1].any() and not found[2].any()
