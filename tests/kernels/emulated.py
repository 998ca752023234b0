"""csrc/bindings.cpp and csrc/kernels compiled for the host: the "cuda" backend without a GPU."""

from __future__ import annotations

import functools
import os
from types import ModuleType

from emulation.build import CSRC, build, load

DEFINITIONS = [
    "MSF_MODULE=msf_emulated",
    "MSF_HAVE_KERNELS=1",
    "MSF_HAVE_CUDA=0",
    'MSF_VERSION=""',
    'MSF_CXX_COMPILER=""',
    'MSF_CUDA_COMPILER=""',
    'MSF_CUDA_ARCHITECTURES=""',
]


@functools.cache
def emulated() -> ModuleType:
    """The extension with emulated kernels, compiled at the first call, which takes half a minute.

    MSF_EMULATION_VARIANT is "asan" or "tsan" in a process that the sanitizer was loaded into.
    """
    sources, host = sorted((CSRC / "kernels").glob("*.cu")), [CSRC / "bindings.cpp"]
    variant = os.environ.get("MSF_EMULATION_VARIANT", "plain")
    library = build(sources, variant, host=host, definitions=DEFINITIONS, module=True)
    return load("msf_emulated", library)
