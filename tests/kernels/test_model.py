"""A whole model on kernels of ours: it trains and samples as on the reference.

Without a GPU the kernels are emulated and interpreted, as in all tests of this folder.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import msf
import msf_kernels
from models import images, tiny_model
from msf_kernels.cuda_support import extension
from msf_kernels.triton_support import compiler_unsupported_reason
from numerics import DEVICE, assert_as_good_as

from .emulated import emulated

# Attention in CUDA takes 16 bits, and so do libraries on a GPU; on a CPU "auto" is the reference.
HERE = "auto" if DEVICE == "cuda" else "triton,attention=flash"
REQUESTS = ["triton", "cuda,attention=triton", HERE]
requests = pytest.mark.parametrize("request_", REQUESTS)


@pytest.fixture(autouse=True)
def emulation(request_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" in request_ and (reason := compiler_unsupported_reason()):
        pytest.skip(reason)
    if DEVICE == "cpu":
        monkeypatch.setattr(extension, "emulation", emulated())


def training(request: str, steps: int) -> Iterator[Tensor]:
    """The loss and all gradients of each of the first steps, in one vector.

    AdamW would make a whole step of a gradient that is nothing but rounding.
    """
    model, x = tiny_model().to(DEVICE), images(2).to(DEVICE)
    y, generator = torch.arange(2, device=DEVICE), torch.Generator(DEVICE).manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    with msf_kernels.backend(request):
        for _ in range(steps):
            loss = model.training_losses(x, y, generator=generator)["total"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            assert len(grads) == len(list(model.parameters()))
            yield torch.cat([loss.detach()[None], *grads])


@requests
def test_ten_steps_of_training(request_: str) -> None:
    pairs = zip(training(request_, 10), training("reference", 10), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got[0], expected[0])
        assert (got - expected).norm() <= 1e-5 * expected.norm()


@requests
def test_sampling(request_: str) -> None:
    model, labels = tiny_model().to(DEVICE), torch.tensor([0, 2])
    settings = {"seeds": range(2), "steps": (3, 2), "guidance_scale": 2.0, "solver": "heun"}
    with msf_kernels.backend(request_):
        got = msf.sample(model, labels, **settings)
    with msf_kernels.backend("reference"):
        expected = msf.sample(model, labels, **settings)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# Attention's heads have 32 channels here, which all backends take.
WIDE = {"stages": (msf.StageConfig(width=64, depth=2, heads=2, patch=1),) * 2}


@pytest.mark.parametrize("request_", ["cuda", "triton"])
def test_in_16_bits(request_: str) -> None:
    """All operators on one backend, no library and no reference under them."""
    model, x = tiny_model(**WIDE).to(DEVICE), images(2).to(DEVICE)
    labels = torch.tensor([0, 2], device=DEVICE)

    def results(backend: str, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        with msf_kernels.backend(backend), torch.autocast(DEVICE, dtype, dtype != torch.float32):
            loss = model.training_losses(x, labels, generator=generator)["total"]
            grads = torch.autograd.grad(loss, list(model.parameters()))
            sampled = msf.sample(model, labels, seeds=range(2), steps=(2, 1), guidance_scale=2.0)
        return [loss[None], torch.cat([grad.flatten() for grad in grads]), sampled]

    got = results(request_, torch.bfloat16)
    native, exact = results("reference", torch.bfloat16), results("reference", torch.float32)
    for ours, theirs, right in zip(got[1:], native[1:], exact[1:], strict=True):
        assert_as_good_as(ours, theirs, right.double())
