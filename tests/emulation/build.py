"""Compile CUDA sources with g++ against csrc/emulation, so that their kernels run on the host.

Variants: `plain`; `asan`, AddressSanitizer and UndefinedBehaviorSanitizer; `tsan`, ThreadSanitizer
(before GCC 14 only where vm.mmap_rnd_bits is at most 28).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulation"

# No contraction of a * b + c, which g++ would do on aarch64. TLS in the initial-exec model, because
# each use of threadIdx is one: in a shared library a pointwise kernel runs 3 times as fast with it.
FLAGS = ["-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-ftls-model=initial-exec"]
VARIANTS = {
    "plain": [],
    # g++ takes three times as long to optimise this, more than the tests then save.
    "asan": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-fsanitize=thread"],
}
FRAMES = "-fno-omit-frame-pointer"  # for the stack traces of the sanitizers
RUNTIMES = {"plain": [], "asan": ["asan", "ubsan"], "tsan": ["tsan"]}


class CompileError(RuntimeError):
    """The compiler is missing, or rejects the sources; then its output is the message."""


def build(
    sources: Sequence[Path],
    variant: str = "plain",
    *,
    definitions: Iterable[str] = (),
    includes: Iterable[Path] = (),
    module: bool = False,
) -> Path:
    """The executable, or shared library, made of `sources`; compiled only if none is in the cache.

    Args:
        sources: files to compile as C++, whatever their suffix.
        variant: "plain", "asan" or "tsan".
        definitions: macros, "NAME" or "NAME=VALUE" as the preprocessor is to see them.
        includes: folders searched for headers besides `csrc`, and for sources that others include.
        module: a shared library, with the headers of pybind11 and Python at hand: for a pybind11
            module (see `load`) or ctypes.

    Raises:
        CompileError: no compiler (g++, or the environment's CXX), or an error in the sources.
    """
    folders = [CSRC, *includes]
    flags = [*FLAGS, *VARIANTS[variant], *([FRAMES] if VARIANTS[variant] else [])]
    flags += [f"-D{definition}" for definition in definitions]
    if module:
        system = [pybind11.get_include(), sysconfig.get_path("include")]
        flags += ["-shared", "-fPIC", "-fvisibility=hidden"]
        flags += [f"-isystem{folder}" for folder in system]
    headers = {
        file
        for pattern in ("*.hpp", "*.cuh", "*.h")
        for folder in (CSRC, *(source.parent for source in sources))
        for file in folder.rglob(pattern)
    }
    included = {file for folder in includes for file in folder.rglob("*") if file.is_file()}
    key = _digest([*sources, *sorted(headers), *sorted(included)], flags)
    flags += [f"-I{folder}" for folder in folders]
    suffix = ".so" if module else ""
    target = CACHE / f"{sources[0].stem}-{variant}-{key}{suffix}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it: half a minute of all cores
        if not target.exists():
            _compile([_compiler(), *flags], sources, target)
    return target


def load(name: str, library: Path) -> ModuleType:
    """The pybind11 module PYBIND11_MODULE(`name`, ...) that `build` put into `library`."""
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(variant: str, *, preload: bool = False) -> dict[str, str]:
    """Variables for a process that runs what `build` made: it ends at the first report.

    `preload` is for a Python that loads a module: the sanitizers must be there before it, and
    libstdc++ before them, or ASan crashes at the first C++ exception.
    """
    variables = {
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    if preload and RUNTIMES[variant]:
        names = [f"lib{name}.so" for name in [*RUNTIMES[variant], "stdc++"]]
        variables["LD_PRELOAD"] = " ".join(_output(f"-print-file-name={name}") for name in names)
    return variables


def _compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise CompileError(f"{compiler}: not found; install g++, or set CXX to its name")
    return compiler


def _output(flag: str) -> str:
    return subprocess.check_output([_compiler(), flag], text=True).strip()


@functools.lru_cache
def _version(compiler: str) -> str:
    return subprocess.check_output([compiler, "--version"], text=True)


def _digest(files: Iterable[Path], flags: Sequence[str]) -> str:
    """Of everything that the result depends on: compiler, flags, sources and headers. A copy in
    another folder has the same, and need not be compiled again."""
    digest = hashlib.sha256("\n".join([_version(_compiler()), *flags]).encode())
    for file in files:
        digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(command: Sequence[str], sources: Sequence[Path], target: Path) -> None:
    """Compile under another name, then rename: the target is whole or absent."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = [f"{folder}/{i}.o" for i in range(len(sources))]

        def compile_one(source: Path, output: str) -> None:
            _run(*command, "-c", "-xc++", str(source), "-o", output)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        temporary = f"{folder}/{target.name}"
        _run(*command, *objects, "-o", temporary)
        os.replace(temporary, target)


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{' '.join(command)}\n{result.stderr}")
