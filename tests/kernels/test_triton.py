"""What is special to Triton: rounding, tiles, the late import, memory.

That the operators are right is what the tests that run on every backend say.
"""

# ruff: noqa: E402
from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from emulation.build import environment
from msf_kernels import triton_support
from numerics import DEVICE, assert_rounded_once, normal
from processes import process, program

triton = pytest.importorskip("triton", minversion="3.5")
import triton.language as tl
from triton.runtime.errors import PTXASError

from msf_kernels.adaln import reference as adaln_reference
from msf_kernels.adaln import triton as adaln_triton
from msf_kernels.dispatch import CompilationFailed
from msf_kernels.euler import reference as euler_reference
from msf_kernels.euler import triton as euler_triton
from msf_kernels.interpolation import reference as interpolation_reference
from msf_kernels.interpolation import triton as interpolation_triton
from msf_kernels.pyramid import reference as pyramid_reference
from msf_kernels.pyramid import triton as pyramid_triton
from msf_kernels.triton_support.arithmetic import narrow, widen
from msf_kernels.triton_support.image import ImageTile
from msf_kernels.triton_support.launch import launch
from msf_kernels.triton_support.rows import Walk

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
BLOCK = 8192

REASON = triton_support.unsupported_reason(torch.device(DEVICE))
runs = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@triton.jit
def convert_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = widen(tl.load(x_ptr + i, mask=i < n))
    tl.store(y_ptr + i, narrow(value, y_ptr.dtype.element_ty), mask=i < n)


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(len(x), dtype=dtype, device=DEVICE)
    programs = triton.cdiv(len(x), BLOCK)
    tensors = {"x_ptr": x.to(DEVICE), "y_ptr": y}
    launch(convert_kernel, y.device, programs, **tensors, n=len(x), BLOCK=BLOCK, warps=4)
    return y.cpu()


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Any NaN equals any other."""
    integers = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return bool(((x.view(integers) == y.view(integers)) | (x.isnan() & y.isnan())).all())


@runs
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_conversions_round_as_those_of_pytorch(dtype: torch.dtype) -> None:
    # Every upper half of a float32, above lower halves at and beside the ties of both formats.
    low = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    high = torch.arange(-(2**15), 2**15)[:, None] << 16
    x = (high + low).flatten().int().view(FP32)
    assert same_bits(converted(x, dtype), x.to(dtype))
    halves = torch.arange(-(2**15), 2**15).short().view(dtype)
    assert same_bits(converted(halves, FP32), halves.float())


STATISTICS = normal(2, 3, dtype=FP32).abs() + 0.1
TABLES = torch.tensor([[9.0, 3.3], [9.0, 0.123]], device=DEVICE)
ROW = torch.tensor(1, device=DEVICE)
TOKENS = normal(2, 2, 24, 12, dtype=FP32)

# Arguments of every operator on images (2, 3, 8, 12), made by new(height, width).
CALLS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "pyramid_split": lambda new, mode: (new(8, 12), *STATISTICS, mode),
    "pyramid_split_backward": lambda new, mode: (new(4, 6), new(8, 12), STATISTICS[1], mode),
    "pyramid_merge": lambda new, mode: (new(4, 6), new(8, 12), *STATISTICS, mode, -1.0, 1.0),
    "pyramid_merge_backward": lambda new, mode: (new(8, 12), STATISTICS[1], mode),
    "flow_interpolate": lambda new, _: (new(8, 12), new(8, 12), TABLES[1] / 10),
    "guided_euler_step": lambda new, _: (new(8, 12), *TOKENS, *TABLES, ROW, new(8, 12), 2),
    "guided_euler_merge": lambda new, mode: (
        *(new(8, 12), new(8, 12), new(8, 12), *TABLES, ROW, 0),
        *(new(4, 6), *STATISTICS, mode, -1.0, 1.0),
    ),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "planar": lambda x: x,
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[..., :1].expand(x.shape),
}


def assert_equal_to_the_reference(name: str, *args: Any) -> None:
    modules = (
        (pyramid_triton, pyramid_reference),
        (interpolation_triton, interpolation_reference),
        (euler_triton, euler_reference),
    )
    kernels, reference = next(pair for pair in modules if hasattr(pair[0], name))
    got, expected = getattr(kernels, name)(*args), getattr(reference, name)(*args)
    for one, right in zip(*((r,) if isinstance(r, Tensor) else r for r in (got, expected))):
        assert one.dtype == right.dtype and torch.equal(one, right)


@runs
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("layout", "dtype"), [*((layout, FP32) for layout in LAYOUTS), ("planar", BF16)], ids=str
)
def test_results_are_those_of_the_reference_bit_for_bit(
    name: str, layout: str, dtype: torch.dtype
) -> None:
    for mode in ("nearest", "bilinear") if "pyramid" in name or "merge" in name else ("",):
        new = lambda *size: LAYOUTS[layout](normal(2, 3, *size, dtype=dtype))  # noqa: E731
        assert_equal_to_the_reference(name, *CALLS[name](new, mode))


@runs
@pytest.mark.parametrize("layout", ["planar", "channels-last"])
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(("dtype", "chunk"), [(FP32, 2), (BF16, 4)], ids=["fp32", "bf16"])
def test_images_of_many_tiles(layout: str, mode: str, dtype: torch.dtype, chunk: int) -> None:
    # More than 128 columns, and more rows than one tile has.
    shape = (1, 3, 10, 264) if layout == "planar" else (1, 130, 8, 6)
    x = LAYOUTS[layout](normal(*shape, dtype=dtype))
    tile = ImageTile.of([x], 2, bilinear=mode == "bilinear")
    assert tile.count >= 4 and tile.chunk == (chunk if layout == "planar" else 1)
    base = pyramid_reference.pyramid_split(x, None, None, mode)[0]
    measured = normal(shape[1], dtype=FP32), normal(shape[1], dtype=FP32).exp()
    for mean, std in ((None, None), measured):
        assert_equal_to_the_reference("pyramid_split", x, mean, std, mode)
        assert_equal_to_the_reference("pyramid_merge", base, x, mean, std, mode, -9.0, 9.0)
        assert_equal_to_the_reference("pyramid_split_backward", base, x, std, mode)
        assert_equal_to_the_reference("pyramid_merge_backward", x, std, mode)


@runs
def test_vectors_of_many_blocks() -> None:
    x, v, noise = normal(3, 2, 700, dtype=FP32)
    number = torch.tensor(1 / 3, dtype=torch.float64)  # the host's numbers are float64
    assert_equal_to_the_reference("flow_interpolate", x, noise, TABLES[1, :2] / 10)
    for dtype in (FP32, torch.float64):
        tensors = x.to(dtype), v.to(dtype), noise.to(dtype), number, number
        assert_equal_to_the_reference("guided_euler_step", *tensors, None, None, 0)


@runs
def test_not_a_number_passes_the_clamp() -> None:
    x = normal(1, 1, 4, 4, dtype=FP32)
    x[0, 0, 1, 2] = torch.nan
    merged = pyramid_triton.pyramid_merge(0 * x[..., ::2, ::2], x, None, None, "nearest", -1.0, 1.0)
    assert torch.equal(merged.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (1, 4, 64, 64), (3, 130, 6, 10), (0, 3, 4, 4)])
def test_tiles_cover_an_image_in_accesses_of_16_bytes(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.empty(shape, dtype=dtype)
    for image in (x, x.to(memory_format=torch.channels_last)):
        tile = ImageTile.of([image], 2)
        assert tile.planar == (image is x)
        batch, channels, height, width = tile.extent
        inner, columns = (channels, width) if tile.planar else (width, channels)
        rows = batch * height * inner
        assert tile.count == -(-rows // tile.rows) * -(-columns // tile.columns)
        assert tile.rows < 2 * max(rows, 1) and tile.columns < 2 * columns and tile.warps <= 4
        if tile.warps == 4:
            a_thread = tile.rows * tile.columns // 128 * (2 if tile.planar else 1)
            assert a_thread * dtype.itemsize == 16


@runs
@pytest.mark.parametrize("rows", [3, 1], ids=["samples", "broadcast"])
def test_rows_of_many_pieces_and_samples_of_many_slices(rows: int) -> None:
    # Three pieces, of which 31 channels do not exist, and slices of which the last is short.
    x, y, grad, residual = normal(4, 3, 53, 161)
    walk = Walk.of(x, adaln_triton.BACKWARD_PROGRAMS, adaln_triton.MIN_ROWS)
    assert (walk.piece, walk.pieces) == (64, 3) and 53 % walk.slice_rows % walk.rows
    modulation, y_bias = normal(rows, 6 * 161).chunk(6, 1)[1:4], normal(161)
    outputs = [
        module.gate_residual_adaln(x, y, y_bias, *modulation, 1e-6, "fp32", "layer")
        for module in (adaln_triton, adaln_reference)
    ]
    rest = x, y, y_bias, *modulation, *outputs[1][2:]
    grads = [
        module.gate_residual_adaln_backward(grad, residual, *rest, "layer")
        for module in (adaln_triton, adaln_reference)
    ]
    for got, expected in zip((*outputs[0], *grads[0]), (*outputs[1], *grads[1]), strict=True):
        assert_rounded_once(got, expected, terms=3 * 53 + 161)


@pytest.mark.parametrize("dtype", [torch.float64, FP32, BF16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("channels", [1, 5, 33, 384, 768, 1000, 1024, 1152, 1536, 4096, 8192])
@pytest.mark.parametrize(
    ("batch", "tokens"), [(0, 8), (1, 0), (1, 1), (1, 4096), (64, 80), (700, 272)]
)
def test_walks_cover_all_rows(batch: int, tokens: int, channels: int, dtype: torch.dtype) -> None:
    x = torch.empty(batch, tokens, channels, dtype=dtype, device="meta")
    walk = Walk.of(x, 528, 16)
    assert walk.count == batch * walk.slices
    covered = (walk.slices - 1) * walk.slice_rows
    assert covered < max(tokens, 1) and tokens <= covered + walk.slice_rows
    lanes, threads = walk.piece * walk.pieces, 32 * walk.warps
    assert channels <= lanes < channels + walk.piece
    if channels % 128 == 0:
        assert lanes == channels, "a lane idles"
        assert walk.rows * lanes * x.element_size() <= 36 * threads or threads == 1024


def test_more_rows_than_a_kernel_can_count() -> None:
    x = torch.empty(2**31, 1, 2, 2, dtype=BF16, device="meta")
    line = "Triton kernels take fewer than 2^31 rows of pixels, got 2147483648"
    with pytest.raises(OverflowError, match=re.escape(line)):
        ImageTile.of([x], 2)


def test_an_error_of_the_compiler_is_one_line() -> None:
    class Kernel:
        __name__ = "gate_kernel"

        def __getitem__(self, grid: tuple[int]) -> Any:
            def run(**arguments: Any) -> None:
                raise PTXASError("no such instruction\nin line 3")

            return run

    line = f"Triton {triton.__version__} cannot compile gate_kernel here: PTXAS error: no such inst"
    with pytest.raises(CompilationFailed) as caught:
        launch(Kernel(), torch.device("cpu"), 1, warps=4)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_importing_the_operators_imports_no_kernels() -> None:
    code = (
        "import sys, msf_kernels; print(*(m for m in sys.modules if m.startswith('msf_kernels')))"
    )
    names = process(code).stdout.split()
    assert "msf_kernels.triton_support" in names
    assert not [name for name in names if name.endswith(".triton") or "triton_support." in name]


@pytest.fixture
def fresh() -> Iterator[None]:
    triton_support.unsupported_reason.cache_clear()
    yield
    triton_support.unsupported_reason.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("module", "line"),
    [
        (None, "Triton is not installed: "),
        (SimpleNamespace(__version__="3.4.0"), "Triton must be 3.5 or later, got 3.4.0"),
        (triton, "no CUDA GPU; set TRITON_INTERPRET=1 to run Triton on the CPU"),
    ],
    ids=["absent", "old", "no GPU"],
)
def test_why_triton_cannot_run(module: Any, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", module)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (triton_support.unsupported_reason(torch.device("cpu")) or "").startswith(line)


@pytest.mark.usefixtures("fresh")
def test_which_devices_triton_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = {0: (8, 0), 1: (7, 5)}
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    reasons = {
        "cpu": "the tensors are on cpu; set TRITON_INTERPRET=1 to run Triton there",
        "cuda:0": None,
        "cuda:1": "this GPU is sm_75; Triton's bfloat16 needs sm_80 or later",
    }
    assert {
        name: triton_support.unsupported_reason(torch.device(name)) for name in reasons
    } == reasons


def test_masks_keep_to_the_tensors() -> None:
    # The interpreter copies each element with memcpy, which AddressSanitizer watches.
    variables = environment("asan", preload=True) | {"CUDA_VISIBLE_DEVICES": ""}
    variables |= {"TRITON_INTERPRET": "1", "MSF_BACKEND": "triton"}
    clean = program("call_with_masks.py", **variables)
    assert clean.returncode == 0, clean.stderr[-4000:]
    wrong = program("triton_out_of_bounds.py", **variables)
    assert wrong.returncode != 0 and "heap-buffer-overflow" in wrong.stderr
