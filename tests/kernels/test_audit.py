"""The audit of CUDA kernels; that of Triton is tested in test_triton.py, both run in CI."""

from __future__ import annotations

import pytest

from msf_kernels.audit import cuda

LISTING = """
Fatbin elf code:
================
arch = sm_90
 Function void msf::(anonymous namespace)::split_kernel<float, msf::Layout<4, true>, 0>(int):
  REG:{plain} STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_120
 Function void msf::split_kernel<__half, msf::Layout<8, false>, 1>(int):
  REG:200 STACK:0 SHARED:64 LOCAL:{local} CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def problems(**numbers: int) -> list[str]:
    listing = LISTING.format(**{"plain": 80, "stack": 0, "local": 0, **numbers})
    return [problem for row in cuda.parse(listing) if (problem := row.problem())]


def test_rows_say_which_kernel_and_gpu() -> None:
    first, second = cuda.parse(LISTING.format(plain=80, stack=0, local=0))
    assert (first.kernel, first.configuration) == (
        "split_kernel",
        "float, Layout<4, true>, 0",
    )
    assert (first.architecture, first.registers, second.architecture) == ("sm_90", 80, "sm_120")
    assert second.shared == 64 and second.budget > first.budget


def test_a_spill_and_too_many_registers_are_problems() -> None:
    assert not problems()
    (stack,) = problems(stack=16)
    assert "Layout<4, true>, 0) on sm_90: spills 0 bytes, has 16 bytes of stack" in stack
    (spill,) = problems(local=8)
    assert "on sm_120: spills 8 bytes" in spill
    (registers,) = problems(plain=cuda.PLAIN + 1)
    assert registers.endswith(f"takes {cuda.PLAIN + 1} registers, want at most {cuda.PLAIN}")


def test_without_kernels_there_is_nothing_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "build_config", lambda: {"extension": True, "cuda": False})
    with pytest.raises(
        RuntimeError, match="no CUDA kernels in the extension: it was built without"
    ):
        list(cuda.rows())
