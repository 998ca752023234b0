"""Show what this machine offers, and which backend each operator takes here and why."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .. import models, tables

OPTIONAL = (
    "diffusers",
    "flash-attn",
    "matplotlib",
    "pillow",
    "scikit-image",
    "scikit-learn",
    "tensorboard",
    "tqdm",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command reports on the environment as it is."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    import msf_kernels

    from ...precision import bf16_instructions

    requested = os.environ.get("MSF_BACKEND") or "auto"
    problems, operators = [], {}
    try:
        with msf_kernels.backend(requested):
            operators = {op: _operator(op) for op in msf_kernels.OPERATORS}
    except ValueError as error:
        problems.append(f"MSF_BACKEND: {error}")
    if failing := [op for op, found in operators.items() if found["backend"] is None]:
        problems.append(f"MSF_BACKEND={requested} cannot run {', '.join(failing)}; use auto")
    return {
        "versions": {
            "msf": _version("msf-diffusion"),
            "python": platform.python_version(),
            "torch": _version("torch"),
            "triton": _version("triton"),
            "nvcc": _nvcc(),
        },
        "gpu": _gpu(),
        "bf16_on_cpu": ", ".join(bf16_instructions()) or None,
        "extension": msf_kernels.build_config(),
        "optional_packages": {name: _version(name) for name in OPTIONAL},
        "MSF_BACKEND": requested,
        **_order(),
        "operators": operators,
        "problems": problems,
    }


def text(document: dict[str, Any]) -> str:
    packages = document["optional_packages"]
    present = [f"{name} {found}" for name, found in packages.items() if found]
    extension = document["extension"]
    built = ", ".join(f"{key} {value}" for key, value in extension.items() if key != "extension")
    facts = [
        *((name, found or "not found") for name, found in document["versions"].items()),
        ("GPU", document["gpu"]["name"] or f"none: {document['gpu']['reason']}"),
        ("bf16 on CPU", document["bf16_on_cpu"] or "emulated, so training uses float32"),
        ("extension", built if extension["extension"] else f"none: {extension['reason']}"),
        ("optional", ", ".join(present) or "none"),
        ("not installed", ", ".join(name for name, found in packages.items() if not found) or "-"),
        ("MSF_BACKEND", document["MSF_BACKEND"]),
        ("order", document["order"]),
    ]
    rows = [
        (
            op,
            found["backend"],
            "; ".join(f"{name}: {why}" for name, why in found["reasons"].items()),
        )
        for op, found in document["operators"].items()
    ]
    parts = [tables.pairs(facts)]
    if rows:
        parts.append(tables.table(("operator", "backend here", "why not the others"), rows))
    if measured := document["measured"]:
        parts.append("\n".join([f"measured on {document['measured_on']}", *measured.values()]))
    parts += [f"problem: {problem}" for problem in document["problems"]]
    return "\n\n".join(parts)


def _operator(op: str) -> dict[str, Any]:
    """Return the backend that ``op`` takes here, None if it cannot run, and why not the others."""
    from msf_kernels import explain_choice

    choice = explain_choice(op)
    return {"backend": choice.backend, "reasons": choice.other_reasons}


def _order() -> dict[str, Any]:
    """Return which measurements decide the automatic order here, and what they were, by
    operator."""
    if models.unsupported_reason("cuda"):
        return {"order": "the reference, as on any CPU", "measured_on": None, "measured": {}}
    import torch

    from msf_kernels import measurements

    table = measurements.table_for(torch.device("cuda", 0))
    if table is None:
        return {"order": "not measured on any GPU", "measured_on": None, "measured": {}}
    order = f"measured on {table.gpu}"
    if table.gpu != measurements.slug(torch.device("cuda", 0)):
        major, minor = torch.cuda.get_device_capability(0)
        order += f", the nearest to sm_{major}{minor}"
    return {"order": order, "measured_on": table.gpu, "measured": table.best}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvcc() -> str | None:
    if not (nvcc := shutil.which("nvcc")):
        return None
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release ([\d.]+)", output)
    return found[1] if found else None


def _gpu() -> dict[str, Any]:
    if reason := models.unsupported_reason("cuda"):
        return {"name": None, "reason": reason}
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "count": torch.cuda.device_count(),
    }
