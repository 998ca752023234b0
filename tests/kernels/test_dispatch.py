"""Which implementation runs and what a caller is told about it."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import msf_kernels as msf
from msf_kernels import dispatch, measurements
from msf_kernels.cuda_support import extension
from msf_kernels.dispatch import Implementation
from numerics import normal

from .stand_ins import ARGS, GATE, answering


@pytest.mark.parametrize("op", msf.OPERATORS)
def test_every_operator_has_a_reference(op: str) -> None:
    assert msf.explain_choice(op).unsupported_reasons["reference"] is None


@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.usefixtures("kernels")
def test_a_backend_asked_for_by_name_raises_where_it_cannot_run(name: str) -> None:
    line = f"{GATE}: backend {name} cannot run: {GATE} has no {name} kernel in this version"
    with msf.backend(name), pytest.raises(msf.BackendUnavailable, match=f"^{line}$"):
        msf.gate_residual(*ARGS)


def test_a_kernel_runs_when_asked_for_by_name(kernels: dict[str, Implementation]) -> None:
    kernels["triton"] = answering(7.0)
    assert set(msf.available_backends(GATE)) == {"triton", "reference"}
    with msf.backend("triton"):
        assert (msf.gate_residual(*ARGS) == 7).all()
    with msf.backend("auto"):
        assert not (msf.gate_residual(*(arg.cpu() for arg in ARGS)) == 7).any()


def test_a_kernel_may_decline_the_machine_or_the_arguments(
    kernels: dict[str, Implementation],
) -> None:
    kernels["cuda"] = answering(1.0, unsupported_device_reason=lambda device: "no driver")
    kernels["triton"] = answering(
        2.0, unsupported_args_reason=lambda x, y, y_bias, gate, _: f"D = {x.shape[-1]} is odd"
    )
    assert msf.explain_choice(GATE).unsupported_reasons == {
        "cuda": "no driver",
        "triton": None,
        "reference": None,
    }
    for name, reason in {"cuda": "no driver", "triton": "D = 5 is odd"}.items():
        with (
            msf.backend(name),
            pytest.raises(msf.BackendUnavailable, match=f"cannot run: {reason}"),
        ):
            msf.gate_residual(*ARGS)


def test_the_automatic_order_and_its_log(
    kernels: dict[str, Implementation],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 0)  # where the order is ours, whatever takes part in it

    def run() -> float:
        return dispatch.run(GATE, gpu, *ARGS)[0, 0, 0].item()

    monkeypatch.setattr(measurements, "fastest", lambda *_: ())
    kernels["cuda"], kernels["triton"] = answering(1.0), answering(2.0)
    with msf.backend("auto"), caplog.at_level(logging.INFO, dispatch.__name__):
        assert run() == 1
        kernels["cuda"] = answering(1.0, unsupported_args_reason=lambda *_: "D is odd")
        assert [run(), run()] == [2, 2]
    assert caplog.messages == [f"{GATE}: not on cuda: D is odd"]


def test_a_kernel_that_does_not_compile_is_left_and_said_once(
    kernels: dict[str, Implementation], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    calls = []

    def run(*args: Any) -> None:
        calls.append(args)
        raise dispatch.CompilationFailed("Triton 9 cannot compile gate_kernel here: no luck")

    monkeypatch.setattr(dispatch, "automatic_order", lambda *_: ("triton", "reference"))
    monkeypatch.setattr(dispatch, "_failed", {})
    kernels["triton"] = Implementation(run)
    with msf.backend("auto"):
        got = [msf.gate_residual(*ARGS) for _ in range(2)]
    assert len(calls) == 1 and torch.equal(*got)
    line = "gate_residual: not on triton from here on: Triton 9 cannot compile gate_kernel here"
    warnings = [entry.message for entry in caplog.records if entry.levelname == "WARNING"]
    assert warnings == [f"{line}: no luck"]
    assert msf.available_backends(GATE) == ("reference",)
    with msf.backend("triton"), pytest.raises(msf.BackendUnavailable, match="gate_kernel here: no"):
        msf.gate_residual(*ARGS)


def test_backward_in_another_thread_follows_the_request(kernels: dict[str, Implementation]) -> None:
    kernels["triton"] = answering(7.0)
    seen: list[torch.Tensor] = []
    with msf.backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(msf.gate_residual(*ARGS)))
        thread.start()
        thread.join()
    assert (seen[0] == 7).all()


def test_the_context_restores_the_request_after_an_error() -> None:
    before = dispatch._requested
    with pytest.raises(KeyError), msf.backend("triton"):
        raise KeyError
    assert dispatch._requested == before


def test_blocks_of_threads_end_in_any_order() -> None:
    before = dispatch._requested
    blocks = [msf.backend(name) for name in ("triton", "auto", "triton")]
    for block in blocks:
        block.__enter__()
    asked = []
    for index in (0, 2, 1):
        blocks[index].__exit__(None, None, None)
        asked.append(dispatch._requested)
    assert asked == ["triton", "auto", before]


def test_unknown_names() -> None:
    line = "^unknown backend 'tirton': choose auto, cuda, triton, reference$"
    with pytest.raises(ValueError, match=line), msf.backend("tirton"):
        pass
    for request, line in {
        "cudnn": "unknown backend 'cudnn': choose auto, cuda, triton, reference",
        "pyramid_split=flash": "unknown backend 'flash' of pyramid_split: choose auto, cuda, ",
        "norm=cuda": "unknown operator 'norm': known are ",
        "attention_backward=flash": "choose for attention: its gradient follows",
    }.items():
        with pytest.raises(ValueError, match=f"^{line}"), msf.backend(request):
            pass
    for name in (1, True, ["cuda"]):
        line = f"^unknown backend .*{re.escape(str(name))}.*: choose auto, cuda, triton, reference$"
        with pytest.raises(ValueError, match=line), msf.backend(name):  # type: ignore[arg-type]
            pass
    for ask in (msf.available_backends, msf.explain_choice, msf.requested_backend):
        with pytest.raises(
            ValueError, match=r"^unknown operator 'norm': known are adaln_modulate, "
        ):
            ask("norm")
        with pytest.raises(ValueError, match=r"^unknown operator \['norm'\]: known are "):
            ask(["norm"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("auto", ""),
        ("reference", ""),
        ("triton,gate_residual=reference", ""),
        ("triton", "BackendUnavailable: gate_residual: backend triton cannot run: "),
        ("tirton", "ValueError: unknown backend 'tirton': choose auto, cuda, triton, reference"),
    ],
)
def test_environment_variable(value: str, line: str) -> None:
    code = "import torch, msf_kernels as m; x = torch.ones(1, 1, 1); m.gate_residual(x, x, x[0])"
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "MSF_BACKEND": value, "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (process.returncode == 0) == (line == "")
    assert line in process.stderr


BUILT = ["80", "90a", "120"]


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((8, 0), True), ((8, 9), True), ((9, 0), True), ((7, 5), False), ((10, 0), False)],
    ids=str,
)
def test_the_extension_declines_a_gpu_it_was_not_built_for(
    capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = SimpleNamespace(build_config=lambda: {"cuda_architectures": BUILT})
    monkeypatch.setattr(extension, "module", lambda: build)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    extension._gpu_unsupported_reason.cache_clear()
    reason = extension._gpu_unsupported_reason(torch.device("cuda", 0))
    extension._gpu_unsupported_reason.cache_clear()
    name = "sm_{}{}".format(*capability)
    assert reason is None if runs else reason and reason.startswith(f"this GPU is {name}, ")


def test_what_is_available_is_what_a_call_takes(
    kernels: dict[str, Implementation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the measured order, without the GPUs that the extension was not built for."""
    gpu, other = torch.device("cuda", 0), torch.device("cuda", 1)
    build = SimpleNamespace(build_config=lambda: {"cuda_architectures": ["90"]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(extension, "emulation", None)
    monkeypatch.setattr(extension, "module", lambda: build)
    monkeypatch.setattr(extension, "_machine_unsupported_reason", lambda: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (9, 0) if device == gpu else (8, 0)
    )
    monkeypatch.setattr(
        measurements,
        "fastest",
        lambda op, device, sizes: ["cuda", "triton"] if device == other else ["triton"],
    )
    extension._gpu_unsupported_reason.cache_clear()
    kernels["cuda"] = answering(1.0, unsupported_device_reason=extension.unsupported_reason)
    kernels["triton"] = answering(2.0)
    with msf.backend("auto"):
        for device in (gpu, other):
            assert dispatch.run(GATE, device, *ARGS)[0, 0, 0] == 2
            assert msf.chosen_backend(GATE, device) == "triton"
    assert msf.available_backends(GATE, gpu) == ("triton", "cuda", "reference")
    assert msf.available_backends(GATE, other) == ("triton", "reference")
    reason = "this GPU is sm_80, the extension was built for 90; set MSF_CUDA_ARCHS and build again"
    assert msf.explain_choice(GATE, other).unsupported_reasons["cuda"] == reason
    with pytest.raises(ValueError, match=r"^no device cuda:2 here: choose cpu or cuda$"):
        msf.explain_choice(GATE, "cuda:2")
    extension._gpu_unsupported_reason.cache_clear()


def test_tensors_of_the_cpu_take_the_reference_first(kernels: dict[str, Implementation]) -> None:
    kernels["triton"] = answering(7.0)
    cpu = torch.device("cpu")
    assert msf.available_backends(GATE, cpu) == ("reference", "triton")
    with msf.backend("auto"):
        assert msf.chosen_backend(GATE, cpu) == "reference"
    with msf.backend("triton"):
        assert msf.chosen_backend(GATE, cpu) == "triton"
    with msf.backend("cuda"):
        assert msf.chosen_backend(GATE, cpu) is None


def test_a_backend_for_one_operator(kernels: dict[str, Implementation]) -> None:
    kernels["triton"] = answering(7.0)
    for request in ({"name": "auto", GATE: "triton"}, {"name": f"auto,{GATE}=triton"}):
        with msf.backend(**request):
            assert (msf.gate_residual(*ARGS) == 7).all()
            assert msf.requested_backend(f"{GATE}_backward") == "triton"
            assert msf.requested_backend("attention") == "auto"
            with msf.backend(attention="flash"):
                assert msf.requested_backend("attention") == "flash"
                assert msf.requested_backend(GATE) == "triton"
            with msf.backend("reference"):
                assert not (msf.gate_residual(*ARGS) == 7).any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
@pytest.mark.parametrize("ask", [msf.explain_choice, msf.available_backends, msf.chosen_backend])
@pytest.mark.parametrize("device", ["cuda:1", "nope", 3, 1.5])
def test_a_device_that_is_not_here(ask: Callable[..., Any], device: Any) -> None:
    with pytest.raises(ValueError, match=rf"^no device {device} here: choose cpu$"):
        ask(GATE, device)
    assert ask(GATE, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the reasons on a CPU")
def test_cuda_tensors_only_and_why() -> None:
    op, x = "pyramid_split", normal(1, 1, 2, 2)
    reason = msf.explain_choice(op).unsupported_reasons["cuda"]
    assert reason
    with msf.backend("cuda"), pytest.raises(msf.BackendUnavailable, match=re.escape(reason)):
        msf.pyramid_split(x)
