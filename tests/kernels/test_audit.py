"""The audit of CUDA and of Triton kernels, both of which run in CI."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import msf_kernels
from msf_kernels.audit import cuda
from msf_kernels.audit.row import Row
from processes import process

pytest.importorskip("triton")
from msf_kernels.audit import triton as audit_triton

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


COMPILE = """
import re
from functools import partial
import torch
from msf_kernels.audit import triton as audit
from msf_kernels.pyramid.triton import AUDITED
new = partial(audit._new, dtype=torch.float32, memory_format=torch.contiguous_format)
((name, compiled, log),) = audit._compile(partial(AUDITED["split nearest"], new), 90)
row = audit._row(name, "", 90, compiled, log, audit.BUDGET)
assert row.problem() is None and 8 <= row.registers <= row.budget, row
code = compiled.asm["ptx"]
assert "div.rn.f32" in code and not re.search(r"fma\\.|\\.ftz|div\\.full", code)
assert set(re.findall(r"(?:ld|st)\\.global\\.v4", code)) == {"ld.global.v4", "st.global.v4"}
audit.DTYPES = {"bf16": torch.bfloat16}
assert [row.problem() for row in audit.rows_of("tokens", 80)] == [None, None]
from msf_kernels.attention.triton import attention
new = partial(new, dtype=torch.float64)
call = partial(attention, new(1, 16, 48), new(16), new(16), None, 1, 0.1)
((name, compiled, log),) = audit._compile(call, 90)
assert "0d3FB999999999999A" in compiled.asm["ptx"]  # 0.1, of which float32 would end in zeros
"""


def test_kernels_compile_without_a_gpu() -> None:
    result = process(COMPILE, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr


def test_the_audit_says_that_it_cannot_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"^the audit compiles Triton kernels: unset TRITON_INT"):
        next(audit_triton.rows())


def test_the_audit_finds_the_families() -> None:
    kernels = [op for op in msf_kernels.OPERATORS if "triton" in msf_kernels.backends_of(op)]
    modules = {getattr(msf_kernels, op).__module__ for op in kernels}
    assert {f"msf_kernels.{family}.op" for family in audit_triton.FAMILIES} == modules


LOG = "0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\nUsed 40 registers"


def audited(monkeypatch: pytest.MonkeyPatch, *launches: tuple[str, str]) -> list[Row]:
    """The audit of one call that launches kernels of these (hash, log of ptxas)."""
    metadata = SimpleNamespace(shared=16)
    compiled = [("k", SimpleNamespace(hash=hash, metadata=metadata), log) for hash, log in launches]
    monkeypatch.setattr(audit_triton, "_compile", lambda *_: compiled)
    return audit_triton.rows_of("flow", 90)


def test_only_a_kernel_known_already_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = audited(monkeypatch, ("a", LOG), ("a", ""), ("b", LOG))
    assert (first.registers, first.shared, first.spill, first.stack) == (40, 16, 12, 0)
    assert second == first
    for log in ("", "ptxas info: none", LOG + LOG):
        with pytest.raises(RuntimeError, match=r"^flow\.k \(.*\) on sm_90: cannot read the log of"):
            audited(monkeypatch, ("a", LOG), ("b", log))


@pytest.mark.parametrize(
    ("registers", "spill", "stack", "line"),
    [
        (64, 0, 0, None),
        (65, 0, 0, "k (c) on sm_90: takes 65 registers, want at most 64"),
        (8, 4, 0, "k (c) on sm_90: spills 4 bytes, has 0 bytes of stack, want none"),
        (8, 0, 8, "k (c) on sm_90: spills 0 bytes, has 8 bytes of stack, want none"),
    ],
)
def test_problems_of_a_row(registers: int, spill: int, stack: int, line: str | None) -> None:
    row = Row("triton", "k", "c", "sm_90", registers, 0, spill, stack, budget=64)
    assert row.problem() == line
