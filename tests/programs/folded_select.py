"""Two kernels, compiled for sm_90 and audited: one whose product ptxas 12.8 folds away, one cured.

Prints, for each, the problem of its row of the audit and what its SASS alone shows, as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl

from msf_kernels.audit import triton as audit
from msf_kernels.audit.disassembly import disassemble
from msf_kernels.audit.instructions import fault


@triton.jit
def folded_kernel(a, b, out, rows, STEPS: tl.constexpr):
    """out (64, 64) = a (64, 32 STEPS) @ b (32 STEPS, 64), zero from row `rows` on."""
    row, column, k = tl.arange(0, 64), tl.arange(0, 64)[None, :], tl.arange(0, 32)
    total = tl.zeros((64, 64), tl.float32)
    for i in range(STEPS):
        x = tl.load(a + row[:, None] * (32 * STEPS) + (i * 32 + k)[None, :])
        total = tl.dot(x, tl.load(b + (i * 32 + k)[:, None] * 64 + column), total)
    total = tl.where((row < rows)[:, None], total, 0.0)
    tl.store(out + row[:, None] * 64 + column, total)


@triton.jit
def masked_kernel(a, b, out, rows, STEPS: tl.constexpr):
    """The same, but for the select: what lies beyond is not loaded."""
    row, column, k = tl.arange(0, 64), tl.arange(0, 64)[None, :], tl.arange(0, 32)
    total = tl.zeros((64, 64), tl.float32)
    for i in range(STEPS):
        exists = (row < rows)[:, None]
        x = tl.load(a + row[:, None] * (32 * STEPS) + (i * 32 + k)[None, :], mask=exists, other=0)
        total = tl.dot(x, tl.load(b + (i * 32 + k)[:, None] * 64 + column), total)
    tl.store(out + row[:, None] * 64 + column, total)


def findings(kernel: Any) -> dict[str, str | None]:
    a, b = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((64, 256), (256, 64))
    )
    out = torch.empty(64, 64, device="meta")
    ((_, compiled, log, _),) = audit._compile(lambda: kernel[(1,)](a, b, out, 50, 8), 90)
    (sass,) = disassemble([compiled.asm["cubin"]], 90)
    row = audit._row(kernel.__name__, "planted", 90, compiled, log, audit.BUDGET, sass)
    ptx = compiled.asm["ptx"].replace("selp", "")  # leaves what is asked of the SASS
    return {"audit": row.problem(), "sass": fault(ptx, sass)}


if __name__ == "__main__":
    json.dump({"folded": findings(folded_kernel), "masked": findings(masked_kernel)}, sys.stdout)
