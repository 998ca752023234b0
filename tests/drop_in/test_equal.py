"""An accelerated model computes what it computed before, output and gradients."""

import pytest
import torch

import msf
from numerics import WALK, assert_as_good_as, relative_error

from .transformers import (
    CONDITION,
    HEAD_DIM,
    MODELS,
    TOKENS,
    WIDTH,
    Last,
    PlainNorm,
    Transformer,
    inputs,
    make,
)

models = pytest.mark.parametrize("name", MODELS)
roundings = pytest.mark.parametrize("rounding", ["fp32", "eager"])


def run(model, dtype):
    """The output and the gradients of all weights and inputs."""
    x, c = (tensor.requires_grad_() for tensor in inputs(dtype))
    out = model(x, c)
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape).to(dtype))
    named = {"x": x, "c": c, **dict(model.named_parameters())}
    return {"out": out} | {name: p.grad for name, p in named.items() if p.grad is not None}


def compared(exact):
    """Without the gradients that are zero: a bias of all keys changes no softmax."""
    largest = max(value.norm() for value in exact.values())
    return [name for name, value in exact.items() if value.norm() > 1e-9 * largest]


@models
@roundings
def test_float64(name, rounding):
    expected = run(make(name, torch.float64), torch.float64)
    got = run(msf.accelerate(make(name, torch.float64), rounding), torch.float64)
    assert got.keys() == expected.keys()
    for key in compared(expected):
        assert relative_error(got[key], expected[key]) < 1e-12, key


@models
@roundings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_errors_are_those_of_pytorch(name, rounding, dtype):
    """Of four models together, as chance favours one of two roundings by a tenth in each."""
    errors = []
    for seed in range(4):
        exact = run(make(name, torch.float64, seed), torch.float64)
        native = run(make(name, dtype, seed), dtype)
        got = run(msf.accelerate(make(name, dtype, seed), rounding), dtype)
        for key in compared(exact):
            assert_as_good_as(got[key], native[key], exact[key], WALK)
            errors.append([relative_error(x[key], exact[key]) for x in (got, native)])
    ours, theirs = torch.tensor(errors).norm(dim=0)
    assert ours <= 1.25 * theirs


@pytest.mark.parametrize("name", ["REPA", "LightningDiT with LayerNorm"])
def test_layer_norm_of_q_and_k_is_in_the_operator(name, monkeypatch):
    model, (x, c) = make(name, torch.float64), inputs(torch.float64)
    expected = model(x, c)
    msf.accelerate(model)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.LayerNorm, "__call__", None)  # cannot be called
        assert relative_error(model(x, c), expected) < 1e-12


@pytest.mark.parametrize("name", ["REPA", "LightningDiT with LayerNorm", "LightningDiT"])
def test_norms_of_q_and_k_that_differ_are_those_of_the_model(name):
    model, (x, c) = make(name, torch.float64), inputs(torch.float64)
    model.blocks[0].attn.k_norm.eps = 0.1
    model.blocks[1].attn.q_norm = PlainNorm(HEAD_DIM)
    expected = model(x, c)
    assert relative_error(msf.accelerate(model)(x, c), expected) < 1e-12


def same_bits(model, x, c):
    expected = model(x, c)
    return (msf.accelerate(model, "eager")(x, c) == expected), expected


@pytest.mark.parametrize("name", ["LightningDiT", "RMSNorm of PyTorch", "norms with weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_eager_gates_are_bitwise_those_of_the_model(name, dtype):
    model, (x, c) = make(name, dtype), inputs(dtype)
    same, _ = same_bits(model, x, c)
    assert same.all()
    if dtype == torch.bfloat16:
        assert not torch.equal(msf.accelerate(model)(x, c), msf.restore(model)(x, c))


def last_layer_alone(channels):
    """A last layer whose product with the unit matrix shows what adaLN rounds."""
    layer = Last()
    layer.norm_final = PlainNorm(channels)
    layer.linear = torch.nn.Linear(channels, channels, bias=False)
    torch.nn.init.eye_(layer.linear.weight)
    layer.adaLN_modulation = torch.nn.Linear(CONDITION, 2 * channels)
    return layer.bfloat16()


def test_eager_adaln_is_bitwise_that_of_the_model_where_statistics_are_exact():
    model = Transformer(last=lambda: last_layer_alone(WIDTH)).bfloat16()
    model.blocks = torch.nn.ModuleList([make("DiT and SiT").blocks[0].bfloat16()])
    with torch.no_grad():
        model.blocks[0].adaLN_modulation[1].weight.zero_()
        model.blocks[0].adaLN_modulation[1].bias.zero_()  # x passes
    # Whole numbers of mean 0: sums below 2^24, the same in any order of summation.
    half = torch.randint(-127, 128, (3, TOKENS, WIDTH // 2))
    x, (_, c) = torch.cat((half, -half), -1).bfloat16(), inputs(torch.bfloat16)
    same, expected = same_bits(model, x, c)
    assert same.all()
    assert not torch.equal(msf.accelerate(model)(x, c), expected)


def test_eager_adaln_differs_from_the_model_by_seldom_a_last_bit():
    # As in kernels/test_adaln_rounding.py: statistics of another order differ by some
    # sqrt(D) * 2^-24, and there is a rounding border in every eps.
    layer, channels = last_layer_alone(384), 384
    x, (_, c) = torch.randn(3, 64, channels).bfloat16(), inputs(torch.bfloat16)
    expected = layer(x, c)
    model = torch.nn.ModuleList([make("DiT and SiT").blocks[0], layer])
    msf.accelerate(model, "eager")
    share = (layer(x, c) != expected).double().mean().item()
    assert share <= 2 * WALK * channels**0.5 * 2**-24 / (torch.finfo(torch.bfloat16).eps / 2)
