"""csrc/bindings.cpp and csrc/kernels compiled for the host: the "cuda" backend without a GPU."""

from __future__ import annotations

import functools
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


@functools.lru_cache
def emulated(variant: str = "plain") -> ModuleType:
    """The extension with emulated kernels; compiled at the first call, which takes half a minute."""
    sources = [CSRC / "bindings.cpp", *sorted((CSRC / "kernels").glob("*.cu"))]
    library = build(sources, variant, definitions=DEFINITIONS, module=True)
    return load("msf_emulated", library)
