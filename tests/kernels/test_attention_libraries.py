"""Attention of other libraries. What only runs on a GPU is called here on tensors without memory,
or has a stand-in (`stand_ins.py`)."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import msf_kernels
from msf_kernels import attention, dispatch, rope_2d
from msf_kernels.attention import flash_attn, libraries, reference, sdpa
from msf_kernels.qk_norm_rope.examples import preparation
from msf_kernels.qk_norm_rope.preparation import PARAMETERS
from numerics import normal

from .stand_ins import STAND_INS, FlashAttn2, FlashAttn3
from .test_attention import check

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="calls them with tensors of the CPU")


@no_gpu
@pytest.mark.parametrize(
    ("batch", "grid", "heads", "head_dim"),
    [(2, (4, 4), 2, 32), (3, (1, 2), 2, 8), (1, (3, 7), 4, 36)],
    ids=lambda value: str(value).replace(" ", ""),
)
@pytest.mark.parametrize(
    "prepared", ["", "norm-rope", "bias", "bias-norm-rope", "bias-layer_norm-rope"]
)
@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_flash_on_a_cpu(batch, grid, heads, head_dim, prepared, dtype) -> None:
    inputs = {"qkv": normal(batch, grid[0] * grid[1], 3 * heads * head_dim, dtype=dtype)}
    if "bias" in prepared:
        inputs["qkv_bias"] = normal(3 * heads * head_dim, dtype=FP32)
    if "norm" in prepared:
        inputs |= {f"{x}_weight": (1 + 0.3 * normal(head_dim)).float() for x in "qk"}
    if "layer" in prepared:
        inputs |= {f"{x}_norm_bias": normal(head_dim, dtype=FP32) for x in "qk"}
    rope = rope_2d(*grid, head_dim) if "rope" in prepared else None
    norm = "layer" if "layer" in prepared else "rms"
    _, *names = inputs
    with msf_kernels.backend(attention="flash"):
        check([*inputs.values()], names=names, num_heads=heads, rope=rope, norm=norm)


@no_gpu
@pytest.mark.parametrize("names", [("flash", "reference"), ("reference", "flash")], ids="-".join)
def test_forward_and_backward_on_different_backends(names: tuple[str, str]) -> None:
    qkv, grad = normal(2, 6, 24).requires_grad_(), normal(2, 6, 8)
    with msf_kernels.backend(attention=names[0]):
        out = attention(qkv, num_heads=2)
    with msf_kernels.backend(attention=names[1]):
        (got,) = torch.autograd.grad(out, qkv, grad)
    (expected,) = torch.autograd.grad(attention(qkv, num_heads=2), qkv, grad)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "norm-rope"])
def test_calls_fit_the_operators_of_pytorch(name: str, prepared: bool) -> None:
    library = libraries.LIBRARIES[name]
    qkv = torch.empty(2, 6, 3 * 2 * 8, dtype=BF16, device="meta")
    weight = torch.empty(8, device="meta") if prepared else None
    rope = torch.empty(2, 6, 4, device="meta") if prepared else None
    bias = torch.empty(48, device="meta") if prepared else None
    tensors = {"qkv_bias": bias, "q_weight": weight, "k_weight": weight, "rope": rope}
    given = preparation(2, norm="layer", q_norm_bias=weight, **tensors)
    out, logsumexp = libraries.attention(library, qkv, *given)
    assert out.shape == (2, 6, 16) and out.dtype == BF16 and out.is_contiguous()
    assert logsumexp.shape == (2, 2, 6) and logsumexp.dtype == FP32
    grad_qkv, grad_bias, *of_norms = libraries.attention_backward(
        library, out, out, logsumexp, qkv, *given
    )
    assert grad_qkv.shape == qkv.shape and grad_qkv.dtype == BF16
    assert grad_bias.numel() == (48 if prepared else 0)
    sizes = [8, 8, 8, 0] if prepared else [0] * 4
    assert [grad.numel() for grad in of_norms] == sizes


def check_stand_in(name: str, norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of 37 tokens: no multiple of what libraries round up to."""
    library = libraries.LIBRARIES[name]
    calls = {"attention": libraries.attention, "attention_backward": libraries.attention_backward}
    for op, call in calls.items():  # as registered, but tensors of the CPU are taken
        implementation = dispatch.Implementation(partial(call, library))
        monkeypatch.setitem(dispatch._registry[op], name, implementation)
    inputs = [normal(2, 37, 48, dtype=FP32), *(normal(8, dtype=FP32) for _ in "qk" if norm)]
    with msf_kernels.backend(attention=name):
        check(inputs, num_heads=2)
    arguments = inputs[0], *preparation(2)
    _, logsumexp = libraries.attention(library, *arguments)
    torch.testing.assert_close(logsumexp, reference.attention(*arguments)[1])


norms = pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])


@no_gpu
@norms
@pytest.mark.parametrize("name", STAND_INS)
def test_layouts_and_logsumexp(name: str, norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for operator, stand_in in STAND_INS[name].items():  # which take what PyTorch's own take
        schema = getattr(torch.ops.aten, operator).default._schema
        names = [argument.name for argument in schema.arguments]
        assert len(inspect.signature(stand_in).parameters) <= len(names)
    monkeypatch.setattr(sdpa, "aten", SimpleNamespace(**STAND_INS[name]))
    check_stand_in(name, norm, monkeypatch)


@no_gpu
@norms
@pytest.mark.parametrize(("generation", "module"), [(2, FlashAttn2), (3, FlashAttn3)])
def test_flash_attn(
    generation: int, module: type, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attn, "installed", lambda: (generation, module))
    check_stand_in("flash-attn", norm, monkeypatch)


@pytest.fixture
def fresh() -> Iterator[None]:
    caches = flash_attn.installed, flash_attn.unsupported_device_reason
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def absent(_: str) -> str:
    raise PackageNotFoundError


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("version", "line"),
    [
        (absent, "flash-attn is not installed"),
        (lambda _: "2.6.3", "flash-attn must be 2.7 or later, got 2.6.3"),
    ],
    ids=["absent", "old"],
)
def test_why_flash_attn_cannot_run(version, line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(flash_attn, "version", version)
    assert libraries.LIBRARIES["flash-attn"].unsupported_device_reason(CPU) == line


def test_flash_attn_declines_arguments() -> None:
    reason = libraries.LIBRARIES["flash-attn"].unsupported_args_reason
    assert reason(torch.empty(1, 2, 3, 64, dtype=BF16)) is None
    line = "flash-attn takes bfloat16 and float16, got float32"
    assert reason(torch.empty(1, 2, 3, 64)) == line
    for head_dim in (36, 264):
        line = f"flash-attn takes a head_dim of 8, 16 ... 256, got {head_dim}"
        assert reason(torch.empty(1, 2, 3, head_dim, dtype=BF16)) == line


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", ["cudnn", "efficient", "flash-attn"])
def test_tensors_of_the_cpu_are_declined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "installed", lambda: (2, FlashAttn2))
    line = f"attention: backend {name} cannot run: it takes no tensors on cpu"
    with (
        msf_kernels.backend(attention=name),
        pytest.raises(msf_kernels.BackendUnavailable, match=f"^{re.escape(line)}$"),
    ):
        attention(torch.zeros(1, 2, 12), num_heads=1)


def test_the_reason_is_that_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def no(params: Any, debug: bool = False) -> bool:
        if debug:
            warnings.warn(
                "the dtype is odd (Triggered internally at sdp_utils.cpp:1)", stacklevel=1
            )
        return False

    answers = {"can_use_flash_attention": no, "can_use_cudnn_attention": lambda params: True}
    names = SimpleNamespace(SDPAParams=lambda q, *_: q.shape, **answers)
    monkeypatch.setattr(sdpa, "cuda", names)
    heads = [torch.empty(1, 2, 3, 8, device="meta")] * 3
    assert libraries.LIBRARIES["flash"].unsupported_args_reason(*heads) == "the dtype is odd"
    assert libraries.LIBRARIES["cudnn"].unsupported_args_reason(*heads) is None
    heads = [torch.empty(1, 2, 3, 36, device="meta")] * 3  # PyTorch pads it before it asks
    line = "it takes a head_dim of 8, 16 ..., got 36"
    assert libraries.LIBRARIES["flash"].unsupported_args_reason(*heads) == line


def test_limits_of_the_gradient_count_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def takes_no_gradient(q: Tensor, debug: bool = False) -> bool:
        trained = q.requires_grad and torch.is_grad_enabled()  # PyTorch asks so
        if trained and debug:
            warnings.warn("no gradient", stacklevel=1)
        return not trained

    names = SimpleNamespace(SDPAParams=lambda q, *_: q, can_use_cudnn_attention=takes_no_gradient)
    monkeypatch.setattr(sdpa, "cuda", names)
    forward, backward = (
        dispatch._registry[op]["cudnn"].unsupported_args_reason
        for op in ("attention", "attention_backward")
    )
    qkv = torch.empty(1, 2, 48, device="meta")
    trained = qkv.clone().requires_grad_()
    with torch.no_grad():  # as where the operators run
        assert forward(qkv, *preparation(2)) is None
        assert forward(trained, *preparation(2)) == "no gradient"
        for name in PARAMETERS:
            parameter = trained[0, 0] if name == "qkv_bias" else trained[0, 0, :8]
            assert forward(qkv, *preparation(2, **{name: parameter})) == "no gradient"
        assert backward(qkv, qkv, qkv, qkv, *preparation(2)) == "no gradient"


@no_gpu
@pytest.mark.parametrize("wanted", ["qkv", "q_weight", None])
def test_a_call_says_whether_a_gradient_is_wanted(
    wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def reason(*heads: Tensor) -> None:
        asked.append(all(x.requires_grad for x in heads))

    library = replace(libraries.LIBRARIES["flash"], unsupported_args_reason=reason)
    recording = libraries.implementation(library, libraries.attention, libraries.forward_reason)
    monkeypatch.setitem(dispatch._registry["attention"], "flash", recording)
    arguments = {"qkv": normal(1, 2, 48, dtype=FP32), "q_weight": torch.ones(8)}
    if wanted:
        arguments[wanted].requires_grad_()
    with msf_kernels.backend(attention="flash"):
        attention(arguments["qkv"], num_heads=2, q_weight=arguments["q_weight"])
    assert asked == [wanted is not None]
