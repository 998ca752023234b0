"""What the audit says of launches: blocks that fit, bytes in flight, and where these come from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from msf_kernels.audit import cuda_launches, latency_bound
from msf_kernels.audit.cuda_launches import instance, launches
from msf_kernels.audit.in_flight import bytes_in_flight
from msf_kernels.audit.occupancy import GPUS, Launch
from msf_kernels.audit.row import Row
from msf_kernels.cuda_support import extension

from .emulated import emulated
from .machine_code import sass


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        ("sm_90", 256, 32, 0, 8),  # 64 warps
        ("sm_120", 256, 32, 0, 6),  # 48 warps
        ("sm_90", 32, 32, 0, 32),  # blocks
        ("sm_120", 32, 32, 0, 24),
        ("sm_90", 256, 33, 0, 6),  # 1,280 registers a warp, 12 warps a partition
        ("sm_90", 160, 80, 0, 4),  # 6 warps a partition, of which a block takes 5; 5 blocks by sum
        ("sm_90", 512, 168, 0, 0),
        ("sm_80", 128, 32, 20 << 10, 7),  # 21 KB of 164
        ("sm_90", 128, 32, 20 << 10, 10),  # of 228
        ("sm_120", 128, 32, 20 << 10, 4),  # of 100
        ("sm_80", 128, 32, 163 << 10, 1),
        ("sm_90", 32, 32, 32329, 6),  # and the system's 1 KB, rounded up to 33,408 of 233,472
    ],
)
def test_blocks_that_fit(
    architecture: str, threads: int, registers: int, shared: int, blocks: int
) -> None:
    launch = Launch(10_000, threads, shared)
    assert GPUS[architecture].blocks_that_fit(launch, registers) == blocks


def test_the_grid_limits_the_threads_that_are_there() -> None:
    h200 = GPUS["sm_90"]
    assert h200.resident_threads(Launch(10_000, 160, 0), 64) == 6 * 160
    assert h200.resident_threads(Launch(528, 160, 0), 64) == 4 * 160
    assert h200.resident_threads(Launch(66, 160, 0), 64) == 80


LDG = "LDG.E.128"
FIRST, SECOND = f"{LDG} R4, desc[UR4][R2.64]", f"{LDG} R8, desc[UR4][R2.64+0x10]"
NEXT, AGAIN = "IADD3 R2, P0, R2, 0x40, RZ", "@P0 BRA 0x0"
COPY, COMMIT = "LDGSTS.E.BYPASS.128 [R20], desc[UR4][R2.64]", "LDGDEPBAR"


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        ((), 0),
        (("LDC R1, c[0x0][0x28]", "LDS.128 R4, [R2]"), 0),
        # All widths, and a load that nobody waits for.
        ((FIRST, "LDG.E R8, [R2.64]", "LDG.E.64 R10, [R2.64]", "EXIT"), 16 + 4 + 8),
        (("LDG.E.U16 R4, [R2.64]", "LDG.E.S8 R5, [R2.64]"), 2 + 1),
        # Used before the next, by any of its registers, and after it.
        ((FIRST, "FADD R1, R7, R1", SECOND), 16),
        ((FIRST, SECOND, "FADD R1, R7, R1"), 32),
        ((FIRST, "STG.E.128 desc[UR4][R12.64], R4", SECOND), 16),
        (("LDG.E R7, [R2.64]", "STG.E.128 desc[UR4][R12.64], R4", SECOND), 16),
        ((FIRST, "STG.E.64 desc[UR4][R12.64], R2", SECOND), 32),
        # It waits for the address, and where it would overwrite what is on its way.
        (("LDG.E R2, [R12.64]", FIRST), 16),
        (("LDG.E R3, [R12.64]", FIRST), 16),
        ((FIRST, "CS2R R4, SRZ", SECOND), 16),
        # A predicate may or may not hold; either way into a register is one load.
        (("@P0 LDG.E R4, [R2.64]", "@!P0 LDG.E R4, [R12.64]"), 4),
        (("@P0 LDG.E R4, [R2.64]", "@P0 FADD R1, R4, R1", "@!P1 LDG.E R5, [R2.64]"), 4),
        (("@P0 BRA 0x20", FIRST, SECOND), 32),
        (("BRA 0x20", FIRST, SECOND), 16),
        # A loop that waits for each of its loads, one that waits for all, one that loads ahead.
        ((FIRST, "FADD R1, R4, R1", SECOND, "FADD R1, R8, R1", NEXT, AGAIN), 16),
        ((FIRST, SECOND, "FADD R1, R4, R8", NEXT, AGAIN), 32),
        ((SECOND, "FADD R1, R4, R1", FIRST, "FADD R1, R8, R1", NEXT, AGAIN), 32),
        # What comes before the loop and behind it does not count, ...
        ((FIRST, SECOND, "FADD R1, R8, R4", NEXT, "@P0 BRA 0x10", FIRST), 16),
        # ... nor an address that the loop does not change; its descriptor is none.
        ((FIRST, f"{LDG} R8, desc[UR4][R12.64]", "UMOV UR4, URZ", NEXT, AGAIN), 16),
        ((FIRST, f"{LDG} R8, [R12.64+UR6]", "UMOV UR6, 0x1", NEXT, AGAIN), 32),
        ((FIRST, "ISETP.NE.AND P0, PT, R2, R12, PT", AGAIN), 0),
        # Copies to shared memory, until the wait for their group.
        ((COPY, COMMIT, "DEPBAR.LE SB0, 0x0", "LDS R4, [R20]", COPY), 16),
        ((COPY, COPY, COMMIT, COPY, COMMIT, "DEPBAR.LE SB0, 0x1", FIRST), 48),
        ((COPY, COPY, COMMIT, COPY, COMMIT, "DEPBAR.LE SB0, 0x1", COPY, COPY, COPY), 64),
        ((COPY, COMMIT, "FADD R1, R20, R1", FIRST), 32),
        # A loop with two groups under way while it waits for the third.
        ((COPY, COMMIT, "DEPBAR.LE SB0, 0x2", NEXT, AGAIN), 48),
    ],
)
def test_bytes_in_flight(lines: tuple[str, ...], count: int) -> None:
    assert bytes_in_flight(sass(lines)) == count


def row(backend: str, kernel: str, configuration: str, in_flight: int | None) -> Row:
    made = Row(backend, kernel, configuration, "sm_90", 32, 0, 0, 0, 96)
    return replace(made, in_flight=in_flight)


def test_a_row_tells_of_the_launch_with_the_fewest_threads() -> None:
    plain = row("cuda", "new_kernel", "", None)
    assert plain.launched([], sass((FIRST,))) == plain
    found = plain.launched([Launch(1320, 256, 64), Launch(528, 256, 32)], sass((FIRST, SECOND)))
    assert (found.blocks, found.threads, found.in_flight, found.shared) == (8, 1024, 32768, 32)
    elsewhere = replace(plain, architecture="sm_86")
    assert elsewhere.launched([Launch(1, 32, 0)], "") == elsewhere


def test_too_little_in_flight_is_a_problem() -> None:
    assert row("cuda", "new_kernel", "float", 24 << 10).problem() is None
    assert row("cuda", "new_kernel", "float", None).problem() is None
    under = row("cuda", "new_kernel", "float", (24 << 10) - 1)
    line = "new_kernel (float) on sm_90: has 24575 bytes of loads in flight on an SM, want at least"
    assert str(under.problem()).startswith(line)
    assert replace(under, architecture="sm_90a").problem()
    for architecture in ("sm_80", "sm_86"):
        assert replace(under, architecture=architecture).problem() is None
    assert replace(under, kernel="attention_kernel").problem() is None


def test_kernels_known_to_wait_for_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"cuda old_kernel (float, *)": "why", "triton tokens.k (*)": "why"}
    monkeypatch.setattr(latency_bound, "KNOWN", known)
    slow, fast = (row("cuda", "old_kernel", "float, 1", n) for n in (100, 1 << 20))
    assert slow.problem() is None
    assert row("cuda", "old_kernel", "double, 1", 100).problem()
    assert not [*latency_bound.outdated([slow, fast])]  # nothing of tokens was audited
    assert not [*latency_bound.outdated([])]
    (line,) = latency_bound.outdated([fast])
    assert line.startswith("cuda old_kernel (float, *): has enough loads in flight")
    (line,) = latency_bound.outdated([slow, row("triton 3", "tokens.other", "", 1 << 20)])
    assert line.startswith("triton tokens.k (*)")


def test_kernels_are_named_alike_by_compilers_and_by_cuobjdump() -> None:
    expected = "split_kernel", "__nv_bfloat16, Layout<8, true>, 1"
    arguments = "<__nv_bfloat16, msf::Layout<8, true>, 1>"
    compiler = "const char* msf::name_of() [with auto kKernel = "
    for text in (
        f"{compiler}_GLOBAL__N__3fdf0fae_8_adaln_cu_c2f1f3a2::split_kernel{arguments}]",
        f"{compiler}msf::{{anonymous}}::split_kernel{arguments}]",
        f"void msf::(anonymous namespace)::split_kernel{arguments}(msf::Image<float const>)",
    ):
        assert instance(text) == expected
    with pytest.raises(RuntimeError, match=r"^no kernel with template arguments in 'void f"):
        instance("void f(int)")


def test_a_recorded_launch_does_not_start() -> None:
    data, noise, t, x_t, velocity = torch.full((5, 2, 8), 3.0).unbind()
    tensors = [tensor.data_ptr() for tensor in (data, noise, t, x_t, velocity)]

    def call() -> None:
        emulated().flow_interpolate(1, 2, 8, *tensors, None)

    ((text, grid, block, shared),) = emulated().launches_of(call)
    assert instance(text) == ("flow_interpolate_kernel", "float, 4")
    assert (grid, block, shared) == ([1, 2, 1], [256, 1, 1], 0)
    assert (velocity == 3).all()
    with pytest.raises(ZeroDivisionError):
        emulated().launches_of(lambda: 1 / 0)
    call()
    assert (velocity == 0).all()


def test_launches_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "module", emulated)
    monkeypatch.setattr(cuda_launches, "families", lambda: ["interpolation", "adaln", "attention"])
    found = launches(GPUS["sm_90"])
    # 16 planes of 64 x 64 in vectors of 16 bytes, for each of 256 samples.
    assert found["flow_interpolate_kernel", "float, 4"] == {Launch(64 * 256, 256, 0)}
    assert found["flow_interpolate_kernel", "__nv_bfloat16, 8"] == {Launch(32 * 256, 256, 0)}
    # Both a gate and a norm: tensors without memory count as present.
    bf16 = "__nv_bfloat16, __nv_bfloat16, __nv_bfloat16"
    both = found["gate_residual_adaln_kernel", f"{bf16}, 8, 6, false, true, true"]
    assert {(launch.grid, launch.threads) for launch in both} == {(1024, 128)}
    # One wave of what runs at once, 512 threads on each of 132 SMs, for each of five widths.
    both = found["gate_residual_adaln_backward_kernel", f"{bf16}, 8, 1, true, true"]
    widths = {(launch.grid, launch.threads) for launch in both}
    assert widths == {(1024, 64), (640, 96), (512, 128), (384, 160), (256, 192)}
    # Heads of 36, which CUDA does not take, are left out, and so is qk_norm_rope of attention.
    assert {kernel for kernel, _ in found} == {
        "flow_interpolate_kernel",
        "gate_residual_adaln_kernel",
        "gate_residual_adaln_backward_kernel",
        "sum_partials_kernel",
        "attention_kernel",
        "attention_of_head_kernel",
        "attention_backward_kernel",
    }
