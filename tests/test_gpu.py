"""What only a GPU can show. Without one these tests are skipped, and listed as such."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import msf
import msf_kernels
from kernels.cases import CASES, Case
from kernels.test_attention import check
from kernels.test_model import REQUESTS
from models import tiny_model
from msf_kernels.attention.libraries import LIBRARIES
from msf_kernels.cuda_support import extension
from msf_kernels.dispatch import BACKENDS
from numerics import assert_as_good_as, assert_rounded_once, normal, relative_error
from processes import process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
CALLS = [
    (case, name) for case in CASES for name in msf_kernels.backends_of(case.op) if name in BACKENDS
]


def capture(
    call: Callable[[], tuple[Tensor, ...]],
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A CUDA graph of the call, and the outputs that its replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


@pytest.mark.parametrize(("case", "name"), CALLS, ids=[f"{c.name}-{n}" for c, n in CALLS])
def test_every_operator_is_captured_in_a_graph(case: Case, name: str) -> None:
    with msf_kernels.backend(name), torch.no_grad():
        inputs = case.inputs(torch.bfloat16)
        graph, outputs = capture(lambda: case.outputs(inputs))
        for tensor, other in zip(inputs, case.inputs(torch.bfloat16), strict=True):
            tensor.copy_(other)
        for output in outputs:
            output.fill_(torch.nan)
        graph.replay()
        assert all(map(torch.equal, outputs, case.outputs(inputs)))


def test_a_label_that_means_no_class_is_asserted_not_to_be_trained_with() -> None:
    ran = process(
        "import torch; from models import images, tiny_model; model = tiny_model().cuda();"
        "model(images(2).cuda(), torch.tensor([0, 3]).cuda()); torch.cuda.synchronize()"
    )
    assert ran.returncode != 0 and "device-side assert" in ran.stderr


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "norm-rope"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_attention_of_libraries(
    name: str, head_dim: int, prepared: bool, dtype: torch.dtype
) -> None:
    if reason := msf_kernels.explain_choice("attention").unsupported_reasons[name]:
        pytest.skip(reason)
    qkv = normal(2, 40, 3 * 2 * head_dim, dtype=dtype)  # no multiple of 16 tokens
    weights = [(1 + 0.3 * normal(head_dim)).float() for _ in range(2)] if prepared else []
    rope = msf_kernels.rope_2d(5, 8, head_dim, device="cuda") if prepared else None
    with msf_kernels.backend(attention=name):
        check([qkv, *weights], num_heads=2, rope=rope)

    def gradient(qkv: Tensor, forward: str, backward: str) -> Tensor:
        qkv = qkv.detach().requires_grad_()
        with msf_kernels.backend(attention=forward):
            out = msf_kernels.attention(qkv, num_heads=2)
        with msf_kernels.backend(attention=backward):
            return torch.autograd.grad(out, qkv, grad.to(out.dtype))[0]

    # Each takes the logsumexp of the other.
    grad = normal(2, 40, 2 * head_dim, dtype=dtype)
    native = gradient(qkv, "reference", "reference")
    exact = gradient(qkv.double(), "reference", "reference")
    for names in ((name, "reference"), ("reference", name)):
        assert_as_good_as(gradient(qkv, *names), native, exact)


@pytest.mark.parametrize("name", LIBRARIES)
def test_attention_of_libraries_is_captured_in_a_graph(name: str) -> None:
    if reason := msf_kernels.explain_choice("attention").unsupported_reasons[name]:
        pytest.skip(reason)
    qkv = normal(2, 64, 3 * 2 * 64, dtype=torch.bfloat16)
    with msf_kernels.backend(attention=name), torch.no_grad():
        graph, (out,) = capture(lambda: (msf_kernels.attention(qkv, num_heads=2),))
        qkv.copy_(torch.randn_like(qkv))
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, msf_kernels.attention(qkv, num_heads=2))


def test_one_graph_serves_all_steps() -> None:
    x, v_cond, v_uncond = torch.randn(3, 2, 4, 8, 8, device="cuda")
    table = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.3, 0.2]], device="cuda")
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    for name in msf_kernels.available_backends("guided_euler_step"):
        with msf_kernels.backend(name):
            step.zero_()
            graph, (x_next,) = capture(
                lambda: (msf_kernels.guided_euler_step(x, v_cond, v_uncond, *table, step=step),)
            )
            for i in range(3):
                step.fill_(i)
                graph.replay()
                scalars = table[:, i].tolist()
                expected = msf_kernels.guided_euler_step(x, v_cond, v_uncond, *scalars)
                assert torch.equal(x_next, expected)


def test_sampling_agrees_with_the_cpu() -> None:
    model, labels = tiny_model(), torch.tensor([0, 1, 2])
    settings = {"seeds": range(3), "steps": (4, 2), "guidance_scale": 2.0, "solver": "heun"}
    expected = msf.sample(model, labels, **settings)
    got = msf.sample(model.cuda(), labels.cuda(), **settings).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_whole_stage_compiles(request_: str) -> None:
    """Forward and backward, as one graph; Inductor only orders the operations between ours anew."""
    stage, x = tiny_model().stages[1].cuda(), torch.randn(2, 2, 8, 8, device="cuda")
    t, prior_noise = torch.rand(2, 2, device="cuda")
    inputs = (x, t, torch.tensor([0, 2], device="cuda"), torch.randn_like(x), prior_noise)
    cotangent = torch.randn_like(x)
    outcomes = []
    torch.compiler.reset()
    for run in (stage, torch.compile(stage, fullgraph=True)):
        with msf_kernels.backend(request_):
            velocity = run(*inputs)
            gradients = torch.autograd.grad(velocity, list(stage.parameters()), cotangent)
        outcomes.append((velocity, *gradients))
    assert max(map(relative_error, outcomes[1], outcomes[0])) < 1e-4


LARGE = pytest.mark.xdist_group("large")  # one worker runs these: each takes up to 20 GB


@LARGE
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_more_elements_than_32_bits_count(name: str) -> None:
    x = torch.randn(33, 16, 2048, 2048, dtype=torch.bfloat16, device="cuda")  # 2.2e9
    with msf_kernels.backend(name):
        base, residual = msf_kernels.pyramid_split(x)
        merged = msf_kernels.pyramid_merge(base, residual)
    with msf_kernels.backend("reference"):
        expected = msf_kernels.pyramid_split(x[-1:])
        assert torch.equal(base[-1:], expected[0]) and torch.equal(residual[-1:], expected[1])
        assert torch.equal(merged[-1:], msf_kernels.pyramid_merge(*expected))


@LARGE
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_more_elements_of_qkv_than_32_bits_count(name: str) -> None:
    heads, head_dim = 16, 72
    qkv = torch.randn(640, 1024, 3 * heads * head_dim, dtype=torch.bfloat16, device="cuda")  # 2.3e9
    qkv.requires_grad_()
    weight = torch.ones(head_dim, device="cuda")
    options = {"num_heads": heads, "q_weight": weight, "k_weight": weight}
    with msf_kernels.backend(name):
        outputs = msf_kernels.qk_norm_rope(qkv, **options)
        # Not the outputs themselves: a norm has next to no gradient along them.
        cotangents = [torch.randn_like(output) for output in outputs]
        (grad,) = torch.autograd.grad(outputs, qkv, cotangents)
    last = qkv[-1:].detach().double().requires_grad_()
    with msf_kernels.backend("reference"):
        exact = msf_kernels.qk_norm_rope(last, **options)
        (exact_grad,) = torch.autograd.grad(exact, last, [c[-1:].double() for c in cotangents])
    for got, right in zip((*outputs, grad), (*exact, exact_grad), strict=True):
        assert_rounded_once(got[-1:].detach(), right.detach(), terms=head_dim)


def test_the_extension_runs_here() -> None:
    assert extension.unsupported_reason(torch.device("cuda")) is None
