"""What each built-in of the emulated CUDA does, against answers worked out by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from .semantics import launch

LANES = range(32)


def integers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def test_indices_in_three_dimensions() -> None:
    grid, block = (2, 3, 4), (5, 2, 3)
    out = integers(24 * 30, 12)
    launch("indices", out, grid=grid, block=block)
    order = [
        (*thread[::-1], *index[::-1], *block, *grid)
        for index in itertools.product(*map(range, grid[::-1]))
        for thread in itertools.product(*map(range, block[::-1]))
    ]
    assert out.tolist() == [list(row) for row in order]


@pytest.mark.parametrize(
    ("argument", "width", "direct", "up", "down", "xor"),
    [
        (
            3,
            32,
            [3 for _ in LANES],
            [0, 1, 2, *range(29)],
            [*range(3, 32), 29, 30, 31],
            [n ^ 3 for n in LANES],
        ),
        (
            3,
            8,
            [n // 8 * 8 + 3 for n in LANES],
            [n + lane for n in (0, 8, 16, 24) for lane in (0, 1, 2, 0, 1, 2, 3, 4)],
            [n + lane for n in (0, 8, 16, 24) for lane in (3, 4, 5, 6, 7, 5, 6, 7)],
            [n ^ 3 for n in LANES],
        ),
        # Beyond a segment every lane keeps its own; but xor may read an earlier segment.
        (
            10,
            8,
            [n // 8 * 8 + 2 for n in LANES],
            list(LANES),
            list(LANES),
            [n ^ 10 if n // 8 % 2 else n for n in LANES],
        ),
    ],
)
def test_shuffles(
    argument: int, width: int, direct: list[int], up: list[int], down: list[int], xor: list[int]
) -> None:
    out = integers(4, 32)
    parameters = torch.tensor([argument, width], dtype=torch.int32)
    launch("shuffles", out, parameters, parameters[1:], block=(32,))
    assert out.tolist() == [direct, up, down, xor]


@pytest.mark.parametrize("true", [[], [31], list(LANES)])
def test_any(true: list[int]) -> None:
    values = integers(64)
    values[true] = 1
    launch("any_of_warp", values, block=(64,))
    assert values.tolist() == 32 * [int(bool(true))] + 32 * [0]


def test_shuffles_of_eight_bytes() -> None:
    values = torch.arange(64, dtype=torch.float64) + 2**-40
    exact = values.view(2, 32).sum(1).repeat_interleave(32)
    launch("warp_sums", values, block=(64,))
    assert torch.equal(values, exact)


@pytest.mark.parametrize("order", ["fifo", "lifo", "random:1", "random:2"])
@pytest.mark.parametrize("threads", [1, 32, 40, 1024])
def test_barrier(order: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSF_EMULATION_ORDER", order)
    values = torch.rand(threads)
    mirrored = values.flip(0)
    launch("reverse", values, block=(threads,), shared_bytes=4 * threads)
    assert torch.equal(values, mirrored)


@pytest.mark.parametrize("order", ["fifo", "lifo", "random:1", "random:2"])
def test_warp_barrier(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSF_EMULATION_ORDER", order)
    out = integers(32)
    launch("rotate_warp", out, block=(32,))
    assert out.tolist() == [31, *range(31)]


def test_every_block_finds_its_shared_memory_poisoned() -> None:
    out = torch.zeros(3, 4)
    launch("unwritten_shared", out, grid=(3,), shared_bytes=8)
    assert out[:, :3].isnan().all()
    assert out[:, 3].tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("order", "first", "second"),
    [
        ("fifo", [[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]),
        ("lifo", [[8, 7, 6], [2, 1, 0]], [[11, 10, 9], [5, 4, 3]]),
    ],
)
def test_order(
    order: str, first: list[list[int]], second: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert turns(order, 3, monkeypatch) == (first, second)


def test_random_order_follows_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [turns(f"random:{seed}", 50, monkeypatch) for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]
    for block in itertools.chain(*runs[0]):
        assert block != sorted(block)
    assert sorted(itertools.chain(*runs[0][0], *runs[0][1])) == list(range(200))


def turns(
    order: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[int]], list[list[int]]]:
    """For two blocks, each thread's turn before a barrier and after it."""
    monkeypatch.setenv("MSF_EMULATION_ORDER", order)
    first, second = integers(2, threads), integers(2, threads)
    launch("turns", integers(1), first, second, grid=(2,), block=(threads,))
    return first.tolist(), second.tolist()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 12), (torch.float64, 27)])
def test_arithmetic_rounds_every_step(dtype: torch.dtype, bits: int) -> None:
    step = 2.0**-bits  # (1 + step)^2 = 1 + 2 step + step^2, whose last term no product holds
    inputs = torch.tensor([1 + step, 1 + step, -1 - 2 * step, 0.0625], dtype=dtype)
    out = torch.zeros(3, dtype=dtype)
    launch("arithmetic_float" if dtype == torch.float32 else "arithmetic_double", inputs, out)
    assert out.tolist() == [0, step**2, 4]


def test_vectors() -> None:
    out = torch.zeros(4)
    launch("vectors", torch.arange(4.0), out)
    assert out.tolist() == [1, 1, 2, 3]


def by_lane(matrix: Tensor) -> Tensor:
    """The registers (32, n, 2) of a matrix (8 r, 8 c): its 8 x 8 parts, down then across."""
    height, width = matrix.shape
    parts = matrix.view(height // 8, 8, width // 8, 4, 2)  # a lane has two columns of a row
    return parts.permute(1, 3, 2, 0, 4).reshape(32, -1, 2).contiguous()


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(transposed: bool) -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    registers = torch.zeros(32, 7, 2, dtype=torch.int16)
    launch("load_matrices" + "_transposed" * transposed, matrices, registers, block=(32,))
    expected = by_lane((matrices.mT if transposed else matrices).reshape(32, 8))
    assert torch.equal(registers, expected[:, [0, 1, 2, 3, 0, 1, 0]])


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multiply_matrices(dtype: torch.dtype, depth: int) -> None:
    a, b, c = (torch.randint(-8, 9, shape) for shape in ((16, depth), (depth, 8), (16, 8)))
    operands = [by_lane(x.to(dtype)) for x in (a, b.mT.contiguous())]
    sums = by_lane(c.float())
    name = "half" if dtype == torch.float16 else "bfloat16"
    launch(f"multiply_{name}_{depth}", *operands, sums, block=(32,))
    assert torch.equal(sums, by_lane((a @ b + c).float()))


def test_copies_arrive_at_their_wait() -> None:
    source = torch.rand(2, 40, 4)
    seen = torch.zeros(40, 3, 4)
    launch("copies", source, seen, block=(40,), shared_bytes=2 * 40 * 16)
    first = source[0].clone()
    first[3] = 0
    assert seen[:, 0].isnan().all()
    assert torch.equal(seen[:, 1], first) and torch.equal(seen[:, 2], source[1])
