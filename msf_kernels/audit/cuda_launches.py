"""What the example calls of the operators launch in CUDA, recorded on a machine without a GPU."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from math import prod
from unittest import mock

from torch import Tensor

from ..cuda_support import extension
from ..examples import families
from .calls import calls
from .occupancy import GPU, RESERVED_SHARED, Launch

# A kernel, and its template arguments without the names of namespaces.
Instance = tuple[str, str]
KERNEL = re.compile(r"(\w+_kernel)<(.*?)>[(\]]")


def launches(gpu: GPU) -> dict[Instance, set[Launch]]:
    """Return the launches of each kernel, with the dynamic part of their shared memory."""
    _C = extension.module()
    shared_memory = gpu.shared - RESERVED_SHARED
    found = defaultdict(set)
    with (
        # Launchers are called as those of the emulation: on no device and no stream.
        mock.patch.object(extension, "emulation", _C),
        mock.patch.object(extension, "shared_memory", lambda _: shared_memory),
        mock.patch.object(Tensor, "data_ptr", _address),
    ):
        for family in families():
            for _, call in calls(family, "cuda"):
                for text, grid, block, shared in _C.launches_of(partial(_as_far_as_it_goes, call)):
                    kernel, arguments = instance(text)
                    # Attention's examples are small: too small for kernels that others share.
                    if family != "attention" or kernel.startswith("attention"):
                        found[kernel, arguments].add(Launch(prod(grid), prod(block), shared))
    return found


def instance(text: str) -> Instance:
    """Return the kernel that a text of the compiler or of c++filt names.

    Raises:
        RuntimeError: it names none.
    """
    if not (found := KERNEL.search(text)):
        raise RuntimeError(f"no kernel with template arguments in {text!r}")
    return found[1], found[2].replace("msf::", "")


def _address(x: Tensor) -> int:
    """Return an address, not 0 as that is what kernels take for an absent tensor."""
    return 256 + int(x.storage_offset()) * x.element_size()


def _as_far_as_it_goes(call: Callable[[], None]) -> None:
    """Run a call up to the operator that CUDA does not take, if there is one."""
    with contextlib.suppress(NotImplementedError):
        call()
