"""The audit of CUDA and of Triton kernels, both of which run in CI."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

import msf_kernels
from msf_kernels.audit import cuda
from msf_kernels.audit.occupancy import Launch
from msf_kernels.audit.row import Row
from msf_kernels.examples import families
from processes import program

pytest.importorskip("triton", minversion="3.6")  # 3.5 flushes what it divides
from triton import knobs

from msf_kernels.audit import disassembly
from msf_kernels.audit import triton as audit_triton
from msf_kernels.audit.instructions import fault
from msf_kernels.audit.uniform import uninitialised_reads

from .machine_code import sass

LISTING = """
Fatbin elf code:
================
arch = sm_90
 Function void msf::(anonymous)::pyramid_split_kernel<float, msf::Layout<4, true>, 0>(int):
  REG:{plain} STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_120
 Function void msf::pyramid_split_kernel<__half, msf::Layout<8, false>, 1>(int):
  REG:200 STACK:0 SHARED:1088 LOCAL:{local} CONSTANT[0]:648 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def problems(**numbers: int) -> list[str]:
    listing = LISTING.format(**{"plain": 80, "stack": 0, "local": 0, **numbers})
    return [problem for row in cuda.parse(listing) if (problem := row.problem())]


def test_rows_say_which_kernel_and_gpu() -> None:
    first, second = cuda.parse(LISTING.format(plain=80, stack=0, local=0))
    assert (first.kernel, first.configuration) == (
        "pyramid_split_kernel",
        "float, Layout<4, true>, 0",
    )
    assert (first.architecture, first.registers, second.architecture) == ("sm_90", 80, "sm_120")
    assert second.shared == 64 and (first.budget, second.budget) == (96, 224)


def test_a_spill_and_too_many_registers_are_problems() -> None:
    assert not problems()
    (stack,) = problems(stack=16)
    assert "Layout<4, true>, 0) on sm_90: spills 0 bytes, has 16 bytes of stack" in stack
    (spill,) = problems(local=8)
    assert "on sm_120: spills 8 bytes" in spill
    (registers,) = problems(plain=97)
    assert registers.endswith("takes 97 registers, want at most 96")


def test_every_kernel_has_a_budget() -> None:
    sources = "".join(path.read_text() for path in cuda.KERNELS.iterdir())
    assert cuda._budgets().keys() == set(re.findall(r"(\w+_kernel)\(", sources))
    with pytest.raises(RuntimeError, match=r"^other_kernel has no line `// registers: N` above it"):
        cuda._budget("other_kernel", "float")


def test_without_kernels_there_is_nothing_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "build_config", lambda: {"extension": True, "cuda": False})
    with pytest.raises(
        RuntimeError, match="no CUDA kernels in the extension: it was built without"
    ):
        list(cuda.rows())


def test_kernels_compile_without_a_gpu() -> None:
    result = program("compile_kernels.py", TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr


TRITON_3_6 = Path(__file__).parents[2] / "build" / "triton-3.6.0"  # where `make audit` puts it


@pytest.mark.parametrize("compiler", ["installed", "installed, ptxas 12", "triton 3.6"])
def test_a_product_that_ptxas_folds_away_fails_the_audit(compiler: str) -> None:
    variables, first = {}, None
    if compiler == "installed, ptxas 12":
        variables["TRITON_PTXAS_BLACKWELL_PATH"] = knobs.nvidia.ptxas.path
    elif compiler == "triton 3.6":
        if not TRITON_3_6.exists():
            pytest.skip(f"no {TRITON_3_6}: make audit installs it")
        first = TRITON_3_6
    result = program("folded_select.py", first=first, TRITON_INTERPRET="0", **variables)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (
        "selects 32 times between the accumulator of a product and zero" in found["folded"]["audit"]
    )
    if compiler != "installed":
        assert found["folded"]["sass"].startswith("has 8 null HGMMA")
    assert found["masked"] == {"audit": None, "sass": None}


WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16 {%f1,%f2}, %d1, %d2, 0;"
HGMMA = "HGMMA.64x8x16.F32.BF16 R24, gdesc[UR4], R24 ;"


@pytest.mark.parametrize(
    ("ptx", "sass", "line"),
    [
        ("", "", None),
        (WGMMA + "ex2.approx.f32 %f3, %f1;", HGMMA + "MUFU.EX2 R1, R2 ;", None),
        (WGMMA, HGMMA + HGMMA, None),  # an unrolled loop
        (WGMMA + WGMMA, HGMMA, "has 1 HGMMA in its SASS for 2 wgmma.mma_async in its PTX"),
        ("mma.sync.aligned {%f1}, {%r1}", "", "has 0 HMMA in its SASS for 1 mma.sync in its PTX"),
        ("ex2.approx.f32 %f1, %f2;", "", "has 0 MUFU.EX2 in its SASS for 1 ex2.approx in its PTX"),
        (
            WGMMA,
            "HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0 ;",
            "has 1 null HGMMA: ptxas took the result of a product for zero",
        ),
    ],
)
def test_what_ptxas_dropped_is_a_fault(ptx: str, sass: str, line: str | None) -> None:
    assert fault(ptx, sass) == line


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (("ULDC.64 UR4, c[0x0][0x210]", "STS [R1+UR5], R2"), []),
        (("UMOV UR4, 0x1", "STS [R1+UR5], R2"), ["STS [R1+UR5], R2"]),
        (("UIADD3 UR6, UP0, UR9, 0x20, URZ",), ["UIADD3 UR6, UP0, UR9, 0x20, URZ"]),
        (("R2UR P0, UR4, R3", "LDG.E R1, desc[UR4][R2.64]"), ["LDG.E R1, desc[UR4][R2.64]"]),
        # Two registers are read.
        (
            ("UMOV UR4, 0x1", "UMOV UR6, 0x1", "UMOV UR7, 0x1", "UIADD3.64 UR8, UR4, UR6, URZ"),
            ["UIADD3.64 UR8, UR4, UR6, URZ"],
        ),
        # Written on one of two ways.
        (("@P0 BRA 0x20", "UMOV UR4, 0x1", "STS [R1+UR4], R2"), []),
        # Written in the part that is left out.
        (("BRA 0x20", "UMOV UR4, 0x1", "STS [UR4], R2"), ["STS [UR4], R2"]),
        # A loop writes what its second round reads, its first round does not.
        (("STS [UR4], R2", "UMOV UR4, 0x1", "@P0 BRA 0x0"), []),
        # The descriptor of B alone, where A is in registers, and of A and B.
        (("UMOV UR6, 0x1", "UMOV UR7, 0x1", "HGMMA.64x8x16.F32 R4, R8, gdesc[UR4], R4"), []),
        (
            ("UMOV UR6, 0x1", "UMOV UR7, 0x1", "HGMMA.64x8x16.F32 R4, gdesc[UR4], R4"),
            ["HGMMA.64x8x16.F32 R4, gdesc[UR4], R4"],
        ),
    ],
)
def test_uniform_registers_that_nothing_has_written(lines: Sequence[str], found: list[str]) -> None:
    assert uninitialised_reads(sass(lines)) == found
    hopper = sass([*lines, "HGMMA.64x8x16.F32 R4, gdesc[URZ], R4"])
    line = f"reads uniform registers that nothing has written: {found[0]}" if found else None
    assert fault("", hopper) == line


@pytest.mark.parametrize(
    ("rest", "count"),
    [
        ("selp.f32 %f3, %f1, 0f00000000, %p1; selp.b32 %r1, 0, %f2, %p1;", 2),
        ("mov.b32 %r1, %f2; mov.f32 %r2, %r1; selp.b32 %r3, %r2, 0, %p1;", 1),
        ("mov.b64 %rd1, {%f1,%f2}; mov.b64 {%r1,%r2}, %rd1; selp.b32 %r3, %r1, 0, %p1;", 1),
        ("mov.b32 %f9, 0f00000000; selp.f32 %f3, %f1, %f9, %p1;", 1),
        ("mul.f32 %f3, %f1, %f2; selp.f32 %f4, %f3, 0f00000000, %p1;", 0),
        ("selp.f32 %f3, %f1, 0fFF800000, %p1; selp.b32 %r1, %f1, %f2, %p1;", 0),
    ],
)
def test_selects_between_an_accumulator_and_zero_are_a_fault(rest: str, count: int) -> None:
    found = fault(WGMMA + rest, HGMMA)
    assert (f"selects {count} times" in found) if found else count == 0


def test_the_audit_says_that_it_cannot_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"^the audit compiles Triton kernels: unset TRITON_INT"):
        next(audit_triton.rows())


def test_the_audit_knows_every_kernel_of_every_family() -> None:
    kernels = [op for op in msf_kernels.OPERATORS if "triton" in msf_kernels.backends_of(op)]
    modules = {getattr(msf_kernels, op).__module__ for op in kernels}
    assert {f"msf_kernels.{family}.op" for family in families()} == modules
    kernels_of = audit_triton.kernels_of
    assert kernels_of("tokens") == {"merge_kernel", "merge_backward_kernel"}
    assert all(map(kernels_of, families()))
    every = [f"{family}.{kernel}" for family in families() for kernel in kernels_of(family)]
    rows = [Row("triton", name, "", "sm_90", 0, 0, 0, 0, 96) for name in every]
    audit_triton.check_coverage(rows, families())
    line = f"no audited example launches {every[0]}"
    with pytest.raises(RuntimeError, match=f"^{re.escape(line)}$"):
        audit_triton.check_coverage(rows[1:], families())


def cubin(*sections: tuple[int, bytes]) -> bytes:
    """An ELF file of sections with these flags and contents, whose table stands at its end."""
    contents = b"".join(content for _, content in sections)
    header = struct.pack("<40xQ10xHH2x", 64 + len(contents), 64, len(sections))
    table, at = b"", 64
    for flags, content in sections:
        table += struct.pack("<8xQ8xQQ24x", flags, at, len(content))
        at += len(content)
    return header + contents + table


def test_one_run_of_nvdisasm_reads_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    data, lines = (2, b"x" * 40), sass(["MOV R1, R2", "EXIT", "NOP"]).splitlines()
    cubins = [cubin(data, (6, b"a" * 32)), cubin((6, b"b" * 16), data)]
    read: list[bytes] = []

    def run(command: Sequence[str], **_: object) -> SimpleNamespace:
        assert command[1:3] == ["--binary", "SM90"]
        read.append(Path(command[3]).read_bytes())
        return SimpleNamespace(stdout="\n".join(["\t.headerflags", *lines]))

    monkeypatch.setattr(disassembly, "subprocess", SimpleNamespace(run=run))
    assert disassembly.disassemble(cubins, 90) == ["\n".join(lines[:2]), lines[2]]
    assert read == [b"a" * 32 + b"b" * 16] and disassembly.disassemble([], 90) == []
    del lines[1]
    with pytest.raises(RuntimeError, match=r"^nvdisasm printed 2 instructions, want 3$"):
        disassembly.disassemble(cubins, 90)


LOG = "0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\nUsed 40 registers"


def audited(monkeypatch: pytest.MonkeyPatch, *launches: tuple[str, str]) -> list[Row]:
    """The audit of one call that launches kernels of these (hash, log of ptxas)."""
    same = {"asm": {"ptx": "", "cubin": b""}, "metadata": SimpleNamespace(shared=16)}
    launch = Launch(1320, 128, 16)
    kernel = Mock(__name__="k", __module__="msf_kernels.tokens.triton")
    compiled = [(kernel, SimpleNamespace(hash=hash, **same), log, launch) for hash, log in launches]
    monkeypatch.setattr(audit_triton, "_compile", lambda *_: compiled)
    code = [sass(["LDG.E.64 R2, [R4.64]"])]
    monkeypatch.setattr(audit_triton, "disassemble", lambda cubins, _: code * len(cubins))
    return audit_triton.rows_of("tokens", 90)


def test_only_a_kernel_known_already_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = audited(monkeypatch, ("a", LOG), ("a", ""), ("b", LOG))
    assert (first.registers, first.shared, first.spill, first.stack) == (40, 16, 12, 0)
    assert (first.blocks, first.threads, first.in_flight) == (12, 1280, 1280 * 8)
    assert second == first
    for log in ("", "ptxas info: none", LOG + LOG):
        with pytest.raises(RuntimeError, match=r"^tokens\.k \(.*\) on sm_90: cannot read the log"):
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
