"""What the installed package promises: extension, dependencies, direction of imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import msf
from msf_kernels import build_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = {"msf": ROOT / "python" / "msf", "msf_kernels": ROOT / "msf_kernels"}


def imported_names(source: str) -> Iterator[str]:
    """Dotted name of everything imported absolutely, e.g. ``msf_kernels.attention``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def breaks_an_arrow(package: str, name: str) -> bool:
    """The model layer sees the operators' public names only; the operators never see the model."""
    top, *rest = name.split(".")
    if package == "msf_kernels":
        return top == "msf"
    return top == "triton" or (top == "msf_kernels" and (len(rest) > 1 or rest[:1] == ["_C"]))


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("msf", "import triton.language as tl"),
        ("msf", "from msf_kernels import _C"),
        ("msf", "def f():\n    from msf_kernels.attention import triton"),
        ("msf", "import msf_kernels.attention.cuda"),
        ("msf_kernels", "from msf.config import MSFConfig"),
    ],
)
def test_planted_import_is_seen(package: str, source: str) -> None:
    assert any(breaks_an_arrow(package, name) for name in imported_names(source))


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    broken = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imported_names(file.read_text())
        if breaks_an_arrow(package, name)
    ]
    assert not broken


def test_extension_describes_its_build() -> None:
    config = build_config()
    assert config["extension"], config
    assert config["version"] == version("msf-diffusion")
    assert re.fullmatch(r"\w+ [\d.]+", config["cxx_compiler"])
    assert config["cuda"] == bool(config["cuda_compiler"]) == bool(config["cuda_architectures"])
    assert all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in config["cuda_architectures"])


def imported(code: str, *modules: str) -> list[str]:
    """Which of the modules a process has imported after the code."""
    code = f"import sys; {code}; print(*{set(modules)} & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return output.stdout.split()


def test_import_is_quick() -> None:
    """Each of these takes longer to import than the package."""
    assert imported("import msf", "torch._dynamo", "triton", "matplotlib", "diffusers") == []


def test_reading_and_sampling_a_model_import_no_compiler(tmp_path: Path) -> None:
    """Nor what it needs: together they take as long to import as torch."""
    stages = (msf.StageConfig(width=8, depth=1, heads=1, patch=1),) * 2
    config = msf.MSFConfig((4, 4), channels=1, num_classes=0, stages=stages, steps=(1, 1))
    msf.MSF(config).save_pretrained(tmp_path)
    read = f"model = msf.MSF.from_pretrained({str(tmp_path)!r})"
    code = f"import msf; {read}; msf.sample(model, seeds=[0])"
    assert imported(code, "torch._dynamo", "sympy") == []


def test_tab_completion_offers_the_public_names() -> None:
    assert dir(msf) == sorted(msf.__all__)
    assert all(hasattr(msf, name) for name in dir(msf))


@pytest.mark.parametrize("package", PACKAGES)
def test_ships_types(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_torch_is_no_build_requirement_and_pinned_once() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert build
    assert not any(requirement.startswith("torch") for requirement in build)

    pin = re.compile(r"\btorch(_version)?\s*[:?]?={1,2}\s*[\"']?\d", re.IGNORECASE)
    paths = [".ci/run", "CMakeLists.txt", "Makefile", "README.md", "pyproject.toml"]
    texts = [ROOT / path for path in paths] + sorted((ROOT / "docs").rglob("*.md"))
    pins = [path.name for path in texts for _ in pin.finditer(path.read_text())]
    assert pins == ["Makefile"]


def test_core_dependencies_are_three() -> None:
    core = [line for line in requires("msf-diffusion") or [] if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in core} == {"torch", "numpy", "safetensors"}
