"""Which backend comes first where somebody measured: orders by GPU, by nearest GPU, by sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import msf_kernels as msf
from msf_kernels import dispatch, measurements
from msf_kernels.qk_norm_rope.examples import preparation

GATE = "gate_residual"


@pytest.fixture
def h200(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes what was measured on the GPU that this machine seems to have, or on another."""

    def write(orders: Any, gpu: str = "h200", capability: str = "9.0") -> None:
        table = {"capability": capability, "orders": orders, "best": {}}
        (tmp_path / f"{gpu}.json").write_text(json.dumps(table))
        forget()

    def forget() -> None:
        measurements.table_for.cache_clear()
        measurements.fastest.cache_clear()

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(measurements, "FOLDER", tmp_path)
    forget()
    yield write
    forget()


def test_measured_backends_come_first(h200: Callable[..., None]) -> None:
    gpu = torch.device("cuda", 0)
    assert dispatch.automatic_order(GATE, gpu) == dispatch.BACKENDS
    h200({GATE: ["triton"]})
    assert (
        dispatch.automatic_order(f"{GATE}_backward", gpu)
        == dispatch.automatic_order(GATE, gpu)
        == ("triton", "cuda", "reference")
    )
    assert dispatch.automatic_order("attention", gpu) == (
        *("cuda", "triton", "cudnn", "flash", "efficient", "flash-attn", "reference"),
    )
    h200({GATE: ["triton"], f"{GATE}_backward": ["reference"]})
    assert dispatch.automatic_order(f"{GATE}_backward", gpu)[0] == "reference"


@pytest.mark.parametrize(
    ("name", "capability", "table"),
    [
        ("NVIDIA H200", (9, 0), "h200"),
        ("NVIDIA H100 PCIe", (9, 0), "a-hopper"),  # of two alike the first by name
        ("NVIDIA A100-SXM4-80GB", (8, 0), "l40s"),
        ("NVIDIA GB300", (10, 3), "gb200"),
        ("NVIDIA of tomorrow", (20, 0), "gb200"),
        ("between 8.9 and 9.0, and 10.0", (9, 5), "gb200"),  # as near, and higher
    ],
)
def test_a_gpu_that_nobody_measured_takes_the_table_of_the_nearest(
    name: str,
    capability: tuple[int, int],
    table: str,
    h200: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = {"h200": "9.0", "a-hopper": "9.0", "l40s": "8.9", "gb200": "10.0"}
    for gpu, measured_capability in tables.items():
        h200({GATE: ["triton"]}, gpu, measured_capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert measurements.table_for(gpu).gpu == table
    assert dispatch.automatic_order(GATE, gpu) == ("triton", "cuda", "reference")


@pytest.mark.parametrize(
    "file", sorted(measurements.FOLDER.glob("*.json")), ids=lambda file: file.stem
)
def test_a_gpu_that_was_measured_follows_its_table(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = measurements._read(file)
    monkeypatch.setattr(measurements, "table_for", lambda device: table)
    measurements.fastest.cache_clear()
    gpu = torch.device("cuda", 7)
    for op, found in table.orders.items():
        entries = [{"sizes": (), "order": found}] if isinstance(found[0], str) else found
        for entry in entries:
            order = dispatch.automatic_order(op, gpu, tuple(entry["sizes"]))
            assert list(order[: len(entry["order"])]) == entry["order"]
            assert set(order) == set(dispatch.BACKENDS) | set(msf.backends_of(op))
    measurements.fastest.cache_clear()


def test_the_measured_sizes_nearest_to_a_call_decide(
    h200: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, op = torch.device("cuda", 0), "attention"
    first = {(64, 64, 0): "triton", (1024, 64, 0): "cudnn", (1024, 64, 1): "flash"}
    h200({op: [{"sizes": sizes, "order": [name]} for sizes, name in first.items()]})
    for sizes, name in first.items():
        assert dispatch.automatic_order(op, gpu, sizes)[0] == name
    assert dispatch.automatic_order(op, gpu)[0] == "triton"
    entry = dispatch._registry[op]
    for name in first.values():
        monkeypatch.setitem(entry, name, dispatch.Implementation(lambda *_, name=name: name))
    weight = torch.ones(72)
    for tokens, options, name in (
        *((1, {}, "triton"), (272, {}, "cudnn"), (4096, {}, "cudnn")),
        (1000, {"q_weight": weight}, "flash"),
        (1000, {"qkv_bias": torch.ones(3 * 2 * 72)}, "flash"),
    ):
        args = torch.empty(1, tokens, 3 * 2 * 72), *preparation(2, **options)
        with msf.backend("auto"):
            assert dispatch.run(op, gpu, *args) == name
        saved = args[0], args[0], args[0], *args
        assert dispatch._sizes[f"{op}_backward"](*saved) == dispatch._sizes[op](*args)
