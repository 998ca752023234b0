from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msf_kernels import BackendUnavailable, qk_norm_rope, rope_2d
from numerics import DEVICE, assert_rounded_once, normal
from pairwise import pairwise

pytestmark = pytest.mark.operator("qk_norm_rope")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
NORMS = pytest.mark.parametrize("norm", ["rms", "layer"])

# Of qkv, and of the weights.
DTYPES = (torch.float64, FP32), (FP32, FP32), (BF16, BF16), (BF16, FP32), (FP16, FP32)
# Batch, grid, heads, head_dim. In 16 bits half a head takes accesses of 16, 8 (twice) and 2 bytes;
# N = 1, one head, and a head of more elements than a warp takes in one turn.
SHAPES = (
    (2, (4, 4), 3, 64),
    (1, (3, 7), 2, 72),
    (3, (1, 1), 2, 8),
    (2, (2, 2), 1, 36),
    (1, (1, 2), 2, 204),
)
# Parameters, whether there is RoPE, and the norm.
BOTH, BIASES = "q_weight k_weight", "q_norm_bias k_norm_bias"
OPTIONS = (
    ("", True, "rms"),
    ("q_weight", False, "rms"),
    (BOTH, False, "rms"),
    (BOTH, True, "rms"),
    ("qkv_bias", False, "layer"),
    (f"{BOTH} qkv_bias", True, "rms"),
    (BOTH, True, "layer"),
    (f"{BOTH} {BIASES}", False, "layer"),
    (f"{BOTH} {BIASES} qkv_bias", True, "layer"),
    ("k_weight k_norm_bias", True, "layer"),
)


def parameters_of(names: str, heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Norms' weights are around 1."""
    lengths = {"qkv_bias": 3 * heads * head_dim}
    drawn = {name: normal(lengths.get(name, head_dim)) for name in names.split()}
    return {name: (1 + 0.3 * x if "weight" in name else x).to(dtype) for name, x in drawn.items()}


def prepared(
    x: Tensor,
    weight: Tensor | None,
    norm_bias: Tensor | None,
    rope: Tensor | None,
    eps: float,
    norm: str,
) -> Tensor:
    """q or k (B, N, H, d) by way of PyTorch's norms and complex numbers."""
    if weight is not None and norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], weight, norm_bias, eps)
    elif weight is not None:
        x = F.rms_norm(x, x.shape[-1:], weight, eps)
    if rope is not None:
        turned = torch.complex(*x.chunk(2, -1)) * torch.complex(*rope.double()[:, :, None])
        x = torch.cat((turned.real, turned.imag), -1)
    return x


def exact_qk(
    qkv: Tensor, num_heads: int, eps: float = 1e-6, norm: str = "rms", **options: Any
) -> list[Tensor]:
    if (bias := options.get("qkv_bias")) is not None:
        qkv = qkv + bias
    parts = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    get = options.get
    return [
        prepared(part, get(f"{x}_weight"), get(f"{x}_norm_bias"), get("rope"), eps, norm)
        for x, part in zip("qk", parts)
    ]


def check(
    qkv: Tensor, parameters: dict[str, Tensor], *, condition: float = 1.0, **options: Any
) -> None:
    """Values, and gradients of qkv and the parameters, against float64.

    The subtraction of a mean amplifies errors by ``condition``.
    """
    inputs = [tensor.detach().requires_grad_() for tensor in (qkv, *parameters.values())]
    named = dict(zip(parameters, inputs[1:], strict=True))
    outputs = qk_norm_rope(inputs[0], **named, **options)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_named = dict(zip(parameters, exact_inputs[1:], strict=True))
    exact = exact_qk(exact_inputs[0], **exact_named, **options)
    batch, tokens, heads, head_dim = outputs[0].shape
    for one, right in zip(outputs, exact, strict=True):
        assert one.is_contiguous()
        assert_rounded_once(one, right, terms=head_dim, condition=condition)

    grads = [normal(*output.shape, dtype=output.dtype) for output in outputs]
    got = torch.autograd.grad(outputs, inputs, grads)
    expected = torch.autograd.grad(exact, exact_inputs, [grad.double() for grad in grads])
    for one, right in zip(got, expected, strict=True):
        terms = max(head_dim, batch * tokens * heads)
        assert_rounded_once(one, right, terms=terms, condition=condition)
    assert not got[0].chunk(3, -1)[2].any()


@pairwise(shape=SHAPES, dtypes=DTYPES, options=OPTIONS)
def test_values_and_gradients(
    shape: tuple[int, tuple[int, int], int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    options: tuple[str, bool, str],
) -> None:
    (batch, grid, heads, head_dim), (dtype, other), (names, rotary, norm) = shape, dtypes, options
    qkv = normal(batch, grid[0] * grid[1], 3 * heads * head_dim, dtype=dtype)
    rope = rope_2d(*grid, head_dim, device=DEVICE) if rotary else None
    parameters = parameters_of(names, heads, head_dim, other)
    check(qkv, parameters, num_heads=heads, rope=rope, norm=norm)


@NORMS
def test_odd_head_dim(norm: str) -> None:
    weights = {"q_weight": normal(5, dtype=FP32), "k_weight": normal(5, dtype=BF16)}
    if norm == "layer":
        weights["k_norm_bias"] = normal(5, dtype=BF16)
    check(normal(2, 3, 30, dtype=BF16), weights, num_heads=2, norm=norm)


@NORMS
def test_epsilon(norm: str) -> None:
    weights = {"q_weight": torch.ones(8, device=DEVICE), "k_weight": normal(8, dtype=FP32)}
    check(normal(2, 5, 48, dtype=FP32) * 0.01, weights, num_heads=2, eps=1e-3, norm=norm)


def test_layer_norm_of_a_large_mean() -> None:
    """The squares are those around the mean; the mean of squares less the square of the mean would
    amplify errors by 1e6."""
    qkv = normal(2, 6, 3 * 2 * 64, dtype=FP32) + 1000
    parameters = parameters_of(f"{BOTH} {BIASES}", 2, 64, FP32)
    check(qkv, parameters, condition=1000, num_heads=2, norm="layer")


def test_layer_norm_is_that_of_modules() -> None:
    torch.manual_seed(0)
    qkv, norms = normal(2, 6, 3 * 2 * 8), [nn.LayerNorm(8).double().to(DEVICE) for _ in "qk"]
    for norm in norms:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    named = {"q_weight": norms[0].weight, "q_norm_bias": norms[0].bias}
    named |= {"k_weight": norms[1].weight, "k_norm_bias": norms[1].bias}
    got = qk_norm_rope(qkv, num_heads=2, **named, eps=norms[0].eps, norm="layer")
    for norm, part, one in zip(norms, qkv.unflatten(-1, (3, 2, 8)).unbind(2), got):
        torch.testing.assert_close(one, norm(part), rtol=1e-12, atol=1e-12)


# The names of what there is of parameters besides.
@pytest.mark.parametrize("names", ["", "qkv_bias"])
def test_norm_biases_of_q_and_k_alone(names: str) -> None:
    for x in "qk":
        parameters = parameters_of(f"{BOTH} {x}_norm_bias {names}", 2, 72, FP32)
        check(normal(2, 7, 3 * 2 * 72, dtype=BF16), parameters, num_heads=2, norm="layer")


# Heads that a block or a program has a whole number of, or that have a number of those or neither;
# the second pass takes 32 partials at once.
@pairwise(
    heads=(1, 12, 16, 100),
    partials=(3, 34),
    dtype=(torch.float64, BF16),
    norm=("rms", "layer"),
)
def test_more_heads_than_programs(
    heads: int,
    partials: int,
    dtype: torch.dtype,
    norm: str,
    backend_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if backend_name != "reference":
        module = importlib.import_module(f"msf_kernels.qk_norm_rope.{backend_name}")
        monkeypatch.setattr(module, "TARGET_BLOCKS", partials)
    # In Triton 100 heads take 25 or 50 programs, with more tiles than that.
    dim, tokens = {1: (72, 140), 100: (32, 9)}.get(heads, (32, 23))
    qkv = normal(2, tokens, 3 * heads * dim, dtype=dtype)
    names = f"{BOTH} qkv_bias {BIASES if norm == 'layer' else ''}"
    check(qkv, parameters_of(names, heads, dim, dtype), num_heads=heads, norm=norm)


@pytest.mark.parametrize("first", [0, 1, 4])
def test_qkv_and_gradients_inside_wider_tensors(first: int) -> None:
    """Views at addresses of 16, 2 and 8 bytes are read in place, with the same result."""
    qkv = normal(2, 6, 250, dtype=BF16)[..., first : first + 192]
    weight = normal(16, dtype=FP32)
    options: dict[str, Any] = {"num_heads": 4, "k_weight": weight}
    rope = rope_2d(2, 3, 16, device=DEVICE)
    grads = normal(2, 2, 6, 4, 32, dtype=BF16)[..., first : first + 16].unbind()

    def results(qkv: Tensor, grads: tuple[Tensor, ...]) -> list[Tensor]:
        qkv = qkv.detach().requires_grad_()
        outputs = qk_norm_rope(qkv, **options, rope=rope)
        return [*outputs, *torch.autograd.grad(outputs, qkv, grads)]

    expected = results(qkv.contiguous(), tuple(grad.contiguous() for grad in grads))
    assert all(map(torch.equal, results(qkv, grads), expected))


def test_gradients_of_another_layout_and_of_v() -> None:
    """A library's gradients lie as (B, H, N, d), and that of v is packed with those of q and k."""
    backward = torch.ops.msf.qk_norm_rope_backward
    qkv, weight = normal(2, 6, 3 * 2 * 8, dtype=BF16), normal(8, dtype=FP32)
    grads = normal(3, 2, 2, 6, 8, dtype=BF16).transpose(2, 3).unbind()
    bias = normal(3 * 2 * 8, dtype=FP32)
    rope = rope_2d(2, 3, 8, device=DEVICE)
    arguments = (qkv, bias, weight, None, None, None, rope, 2, 1e-6, "rms")
    got, grad_bias, *weights = backward(*grads, *arguments)
    expected, other_bias, *same = backward(
        *(grad.contiguous() for grad in grads[:2]), None, *arguments
    )
    got_parts, expected_parts = (x.unflatten(-1, (3, 2, 8)).unbind(2) for x in (got, expected))
    assert torch.equal(got_parts[2], grads[2])
    assert all(map(torch.equal, got_parts[:2], expected_parts[:2]))
    assert all(map(torch.equal, weights, same))
    assert torch.equal(grad_bias[:32], other_bias[:32]) and not other_bias[32:].any()
    exact = grads[2].double().sum((0, 1)).flatten()
    assert_rounded_once(grad_bias[32:], exact, terms=2 * 6)


def test_large_head_dim(backend_name: str) -> None:
    qkv, weight = normal(1, 2, 3 * 300, dtype=FP32), normal(300, dtype=FP32)
    if backend_name == "cuda":
        line = "qk_norm_rope: backend cuda cannot run: head_dim is 300, at most 256 fits its warps"
        with pytest.raises(BackendUnavailable, match=f"^{line}$"):
            qk_norm_rope(qkv, num_heads=1, q_weight=weight)
    else:
        check(qkv, {"q_weight": weight}, num_heads=1)


@NORMS
def test_without_epsilon(norm: str) -> None:
    weights = {name: normal(8, dtype=FP32) for name in ("q_weight", "k_weight")}
    check(normal(1, 3, 3 * 2 * 8, dtype=FP32), weights, num_heads=2, eps=0.0, norm=norm)


def test_nothing_to_do_is_still_a_copy() -> None:
    qkv = normal(1, 1, 12)
    for output in qk_norm_rope(qkv, num_heads=1):
        assert output.untyped_storage().data_ptr() != qkv.untyped_storage().data_ptr()


qkv = normal(2, 6, 24)
BAD = {
    "width is no multiple of 3 H": (
        lambda: qk_norm_rope(qkv, num_heads=5),
        ValueError,
        "qk_norm_rope: qkv must be (B, N, 3*H*d) with N, d >= 1 and num_heads = H = 5, "
        "got (2, 6, 24)",
    ),
    "weight of another length": (
        lambda: qk_norm_rope(qkv, num_heads=2, k_weight=normal(8)),
        ValueError,
        "qk_norm_rope: k_weight must be (d,) = (4,), got (8,)",
    ),
    "weight of another dtype": (
        lambda: qk_norm_rope(qkv, num_heads=2, q_weight=normal(4).half()),
        TypeError,
        "qk_norm_rope: q_weight must be float64 or float32, got float16",
    ),
    "norm that is none": (
        lambda: qk_norm_rope(qkv, num_heads=2, norm="batch"),
        ValueError,
        "qk_norm_rope: norm must be one of rms, layer, got 'batch'",
    ),
    "norm bias of another length": (
        lambda: qk_norm_rope(qkv, num_heads=2, q_norm_bias=normal(8), norm="layer"),
        ValueError,
        "qk_norm_rope: q_norm_bias must be (d,) = (4,), got (8,)",
    ),
    "norm bias of RMS norm": (
        lambda: qk_norm_rope(qkv, num_heads=2, q_weight=normal(4), q_norm_bias=normal(4)),
        ValueError,
        'qk_norm_rope: q_norm_bias goes with q_weight and norm="layer"',
    ),
    "norm bias without a norm": (
        lambda: qk_norm_rope(
            qkv, num_heads=2, q_weight=normal(4), k_norm_bias=normal(4), norm="layer"
        ),
        ValueError,
        'qk_norm_rope: k_norm_bias goes with k_weight and norm="layer"',
    ),
    "rope of another grid": (
        lambda: qk_norm_rope(qkv, num_heads=2, rope=rope_2d(2, 2, 4, device=DEVICE)),
        ValueError,
        "qk_norm_rope: rope must be (2, N, d/2) = (2, 6, 2), got (2, 4, 2)",
    ),
}


@pytest.mark.parametrize(("call", "error", "line"), BAD.values(), ids=BAD)
def test_bad_input(call: Any, error: Any, line: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == line
