"""The machine that a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe(device: torch.device) -> dict[str, Any]:
    """Return the device, the driver and the versions; None for what is not there."""
    machine: dict[str, Any] = {
        "device": device_name(device),
        "driver": None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
        )
        machine["ptxas"] = _ptxas()
        machine["capability"] = f"{properties.major}.{properties.minor}"
        machine["multiprocessors"] = properties.multi_processor_count
        machine["l2_bytes"] = properties.L2_cache_size
    return machine


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"CPU, {capability}, {threads} of {os.cpu_count()} cores"


def _ptxas() -> str | None:
    """Return the version of Triton's assembler, and of its other one for newer GPUs."""
    try:
        from triton import knobs
    except ImportError:
        return None
    tools = [knobs.nvidia.ptxas, getattr(knobs.nvidia, "ptxas_blackwell", None)]
    return ", ".join(tool.version for tool in tools if tool)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        process = subprocess.run(
            command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()
