from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import msf_kernels
from msf_kernels import guided_euler_merge, guided_euler_step, pyramid_merge
from numerics import DEVICE, assert_rounded_once, exactly, normal
from pairwise import pairwise

pytestmark = pytest.mark.operator("guided_euler_step")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
shapes = pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 7, 5), (3,)], ids=str)


@shapes
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("table", [True, False], ids=["table", "floats"])
@pytest.mark.parametrize("velocity", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_euler_step(
    shape: tuple[int, ...], velocity: torch.dtype, guided: bool, table: bool
) -> None:
    tensors = [normal(*shape, dtype=FP32)]
    tensors += [normal(*shape, dtype=velocity) for _ in range(1 + guided)]
    inputs = [tensor.requires_grad_() for tensor in tensors]
    scalars = torch.tensor([3.5, 0.0625], device=DEVICE) if table else (3.5, 0.0625)
    x = guided_euler_step(inputs[0], inputs[1], inputs[2] if guided else None, *scalars)

    exact_inputs = exactly(*inputs)
    v = exact_inputs[1]
    if guided:
        v = 3.5 * v - 2.5 * exact_inputs[2]
    exact = exact_inputs[0] + 0.0625 * v
    grad = normal(*shape, dtype=FP32)
    got = torch.autograd.grad(x, inputs, grad)
    expected = torch.autograd.grad(exact, exact_inputs, grad.double())
    for one, right in zip((x, *got), (exact, *expected), strict=True):
        assert_rounded_once(one, right)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p * W/p, p * p * C), by way of PyTorch's unfold."""
    channels = x.shape[1]
    tokens = torch.nn.functional.unfold(x.double(), patch, stride=patch).mT
    tokens = tokens.unflatten(2, (channels, patch * patch)).transpose(2, 3)
    return tokens.flatten(2).to(x.dtype)


STEP = {"patch": [None, 1, 2], "guided": [True, False], "heun": [True, False]}
STEPS = [dict(zip(STEP, values)) for values in itertools.product(*STEP.values())]
steps = pytest.mark.parametrize("options", STEPS, ids=lambda o: "-".join(map(str, o.values())))


@steps
@pytest.mark.parametrize("velocity", [FP32, BF16], ids=["fp32", "bf16"])
def test_step_of_tokens_tables_and_heun(options: dict[str, Any], velocity: torch.dtype) -> None:
    """Bit for bit the plain steps that they stand for, whichever backend those ran on."""
    x, start = normal(2, 2, 3, 4, 6, dtype=FP32)
    velocities = list(normal(2, 2, 3, 4, 6, dtype=velocity))[: 1 + options["guided"]]
    expected = guided_euler_step(x, *(*velocities, None)[:2], 3.5, 0.3)
    if options["heun"]:
        expected = (start + expected) / 2
    if patch := options["patch"]:
        velocities = [patchify(v, patch) for v in velocities]
    scale, dt = torch.tensor([[9.0, 3.5], [9.0, 0.3]], device=DEVICE)
    got = guided_euler_step(
        x,
        *(*velocities, None)[:2],
        scale,
        dt,
        step=torch.tensor(1, device=DEVICE),
        start=start if options["heun"] else None,
        patch=patch,
    )
    assert torch.equal(got, expected)


WIDE = [(2, 4, 8, 16), (2, 8, 4, 8), (2, 3, 4, 12), (2, 4, 6, 6), (2, 4, 6, 12)]  # B, C, H, W
PATCHES = [(s, p) for s in WIDE for p in (1, 2, 3, 4) if s[2] % p == s[3] % p == 0]
LAYOUTS = {"rows": torch.contiguous_format, "channels-last": torch.channels_last}


@pytest.mark.parametrize(("shape", "patch"), PATCHES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", [(FP32, BF16), (BF16, BF16), (BF16, FP32), (FP32, FP32)])
def test_steps_of_tokens_in_vectors(
    shape: tuple[int, ...], layout: str, dtypes: tuple[torch.dtype, ...], patch: int
) -> None:
    """Bit for bit the plain steps, whether or not vectors can read the tokens."""
    x, start = (
        v.contiguous(memory_format=LAYOUTS[layout]) for v in normal(2, *shape).to(dtypes[0])
    )
    velocities = normal(2, *shape).to(dtypes[1])
    expected = (start.float() + guided_euler_step(x.float(), *velocities.float(), 3.5, 0.3)) / 2
    tokens = torch.stack([patchify(v, patch) for v in velocities])
    shifted = torch.cat([tokens.flatten()[:1], tokens.flatten()])[1:].view(tokens.shape)
    for v_cond, v_uncond in (tokens, shifted):
        got = guided_euler_step(x, v_cond, v_uncond, 3.5, 0.3, start=start, patch=patch)
        assert torch.equal(got, expected.to(got.dtype))


@pairwise(
    shape_and_patch=[*PATCHES, *[(s, None) for s in WIDE]],
    layout_and_dtypes=[(form, (x, BF16)) for form in LAYOUTS for x in (FP32, BF16)],
    mode=("nearest", "bilinear"),
)
def test_last_step_with_merge_in_vectors(
    shape_and_patch: tuple[tuple[int, ...], int | None],
    layout_and_dtypes: tuple[str, tuple[torch.dtype, ...]],
    mode: str,
) -> None:
    """Bit for bit the step and then the merge."""
    (shape, patch), (layout, dtypes) = shape_and_patch, layout_and_dtypes
    form, channels = LAYOUTS[layout], shape[1]
    x = normal(*shape, dtype=dtypes[0]).contiguous(memory_format=form)
    velocities = [v.contiguous(memory_format=form) for v in normal(2, *shape, dtype=dtypes[1])]
    base = normal(2, channels, shape[2] // 2, shape[3] // 2, dtype=dtypes[0])
    mean, std = normal(2, channels).float()
    merge = {"mode": mode, "mean": mean, "std": std, "clamp": (-2.0, 2.0)}
    expected = pyramid_merge(base, guided_euler_step(x, *velocities, 1.5, 0.25), **merge)
    if patch:
        velocities = [patchify(v, patch) for v in velocities]
    got = guided_euler_merge(x, *velocities, 1.5, 0.25, base, patch=patch, **merge)
    assert torch.equal(got, expected)


@steps
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_last_step_with_merge(options: dict[str, Any], mode: str, dtype: torch.dtype) -> None:
    """Bit for bit the step and then the merge."""
    x, *velocities = normal(3, 2, 3, 4, 6, dtype=dtype)
    velocities = velocities[: 1 + options["guided"]]
    base, mean, std = normal(2, 3, 2, 3, dtype=dtype), normal(3).float(), normal(3).float()
    merge = {"mode": mode, "mean": mean, "std": std, "clamp": (-2.0, 2.0)}
    step = guided_euler_step(x, *(*velocities, None)[:2], 1.5, 0.25)
    expected = pyramid_merge(base, step, **merge)
    if patch := options["patch"]:
        velocities = [patchify(v, patch) for v in velocities]
    got = guided_euler_merge(x, *(*velocities, None)[:2], 1.5, 0.25, base, patch=patch, **merge)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [64, 63, 1], ids=str)
@pytest.mark.parametrize("velocity", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_steps_agree_with_the_reference_bit_for_bit(size: int, velocity: torch.dtype) -> None:
    x = normal(3, size, dtype=FP32)
    v_cond, v_uncond = normal(2, 3, size, dtype=velocity)
    got = guided_euler_step(x, v_cond, v_uncond, 1.7, 0.3)
    with msf_kernels.backend("reference"):
        assert torch.equal(got, guided_euler_step(x, v_cond, v_uncond, 1.7, 0.3))


def test_floats_and_a_table_give_the_same_bits() -> None:
    x, v_cond, v_uncond = normal(3, 2, 5, dtype=FP32)
    scale, dt = torch.tensor([1.7, 0.3], device=DEVICE)
    step = guided_euler_step(x, v_cond, v_uncond, 1.7, 0.3)
    assert torch.equal(step, guided_euler_step(x, v_cond, v_uncond, scale, dt))


def test_new_floats_do_not_recompile_for_ever() -> None:
    torch.compiler.reset()
    compiled = torch.compile(guided_euler_step, fullgraph=True, backend="aot_eager")
    x, v_cond, v_uncond = normal(3, 2, 5, dtype=FP32)
    for step in range(20):  # more than the limit of 8 recompilations, an error under fullgraph
        scalars = 1.0 + step / 7, 1 / (step + 3)
        expected = guided_euler_step(x, v_cond, v_uncond, *scalars)
        assert torch.equal(compiled(x, v_cond, v_uncond, *scalars), expected)


image, t, scalar = normal(2, 3, 4, 4), torch.rand(2, device=DEVICE), torch.ones((), device=DEVICE)
BAD = {
    "velocity of another shape": (
        lambda: guided_euler_step(image, image, image[:1], 2.0, 0.1),
        ValueError,
        "guided_euler_step: v_uncond must be x.shape = (2, 3, 4, 4), got (1, 3, 4, 4)",
    ),
    "one scale per sample": (
        lambda: guided_euler_step(image, image, image, t, 0.1),
        ValueError,
        "guided_euler_step: guidance_scale must be a float or a 0-dimensional tensor, got (2,)",
    ),
    "scale beyond all floats": (
        lambda: guided_euler_step(image, image, image, -(10**400), 0.1),
        ValueError,
        "guided_euler_step: guidance_scale must be in the range of a float",
    ),
    "sparse velocity": (
        lambda: guided_euler_step(image, image.to_sparse(), None, 1.0, 0.1),
        TypeError,
        "guided_euler_step: v_cond must be a dense tensor, got sparse_coo",
    ),
    "dt is text": (
        lambda: guided_euler_step(image, image, None, 1.0, "0.1"),
        TypeError,
        "guided_euler_step: dt must be a float or a tensor, got str",
    ),
    "velocities of two dtypes": (
        lambda: guided_euler_step(image.float(), image.float(), image.half(), 1.0, 0.1),
        TypeError,
        "guided_euler_step: v_uncond must be float32, got float16",
    ),
    "patch that does not divide": (
        lambda: guided_euler_step(image, image, None, 1.0, 0.1, patch=3),
        ValueError,
        "guided_euler_step: patch must divide H and W, 4 x 4, got 3",
    ),
    "image where tokens are due": (
        lambda: guided_euler_step(image, image, None, 1.0, 0.1, patch=2),
        ValueError,
        "guided_euler_step: v_cond must be (B, H/p * W/p, p * p * C) = (2, 4, 12), "
        "got (2, 3, 4, 4)",
    ),
    "row of a number": (
        lambda: guided_euler_step(
            image, image, None, 1.0, 0.1, step=torch.tensor(0, device=DEVICE)
        ),
        ValueError,
        "guided_euler_step: guidance_scale must be a table (S,) of steps, where step is given",
    ),
    "row that is no whole number": (
        lambda: guided_euler_step(image, image, None, t, t, step=t),
        TypeError,
        "guided_euler_step: step must be a 0-dimensional int64 tensor, got torch.float32 (2,)",
    ),
    "tables of two lengths": (
        lambda: guided_euler_step(
            image, image, None, t, t[:1], step=torch.tensor(0, device=DEVICE)
        ),
        ValueError,
        "guided_euler_step: dt must be (S,) as guidance_scale = (2,), got (1,)",
    ),
    "patch that is no whole number": (
        lambda: guided_euler_step(image, image, None, 1.0, 0.1, patch=2.0),
        ValueError,
        "guided_euler_step: patch must be (p,), positive whole numbers, got (2.0,)",
    ),
    "gradient of the last step": (
        lambda: guided_euler_merge(
            image, image, None, 1.0, 0.1, image[..., :2, :2].clone().requires_grad_()
        ),
        ValueError,
        "guided_euler_merge: base gets no gradient, pass base.detach()",
    ),
    "start of another dtype": (
        lambda: guided_euler_step(image, image, None, 1.0, 0.1, start=image.float()),
        TypeError,
        "guided_euler_step: start must be float64, got float32",
    ),
    "base of the residual's size": (
        lambda: guided_euler_merge(image, image, None, 1.0, 0.1, image),
        ValueError,
        "guided_euler_merge: x must be (B, C, H, W) = (2, 3, 8, 8), got (2, 3, 4, 4)",
    ),
    "dt wants a gradient": (
        lambda: guided_euler_step(image, image, None, 1.0, scalar.clone().requires_grad_()),
        ValueError,
        "guided_euler_step: dt gets no gradient, pass dt.detach()",
    ),
}


@pytest.mark.parametrize(("call", "error", "line"), BAD.values(), ids=BAD)
def test_bad_input(call, error, line) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == line


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the row is not checked")
@pytest.mark.parametrize("row", [-1, 2])
def test_row_out_of_range(row: int) -> None:
    line = rf"guided_euler_step: step must be in \[0, 2\), got {row}"
    with pytest.raises(ValueError, match=line):
        guided_euler_step(image, image, None, t, t, step=torch.tensor(row))


def test_all_rows_of_a_table_at_once() -> None:
    rows, table = torch.arange(3, device=DEVICE), torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    x, v = torch.randn(2, 3, 4, 6, device=DEVICE), torch.randn(2, 2, 6, 12, device=DEVICE)

    def step(row: Tensor) -> Tensor:
        return guided_euler_step(x, *v, table, table / 10, step=row, patch=2)

    expected = torch.stack([step(row) for row in rows])
    torch.testing.assert_close(torch.func.vmap(step)(rows), expected)
