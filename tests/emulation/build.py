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
import re
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
# g++ takes twice to three times as long to optimise what is under a sanitizer, more than the tests
# then save. Frame pointers are for its stack traces; half lies in memory as bfloat16 does.
SANITIZED = ["-O0", "-fno-omit-frame-pointer", "-DMSF_NO_HALF"]
VARIANTS = {
    "plain": [],
    # AddressSanitizer sees without those of UndefinedBehaviorSanitizer what a pointer leads to.
    "asan": [
        *(*SANITIZED, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        "-fno-sanitize=null,object-size,pointer-overflow",
    ],
    "tsan": [*SANITIZED, "-fsanitize=thread"],
}
RUNTIMES = {"plain": [], "asan": ["asan", "ubsan"], "tsan": ["tsan"]}


class CompileError(RuntimeError):
    """The compiler is missing, or rejects the sources; then its output is the message."""


def build(
    sources: Sequence[Path],
    variant: str = "plain",
    *,
    host: Sequence[Path] = (),
    definitions: Iterable[str] = (),
    includes: Iterable[Path] = (),
    module: bool = False,
) -> Path:
    """The executable, or shared library, made of `sources`; compiled where the cache has none.

    Args:
        sources: files to compile as C++, whatever their suffix.
        variant: "plain", "asan" or "tsan".
        host: sources without kernels, which are the same in every variant.
        definitions: macros, "NAME" or "NAME=VALUE" as the preprocessor is to see them.
        includes: folders searched for headers besides `csrc`, and for sources that others include.
        module: a shared library, with the headers of pybind11 and Python at hand: for a pybind11
            module (see `load`) or ctypes.

    Raises:
        CompileError: no compiler (g++, or the environment's CXX), or an error in the sources.
    """
    flags = [*FLAGS, *(f"-D{definition}" for definition in definitions)]
    if module:
        system = [pybind11.get_include(), sysconfig.get_path("include")]
        flags += ["-shared", "-fPIC", "-fvisibility=hidden"]
        flags += [f"-isystem{folder}" for folder in system]
    variant_flags = [*flags, *VARIANTS[variant]]
    parts = [(source, flags) for source in host] + [(source, variant_flags) for source in sources]
    folders = [f"-I{folder}" for folder in (CSRC, *includes)]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it: half a minute of all cores
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda part: _object(*part, folders), parts))
        key = _digest(objects, variant_flags)
        target = CACHE / f"{sources[0].stem}-{variant}-{key}{'.so' if module else ''}"
        _make(target, *variant_flags, *map(str, objects))
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
        found = (_run(f"-print-file-name={name}").strip() for name in names)
        variables["LD_PRELOAD"] = " ".join(found)
    return variables


def _compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise CompileError(f"{compiler}: not found; install g++, or set CXX to its name")
    return compiler


@functools.lru_cache
def _version(compiler: str) -> str:
    return subprocess.check_output([compiler, "--version"], text=True)


def _digest(files: Iterable[Path], flags: Sequence[str]) -> str:
    """Of all that the result depends on: compiler, flags, files. A copy in another folder has the
    same, and need not be compiled again."""
    digest = hashlib.sha256("\n".join([_version(_compiler()), *flags]).encode())
    for file in files:
        digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _object(source: Path, flags: Sequence[str], folders: Sequence[str]) -> Path:
    """The compiled source, which is in the cache if all that it includes is as it was."""
    compile_it = [*flags, *folders, "-xc++", str(source)]
    _, included = _run(*compile_it, "-MM").split(": ", 1)  # a rule of make's
    names = re.split(r"(?<!\\)\s+", included.replace("\\\n", "").strip())
    files = [Path(name.replace("\\ ", " ")) for name in names]
    target = CACHE / f"{source.stem}-{_digest(files, flags)}.o"
    _make(target, *compile_it, "-c")
    return target


def _make(target: Path, *arguments: str) -> None:
    """Run the compiler if there is no target, under another name: it is whole or absent."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            _run(*arguments, "-o", f"{folder}/{target.name}")
            os.replace(f"{folder}/{target.name}", target)


def _run(*arguments: str) -> str:
    command = [_compiler(), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout
