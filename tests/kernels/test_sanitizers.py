"""The operators' tests once more, with the emulated CUDA kernels under the sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulation.build import environment

HERE = Path(__file__).parent
FAMILIES = ("library", "adaln", "pyramid", "tokens", "interpolation", "euler", "qk_norm_rope")
FILES = [str(HERE / f"test_{name}.py") for name in FAMILIES]
# Compiling and autograd's checks are no business of the kernels'. A thread of the emulation costs
# ThreadSanitizer 100 times as much as AddressSanitizer, so it gets each operator's call only.
TESTS = {
    "asan": "cuda and not (compiles or opcheck or gradcheck or recompile or bad_input)",
    "tsan": "cuda and (strided or bitwise or bit_for_bit or (channels_last and 16))",
}
OUT_OF_BOUNDS = """
import torch
from kernels.emulated import emulated
x = [torch.zeros(64) for _ in range(4)]
emulated().flow_interpolate(1, 1, 65, *(t.data_ptr() for t in (x[0], x[1], x[0], *x[2:])), None)
"""


def run(variant: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | environment(variant, preload=True)
    variables |= {"MSF_EMULATION_VARIANT": variant, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, cwd=HERE.parent, capture_output=True, text=True)


@pytest.mark.parametrize("variant", TESTS)
def test_kernels_are_clean(variant: str) -> None:
    result = run(variant, "-m", "pytest", "-q", "-x", *FILES, "-k", TESTS[variant])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_a_write_beyond_a_tensor_is_seen() -> None:
    result = run("asan", "-c", OUT_OF_BOUNDS)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr
