"""Wrong kernels end with one line that says which thread went wrong, and where."""

from __future__ import annotations

import re

import pytest
import torch

from .semantics import HERE, launch

# kernel, block, what is said of it; FILE stands for mistakes.cuh and any line.
MISTAKES = [
    (
        "barrier_that_some_skip",
        (32,),
        "deadlock in block (0,0,0): 24 threads wait in __syncthreads at FILE, first (8,0,0); "
        "8 have returned",
    ),
    (
        "deadlock_at_two_places",
        (32, 2),
        "deadlock in block (0,0,0): 33 threads wait in __syncthreads at FILE, first (0,0,0); "
        "31 threads wait in __syncwarp at FILE, first (0,1,0); 0 have returned",
    ),
    (
        "two_barriers_that_meet",
        (64,),
        "block (0,0,0) thread (32,0,0): barrier divergence: __syncthreads at FILE while others "
        "wait in __syncthreads at FILE",
    ),
    (
        "two_collectives_that_meet",
        (32,),
        "block (0,0,0) thread (1,0,0): warp divergence: __syncwarp at FILE while others wait in "
        "__shfl_sync at FILE",
    ),
    (
        "caller_outside_mask",
        (32,),
        "block (0,0,0) thread (3,0,0): __shfl_sync at FILE: the calling lane is not in the mask",
    ),
    (
        "lanes_that_do_not_exist",
        (40,),
        "block (0,0,0) thread (32,0,0): __shfl_sync at FILE: the mask names lanes that do not "
        "exist",
    ),
    (
        "lane_that_has_returned",
        (32,),
        "block (0,0,0) thread (1,0,0): __shfl_sync at FILE: the mask names lanes that have "
        "returned",
    ),
    (
        "lane_that_returns_later",
        (32,),
        "block (0,0,0) thread (31,0,0): has returned while lanes of its warp wait for it in "
        "__shfl_sync at FILE",
    ),
    (
        "overlapping_masks",
        (32,),
        "block (0,0,0) thread (16,0,0): __syncwarp at FILE: the mask overlaps that of a pending "
        "__syncwarp at FILE",
    ),
    (
        "copies_that_nobody_waits_for",
        (32,),
        "block (0,0,0) thread (0,0,0): has returned without waiting for its asynchronous copies",
    ),
    (
        "copy_to_a_misaligned_address",
        (32,),
        "block (0,0,0) thread (0,0,0): copy_async at FILE: an address is not a multiple of 16",
    ),
    (
        "misaligned_row",
        (32,),
        "block (0,0,0) thread (0,0,0): load_matrices at FILE: the address of a row is not a "
        "multiple of 16",
    ),
    (
        "read_outside_mask",
        (32,),
        "block (0,0,0) thread (15,0,0): __shfl_xor_sync at FILE: lane 0 reads lane 16 outside the "
        "mask",
    ),
]


@pytest.mark.parametrize(("kernel", "block", "report"), MISTAKES, ids=[row[0] for row in MISTAKES])
def test_report(kernel: str, block: tuple[int, ...], report: str) -> None:
    for _ in range(2):  # what a failed launch leaves behind does not disturb the next
        assert failure(kernel, block=block) == report
        values = torch.arange(96.0)
        launch("reverse", values, block=(96,), shared_bytes=4 * 96)
        assert values.tolist() == list(reversed(range(96)))


def failure(
    kernel: str,
    *,
    grid: tuple[int, ...] = (1,),
    block: tuple[int, ...] = (1,),
    shared_bytes: int = 0,
) -> str:
    """What is said after "failed: "."""
    with pytest.raises(RuntimeError) as raised:
        launch(kernel, grid=grid, block=block, shared_bytes=shared_bytes)
    message = str(raised.value)
    assert re.fullmatch(r"msf: kernel launch \(grid .*\) failed: .*", message)
    return re.sub(rf"{re.escape(str(HERE / 'mistakes.cuh'))}:\d+", "FILE", message).split(
        "failed: "
    )[1]


def test_waiting_threads_leave_the_kernel() -> None:
    inside = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="24 threads wait"):
        launch("barrier_inside", inside, block=(32,))
    assert inside.item() == 0


def test_launch_is_described() -> None:
    with pytest.raises(RuntimeError) as raised:
        launch("nothing", grid=(2, 3), block=(0, 4), shared_bytes=5)
    assert str(raised.value) == (
        "msf: kernel launch (grid 2x3x1, block 0x4x1, 5 bytes of shared memory) failed: "
        "invalid configuration: block.x is 0, must be 1 to 1024"
    )


def test_line_is_that_of_the_call() -> None:
    lines = (HERE / "mistakes.cuh").read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "threadIdx.x >= 8" in text)
    with pytest.raises(RuntimeError, match=rf"mistakes\.cuh:{line},"):
        launch("barrier_that_some_skip", block=(32,))


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "reason"),
    [
        ((0,), (1,), 0, "grid.x is 0, must be 1 to 2147483647"),
        ((1, 65536), (1,), 0, "grid.y is 65536, must be 1 to 65535"),
        ((1, 1, 65536), (1,), 0, "grid.z is 65536, must be 1 to 65535"),
        ((1,), (1025,), 0, "block.x is 1025, must be 1 to 1024"),
        ((1,), (1, 1, 65), 0, "block.z is 65, must be 1 to 64"),
        ((1,), (32, 33), 0, "threads a block is 1056, must be 1 to 1024"),
        ((1,), (1,), 232449, "dynamic shared memory is 232449, must be 0 to 232448"),
    ],
)
def test_configuration_beyond_the_limits(
    grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, reason: str
) -> None:
    said = failure("nothing", grid=grid, block=block, shared_bytes=shared_bytes)
    assert said == f"invalid configuration: {reason}"


def test_static_and_dynamic_shared_memory_count_together() -> None:
    for most, limit in ((16384, 49152), (199680, 232448)):
        launch("too_much_shared_memory", shared_bytes=most)
        said = failure("too_much_shared_memory", shared_bytes=most + 4)
        assert said.endswith(f"{limit + 4} bytes of shared memory, at most {limit}")


@pytest.mark.parametrize("order", ["", "random", "random:", "random:-1", "random:x", "LIFO"])
def test_order_that_is_none(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSF_EMULATION_ORDER", order)
    said = failure("nothing")
    assert said == f"MSF_EMULATION_ORDER: must be fifo, lifo or random:SEED, got '{order}'"
