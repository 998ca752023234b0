import importlib.util
import re
from collections.abc import Iterator

import pytest
import torch

import msf_kernels
from msf_kernels import dispatch
from msf_kernels.cuda_support import extension
from msf_kernels.dispatch import BACKENDS, Implementation
from msf_kernels.triton_support import compiler_unsupported_reason
from numerics import DEVICE

from .emulated import emulated
from .stand_ins import GATE

if importlib.util.find_spec("triton"):
    from . import interpreter

    interpreter.spare()

DECLINED = re.compile(
    r"attention(_backward)?: backend cuda cannot run: (it takes|head_dim must be) "
)


def backends_under_test(op: str) -> list[str]:
    """Ours, and those libraries that take this CPU's tensors. On a GPU libraries take 16 bits only,
    so they have tests of their own in test_gpu.py."""
    libraries = [name for name in msf_kernels.backends_of(op) if name not in BACKENDS]
    taken = msf_kernels.available_backends(op) if DEVICE == "cpu" else ()
    ours = [name for name in msf_kernels.backends_of(op) if name in BACKENDS]
    return ours + [f"reference,{op}={name}" for name in libraries if name in taken]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    """Skips what attention in CUDA is not built for; test_attention_cuda.py knows what that is."""
    try:
        yield
    except msf_kernels.BackendUnavailable as error:
        if DECLINED.match(str(error)):
            pytest.skip(str(error))
        raise


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test of an operator runs on every backend that has kernels for it: the operator of a
    case, or that of the marker `operator`."""
    if "case" in metafunc.fixturenames:
        from .cases import CASES

        needs_gradient = metafunc.definition.get_closest_marker("gradient")
        cases = [case for case in CASES if case.gradient or not needs_gradient]
        if metafunc.definition.get_closest_marker("several_outputs"):
            cases = [case for case in cases if len(case.outputs(case.inputs())) > 1]
        alone = metafunc.definition.get_closest_marker("reference")
        marker = metafunc.definition.get_closest_marker("first_example")
        if marker and "operators" in marker.kwargs:
            cases = [case for case in cases if case.op in marker.kwargs["operators"]]
        first = {case.op: case for case in reversed(cases)}
        pairs = [
            (case, name)
            for case in cases
            for name in (["reference"] if alone else backends_under_test(case.op))
            if not marker or name in marker.args or case is first[case.op]
        ]
        ids = [f"{case.name}-{name}" for case, name in pairs]
        metafunc.parametrize(("case", "backend_name"), pairs, ids=ids, indirect=["backend_name"])
    else:
        marker = metafunc.definition.get_closest_marker("operator")
        names = backends_under_test(*marker.args) if marker else ["reference"]
        if metafunc.definition.get_closest_marker("kernels"):
            names = [name for name in names if name != "reference"]
        metafunc.parametrize("backend_name", names, indirect=True)


@pytest.fixture(autouse=True)
def backend_name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend under test. Without a GPU "cuda" runs the kernels compiled for the host, and
    "triton" runs in its interpreter."""
    if request.param == "triton" and (reason := compiler_unsupported_reason()):
        pytest.skip(reason)
    if request.param == "cuda" and DEVICE == "cpu":
        monkeypatch.setattr(extension, "emulation", emulated())
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


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Implementation]:
    """The registry entry of GATE with nothing but its reference, and room for stand-in kernels."""
    entry = {"reference": dispatch._registry[GATE]["reference"]}
    monkeypatch.setitem(dispatch._registry, GATE, entry)
    dispatch._log_once.cache_clear()
    dispatch.generation += 1  # no plan of another test holds
    return entry
