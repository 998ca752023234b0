from collections.abc import Iterator

import pytest
import torch

import msf_kernels


@pytest.fixture(params=["reference"], autouse=True)
def backend_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of an operator runs on every backend named here."""
    with msf_kernels.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Uninitialised memory holds NaN, so an output that is not written in full shows."""
    # warn_only: on a GPU the gradients of some PyTorch formulas we compare with are not repeatable.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
