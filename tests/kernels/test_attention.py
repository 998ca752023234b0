from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from msf_kernels import attention, rope_2d
from numerics import DEVICE, WALK, assert_as_good_as, assert_sum_as_good_as, normal
from pairwise import pairwise

pytestmark = pytest.mark.operator("attention")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def eager_rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Multiply the complex numbers x_i + j x_(i + d/2) by exp(j angle)."""
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(*rope.double())
    return torch.cat((turned.real, turned.imag), -1).to(x.dtype)


def eager_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, norm: str
) -> Tensor:
    if weight is None:
        return x
    if norm == "rms":
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias, eps)


def eager_attention(
    qkv: Tensor,
    num_heads: int,
    qkv_bias: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    rope: Tensor | None = None,
    eps: float = 1e-6,
    norm: str = "rms",
) -> Tensor:
    if qkv_bias is not None:
        qkv = qkv + qkv_bias.to(qkv.dtype)
    batch, tokens, width = qkv.shape
    head_dim = width // (3 * num_heads)
    q, k, v = (
        part.reshape(batch, tokens, num_heads, head_dim).transpose(1, 2)
        for part in qkv.chunk(3, -1)
    )
    q = eager_norm(q, q_weight, q_norm_bias, eps, norm)
    k = eager_norm(k, k_weight, k_norm_bias, eps, norm)
    if rope is not None:
        q, k = eager_rotate(q, rope), eager_rotate(k, rope)
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(batch, tokens, num_heads * head_dim)


def run(
    call, inputs: list[Tensor], grad: Tensor, names=("q_weight", "k_weight"), **options
) -> tuple[Tensor, ...]:
    """Output and gradients of call(qkv, ...) in the dtypes of qkv and the inputs of these names."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    parameters = dict(zip(names, inputs[1:], strict=False))
    out = call(inputs[0], **parameters, **options)
    return out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def check(inputs: list[Tensor], **options) -> None:
    batch, tokens, width = inputs[0].shape
    grad = normal(batch, tokens, width // 3, dtype=inputs[0].dtype)
    exact = run(eager_attention, [tensor.double() for tensor in inputs], grad, **options)
    native = run(eager_attention, inputs, grad, **options)
    got = run(attention, inputs, grad, **options)
    for results in zip(got[:2], native, exact, strict=False):
        assert_as_good_as(*results)
    for one, right in zip(got[2:], exact[2:], strict=True):
        assert_sum_as_good_as(one, right, native[1], exact[1])


# Grid, heads, head_dim: N not a multiple of 16, batch 1, a head_dim that is no power of two.
@pytest.mark.parametrize(
    ("batch", "grid", "heads", "head_dim"),
    [(2, (4, 4), 2, 32), (3, (1, 2), 2, 8), (1, (3, 7), 3, 36), (1, (8, 8), 2, 64)],
    ids=lambda value: str(value).replace(" ", ""),
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_attention(batch, grid, heads, head_dim, dtype) -> None:
    inputs = [normal(batch, grid[0] * grid[1], 3 * heads * head_dim, dtype=dtype)]
    inputs += [(1 + 0.3 * normal(head_dim)).float() for _ in range(2)]
    check(inputs, num_heads=heads, rope=rope_2d(*grid, head_dim, device=DEVICE))


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("rotary", [False, True], ids=["", "rope"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_options(norm, rotary, dtype) -> None:
    inputs = [normal(1, 18, 3 * 2 * 36, dtype=dtype)]
    if norm:
        inputs += [(1 + 0.3 * normal(36)).float() for _ in range(2)]
    check(inputs, num_heads=2, rope=rope_2d(3, 6, 36, device=DEVICE) if rotary else None)


# N of one tile of every kernel, of more, and of some left over; heads in one piece or two. In 16
# bits the kernels of 25 tokens prepare q and k themselves but for LayerNorm, and those of 80 read
# them prepared.
@pairwise(
    grid_and_dtype=[
        ((5, 5), torch.bfloat16),
        ((8, 10), torch.float16),
        ((8, 10), torch.float32),
    ],
    head_dim=(32, 36, 72),
    norm_and_rotary=[(norm, rotary) for norm in ("", "rms", "layer") for rotary in (False, True)],
)
def test_bias(grid_and_dtype, head_dim, norm_and_rotary) -> None:
    (grid, dtype), (norm, rotary) = grid_and_dtype, norm_and_rotary
    weights = ("q_weight", "k_weight") if norm else ()
    biases = ("q_norm_bias", "k_norm_bias") if norm == "layer" else ()
    heads, names = 2, ("qkv_bias", *weights, *biases)
    batch = 2 if grid == (5, 5) else 1  # interpreted, 80 tokens take long
    qkv = normal(batch, grid[0] * grid[1], 3 * heads * head_dim, dtype=dtype)
    inputs = [qkv, normal(3 * heads * head_dim, dtype=torch.float32)]
    inputs += [(1 + 0.3 * normal(head_dim)).float() for _ in weights]
    inputs += [normal(head_dim).float() for _ in biases]
    rope = rope_2d(*grid, head_dim, device=DEVICE) if rotary else None
    check(inputs, names=names, num_heads=heads, rope=rope, norm=norm or "rms")


# What kernels go through in tiles of 16 to 128 tokens: full tiles only, some left over, both; and
# heads of one piece or two. One head, two and many are different code where Triton compiles, and
# one where it is interpreted.
MANY_TOKENS = [
    ((16, 17), 72, 1),
    ((15, 20), 64, 1),
    ((10, 10), 64, 2),
    ((8, 16), 80, 1),
    ((8, 10), 96, 2),
    ((3, 6), 128, 2),
    ((1, 16), 72, 1),
]
if DEVICE == "cuda":
    MANY_TOKENS = [(*row[:2], heads) for row in MANY_TOKENS for heads in (1, 2, 16)]


@pytest.mark.parametrize(
    ("grid", "head_dim", "heads"), MANY_TOKENS, ids=lambda value: str(value).replace(" ", "")
)
def test_many_tokens_and_wide_heads(grid: tuple[int, int], head_dim: int, heads: int) -> None:
    inputs = [normal(1, grid[0] * grid[1], 3 * heads * head_dim, dtype=torch.bfloat16)]
    inputs += [(1 + 0.3 * normal(head_dim)).float() for _ in range(2)]
    check(inputs, num_heads=heads, rope=rope_2d(*grid, head_dim, device=DEVICE))


@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_token(dtype: torch.dtype, head_dim: int) -> None:
    # Its weight is 1 but for the rounding of a score of about 1, so out and grad_v are v and grad.
    # The gradients of q, k and their norms are sums of d products of grad and v minus the same,
    # times normed numbers of about 1. PyTorch's may be 0, and no measure of ours.
    inputs = [normal(3, 1, 3 * head_dim, dtype=dtype)]
    inputs += [(1 + 0.3 * normal(head_dim)).float() for _ in range(2)]
    grad = normal(3, 1, head_dim, dtype=dtype)
    rope = rope_2d(1, 1, head_dim, device=DEVICE)
    out, grad_qkv, *rest = run(attention, inputs, grad, num_heads=1, rope=rope)
    (_, _, v), (grad_q, grad_k, grad_v) = inputs[0].chunk(3, -1), grad_qkv.chunk(3, -1)
    rounding = WALK * head_dim**0.5 * torch.finfo(torch.float32).eps
    assert (out - v).norm() <= rounding * v.norm()
    assert (grad_v - grad).norm() <= rounding * grad.norm()
    for zero in (grad_q, grad_k, *rest):
        assert zero.norm() <= rounding * grad.norm() * v.norm()


@pytest.mark.parametrize("head_dim", [1, 3, 17])
def test_odd_heads(head_dim: int) -> None:
    check([normal(1, 5, 6 * head_dim, dtype=torch.float32)], num_heads=2)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_large_logits(dtype: torch.dtype) -> None:
    # Scores of up to 250: rounded to 16 bits they would be off by one half and exp by 60 %.
    check([normal(2, 64, 3 * 64, dtype=dtype) * 6], num_heads=2)


def test_norm_epsilon() -> None:
    qkv, weight = normal(2, 5, 48, dtype=torch.float32) * 0.01, torch.ones(8, device=DEVICE)
    check([qkv, weight, weight], num_heads=2, eps=1e-3)


def test_strided_qkv() -> None:
    wide = normal(2, 9, 100, dtype=torch.bfloat16)
    for qkv in (
        wide[..., 2:98],
        wide.expand(3, 2, 9, 100)[1, ..., :96],
        wide.mT.contiguous().mT[..., 4:],
    ):
        qkv, dense = (x.detach().requires_grad_() for x in (qkv, qkv.contiguous()))
        out, expected = attention(qkv, num_heads=2), attention(dense, num_heads=2)
        grad = normal(*out.shape, dtype=out.dtype)
        got = out, torch.autograd.grad(out, qkv, grad)[0]
        assert all(map(torch.equal, got, (expected, torch.autograd.grad(expected, dense, grad)[0])))


qkv, weight = normal(2, 6, 24), normal(4)
rope = rope_2d(2, 3, 4, device=DEVICE)
BAD = {
    "qkv is 2-D": (
        lambda: attention(qkv[0], num_heads=2),
        ValueError,
        "attention: qkv must be (B, N, 3*H*d), got (6, 24)",
    ),
    "width is no multiple of 3 H": (
        lambda: attention(qkv, num_heads=5),
        ValueError,
        "attention: qkv must be (B, N, 3*H*d) with N, d >= 1 and num_heads = H = 5, got (2, 6, 24)",
    ),
    "no heads": (
        lambda: attention(qkv, num_heads=0),
        ValueError,
        "attention: qkv must be (B, N, 3*H*d) with N, d >= 1 and num_heads = H = 0, got (2, 6, 24)",
    ),
    "heads that are no whole number": (
        lambda: attention(qkv, num_heads=2.0),  # type: ignore[arg-type]
        TypeError,
        "attention: num_heads must be a whole number, got float",
    ),
    "heads that are true": (
        lambda: attention(qkv, num_heads=True),
        TypeError,
        "attention: num_heads must be a whole number, got bool",
    ),
    "heads left open": (
        lambda: attention(qkv, num_heads=None),  # type: ignore[arg-type]
        TypeError,
        "attention: num_heads must be a whole number, got NoneType",
    ),
    "no tokens": (
        lambda: attention(qkv[:, :0], num_heads=2),
        ValueError,
        "attention: qkv must be (B, N, 3*H*d) with N, d >= 1 and num_heads = H = 2, got (2, 0, 24)",
    ),
    "bias of another length": (
        lambda: attention(qkv, num_heads=2, qkv_bias=normal(8)),
        ValueError,
        "attention: qkv_bias must be (3*H*d,) = (24,), got (8,)",
    ),
    "weight of another length": (
        lambda: attention(qkv, num_heads=2, k_weight=normal(8)),
        ValueError,
        "attention: k_weight must be (d,) = (4,), got (8,)",
    ),
    "weight of another dtype": (
        lambda: attention(qkv, num_heads=2, q_weight=weight.half()),
        TypeError,
        "attention: q_weight must be float64 or float32, got float16",
    ),
    "norm bias without LayerNorm": (
        lambda: attention(qkv, num_heads=2, k_weight=weight, k_norm_bias=weight),
        ValueError,
        'attention: k_norm_bias goes with k_weight and norm="layer"',
    ),
    "rope of another grid": (
        lambda: attention(qkv, num_heads=2, rope=rope_2d(2, 2, 4, device=DEVICE)),
        ValueError,
        "attention: rope must be (2, N, d/2) = (2, 6, 2), got (2, 4, 2)",
    ),
    "rope in float64": (
        lambda: attention(qkv, num_heads=2, rope=rope.double()),
        TypeError,
        "attention: rope must be float32, got float64",
    ),
    "rope with odd head_dim": (
        lambda: attention(normal(2, 6, 9), num_heads=1, rope=rope),
        ValueError,
        "attention: rope needs an even head_dim, got 3",
    ),
    "rope that wants a gradient": (
        lambda: attention(qkv, num_heads=2, rope=rope.clone().requires_grad_()),
        ValueError,
        "attention: rope gets no gradient, pass rope.detach()",
    ),
}


@pytest.mark.parametrize(("call", "error", "line"), BAD.values(), ids=BAD)
def test_bad_input(call, error, line) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == line
