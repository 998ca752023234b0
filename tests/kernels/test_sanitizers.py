"""The operators' tests once more, with the emulated CUDA kernels under the sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulation.build import environment
from processes import PROGRAMS

HERE = Path(__file__).parent
FAMILIES = (
    *(
        "library",
        "adaln",
        "adaln_rounding",
        "pyramid",
        "tokens",
        "interpolation",
        "euler",
        "qk_norm_rope",
    ),
    *("bias_gelu", "attention", "attention_cuda", "rope"),
)
FILES = [str(HERE / f"test_{name}.py") for name in FAMILIES]
# Compiling and autograd's checks are no business of the kernels', nor are tests that only repeat or
# count. A thread of the emulation costs ThreadSanitizer 100 times what AddressSanitizer pays, so it
# gets each operator's call only. Neither has kernels for half (emulation/build.py).
ELSEWHERE = "compiles or opcheck or gradcheck or recompile or bad_input"
REPEATED = "over_16k or padded or repeatable"
HALF = "fp16 or (float16 and not bfloat16)"
CALLS = "strided or bitwise or bit_for_bit or (channels_last and 16)"
TESTS = {
    "asan": f"cuda and not ({ELSEWHERE} or {REPEATED} or {HALF})",
    "tsan": f"cuda and ({CALLS}) and not ({HALF})",
}


def run(variant: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | environment(variant, preload=True)
    variables |= {"MSF_EMULATION_VARIANT": variant, "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, sys.path)])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, cwd=HERE.parent, capture_output=True, text=True)


@pytest.mark.parametrize("variant", TESTS)
def test_kernels_are_clean(variant: str) -> None:
    result = run(variant, "-m", "pytest", "-q", "-x", *FILES, "-k", TESTS[variant])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    skipped = [line for line in result.stdout.splitlines() if line.startswith("SKIPPED")]
    declined = [line for line in skipped if ": attention" in line]
    assert " passed" in result.stdout and skipped == declined


def test_a_write_beyond_a_tensor_is_seen() -> None:
    result = run("asan", str(PROGRAMS / "cuda_out_of_bounds.py"))
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr
