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
from numerics import DEVICE

from .emulated import emulated

# Attention has no kernel of ours in CUDA. On a CPU "auto" is the reference; on a GPU the libraries
# take 16 bits only.
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
    """The loss and all gradients of each of AdamW's first steps, in one vector."""
    model, x = tiny_model().to(DEVICE), images(2).to(DEVICE)
    y, generator = torch.arange(2, device=DEVICE), torch.Generator(DEVICE).manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
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
